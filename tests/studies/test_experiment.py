"""A whole study of a tiny network: its cells, its resumption, its processes, its page, and what it refuses."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tdcompile
from tdcompile.cli.main import main
from tdcompile.core.decomposition import Decomposition
from tdcompile.core.registry import make
from tdcompile.data.loading import load_data
from tdcompile.data.metrics import accuracy
from tdcompile.data.task import Task
from tdcompile.errors import InputError, TdcompileError, UnavailableError
from tdcompile.ir.program import sites_of
from tdcompile.numerics.covariance import Identity
from tdcompile.planning.approximation_error import weight_errors
from tdcompile.planning.rank_grid import ranks_for
from tdcompile.studies.cell import Bench, Point
from tdcompile.studies.correlation import kendall
from tdcompile.studies.crew import over_ray
from tdcompile.studies.findings import Cell, Failure, Findings, notes

NET = """
from torch import nn

def build():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(),
        nn.Conv2d(12, 12, 1), nn.ReLU(), nn.Conv2d(12, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 4),
    )
"""
INPUT = torch.zeros(2, 3, 6, 6)
BRIEF: dict[str, Any] = {"methods": ("tucker2", "tt"), "compressions": (0.5, 0.9)}
FLAGS = ["net.py:build", "--weights", "w.pt", "--input", "1x3x6x6", "--data", "npz:d.npz", "--calibrate", "24"]
FLAGS += ["--methods", "tucker2,tt", "--compressions", "0.5,0.9"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a network that has learnt its data, so that accuracies differ."""
    home = tmp_path_factory.mktemp("study")
    (home / "net.py").write_text(NET)
    random = np.random.default_rng(0)
    labels = np.arange(240) % 4
    patterns = random.normal(size=(4, 3, 6, 6))
    images = (0.6 * patterns[labels] + random.normal(size=(240, 3, 6, 6))).astype(np.float32)
    np.savez(home / "d.npz", x=images[:140], y=labels[:140], x_test=images[140:], y_test=labels[140:])
    torch.manual_seed(0)
    net = build()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(torch.tensor(images[:140])), torch.tensor(labels[:140])).backward()
        optimizer.step()
    torch.save(net.state_dict(), home / "w.pt")
    return home


def build() -> nn.Sequential:
    scope: dict[str, Any] = {}
    exec(NET, scope)
    net: nn.Sequential = scope["build"]()
    return net


