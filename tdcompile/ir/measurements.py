"""Facts from running the network: covariances of the layers' inputs, latency of the dense model, latency of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from tdcompile.ir.facts import Aspect, Fact, Facts
from tdcompile.numerics.covariance import Covariance, Identity


@dataclass(frozen=True)
class Calibration(Fact):
    """Covariances of the layers' inputs over calibration data.

    Attributes:
        covariances: by layer name; empty without calibration data. ``input_covariance`` reads one.
        skipped: for each layer that has none although there is data, the reason.
        samples: how many training samples were read.
    """

    reads: ClassVar[frozenset[Aspect]] = frozenset(Aspect)
    covariances: Mapping[str, Covariance]
    skipped: Mapping[str, str]
    samples: int


@dataclass(frozen=True)
class Baseline(Fact):
    """The dense network as an ONNX model, batch norm folded, and its measured latency.

    Attributes:
        model: the ONNX file.
        seconds: median time of a run of ``target.batch`` samples.
    """

    model: Path
    seconds: float


@dataclass(frozen=True)
class Reachable(Fact):
    """The budget is within reach.

    Attributes:
        latency: measured share of the dense latency that a plan reaches; None if the prices left no doubt.
    """

    latency: float | None = None


@dataclass(frozen=True)
class Round:
    """One round of the in-graph check.

    Attributes:
        predicted: predicted seconds of the plan.
        measured: measured seconds of the plan.
        dense: measured seconds of the dense network.
        put_back: layers that became dense again.
    """

    predicted: float
    measured: float
    dense: float
    put_back: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rehearsal(Fact):
    """The rounds of the in-graph check of a plan, before any factor is computed."""

    rounds: tuple[Round, ...]


def input_covariance(facts: Facts, layer: str, weight: Tensor) -> Covariance:
    """Return the covariance of a layer's input, or the identity if calibration has none for the layer."""
    calibration = facts.get(Calibration)
    known = calibration.covariances.get(layer) if calibration else None
    return Identity.of(weight) if known is None else known
