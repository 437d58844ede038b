"""Facts from running the network: covariances of the layers' inputs, latency of the dense model, latency of a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from tdcompile.data.task import LEAST_SELECTION
from tdcompile.ir.diagnostics import Diagnostic, DiagnosticCode
from tdcompile.ir.facts import Aspect, Fact, Facts
from tdcompile.ir.target import Goal, Precision
from tdcompile.numerics.covariance import Covariance, Identity

MISSED = 0.5  # deviation of synthetic samples from the statistics above which a diagnostic is a warning
MUCH = 0.3  # share of the identity in a covariance above which a diagnostic is a warning


@dataclass(frozen=True)
class Calibration(Fact):
    """Covariances of the layers' inputs over calibration data.

    Attributes:
        covariances: by layer name; empty without calibration data. ``input_covariance`` reads one.
        skipped: for each layer that has none although there is data, the reason.
        samples: how many training samples were read.
        shrunk: for each layer with few rows, the share of the identity in its covariance.
    """

    reads: ClassVar[frozenset[Aspect]] = frozenset(Aspect)
    covariances: Mapping[str, Covariance]
    skipped: Mapping[str, str]
    samples: int
    shrunk: Mapping[str, float] = field(default_factory=dict)

    def diagnostics(self) -> Sequence[Diagnostic]:
        """Return a message if there were few rows for some layers."""
        if not self.shrunk:
            return ()
        most = max(self.shrunk.values())
        return [
            Diagnostic(
                "warning" if most > MUCH else "info",
                DiagnosticCode.FEW_SAMPLES,
                f"calibrate: {self.samples} samples are few for {len(self.shrunk)} of {len(self.covariances)} layers: "
                f"their moments were mixed with up to {most:.0%} of the identity (most for "
                f"'{max(self.shrunk, key=self.shrunk.__getitem__)}'); more samples (--calibrate) give better factors",
            )
        ]


@dataclass(frozen=True)
class SyntheticSamples(Fact):
    """Training samples that were made from the statistics of the dense network's batch norm.

    Attributes:
        file: a safetensors file with the samples ``x``, ``(count, ...)``.
        count: number of samples.
        norms: number of batch-norm layers whose statistics they match.
        shift: how far the mean of a channel is off, in standard deviations of training; median over all channels.
        spread: how far the standard deviation of a channel is off, relative to training; median over all channels.
    """

    file: Path
    count: int
    norms: int
    shift: float
    spread: float

    def diagnostics(self) -> Sequence[Diagnostic]:
        """Return a message that the samples are synthetic: a warning if they miss the statistics."""
        missed = self.shift > MISSED or self.spread > MISSED
        text = (
            f"the {self.count} training samples are synthetic: made from the statistics of {self.norms} batch-norm "
            f"layers, whose means they miss by {self.shift:.2g} standard deviations, and deviations by "
            f"{self.spread:.2g} (medians over the channels)"
        )
        text += "; that is far, and the factors may be no better than without data" if missed else ""
        return [Diagnostic("warning" if missed else "info", DiagnosticCode.SYNTHETIC, text)]


@dataclass(frozen=True)
class Baseline(Fact):
    """The dense network as an ONNX model, batch norm folded, and its measured latency.

    Attributes:
        model: the ONNX file, in fp32.
        seconds: median time of a run of ``target.batch`` samples.
        deployed: the same network in the target's precision, with ranges that only serve to measure latency; None if
            the target is fp32.
        deployed_seconds: its median time.
    """

    model: Path
    seconds: float
    deployed: Path | None = None
    deployed_seconds: float = 0.0

    def at(self, precision: Precision) -> tuple[Path, float]:
        """Return the model and its seconds in a precision: fp32, or the target's."""
        if precision == "fp32" or self.deployed is None:
            return self.model, self.seconds
        return self.deployed, self.deployed_seconds


@dataclass(frozen=True)
class Reachable(Fact):
    """The budget is within reach.

    Attributes:
        latency: measured share of the dense latency that a plan, or int8 alone, reaches; None if the prices left no
            doubt.
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


@dataclass(frozen=True)
class Probe:
    """A plan that the search for a goal built and judged.

    Attributes:
        precision: number format of its model.
        asked: share of the dense network's latency or parameters that it was chosen for.
        kept: share of the dense network's latency, as measured, or of the bytes of its weights.
        drop: loss of quality on the samples set aside, in the unit of the limit; None if an output is not finite.
        within: whether the drop is within its limit.
    """

    precision: Precision
    asked: float
    kept: float
    drop: float | None
    within: bool


@dataclass(frozen=True)
class GoalSearch(Fact):
    """The search for a goal.

    Attributes:
        goal: what was made least.
        max_drop: limit on the loss of quality, as it was given.
        limit: the same in the unit of the drops.
        samples: training samples set aside, on which the plans were judged.
        resolution: the smallest drop that they tell, in points: that of one sample; 0 if errors were compared.
        probes: the plans that were built, in order.
        head: the result as the beginning of a verdict.
        told: the result with its figures.
    """

    goal: Goal
    max_drop: str
    limit: float
    samples: int
    resolution: float
    probes: tuple[Probe, ...]
    head: str
    told: str

    def diagnostics(self) -> Sequence[Diagnostic]:
        """Return the result, and a warning if the samples are too few for the limit."""
        told = [Diagnostic("info", DiagnosticCode.GOAL, self.told)]
        if 0 < self.limit < self.resolution:
            few = (
                f"search: {self.samples} training samples judge the plans, and one of them is {self.resolution:.2g} "
                f"points: a limit of {self.limit:g} needs more training samples"
            )
            told.append(Diagnostic("warning", DiagnosticCode.FEW_SAMPLES, few))
        elif self.samples < LEAST_SELECTION:
            few = (
                f"search: {self.samples} training samples judge the plans, and the loss on others may be larger: "
                f"give at least {4 * LEAST_SELECTION} training samples"
            )
            told.append(Diagnostic("warning", DiagnosticCode.FEW_SAMPLES, few))
        return told


def input_covariance(facts: Facts, layer: str, weight: Tensor) -> Covariance:
    """Return the covariance of a layer's input, or the identity if calibration has none for the layer."""
    calibration = facts.get(Calibration)
    known = calibration.covariances.get(layer) if calibration else None
    return Identity.of(weight) if known is None else known
