"""The command keeps its promises: results alone on stdout, one sentence and a code for every failure, nothing lost."""

from __future__ import annotations

import errno
import functools
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
import typer
from safetensors.torch import save_file

import tdcompile.cli.compile_job as compile_command
import tdcompile.compiler
from tdcompile.artifact.checkpoint import Checkpoint
from tdcompile.artifact.report import Report
from tdcompile.backend.export import export_onnx
from tdcompile.backend.lowering import lowering
from tdcompile.backend.quantized_form import QuantizedForm
from tdcompile.cli.compile_job import name_of, workspace_of
from tdcompile.cli.load_job import recipe_of, to_toml
from tdcompile.cli.main import SPINS, app, main
from tdcompile.core.pipeline import Pipeline
from tdcompile.errors import InputError
from tdcompile.ir.program import Program
from tdcompile.recipes import Recipe, load_recipe
from tdcompile.support.folder_lock import only_writer
from tdcompile.training.run_state import Tuning
from tdcompile.training.trainer import Trainer

NET = """
import os
import torch
from torch import nn

def build():
    print("a stray line of the user's code")
    os.write(1, b"and one past Python\\n")
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )

class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x): return self.fc(x.reshape(2, 4))

def number(): return 3
def infinite():
    net = build()
    net[0].weight.data[0] = float("nan")
    return net

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 4)
        self.table = nn.Embedding(2, 8)

    def forward(self, x, ids): return self.fc(x) + self.fc(self.table(ids))
"""
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]  # the app is a group
BRIEFLY = functools.partial(tdcompile.compiler.measure, seconds=0.1)  # no test here is about the time that is measured
SMALL = ("--input", "1x3x8x8", "--budget", "macs=0.7")


class Ran:
    """One call of the command: its exit code and what it wrote."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def sentence(self) -> str:
        """What was said about the one error."""
        told = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(told) == 1, self.err
        assert "Traceback" not in self.err
        assert self.out == ""
        return told[0]


@pytest.fixture
def tdc(capfd: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: object) -> Ran:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        return Ran(code, *capfd.readouterr())

    return run


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, that holds a network and its data."""
    (tmp_path / "net.py").write_text(NET)
    x = np.random.default_rng(0).normal(size=(40, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "good.npz", x=x, y=np.arange(40) % 4)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("TDCOMPILE_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder, written by the command once."""
    here = tmp_path_factory.mktemp("compiled")
    (here / "net.py").write_text(NET)
    arguments = [f"{here}/net.py:build", *SMALL, "-o", str(here / "made"), "-q"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tdcompile.compiler, "measure", BRIEFLY)
        assert main(["compile", *arguments]) == 0
    return here / "made"


# What the command is


def test_every_command_is_there() -> None:
    commands = {"compile", "analyze", "plan", "validate", "bench", "list", "doctor", "demo", "study", "sweep"}
    assert set(COMMANDS) == commands


def test_every_field_of_a_recipe_is_a_flag_of_compile_with_its_description_and_none_as_default() -> None:
    flags = {parameter.name: parameter for parameter in COMMANDS["compile"].params}
    assert flags.keys() >= Recipe.model_fields.keys()
    for name, field in Recipe.model_fields.items():
        assert field.description in flags[name].help
        assert flags[name].default is None


@pytest.mark.parametrize("command", COMMANDS)
def test_a_flag_means_the_same_in_every_command(command: str) -> None:
    flags = {parameter.name: parameter for parameter in COMMANDS["compile"].params}
    for parameter in COMMANDS[command].params:
        if parameter.name in flags:
            other = flags[parameter.name]
            assert (parameter.opts, parameter.help, parameter.default) == (other.opts, other.help, other.default)


def test_help_does_not_load_torch() -> None:
    code = (
        "import sys, tdcompile.cli.main as c; r = c.main(['compile', '--help']); sys.exit(r or 'torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "--keep-dense" in ran.stdout


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], [], ["bench", "-h"]])
def test_what_is_asked_about_the_command_goes_to_stdout(tdc: Any, arguments: list[str]) -> None:
    ran = tdc(*arguments)
    assert (ran.code, ran.err) == (0, "")
    assert "tdcompile" in ran.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compiel"], "compile"),
        (["compile", "--bugdet", "macs=0.5"], "--budget"),
        (["compile", "lenet5", "--threads", "none"], "integer"),
        (["bench"], "A.onnx"),
        (["validate", "a.onnx"], "--against"),
    ],
)
def test_a_usage_error_is_one_sentence(tdc: Any, arguments: list[str], said: str) -> None:
    ran = tdc(*arguments)
    assert ran.code == 2
    assert said in ran.sentence


# What it does


