"""Output error of layers whose factors are computed from few samples, with and without shrinkage of the moments."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import typer
from common import publish, traced
from torch import Tensor

import tdcompile
from tdcompile.data.task import Samples
from tdcompile.ir.im2col import draw_rows, patches_at
from tdcompile.ir.layer import Layer
from tdcompile.ir.modules import input_of
from tdcompile.ir.program import Program, Site
from tdcompile.ir.target import Target
from tdcompile.numerics.covariance import Covariance, Full, Identity
from tdcompile.numerics.low_rank import low_rank
from tdcompile.numerics.shrinkage import oas_share

SETTINGS = ((4, 4), (4, 64), (8, 16), (8, 64), (16, 16), (16, 64), (64, 4), (64, 16), (64, 64), (256, 16))
JUDGES, PLACES = 256, 64  # held-out images, and places of each


def main(
    data: Annotated[str, typer.Option(help="parquet:DIR with the images")],
    weights: Annotated[Path, typer.Option(help="safetensors of the dense network")],
    network: str = "resnet20",
    seed: int = 0,
    json: Annotated[Path | None, typer.Option(help="also write the table here")] = None,
) -> None:
    """Factorise every convolution at half its parameters, from few patches; judge on patches of held-out images."""
    program, train, _ = traced(network, weights, data, 0.5, seed)
    assert train is not None
    order = train.shuffled(torch.Generator().manual_seed(seed))
    held = _moments(program, order.subset(range(len(order) - JUDGES, len(order))), PLACES, seed + 1)
    found = tdcompile.sites(program)
    layers = {name: site for name, site in found.items() if name in held and len(held[name]) > 64}
    best = {name: _error(site, held[name], held[name]) for name, site in layers.items()}
    rows: list[dict[str, Any]] = []
    for images, places in SETTINGS:
        seen = _moments(program, order.subset(range(images)), places, seed)
        shares = {name: oas_share(seen[name], images) for name in layers}
        ways: Mapping[str, Mapping[str, Covariance]] = {
            "as sampled": seen,
            "shrunk": {name: seen[name].shrunk(shares[name]) for name in layers},
            "weights alone": {name: Identity(len(seen[name])) for name in layers},
        }
        errors = {
            way: fmean(_error(site, moments[name], held[name]) / best[name] for name, site in layers.items())
            for way, moments in ways.items()
        }
        rows.append(
            {
                "images": images,
                "places": places,
                "patches per input": fmean(seen[name].samples / len(seen[name]) for name in layers),
                **errors,
                "share of the identity": fmean(shares.values()),
            }
        )
    formats = dict.fromkeys(("as sampled", "shrunk", "weights alone", "share of the identity"), ".3f")
    title = f"Squared output error of {network}'s layers on held-out images, relative to factors made from those images"
    publish(title, rows, seed, Target(), json, {**formats, "patches per input": ".2f"})


def _moments(program: Program, samples: Samples, places: int, seed: int) -> dict[str, Full]:
    """Return the second moment of the patches of each convolution, at random places of each sample."""
    generator, patches = torch.Generator().manual_seed(seed), {}
    hooks = []
    for name, site in tdcompile.sites(program).items():
        if site.layer.kind != "linear":

            def keep(
                module: torch.nn.Module,
                given: tuple[Tensor, ...],
                named: dict[str, Tensor],
                *,
                layer: Layer = site.layer,
                name: str = name,
            ) -> None:
                x = input_of(given, named)
                patches[name] = patches_at(layer, x, draw_rows(layer, x, places * len(x), generator)).double()

            hooks.append(site.module.register_forward_pre_hook(keep, with_kwargs=True))
    with torch.no_grad():
        program.graph(*samples.batch(list(range(len(samples)))).inputs)
    for hook in hooks:
        hook.remove()
    return {name: Full(x.T @ x / len(x), len(x)) for name, x in patches.items()}


def _error(site: Site, moments: Covariance, judge: Full) -> float:
    """Return the squared error of a layer's output at half its parameters, relative to the output."""
    flat = site.weight.detach().double().flatten(1)
    rank = max(1, round(0.5 * flat.numel() / sum(flat.shape)))
    last, first = low_rank(flat, moments, rank)
    return judge.energy(flat - last @ first) / judge.energy(flat)


if __name__ == "__main__":
    typer.run(main)
