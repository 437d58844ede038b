"""``Relaxed``: the rank of a layer as a softmax over candidates with their own factors (RENE, arXiv 2409.03555)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tdcompile.core.decomposition import Decomposition
from tdcompile.errors import TdcompileError
from tdcompile.ir.layer import Ranks
from tdcompile.ir.program import Site
from tdcompile.numerics.covariance import Identity
from tdcompile.passes.analyze._rene_ranks import WHOLE


@dataclass(frozen=True)
class Interval:
    """Candidate ranks from ``low`` to ``high``, ``step`` apart, including both ends."""

    low: int
    high: int
    step: int

    def ranks(self) -> list[int]:
        """Return the ranks, rising, without duplicates.

        >>> Interval(10, 35, 10).ranks()
        [10, 20, 30, 35]
        """
        return sorted({*range(self.low, self.high + 1, self.step), self.high})

    def around(self, rank: int, factor: int, most: int, reach: float = 0.5) -> Interval | None:
        """Return a finer interval of ``reach`` steps to either side, within 1 and ``most``; None if the step is 1.

        The paper's half a step never reaches ranks beyond the middle between two candidates; a whole step does.

        >>> Interval(100, 800, 100).around(200, 10, 800)
        Interval(low=150, high=250, step=10)
        >>> Interval(235, 245, 1).around(240, 10, 800)
        """
        if self.step <= 1:
            return None
        aside = max(int(self.step * reach), 1)
        return Interval(max(rank - aside, 1), min(rank + aside, most), max(self.step // factor, 1))


class Relaxed(nn.Module):
    """A layer with the weight Σ_r p_r W^(r); p is the softmax of coefficients that start at zero.

    Args:
        site: the layer.
        form: the decomposition.
        tie: returns its ranks for one number.
        candidates: rising ranks; ``WHOLE``, if present, is the last and stands for the weight itself.
        shares: the cost of each candidate as a share of the dense layer, or of the largest rank.
    """

    def __init__(
        self,
        site: Site,
        form: Decomposition,
        tie: Callable[[int], Ranks],
        candidates: Sequence[int],
        shares: Sequence[float],
    ) -> None:
        super().__init__()
        self.site, self.form, self.candidates = site, form, list(candidates)
        self.coefficients = nn.Parameter(torch.zeros(len(candidates)))
        plain = Identity.of(site.weight)
        self.factors = nn.ModuleList(
            nn.ParameterList(
                nn.Parameter(factor.float()) for factor in form.factorize(site.layer, site.weight, tie(rank), plain)
            )
            for rank in candidates
            if rank != WHOLE
        )
        self.shares = torch.tensor(shares)
        self.energy = site.weight.float().square().sum().clamp_min(1e-30)

    @property
    def gates(self) -> Tensor:
        """The probabilities p, ``(candidates,)``.

        Raises:
            TdcompileError: a coefficient is not finite: the search has diverged.
        """
        if not bool(torch.isfinite(self.coefficients).all()):
            raise TdcompileError(
                f"the rank search of '{self.site.name}' diverged: its coefficients are not finite; lower the rates"
            )
        return self.coefficients.softmax(0)

    def branches(self) -> list[Tensor]:
        """Return W^(r) of every candidate, in the shape of the weight."""
        each = ([*factors.parameters()] for factors in self.factors)
        made = [self.form.reconstruct(self.site.layer, factors).float() for factors in each]
        return made if len(made) == len(self.candidates) else [*made, self.site.weight.float()]

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mixed weight, its squared relative error, and Σ_r p_r ‖W − W^(r)‖² / ‖W‖².

        The last is the expected error when a single branch remains.
        """
        gates, branches = self.gates, torch.stack(self.branches())
        weight = self.site.weight.float()
        mixed = torch.tensordot(gates, branches, 1)
        each = (weight - branches).square().flatten(1).sum(1)
        return mixed, (weight - mixed).square().sum() / self.energy, (gates * each).sum() / self.energy

    def share(self) -> Tensor:
        """Return the expected cost, Σ_r p_r · share_r."""
        return (self.gates * self.shares).sum()

    def chosen(self) -> int:
        """Return the candidate with the largest coefficient; the first of equal ones."""
        return self.candidates[int(self.gates.argmax())]

    def middle(self) -> int:
        """Return the centre of the finer interval: the chosen rank, or the one that costs as much as the mixture.

        The latter applies if dense is chosen. Making the layer dense at once would take budget from the mixtures of
        the other layers, which share it.
        """
        if self.chosen() != WHOLE or self.candidates == [WHOLE]:
            return self.chosen()
        aside = (self.shares - self.share().detach()).abs()
        return self.candidates[int(aside[:-1].argmin())]


def rank_loss(shares: Sequence[Tensor], gamma: float, beta: float) -> Tensor:
    """Return γ · Σ_i (Σ_r p_r · share_r)^β: equation 5 of the paper if a share is r / max R."""
    return gamma * torch.stack([share.clamp_min(1e-12) ** beta for share in shares]).sum()


def intervals(most: int, step: int) -> Interval:
    """Return the first interval of a layer: from one step, at most half of the largest rank, to the largest rank."""
    step = max(1, min(step, math.ceil(most / 2)))
    return Interval(min(step, most), most, step)
