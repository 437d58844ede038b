"""Facts about the network as it runs: moments of every layer's input, and the dense model measured whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from tdcompile.facts import Aspect, Fact
from tdcompile.layer import Moments


@dataclass(frozen=True)
class Calibration(Fact):
    """Second moments of the inputs of layers, by layer name.

    Attributes:
        moments: empty without calibration data.
        skipped: layers without moments although there is data, and why.
        samples: how many training samples were read.
    """

    reads: ClassVar[frozenset[Aspect]] = frozenset(Aspect)
    moments: Mapping[str, Moments]
    skipped: Mapping[str, str]
    samples: int


@dataclass(frozen=True)
class Baseline(Fact):
    """The dense network as an ONNX model, batch norm folded, and its measured latency.

    Attributes:
        model: the file.
        seconds: median of one run of ``target.batch`` samples.
        dynamic_batch: whether its batch dimension is open.
        notes: what did not go the usual way when it was exported.
    """

    model: Path
    seconds: float
    dynamic_batch: bool = True
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Round:
    """One round of the in-graph check: what was predicted, what was measured, which layers were put back."""

    predicted: float
    measured: float
    dense: float
    put_back: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rehearsal(Fact):
    """The rounds of the in-graph check of a plan, before any factor is computed."""

    rounds: tuple[Round, ...]
