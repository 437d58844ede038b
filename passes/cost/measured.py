"""``measured``: seconds of a layer in onnxruntime on the target, measured on a grid of channels and interpolated."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from tdcompile.backend.layer_timing import CostCache, measure_layers
from tdcompile.core.cost_model import CostModel
from tdcompile.ir.layer import Layer
from tdcompile.ir.target import Cost, Target

# Channels at which layers are measured: powers of two and half-way between them, where networks' own channels lie.
LADDER = tuple(sorted({2**n for n in range(13)} | {3 * 2**n for n in range(11)}))


@dataclass(frozen=True)
class Measured(CostModel):
    """Seconds measured in onnxruntime on the target, kept in the user's cache folder.

    A layer is measured at rungs of a ladder of channel counts around its own and interpolated bilinearly between
    them: at a fixed kernel and size, time is nearly ``a + b·C + c·T + d·C·T``, which bilinear interpolation meets.
    Grouped layers that are not depthwise are measured as they are.

    Attributes:
        runs: timed runs of each measurement; the median counts.
    """

    name: ClassVar[str] = "measured"
    runs: int = 9

    def prepare(self, layers: Sequence[Layer], target: Target) -> None:
        """Measure together what the given layers need and the cache does not have."""
        cache = CostCache.of(target)
        needed = dict.fromkeys(corner for layer in layers for corner, _ in corners(layer))
        missing = [layer for layer in needed if layer not in cache]
        for batch, seconds in measure_layers(missing, target, self.runs):
            cache.add(batch, seconds)
        cache.save()

    def price(self, layer: Layer, target: Target) -> Cost:
        """Interpolated seconds of one run of ``target.batch`` samples; measures what is not yet known."""
        cache = CostCache.of(target)
        if any(corner not in cache for corner, _ in corners(layer)):
            self.prepare([layer], target)
        return Cost(seconds=sum(weight * cache[corner] for corner, weight in corners(layer)))


def corners(layer: Layer) -> list[tuple[Layer, float]]:
    """The measured layers around one, with the weights of its interpolation, which add up to 1."""
    layer = replace(layer, bias=True)
    if layer.depthwise and layer.out_channels == layer.in_channels:
        return [(replace(layer, in_channels=c, out_channels=c, groups=c), w) for c, w in rungs(layer.in_channels)]
    if layer.groups > 1:
        return [(layer, 1.0)]
    pairs = itertools.product(rungs(layer.in_channels), rungs(layer.out_channels))
    return [(replace(layer, in_channels=c, out_channels=t), u * v) for (c, u), (t, v) in pairs]


def rungs(channels: int) -> Iterable[tuple[int, float]]:
    """The rungs of the ladder around a channel count and its linear weights between them.

    Above the ladder a count is a rung of its own: so many channels are a network's, seldom a rank.
    """
    above = bisect.bisect_left(LADDER, channels)
    if above == len(LADDER) or LADDER[above] == channels:
        return [(channels, 1.0)]
    low, high = LADDER[above - 1], LADDER[above]
    share = (channels - low) / (high - low)
    return [(low, 1.0 - share), (high, share)]
