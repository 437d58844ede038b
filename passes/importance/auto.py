"""``auto``: the score that ranked plans best, where the data have the labels it needs; ``none`` where they do not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from tdcompile.errors import InputError
from tdcompile.importance import Importance
from tdcompile.program import Program
from tdcompile.registry import make


@dataclass(frozen=True)
class Auto(Importance):
    """First-order Taylor on a few labelled samples; without labels every layer matters the same.

    Of all scores here its predictions agreed best with the accuracy of random plans, on ResNet-20 and ResNet-56 alike
    (``docs/results.md``), and a tenth of the calibration samples serves as well as all of them.

    Attributes:
        samples: how many training samples are read.
        batch: samples in one pass; memory grows with it, the score does not change.
    """

    name: ClassVar[str] = "auto"
    samples: int = 128
    batch: int = 8

    def __post_init__(self) -> None:
        """Raises InputError where an option is out of its range."""
        if self.samples < 1 or self.batch < 1:
            raise InputError(f"'{self.spec()}': samples and batch are at least 1")

    def score(self, program: Program) -> Mapping[str, float]:
        """See ``Importance.score``."""
        train = program.task.train
        if train is None or not len(train) or not train.classes:
            return make(Importance, "none").score(program)
        return make(Importance, f"taylor{{order=1,samples={self.samples},batch={self.batch}}}").score(program)
