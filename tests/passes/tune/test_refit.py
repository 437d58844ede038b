"""``refit``: the compressed network comes nearer to the dense one, by its shortcuts too; what cannot be is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import tdcompile
from tdcompile.backend.lowering import export_lowered
from tdcompile.backend.quantize import activation_ranges, write_quantized
from tdcompile.backend.quantized_form import form_of
from tdcompile.backend.session import infer, open_session
from tdcompile.core.pipeline import Pipeline
from tdcompile.core.plan import RankPlan
from tdcompile.data.task import Batch, Samples, Task, Tensors
from tdcompile.errors import InputError
from tdcompile.frontend.select import Frontend
from tdcompile.ir.diagnostics import Diagnostic
from tdcompile.ir.graph_edits import works_in_place
from tdcompile.ir.modules import outputs_of
from tdcompile.ir.program import Change, Program, parameters_of
from tdcompile.ir.target import Target


def images(count: int = 200, seed: int = 0) -> Tensors:
    """Unlabelled, with neighbouring pixels alike."""
    noise = torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed))
    return Tensors(nn.functional.avg_pool2d(noise, 3, 1, 1) * 3)


class Watched(Tensors):
    """Knows which samples were read."""

    read: set[int]

    def batch(self, indices: Sequence[int]) -> Batch:
        self.read |= set(indices)
        return super().batch(indices)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv1, self.norm1 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.relu, self.fc = nn.ReLU(inplace=True), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.norm0(self.stem(x)))
        y = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        y += x
        return self.fc(self.relu(y).mean((2, 3)))


FACTORS = "calibrate,score,propose{{decompose={}}},choose,factorize"
X = torch.randn(2, 3, 12, 12)


def program(
    network: nn.Module, form: str = "auto", samples: Samples | None = None, frontend: Frontend = "auto"
) -> Program:
    torch.manual_seed(0)
    made = tdcompile.trace(network.eval(), (X,), frontend=frontend).with_(
        budget=tdcompile.Budget(macs=0.35), task=Task(samples or images())
    )
    return Pipeline.parse(FACTORS.format("" if form == "auto" else form)).run(made)


def residual() -> nn.Module:
    torch.manual_seed(1)
    network = Residual().train()
    with torch.no_grad():
        for _ in range(20):
            network(images(64).inputs[0])  # so that the batch norms know their statistics
    return network.eval()


def distance(before: Program, after: Program) -> float:
    """Mean squared difference of the outputs on images that were not fitted to, over the outputs' variance."""
    unseen = (images(100, seed=9).inputs[0],)
    dense, ours = (outputs_of(g, unseen)[0] for g in (before.dense, after.graph))
    return float((dense - ours).square().mean() / dense.var())


@pytest.mark.parametrize("form", ["channel", "tucker2", "spatial", "cp", "cp4", "tt", "auto"])
def test_the_outputs_come_nearer_to_the_dense_ones(form: str) -> None:
    before = program(residual(), form)
    after = Pipeline.parse("refit{samples=200}").run(before)
    assert distance(before, after) < 0.9 * distance(before, before)
    fitted = [entry for entry in after.history if isinstance(entry, Change) and entry.step == "refit"]
    assert [entry.layer for entry in fitted] == ["stem", "conv1", "conv2", "fc"]


@pytest.mark.parametrize("frontend", ["fx", "export"])
def test_the_shortcut_is_part_of_the_aim(frontend: Frontend) -> None:
    before = program(residual(), "channel", frontend=frontend).with_(
        keep_dense={"fc": "so that it cannot mend anything"}
    )
    alone, whole = (Pipeline.parse(f"refit{{samples=200,blocks={b}}}").run(before) for b in ("false", "true"))
    assert distance(before, whole) < 0.9 * distance(before, alone)


