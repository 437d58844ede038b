"""What is compiled for, and what may be spent: ``Target``, ``Cost``, ``Budget``, and the contract of cost models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from tdcompile.errors import InputError, nearest
from tdcompile.support.options import Count, Options, Share

Device = Literal["cpu", "cuda"]
Floats = Literal["fp32", "fp16"]

GRAIN: dict[Device, int] = {"cpu": 16, "cuda": 8}


@dataclass(frozen=True)
class Target(Options):
    """Where the compiled model will run.

    Attributes:
        device: ``cpu`` or ``cuda``: the execution provider of onnxruntime.
        threads: intra-op threads of a session.
        grain: ranks are multiples of it under a latency budget; None takes the device's own (16 on CPU, 8 on CUDA).
        batch: samples in one timed run.
    """

    device: Device = "cpu"
    threads: Count = 1
    grain: Count | None = None
    precision: Floats = "fp32"
    batch: Count = 1

    @property
    def rank_grain(self) -> int:
        """The grain asked for, or the device's own."""
        return self.grain or GRAIN[self.device]

    @property
    def provider(self) -> str:
        """The name onnxruntime gives to the execution provider."""
        return {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[self.device]


@dataclass(frozen=True)
class Cost:
    """What a layer or a network costs for one sample: parameters, multiply-accumulates, bytes moved, seconds.

    ``bytes`` is weights plus activations read and written; ``seconds`` is 0.0 where nothing was measured.
    """

    params: float = 0.0
    macs: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))


def total(costs: Sequence[Cost]) -> Cost:
    """The sum of costs."""
    return sum(costs, Cost())


# What a budget may name, and the field of ``Cost`` that it limits.
LIMITED = {"latency": "seconds", "macs": "macs", "params": "params"}
UNLIMITED = f"the budget limits nothing: give at least one of {', '.join(LIMITED)}, e.g. latency=0.5"


@dataclass(frozen=True)
class Budget(Options):
    """What may be kept of the dense network, each a share in (0, 1]; None does not limit.

    One without any share is that of a plan which is given: nothing is chosen under it.
    """

    latency: Share | None = None
    macs: Share | None = None
    params: Share | None = None

    @classmethod
    def parse(cls, parts: Sequence[str]) -> Budget:
        """Read ``["latency=0.5", "params=0.3"]``; a part may hold several, joined by commas.

        Raises:
            InputError: an unknown name, a share that is no number or outside (0, 1], or one given twice.
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
        """The shares that are set, by name."""
        return {name: share for name in LIMITED if (share := getattr(self, name)) is not None}

    def limits(self, dense: Cost) -> dict[str, float]:
        """The most that each field of ``Cost`` may reach, given what the dense network costs.

        Raises:
            InputError: nothing is limited.
        """
        if not self.shares:
            raise InputError(UNLIMITED)
        return {LIMITED[name]: share * getattr(dense, LIMITED[name]) for name, share in self.shares.items()}

    def __str__(self) -> str:
        return ",".join(f"{name}={share:g}" for name, share in self.shares.items())
