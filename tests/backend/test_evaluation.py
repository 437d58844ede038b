"""``evaluate`` and ``check_answers``: both models on the same samples, for open and fixed batches."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import tdcompile
from tdcompile.backend.evaluation import check_answers, evaluate, evaluate_graph
from tdcompile.backend.lowering import export_lowered
from tdcompile.data.metrics import accuracy
from tdcompile.data.task import Task, Tensors
from tdcompile.errors import RuinedError
from tdcompile.ir.graph_edits import copy_weights
from tdcompile.ir.program import Program


def samples(count: int = 37, *, labelled: bool = True) -> Tensors:
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(count, 6, generator=draw)
    return Tensors(x, torch.randint(0, 4, (count,), generator=draw) if labelled else None, 4 if labelled else None)


def program(scale: float, *, dynamic_batch: bool = True, batch: int = 2) -> Program:
    """A network, and a copy of it whose last weights are scaled in place of compressed."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    made = tdcompile.trace(network, (torch.randn(batch, 6),), dynamic_batch=dynamic_batch)
    changed = copy_weights(made.graph)
    with torch.no_grad():
        changed.get_submodule("2").weight.mul_(scale)
        changed.get_submodule("0").weight.add_(0.1)
    return made.with_(graph=changed)


@pytest.mark.parametrize("dynamic_batch", [True, False])
def test_both_models_are_judged_on_every_sample_once(tmp_path: Path, dynamic_batch: bool) -> None:
    made = program(1.0, dynamic_batch=dynamic_batch, batch=5).with_(task=Task(test=samples()))
    paths = [tmp_path / "dense.onnx", tmp_path / "model.onnx"]
    for graph, path in zip((made.dense, made.graph), paths, strict=True):
        export_lowered(made, graph, path)
    (found,) = evaluate(paths[0], paths[1:], samples(), made)
    assert found.samples == 37
    assert found.dense_score == pytest.approx(accuracy(made.dense, samples()), rel=1e-6)
    assert found.compiled_score == pytest.approx(accuracy(made.graph, samples()), rel=1e-6)
    graphs = evaluate_graph(made, samples())
    assert replace(graphs, outputs=()) == replace(found, outputs=())
    assert graphs.outputs[0].relative_error == pytest.approx(found.outputs[0].relative_error, rel=1e-3)
    x = samples().inputs[0]
    with torch.no_grad():
        a, b = made.dense(x), made.graph(x)
    (output,) = found.outputs
    assert output.relative_error == pytest.approx(
        float(((a - b).square().sum() / (a - a.mean(0)).square().sum()).sqrt()), rel=1e-4
    )
    assert output.agreement == pytest.approx(float((a.argmax(1) == b.argmax(1)).float().mean()))
    (limited,) = evaluate(paths[0], paths[1:], samples(), made, limit=7)
    assert limited.samples == 7
    assert evaluate(paths[0], paths[1:], None, made) == []


@pytest.mark.parametrize("where", ["test", "heldout"])
def test_ruined_outputs_are_refused_on_unlabelled_samples(where: str) -> None:
    task = replace(Task(), **{where: samples(labelled=False)})
    check_answers(program(1.0).with_(task=task))
    with pytest.raises(RuinedError, match="37 samples, top-1 agrees on"):
        check_answers(program(-3.0).with_(task=task))


def test_labels_or_no_samples_leave_the_judgement_to_the_gates() -> None:
    for task in (Task(test=samples()), Task(), Task(train=samples(labelled=False))):
        check_answers(program(-3.0).with_(task=task))


def test_nan_is_ruin() -> None:
    made = program(float("nan")).with_(task=Task(test=samples(labelled=False)))
    with pytest.raises(RuinedError):
        check_answers(made)


@pytest.mark.parametrize(
    ("train", "kept", "heldout"), [(63, 63, None), (64, 56, 8), (800, 700, 100), (4000, 3744, 256)]
)
def test_an_eighth_of_the_training_samples_is_held_out_without_test_samples(
    train: int, kept: int, heldout: int | None
) -> None:
    numbered = Tensors(torch.arange(train).reshape(-1, 1))
    split = Task(train=numbered).holding_out(torch.Generator())
    assert split.train is not None
    assert len(split.train) == kept
    assert (split.heldout and len(split.heldout)) == heldout
    if split.heldout is not None:
        parts = [samples.batch(range(len(samples))).inputs[0] for samples in (split.train, split.heldout)]
        assert sorted(torch.cat(parts).flatten().tolist()) == list(range(train))
    tested = Task(train=numbered, test=numbered)
    assert tested.holding_out(torch.Generator()) is tested
