"""``learned_quantization``: gradients are those of LSQ, and the file has the integers and scales that were trained."""

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, fx, nn

from tdcompile.backend.export import export_onnx
from tdcompile.backend.fake_parity import check_fake_quantized
from tdcompile.backend.learned_quantization import (
    LearnedFakeQuantize,
    LearnedScale,
    LearnedScales,
    RoundedWeight,
    digest_of,
    learned_quantization,
    settled,
)
from tdcompile.backend.quantize import Quantized, exact_overrides, write_quantized
from tdcompile.backend.quantized_form import QuantizedForm
from tdcompile.backend.weight_uses import UnmatchedError
from tests.backend.test_fake_quantization import ARM, X64, Inside, Token, batches, written
from tests.backend.test_quantize import Block

REDUCED, TENSORRT = QuantizedForm("x64-reduced", reduced=True), QuantizedForm("tensorrt", symmetric=True)


class Clipped(nn.Module):
    """Values clipped at 6 and at 1, a pool that shares its input's scale, and a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Linear(8, 3)
        with torch.no_grad():
            self.stem.weight.mul_(8)  # some values exceed 6

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(nn.functional.relu6(self.stem(x)), 2)
        x = nn.functional.hardtanh(self.twice(x))
        return self.head(self.twice(x).mean((2, 3)))


class SwitchedOff(nn.Module):
    """Channels whose weights are zero, or far below their bias as batch norm folds them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 3)
        with torch.no_grad():
            for layer in (self.stem, self.inner, self.head):
                layer.weight[0], layer.bias[0] = 0.0, 0.7
                layer.weight[1] *= 1e-11
                layer.bias[1] = -0.6

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.stem(x).abs()).relu().mean((2, 3)))


def trained(kind: type[nn.Module], folder: Path, form: QuantizedForm, rate: float = 0.05) -> tuple[
    fx.GraphModule, fx.GraphModule, Quantized
]:  # fmt: skip
    """Return the lowered graph, the graph after a few steps of training, and the int8 model before them."""
    graph, model, quantized = written(kind, folder, form)
    student = learned_quantization(graph, model, quantized, batches()[0])
    optimizer = torch.optim.SGD(student.parameters(), rate)
    for (x,) in batches() * 2:
        optimizer.zero_grad()
        (student(x) - 1).square().mean().backward()
        optimizer.step()
    return graph, student, quantized


def stored(path: Path) -> dict[str, np.ndarray]:
    return {value.name: numpy_helper.to_array(value) for value in onnx.load(path).graph.initializer}


@pytest.mark.parametrize(
    ("kind", "form"),
    [(Block, X64), (Clipped, REDUCED), (Token, ARM), (Block, TENSORRT), (Inside, X64), (SwitchedOff, REDUCED)],
)
def test_the_file_has_the_integers_and_scales_that_were_trained(
    kind: type[nn.Module], form: QuantizedForm, tmp_path: Path
) -> None:
    graph, student, before = trained(kind, tmp_path, form)
    parts = [part for part in student.modules() if isinstance(part, LearnedFakeQuantize)]
    expected = {}
    for name, layer in student.named_modules():
        for key, (rounding, *_) in getattr(layer, "parametrizations", {}).items():
            if isinstance(rounding, RoundedWeight):
                own = layer.parametrizations[key].original
                scales = rounding.scales(own).numpy()
                steps = rounding._rows(getattr(layer, key).detach()).numpy()
                expected[name] = scales, np.rint(steps / scales.reshape(-1, *[1] * (steps.ndim - 1)))
    with torch.no_grad():
        answers = student(*batches()[1])
    found = settled(student, graph, {})
    assert found.scales.keys() == before.scales.keys()
    assert all(found.scales[part.tensor] == (float(part.scale.detach()), int(part.zero)) for part in parts)
    assert found.fit(graph)
    export_onnx(graph, batches()[0], tmp_path / "tuned.onnx")
    exact = exact_overrides(tmp_path / "tuned.onnx", found.scales, form)
    made = write_quantized(tmp_path / "tuned.onnx", tmp_path / "made.onnx", None, form, overrides=exact)
    assert dict(made.scales) == dict(found.scales)
    assert [zero for _, zero in made.scales.values()] == [before.scales[name][1] for name in made.scales]
    assert any(scale != before.scales[name][0] for name, (scale, _) in made.scales.items())
    values = stored(made.path)
    weights = [name.removesuffix("_scale") for name, value in values.items() if name.endswith("_scale") and value.ndim]
    weights = [name for name in weights if not name.endswith("_quantized")]  # biases
    assert len(weights) == len(expected) > 0
    for name in weights:
        scale = values[f"{name}_scale"]
        scales, steps = next(one for one in expected.values() if np.array_equal(one[0], scale))
        if form is not TENSORRT:  # its file has float weights
            own = values[f"{name}_quantized"].astype(int)
            assert np.array_equal(own, steps) or np.array_equal(own.T, steps)  # of a product, (inputs, outputs)
    with torch.no_grad():
        assert not torch.equal(answers, graph(*batches()[1]))
    check_fake_quantized(student_of(graph, made, tmp_path), made.path, batches()[1])
    again = student_of(graph, made, tmp_path)
    with torch.no_grad():
        assert torch.equal(again(*batches()[1]), answers)


def student_of(graph: fx.GraphModule, made: Quantized, folder: Path) -> fx.GraphModule:
    return learned_quantization(graph, folder / "tuned.onnx", made, batches()[0])


