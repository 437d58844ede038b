"""Networks that nobody designed, compiled by plans that nobody chose: what comes out computes what it should."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import tdcompile
from tdcompile.backend.bias_correction import correct_biases, input_means
from tdcompile.backend.export import export_onnx
from tdcompile.backend.fake_parity import check_fake_quantized
from tdcompile.backend.fake_quantization import fake_quantized
from tdcompile.backend.parity import check_parity
from tdcompile.backend.quantize import activation_ranges, write_quantized
from tdcompile.backend.quantized_form import form_of
from tdcompile.core.decomposition import Decomposition
from tdcompile.core.plan import Candidate, RankPlan
from tdcompile.core.registry import find, make
from tdcompile.ir.modules import outputs_of
from tdcompile.ir.program import Program
from tdcompile.ir.target import Cost, Target

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
FUNCTIONAL = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
SIZES = {1: (23,), 2: (11, 9), 3: (6, 5, 7)}


class FunctionalConv(nn.Module):
    """A convolution on a parameter that has another name."""

    def __init__(self, axes: int, inputs: int, outputs: int, kernel: tuple[int, ...]) -> None:
        super().__init__()
        self.axes, self.padding = axes, tuple(k // 2 for k in kernel)
        self.kernel = nn.Parameter(torch.randn(outputs, inputs, *kernel) / inputs)

    def forward(self, x: Tensor) -> Tensor:
        return FUNCTIONAL[self.axes](x, self.kernel, padding=self.padding)


class Residual(nn.Module):
    """A branch beside the value itself, or beside a 1x1 convolution of it."""

    def __init__(self, branch: nn.Module, short: nn.Module | None) -> None:
        super().__init__()
        self.branch, self.short = branch, short

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + (x if self.short is None else self.short(x))


class Branches(nn.Module):
    """Two convolutions of one value side by side."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], 1)


