"""``probe``: the loss of the network if one layer alone is compressed; expensive, the reference for cheaper scores."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tdcompile.core.importance import Importance, normalised
from tdcompile.data.task import Batch
from tdcompile.errors import InputError
from tdcompile.ir.program import Program, sites
from tdcompile.passes.importance._divergence import answers, divergence, drawn
from tdcompile.passes.importance._trial import FORMS, trials
from tdcompile.support.options import Count, Share
from tdcompile.support.progress import report_progress

log = logging.getLogger("tdcompile")


@dataclass(frozen=True)
class Probe(Importance):
    """Loss of the network with one layer compressed, for each unit of that layer's squared relative error.

    Attributes:
        share: share of the layer's weights that are kept.
        measure: ``kl`` of the dense outputs from the compressed ones, or lost ``accuracy``, which needs labels.
        samples: number of training samples, read once for each layer and once for the dense network.
        forms: decompositions; a layer takes the first that applies, and scores 0 if none does.
    """

    name: ClassVar[str] = "probe"
    share: Share = 0.5
    measure: Literal["kl", "accuracy"] = "kl"
    samples: Count = 512
    forms: tuple[str, ...] = FORMS

    @torch.no_grad()
    def score(self, program: Program) -> Mapping[str, float]:
        """See ``Importance.score``."""
        batches = drawn(program, self.samples, self.name, "the importance 'probe'")
        if self.measure == "accuracy" and any(batch.labels is None for batch in batches):
            raise InputError("'probe{measure=accuracy}' needs labels: give labelled data, or take measure=kl")
        wanted, tried = answers(program.graph, batches), trials(program, self.share, self.forms)
        scores = dict.fromkeys(sites(program), 0.0)
        for done, (name, trial) in enumerate(tried.items(), start=1):
            with trial.applied():
                given = answers(program.graph, batches)
            if self.measure == "kl":
                lost = divergence(wanted, given)
            else:
                lost = max(_right(wanted, batches) - _right(given, batches), 0.0)
            scores[name] = lost / max(trial.error**2, 1e-12)
            report_progress(done, len(tried), name)
        log.info("probe: %d forward passes over %d samples", len(tried) + 1, sum(len(b.inputs[0]) for b in batches))
        return normalised(scores)


def _right(scores: list[Tensor], batches: list[Batch]) -> float:
    """Return the accuracy in [0, 1]."""
    right, count = 0, 0
    for given, batch in zip(scores, batches, strict=True):
        assert batch.labels is not None  # ``score`` checks it
        right += int((given.argmax(1) == batch.labels).sum())
        count += len(given)
    return right / count
