"""``none``: every layer has the same score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from tdcompile.core.importance import Importance
from tdcompile.ir.program import Program, sites


@dataclass(frozen=True)
class NoImportance(Importance):
    """The same score for every layer: selectors weigh relative errors alone."""

    name: ClassVar[str] = "none"

    def score(self, program: Program) -> Mapping[str, float]:
        """Return 1.0 for each layer."""
        return dict.fromkeys(sites(program), 1.0)
