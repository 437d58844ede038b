"""``measured``: measure a layer in onnxruntime on the target at a grid of channel counts, and interpolate."""

from __future__ import annotations

import bisect
import itertools
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from tdcompile.backend.layer_timing import CostCache, is_quiet, measure_layers
from tdcompile.core.cost_model import CostModel
from tdcompile.ir.layer import Layer
from tdcompile.ir.target import Cost, Target
from tdcompile.support.options import Count

# Channel counts at which layers are measured: powers of two and their midpoints, which most networks use.
LADDER = tuple(sorted({2**n for n in range(13)} | {3 * 2**n for n in range(11)}))

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measured(CostModel):
    """Measure seconds in onnxruntime on the target; times are cached in the user's cache folder.

    A layer is measured at the grid's channel counts around its own, and interpolated bilinearly: at a fixed kernel and
    size, time is nearly ``a + b·C + c·T + d·C·T``. Grouped layers that are not depthwise are measured at their own
    channel counts.

    Attributes:
        runs: timed runs for each measurement; the median is used. More are made beside busy processes.
    """

    name: ClassVar[str] = "measured"
    default_timer: ClassVar[bool] = True
    runs: Count = 9

    def prepare(self, layers: Sequence[Layer], target: Target) -> None:
        """Measure together all grid points that these layers need and the cache lacks.

        Grid points that were measured beside other processes are measured again if the machine is quiet now.
        """
        cache = CostCache.of(target)
        needed = dict.fromkeys(corner for layer in layers for corner, _ in corners(layer))
        due = [layer for layer in needed if layer not in cache]
        doubtful = cache.doubtful(needed)
        if doubtful and is_quiet(target):
            due += doubtful
        for measured in measure_layers(due, target, self.runs):
            cache.add(measured)
        disturbed = sum(map(cache.under_load, due))
        if due:
            cache.save()
        if disturbed:
            log.warning(
                "other processes were busy while %d of %d layer times were measured: the plan may be off; these times "
                "are marked in the cache, and a later compilation measures them again on a quieter machine",
                disturbed,
                len(due),
            )

    def price(self, layer: Layer, target: Target) -> Cost:
        """Interpolate the seconds of a run of ``target.batch`` samples; measure grid points that the cache lacks."""
        cache = CostCache.of(target)
        if any(corner not in cache for corner, _ in corners(layer)):
            self.prepare([layer], target)
        return Cost(seconds=sum(weight * cache[corner] for corner, weight in corners(layer)))


def corners(layer: Layer) -> list[tuple[Layer, float]]:
    """Return the grid points around a layer with their interpolation weights, which sum to 1."""
    layer = replace(layer, bias=True)
    if layer.depthwise and layer.out_channels == layer.in_channels:
        return [(replace(layer, in_channels=c, out_channels=c, groups=c), w) for c, w in rungs(layer.in_channels)]
    if layer.groups > 1:
        return [(layer, 1.0)]
    pairs = itertools.product(rungs(layer.in_channels), rungs(layer.out_channels))
    return [(replace(layer, in_channels=c, out_channels=t), u * v) for (c, u), (t, v) in pairs]


def rungs(channels: int) -> Iterable[tuple[int, float]]:
    """Return the grid's channel counts around this one, with linear interpolation weights.

    A count above the grid is measured exactly: it is usually a layer's width, seldom a rank.
    """
    above = bisect.bisect_left(LADDER, channels)
    if above == len(LADDER) or LADDER[above] == channels:
        return [(channels, 1.0)]
    low, high = LADDER[above - 1], LADDER[above]
    share = (channels - low) / (high - low)
    return [(low, 1.0 - share), (high, share)]
