"""Ranks that decompositions offer for the layers of a program, and the costs of their chains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tdcompile.core.cost_model import CostModel
from tdcompile.core.decomposition import Decomposition
from tdcompile.core.registry import make
from tdcompile.errors import during
from tdcompile.ir.layer import Layer, Ranks
from tdcompile.ir.program import Program, Site
from tdcompile.ir.target import Cost, total
from tdcompile.planning.pricing import over_calls, price

Spaces = Mapping[Decomposition, Sequence[Ranks]]  # the ranks of every form that accepts a layer


def grain_of(program: Program, grain: int | None) -> int:
    """Return the grain of ranks; None means the target's under a latency budget and 1 otherwise."""
    return grain or (program.target.rank_grain if program.budget.latency is not None else 1)


def spaces_of(site: Site, forms: Sequence[Decomposition], grain: int) -> dict[Decomposition, list[Ranks]]:
    """Return the ranks of every decomposition that accepts the layer."""
    spaces: dict[Decomposition, list[Ranks]] = {}
    for form in forms:
        with during(f"in the decomposition {form.told()} on the layer '{site.name}'"):
            if form.refuse(site.layer) is None:
                spaces[form] = [tuple(ranks) for ranks in form.rank_space(site.layer, grain)]
    return {form: space for form, space in spaces.items() if space}


def prices_of(
    program: Program, found: Mapping[str, Site], spaces: Mapping[str, Spaces], cost: str, timer: str
) -> dict[Layer, Cost]:
    """Return the cost of every layer of every chain, and of the dense layers; a timer measures them together.

    Args:
        program: its target and budget; only a latency budget needs seconds.
        found: the layers by name.
        spaces: forms and ranks of each of them.
        cost: cost model for parameters and multiply-accumulates.
        timer: cost model for seconds.
    """
    counting = make(CostModel, cost)
    timing = make(CostModel, timer) if program.budget.latency is not None else None
    chains = (
        chain_of(site, form, ranks)
        for name, site in found.items()
        for form, space in spaces[name].items()
        for ranks in space
    )
    dense = (call for site in found.values() for call in site.calls)
    parts = list(dict.fromkeys([*dense, *(part for chain in chains for part in chain)]))
    for model in filter(None, (counting, timing)):
        model.prepare(parts, program.target)
    return {part: price(part, program.target, counting, timing) for part in parts}


def chain_of(site: Site, form: Decomposition, ranks: Ranks) -> tuple[Layer, ...]:
    """Return the layers of the blueprints of all calls of a site."""
    return tuple(part for call in site.calls for part in form.blueprint(call, ranks))


def cost_of(chain: Sequence[Layer], prices: Mapping[Layer, Cost], site: Site) -> Cost:
    """Return the price of a chain over all calls."""
    return over_calls(total([prices[part] for part in chain]), len(site.calls))
