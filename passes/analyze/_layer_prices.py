"""Ranks that decompositions offer for the layers of a program, and the costs of their chains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from tdcompile.core.cost_model import CostModel
from tdcompile.core.decomposition import Decomposition
from tdcompile.core.registry import make
from tdcompile.errors import during
from tdcompile.ir.layer import Layer, Ranks
from tdcompile.ir.program import Program, Site
from tdcompile.ir.target import Cost, Precision, total
from tdcompile.planning.pricing import over_calls, price

# Least output channels of onnxruntime's fast int8 convolution; channels that a depthwise one takes at a time on x64.
INT8_BLOCK = 16
Spaces = Mapping[Decomposition, Sequence[Ranks]]  # the ranks of every form that accepts a layer


def grain_of(program: Program, grain: int | None) -> int:
    """Return the grain of ranks; None means the target's under a latency budget and 1 otherwise."""
    return grain or (program.target.rank_grain if program.budget.latency is not None else 1)


def spaces_of(
    site: Site, forms: Sequence[Decomposition], grain: int, precision: Precision = "fp32"
) -> dict[Decomposition, list[Ranks]]:
    """Return the ranks of every decomposition that accepts the layer; in int8 only those with fast kernels."""
    spaces: dict[Decomposition, list[Ranks]] = {}
    for form in forms:
        with during(f"in the decomposition {form.told()} on the layer '{site.name}'"):
            if form.refuse(site.layer) is None:
                space = [tuple(ranks) for ranks in form.rank_space(site.layer, grain)]
                spaces[form] = [r for r in space if precision != "int8" or _fast_in_int8(form.blueprint(site.layer, r))]
    return {form: space for form, space in spaces.items() if space}


def _fast_in_int8(chain: Sequence[Layer]) -> bool:
    """Return whether onnxruntime has its fast int8 kernels for the values between the parts (mlas/lib/convsym.cpp)."""
    return all(
        part.out_channels % INT8_BLOCK == 0 if part.depthwise and part.groups > 1 else part.out_channels >= INT8_BLOCK
        for part in chain[:-1]
    )


def prices_of(
    program: Program,
    found: Mapping[str, Site],
    spaces: Mapping[str, Spaces],
    models: tuple[str, str],
    precision: Precision,
) -> dict[str, Mapping[Layer, Cost]]:
    """Return for each layer the cost of every part of its chains, and of itself; a timer measures them together.

    Layers that stay float have the costs of fp32.

    Args:
        program: its target and budget; only a latency budget needs seconds.
        found: the layers by name.
        spaces: forms and ranks of each of them.
        models: cost model for parameters and multiply-accumulates, and cost model for seconds.
        precision: number format to measure in.
    """
    formats: dict[Precision, list[str]] = {}
    for name in found:
        formats.setdefault("fp32" if name in program.keep_fp32 else precision, []).append(name)
    prices: dict[str, Mapping[Layer, Cost]] = {}
    for own, names in formats.items():
        table = _prices_in(program, {name: found[name] for name in names}, spaces, models, own)
        prices |= dict.fromkeys(names, table)
    return prices


def _prices_in(
    program: Program,
    found: Mapping[str, Site],
    spaces: Mapping[str, Spaces],
    models: tuple[str, str],
    precision: Precision,
) -> dict[Layer, Cost]:
    cost, timer = models
    target = replace(program.target, precision=precision)
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
        model.prepare(parts, target)
    return {part: price(part, target, counting, timing) for part in parts}


def chain_of(site: Site, form: Decomposition, ranks: Ranks) -> tuple[Layer, ...]:
    """Return the layers of the blueprints of all calls of a site."""
    return tuple(part for call in site.calls for part in form.blueprint(call, ranks))


def cost_of(chain: Sequence[Layer], prices: Mapping[Layer, Cost], site: Site) -> Cost:
    """Return the price of a chain over all calls."""
    return over_calls(total([prices[part] for part in chain]), len(site.calls))