def test_compile_writes_the_folder_and_ends_with_the_tables(tdc: Any, home: Path) -> None:
    command = ["compile", "net.py:build", *SMALL, "--data", "npz:good.npz", "--seed", "3"]
    ran = tdc(*command)
    assert ran.code == 0, ran.err
    out = home / "out" / "net-build"
    assert sorted(path.name for path in out.parent.iterdir()) == ["net-build"]
    report = Report.model_validate_json((out / "report.json").read_text())
    assert report.seed == 3
    assert report.compiled.score is not None
    assert "dense against compiled" in ran.out
    assert report.verdict in ran.out
    assert ran.out.splitlines()[-1] == "report: out/net-build/report.html"
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["command"] == ["tdcompile", *command]
    assert "stray" in ran.err
    assert "past Python" in ran.err
    assert re.search(r"\[ *1/", ran.err)


def test_a_gate_that_is_not_passed_is_told_after_everything_is_written(tdc: Any, home: Path) -> None:
    ran = tdc("compile", "net.py:build", *SMALL, "--min-speedup", "1000", "--json", "-o", "made")
    assert ran.code == 4
    assert json.loads(ran.out) == json.loads((home / "made" / "report.json").read_text())
    assert [gate["name"] for gate in json.loads(ran.out)["gates"] if not gate["passed"]] == ["min-speedup"]


def test_a_plan_is_made_edited_and_applied(tdc: Any, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tdc("plan", "net.py:build", *SMALL, "-o", "plans/p.json")
    assert made.code == 0, made.err
    assert "plan: plans/p.json" in made.out
    assert [path.name for path in (home / "plans").iterdir()] == ["p.json"]
    plan = json.loads((home / "plans" / "p.json").read_text())
    assert set(plan["layers"]) == {"0", "2", "5"}
    assert json.loads(tdc("plan", "net.py:build", *SMALL, "-q").out) == plan
    plan["layers"]["2"] |= {"decomposition": "tucker2", "ranks": [5, 7]}
    (home / "plans" / "p.json").write_text(json.dumps(plan))
    seen = []
    monkeypatch.setattr(compile_command, "compile_module", lambda *_, recipe, **__: seen.append(recipe) or stopped())
    assert tdc("compile", "net.py:build", "--input", "1x3x8x8", "--plan", "plans/p.json").code == 130
    assert seen[0].plan == "plans/p.json"
    assert "propose" not in str(seen[0].steps())


def test_a_plan_that_only_training_finds_is_not_looked_for(tdc: Any, home: Path) -> None:
    ran = tdc("plan", "net.py:build", "--input", "1x3x8x8", "--data", "digits", "--recipe", "progressive-tucker")
    assert ran.code == 2
    assert "has no plan before 'anneal' has trained: compile it" in ran.sentence
    (home / "own.toml").write_text('pipeline = "fold-batchnorm,drop-dead"\n')
    assert "makes no plan" in tdc("plan", "net.py:build", "--input", "1x3x8x8", "--recipe", "own.toml").sentence


def stopped() -> NoReturn:
    raise KeyboardInterrupt


def test_an_interrupted_run_says_how_to_go_on_and_does(tdc: Any, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran_steps: list[str] = []
    run_step = Pipeline._run_step

    def counted(self: Pipeline, position: int, *arguments: Any) -> Program:
        ran_steps.append(self.steps[position].name)
        return run_step(self, position, *arguments)

    def killed(self: Pipeline, position: int, *arguments: Any) -> Program:
        if self.steps[position].name == "recalibrate":
            os.kill(os.getpid(), signal.SIGTERM)
        return counted(self, position, *arguments)

    command = ["compile", "net.py:build", *SMALL, "-o", "made"]
    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "_run_step", killed)
        ran = tdc(*command)
    assert (ran.code, ran.out) == (130, "")
    assert f"go on with: tdcompile {' '.join(command)} --resume" in ran.err
    assert not (home / "made").exists()
    assert workspace_of(home / "made").is_dir()
    ran_steps.clear()
    monkeypatch.setattr(Pipeline, "_run_step", counted)
    assert tdc(*command, "--resume", "-q").code == 0
    assert "factorize" not in ran_steps
    assert "recalibrate" in ran_steps
    assert (home / "made" / "model.onnx").exists()
    assert not workspace_of(home / "made").exists()


def test_resuming_another_command_leaves_the_state_for_the_right_one(
    tdc: Any, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["compile", "net.py:build", *SMALL, "--data", "npz:good.npz", "-o", "made", "-q"]
    with monkeypatch.context() as patch:
        patch.setattr(tdcompile.compiler, "measure", lambda *_, **__: stopped())
        assert tdc(*command).code == 130
    ran = tdc(*command, "--resume", "--budget", "params=0.5")
    assert ran.code == 2
    assert "is of another compilation, with another budget" in ran.sentence
    assert (workspace_of(home / "made") / "state").is_dir()
    run_step = Pipeline._run_step

    def only_lowering(self: Pipeline, *arguments: Any) -> Program:
        return run_step(self, *arguments) if self == lowering() else stopped()  # no pass of the pipeline is left

    monkeypatch.setattr(Pipeline, "_run_step", only_lowering)
    ran = tdc(*command, "--resume", "--max-drop", "100", "--jobs", "2", "--eval", "2", "--json")
    assert ran.code == 0, ran.err
    assert [gate["name"] for gate in json.loads(ran.out)["gates"]] == ["macs", "max-drop"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("compile", "net.py:build", *SMALL, "--recipe", ""), "there is no recipe ''"),
        (("compile", "net.py:build", *SMALL, "--plan", ""), "the plan . cannot be read"),
        (("demo", "--target", ""), "'target' cannot be ''"),
        (("doctor", "--target", ""), "there is no target ''"),
        (("study", "net.py:build", "--data", "npz:good.npz", "--methods", ""), "has an empty member"),
        (("study", "net.py:build", "--data", "npz:good.npz", "--compressions", ""), "has an empty member"),
        (("compile", "net.py:build", "--input", "1x3x99999999x99999999"), "its size is too large"),
        (("compile", "net.py:build", "--input", f"1x{10**30}"), "its size is too large"),
        (("compile", "net.py:build", *SMALL, "-o", "new/.."), "is not a tdcompile output folder"),
    ],
)
def test_empty_and_oversized_arguments_are_refused_before_any_work(
    tdc: Any, home: Path, arguments: tuple[str, ...], said: str
) -> None:
    ran = tdc(*arguments)
    assert (ran.code, ran.out) == (2, ""), ran.err
    assert said in ran.sentence


