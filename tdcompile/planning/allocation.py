"""Helpers of rank selectors: limits, searches along a path of plans, and the finished plan with its reasons."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence

from tdcompile.core.plan import Candidate, Candidates, RankPlan, Spectrum, decompositions_of, dense_of, within
from tdcompile.core.rank_selector import RankSelector
from tdcompile.errors import BudgetError, InputError
from tdcompile.ir.diagnostics import Reason, ReasonCode
from tdcompile.ir.target import LIMITED, Budget, Cost

Choices = Mapping[str, Candidate]
_WORD = {field: name for name, field in LIMITED.items()}
_LEAST_SIGNAL = 0.02  # keeps the loss of an error of 1 finite, and a solver's numbers within a few powers of ten
# Loss of a relative error e of a layer's output: noise over the remaining signal, e squared, or e.
LOSSES: Mapping[str, Callable[[float], float]] = {
    "noise": lambda error: error**2 / max(1.0 - error**2, _LEAST_SIGNAL),
    "squared": lambda error: error**2,
    "linear": lambda error: error,
}


def limits_of(candidates: Candidates, budget: Budget) -> dict[str, float]:
    """Return the upper limit of each limited field of ``Cost`` for the whole network.

    Raises:
        InputError: the dense network costs nothing in a limited field, so a share of it limits nothing.
    """
    limits = budget.limits(candidates.whole)
    for field in limits:
        if getattr(candidates.whole, field) <= 0:
            raise InputError(
                f"a budget of {_WORD[field]} needs a cost model that gives {field}, and this one gives 0 for the dense "
                f"network: use another cost model, or limit something else than {_WORD[field]}"
            )
    return limits


def keeps_counts(plan: RankPlan, budget: Budget) -> bool:
    """Return whether a plan keeps the limits on parameters and multiply-accumulates; seconds are measured elsewhere."""
    limits = budget.limits(plan.dense)
    return within(plan.predicted, {field: limit for field, limit in limits.items() if field != LIMITED["latency"]})


def load(cost: Cost, limits: Mapping[str, float]) -> float:
    """Return the share of the limits that a cost takes, summed over the limited fields; cheaper means a lower sum."""
    return sum(float(getattr(cost, field)) / limit for field, limit in limits.items())


def gainful(options: Sequence[Candidate], limits: Mapping[str, float]) -> list[Candidate]:
    """Return the candidates of finite error that cost less than dense in a limited field and no more in the others."""
    dense = dense_of(options).cost

    def saves(cost: Cost) -> bool:
        pairs = [(getattr(cost, field), getattr(dense, field)) for field in limits]
        return all(new <= old for new, old in pairs) and any(new < old for new, old in pairs)

    return [o for o in decompositions_of(options) if math.isfinite(o.error) and saves(o.cost)]


def ladder(options: Sequence[Candidate], limits: Mapping[str, float]) -> list[Candidate]:
    """Return the dense candidate, then cheaper and cheaper ones at larger and larger errors."""
    dense = dense_of(options)
    rungs, lowest = [dense], load(dense.cost, limits)
    for price, option in sorted(
        ((load(option.cost, limits), option) for option in gainful(options, limits)),
        key=lambda pair: (pair[1].error, pair[0], pair[1].form, pair[1].ranks),
    ):
        if price < lowest:
            rungs.append(option)
            lowest = price
    return rungs


def within_error(ladders: Mapping[str, Sequence[Candidate]], error: float) -> dict[str, Candidate]:
    """Return for each layer the cheapest candidate of at most this relative error; dense if there is none."""
    return {
        name: rungs[max(bisect_right(rungs, error, key=lambda rung: rung.error), 1) - 1]
        for name, rungs in ladders.items()
    }


def first_fit(
    plan: Callable[[float], Choices], levels: Sequence[float], candidates: Candidates, limits: Mapping[str, float]
) -> Choices:
    """Return the plan of the first level within the limits, by bisection; otherwise the plan of the last level.

    Args:
        plan: returns the choices at a level.
        levels: from the mildest plan to the strongest; each costs no more than the one before it. Under several
            limits only their sum is sure to fall, so every level is tried if the last one fails.
        candidates: price the choices.
        limits: upper limits by field of ``Cost``.
    """

    def fits(level: float) -> bool:
        return within(candidates.cost(plan(level)), limits)

    if len(limits) > 1 and not fits(levels[-1]):
        return plan(next(filter(fits, levels), levels[-1]))
    place = bisect_left(levels, True, hi=len(levels) - 1, key=fits)
    return plan(levels[place])


def predicted_loss(plan: RankPlan, importances: Mapping[str, float]) -> float:
    """Return the sum over the layers of importance times noise over signal; a layer's importance is by default 1."""
    noise = LOSSES["noise"]
    return sum(importances.get(name, 1.0) * noise(choice.error) for name, choice in plan.choices.items())