def test_scales_have_the_gradient_of_lsq_times_the_scale() -> None:
    part = LearnedFakeQuantize("x", LearnedScale(0.5, 10.0), 4, signed=False)
    x = torch.tensor([[-9.0, 0.3, 1.2, 200.0]], requires_grad=True)
    y = part(x)
    assert y.tolist() == [[-2.0, 0.5, 1.0, 125.5]]
    y.sum().backward()
    (scale,) = part.parameters()
    inner = (0.5 / 0.5 - 0.3 / 0.5) + (1.0 / 0.5 - 1.2 / 0.5)  # rounding minus value, in steps
    expected = 10 * 0.5 * (-4 + inner + 251)  # values out of range move with the end of the range
    assert scale.grad is not None
    assert scale.grad.item() == pytest.approx(expected, rel=1e-5)
    assert x.grad is not None
    assert x.grad.tolist() == [[0.0, 1.0, 1.0, 0.0]]


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_rounding_on_a_cpu_has_values_and_gradients_of_the_operator_of_torch(
    signed: bool, form: torch.memory_format
) -> None:
    part = LearnedFakeQuantize("x", LearnedScale(0.013, 1.0), 3, signed=signed)
    generator = torch.Generator().manual_seed(0)
    x, gradient = (torch.randn(4, 8, 5, 7, generator=generator).contiguous(memory_format=form) for _ in range(2))
    x.requires_grad_()
    ours = part(x)
    theirs = torch._fake_quantize_learnable_per_tensor_affine(
        x, part.scale, part.zero.float().reshape(1), part.low, part.high, 10.0
    )
    assert torch.equal(ours, theirs)
    assert bool((ours == ours.max()).sum() > 1)  # values out of range
    given = [torch.autograd.grad(made, [x, part.learned.log], gradient) for made in (ours, theirs)]
    assert torch.equal(given[0][0], given[1][0])
    assert given[0][1].item() == pytest.approx(given[1][1].item(), rel=1e-4)


def test_the_next_operator_may_change_the_rounded_values_in_place() -> None:
    part, x = LearnedFakeQuantize("x", LearnedScale(0.02, 1.0), 100, signed=False), torch.linspace(-4, 4, 40)
    found = []
    for inplace in (False, True):
        x = x.detach().requires_grad_()
        nn.functional.hardswish(part(x), inplace=inplace).sum().backward()
        found += [(x.grad, part.learned.log.grad)]
        part.learned.log.grad = None
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("value", [-100.0, -9.0, 0.0, 9.0])
def test_a_scale_that_leaves_its_bounds_stays_usable_and_comes_back(value: float) -> None:
    scale = LearnedScale(0.5, 2.0)
    with torch.no_grad():
        scale.log.fill_(value)
    found = scale()
    assert 0.5 / 1024 <= found.item() <= 2.0
    found.sum().backward()
    assert scale.log.grad is not None
    assert scale.log.grad.item() == pytest.approx(0.5 * math.exp(value))


def test_a_clipped_value_keeps_its_bound_when_its_scale_grows(tmp_path: Path) -> None:
    graph, student, _ = trained(Clipped, tmp_path, X64)
    with torch.no_grad():
        for part in student.modules():
            if isinstance(part, LearnedScale):
                part.log.fill_(9)
    found = settled(student, graph, {})
    clips = [node for node in onnx.load(tmp_path / "float.onnx").graph.node if node.op_type == "Clip"]
    assert len(clips) == 2
    for node, (low, high) in zip(clips, ((0, 6), (-1, 1)), strict=True):
        scale, zero = found.scales[node.output[0]]
        ends = (-zero * scale, (255 - zero) * scale)
        assert ends[0] >= low * 1.004  # the zero point is rounded
        assert ends[1] <= high * 1.004
        assert ends[0] == pytest.approx(low, rel=0.01) or ends[1] == pytest.approx(high, rel=0.01)
    export_onnx(graph, batches()[0], tmp_path / "tuned.onnx")
    exact = exact_overrides(tmp_path / "tuned.onnx", found.scales, X64)
    made = write_quantized(tmp_path / "tuned.onnx", tmp_path / "made.onnx", None, X64, overrides=exact)
    check_fake_quantized(student_of(graph, made, tmp_path), made.path, batches()[1])


def test_tensors_that_share_a_scale_in_the_file_share_the_parameter(tmp_path: Path) -> None:
    _, student, quantized = trained(Clipped, tmp_path, X64)
    parts = {part.tensor: part.learned for part in student.modules() if isinstance(part, LearnedFakeQuantize)}
    pool = next(name for name in parts if "max_pool" in name)
    clip = next(name for name in parts if name != pool and quantized.scales[name] == quantized.scales[pool])
    assert parts[pool] is parts[clip]
    assert len({id(scale) for scale in parts.values()}) > 1


def test_weights_of_another_graph_do_not_fit(tmp_path: Path) -> None:
    graph, student, _ = trained(Block, tmp_path, X64)
    found = settled(student, graph, {})
    assert found.weights == digest_of(graph)
    with torch.no_grad():
        next(graph.parameters()).add_(1e-3)
    assert not found.fit(graph)
    assert not LearnedScales().fit(graph)


def test_a_weight_that_is_not_in_the_graph_is_named(tmp_path: Path) -> None:
    graph, model, quantized = written(Block, tmp_path)
    with torch.no_grad():
        graph.get_parameter("stem.bias").add_(1e-6)
    with pytest.raises(UnmatchedError, match=r"the weight 'stem\.bias' of the int8 model is no parameter"):
        learned_quantization(graph, model, quantized, batches()[0])
