"""``auto``: the score that ranked plans best, where the data have the labels it needs; ``none`` where they do not."""

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
    """First-order Taylor on a few labelled samples; without labels every layer matters the same.

    Of the scores measured here first-order Taylor agreed best with the accuracy of random plans, on ResNet-20 and on
    ResNet-56 (``docs/results.md``); an eighth of the calibration samples serves as well as all of them on the first,
    a little less well on the second.

    Attributes:
        samples: how many training samples are read.
        batch: samples in one pass; memory grows with it, the score does not change.
        largest: layers of more rows and columns count as the mean: taking them apart once more takes too long.
    """

    name: ClassVar[str] = "auto"
    samples: Count = 128
    batch: Count = 8
    largest: int = 2048

    def score(self, program: Program) -> Mapping[str, float]:
        """See ``Importance.score``; a layer of which Taylor says nothing counts as the mean.

        So do all layers of a network that returns anything but class scores alone: labels say nothing of the rest.
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
