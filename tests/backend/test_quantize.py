"""``write_quantized`` and ``activation_ranges``: what becomes int8, what stays float and why, whose scales count."""

import contextlib
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import tdcompile
from tdcompile.backend.export import export_onnx
from tdcompile.backend.profile import node_seconds
from tdcompile.backend.quantize import activation_ranges, write_quantized
from tdcompile.backend.quantized_form import QuantizedForm, has_vnni
from tdcompile.backend.quantized_parity import check_quantized
from tdcompile.backend.session import infer, open_session
from tdcompile.errors import InputError, ParityError
from tdcompile.ir.program import sites
from tdcompile.ir.target import Target

# isort: split
import onnxruntime as ort

# Without VNNI the kernels of the form x64 would saturate.
X64 = QuantizedForm("x64") if has_vnni() else QuantizedForm("x64-reduced", reduced=True)
ARM = QuantizedForm("arm64", symmetric=True)


class Block(nn.Module):
    """A residual block, global pooling, a transposed convolution beside it, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.up, self.pool, self.fc = nn.ConvTranspose2d(16, 16, 2, 2), nn.AdaptiveAvgPool2d(1), nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        x = (self.inner(x) + x).relu()
        return self.fc(self.pool(self.up(x)).flatten(1))


def batches(count: int = 4) -> list[tuple[torch.Tensor, ...]]:
    draw = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 3, 12, 12, generator=draw),) for _ in range(count)]


def ranges_of(model: Path):
    return activation_ranges(model, ([x.numpy() for x in batch] for batch in batches()))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("block") / "block.onnx"
    export_onnx(Block().eval(), (torch.randn(2, 3, 12, 12),), path)
    return path


def test_convolutions_and_products_become_integer_kernels_and_the_rest_says_why(model: Path, tmp_path: Path) -> None:
    made = write_quantized(model, tmp_path / "int8.onnx", ranges_of(model), X64)
    proto = onnx.load(made.path)
    weights = [numpy_helper.to_array(w) for w in proto.graph.initializer if w.name.endswith("weight_quantized")]
    assert len(weights) == 3
    assert all(w.dtype == np.int8 for w in weights)
    assert made.floats == {"up": "onnxruntime has no integer kernel for transposed convolutions"}
    assert made.bytes == made.path.stat().st_size < model.stat().st_size
    found = check_quantized(made.path, model, batches(), Target())
    assert 0 < found.kernels < found.error < 0.5  # random weights answer nearly the same to every sample
    kernels = node_seconds(made.path, batches()[0], Target())
    assert {"stem", "inner"} <= {name.rpartition("/")[0] for name in kernels}  # fused kernels keep their layer's name


def test_a_layer_that_is_kept_stays_float_with_all_in_it(model: Path, tmp_path: Path) -> None:
    made = write_quantized(model, tmp_path / "int8.onnx", ranges_of(model), X64, keep={"inner"})
    assert made.floats["inner"] == "kept in float"
    stored = {w.name for w in onnx.load(made.path).graph.initializer}
    assert "inner.weight" in stored
    assert "stem.weight_quantized" in stored


def test_a_kept_layer_between_integers_is_not_quantised_by_onnxruntime(model: Path, tmp_path: Path) -> None:
    chain = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 5, 1)).eval()
    export_onnx(chain, (torch.randn(2, 3, 12, 12),), tmp_path / "chain.onnx")
    ranges = ranges_of(tmp_path / "chain.onnx")
    made = write_quantized(tmp_path / "chain.onnx", tmp_path / "int8.onnx", ranges, X64, keep={"2"})
    found = check_quantized(made.path, tmp_path / "chain.onnx", batches(), Target())
    assert found.kernels < 0.1 * found.error
    whole = write_quantized(tmp_path / "chain.onnx", tmp_path / "whole.onnx", ranges, X64)
    assert "Max" not in {node.op_type for node in onnx.load(whole.path).graph.node}


def test_own_scales_and_rounded_weights_reach_the_file_exactly(model: Path, tmp_path: Path) -> None:
    scale = np.array(0.0137, np.float32)
    own = {"input": "x", "scale": scale, "zero_point": np.array(131, np.uint8)}
    name = onnx.load(model).graph.input[0].name
    overrides = {name: [{key: own[key] for key in ("scale", "zero_point")}]}
    made = write_quantized(model, tmp_path / "int8.onnx", ranges_of(model), X64, overrides=overrides)
    assert made.scales[name] == (float(scale), 131)


def test_the_form_of_another_family_has_signed_activations(model: Path, tmp_path: Path) -> None:
    made = write_quantized(model, tmp_path / "arm.onnx", ranges_of(model), ARM)
    assert {zero for _, zero in made.scales.values()} == {0}
    unsigned = write_quantized(model, tmp_path / "x64.onnx", ranges_of(model), X64)
    assert any(zero for _, zero in unsigned.scales.values())


def test_the_form_of_tensorrt_rounds_weights_in_the_graph_and_its_scales_are_those_of_activations(
    model: Path, tmp_path: Path
) -> None:
    made = write_quantized(model, tmp_path / "trt.onnx", ranges_of(model), QuantizedForm("tensorrt", symmetric=True))
    rounded = {node.input[0] for node in onnx.load(made.path).graph.node if node.op_type == "QuantizeLinear"}
    assert "stem.weight" in rounded
    assert "stem.weight" not in made.scales
    assert onnx.load(model).graph.input[0].name in made.scales


def test_ranges_are_those_of_the_samples_and_latency_needs_none(model: Path, tmp_path: Path) -> None:
    name = onnx.load(model).graph.input[0].name
    low, high = ranges_of(model)[name]
    values = torch.cat([batch[0] for batch in batches()])
    assert (low, high) == pytest.approx((float(values.min()), float(values.max())), rel=1e-6)
    made = write_quantized(model, tmp_path / "timed.onnx", None, X64)
    assert infer(open_session(made.path, Target()), batches()[0])[0].shape == (8, 5)


def kernels_of(model: Path) -> Counter[str]:
    """Count the operators that onnxruntime runs."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(model.with_suffix(".optimised.onnx"))
    options.log_severity_level = 3  # a warning says that the file is for this processor alone
    ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


