"""Compare factors from a low-rank covariance with factors from the full covariance and from the weight alone."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer
from common import publish, traced

from tdcompile.core.decomposition import Decomposition, relative_error
from tdcompile.core.pipeline import Pipeline
from tdcompile.core.registry import find
from tdcompile.ir.layer import Ranks
from tdcompile.ir.measurements import Calibration
from tdcompile.ir.program import Program, Site, sites
from tdcompile.ir.target import Target
from tdcompile.numerics.covariance import Covariance, Identity


def main(
    data: Annotated[str, typer.Option(help="parquet:DIR with the images")],
    weights: Annotated[Path, typer.Option(help="safetensors of the dense network")],
    network: str = "resnet18_cifar",
    layers: Annotated[int, typer.Option(help="so many convolutions of a kernel, the widest first")] = 2,
    ranks: Annotated[str, typer.Option(help="of the sketches, comma-separated")] = "128,512",
    macs: Annotated[float, typer.Option(help="share of a layer's MACs that its factors have at most")] = 0.5,
    seed: int = 0,
    json: Annotated[Path | None, typer.Option(help="also write the table here")] = None,
) -> None:
    """Report relative output errors, means over the layers, on 1,024 training images outside the calibration set."""
    program, train, _ = traced(network, weights, data, 1.0, seed)
    assert train is not None  # ``--data`` is required
    order = train.shuffled(program.generator("wide layers"))
    shown, unseen = (
        program.with_(task=replace(program.task, train=order.subset(range(start, start + 1024)))) for start in (0, 1024)
    )
    found = {name: site for name, site in sites(program).items() if not site.layer.pointwise and site.layer.groups == 1}
    chosen = sorted(found.values(), key=lambda site: -site.weight[0].numel())[:layers]
    widths = [site.weight[0].numel() for site in chosen]
    entire = f"calibrate{{largest={max(widths)}}}"
    truth = _covariances(unseen, entire)
    plain: dict[str, Covariance] = {site.name: Identity.of(site.weight) for site in chosen}
    sources = {"weights alone": plain}
    for rank in map(int, ranks.split(",")):
        sources[f"sketch of rank {rank}"] = _covariances(shown, f"calibrate{{largest={min(widths) - 1},sketch={rank}}}")
    sources["full covariance"] = _covariances(shown, entire)
    rows = []
    for kind in find(Decomposition).values():
        form = kind()
        taken = {site.name: _ranks(form, site, macs) for site in chosen if form.refuse(site.layer) is None}
        for source, covariances in sources.items() if taken else ():
            errors, seconds = [], 0.0
            for site in chosen:
                if site.name in taken:
                    start = time.perf_counter()
                    factors = form.factorize(site.layer, site.weight, taken[site.name], covariances[site.name])
                    seconds += time.perf_counter() - start
                    made = form.reconstruct(site.layer, factors)
                    errors.append(relative_error(site.weight, made, truth[site.name]))
            rows.append({"form": form.name, "factors from": source, "error": fmean(errors), "seconds": seconds})
            publish(f"{form.name}, {source}", rows[-1:], seed, Target(), None)
    named = ", ".join(f"{site.name} ({site.weight[0].numel()} inputs)" for site in chosen)
    publish(f"Factors at {macs:g} of the MACs: {network}, {named}", rows, seed, Target(), json)


def _covariances(program: Program, step: str) -> dict[str, Covariance]:
    return dict(Pipeline.parse(step).run(program).facts[Calibration].covariances)


def _ranks(form: Decomposition, site: Site, macs: float) -> Ranks:
    """Return the ranks of most MACs within the share; among ties the most even ones."""
    allowed = [
        (sum(part.macs for part in form.blueprint(site.layer, ranks)), min(ranks), ranks)
        for ranks in form.rank_space(site.layer, 8)
    ]
    return max(entry for entry in allowed if entry[0] <= macs * site.layer.macs)[2]


if __name__ == "__main__":
    typer.run(main)