def test_files_that_begin_with_a_byte_order_mark_are_read(tdc: Any, home: Path) -> None:
    (home / "r.toml").write_bytes(b"\xef\xbb\xbfseed = 3\n")
    assert load_recipe(str(home / "r.toml"), {}).seed == 3
    (home / "plan.json").write_bytes(b'\xef\xbb\xbf{"layers": {"nope": {"decomposition": "svd", "ranks": [1]}}}')
    assert "it has no layer 'nope'" in tdc("compile", "net.py:build", *SMALL[:2], "--plan", "plan.json").sentence


@pytest.mark.parametrize("command", ["compile", "study"])
def test_two_processes_do_not_write_to_one_folder(tdc: Any, home: Path, command: str) -> None:
    arguments = [command, "net.py:build", *SMALL, "--data", "npz:good.npz", "-o", "made", "-q"]
    with only_writer(home / "made"):
        ran = tdc(*[part for part in arguments if command == "compile" or part not in SMALL[2:]])
    assert (ran.code, ran.out) == (2, "")
    assert "another process is writing made: wait for its end, or give another -o" in ran.sentence
    assert not [path.name for path in home.iterdir() if "made" in path.name]


def test_an_interruption_that_a_library_turned_into_an_error_is_still_one(
    tdc: Any, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half_imported(*_: object, **__: object) -> NoReturn:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise AttributeError("module 'torch._dynamo' has no attribute 'exc'")  # noqa: B904  # as libraries do

    monkeypatch.setattr(compile_command, "compile_module", half_imported)
    ran = tdc("compile", "net.py:build", *SMALL)
    assert (ran.code, ran.out) == (130, "")
    assert "interrupted; nothing was written" in ran.err
    assert "error" not in ran.err


def test_a_failure_after_finished_passes_keeps_them(tdc: Any, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(out: Path) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tdcompile.compiler, "measure", lambda *_, **__: full(home))
    ran = tdc("compile", "net.py:build", *SMALL, "-o", "made")
    assert ran.code == 2
    assert "cannot write made: No space left on device; go on with: tdcompile compile" in ran.sentence
    assert workspace_of(home / "made").is_dir()


def test_a_disk_that_is_full_after_tuning_does_not_cost_it(
    tdc: Any, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, epochs, epoch = Checkpoint._write, [], Trainer._epoch

    def full(self: Checkpoint, program: Program, *rest: Any) -> None:
        if Tuning in program.facts:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, program, *rest)

    def counted(self: Trainer, number: int, *rest: Any) -> float:
        epochs.append(number)
        return epoch(self, number, *rest)

    monkeypatch.setattr(Trainer, "_epoch", counted)
    command = ["compile", "net.py:build", *SMALL, "--data", "npz:good.npz", "--tune", "epochs=1,lr=0.01", "-o", "made"]
    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "_write", full)
        ran = tdc(*command)
    assert ran.code == 2
    assert "No space left on device" in ran.sentence
    assert "go on with: tdcompile compile" in ran.sentence
    assert tdc(*command, "--resume").code == 0
    assert epochs == [1]
    assert not workspace_of(home / "made").exists()