def full_ranks(options: Sequence[Candidate], spectra: Mapping[str, Spectrum]) -> tuple[int, ...]:
    """Return the full rank of each unfolding that a form truncates; for other ranks the largest value among options."""
    largest = [max(ranks) for ranks in zip(*(option.ranks for option in options), strict=True)]
    modes = options[0].modes or ("",) * len(largest)
    return tuple(
        max(rank, min(spectra[mode].rows, spectra[mode].columns)) if mode in spectra else rank
        for rank, mode in zip(largest, modes, strict=True)
    )


def weighted(importances: Mapping[str, float], price: Callable[[float], float]) -> Callable[[str, Candidate], float]:
    """Return the loss function of candidates: the importance of the layer, by default 1, times the price of the error.

    Raises:
        InputError: an importance is negative or not finite.
    """
    if not all(math.isfinite(value) and value >= 0 for value in importances.values()):
        raise InputError("an importance is negative or not finite: every layer's is at least 0")
    return lambda name, option: importances.get(name, 1.0) * price(option.error)


def filled(
    choices: Choices, candidates: Candidates, loss: Callable[[str, Candidate], float], limits: Mapping[str, float]
) -> dict[str, Candidate]:
    """Return choices that use the room the limits leave: repeatedly take the step of most loss saved for its cost.

    Args:
        choices: a plan within the limits.
        candidates: price the choices.
        loss: the loss of a layer's candidate.
        limits: upper limits by field of ``Cost``.
    """
    made, cost = dict(choices), candidates.cost(choices)

    def best(name: str) -> tuple[float, str, int] | None:
        here, paid = loss(name, made[name]), load(made[name].cost, limits)
        steps = [
            ((loss(name, option) - here) / max(load(option.cost, limits) - paid, 1e-15), name, place)
            for place, option in enumerate(candidates.layers[name])
            if math.isfinite(option.error)
            and loss(name, option) < here
            and within(cost - made[name].cost + option.cost, limits)
        ]
        return min(steps, default=None)

    steps = [step for step in map(best, made) if step]
    heapq.heapify(steps)
    while steps:
        _, name, place = heapq.heappop(steps)
        option = candidates.layers[name][place]
        if loss(name, option) < loss(name, made[name]) and within(cost - made[name].cost + option.cost, limits):
            cost, made[name] = cost - made[name].cost + option.cost, option
        following = best(name)
        if following:
            heapq.heappush(steps, following)
    return made


def settle(
    selector: RankSelector,
    candidates: Candidates,
    budget: Budget,
    choices: Choices,
    gap: float | None = None,
    reasons: Mapping[str, Reason] | None = None,
) -> RankPlan:
    """Return the finished plan with its cost, and a reason for every dense layer.

    Args:
        selector: the selector that made the choices.
        candidates: all candidates.
        budget: the budget to meet.
        choices: a candidate for every layer.
        gap: the relative optimality gap, if one was proved.
        reasons: reasons that only the selector knows.

    Raises:
        BudgetError: the plan misses the budget; the message states what it reaches and what is reachable.
    """
    limits = limits_of(candidates, budget)
    predicted, dense = candidates.cost(choices), candidates.whole
    if not within(predicted, limits):
        raise BudgetError(_miss(selector, candidates, budget, predicted))
    known = {**candidates.reasons, **(reasons or {})}
    left = [name for name, options in candidates.layers.items() if choices[name] == dense_of(options)]
    why = {name: known.get(name) or _reason(candidates.layers[name], limits) for name in left}
    ordered = {name: choices[name] for name in candidates.layers}
    return RankPlan(
        ordered,
        predicted,
        dense,
        selector=str(selector.spec()),
        gap=gap,
        reasons=why,
        precision=candidates.precision,
    )


