"""``adopt``: check a given plan against a network, and use it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from tdcompile.core.decomposition import Decomposition, reading
from tdcompile.core.plan import Candidate, RankPlan
from tdcompile.core.registry import find, make
from tdcompile.errors import InputError, nearest
from tdcompile.ir.diagnostics import Reason, ReasonCode
from tdcompile.ir.measurements import Calibration
from tdcompile.ir.program import Program, Site, kept_dense, sites
from tdcompile.ir.target import Cost
from tdcompile.numerics.covariance import Identity
from tdcompile.planning.pricing import Prices

HAND = "hand"  # the selector of a plan that differs from what a selector chose


def read_plan(given: str) -> RankPlan:
    """Return a given plan.

    Args:
        given: a file, or the text of a plan, which begins with a brace.

    Raises:
        InputError: the file cannot be read or is not a plan.
    """
    written = given.startswith("{")
    return RankPlan.from_json(given if written else _read(Path(given)), _source(given))


def adopt(program: Program, given: str) -> Program:
    """Return the program with a given plan as a fact. Layers that the plan does not mention stay dense.

    Costs are counted again. A choice whose cost equals the plan's keeps the plan's error, because the ranks are the
    same. Any other choice gets the error of its weight, and in ``factorize`` that of its output if there is data. An
    edited plan has the selector ``hand``; its gap and the former selector's reasons are dropped.

    Args:
        program: the program before any pass.
        given: see ``read_plan``.

    Raises:
        InputError: the file cannot be read or is not a plan. Also raised if the plan names an unknown layer, a
            decomposition that refuses its layer, or ranks that the layer does not have.
    """
    source, plan, found = _source(given), read_plan(given), sites(program)
    kept = kept_dense(program, found)
    for name in plan.choices:
        if name not in found:
            raise InputError(f"{source} is for another network: it has no layer '{name}'; {nearest(name, found)}")
    prices, choices = Prices(program), dict[str, Candidate]()
    for name, site in found.items():
        dense = Candidate.dense(prices.layers[name])
        choice = plan.choices.get(name, dense)
        if choice.is_dense or name in program.keep_dense:
            choices[name] = dense
            continue
        check(site, choice, kept)
        choices[name] = _counted(site, choice, prices)
    spent = prices.network({name: choice.cost for name, choice in choices.items()})
    if not _same(spent, plan.predicted):  # measurements of another plan are not valid for this one
        plan = replace(plan, predicted=spent, dense=prices.dense)
    if changed := _changed(choices, plan.choices):
        plan = replace(plan, selector=HAND, gap=None)
    reasons = {
        name: Reason(ReasonCode.DENSE_IN_PLAN, f"{Path(source).name} leaves it dense")
        for name, choice in choices.items()
        if choice.is_dense
    }
    lasting = [name for name in reasons if not changed or _fits_none(found[name])]
    reasons |= {name: plan.reasons[name] for name in lasting if name in plan.reasons}
    reasons |= {name: reason for name, reason in kept.items() if name in reasons and changed}
    reasons |= {name: Reason(ReasonCode.EXCLUDED_BY_USER, why) for name, why in program.keep_dense.items()}
    plan = replace(plan, choices=choices, reasons=reasons, precision=program.target.precision)
    return program.with_(facts=program.facts.having(plan))


def estimated(program: Program) -> Program:
    """Return the program with the errors of the layers' outputs in a plan that was made by hand.

    Other plans have these errors already, because ``propose`` had the covariances.
    """
    plan, calibration = program.facts[RankPlan], program.facts.get(Calibration)
    if plan.selector != HAND or calibration is None:
        return program
    found, choices = sites(program), dict(plan.choices)
    for name, choice in plan.choices.items():
        if not choice.is_dense and name in found and name in calibration.covariances:
            form, site = choice.decomposition, found[name]
            weight = site.weight
            with reading(form, weight):
                (error,) = form.errors(site.layer, weight, [choice.ranks], calibration.covariances[name])
            choices[name] = replace(choice, error=float(error))
    return program.with_(facts=program.facts.having(replace(plan, choices=choices)))


def _source(given: str) -> str:
    return "the plan" if given.startswith("{") else given


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the plan {path} cannot be read: {error}") from error


def _counted(site: Site, choice: Candidate, prices: Prices) -> Candidate:
    """Return the choice with the cost and the error of its ranks."""
    form = choice.decomposition
    cost = prices.at(site.name, form, choice.ranks)
    if _same(cost, choice.cost):
        return choice
    weight = site.weight
    with reading(form, weight):
        (error,) = form.errors(site.layer, weight, [choice.ranks], Identity.of(weight))
    return replace(choice, error=error, cost=cost, modes=form.modes)


def _changed(choices: Mapping[str, Candidate], given: Mapping[str, Candidate]) -> bool:
    """Return whether a person edited the plan: choices differ from the given ones, or lack their costs."""
    return choices.keys() != given.keys() or any(
        choice.decomposition != given[name].decomposition or not _same(choice.cost, given[name].cost)
        for name, choice in choices.items()
    )


def _fits_none(site: Site) -> bool:
    """Return whether every registered decomposition refuses the layer."""
    return all(make(Decomposition, name).refuse(site.layer) for name in find(Decomposition))


def _same(cost: Cost, other: Cost) -> bool:
    return (cost.macs, cost.params) == (other.macs, other.params)


def check(site: Site, choice: Candidate, kept: Mapping[str, Reason]) -> None:
    """Check that a choice fits its layer.

    Args:
        site: the layer.
        choice: its choice, which is not dense.
        kept: the layers that must stay dense, see ``kept_dense``.

    Raises:
        InputError: the layer must stay dense, the decomposition refuses it, or it does not have these ranks.
    """
    form = choice.decomposition
    reason = kept.get(site.name) or form.refuse(site.layer)
    if reason is not None:
        raise InputError(f"the plan wants {choice.form} for '{site.name}': {reason.text}")
    full = form.exact_ranks(site.layer)
    fits = len(choice.ranks) == len(full) and all(1 <= r <= most for r, most in zip(choice.ranks, full, strict=True))
    if not fits:
        raise InputError(
            f"the plan wants {choice.form}{list(choice.ranks)} for '{site.name}': "
            f"expected {len(full)} rank(s), each at least 1 and at most {list(full)}"
        )