def test_a_disk_that_is_full_at_the_end_does_not_cost_the_run(
    tdc: Any, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> NoReturn:
        raise InputError("cannot write made: No space left on device; nothing was written")

    with monkeypatch.context() as patched:
        patched.setattr(tdcompile.compiler, "write_folder", full)
        ran = tdc("compile", "net.py:build", *SMALL, "-o", "made")
    assert ran.code == 2
    assert "No space left on device" in ran.sentence
    assert "go on with: tdcompile compile" in ran.sentence
    assert workspace_of(home / "made").is_dir()
    assert tdc("compile", "net.py:build", *SMALL, "-o", "made", "--resume").code == 0
    assert not workspace_of(home / "made").exists()


def test_resume_without_anything_to_resume_says_so(tdc: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_command, "compile_module", lambda *_, **__: stopped())
    ran = tdc("compile", "net.py:build", *SMALL, "--resume")
    assert ran.code == 130
    assert "starting anew" in ran.err
    assert "nothing was written" in ran.err


def test_dry_run_prints_a_recipe_that_reads_back(tdc: Any, home: Path) -> None:
    flags = [*("--budget", "macs=0.5", "--budget", "params=0.25", "--decompose", "svd,tucker2{sweeps=1}")]
    flags += [*("--tune", "epochs=2", "--keep-dense", "fc*", "--no-dynamic-batch", "--max-drop", "0.5")]
    ran = tdc("compile", "digits_net", *flags, "--dry-run")
    assert ran.code == 0, ran.err
    assert "finetune{epochs=2.0}" in ran.out
    (home / "r.toml").write_text(ran.out)
    recipe = load_recipe("r.toml", {})
    assert recipe.budget == {"macs": 0.5, "params": 0.25}
    assert recipe.decompose == ("svd", "tucker2{sweeps=1}")
    assert recipe.dynamic_batch is False
    assert (recipe.data, recipe.input, Path(str(recipe.weights)).name) == (
        *("digits", ("1x1x16x16",)),
        "digits_net.safetensors",
    )
    as_json = json.loads(tdc("compile", "--recipe", "r.toml", "--dry-run", "--json").out)
    assert as_json["pipeline"] in ran.out
    assert as_json["recipe"] == recipe.model_dump(mode="json")
    assert sorted(path.name for path in home.iterdir()) == ["good.npz", "net.py", "r.toml"]


def test_flags_override_the_recipe_and_only_when_given() -> None:
    recipe = recipe_of({"recipe": "quarter", "source": "digits_net", "seed": 0, "dynamic_batch": None, "input": None})
    assert (recipe.budget, recipe.tune, recipe.dynamic_batch) == ({"macs": 0.25}, "epochs=5", True)
    recipe = recipe_of({"recipe": "quarter", "source": "digits_net", "budget": ["params=0.5"], "dynamic_batch": False})
    assert (recipe.budget, recipe.tune, recipe.dynamic_batch) == ({"params": 0.5}, "epochs=5", False)


def test_weights_that_are_given_or_another_shape_leave_the_shipped_ones_and_their_data_alone() -> None:
    assert recipe_of({"source": "digits_net", "weights": "mine.safetensors"}).data is None
    assert recipe_of({"source": "digits_net{num_classes=5}"}).weights is None
    assert recipe_of({"source": "digits_net", "data": "npz:x.npz"}).data == "npz:x.npz"
    assert recipe_of({"source": "digits_net", "input": ["4x1x16x16"]}).input == ("4x1x16x16",)


def test_a_recipe_holds_where_a_flag_is_not_given(home: Path) -> None:
    (home / "own.toml").write_text("jobs = 3\n")
    assert recipe_of({"recipe": "own.toml", "source": "digits_net"}).jobs == 3


def test_a_recipe_with_odd_texts_is_toml() -> None:
    recipe = Recipe(source='a "b"\\c.py:é', keep_dense=("x[0]", "\u2603"), budget={"macs": 1e-3})
    assert load_recipe(None, tomllib.loads(to_toml(recipe))) == recipe


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("a/net.py:build", "net-build"),
        ("pkg.mod:Net", "pkg.mod-Net"),
        ("digits_net{num_classes=5}", "digits_net"),
        ("/models/net.onnx", "net.onnx"),
    ],
)
def test_the_folder_is_called_after_the_source(source: str, name: str) -> None:
    assert name_of(source) == name


