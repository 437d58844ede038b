"""The values that int8 rounds worst are found, and their layer goes back to float only where that pays."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tdcompile.backend.export import export_onnx
from tdcompile.backend.quantize import activation_ranges, write_quantized
from tdcompile.backend.quantized_form import form_of
from tdcompile.backend.quantized_parity import check_quantized
from tdcompile.backend.sensitive_layers import TRIALS, Trial, back_to_float, suspects, tensor_noise
from tdcompile.ir.target import Target

FORM = form_of(Target())
LAYERS = ("0", "2", "4")


def batches(count: int = 4) -> list[tuple[torch.Tensor, ...]]:
    draw = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 3, 12, 12, generator=draw),) for _ in range(count)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A network of which layer 2 is a chain with an outlier between its factors."""
    torch.manual_seed(0)
    chain = nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.Conv2d(16, 16, 1))
    network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), chain, nn.ReLU(), nn.Conv2d(16, 5, 3)).eval()
    with torch.no_grad():
        chain[0].weight[0] *= 30
        chain[1].weight[:, 0] /= 30
    path = tmp_path_factory.mktemp("outlier") / "outlier.onnx"
    export_onnx(network, (torch.randn(2, 3, 12, 12),), path)
    return path


@pytest.fixture(scope="module")
def ranges(model):
    return activation_ranges(model, ([x.numpy() for x in batch] for batch in batches()))


def test_the_value_behind_an_outlier_is_the_worst_of_its_own(model: Path, ranges, tmp_path: Path) -> None:
    made = write_quantized(model, tmp_path / "int8.onnx", ranges, FORM)
    noises = tensor_noise(made.path, model, batches())
    assert [noise.snr for noise in noises] == sorted(noise.snr for noise in noises)
    assert all(10 < noise.own < 80 for noise in noises)  # ReLU, which the zero point replaces, is no noise
    assert min(noises, key=lambda noise: noise.own).name == "2.0"
    assert suspects(noises, model, LAYERS)[0] == "2"
    assert suspects(noises, model, ("none",)) == []


def test_a_sensitive_layer_goes_back_to_float_and_the_error_falls(model: Path, ranges, tmp_path: Path) -> None:
    first = write_quantized(model, tmp_path / "int8.onnx", ranges, FORM)

    def write(floats: frozenset[str]):
        return write_quantized(model, tmp_path / f"{len(list(tmp_path.iterdir()))}.onnx", ranges, FORM, keep=floats)

    def judge(made) -> Trial:
        return Trial(check_quantized(made.path, model, batches(), Target()).error, True)

    order = suspects(tensor_noise(first.path, model, batches()), model, LAYERS)
    kept, reasons = back_to_float(first, order, write, judge)
    assert next(iter(reasons)) == "2"
    assert judge(kept).error < 0.5 * judge(first).error
    slow, none = back_to_float(first, order, write, lambda made: Trial(judge(made).error, made is first))
    assert (slow, dict(none)) == (first, {})


def test_a_layer_that_costs_latency_must_take_off_half_of_the_error() -> None:
    trials = {
        (): Trial(1.0, True),
        ("a",): Trial(0.6, True, 0.2),
        ("b",): Trial(0.4, True, 0.2),
        ("b", "c"): Trial(0.3, True, 0.24),
    }
    kept, reasons = back_to_float(
        (),
        "abc",
        lambda floats: tuple(sorted(floats)),
        lambda made: trials[made],  # type: ignore[arg-type,return-value]
    )
    assert kept == ("b", "c")
    assert list(reasons) == ["b", "c"]


def test_few_layers_are_tried_and_each_must_pay() -> None:
    errors = {(): 1.0, ("a",): 0.9, ("b",): 0.5, ("b", "c"): 0.45, ("b", "d"): 0.1}
    tried = []

    def write(floats):
        tried.append(tuple(sorted(floats)))
        return tried[-1]

    kept, reasons = back_to_float((), "abcd", write, lambda made: Trial(errors[made], True))  # type: ignore[arg-type]
    assert tried == [("a",), ("b",), ("b", "c")]
    assert len(tried) == TRIALS
    assert kept == ("b",)
    assert list(reasons) == ["b"]
    assert "1 instead of 0.5" in reasons["b"]
