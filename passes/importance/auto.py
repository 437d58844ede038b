"""``auto``: first-order Taylor if the data has labels, otherwise ``none``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from tdcompile.core.importance import Importance
from tdcompile.core.registry import make
from tdcompile.ir.modules import outputs_of
from tdcompile.ir.program import Program
from tdcompile.support.options import Count


@dataclass(frozen=True)
class Auto(Importance):
    """First-order Taylor on a few labelled samples; without labels every layer has the same score.

    First-order Taylor ranked random plans best on ResNet-20 and ResNet-56 (``docs/results/plan-ranking.md``). An eighth
    of the calibration samples is as good as all of them on ResNet-20, and slightly worse on ResNet-56.

    Attributes:
        samples: number of training samples to read.
        batch: samples in one pass; it changes the memory use, not the score.
        largest: layers with more rows and more columns get the mean score, because their truncation takes too long.
    """

    name: ClassVar[str] = "auto"
    samples: Count = 128
    batch: Count = 8
    largest: Count = 2048

    def score(self, program: Program) -> Mapping[str, float]:
        """See ``Importance.score``. A layer without a Taylor score gets the mean.

        If the network returns anything other than class scores, all layers get the same score.
        """
        train = program.task.train
        equal = make(Importance, "none").score(program)
        if train is None or not len(train) or not train.classes:
            return equal
        outputs = outputs_of(program.graph, program.inputs)
        if len(outputs) > 1 or outputs[0].dim() != 2:
            return equal
        scores = make(Importance, self._taylor()).score(program)
        known = [score for score in scores.values() if score]
        mean = sum(known) / max(len(known), 1)
        return {name: score / mean if score else equal[name] for name, score in scores.items()}

    def _taylor(self) -> str:
        return f"taylor{{order=1,samples={self.samples},batch={self.batch},largest={self.largest}}}"
