"""Target families of int8 models: each has kernels for another form of QDQ graph."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from tdcompile.ir.target import Target

Family = Literal["x64", "x64-reduced", "arm64", "tensorrt"]
_ARM = ("arm64", "aarch64")


@dataclass(frozen=True)
class QuantizedForm:
    """How a target family takes int8.

    Attributes:
        family: ``x64`` has VNNI; ``x64-reduced`` has not, and adds two products in 16 bits; ``arm64``; ``tensorrt``.
        symmetric: activations are signed with zero point 0, else unsigned with any zero point. Signed activations leave
            ReLU and residual blocks in float on x64.
        reduced: rows of weights get a larger scale where the sum of two products would saturate; see ``weight_scales``.
    """

    family: Family
    symmetric: bool = False
    reduced: bool = False

    @property
    def integer_bias(self) -> bool:
        """Whether biases are integers, in multiples of the scales of input and weight."""
        return self.family != "tensorrt"

    @property
    def limits(self) -> tuple[int, int]:
        """The least and the largest integer of an activation."""
        return (-128, 127) if self.symmetric else (0, 255)

    def step(self, low: float, high: float) -> float:
        """Return the scale of an activation, from its least and largest value."""
        wide = max(abs(low), abs(high)) / 127 if self.symmetric else (max(high, 0.0) - min(low, 0.0)) / 255
        return wide or 1.0

    def options(self, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """Return the ``extra_options`` of onnxruntime.quantization, with one's own scales in ``overrides``."""
        options: dict[str, Any] = {
            "ActivationSymmetric": self.symmetric,
            "WeightSymmetric": True,
            "MatMulConstBOnly": True,
            # their integer kernels write floats, so nothing need be rounded behind them but the inner values of chains
            "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"],
            # ``channel_scales`` does it, equally for tuning; onnxruntime leaves rows of zeros out
            "QDQDisableWeightAdjustForInt32Bias": True,
            "TensorQuantOverrides": {name: [dict(each) for each in given] for name, given in overrides.items()},
        }
        if self.family == "tensorrt":
            options |= {"AddQDQPairToWeight": True, "QuantizeBias": False, "ForceQuantizeNoInputCheck": True}
        return options


def form_of(target: Target) -> QuantizedForm:
    """Return the form of int8 models for a target on this machine."""
    if target.device == "cuda":
        return QuantizedForm("tensorrt", symmetric=True)
    if platform.machine().lower() in _ARM:
        return QuantizedForm("arm64", symmetric=True)
    return QuantizedForm("x64") if has_vnni() else QuantizedForm("x64-reduced", reduced=True)


def has_vnni() -> bool:
    """Return whether the processor multiplies bytes and sums in 32 bits (AVX-512 VNNI, AVX-VNNI or AMX)."""
    return bool(torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported())


def integer_instructions() -> str:
    """Return the fastest instructions for int8 of this processor, for messages."""
    if platform.machine().lower() in _ARM:
        return "ARM NEON"
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    return "VNNI" if has_vnni() else "neither VNNI nor AMX"
