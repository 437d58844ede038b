"""``Target``: the device of the compiled model; ``Cost`` of a network; ``Budget``: limits on the cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from pydantic import ConfigDict

from tdcompile.errors import InputError, nearest
from tdcompile.support.options import Count, Options, Share, Workers

Device = Literal["cpu", "cuda"]
Precision = Literal["fp32", "fp16", "int8"]
AskedPrecision = Literal["fp32", "fp16", "int8", "auto"]
Goal = Literal["fastest", "smallest"]

# Allowed relative excess of a measured latency over its budget: two runs of one model on an idle machine differ by
# about as much.
LATENCY_TOLERANCE = 0.04
GRAIN: dict[Device, int] = {"cpu": 16, "cuda": 8}
INT8_OPSET = 13  # the first opset with QuantizeLinear along an axis, which weights per channel need
INT8_GRAIN = 8  # onnxruntime's int8 convolutions step at multiples of 8 output channels (mlas/lib/convsym.cpp)


@dataclass(frozen=True)
class Target(Options):
    """The device and session that the compiled model will run on.

    Attributes:
        device: ``cpu`` or ``cuda``; selects the execution provider of onnxruntime.
        threads: intra-op threads of a session.
        grain: under a latency budget ranks are multiples of it; None means 16 on CPU, 8 on CUDA and in int8.
        precision: number format of the compiled model.
        batch: samples in one timed run.
    """

    device: Device = "cpu"
    threads: Workers = 1
    grain: Count | None = None
    precision: Precision = "fp32"
    batch: Count = 1

    @property
    def rank_grain(self) -> int:
        """Return ``grain``, or the device's default."""
        return self.grain or (INT8_GRAIN if self.precision == "int8" else GRAIN[self.device])

    @property
    def provider(self) -> str:
        """Return onnxruntime's name of the execution provider."""
        if self.device == "cuda" and self.precision == "int8":
            return "TensorrtExecutionProvider"  # the CUDA provider has no kernel for QLinearConv
        return {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[self.device]


@dataclass(frozen=True)
class Cost:
    """The cost of a layer or network for one sample: parameters, multiply-accumulates, bytes moved, seconds.

    ``bytes`` counts weights plus activations read and written; ``seconds`` is 0.0 if nothing was measured.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")  # a plan file may not misspell a field
    params: float = 0.0
    macs: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))


def total(costs: Sequence[Cost]) -> Cost:
    """Return the sum of costs."""
    return sum(costs, Cost())


# The names in a budget, and the field of ``Cost`` that each limits.
LIMITED = {"latency": "seconds", "macs": "macs", "params": "params"}
# What each goal makes least, by its name in a budget. Parameters nearly determine the size of the ONNX file.
LEAST: dict[Goal, str] = {"fastest": "latency", "smallest": "params"}
WEIGHT_BYTES: dict[Precision, int] = {"fp32": 4, "fp16": 2, "int8": 1}
UNLIMITED = f"the budget limits nothing: give at least one of {', '.join(LIMITED)}, e.g. latency=0.5"


@dataclass(frozen=True)
class Budget(Options):
    """Limits as shares in (0, 1] of the dense network's cost; None does not limit.

    A budget without shares is valid only with a given plan, for which nothing is chosen.
    """

    latency: Share | None = None
    macs: Share | None = None
    params: Share | None = None

    @classmethod
    def parse(cls, parts: Sequence[str]) -> Budget:
        """Read ``["latency=0.5", "params=0.3"]``; a part may hold several, joined by commas.

        Raises:
            InputError: a name is unknown or given twice, or a share is not a number in (0, 1].
        """
        shares: dict[str, float] = {}
        for part in (piece for text in parts for piece in text.split(",")):
            name, _, value = part.partition("=")
            if name not in LIMITED:
                raise InputError(f"budget '{part}' limits '{name}': {nearest(name, LIMITED)}")
            if name in shares:
                raise InputError(f"budget {name} is given twice")
            try:
                shares[name] = float(value)
            except ValueError as error:
                raise InputError(f"budget '{part}' is not of the form {name}=SHARE, e.g. {name}=0.5") from error
        return cls(**shares)

    @property
    def shares(self) -> dict[str, float]:
        """Return the shares that are set, by name."""
        return {name: share for name in LIMITED if (share := getattr(self, name)) is not None}

    def limits(self, dense: Cost) -> dict[str, float]:
        """Return the upper limit of each field of ``Cost``, given the dense network's cost.

        Raises:
            InputError: nothing is limited.
        """
        if not self.shares:
            raise InputError(UNLIMITED)
        return {LIMITED[name]: share * getattr(dense, LIMITED[name]) for name, share in self.shares.items()}

    def __str__(self) -> str:
        return ",".join(f"{name}={share:g}" for name, share in self.shares.items())
