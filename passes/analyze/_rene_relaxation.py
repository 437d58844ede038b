"""``Relaxed``: a layer's rank as a softmax over candidates, each with factors of its own (RENE, arXiv 2409.03555)."""

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
    """Candidate ranks from ``low`` to ``high``, ``step`` apart, both ends among them."""

    low: int
    high: int
    step: int

    def ranks(self) -> list[int]:
        """Rising, without duplicates.

        >>> Interval(10, 35, 10).ranks()
        [10, 20, 30, 35]
        """
        return sorted({*range(self.low, self.high + 1, self.step), self.high})

    def around(self, rank: int, factor: int, most: int, reach: float = 0.5) -> Interval | None:
        """The finer interval, a share of a step to either side and within 1 and ``most``; None once the step is 1.

        With the paper's half a step, ranks between a candidate that is too small and the middle to the next are out of
        reach; with a whole step they are not.

        >>> Interval(100, 800, 100).around(200, 10, 800)
        Interval(low=150, high=250, step=10)
        >>> Interval(235, 245, 1).around(240, 10, 800)
        """
        if self.step <= 1:
            return None
        aside = max(int(self.step * reach), 1)
        return Interval(max(rank - aside, 1), min(rank + aside, most), max(self.step // factor, 1))


class Relaxed(nn.Module):
    """One layer whose weight is the mixture Σ_r p_r W^(r), p the softmax of coefficients that start at zero.

    Args:
        site: the layer.
        form: the decomposition; ``tie`` gives its ranks for one number.
        candidates: rising; ``WHOLE``, the last if at all, is the weight itself.
        shares: what each candidate costs, as a share of the dense layer or of the largest rank.
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
        """p, ``(candidates,)``.

        Raises:
            TdcompileError: a coefficient is not finite: the search has diverged.
        """
        if not bool(torch.isfinite(self.coefficients).all()):
            raise TdcompileError(
                f"the rank search of '{self.site.name}' diverged: its coefficients are not finite; lower the rates"
            )
        return self.coefficients.softmax(0)

    def branches(self) -> list[Tensor]:
        """W^(r) of every candidate, of the weight's shape."""
        each = ([*factors.parameters()] for factors in self.factors)
        made = [self.form.reconstruct(self.site.layer, factors).float() for factors in each]
        return made if len(made) == len(self.candidates) else [*made, self.site.weight.float()]

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """The mixed weight, its squared relative error, and that of its branches, Σ_r p_r ‖W − W^(r)‖² / ‖W‖².

        The last is what is left once one branch alone stays.
        """
        gates, branches = self.gates, torch.stack(self.branches())
        weight = self.site.weight.float()
        mixed = torch.tensordot(gates, branches, 1)
        each = (weight - branches).square().flatten(1).sum(1)
        return mixed, (weight - mixed).square().sum() / self.energy, (gates * each).sum() / self.energy

    def share(self) -> Tensor:
        """The expected cost, Σ_r p_r · share_r."""
        return (self.gates * self.shares).sum()

    def chosen(self) -> int:
        """The candidate with the largest coefficient; of equal ones the first."""
        return self.candidates[int(self.gates.argmax())]

    def middle(self) -> int:
        """The rank that a finer interval is to be around: the chosen one, or that which costs as much as the mixture.

        The latter where the layer is best dense: were it so for good before the others are done, their mixtures, which
        keep to a budget together with this one, would have less left than they share now.
        """
        if self.chosen() != WHOLE or self.candidates == [WHOLE]:
            return self.chosen()
        aside = (self.shares - self.share().detach()).abs()
        return self.candidates[int(aside[:-1].argmin())]


def rank_loss(shares: Sequence[Tensor], gamma: float, beta: float) -> Tensor:
    """γ · Σ_i (Σ_r p_r · share_r)^β (the paper's equation 5 where a share is r / max R)."""
    return gamma * torch.stack([share.clamp_min(1e-12) ** beta for share in shares]).sum()


def intervals(most: int, step: int) -> Interval:
    """The first interval of a layer: from one step, or half of what there is, to the largest rank."""
    step = max(1, min(step, math.ceil(most / 2)))
    return Interval(min(step, most), most, step)
