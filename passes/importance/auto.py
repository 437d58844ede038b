"""``auto``: Taylor if the data has classes or the network is a language model, otherwise ``none``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from tdcompile.core.importance import Importance
from tdcompile.core.registry import make
from tdcompile.data.class_scores import of_tokens
from tdcompile.ir.modules import outputs_of
from tdcompile.ir.program import Program
from tdcompile.ir.scoring import objective_of
from tdcompile.support.options import Count


@dataclass(frozen=True)
class Auto(Importance):
    """Taylor on a few labelled samples, or on a few tokens of a language model; otherwise equal scores.

    First-order Taylor ranked random plans best on ResNet-20 and ResNet-56 (``docs/results/plan-ranking.md``). An eighth
    of the calibration samples is as good as all of them on ResNet-20, and slightly worse on ResNet-56.

    A language model returns scores for every token, so that it needs no labels. Second-order Taylor then ranks plans
    best (``docs/results/language.md``): equal scores are worse than one ratio for all layers, probably because
    a few tokens of enormous norm decide the relative errors of a few layers, which then say nothing about the others.

    Attributes:
        samples: number of labelled training samples to read.
        tokens: number of tokens to read for a language model.
        batch: samples in one pass; it changes the memory use, not the score.
        largest: layers with more rows and more columns get the mean score, because their truncation takes too long.
    """

    name: ClassVar[str] = "auto"
    samples: Count = 128
    tokens: Count = 1024
    batch: Count = 8
    largest: Count = 2048

    def score(self, program: Program) -> Mapping[str, float]:
        """See ``Importance.score``. A layer without a Taylor score gets the mean.

        If the network returns anything other than class scores, all layers get the same score.
        """
        equal, taylor = make(Importance, "none").score(program), self._taylor(program)
        if taylor is None:
            return equal
        scores = make(Importance, taylor).score(program)
        known = [score for score in scores.values() if score]
        mean = sum(known) / max(len(known), 1)
        return {name: score / mean if score else equal[name] for name, score in scores.items()}

    def _taylor(self, program: Program) -> str | None:
        """Return the text form of the score to take, or None if there are no data or class scores for it."""
        train = program.task.train
        if train is None or not len(train):
            return None
        outputs, first = outputs_of(program.graph, program.inputs), train.batch([0]).inputs
        if of_tokens(first, outputs[0]):
            samples = math.ceil(self.tokens / outputs[0].shape[1])
            return f"taylor{{order=2,samples={samples},batch={self.batch},largest={self.largest}}}"
        if len(outputs) > 1 and program.task.output is None:
            return None  # a layer that only other outputs need has no gradient
        objective = objective_of(program)
        if objective is None or objective.class_axis is None or train.batch([0]).targets is None:
            return None
        return f"taylor{{order=1,samples={self.samples},batch={self.batch},largest={self.largest}}}"