@pytest.fixture
def home(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("net.py", "d.npz", "w.pt"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


@pytest.fixture
def subject(trained: Path) -> tuple[nn.Sequential, Tensor, Task]:
    net = build()
    net.load_state_dict(torch.load(trained / "w.pt", weights_only=True))
    train, test = load_data(f"npz:{trained / 'd.npz'}", (3, 6, 6))
    return net.eval(), INPUT, Task(train, test, calibrate=24, source="patterns")


def timeless(cells: tuple[Cell, ...]) -> list[dict[str, Any]]:
    return [cell.model_dump(exclude={"seconds"}) for cell in cells]


def test_the_cells_are_what_one_computes_by_hand(subject: tuple[nn.Sequential, Tensor, Task]) -> None:
    net, inputs, task = subject
    before = {name: value.clone() for name, value in net.state_dict().items()}
    found = tdcompile.study(net, inputs, task, seeds=2, **BRIEF)
    assert found.layers == ("2", "6")  # neither the first nor the last, nor the one that no method applies to
    assert {(one.layer, one.method) for one in found.omitted} == {("4", "tucker2"), ("4", "tt")}
    assert len(found.cells) == 2 * 2 * 2 * 2
    assert found.dense_score == accuracy(net, task.test)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    for cell in found.cells:
        form, layer = make(Decomposition, cell.method), sites_of(net, (inputs,))[cell.layer].layer
        assert cell.ranks == ranks_for(form, layer, 1 - cell.compression)
        assert cell.kept == pytest.approx(1 - cell.compression, abs=0.1)
        part = net[int(cell.layer)]
        weight = part.weight.detach()
        other = form.reconstruct(layer, form.factorize(layer, weight, cell.ranks, Identity.of(weight)))
        errors = (cell.weights_absolute, cell.weights_relative, cell.weights_scaled)
        assert errors == pytest.approx(weight_errors(weight, other))
        part.weight.data = other
        assert cell.score_before == pytest.approx(accuracy(net, task.test), abs=0.011)  # one sample of rounding
        part.weight.data = weight
    pairs = {(cell.layer, cell.method, cell.compression): cell for cell in found.cells if cell.seed == 0}
    for cell in found.cells:
        same = pairs[cell.layer, cell.method, cell.compression]
        assert (cell.weights_relative, cell.score_before) == (same.weights_relative, same.score_before)
        # another seed is another calibration sample
        assert (cell.features_absolute == same.features_absolute) == (cell.seed == 0)
    strong = [cell for cell in found.cells if cell.compression == 0.9]
    weak = [cell for cell in found.cells if cell.compression == 0.5]
    assert min(c.features_relative for c in strong) > max(c.features_relative for c in weak)
    rows = [cell for cell in found.cells if cell.seed == 0]
    assert found.tau("before", "overall", None, "weights_absolute").mean == pytest.approx(
        kendall([c.weights_absolute for c in rows], [1 - c.score_before for c in rows])
    )


def test_layers_that_are_named_may_be_the_first_and_the_last(subject: tuple[nn.Sequential, Tensor, Task]) -> None:
    found = tdcompile.study(*subject, methods=("svd", "tucker2"), compressions=(0.5,), layers=("0", "9"))
    assert [(cell.layer, cell.method) for cell in found.cells] == [("0", "tucker2"), ("9", "svd")]


def test_lists_may_be_texts_and_one_compression_a_number(subject: tuple[nn.Sequential, Tensor, Task]) -> None:
    found = tdcompile.study(*subject, methods="tucker2,tt", compressions=0.5, layers="2,6")
    assert (found.methods, found.compressions, found.layers) == (("tucker2", "tt"), (0.5,), ("2", "6"))
    with pytest.raises(InputError, match=r"compressions=0\.5,0\.9 must be a list, each a share in \(0, 1\)"):
        tdcompile.study(*subject, compressions="0.5,0.9")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="is given twice"):
        tdcompile.study(*subject, methods="tt,tt")


def test_test_errors_that_are_all_one_are_said_to_give_no_tau(subject: tuple[nn.Sequential, Tensor, Task]) -> None:
    found = tdcompile.study(*subject, **BRIEF)
    said = "no τ before fine-tuning: accuracy is the same in all cells"
    assert said not in notes(found)
    alike = tuple(cell.model_copy(update={"score_before": 0.25}) for cell in found.cells)
    told = notes(found.model_copy(update={"cells": alike}))
    assert told == [*notes(found), said]


def test_data_may_be_a_pair_or_a_text(subject: tuple[nn.Sequential, Tensor, Task], trained: Path) -> None:
    net, inputs, task = subject
    text, pair = (
        tdcompile.study(net, inputs, data, methods=("tt",), compressions=(0.5,), layers=("2",)).cells
        for data in (f"npz:{trained / 'd.npz'}", (task.train, task.test))
    )
    (one,), (other,) = timeless(text), timeless(pair)
    assert one | {"key": other["key"]} == other  # the key knows where the data came from


def test_tuning_repairs_and_its_seed_counts(subject: tuple[nn.Sequential, Tensor, Task]) -> None:
    found = tdcompile.study(
        *subject, methods=("tt",), compressions=(0.9,), layers=("2",), seeds=2, tune="epochs=8,lr=0.05,batch=32"
    )
    first, second = found.cells
    assert first.score_before == second.score_before
    assert min(first.score_after or 0, second.score_after or 0) > first.score_before
    assert found.tune == "finetune{epochs=8.0,lr=0.05,batch=32}"
    assert found.moments == ("before", "after")
    again = tdcompile.study(
        *subject, methods=("tt",), compressions=(0.9,), layers=("2",), seed=1, tune="epochs=8,lr=0.05,batch=32"
    )
    assert timeless(again.cells) == timeless(found.cells[1:])  # a cell does not depend on those before it


def test_a_study_goes_on_where_it_was_cut_off(subject: tuple[nn.Sequential, Tensor, Task], tmp_path: Path) -> None:
    out = tmp_path / "made"
    whole = tdcompile.study(*subject, out=out, **BRIEF)
    lines = (out / "cells.jsonl").read_text().splitlines()
    assert len(lines) == len(whole.cells) == 8
    (out / "cells.jsonl").write_text("\n".join([*lines[:5], lines[5][:40]]))  # the sixth was being written
    seen: list[tuple[int, int]] = []
    again = tdcompile.study(
        *subject, out=out, resume=True, told=lambda done, of, cell: seen.append((done, of)), **BRIEF
    )
    assert seen == [(6, 8), (7, 8), (8, 8)]
    assert again.cells[:5] == whole.cells[:5]  # to the second that they took
    assert timeless(again.cells) == timeless(whole.cells)
    assert again.taus == whole.taus
    seen.clear()
    third = tdcompile.study(
        *subject, out=out, resume=True, told=lambda done, of, cell: seen.append((done, of)), **BRIEF
    )
    assert (seen, third.cells) == ([], again.cells)


@pytest.mark.parametrize("change", ["calibrate", "evaluate", "weights", "data"])
def test_cells_of_other_settings_are_not_taken(
    subject: tuple[nn.Sequential, Tensor, Task], tmp_path: Path, change: str
) -> None:
    net, inputs, task = subject
    how: dict[str, Any] = {"methods": ("tt",), "compressions": (0.5,), "layers": ("2",), "out": tmp_path / "made"}
    first = tdcompile.study(net, inputs, task, **how).cells[0]
    assert task.train is not None
    if change == "weights":
        net[6].weight.data *= 1.01
    other = {
        "calibrate": replace(task, calibrate=23),
        "evaluate": replace(task, evaluate=50),
        "data": replace(task, train=task.train.subset(range(1, len(task.train)))),
        "weights": task,
    }
    second = tdcompile.study(net, inputs, other[change], resume=True, **how).cells[0]
    assert first.key != second.key
    assert len((tmp_path / "made" / "cells.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_two_processes_find_what_one_finds(subject: tuple[nn.Sequential, Tensor, Task]) -> None:
    how: dict[str, Any] = {**BRIEF, "layers": ("2",), "tune": "epochs=1,batch=32"}
    alone = tdcompile.study(*subject, **how)
    assert timeless(tdcompile.study(*subject, jobs=2, **how).cells) == timeless(alone.cells)


def test_what_cannot_be_sent_to_a_process_is_told(subject: tuple[nn.Sequential, Tensor, Task]) -> None:
    net, inputs, task = subject
    net.register_forward_hook(lambda module, arguments, output: output)
    with pytest.raises(InputError, match="cannot be sent to other processes"):
        tdcompile.study(net, inputs, task, jobs=2, **BRIEF)


def test_a_cell_that_fails_is_told_and_costs_no_other(
    subject: tuple[nn.Sequential, Tensor, Task], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measure = Bench.measure

    def diverging(self: Bench, point: Point, key: str) -> Cell:
        if (point.method, point.compression) == ("tt", 0.9):
            raise TdcompileError("finetune diverged")
        return measure(self, point, key)

    told: list[Cell | Failure] = []
    with monkeypatch.context() as patch:
        patch.setattr(Bench, "measure", diverging)
        found = tdcompile.study(*subject, out=tmp_path / "made", told=lambda done, of, one: told.append(one), **BRIEF)
    assert len(found.cells) == 6
    assert {(one.layer, one.method, one.compression) for one in found.failed} == {("2", "tt", 0.9), ("6", "tt", 0.9)}
    assert sum(isinstance(one, Failure) for one in told) == 2
    assert "finetune diverged" in (tmp_path / "made" / "study.html").read_text()
    mended = tdcompile.study(*subject, out=tmp_path / "made", resume=True, **BRIEF)
    assert (len(mended.cells), mended.failed) == (8, ())


def test_where_every_cell_fails_there_are_no_findings(subject: tuple[nn.Sequential, Tensor, Task]) -> None:
    with pytest.raises(TdcompileError, match=r"no cell could be measured.*diverged"):
        tdcompile.study(*subject, methods=("tt",), compressions=(0.9,), layers=("2",), tune="epochs=2,lr=1e30,batch=32")


class Page(HTMLParser):
    """Counts the marks and figures, and collects what refers to elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}
        self.elsewhere: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.elsewhere += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_command_writes_json_a_table_and_a_page(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["study", *FLAGS, "-o", "made"]) == 0
    shown = capfd.readouterr()
    assert "across methods" in shown.out
    assert "left out: 4 by tucker2" in shown.out
    assert "[8/8] 6 tt, 90 % removed, seed 0" in shown.err
    found = Findings.model_validate_json((home / "made" / "study.json").read_text())
    assert sorted(path.name for path in (home / "made").iterdir()) == ["cells.jsonl", "study.html", "study.json"]
    page = Page((home / "made" / "study.html").read_text())
    assert (page.counts["figure"], page.elsewhere) == (6 + 3, [])
    shown_taus = [tau for tau in found.taus if tau.level is not None and tau.mean is not None]
    assert page.counts["circle"] == 6 * len(found.cells) + len(shown_taus)
    assert found.dense_score > 0.6  # or the figures above would say little
    assert main(["study", *FLAGS, "-o", "made", "--resume", "--json", "-q"]) == 0
    again = capfd.readouterr()
    assert json.loads(again.out) == json.loads(found.to_json())
    assert again.err == ""


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--methods", "tucker2,tukcer"], "did you mean 'tucker2'?"),
        (["--methods", "tt,tt"], "given twice"),
        (["--methods", "svd", "--layers", "2"], "apply to no chosen layer"),
        (["--layers", "conv*"], "--layers 'conv*' matches no layer: known: 0, 2"),
        (["--compressions", "0.5,half"], "not a list of shares"),
        (["--compressions", "1"], "must be a list, each a share in (0, 1)"),
        (["--tune", "epoch=1"], "did you mean 'epochs'?"),
        (["--data", "npz:none.npz"], "no file 'none.npz'"),
        (["--data", "npz:unlabelled.npz"], "have no targets"),
        (["-o", "net.py"], "is a file"),
        (["-o", "mine"], "holds thesis.tex"),
        (["-o", "earlier"], "go on with --resume"),
    ],
)
def test_what_cannot_be_used_is_refused(
    home: Path, capfd: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    (home / "mine").mkdir()
    (home / "mine" / "thesis.tex").write_text("years of work")
    (home / "earlier").mkdir()
    cell = dict.fromkeys(Cell.model_fields, 0.5) | {
        "key": "k",
        "layer": "a",
        "method": "tt",
        "ranks": [1],
        "seed": 0,
    }
    (home / "earlier" / "cells.jsonl").write_text(json.dumps(cell) + "\n")
    np.savez(home / "unlabelled.npz", x=np.zeros((20, 3, 6, 6), np.float32))
    before = {path.name for path in home.rglob("*")} - {"__pycache__"}
    assert main(["study", *(["-o", "made"] if "-o" not in flags else []), *FLAGS, *flags]) == 2
    shown = capfd.readouterr()
    assert shown.out == ""
    (sentence,) = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    assert said in sentence
    assert {path.name for path in home.rglob("*") if "__pycache__" not in str(path)} == before


def test_a_network_of_one_batch_size_is_refused_without_advice_that_does_not_help(
    home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    own = "class Fixed(nn.Sequential):\n    def forward(self, x):\n        return super().forward(x.view(2, 3, 6, 6))\n"
    (home / "net.py").write_text(f"{NET}\n{own}\ndef fixed():\n    return Fixed(*build())\n")
    flags = [flag.replace("1x3x6x6", "2x3x6x6") for flag in FLAGS[1:]]
    assert main(["study", "net.py:fixed", "-o", "made", *flags]) == 2
    error = capfd.readouterr().err
    assert "a study runs the network on batches of several sizes, but the network fixes its batch size:" in error
    assert "--no-dynamic-batch" not in error


def test_a_source_and_data_are_needed(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["study"]) == 2
    assert "give a SOURCE" in capfd.readouterr().err
    assert main(["study", "net.py:build", "--input", "1x3x6x6"]) == 2
    assert "give --data" in capfd.readouterr().err


def test_an_interrupted_study_says_how_to_go_on(
    home: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, count = Bench.measure, iter(range(100))

    def interrupted(self: Bench, point: Point, key: str) -> Cell:
        if next(count) == 3:
            raise KeyboardInterrupt
        return measure(self, point, key)

    with monkeypatch.context() as patch:
        patch.setattr(Bench, "measure", interrupted)
        assert main(["study", *FLAGS, "-o", "made"]) == 130
    assert "--resume" in capfd.readouterr().err
    assert len((home / "made" / "cells.jsonl").read_text().splitlines()) == 3
    assert main(["study", *FLAGS, "-o", "made", "--resume"]) == 0
    assert "[4/8]" in capfd.readouterr().err.splitlines()[0]


def test_without_ray_its_extra_is_named(home: Path, capfd: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["study", *FLAGS, "-o", "made", "--ray"]) == 5
    assert "pip install 'tdcompile[ray]'" in capfd.readouterr().err
    assert not (home / "made").exists()
    with pytest.raises(UnavailableError):
        next(over_ray(_never, [(Point("a", "tt", 0.5, 0), "k")], 1))


def _never() -> Bench:
    raise AssertionError


@pytest.mark.slow
def test_ray_finds_what_one_process_finds(subject: tuple[nn.Sequential, Tensor, Task]) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'tdcompile[ray]'")
    alone = tdcompile.study(*subject, **BRIEF)
    assert timeless(tdcompile.study(*subject, jobs=2, ray=True, **BRIEF).cells) == timeless(alone.cells)