def test_layers_that_were_left_dense_are_fitted_only_if_asked() -> None:
    before = program(residual(), "channel")
    assert before.facts[RankPlan].choices["fc"].is_dense
    weight = before.graph.get_submodule("fc").weight
    for options, kept, same in (("{dense=false}", {}, True), ("", {}, False), ("", {"fc": "as asked"}, True)):
        after = Pipeline.parse(f"refit{options}").run(before.with_(keep_dense=kept))
        assert torch.equal(after.graph.get_submodule("fc").weight, weight) == same
        assert ("fc" in [entry.layer for entry in after.history if isinstance(entry, Change)]) != same


def test_an_uncompressed_network_is_left_as_it_is() -> None:
    dense = tdcompile.trace(residual(), (X,)).with_(task=Task(images()))
    after = Pipeline.parse("refit").run(dense)
    assert distance(dense, after) < 1e-6


def test_what_cannot_be_fitted_is_told() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.deep = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, groups=3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.deep(self.conv(self.conv(x)))

    dense = tdcompile.trace(Shared().eval(), (X,)).with_(task=Task(images()))
    history = Pipeline.parse("refit").run(dense).history
    told = {entry.layer: entry.text for entry in history if isinstance(entry, Diagnostic)}
    assert "called more than once" in told["conv"]
    assert "3 groups" in told["deep"]


def test_without_samples_nothing_is_done() -> None:
    dense = tdcompile.trace(residual(), (X,))
    after = Pipeline.parse("refit").run(dense)
    assert [entry.code for entry in after.history if isinstance(entry, Diagnostic)] == ["no_data"]


@pytest.mark.parametrize("step", ["refit", "recalibrate", "finetune"])
def test_one_sample_is_told_to_be_one(step: str) -> None:
    dense = tdcompile.trace(residual(), (X,)).with_(task=Task(images(1)))
    (told,) = [entry for entry in Pipeline.parse(step).run(dense).history if isinstance(entry, Diagnostic)]
    assert told.text.startswith(f"{step}: there is only one training sample")
    (told,) = [entry for entry in Pipeline.parse(step).run(dense.with_(task=Task())).history if hasattr(entry, "text")]
    assert told.text.startswith(f"{step}: there are no training samples")


def test_it_draws_from_the_seed_alone() -> None:
    before = program(residual(), "channel")
    one, other = (Pipeline.parse("refit{samples=50,places=9}").run(before) for _ in range(2))
    for name, value in one.graph.state_dict().items():
        assert torch.equal(value, other.graph.state_dict()[name])


def test_damaged_data_are_refused() -> None:
    before = program(residual(), "channel")
    broken = images()
    broken.inputs[0][3, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match="NaN or Inf reaches the layer 'stem'"):
        Pipeline.parse("refit{places=1000}").run(before.with_(task=Task(broken)))


def test_a_small_memory_reads_fewer_samples() -> None:
    before = program(residual(), "channel")
    train = Watched(images().inputs)
    few, all_ = (f"refit{{samples=200,memory={megabytes}}}" for megabytes in (1, 2000))
    read = {}
    for text in (few, all_):
        train.read = set()
        Pipeline.parse(text).run(before.with_(task=Task(train)))
        read[text] = len(train.read)
    assert 0 < read[few] < read[all_] == 200
    with pytest.raises(InputError, match="at least 1"):
        Pipeline.parse("refit{samples=0}")


class Tied(nn.Module):
    """A language model whose head is its embedding, between layers without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(60, 24), nn.Linear(24, 60, bias=False)
        self.head.weight = self.embedding.weight
        self.wide, self.narrow = nn.Linear(24, 96, bias=False), nn.Linear(96, 24, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        return self.head(x + self.narrow(self.wide(x).relu()))


def test_what_is_tied_stays_tied_and_no_parameter_is_added() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(60, (128, 7))
    before = tdcompile.trace(Tied().eval(), (tokens[:2],)).with_(
        budget=tdcompile.Budget(params=0.7), task=Task(Tensors(tokens))
    )
    before = Pipeline.parse(FACTORS.format("svd")).run(before)
    after = Pipeline.parse("refit").run(before)
    assert {e.layer for e in after.history if isinstance(e, Change) and e.step == "refit"} == {"wide", "narrow"}
    assert parameters_of(after.graph) == parameters_of(before.graph) == before.facts[RankPlan].predicted.params
    assert after.graph.get_submodule("head").weight is after.graph.get_submodule("embedding").weight
    dense, ours, mended = (outputs_of(g, (tokens,))[0] for g in (before.dense, before.graph, after.graph))
    assert (mended - dense).norm() < (ours - dense).norm()


class ReadAgain(nn.Module):
    """The input of an in-place activation is read again: what the shortcut carries has been through it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.again, self.fc = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 5)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.body(self.relu(x))
        y = x + y
        return self.fc((y + self.again(self.relu(y))).mean((2, 3)))