class Bounded(nn.Module):
    """ReLU6 behind an addition, pooling and a concatenation of what is never negative, and a branch that can be."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.last = nn.Conv2d(48, 8, 1)

    def forward(self, x):
        x = nn.functional.relu6(self.stem(x))
        y = nn.functional.relu6(self.inner(x) + x)
        z = self.inner(y)
        return self.last(torch.cat([nn.functional.max_pool2d(y, 3, 1, 1), nn.functional.relu(x + z), z], 1)).relu()


class Copying(nn.Module):
    """Nearest up-sampling, pixel shuffle and a flip behind ReLUs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.last = nn.Conv2d(4, 8, 1)

    def forward(self, x):
        x = nn.functional.interpolate(self.stem(x).relu(), scale_factor=2)
        x = self.inner(x.flip(3)).relu()
        return self.last(nn.functional.pixel_shuffle(x, 2)).relu()


@pytest.mark.parametrize("kind", [Block, Bounded, Copying])
def test_a_model_that_only_measures_latency_runs_the_same_kernels(kind, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tmp_path / "float.onnx"
    export_onnx(kind().eval(), (torch.randn(2, 3, 12, 12),), model)
    timed = write_quantized(model, tmp_path / "timed.onnx", None, X64)
    made = write_quantized(model, tmp_path / "int8.onnx", ranges_of(model), X64)
    assert kernels_of(timed.path) == kernels_of(made.path)
    never_negative = {name for name, (_, zero) in made.scales.items() if zero == 0}
    assert never_negative == {name for name, (_, zero) in timed.scales.items() if zero == 0}


def test_what_cannot_be_quantised_is_one_sentence(model: Path, tmp_path: Path) -> None:
    made = write_quantized(model, tmp_path / "int8.onnx", None, X64)
    with pytest.raises(InputError, match="quantised already: give the float model"):
        write_quantized(made.path, tmp_path / "again.onnx", None, X64)
    with pytest.raises(InputError, match="there are none"):
        activation_ranges(model, [])
    broken = batches()[0][0].clone()
    broken[0, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match="int8 needs finite activations: the value of"):
        activation_ranges(model, [[broken.numpy()]])
    old = onnx.load(model)
    old.opset_import[0].version = 12
    onnx.save(old, tmp_path / "old.onnx")
    with pytest.raises(InputError, match="opset 13 or later, not 12"):
        write_quantized(tmp_path / "old.onnx", tmp_path / "x.onnx", None, X64)


def test_a_kernel_that_computes_something_else_is_told(model: Path, tmp_path: Path, monkeypatch) -> None:
    made = write_quantized(model, tmp_path / "int8.onnx", ranges_of(model), X64)
    from tdcompile.backend import quantized_parity as checked

    def opened(path, target, *, optimised=True):
        return open_session(path, target, optimised=optimised), optimised and path == made.path

    def saturated(pair, inputs):
        session, fused = pair
        return [y * (0.5 if fused else 1.0) for y in infer(session, inputs)]

    monkeypatch.setattr(checked, "open_session", opened)
    monkeypatch.setattr(checked, "infer", saturated)
    with pytest.raises(ParityError, match="integer kernels"):
        check_quantized(made.path, model, batches(), Target())


@pytest.mark.parametrize(("size", "passes"), [(1.0, True), (3.0, False)])
def test_kernels_of_a_model_that_answers_noise_may_differ_by_as_much_as_two_noises(
    model: Path, monkeypatch, size: float, passes: bool
) -> None:
    """Float outputs vary by 0.01; the int8 model adds noise of 1 to them, and its kernels other noise."""
    from tdcompile.backend import quantized_parity as checked

    draws = {
        role: np.random.default_rng(place).normal(scale=scale, size=(8, 500))
        for place, (role, scale) in enumerate({"fused": size, "plain": 1.0, "float": 0.01}.items())
    }

    def opened(path, target, *, optimised=True):
        return ("fused" if optimised else "plain") if path == Path("int8.onnx") else "float"

    def noisy(role, inputs):
        return [draws["float"] + (0 if role == "float" else draws[role])]

    monkeypatch.setattr(checked, "open_session", opened)
    monkeypatch.setattr(checked, "infer", noisy)
    with contextlib.nullcontext() if passes else pytest.raises(ParityError, match="integer kernels"):
        check_quantized(Path("int8.onnx"), model, [(torch.zeros(8, 1),)], Target())


def test_the_errors_do_not_depend_on_how_samples_are_batched(model: Path, tmp_path: Path) -> None:
    made = write_quantized(model, tmp_path / "int8.onnx", ranges_of(model), X64)
    whole = check_quantized(made.path, model, batches(), Target())
    one_by_one = [(row[None],) for (x,) in batches() for row in x]
    alone = check_quantized(made.path, model, one_by_one, Target())
    assert alone.error == pytest.approx(whole.error, rel=0.01)
    assert alone.kernels == pytest.approx(whole.kernels, rel=0.1, abs=1e-3)
    kept = write_quantized(model, tmp_path / "float.onnx", ranges_of(model), X64, keep=["stem", "inner", "fc"])
    assert check_quantized(kept.path, model, one_by_one[:1], Target()).error < 1e-5


class Encoders(nn.Module):
    """Attention that reads the weights of its linear layers itself, twice with equal biases."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(2)]
        self.layers = nn.ModuleList(layers)
        self.layers[1].self_attn.load_state_dict(layers[0].self_attn.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](x))


@pytest.mark.parametrize(("biased", "apart"), [(True, True), (False, False)])
def test_a_kept_layer_of_attention_stays_float_with_those_around_it_if_it_has_no_name(
    tmp_path: Path, biased: bool, apart: bool
) -> None:
    torch.manual_seed(0)
    network, x = Encoders().eval(), torch.randn(4, 5, 16)
    with torch.no_grad():
        for layer in network.layers if biased else ():
            layer.self_attn.in_proj_bias.add_(torch.randn(48))
            layer.self_attn.out_proj.weight.mul_(1 + 0.1 * torch.rand(16, 16))
    program = tdcompile.trace(network, (x,))
    model = tmp_path / "float.onnx"
    export_onnx(program.graph, (x,), model)
    (kept,) = [name for name in sites(program) if "layers.1.self_attn.in_proj" in name]
    made = write_quantized(model, tmp_path / "int8.onnx", activation_ranges(model, [[x.numpy()]]), X64, keep=[kept])
    nodes = onnx.load(made.path).graph.node
    rounded = {node.name.rpartition("/")[0] for node in nodes if len(node.input) > 1 and "Dequant" in node.input[1]}
    assert kept not in rounded
    assert "layers.1.self_attn" not in rounded
    assert ("layers.1.self_attn.out_proj" in rounded) == apart
    assert {"layers.0.linear1", "layers.1.linear1", "layers.1.linear2"} <= rounded


class Tokens(nn.Module):
    """Attention, layer normalisation and GELU between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = nn.LayerNorm(16), nn.GELU()
        self.qk, self.out = nn.Linear(16, 32), nn.Linear(16, 16)

    def forward(self, x):
        q, k = self.qk(self.norm(x)).chunk(2, -1)
        return self.out(self.act((q @ k.transpose(1, 2)).softmax(-1) @ x))


def test_layers_without_an_integer_kernel_stay_float_with_their_reason(tmp_path: Path) -> None:
    export_onnx(Tokens().eval(), (torch.randn(2, 7, 16),), tmp_path / "tokens.onnx")
    made = write_quantized(tmp_path / "tokens.onnx", tmp_path / "int8.onnx", None, X64)
    assert made.floats["norm"] == "normalisations stay float"
    assert made.floats["act"] == "onnxruntime has no integer kernel for GELU"
    assert sum("both factors are activations" in why for why in made.floats.values()) >= 1
    assert not {"qk", "out"} & made.floats.keys()
    kinds = {node.op_type for node in onnx.load(made.path).graph.node}
    assert "LayerNormalization" in kinds


@pytest.mark.parametrize("form", [X64, ARM], ids=lambda form: form.family)
@pytest.mark.parametrize("factor", [0.0, 1e-40, 1e-12, 1e-8])
def test_biases_of_channels_that_are_switched_off_are_kept(factor: float, form: QuantizedForm, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten())
    network.append(nn.Linear(16 * 64, 6)).eval()
    with torch.no_grad():
        for layer in (network[0], network[2], network[5]):
            layer.weight[:3] *= factor
            layer.bias[:3] = 0.5
    x = 100 * batches()[0][0]  # one step of the input is larger than the biases
    export_onnx(network, (x,), tmp_path / "off.onnx")
    ranges = activation_ranges(tmp_path / "off.onnx", [[x.numpy()]])
    made = write_quantized(tmp_path / "off.onnx", tmp_path / "int8.onnx", ranges, form)
    (found,) = infer(open_session(made.path, Target()), (x,))
    expected = network(x).detach().numpy()
    np.testing.assert_allclose(found[:, :3], expected[:, :3], rtol=0.01)
    if form is X64:  # the kernels of this machine take no other form without saturating
        assert np.abs(found - expected).max() < 0.1 * expected.std()


def test_constant_activations_get_a_scale_of_their_own(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 4, 1)).eval()
    with torch.no_grad():
        network[0].weight.zero_()
        network[0].bias.fill_(-1.0)  # all zeros behind ReLU
        network[2].weight.zero_()
        network[2].bias.fill_(3.0)
    x = batches()[0][0]
    export_onnx(network, (x,), tmp_path / "constant.onnx")
    ranges = activation_ranges(tmp_path / "constant.onnx", [[x.numpy()]])
    assert (0.0, 0.0) in ranges.values()
    made = write_quantized(tmp_path / "constant.onnx", tmp_path / "int8.onnx", ranges, X64)
    assert all(0 < scale < float("inf") for scale, _ in made.scales.values())
    assert 1.0 in {scale for scale, _ in made.scales.values()}
    (found,) = infer(open_session(made.path, Target()), (x,))
    np.testing.assert_allclose(found, network(x).detach().numpy(), atol=0.05)
