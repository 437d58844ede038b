"""``fake_quantized``: a PyTorch graph rounds where its int8 model does, or the difference is told."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from tdcompile.backend.export import export_onnx
from tdcompile.backend.fake_parity import check_fake_quantized
from tdcompile.backend.fake_quantization import FakeQuantize, fake_quantized
from tdcompile.backend.quantize import Quantized, activation_ranges, write_quantized
from tdcompile.backend.quantized_form import QuantizedForm
from tdcompile.backend.weight_uses import UnmatchedError
from tdcompile.errors import ParityError
from tests.backend.test_quantize import Block

X64, ARM = QuantizedForm("x64"), QuantizedForm("arm64", symmetric=True)


class Inside(nn.Module):
    """SiLU and a mirrored border: values that exist only inside a module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"), nn.SiLU()
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.conv(x)))


class Token(nn.Module):
    """A layer beside its own input, which stays float there."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix, self.head = nn.LayerNorm(12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.flatten(2))
        return self.head(x + torch.nn.functional.gelu(self.mix(x)))


def batches(count: int = 3) -> list[tuple[Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [(torch.randn(6, 3, 6, 2, generator=draw),) for _ in range(count)]


def written(kind: type[nn.Module], folder: Path, form: QuantizedForm = X64) -> tuple[fx.GraphModule, Path, Quantized]:
    torch.manual_seed(0)
    graph, model = fx.symbolic_trace(kind().eval()), folder / "float.onnx"
    export_onnx(graph, batches()[0], model)
    ranges = activation_ranges(model, ([x.numpy() for x in batch] for batch in batches()))
    return graph, model, write_quantized(model, folder / "int8.onnx", ranges, form)


@pytest.mark.parametrize("form", [X64, ARM], ids=lambda form: form.family)
@pytest.mark.parametrize("kind", [Block, Inside, Token])
def test_the_graph_rounds_where_the_int8_model_does(kind: type[nn.Module], form: QuantizedForm, tmp_path: Path) -> None:
    graph, model, quantized = written(kind, tmp_path, form)
    before = [p.clone() for p in graph.parameters()]
    rounded = fake_quantized(graph, model, quantized, batches()[0])
    found = check_fake_quantized(rounded, quantized.path, batches()[1])
    assert found.tensors >= 2
    assert found.steps <= 0.51
    assert found.outputs < 1e-5
    assert found.difference < 0.02
    assert all(torch.equal(a, b) for a, b in zip(before, graph.parameters(), strict=True))


@pytest.mark.parametrize("factor", [1.001, 1.05])
@pytest.mark.parametrize("kind", [Block, Token])
def test_another_scale_is_another_network(kind: type[nn.Module], factor: float, tmp_path: Path) -> None:
    graph, model, quantized = written(kind, tmp_path)
    name = list(quantized.scales)[1]
    scale, zero = quantized.scales[name]
    wrong = replace(quantized, scales={**quantized.scales, name: (scale * factor, zero)})
    with pytest.raises(ParityError, match=r"from equal inputs .* \(that of '[\w.]+' \(\S+\); half a step"):
        check_fake_quantized(fake_quantized(graph, model, wrong, batches()[0]), quantized.path, batches()[0])


def test_another_weight_is_another_network(tmp_path: Path) -> None:
    graph, model, quantized = written(Block, tmp_path)
    rounded = fake_quantized(graph, model, quantized, batches()[0])
    with torch.no_grad():
        rounded.get_parameter("inner.weight").mul_(1.02)
    with pytest.raises(ParityError, match="of them differ"):
        check_fake_quantized(rounded, quantized.path, batches()[0])


def test_weights_are_those_of_the_file(tmp_path: Path) -> None:
    graph, model, quantized = written(Block, tmp_path)
    rounded = fake_quantized(graph, model, quantized, batches()[0])
    for name in ("stem.weight", "inner.weight", "fc.weight"):
        own = graph.get_parameter(name).detach()
        rows = own.reshape(len(own), -1).abs().amax(1) / 127
        scale = rows.reshape(-1, *[1] * (own.dim() - 1))
        expected = torch.clamp(torch.round(own / scale), -127, 127) * scale
        assert torch.allclose(rounded.get_parameter(name), expected, atol=1e-7)
    assert torch.equal(rounded.get_parameter("up.weight"), graph.get_parameter("up.weight"))


def test_a_value_that_the_graph_does_not_have_is_named(tmp_path: Path) -> None:
    graph, model, quantized = written(Block, tmp_path)
    with torch.no_grad():
        graph.get_parameter("stem.bias").add_(1)
    with pytest.raises(UnmatchedError, match=r"the weight 'stem\.bias' of the int8 model is not a parameter"):
        fake_quantized(graph, model, quantized, batches()[0])
    graph, model, quantized = written(Block, tmp_path)
    first = next(node for node in graph.graph.nodes if node.op == "call_method" and node.target == "relu")
    first.target = "sigmoid"
    graph.recompile()
    with pytest.raises(UnmatchedError, match=r"the value of 'relu' \(relu\) is rounded to int8 in the ONNX model"):
        fake_quantized(graph, model, quantized, batches()[0])


def test_rounded_values_lie_on_the_grid_and_pass_gradients() -> None:
    part = FakeQuantize("x", 0.5, 4, signed=False)
    x = torch.tensor([-9.0, 0.3, 1.2, 200.0], requires_grad=True)
    y = part(x)
    assert y.tolist() == [-2.0, 0.5, 1.0, 125.5]
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 0.0]