class Twice(nn.Module):
    """One module, called two times."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return self.part(torch.tanh(self.part(x)))


class Tokens(nn.Module):
    """What follows the convolutions: positions as tokens, attention among them or not, a linear layer on each."""

    def __init__(self, channels: int, heads: int, outputs: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.attention = nn.MultiheadAttention(channels, heads, batch_first=True) if heads else None
        self.mix, self.head = nn.Linear(channels, 3 * channels), nn.Linear(3 * channels, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.flatten(2).transpose(1, 2))
        if self.attention is not None:
            x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(F.gelu(self.mix(x)))


class Pooled(nn.Module):
    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(2).mean(2))


@dataclass
class Draw:
    """Draws parts of a network; ``channels`` is what the value has by now."""

    data: st.DataObject
    axes: int
    channels: int

    def of(self, *choices: Any) -> Any:
        return self.data.draw(st.sampled_from(choices))

    def kernel(self, *sizes: int) -> tuple[int, ...]:
        return tuple(self.of(*sizes) for _ in range(self.axes))

    def conv(self, outputs: int | None = None, *, same: bool = False) -> nn.Module:
        inputs, outputs = self.channels, outputs or self.of(6, 12, 16)
        groups = self.of(1, 1, 1, 2, inputs)
        if inputs % groups or outputs % groups:
            groups = 1
        if same:
            kernel = self.kernel(1, 3, 5)
            options: dict[str, Any] = {"padding": tuple(k // 2 for k in kernel)}
        else:
            kernel = self.kernel(1, 2, 3)
            options = {
                "padding": self.of("same", "valid", 1, 2),
                "dilation": self.of(1, 1, 2),
                "padding_mode": self.of("zeros", "zeros", "reflect", "replicate", "circular"),
            }
            if options["padding"] != "same":
                options["stride"] = self.kernel(1, 1, 2)
        module = CONVS[self.axes](inputs, outputs, kernel, groups=groups, bias=self.of(True, False), **options)
        return parametrizations.weight_norm(module) if self.of(False, False, False, True) else module

    def part(self) -> nn.Module:
        """One step of a network, which may change the number of channels."""
        kind = self.of("conv", "conv", "transposed", "functional", "residual", "branches", "twice", "norm", "pool")
        if kind == "conv":
            made: nn.Module = self.conv()
            self.channels = made.out_channels  # type: ignore[assignment]  # a convolution's
            return nn.Sequential(made, NORMS[self.axes](self.channels), nn.ReLU())
        if kind == "transposed":
            stride = self.of(1, 2)
            options = {"stride": stride, "padding": self.of(0, 1), "output_padding": self.of(0, stride - 1)}
            made = TRANSPOSED[self.axes](self.channels, 8, self.kernel(2, 3, 4), bias=self.of(True, False), **options)
            self.channels = 8
            return nn.Sequential(made, NORMS[self.axes](8))
        if kind == "functional":
            made = FunctionalConv(self.axes, self.channels, 10, self.kernel(1, 3))
            self.channels = 10
            return made
        if kind == "residual":
            outputs = self.of(self.channels, 14)
            branch = nn.Sequential(self.conv(outputs, same=True), NORMS[self.axes](outputs), nn.SiLU())
            short = None if outputs == self.channels else CONVS[self.axes](self.channels, outputs, 1)
            self.channels = outputs
            return Residual(branch, short)
        if kind == "branches":
            made = Branches(self.conv(6, same=True), self.conv(10, same=True))
            self.channels = 16
            return made
        if kind == "twice":
            return Twice(self.conv(self.channels, same=True))
        if kind == "norm":
            return nn.Sequential(nn.GroupNorm(1, self.channels), nn.Dropout(0.3), nn.Hardswish())
        return {1: nn.AvgPool1d, 2: nn.MaxPool2d, 3: nn.AvgPool3d}[self.axes](2, stride=1, padding=1)

    def head(self) -> nn.Module:
        if self.of(True, False):
            return Pooled(self.channels, 5)
        return Tokens(self.channels, self.of(0, 2) if self.channels % 2 == 0 else 0, 5)


def network(data: st.DataObject) -> tuple[nn.Module, Tensor]:
    """A network and an input; every size along the way fits, or the example is of no use and rejected."""
    torch.manual_seed(data.draw(st.integers(0, 2**16), label="weights"))
    draw = Draw(data, data.draw(st.sampled_from([1, 2, 2, 3]), label="axes"), data.draw(st.sampled_from([1, 3, 8])))
    x = torch.randn(2, draw.channels, *SIZES[draw.axes])
    parts = [draw.part() for _ in range(data.draw(st.integers(1, 4), label="parts"))]
    module = nn.Sequential(*parts, draw.head()).eval()
    for norm in module.modules():
        if isinstance(norm, tuple(NORMS.values())):  # statistics that matter
            norm.running_mean.normal_(std=0.3)  # type: ignore[union-attr]  # tracked by default
            norm.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    return module, x


def plan_of(program: Program, data: st.DataObject, exact: bool) -> RankPlan:
    """Any form that applies to a layer at any of its ranks, or at those that reproduce it."""
    choices = {}
    for name, site in tdcompile.sites(program).items():
        spaces = {
            form: list(made.rank_space(site.layer, 1))
            for form in find(Decomposition)
            if (made := make(Decomposition, form)).refuse(site.layer) is None
            and not (exact and form in ("cp", "cp4"))  # exact only at ranks that no iteration finds for certain
        }
        form = data.draw(st.sampled_from(["dense", *spaces]), label=name)
        if form == "dense":
            choices[name] = Candidate.dense(Cost())
            continue
        place = -1 if exact else data.draw(st.integers(0, len(spaces[form]) - 1), label=f"rank of {name}")
        choices[name] = Candidate(make(Decomposition, form), spaces[form][place], 0.0, Cost())
    return RankPlan(choices, Cost(), Cost())


def compiled(data: st.DataObject, exact: bool) -> tuple[nn.Module, Tensor, Program]:
    module, x = network(data)
    try:
        with torch.no_grad():
            module(x)
    except RuntimeError:  # a kernel that is larger than what is left of its input
        reject()
    program = tdcompile.trace(module, x, frontend=data.draw(st.sampled_from(["auto", "auto", "fx", "export"])))
    program = program.with_(facts=program.facts.having(plan_of(program, data, exact)))
    return module, x, tdcompile.Pipeline.parse("factorize,fold-batchnorm,drop-dead").run(program)


def check_any_plan(data: st.DataObject) -> None:
    """The ONNX model of a compiled network computes what its PyTorch graph computes, at several batch sizes."""
    _, _, program = compiled(data, exact=False)
    with TemporaryDirectory() as folder:
        exported = export_onnx(program.graph, program.inputs, Path(folder) / "model.onnx")
        check_parity(exported.path, program.graph, program.inputs, Target(), batches=(1, 3), seeds=1)


def check_int8(data: st.DataObject) -> None:
    """The int8 model of a compiled network rounds what its PyTorch graph under fake quantisation rounds."""
    _, x, program = compiled(data, exact=False)
    samples = torch.randn(4, *x.shape[1:])
    with TemporaryDirectory() as folder:
        exported = export_onnx(program.graph, program.inputs, Path(folder) / "float.onnx")
        ranges = activation_ranges(exported.path, [[samples.numpy()]])
        made = write_quantized(exported.path, Path(folder) / "int8.onnx", ranges, form_of(Target()))
        correct_biases(made.path, exported.path, input_means(exported.path, [[samples.numpy()]]))
        rounded = fake_quantized(program.graph, exported.path, made, [samples])
        check_fake_quantized(rounded, made.path, [samples])


def check_exact_plan(data: st.DataObject) -> None:
    """At full ranks nothing changes."""
    module, x, program = compiled(data, exact=True)
    (expected,), (got,) = outputs_of(module, (x,)), outputs_of(program.graph, (x,))
    scale = max(float(expected.abs().max()), 1e-3)
    assert float((got - expected).abs().max()) <= 1e-4 * scale


# Networks that are rejected are not counted, and a generation that makes mostly such is an error.
HEALTH = [check for check in HealthCheck if check is not HealthCheck.filter_too_much]
RELAXED = {"deadline": None, "suppress_health_check": HEALTH, "derandomize": True}


@settings(max_examples=5, **RELAXED)  # type: ignore[arg-type]  # hypothesis' own names
@given(st.data())
def test_any_plan_of_any_network_is_right_in_onnxruntime(data: st.DataObject) -> None:
    check_any_plan(data)


@settings(max_examples=5, **RELAXED)  # type: ignore[arg-type]
@given(st.data())
def test_any_network_in_int8_is_its_fake_quantised_graph(data: st.DataObject) -> None:
    check_int8(data)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@settings(max_examples=300, **RELAXED)  # type: ignore[arg-type]
@given(st.data())
def test_three_hundred_networks_in_int8_are_their_fake_quantised_graphs(data: st.DataObject) -> None:
    check_int8(data)


@settings(max_examples=15, **RELAXED)  # type: ignore[arg-type]
@given(st.data())
def test_at_full_ranks_any_network_is_the_same(data: st.DataObject) -> None:
    check_exact_plan(data)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@settings(max_examples=500, **RELAXED)  # type: ignore[arg-type]
@given(st.data())
def test_five_hundred_networks_are_right_in_onnxruntime(data: st.DataObject) -> None:
    check_any_plan(data)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@settings(max_examples=500, **RELAXED)  # type: ignore[arg-type]
@given(st.data())
def test_at_full_ranks_five_hundred_networks_are_the_same(data: st.DataObject) -> None:
    check_exact_plan(data)
