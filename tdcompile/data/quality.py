"""How far the outputs of a compiled network are from those of the dense network, without labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tdcompile.data.class_scores import classified

# Dense outputs that vary over the samples by less than this share of their size are constant: errors are then relative
# to the size.
_CONSTANT = 1e-6


@dataclass(frozen=True)
class OutputQuality:
    """One output of the compiled network against the same output of the dense network, over all samples.

    Attributes:
        relative_error: root of the sum of squared differences over the sum of squared deviations of the dense output
            from its mean over the samples: 0 for equal outputs, 1 for a network that always answers with the mean.
        cosine: mean over the samples of the cosine between the two outputs.
        agreement: share of samples whose largest class score is at the same class; None if they are not class scores.
        divergence: mean KL divergence of the softmax of the class scores from the dense network's, in nats.
    """

    relative_error: float
    cosine: float
    agreement: float | None = None
    divergence: float | None = None


@dataclass
class OutputComparison:
    """Running sums over batches of one output of both networks, in float64."""

    samples: int = 0
    difference: float = 0.0
    energy: float = 0.0
    total: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    cosine: float = 0.0
    agreeing: int | None = None
    divergence: float = 0.0

    def add(self, dense: Tensor, compiled: Tensor) -> None:
        """Add the outputs of one batch, each ``(N, ...)``; integers and booleans count as numbers."""
        a, b = (x.detach().cpu().double().reshape(len(x), -1) for x in (dense, compiled))
        self.samples += len(a)
        self.difference += float((a - b).square().sum())
        self.energy += float(a.square().sum())
        self.total = self.total + a.sum(0)
        self.cosine += float(torch.cosine_similarity(a, b, dim=1).sum())
        if classified(dense):
            self.agreeing = (self.agreeing or 0) + int((a.argmax(1) == b.argmax(1)).sum())
            ours, theirs = _log_probabilities(b), _log_probabilities(a)
            self.divergence += float((theirs.exp() * (theirs - ours)).sum())

    def result(self) -> OutputQuality:
        """Return the figures of all batches; they are NaN if an output holds NaN or Inf."""
        spread = self.energy - float(self.total.square().sum()) / self.samples
        scale = spread if self.samples > 1 and spread > _CONSTANT * self.energy else self.energy
        error = math.sqrt(self.difference / scale) if scale > 0 else 0.0 if self.difference == 0 else math.inf
        if self.agreeing is None:
            return OutputQuality(error, self.cosine / self.samples)
        return OutputQuality(
            error, self.cosine / self.samples, self.agreeing / self.samples, self.divergence / self.samples
        )


def _log_probabilities(scores: Tensor) -> Tensor:
    """Return log-probabilities of ``(N, classes)``: of the scores themselves if they are probabilities already."""
    if bool((scores >= 0).all()) and torch.allclose(scores.sum(1), torch.ones(len(scores), dtype=scores.dtype)):
        return scores.clamp_min(1e-12).log()
    return scores.log_softmax(1)


def comparable(output: Tensor) -> bool:
    """Return whether an output has a real value for each sample."""
    return bool(output.ndim and output.numel() and not output.is_complex())


def compare_outputs(
    comparisons: Sequence[OutputComparison], dense: Sequence[Tensor], compiled: Sequence[Tensor]
) -> None:
    """Add one batch of all outputs of both networks; complex and empty outputs are left out."""
    for comparison, a, b in zip(comparisons, dense, compiled, strict=True):
        if comparable(a):
            comparison.add(a, b)