def test_analyze_tells_every_layer(tdc: Any) -> None:
    ran = tdc("analyze", "net.py:build", "--input", "1x3x8x8")
    assert ran.code == 0
    assert "tucker2" in ran.out
    layers = {layer["name"]: layer for layer in json.loads(tdc("analyze", "mobilenet_v2", "--json").out)}
    depthwise = next(layer for layer in layers.values() if "depthwise" in layer["kind"])
    assert depthwise["refusals"].keys() >= {"tucker2"}
    linear = layers["classifier.1"]
    assert (linear["break_even"], linear["params"]) == (1000 * 1280 // 2280, 1000 * 1280 + 1000)
    low, high = linear["energy_ranks"]["out"]
    assert 0 < low < high <= 1000


def test_energy_ranks_are_those_of_the_singular_values(tdc: Any, home: Path) -> None:
    weight = torch.diag(torch.tensor([3.0, 1.0, 0.5, 0.0]))
    (home / "diagonal.py").write_text(
        f"import torch\nfrom torch import nn\ndef build():\n    net = nn.Linear(4, 4)\n"
        f"    net.weight.data = torch.tensor({weight.tolist()})\n    return nn.Sequential(net)\n"
    )
    (layer,) = json.loads(tdc("analyze", "diagonal.py:build", "--input", "2x4", "--json").out)
    # of 10.25: 9 is 88 %, 10 is 97.6 %, all of it takes the third
    assert layer["energy_ranks"] == {"out": [2, 3], "in": [2, 3]}


def test_validate_is_zero_where_models_agree_and_three_where_not(tdc: Any, folder: Path, home: Path) -> None:
    model = folder / "model.onnx"
    ran = tdc("validate", model, "--against", folder, "--json")
    assert ran.code == 0, ran.err
    parity = json.loads(ran.out)
    assert parity["max_abs"] < 1e-4
    assert len(parity["cases"]) > 1
    assert tdc("validate", folder / "dense.onnx", "--against", f"{folder.parent}/net.py:build").code == 0
    assert tdc("validate", folder / "dense.onnx", "--against", "net.py:build", *SMALL[:2]).code == 0
    ran = tdc("validate", model, "--against", folder / "dense.onnx")
    assert ran.code == 3
    assert "differ" in ran.sentence
    assert tdc("validate", model, "--against", folder / "dense.onnx", "--atol", "100").code == 0
    assert tdc("validate", model, "--against", "net.py:build", "--seed", "5").code == 3


def test_validate_says_where_fp32_and_fp64_part(tdc: Any, folder: Path, home: Path) -> None:
    model = folder / "model.onnx"
    said = tdc("validate", model, "--against", folder, "--localise")
    assert said.code == 0, said.err
    assert "agree to" in said.out
    ran = tdc("validate", model, "--against", "net.py:build", *SMALL[:2], "--localise")
    assert ran.code == 3
    assert "at every node of the PyTorch graph" in ran.sentence  # the models differ, and rounding is not the reason
    assert (
        json.loads(tdc("validate", model, "--against", folder, "--localise", "--json").out)["parting"]["node"] is None
    )
    for other in (folder / "dense.onnx", "net.py:build"):
        ran = tdc("validate", model, "--against", other, "--localise")
        assert ran.code == 2
        assert "--localise looks into the graph" in ran.sentence


def test_bench_compares_with_the_first(tdc: Any, folder: Path) -> None:
    models = [folder / "dense.onnx", folder / "model.onnx"]
    ran = tdc("bench", *models, "--seconds", "0.05", "--batch", "3", "--json")
    assert ran.code == 0, ran.err
    document = json.loads(ran.out)
    assert document["batch"] == 3
    first, second = document["models"]
    assert first["ratio"] == 1.0
    low, high = second["ratio_interval"]  # of the ratios of the rounds, not of the medians
    assert low <= second["ratio"] <= high
    assert second["ratio"] == pytest.approx(first["median_ms"] / second["median_ms"], rel=0.5)
    assert first["p10_ms"] <= first["median_ms"] <= first["p90_ms"]
    assert "model.onnx" in tdc("bench", *models, "--seconds", "0.01").out


def test_a_network_of_one_batch_is_analysed_and_validated_where_it_is_said(tdc: Any, home: Path) -> None:
    given = ["--input", "2x4"]
    assert "--no-dynamic-batch" in tdc("analyze", "net.py:Fixed", *given).sentence
    assert tdc("analyze", "net.py:Fixed", *given, "--no-dynamic-batch").code == 0
    ran = tdc("compile", "net.py:Fixed", *given, "--no-dynamic-batch", "--budget", "macs=1.0", "-o", "fixed", "-q")
    assert ran.code == 0, ran.err
    ran = tdc("validate", "fixed/dense.onnx", "--against", "net.py:Fixed", *given, "--no-dynamic-batch")
    assert ran.code == 0, ran.err


def test_list_tells_everything_that_is_registered(tdc: Any) -> None:
    kinds = json.loads(tdc("list", "--json").out)
    assert {"passes", "decompositions", "selectors", "scores", "costs", "models", "data", "recipes"} == kinds.keys()
    assert all(entry["summary"] for entries in kinds.values() for entry in entries.values())
    assert kinds["passes"]["choose"]["options"] == {"by": "knapsack"}
    only = tdc("list", "decompositions")
    assert "tucker2" in only.out
    assert "knapsack" not in only.out
    assert json.loads(tdc("list", "--schema").out)["title"] == "Report"


def test_demo_compiles_the_network_that_ships(tdc: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def compile_module(module: Any, inputs: Any, **options: Any) -> NoReturn:
        seen.update(options, module=module)
        raise KeyboardInterrupt

    monkeypatch.setattr(compile_command, "compile_module", compile_module)
    monkeypatch.setattr(compile_command, "form_of", lambda target: QuantizedForm("x64"))
    assert tdc("demo", "-o", "quick", "--tune", "none").code == 130
    recipe = seen["recipe"]
    assert (recipe.source, recipe.data, recipe.tune) == ("digits_net", "digits", "none")
    assert (recipe.precision, recipe.budget) == ("int8", {"latency": 0.18})
    for flags in (("--precision", "fp32"), ("--budget", "latency=0.5")):
        assert tdc("demo", "-o", "quick", *flags).code == 130
        assert (seen["recipe"].precision, seen["recipe"].budget) == ("fp32", {"latency": 0.5})
    monkeypatch.setattr(compile_command, "form_of", lambda target: QuantizedForm("x64-reduced"))
    assert tdc("demo", "-o", "quick").code == 130
    assert (seen["recipe"].precision, seen["recipe"].budget) == ("fp32", {"latency": 0.5})
    assert seen["data"].test is not None
    assert seen["workspace"].name == ".quick.work"
    monkeypatch.setattr(compile_command, "recipe_of", lambda flags: seen.update(flags) or stopped())
    assert tdc("demo").code == 130
    assert seen["tune"] == "epochs=1"


# What it refuses


def refused(ran: Ran, home: Path, before: set[str]) -> str:
    """The sentence of a refusal that left nothing behind."""
    assert ran.code == 2, ran.err
    assert {path.name for path in home.iterdir()} - {"__pycache__"} == before
    return ran.sentence


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("missing.py:build", "no file 'missing.py'"),
        ("net.py:biuld", "did you mean 'build'?"),
        ("net.py", "net.py:NAME"),
        ("no_such_package.net:build", "no module 'no_such_package.net'"),
        ("digits_nte", "did you mean 'digits_net'?"),
        ("net.py:number", "must return an nn.Module"),
        ("net.py:infinite", "NaN or Inf"),
    ],
)
def test_a_source_that_is_none_is_refused(tdc: Any, home: Path, source: str, said: str) -> None:
    before = {path.name for path in home.iterdir()}
    assert said in refused(tdc("compile", source, *SMALL), home, before)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--ranks", "knapsak"], "did you mean 'knapsack'?"),
        (["--ranks", "energy{kep=0.9}"], "did you mean 'keep'?"),
        (["--importance", "fihser"], "did you mean 'fisher'?"),
        (["--decompose", "svd,tuckr2"], "did you mean 'tucker2'?"),
        (["--pipeline", "calibrat,propose"], "did you mean 'calibrate'?"),
        (["--pipeline", "factorize"], "needs RankPlan"),
        (["--tune", "epoch=3"], "did you mean 'epochs'?"),
        (["--tune", "epochs=0"], "epochs=0 must be a finite number above 0"),
        (["--tune", "epochs=1"], "give --data"),
        (["--recipe", "quarte"], "did you mean 'quarter'?"),
        (["--recipe", "missing.toml"], "missing.toml"),
        (["--target", "gpu"], "'cpu' or 'cuda'"),
        (["--budget", "latncy=0.5"], "did you mean 'latency'?"),
        (["--budget", "macs=1.5"], "(0, 1]"),
        (["--budget", "macs=0"], "(0, 1]"),
        (["--budget", "macs=half"], "macs=SHARE"),
        (["--budget", "macs"], "macs=SHARE"),
        (["--keep-dense", "conv*"], "matches no layer"),
        (["--weights", "missing.safetensors"], "no weights file"),
        (["--plan", "missing.json"], "missing.json"),
        (["--data", "npz:missing.npz"], "missing.npz"),
        (["--data", "digist"], "did you mean 'digits'?"),
        (["--data", "npz:good.npz", "--normalize", "imagnet"], "imagnet"),
        (["--normalize", "imagenet"], "give --data"),
        (["--calibrate", "64"], "--calibrate 64 counts samples"),
        (["--eval", "64"], "--eval 64 counts samples"),
    ],
)
def test_an_option_that_cannot_be_used_is_refused(tdc: Any, home: Path, flags: list[str], said: str) -> None:
    before = {path.name for path in home.iterdir()}
    assert said in refused(tdc("compile", "net.py:build", "--input", "1x3x8x8", *flags), home, before)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "give --input"),
        (["--input", "1x4x8x8"], "4x8x8"),
        (["--input", "1x3x8x8:int64"], "int64"),
        (["--input", "1x3x8x8:flaot32"], "did you mean 'float32'?"),
        (["--input", "1,3,8,8"], "must have the form"),
        (["--input", "1x0x8x8"], "length 0"),
        (["--input", "y=1x3x8x8"], "no input 'y': known: input"),
    ],
)
def test_an_input_that_does_not_fit_is_refused(tdc: Any, home: Path, flags: list[str], said: str) -> None:
    before = {path.name for path in home.iterdir()}
    assert said in refused(tdc("compile", "net.py:build", *flags), home, before)


