"""Without VNNI: no two neighbouring weights saturate 16 bits, and rows that never did keep all their steps."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from tdcompile.backend.export import export_onnx
from tdcompile.backend.quantize import activation_ranges, write_quantized
from tdcompile.backend.quantized_form import QuantizedForm

FORM, PLAIN = QuantizedForm("x64-reduced", reduced=True), QuantizedForm("x64")


class Mixed(nn.Module):
    """A convolution whose row 0 saturates and whose others do not, a depthwise one, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.depth = nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 3, groups=16)
        self.fc, self.last = nn.Linear(16, 12, bias=False), nn.Linear(12, 5)
        with torch.no_grad():
            self.conv.weight.mul_(0.1)[:, 0, 0, 0] = 1.0  # the others are far below half of the largest
            self.conv.weight[0] = 1.0

    def forward(self, x):
        return self.last(self.fc(self.depth(self.conv(x)).mean((2, 3))[:, None]))[:, 0]


def integers(path: Path) -> dict[str, np.ndarray]:
    """Return the rounded weights by name, with the summed axes last."""
    found = {}
    for value in onnx.load(path).graph.initializer:
        if value.name.endswith("_quantized") and value.data_type == onnx.TensorProto.INT8:
            weight = numpy_helper.to_array(value).astype(int)
            found[value.name.removesuffix("_quantized")] = weight.T if weight.ndim == 2 else weight
    return found


def saturated(weight: np.ndarray) -> np.ndarray:
    """Return for each row whether 255 times two neighbours leaves 16 bits, in either order of the axes."""
    orders = [weight.reshape(len(weight), -1), np.moveaxis(weight, 1, -1).reshape(len(weight), -1)]
    sums = [255 * (flat[:, 1:] + flat[:, :-1]) for flat in orders]
    return np.any([(one > 32767).any(1) | (one < -32768).any(1) for one in sums], axis=0)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pairs")
    x = torch.randn(2, 8, 9, 9)
    export_onnx(Mixed().eval(), (x,), folder / "m.onnx")
    ranges = activation_ranges(folder / "m.onnx", [[x.numpy()]])
    paths = [write_quantized(folder / "m.onnx", folder / f"{f.family}.onnx", ranges, f).path for f in (FORM, PLAIN)]
    return integers(paths[0]), integers(paths[1])


def test_no_pair_of_neighbours_leaves_16_bits(made) -> None:
    bounded, plain = made
    assert len(bounded) == 4
    assert not any(saturated(weight).any() for weight in bounded.values())
    assert any(saturated(weight).any() for weight in plain.values())


def test_rows_within_the_bound_keep_their_scale_and_the_others_lose_no_more_than_needed(made) -> None:
    bounded, plain = made
    conv = bounded["conv.weight"]
    assert np.abs(conv[0]).max() == 64  # all weights equal: half the range
    assert (np.abs(conv[1:]).reshape(15, -1).max(1) == 127).all()
    for name, weight in bounded.items():
        kept = ~saturated(plain[name])
        assert np.array_equal(weight[kept], plain[name][kept])
        assert (np.abs(weight).reshape(len(weight), -1).max(1) >= 63).all()