def label(candidate: Candidate) -> str:
    """Return a candidate as text for messages.

    >>> from tdcompile.core.decomposition import Decomposition
    >>> from tdcompile.core.registry import make
    >>> label(Candidate(make(Decomposition, "tucker2"), (64, 32)))
    'tucker2{64,32}'
    """
    ranks = ",".join(map(str, candidate.ranks))
    return f"{candidate.form}{{{ranks}}}" if ranks else candidate.form


def _reason(options: Sequence[Candidate], limits: Mapping[str, float]) -> Reason:
    if len(options) == 1:
        return Reason(ReasonCode.NOT_CHEAPER, "no candidate for this layer is cheaper than dense")
    dense, saving = dense_of(options), gainful(options, limits)
    cheapest = min(saving or decompositions_of(options), key=lambda option: (load(option.cost, limits), option.error))
    field = max(limits, key=lambda f: getattr(dense.cost, f) - getattr(cheapest.cost, f))
    before, after = (getattr(option.cost, field) for option in (dense, cheapest))
    share = after / before if before else math.inf
    if not saving:
        sentence = f"no form is cheaper than dense here: {label(cheapest)} costs {share:.3g} times its {_WORD[field]}"
        return Reason(ReasonCode.NOT_CHEAPER, sentence)
    return Reason(
        ReasonCode.DENSE_IS_BEST,
        f"dense is best here under the budget: the cheapest alternative {label(cheapest)} "
        f"saves {1 - share:.3g} of its {_WORD[field]} at error {cheapest.error:.3g}",
    )


def _miss(selector: RankSelector, candidates: Candidates, budget: Budget, reached: Cost) -> str:
    dense, lowest = candidates.whole, lowest_shares(candidates, budget)
    closest = {name: getattr(reached, LIMITED[name]) / getattr(dense, LIMITED[name]) for name in budget.shares}
    if (sentence := out_of_reach(lowest, budget)) is not None:
        if lowest.get("latency", 0.0) >= 1.0 and candidates.precision != "fp32":
            return f"{sentence}; {slower_in(candidates.precision)}"
        return f"{sentence}; raise the budget or allow more decompositions"
    return (
        f"{selector.spec()} gives no plan within {budget}: its closest one keeps {_shares(closest)} "
        f"(each on its own can go down to {_shares(lowest)}); raise the budget or use another rank selector"
    )


def slower_in(precision: str) -> str:
    """Return the advice for a network that another precision than fp32 makes slower."""
    return f"{precision} makes this network slower here: take --precision fp32 or auto"


def lowest_shares(candidates: Candidates, budget: Budget) -> dict[str, float]:
    """Return the smallest share of the dense cost that candidates reach, for each name in the budget on its own."""
    lowest = {}
    for name, field in ((name, LIMITED[name]) for name in budget.shares):
        floor = sum(min(getattr(o.cost, field) for o in options) for options in candidates.layers.values())
        dense = getattr(candidates.whole, field)
        lowest[name] = (getattr(candidates.rest, field) + floor) / dense if dense > 0 else 1.0
    return lowest


def out_of_reach(lowest: Mapping[str, float], budget: Budget) -> str | None:
    """Return a sentence on the shares of a budget that no plan reaches; None if all are reachable.

    >>> out_of_reach({"macs": 0.1}, Budget(macs=0.05))
    'no plan keeps macs within 0.05 of dense: the cheapest one keeps 0.1 of macs'
    """
    short = {name: share for name, share in lowest.items() if share > budget.shares[name] * (1 + 1e-9)}
    if not short:
        return None
    asked = " and ".join(f"{name} within {budget.shares[name]:g}" for name in short)
    kept = " and ".join(f"{rounded_up(share)} of {name}" for name, share in short.items())
    return f"no plan keeps {asked} of dense: the cheapest one keeps {kept}"


def _shares(shares: Mapping[str, float]) -> str:
    return ",".join(f"{name}={rounded_up(share)}" for name, share in shares.items())


def rounded_up(share: float) -> str:
    """Return three decimals, rounded up: a budget of the printed figure can be met."""
    return f"{math.ceil(round(share * 1000, 6)) / 1000:g}"