def test_inputs_are_put_in_order_by_name(tdc: Any) -> None:
    named = ["--input", "ids=2:int64", "--input", "x=2x8"]
    assert tdc("analyze", "net.py:Two", *named).code == 0
    assert "'x' is given twice" in tdc("analyze", "net.py:Two", *named, "--input", "x=2x8").sentence
    assert (
        "missing a required argument: 'x'; it takes x, ids"
        in tdc("analyze", "net.py:Two", "--input", "ids=2:int64").sentence
    )


def test_weights_that_do_not_fit_name_the_first_keys(tdc: Any, home: Path) -> None:
    save_file({"0.wieght": torch.zeros(16, 3, 3, 3)}, home / "w.safetensors")
    before = {path.name for path in home.iterdir()}
    said = refused(tdc("compile", "net.py:build", *SMALL, "--weights", "w.safetensors"), home, before)
    assert "0.wieght" in said
    assert "0.weight" in said


def test_a_checkpoint_that_is_code_is_refused(tdc: Any, home: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.system, ("touch exploded",)

    with (home / "w.pt").open("wb") as file:
        pickle.dump({"weight": Bomb()}, file)
    before = {path.name for path in home.iterdir()}
    refused(tdc("compile", "net.py:build", *SMALL, "--weights", "w.pt"), home, before)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"x": np.full((20, 3, 8, 8), np.nan, np.float32), "y": np.arange(20) % 4}, "NaN or Inf"),
        ({"x": np.full((20, 3, 8, 8), 3e38, np.float32), "y": np.arange(20) % 4}, "NaN or Inf reaches the layer"),
        ({"x": np.zeros((0, 3, 8, 8), np.float32), "y": np.zeros(0, np.int64)}, "0 samples"),
        ({"x": np.zeros((20, 3, 8, 8), np.float32), "y": np.arange(20)}, "labels go up to 19"),
        ({"x": np.zeros((20, 3, 8, 8), np.float32), "y": np.arange(20) - 1}, "is -1"),
        ({"x": np.zeros((20, 5), np.float32)}, "5"),
    ],
)
def test_data_that_cannot_be_used_are_refused(tdc: Any, home: Path, arrays: dict[str, Any], said: str) -> None:
    np.savez(home / "bad.npz", **arrays)
    before = {path.name for path in home.iterdir()}
    assert said in refused(tdc("compile", "net.py:build", *SMALL, "--data", "npz:bad.npz", "-o", "made"), home, before)


