"""``correct_biases``: rounded weights move no mean of an output, and the file stays the PyTorch graph rounded."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from tdcompile.backend.bias_correction import correct_biases, input_means
from tdcompile.backend.export import export_onnx
from tdcompile.backend.fake_parity import check_fake_quantized
from tdcompile.backend.fake_quantization import fake_quantized
from tdcompile.backend.quantize import activation_ranges, stored_values, write_quantized
from tdcompile.backend.quantized_form import QuantizedForm, form_of
from tdcompile.backend.session import infer, open_session
from tdcompile.ir.target import Target

COARSE = 12  # times the step of 8 bits: about 4 bits, where shifts are large


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1))


def chain() -> nn.Module:
    factors = nn.Sequential(nn.Conv2d(16, 8, (3, 1), padding=(1, 0), bias=False), nn.Conv2d(8, 8, 1, bias=True))
    return nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), factors)


class Tokens(nn.Module):
    """Linear layers over a sequence, whose bias is an Add of floats."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 24), nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x.flatten(2)).relu())


def samples() -> torch.Tensor:
    return torch.randn(64, 3, 6, 2, generator=torch.Generator().manual_seed(2)) + 1.0


def coarse(model: Path) -> dict:
    """Return steps of weights that are far too large, one for each row."""
    proto, found = onnx.load(model), {}
    kinds = {node.input[1]: node for node in proto.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")}
    for weight in proto.graph.initializer:
        if weight.name not in kinds:
            continue
        value = numpy_helper.to_array(weight)
        transposed = any(attribute.name == "transB" and attribute.i for attribute in kinds[weight.name].attribute)
        axis = 0 if kinds[weight.name].op_type == "Conv" or transposed else 1
        rows = np.abs(np.moveaxis(value, axis, 0)).reshape(value.shape[axis], -1).max(1) / 127 * COARSE
        found[weight.name] = [
            {"axis": axis, "scale": np.array(row, np.float32), "zero_point": np.array(0, np.int8)} for row in rows
        ]
    return found


def shift(path: Path, model: Path) -> float:
    """Return the root mean square over channels of the mean of the output's error, over its spread."""
    after, before = (infer(open_session(one, Target(), optimised=False), (samples(),))[0] for one in (path, model))
    if after.ndim > 3:
        after, before = (np.moveaxis(y, 1, -1) for y in (after, before))
    apart = (after - before).reshape(-1, after.shape[-1]).mean(0)
    return float(np.sqrt((apart**2).mean()) / before.std())


@pytest.mark.parametrize("build", [conv, chain, Tokens])
def test_the_mean_of_the_output_is_that_of_the_float_model_and_the_graph_is_the_file(build, tmp_path: Path) -> None:
    torch.manual_seed(0)
    graph, model = torch.fx.symbolic_trace(build().eval()), tmp_path / "float.onnx"
    export_onnx(graph, (samples()[:2],), model)
    batch = [[samples().numpy()]]
    ranges, means = activation_ranges(model, batch), input_means(model, batch)
    made = write_quantized(model, tmp_path / "int8.onnx", ranges, form_of(Target()), overrides=coarse(model))
    before = shift(made.path, model)
    assert before > 0.02
    assert len(correct_biases(made.path, model, means)) == 2
    assert shift(made.path, model) < 0.4 * before  # ReLU of noise has a mean of its own
    rounded = fake_quantized(graph, model, made, (samples()[:6],))
    assert check_fake_quantized(rounded, made.path, (samples()[6:12],)).outputs < 1e-5


def test_means_are_those_of_all_samples_whatever_the_batches(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = tmp_path / "float.onnx", samples()
    export_onnx(conv().eval(), (x[:2],), model)
    name = onnx.load(model).graph.input[0].name
    found = input_means(model, ([part.numpy()] for part in x.split((40, 17, 7))))
    assert len(found) == 2
    np.testing.assert_allclose(found[name], x.mean(0, keepdim=True).numpy(), atol=1e-5)


def test_weights_on_their_grid_change_no_bias(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, model = conv().eval(), tmp_path / "float.onnx"
    export_onnx(network, (samples()[:2],), model)
    batch = [[samples().numpy()]]
    ranges = activation_ranges(model, batch)
    first = write_quantized(model, tmp_path / "first.onnx", ranges, QuantizedForm("x64"))
    weights = stored_values(onnx.load(first.path))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            read = name if name in weights else f"{name}_DequantizeLinear_Output"
            parameter.copy_(torch.from_numpy(weights[read]))
    export_onnx(network, (samples()[:2],), model)
    made = write_quantized(model, tmp_path / "int8.onnx", ranges, QuantizedForm("x64"))
    before = made.path.read_bytes()
    correct_biases(made.path, model, input_means(model, batch))
    assert made.path.read_bytes() == before


def test_a_bias_that_two_layers_share_and_one_that_is_missing_stay(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1, bias=False)
    )
    network[2].bias = network[0].bias
    model = tmp_path / "float.onnx"
    export_onnx(network.eval(), (samples()[:2],), model)
    batch = [[samples().numpy()]]
    made = write_quantized(model, tmp_path / "int8.onnx", activation_ranges(model, batch), form_of(Target()))
    before = made.path.read_bytes()
    assert correct_biases(made.path, model, input_means(model, batch)) == []
    assert made.path.read_bytes() == before
