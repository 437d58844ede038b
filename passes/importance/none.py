"""``none``: every layer matters the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from tdcompile.core.importance import Importance
from tdcompile.ir.program import Program, sites


@dataclass(frozen=True)
class NoImportance(Importance):
    """Every layer matters the same: selectors weigh relative errors of outputs, and nothing else."""

    name: ClassVar[str] = "none"

    def score(self, program: Program) -> Mapping[str, float]:
        """1.0 for each layer."""
        return dict.fromkeys(sites(program), 1.0)
