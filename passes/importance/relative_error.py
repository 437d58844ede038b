"""``relative-error``: protect layers that are hard to compress; needs no data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tdcompile.core.importance import Importance, normalised
from tdcompile.errors import InputError
from tdcompile.ir.program import Program, sites

_COLUMNS = 4096  # columns converted to float64 at a time, so that memory never holds a large layer twice
_LEAST = 0.01  # lower bound of a score, as a share of the mean: no layer is free to compress


@dataclass(frozen=True)
class RelativeError(Importance):
    """The relative error of each layer's weight at half its full rank: layers hard to compress are protected.

    Of six error measures the relative error of the weight ranks compressed networks best before tuning (arXiv
    2305.05318). Candidates already hold this error for their ranks; the score adds a factor that does not depend on the
    choice of ranks: ‖W − W_{r/2}‖_F / ‖W‖_F with W as T x C·K, of full rank r. Mean 1 over the layers.
    """

    name: ClassVar[str] = "relative-error"

    def score(self, program: Program) -> Mapping[str, float]:
        """See ``Importance.score``.

        Raises:
            InputError: a weight holds NaN or Inf.
        """
        errors = {name: _at_half_rank(name, site.weight) for name, site in sites(program).items()}
        mean = sum(errors.values()) / max(len(errors), 1)
        return normalised({name: max(error, _LEAST * mean) for name, error in errors.items()})


def _at_half_rank(name: str, weight: Tensor) -> float:
    flat = weight.flatten(1)
    if flat.shape[0] > flat.shape[1]:
        flat = flat.T
    if not torch.isfinite(flat).all():
        raise InputError(f"the weight of '{name}' holds NaN or Inf")
    gram = torch.zeros(flat.shape[0], flat.shape[0], dtype=torch.float64, device=flat.device)
    for start in range(0, flat.shape[1], _COLUMNS):
        part = flat[:, start : start + _COLUMNS].double()
        gram += part @ part.T
    energies = torch.linalg.eigvalsh(gram).clamp(min=0)  # ascending
    kept = max(1, len(energies) // 2)
    whole = float(energies.sum())
    return math.sqrt(float(energies[: len(energies) - kept].sum()) / whole) if whole > 0 else 0.0