class ThroughAView(ReadAgain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.relu(x.flatten(2)).reshape(x.shape)
        return self.fc((x + self.again(self.body(y))).mean((2, 3)))


def test_a_value_that_is_read_after_it_was_changed_in_place() -> None:
    torch.manual_seed(0)
    before = program(ReadAgain(), "channel")
    after = Pipeline.parse("refit{samples=200}").run(before)
    assert distance(before, after) < 0.9 * distance(before, before)
    torch.manual_seed(0)
    before = program(ThroughAView(), "channel")
    after = Pipeline.parse("refit{samples=200}").run(before)
    assert [e.code for e in after.history if isinstance(e, Diagnostic) and "refit" in e.text] == ["in_place"]
    assert all(torch.equal(a, b) for a, b in zip(after.graph.parameters(), before.graph.parameters(), strict=True))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(x)[:, 0])


def test_layers_that_see_the_tokens_first_are_fitted_to_any_number_of_samples() -> None:
    torch.manual_seed(0)
    before = tdcompile.trace(Encoder().eval(), (torch.randn(2, 17, 32),)).with_(
        budget=tdcompile.Budget(macs=0.6), task=Task(Tensors(torch.randn(129, 17, 32)))
    )
    before = Pipeline.parse(FACTORS.format("svd")).run(before)
    after = Pipeline.parse("refit").run(before)  # a last batch of one sample
    x = torch.randn(64, 17, 32)
    dense, ours, mended = (outputs_of(g, (x,))[0] for g in (before.dense, before.graph, after.graph))
    assert (mended - dense).norm() < (ours - dense).norm()


@pytest.mark.parametrize(("frontend", "written"), [("fx", ["relu"]), ("export", ["add_", "relu_"])])
def test_in_place_operators_of_either_front_end_are_known(frontend: Frontend, written: list[str]) -> None:
    graph = tdcompile.trace(residual(), (X,), frontend=frontend).graph
    found = {str(node.target) for node in graph.graph.nodes if works_in_place(node, graph)}
    assert all(any(word in name for name in found) for word in written), found
    assert not any("mean" in name for name in found)


def tokens(count: int, seed: int) -> torch.Tensor:
    """Sequences in which the first token is a hundred times as long as the others."""
    x = torch.randn(count, 8, 48, generator=torch.Generator().manual_seed(seed))
    x[:, 0] = 100 + x[:, 0]
    return x


