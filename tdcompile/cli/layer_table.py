"""The work of ``analyze``: every layer, the energy that its ranks hold, and the decompositions that apply to it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from tdcompile.cli.console import Answer, tell
from tdcompile.cli.load_job import load_network
from tdcompile.core.decomposition import Decomposition
from tdcompile.core.registry import find, make
from tdcompile.frontend.tracing import trace
from tdcompile.ir.layer import Layer
from tdcompile.ir.program import Program, Site, sites
from tdcompile.numerics.covariance import Identity
from tdcompile.numerics.low_rank import low_rank_errors, operands, unfold
from tdcompile.recipes import Recipe
from tdcompile.support.formatting import count
from tdcompile.support.progress import report_progress

ENERGIES = (0.9, 0.99)


@dataclass(frozen=True)
class LayerAnatomy:
    """One layer.

    Attributes:
        kind: ``linear``, ``conv3x3``, ...; also whether a convolution is grouped.
        calls: number of calls in the network; MACs count all calls.
        break_even: the rank of the ``T x CK`` unfolding at which two factors have as many weights as one matrix.
        energy_ranks: for the unfoldings ``out`` (T x CK) and ``in`` (C x TK), the ranks that hold ``ENERGIES`` of the
            weight's squared norm.
        forms: names of the decompositions that apply.
        refusals: the reason for each other decomposition, by name.
    """

    name: str
    kind: str
    weight: tuple[int, ...]
    stride: tuple[int, ...]
    calls: int
    params: int
    macs: int
    break_even: int
    energy_ranks: Mapping[str, tuple[int, ...]]
    forms: tuple[str, ...]
    refusals: Mapping[str, str]


def analyze_network(recipe: Recipe, *, as_json: bool, quiet: bool) -> Answer:
    """Trace a network, and show a table of its layers."""
    program = trace(
        *load_network(recipe),
        frontend=recipe.frontend,
        dynamic_batch=recipe.dynamic_batch,
        batch_axis=recipe.batch_axis,
    )
    layers = anatomy(program)
    if as_json:
        return Answer((json.dumps([dataclasses.asdict(layer) for layer in layers], indent=1),))
    if not quiet:
        for note in program.history:
            tell(f"note: {getattr(note, 'text', note)}")
    return Answer((_layers(layers),))


def anatomy(program: Program) -> list[LayerAnatomy]:
    """Describe all layers, in the order of their first call.

    Raises:
        InputError: the network does not run on its inputs.
    """
    forms = {name: make(Decomposition, name) for name in find(Decomposition)}
    found = sites(program)
    layers = []
    for done, site in enumerate(found.values(), start=1):
        report_progress(done, len(found), site.name)
        layers.append(_layer(site, forms))
    return layers


def _layer(site: Site, forms: Mapping[str, Decomposition]) -> LayerAnatomy:
    layer = site.layer
    reasons = {name: form.refuse(layer) for name, form in forms.items()}
    rows, columns = layer.out_channels, layer.in_channels // layer.groups * layer.taps
    return LayerAnatomy(
        name=site.name,
        kind=_kind(layer),
        weight=layer.weight_shape,
        stride=layer.stride,
        calls=len(site.calls),
        params=layer.params,
        macs=sum(call.macs for call in site.calls),
        break_even=rows * columns // (rows + columns),
        energy_ranks={"out": _energy_ranks(site.weight, 0), "in": _energy_ranks(site.weight, 1)},
        forms=tuple(name for name, reason in reasons.items() if reason is None),
        refusals={name: reason.text for name, reason in reasons.items() if reason is not None},
    )


def _kind(layer: Layer) -> str:
    if layer.kind == "linear":
        return "linear"
    grouped = " depthwise" if layer.depthwise else f" {layer.groups} groups" if layer.groups > 1 else ""
    return f"conv{'x'.join(map(str, layer.kernel))}{grouped}"


def _energy_ranks(weight: Tensor, mode: int) -> tuple[int, ...]:
    """Return the smallest ranks at which a truncated unfolding keeps each of ``ENERGIES``, that is 1 - error²."""
    flat = unfold(weight, mode)
    flat, _ = operands(flat, Identity.of(flat), min(flat.shape))
    kept = 1 - low_rank_errors(flat, Identity.of(flat)).cpu() ** 2
    # At full rank rounding may leave less than everything, so that rank always counts.
    return tuple(min(int(torch.searchsorted(kept, energy - 1e-12)), len(kept) - 1) for energy in ENERGIES)


def _layers(layers: list[LayerAnatomy]) -> Table:
    shares = "/".join(f"{energy:.0%}" for energy in ENERGIES)
    table = Table(title="layers", title_justify="left")
    for heading in ("layer", "kind", "weight", "stride"):
        table.add_column(heading, overflow="fold")
    for heading in ("params", "MACs", "break-even", f"out {shares}", f"in {shares}"):
        table.add_column(heading, justify="right")
    table.add_column("decompositions that apply", overflow="fold")
    for layer in layers:
        ranks = ["/".join(map(str, layer.energy_ranks[mode])) for mode in ("out", "in")]
        shapes = ["×".join(map(str, shape)) for shape in (layer.weight, layer.stride)]
        figures = [count(layer.params), count(layer.macs), str(layer.break_even), *ranks]
        forms = ", ".join(layer.forms) or f"none: {_commonest(layer)}"
        table.add_row(*map(Text, (layer.name, layer.kind, *shapes, *figures, forms)))
    return table


def _commonest(layer: LayerAnatomy) -> str:
    reasons = list(layer.refusals.values())
    return max(reasons, key=reasons.count, default="no decomposition is registered")
