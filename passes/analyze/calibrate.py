"""``calibrate``: covariances of the layers' inputs over calibration data; factorisations then minimise output error."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from tdcompile.core.passes import AnalysisPass
from tdcompile.errors import InputError
from tdcompile.ir.facts import Fact
from tdcompile.ir.im2col import patches_at, positions
from tdcompile.ir.layer import Layer
from tdcompile.ir.measurements import Calibration
from tdcompile.ir.modules import input_of
from tdcompile.ir.program import Program, Site, sites
from tdcompile.numerics.covariance import WIDE, Covariance, Full, PerGroup
from tdcompile.numerics.nystrom import NystromSketch
from tdcompile.support.options import Count
from tdcompile.support.progress import report_progress

log = logging.getLogger("tdcompile")


@dataclass(frozen=True)
class Calibrate(AnalysisPass):
    """Compute the covariance of every layer's input over calibration data; without data there are none.

    Attributes:
        patches: upper bound on the im2col patches read for each layer, at random places of all samples. A layer with
            N > 5,000 inputs (C·K) reads 5,000/N of them.
        largest: inputs up to which a layer gets a covariance matrix. A wider layer gets low rank plus diagonal. A
            grouped convolution whose matrices together exceed one matrix of this size gets no covariance.
        sketch: rank of a low-rank covariance; it costs four times as many numbers for each input.
        batch: samples in one forward pass.
    """

    name: ClassVar[str] = "calibrate"
    gives: ClassVar[tuple[type[Fact], ...]] = (Calibration,)
    patches: Count = 100_000
    largest: Count = WIDE
    sketch: Count = 512
    batch: Count = 128

    def analyze(self, program: Program) -> Calibration:
        """Return the covariance E[x xᵀ] of each layer's im2col patches x.

        Raises:
            InputError: NaN or Inf reaches a layer.
        """
        samples = program.task.train
        if samples is None or program.task.calibrate < 1:
            return Calibration({}, {}, 0)
        count = min(program.task.calibrate, len(samples))
        chosen = samples.shuffled(program.generator("calibrate"))
        taps, skipped = self._taps(program, count)
        hooks = [tap.site.module.register_forward_pre_hook(tap, with_kwargs=True) for tap in taps.values()]
        try:
            with torch.no_grad():
                for done, batch in enumerate(chosen.batches(self.batch, limit=count), start=1):
                    program.graph(*batch.inputs)
                    report_progress(min(done * self.batch, count), count, "samples")
        finally:
            for hook in hooks:
                hook.remove()
        return Calibration({name: tap.covariance() for name, tap in taps.items()}, skipped, count)

    def _taps(self, program: Program, count: int) -> tuple[dict[str, _Tap], dict[str, str]]:
        taps, skipped = {}, {}
        for name, site in sites(program).items():
            width = site.layer.in_channels // site.layer.groups * site.layer.taps
            if site.layer.depthwise:
                skipped[name] = "a depthwise layer is not factorised"
            elif site.layer.groups > 1 and width * math.sqrt(site.layer.groups) > self.largest:
                skipped[name] = (
                    f"its {site.layer.groups} groups of {width} inputs need more memory than a matrix of {self.largest}"
                )
                log.info("calibrate: no covariance for %s: %s", name, skipped[name])
            else:
                patches = self.patches * WIDE // max(width, WIDE)  # the patches of one batch are in memory together
                each = max(1, patches // count // len(site.calls))
                sums = _Sums(site.layer.groups) if width <= self.largest else self._sketched(width, name, program)
                taps[name] = _Tap(site, each, program.generator(f"calibrate/{name}"), sums)
        return taps, skipped

    def _sketched(self, width: int, name: str, program: Program) -> NystromSketch:
        log.info(
            "calibrate: the %d x %d covariance of %s is kept as rank %d plus diagonal", width, width, name, self.sketch
        )
        return NystromSketch(width, self.sketch, program.generator(f"calibrate/{name}/sketch"))


@dataclass
class _Sums:
    """The covariance as a running sum of matrices, one for each group."""

    groups: int = 1
    total: Tensor | None = None
    seen: int = 0

    def add(self, rows: Tensor) -> None:
        if self.groups == 1:
            product = (rows.T @ rows).double()
        else:
            parts = rows.reshape(len(rows), self.groups, -1).movedim(1, 0)
            product = (parts.mT @ parts).double()
        self.total = product if self.total is None else self.total.add_(product)
        self.seen += len(rows)

    def result(self) -> Covariance:
        assert self.total is not None  # the caller checks ``seen``
        mean = self.total.div_(self.seen)
        return Full(mean, self.seen) if self.groups == 1 else PerGroup(mean, self.seen)


@dataclass
class _Tap:
    """A hook that accumulates the covariance of one module's input."""

    site: Site
    places: int
    generator: torch.Generator
    sums: _Sums | NystromSketch

    def __call__(self, module: nn.Module, arguments: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        patches = patches_of(self.site.layer, input_of(arguments, named), self.places, self.generator)
        if not bool(torch.isfinite(patches).all()):
            raise InputError(f"NaN or Inf reaches the layer '{self.site.name}' on calibration data")
        self.sums.add(patches)

    def covariance(self) -> Covariance:
        if not self.sums.seen:
            raise InputError(f"no calibration data reached the layer '{self.site.name}'")
        return self.sums.result()


def patches_of(layer: Layer, x: Tensor, places: int, generator: torch.Generator) -> Tensor:
    """Return rows of the im2col matrix, ``(patches, C·K)``, at random places, the same for all samples of the batch.

    Args:
        x: the layer's input, ``(N, C, *spatial)`` or, for a linear layer, ``(N, ..., C)``.
        places: upper bound on the places of each sample.
    """
    extent = x.shape[1:-1] if layer.kind == "linear" else x.shape[2:]
    layer = replace(layer, extent=tuple(extent))  # a module that is called twice may get inputs of two sizes
    return patches_at(layer, x, positions(layer, places, generator)).flatten(0, 1)