class Blocks(nn.Module):
    """Residual blocks of linear layers on normalised tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(48) for _ in range(6))
        self.up = nn.ModuleList(nn.Linear(48, 96, bias=False) for _ in range(6))
        self.down = nn.ModuleList(nn.Linear(96, 48, bias=False) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            x = x + down(torch.relu(up(norm(x))))
        return x


def blocks(samples: int) -> Program:
    torch.manual_seed(3)
    made = tdcompile.trace(Blocks().eval(), (tokens(2, 0),)).with_(
        budget=tdcompile.Budget(params=0.6), task=Task(Tensors(tokens(samples, 1)))
    )
    return Pipeline.parse("calibrate,score,propose{decompose=svd},choose,factorize").run(made)


def error_of(graph: nn.Module, before: Program) -> float:
    """Return the squared error of the tokens behind the first, which is not among the long ones."""
    unseen = (tokens(64, 2),)
    dense, ours = (outputs_of(g, unseen)[0][:, 1:] for g in (before.dense, graph))
    return float((dense - ours).square().mean())


def test_few_samples_do_not_make_unseen_tokens_worse() -> None:
    before = blocks(samples=10)
    after = Pipeline.parse("refit").run(before)
    assert error_of(after.graph, before) <= 1.05 * error_of(before.graph, before)
    fitted = [entry.what for entry in after.history if isinstance(entry, Change) and entry.step == "refit"]
    assert any(what.startswith("undone: held-out error") for what in fitted)


def test_with_many_samples_unseen_tokens_come_nearer() -> None:
    before = blocks(samples=400)
    after = Pipeline.parse("refit").run(before)
    assert error_of(after.graph, before) < 0.97 * error_of(before.graph, before)


class Cancelling(nn.Module):
    """A narrow linear layer, and one with a row that magnifies a direction of almost no variance, as batch norm makes.

    8 channels become 16; the first of the 16 is 400 times the difference of two channels that are nearly equal.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.narrow, self.wide, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 1), nn.Conv2d(16, 5, 1)
        with torch.no_grad():
            self.narrow.weight[1] = self.narrow.weight[0] * 1.001
            self.narrow.bias[1] = self.narrow.bias[0]
            self.wide.weight[0] = 0
            self.wide.weight[0, 0], self.wide.weight[0, 1] = 400.0, -400.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.wide(self.narrow(x)).relu())


def int8_distance(program: Program, folder: Path) -> float:
    """Squared difference of the int8 model's outputs from the dense network's, over their variance, on new images."""
    model, rounded = folder / "fp32.onnx", folder / "int8.onnx"
    export_lowered(program, program.graph, model)
    ranges = activation_ranges(model, ([batch.inputs[0].numpy()] for batch in images().batches(50)))
    write_quantized(model, rounded, ranges, form_of(Target()))
    unseen = images(100, seed=9).inputs[0]
    found = torch.from_numpy(infer(open_session(rounded, Target()), [unseen])[0])
    dense = outputs_of(program.dense, (unseen,))[0]
    return float((dense - found).square().mean() / dense.var())


def largest(program: Program) -> float:
    """The largest weight of the row that magnifies."""
    return float(program.graph.get_submodule("wide").weight[0].detach().abs().max())


def test_in_int8_weights_that_magnify_rounding_are_fitted_to_rounded_inputs(tmp_path: Path) -> None:
    network = tdcompile.trace(Cancelling().eval(), (X,)).with_(task=Task(images()))
    before = network.with_(target=Target(precision="int8"))
    after = Pipeline.parse("refit{samples=150}").run(before)
    assert int8_distance(after, tmp_path) < 0.2 * int8_distance(before, tmp_path)
    assert largest(after) < 200  # it was 400


def test_layers_that_stay_float_are_not_fitted_to_rounded_inputs() -> None:
    network = tdcompile.trace(Cancelling().eval(), (X,)).with_(task=Task(images()), target=Target(precision="int8"))
    floats = network.with_(keep_fp32=frozenset({"narrow", "wide", "last"}))
    after = Pipeline.parse("refit{samples=150}").run(floats)
    assert all(torch.equal(w, after.graph.state_dict()[name]) for name, w in network.graph.state_dict().items())


def test_fits_that_do_not_help_the_outputs_in_int8_are_undone() -> None:
    """A residual network of usual weights: rounding costs it little."""
    network = tdcompile.trace(residual(), (X,)).with_(task=Task(images()), target=Target(precision="int8"))
    after = Pipeline.parse("refit{samples=150}").run(network)
    assert all(torch.equal(w, after.graph.state_dict()[name]) for name, w in network.graph.state_dict().items())
    (told,) = [entry.text for entry in after.history if isinstance(entry, Diagnostic)]
    assert "do not clearly lower the error of the outputs" in told


def test_a_compressed_int8_plan_is_fitted_as_in_fp32() -> None:
    network = program(residual(), "channel")
    planned = network.with_(facts=network.facts.having(replace(network.facts[RankPlan], precision="int8")))
    in_fp32, in_int8 = (Pipeline.parse("refit{samples=150}").run(one).graph.state_dict() for one in (network, planned))
    assert all(torch.equal(in_fp32[name], in_int8[name]) for name in in_fp32)
