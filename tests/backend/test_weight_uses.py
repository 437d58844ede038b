"""Weights that one operator reads rounded and another float: tied weights, and clones with equal weights."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from tdcompile.backend.export import export_onnx
from tdcompile.backend.fake_parity import FakeParity, check_fake_quantized
from tdcompile.backend.fake_quantization import by_operator, fake_quantized
from tdcompile.backend.learned_quantization import learned_quantization, settled
from tdcompile.backend.quantize import (
    Quantized,
    activation_ranges,
    exact_overrides,
    stored_values,
    write_quantized,
)
from tdcompile.backend.weight_uses import UnmatchedError
from tdcompile.errors import ParityError
from tests.backend.test_fake_quantization import X64

WORDS, WIDTH = 30, 16


class Tied(nn.Module):
    """A head that has the weight of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.mix(self.words(x))))


class Read(nn.Module):
    """A head that reads the weight of the embedding without a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(torch.relu(self.mix(self.words(x))), self.words.weight)


class Clones(nn.Module):
    """Two layers with equal weights."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.second.load_state_dict(self.first.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(self.words(x))))


class Shared(Clones):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.second.weight = self.first.weight


def tokens() -> list[tuple[Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [(torch.randint(0, WORDS, (6, 4), generator=draw),) for _ in range(3)]


def written(
    kind: type[nn.Module], folder: Path, keep: Collection[str] = (), *, exported: bool = False
) -> tuple[fx.GraphModule, Path, Quantized]:
    torch.manual_seed(0)
    graph, model = fx.symbolic_trace(kind().eval()), folder / "float.onnx"
    graph = by_operator(graph, tokens()[0]) if exported else graph
    export_onnx(graph, tokens()[0], model)
    ranges = activation_ranges(model, ([x.numpy() for x in batch] for batch in tokens()))
    return graph, model, write_quantized(model, folder / "int8.onnx", ranges, X64, keep=keep)


def parity(graph: fx.GraphModule, model: Path, quantized: Quantized) -> FakeParity:
    return check_fake_quantized(fake_quantized(graph, model, quantized, tokens()[0]), quantized.path, tokens()[1])


# A graph of operators has no modules whose names could be kept.
@pytest.mark.parametrize(
    ("kind", "keep", "exported"),
    [
        *((kind, (), exported) for kind in (Tied, Read, Clones, Shared) for exported in (False, True)),
        (Clones, ["first"], False),
        (Shared, ["second"], False),
    ],
)
def test_a_weight_is_rounded_where_the_int8_model_rounds_it(
    kind: type[nn.Module], keep: Collection[str], exported: bool, tmp_path: Path
) -> None:
    graph, model, quantized = written(kind, tmp_path, keep, exported=exported)
    before = {name: value.clone() for name, value in graph.state_dict().items()}
    found = parity(graph, model, quantized)
    assert found.tensors >= 1
    assert found.steps <= 0.51
    assert found.outputs < 1e-5
    assert all(torch.equal(value, before[name]) for name, value in graph.state_dict().items())


@pytest.mark.parametrize("kind", [Tied, Read, Clones])
def test_another_scale_is_another_network(kind: type[nn.Module], tmp_path: Path) -> None:
    graph, model, quantized = written(kind, tmp_path)
    name = list(quantized.scales)[-1]
    scale, zero = quantized.scales[name]
    wrong = replace(quantized, scales={**quantized.scales, name: (scale * 1.05, zero)})
    with pytest.raises(ParityError, match="is not the fake-quantised PyTorch graph"):
        parity(graph, model, wrong)


def test_a_rounded_table_is_another_network(tmp_path: Path) -> None:
    graph, model, quantized = written(Tied, tmp_path)
    rounded = fake_quantized(graph, model, quantized, tokens()[0])
    with torch.no_grad():
        rounded.get_parameter("words.weight").copy_(rounded.get_parameter("head.weight"))
    with pytest.raises(ParityError, match="is not the fake-quantised PyTorch graph"):
        check_fake_quantized(rounded, quantized.path, tokens()[0])


@pytest.mark.parametrize("kind", [Clones, Shared])
def test_a_layer_that_is_kept_float_has_its_weight_though_another_rounds_an_equal_one(
    kind: type[nn.Module], tmp_path: Path
) -> None:
    graph, _, quantized = written(kind, tmp_path, ["first"])
    assert quantized.floats["first"] == "kept in float"
    proto = onnx.load(quantized.path)
    values = stored_values(proto)
    read = {n.name.partition("/")[0]: values[n.input[1]] for n in proto.graph.node if n.op_type in ("Gemm", "MatMul")}
    own = graph.get_parameter("first.weight").detach()
    for name, exact in (("first", True), ("second", False)):
        weight = torch.from_numpy(read[name].copy())
        assert torch.equal(weight, own) or torch.equal(weight.T, own) if exact else not torch.equal(weight.T, own)


def trained(graph: fx.GraphModule, model: Path, quantized: Quantized) -> fx.GraphModule:
    student = learned_quantization(graph, model, quantized, tokens()[0])
    optimizer = torch.optim.SGD(student.parameters(), 0.05)
    for (x,) in tokens() * 2:
        optimizer.zero_grad()
        (student(x) - 1).square().mean().backward()
        optimizer.step()
    return student


@pytest.mark.parametrize(
    ("kind", "keep", "exported"),
    [(Tied, (), False), (Tied, (), True), (Read, (), True), (Clones, ["first"], False), (Shared, ["first"], False)],
)
def test_the_file_has_what_was_trained(
    kind: type[nn.Module], keep: Collection[str], exported: bool, tmp_path: Path
) -> None:
    graph, model, quantized = written(kind, tmp_path, keep, exported=exported)
    before = {name: value.clone() for name, value in graph.state_dict().items()}
    student = trained(graph, model, quantized)
    with torch.no_grad():
        wanted = student(*tokens()[1])
    found = settled(student, graph, {})
    assert any(not torch.equal(value, before[name]) for name, value in graph.state_dict().items())
    export_onnx(graph, tokens()[0], tmp_path / "tuned.onnx")
    exact = exact_overrides(tmp_path / "tuned.onnx", found.scales, X64)
    made = write_quantized(tmp_path / "tuned.onnx", tmp_path / "made.onnx", None, X64, keep=keep, overrides=exact)
    again = learned_quantization(graph, tmp_path / "tuned.onnx", made, tokens()[0])
    check_fake_quantized(again, made.path, tokens()[1])
    with torch.no_grad():
        assert torch.equal(again(*tokens()[1]), wanted)


def test_a_weight_that_one_module_reads_float_and_rounded_is_not_tuned(tmp_path: Path) -> None:
    with pytest.raises(UnmatchedError, match=r"the weight 'words\.weight' is read float in 'words' and rounded"):
        learned_quantization(*written(Read, tmp_path), tokens()[0])


def test_a_value_that_is_missing_is_told_by_its_module(tmp_path: Path) -> None:
    """onnxsim makes a Gemm of the linear layer, whose values have names of their own."""
    graph, model, quantized = written(Tied, tmp_path)
    node = next(node for node in graph.graph.nodes if node.target == "words")
    with graph.graph.inserting_after(node):
        negated = graph.graph.call_function(torch.neg, (node,))
    node.replace_all_uses_with(negated, delete_user_cb=lambda user: user is not negated)
    graph.recompile()
    with pytest.raises(UnmatchedError, match=r"the value of 'mix' \(mix/Reshape_0\) is rounded to int8"):
        fake_quantized(graph, model, quantized, tokens()[0])