def test_a_plan_for_another_network_is_refused(tdc: Any, home: Path) -> None:
    (home / "p.json").write_text('{"layers": {"layer1.0": {"decomposition": "svd", "ranks": [4]}}}')
    before = {path.name for path in home.iterdir()}
    said = refused(tdc("compile", "net.py:build", "--input", "1x3x8x8", "--plan", "p.json"), home, before)
    assert "another network" in said


def test_a_recipe_with_an_unknown_key_is_refused(tdc: Any, home: Path) -> None:
    (home / "r.toml").write_text('budgt = { macs = 0.5 }\nsource = "lenet5"\n')
    assert "did you mean 'budget'?" in tdc("compile", "--recipe", "r.toml").sentence
    assert "give a SOURCE" in tdc("compile").sentence


def test_a_folder_that_is_not_ours_is_left_alone(tdc: Any, home: Path) -> None:
    (home / "mine").mkdir()
    (home / "mine" / "thesis.tex").write_text("years of work")
    before = {path.name for path in home.iterdir()}
    assert "not a tdcompile output folder" in refused(
        tdc("compile", "net.py:build", *SMALL, "-o", "mine"), home, before
    )
    assert (home / "mine" / "thesis.tex").read_text() == "years of work"
    assert "is a folder" in tdc("plan", "net.py:build", *SMALL, "-o", "mine").sentence
    assert "cannot write into" in tdc("plan", "net.py:build", *SMALL, "-o", "net.py/p.json").sentence


