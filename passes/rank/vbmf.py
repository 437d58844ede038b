"""``vbmf``: estimate ranks by empirical variational Bayes (Nakajima et al. 2013, Kim et al. 2016)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from tdcompile.core.decomposition import Decomposition
from tdcompile.core.plan import Candidate, Candidates, RankPlan, Spectrum, decompositions_of, dense_of
from tdcompile.core.rank_selector import RankSelector
from tdcompile.ir.diagnostics import Reason, ReasonCode
from tdcompile.ir.target import Budget
from tdcompile.planning.allocation import first_fit, full_ranks, gainful, limits_of, load, settle
from tdcompile.support.options import Count, Share

_STEPS = 64  # number of weakening factors to try

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class VBMF(RankSelector):
    """Estimate ranks by empirical variational Bayes of each layer's channel unfoldings; the budget may lower them.

    Each rank becomes r_max - w (r_max - r_vbmf), at least ``floor``, rounded up to a candidate. A rank that truncates
    neither unfolding takes the larger fraction of the two. A form with only such ranks is used if a layer has no other.
    Importances are not used.

    Attributes:
        weaken: w. 1 is the estimate itself, which is far too low for networks with batch norm. If the plan misses the
            budget, w rises towards 1: start at 0.02 for the mildest plan within the budget.
        floor: the least rank. A layer whose full rank is not above it stays dense, because the estimate is least
            reliable for narrow layers; musco (Gusak et al. 2019, arXiv 1903.09973) uses 21.
    """

    name: ClassVar[str] = "vbmf"
    needs_spectra: ClassVar[bool] = True
    weaken: Share = 1.0
    floor: Count = 1

    def select(self, candidates: Candidates, importances: Mapping[str, float], budget: Budget) -> RankPlan:
        """See ``RankSelector.select``."""
        limits = limits_of(candidates, budget)
        estimates = {
            name: {mode: max(1, evbmf_rank(s.values, s.rows, s.columns)) for mode, s in spectra.items()}
            for name, spectra in candidates.spectra.items()
        }
        reasons = self._reasons(candidates)
        factors = [w for w in (step / _STEPS for step in range(1, _STEPS + 1)) if w > self.weaken]

        def plan(w: float) -> dict[str, Candidate]:
            return {
                name: dense_of(options)
                if name in reasons or len(options) == 1
                else _choose(options, candidates.spectra[name], estimates[name], w, self.floor, limits)
                for name, options in candidates.layers.items()
            }

        choices = first_fit(plan, [self.weaken, *factors], candidates, limits)
        return settle(self, candidates, budget, choices, reasons=reasons)

    def _reasons(self, candidates: Candidates) -> dict[str, Reason]:
        """Return why some layers with candidates are skipped."""
        reasons = {}
        for name in (name for name, options in candidates.layers.items() if len(options) > 1):
            spectra = candidates.spectra.get(name)
            if not spectra:
                blind = "the singular values of this layer's unfoldings are not known"
                reasons[name] = Reason(ReasonCode.NO_SPECTRUM, blind)
            elif (full := min(map(_full, spectra.values()))) <= self.floor > 1:
                narrow = f"its full rank, {full}, is not above the floor of vbmf, {self.floor}"
                reasons[name] = Reason(ReasonCode.NARROW, narrow)
        return reasons


def _choose(
    options: Sequence[Candidate],
    spectra: Mapping[str, Spectrum],
    estimates: Mapping[str, int],
    w: float,
    floor: int,
    limits: Mapping[str, float],
) -> Candidate:
    """Return the cheapest candidate with no rank below its weakened estimate; dense if none is cheaper."""
    full = {mode: _full(spectrum) for mode, spectrum in spectra.items()}
    ranks = {mode: max(floor, int(full[mode] - w * (full[mode] - estimate))) for mode, estimate in estimates.items()}
    fraction = max(ranks[mode] / full[mode] for mode in ranks)
    families: dict[Decomposition, list[Candidate]] = {}
    for option in decompositions_of(options):
        families.setdefault(option.decomposition, []).append(option)
    seen = {form for form, family in families.items() if any(mode in ranks for mode in family[0].modes)}
    lowest = {
        form: [
            ranks.get(mode, math.ceil(fraction * largest))
            for mode, largest in zip(
                family[0].modes or ("",) * len(family[0].ranks), full_ranks(family, spectra), strict=True
            )
        ]
        for form, family in families.items()
        if form in seen or not seen
    }
    fitting = [
        option
        for option in gainful(options, limits)
        if option.decomposition in lowest
        and all(rank >= least for rank, least in zip(option.ranks, lowest[option.decomposition], strict=True))
    ]
    return min(fitting, key=lambda o: (load(o.cost, limits), o.error, o.form, o.ranks), default=dense_of(options))


def _full(spectrum: Spectrum) -> int:
    return min(spectrum.rows, spectrum.columns)


def evbmf_rank(values: Sequence[float], rows: int, columns: int) -> int:
    """Return the rank by empirical variational Bayes matrix factorisation; 0 if everything is noise.

    With sides L <= M, α = L/M and noise variance σ², a singular value s survives if s² > M σ² x̄,
    x̄ = (1 + τ̄)(1 + α/τ̄), τ̄ = 2.5129 √α. σ² minimises the free energy (Nakajima et al., JMLR 14, 2013, Theorem 2 and
    Corollary 2). The search is over log σ², because variances of weights are below an absolute tolerance. It starts at
    the best point of a grid, because the free energy has a kink wherever a value crosses the threshold.

    Args:
        values: the singular values; missing ones count as zero.
        rows: number of rows of the matrix.
        columns: number of columns.
    """
    L, M = sorted((rows, columns))
    alpha = L / M
    tau_bar = 2.5129 * math.sqrt(alpha)
    x_bar = (1 + tau_bar) * (1 + alpha / tau_bar)
    squares = np.zeros(L)
    given = np.sort(np.square(np.asarray(values, dtype=np.float64)))[::-1][:L]
    squares[: len(given)] = given
    if squares[0] == 0:
        return 0
    squares[squares < squares[0] * np.finfo(np.float64).eps ** 2] = 0
    high = squares.sum() / (L * M)
    tail = squares[max(math.ceil(L / (1 + alpha)) - 1, 0) :]
    low = max(tail[0] / (M * x_bar), tail.mean() / M, high * np.finfo(np.float64).eps)
    variance = _noise(squares[squares > 0], L, M, x_bar, min(low, high), high)
    return int((squares > M * variance * x_bar).sum())


def _noise(squares: Floats, L: int, M: int, x_bar: float, low: float, high: float) -> float:
    """Return the σ² in [low, high] of least free energy; a zero singular value adds ln σ² to it."""
    alpha = L / M

    def free_energy(log_variance: float) -> float:
        x = squares / (M * math.exp(log_variance))
        noise, signal = x[x <= x_bar], x[x > x_bar]
        middle = signal - (1 + alpha)
        tau = (middle + np.sqrt(middle**2 - 4 * alpha)) / 2
        kept = signal - tau + np.log((tau + 1) / signal) + alpha * np.log(tau / alpha + 1)
        return float((noise - np.log(noise)).sum() + kept.sum() + (L - len(squares)) * log_variance)

    points = np.linspace(math.log(low), math.log(high), 65)
    best = int(np.argmin([free_energy(point) for point in points]))
    bounds = points[max(best - 1, 0)], points[min(best + 1, len(points) - 1)]
    if bounds[0] >= bounds[1]:
        return high
    found = minimize_scalar(free_energy, bounds=bounds, method="bounded", options={"xatol": 1e-9})
    return math.exp(found.x if found.fun <= free_energy(points[best]) else points[best])
