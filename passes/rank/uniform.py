"""``uniform``: give every layer the same fraction of its full rank."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from tdcompile.core.plan import Candidate, Candidates, RankPlan, Spectrum, decompositions_of, dense_of, within
from tdcompile.core.rank_selector import RankSelector
from tdcompile.errors import InputError, nearest
from tdcompile.ir.diagnostics import Reason, ReasonCode
from tdcompile.ir.target import Budget
from tdcompile.planning.allocation import first_fit, full_ranks, gainful, limits_of, load, settle

Step = tuple[float, Candidate]


@dataclass(frozen=True)
class Uniform(RankSelector):
    """Give every layer the same fraction of its full rank, the largest that meets the budget.

    At the fraction φ a layer takes the candidate of least error whose ranks are at most φ times the full ranks. If φ is
    below all candidates, it takes the smallest. If the candidate is not cheaper than dense, the layer stays dense.

    Attributes:
        form: the decomposition for every layer. ``auto`` takes for each layer the form of least error at the budget's
            share of the layer's cost. Importances are not used.
    """

    name: ClassVar[str] = "uniform"
    form: str = "auto"

    def select(self, candidates: Candidates, importances: Mapping[str, float], budget: Budget) -> RankPlan:
        """See ``RankSelector.select``.

        Raises:
            InputError: no layer has a candidate of the form.
        """
        limits = limits_of(candidates, budget)
        forms = {name: self._form(options, budget) for name, options in candidates.layers.items()}
        self._known(candidates)
        steps = {
            name: _steps(options, forms[name], candidates.spectra.get(name, {}), limits)
            for name, options in candidates.layers.items()
        }
        fractions = sorted({step[0] for rungs in steps.values() for step in rungs} | {1.0}, reverse=True)
        choices = first_fit(lambda fraction: _at(steps, fraction), fractions, candidates, limits)
        return settle(self, candidates, budget, choices, reasons=self._reasons(candidates))

    def _form(self, options: Sequence[Candidate], budget: Budget) -> str | None:
        if self.form != "auto":
            return self.form
        limits = budget.limits(dense_of(options).cost)
        positive = {field: limit for field, limit in limits.items() if limit > 0}
        saving = gainful(options, positive)
        if not saving:
            return None
        fitting = [option for option in saving if within(option.cost, limits)]
        if fitting:
            return _form_of(min(fitting, key=lambda o: (o.error, load(o.cost, positive), _form_of(o))))
        return _form_of(min(saving, key=lambda o: (load(o.cost, positive), o.error, _form_of(o))))

    def _known(self, candidates: Candidates) -> None:
        known = {_form_of(option) for options in candidates.layers.values() for option in decompositions_of(options)}
        if self.form != "auto" and known and self.form not in known:
            raise InputError(f"'{self.spec()}': no layer has a candidate of '{self.form}': {nearest(self.form, known)}")

    def _reasons(self, candidates: Candidates) -> dict[str, Reason]:
        """Return reasons for layers that the named form does not fit, although others do."""
        return {
            name: Reason(ReasonCode.OTHER_FORM, f"'{self.form}' was asked for and does not apply to this layer")
            for name, options in candidates.layers.items()
            if self.form != "auto"
            and len(options) > 1
            and all(_form_of(o) != self.form for o in decompositions_of(options))
        }


def _form_of(candidate: Candidate) -> str:
    """Return the name of the decomposition without options."""
    return candidate.decomposition.name


def _steps(
    options: Sequence[Candidate], form: str | None, spectra: Mapping[str, Spectrum], limits: Mapping[str, float]
) -> list[Step]:
    """Return rising fractions at which a layer's candidate changes; dense replaces one that saves nothing."""
    dense = dense_of(options)
    family = [o for o in decompositions_of(options) if _form_of(o) == form and math.isfinite(o.error)]
    if not family:
        return [(0.0, dense)]
    full = full_ranks(family, spectra)
    saving = set(gainful(options, limits))
    best, steps = math.inf, []
    for fraction, option in sorted(
        ((max((r / f for r, f in zip(o.ranks, full, strict=True)), default=1.0), o) for o in family),
        key=lambda step: (step[0], step[1].error, step[1].ranks),
    ):
        if option.error < best:
            best = option.error
            steps.append((fraction, option if option in saving else dense))
    return steps


def _at(steps: Mapping[str, Sequence[Step]], fraction: float) -> dict[str, Candidate]:
    return {
        name: rungs[max(bisect_right(rungs, fraction, key=lambda step: step[0]), 1) - 1][1]
        for name, rungs in steps.items()
    }