def test_a_budget_that_no_plan_meets_is_told_with_what_can(tdc: Any, home: Path) -> None:
    ran = tdc("compile", "net.py:build", "--input", "1x3x8x8", "--budget", "macs=0.001", "-o", "made")
    assert ran.code == 4
    assert "macs" in ran.sentence
    assert sorted(path.name for path in home.iterdir() if path.name != "__pycache__") == ["good.npz", "net.py"]


def test_a_failure_of_a_second_run_keeps_what_the_first_has_kept(tdc: Any, home: Path) -> None:
    workspace_of(home / "made").mkdir()
    assert tdc("compile", "net.py:build", *SMALL, "--keep-dense", "conv*", "-o", "made").code == 2
    assert workspace_of(home / "made").is_dir()


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "out/model.onnx"),
            2,
            "cannot write out/model.onnx: No space left on device; nothing was written",
        ),
        (ImportError("libtorch.so is gone"), 5, "tdcompile doctor"),
        (RuntimeError("a bug\nof ours"), 1, "RuntimeError: a bug; run again with -v for the traceback"),
        (InputError("two\n lines"), 2, "two lines"),
    ],
)
def test_every_failure_is_a_sentence_and_a_code(
    tdc: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, said: str
) -> None:
    def fails(*_: object, **__: object) -> NoReturn:
        raise error

    monkeypatch.setattr(compile_command, "compile_module", fails)
    ran = tdc("compile", "net.py:build", *SMALL)
    assert ran.code == code
    assert said in ran.sentence
    ran = tdc("compile", "net.py:build", *SMALL, "-v")
    assert ran.code == code
    assert "Traceback" in ran.err


def test_the_reader_may_leave_early(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["list", "--schema"]) == 0
        monkeypatch.undo()


@pytest.mark.parametrize("model", ["missing.onnx", "net.py"])
def test_what_is_no_model_is_refused(tdc: Any, model: str, folder: Path) -> None:
    for arguments in (["bench", model], ["validate", model, "--against", folder]):
        assert tdc(*arguments).code == 2


def test_bench_tells_the_batch_that_it_timed(tdc: Any, folder: Path, home: Path) -> None:
    table = torch.nn.Bilinear(3, 3, 2)
    fixed = export_onnx(torch.nn.ReLU(), [torch.zeros(2, 5)], home / "fixed.onnx", dynamic_batch=False).path
    mixed = export_onnx(table, [torch.zeros(2, 3), torch.zeros(2, 3)], home / "mixed.onnx").path
    for arguments, batch in (
        ([folder / "model.onnx"], 1),
        ([folder / "model.onnx", "--input", "4x3x8x8"], 4),
        ([fixed], 2),
        ([mixed, "--batch", "5"], 5),
    ):
        ran = tdc("bench", *arguments, "--seconds", "0.01", "--json")
        assert ran.code == 0, ran.err
        assert json.loads(ran.out)["batch"] == batch


def test_bench_refuses_what_does_not_compare(tdc: Any, folder: Path, home: Path) -> None:
    fixed = export_onnx(torch.nn.ReLU(), [torch.zeros(2, 5)], home / "fixed.onnx", dynamic_batch=False).path
    assert "fixes the batch at 2" in tdc("bench", fixed, "--batch", "7").sentence
    assert "other inputs" in tdc("bench", folder / "model.onnx", fixed).sentence
    assert (
        "fixes the batch at 4: --batch 8 cannot be"
        in tdc("bench", folder / "model.onnx", "--input", "4x3x8x8", "--batch", "8").sentence
    )
    assert "cannot run on (1, 3, 7, 7)" in tdc("bench", folder / "model.onnx", "--input", "1x3x7x7").sentence


@pytest.mark.parametrize(
    ("given", "kept"),
    [({}, SPINS), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_threads_soon_sleep_while_they_wait_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], kept: str | None
) -> None:
    environment = {key: os.environ[key] for key in os.environ if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    monkeypatch.setattr(os, "environ", {**environment, **given})
    assert main(["--version"]) == 0
    assert os.environ.get("GOMP_SPINCOUNT") == kept
    assert os.environ.get("OMP_WAIT_POLICY") == given.get("OMP_WAIT_POLICY")
