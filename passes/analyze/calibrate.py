"""``calibrate``: covariances of the layers' inputs over calibration data; factorisations then minimise output error."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Iterable, Set
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from tdcompile.core.passes import AnalysisPass
from tdcompile.errors import InputError
from tdcompile.ir.facts import Fact
from tdcompile.ir.im2col import draw_rows, patches_at
from tdcompile.ir.layer import Layer
from tdcompile.ir.measurements import Calibration
from tdcompile.ir.modules import input_of
from tdcompile.ir.program import Program, Site, kept_dense, sites
from tdcompile.numerics.covariance import WIDE, Covariance, Full, PerGroup
from tdcompile.numerics.finite import all_finite
from tdcompile.numerics.inner_products import inner_products
from tdcompile.numerics.nystrom import NystromSketch
from tdcompile.numerics.shrinkage import oas_share
from tdcompile.support.options import Count
from tdcompile.support.progress import report_progress

_LARGEST_VALUES = 2**29  # bytes of one layer's input and output in a forward pass
FEW = 5  # patches for each input of a layer below which its covariance is shrunk (benchmarks/few_samples.py)

log = logging.getLogger("tdcompile")


@dataclass(frozen=True)
class Calibrate(AnalysisPass):
    """Compute the covariance of every layer's input over calibration data; without data there are none.

    Ten patches for each input of a layer, spread over all samples, give factors whose error is within 1 to 2 % of those
    from every patch; sums over more patches only take longer. Layers that read one value in one geometry, such as the
    projections of an attention, share one covariance.

    Layers that must stay dense get no covariance, and what only they and later operations compute is not run: the head
    of a language model whose embedding is tied takes a fifth of the time, and most of the memory.

    If a layer has fewer than 5 patches for each input, its covariance is mixed with a multiple of the identity
    (``numerics.shrinkage.oas_share``), and the report says so.

    Attributes:
        patches: im2col patches to read for each of the N inputs (C·K) of a layer. At least one patch of each sample is
            read. A layer with N > 5,000 inputs reads ``patches``·5,000²/N in all.
        largest: inputs up to which a layer gets a covariance matrix. A wider layer gets low rank plus diagonal. A
            grouped convolution whose matrices together exceed one matrix of this size gets no covariance.
        sketch: rank of a low-rank covariance; it costs four times as many numbers for each input.
        batch: most samples in one forward pass; fewer if the values of a layer would exceed 512 MB.
    """

    name: ClassVar[str] = "calibrate"
    gives: ClassVar[tuple[type[Fact], ...]] = (Calibration,)
    patches: Count = 10
    largest: Count = WIDE
    sketch: Count = 512
    batch: Count = 128

    def analyze(self, program: Program) -> Calibration:
        """Return the covariance E[x xᵀ] of each layer's im2col patches x.

        Raises:
            InputError: NaN or Inf reaches a layer, or values whose squares overflow.
        """
        samples = program.task.train
        if samples is None or program.task.calibrate < 1:
            return Calibration({}, {}, 0)
        count = min(program.task.calibrate, len(samples))
        chosen = samples.shuffled(program.generator("calibrate"))
        taps, skipped = self._taps(program, count)
        hooks = [tap.site.module.register_forward_pre_hook(tap, with_kwargs=True) for tap in taps.values()]
        shared, graph = _Shared(), _up_to(program.graph, {tap.site.module for tap in taps.values()})
        try:
            with torch.no_grad():
                size = self._batch_size(taps.values())
                for done, batch in enumerate(chosen.batches(size, limit=count), start=1):
                    for tap in taps.values():
                        tap.begin(len(batch.inputs[0]), shared if done == 1 else None)
                    graph(*batch.inputs)
                    report_progress(min(done * size, count), count, "samples")
        finally:
            for hook in hooks:
                hook.remove()
        found = {name: tap.covariance() for name, tap in taps.items() if tap.source is None}
        for name, known in found.items():
            if not known.is_finite():
                raise InputError(
                    f"the covariance of the input of the layer '{name}' overflows: its values on calibration data are "
                    "too large to square in float32, so scale the data"
                )
        shares = {name: oas_share(known, count) for name, known in found.items() if known.samples < FEW * len(known)}
        for name, share in shares.items():  # one at a time: each is a new matrix
            found[name] = found[name].shrunk(share)
        names = {id(tap): name for name, tap in taps.items()}
        covariances = {name: found[name if tap.source is None else names[id(tap.source)]] for name, tap in taps.items()}
        return Calibration(covariances, skipped, count, shares)

    def _batch_size(self, taps: Iterable[_Tap]) -> int:
        """Return the samples in one forward pass: fewer if a layer's input and output would exceed the limit."""
        calls = [call for tap in taps for call in tap.site.calls]
        largest = max((_footprint(call) for call in calls), default=1)
        return max(1, min(self.batch, _LARGEST_VALUES // largest))

    def _taps(self, program: Program, count: int) -> tuple[dict[str, _Tap], dict[str, str]]:
        taps, skipped, found = {}, {}, sites(program)
        kept = kept_dense(program, found)
        for name, site in found.items():
            width = site.layer.in_channels // site.layer.groups * site.layer.taps
            if name in kept:
                skipped[name] = f"it stays dense: {kept[name].text}"
            elif site.layer.depthwise:
                skipped[name] = "a depthwise layer is not factorised"
            elif site.layer.groups > 1 and width * math.sqrt(site.layer.groups) > self.largest:
                skipped[name] = (
                    f"its {site.layer.groups} groups of {width} inputs need more memory than a matrix of {self.largest}"
                )
                log.info("calibrate: no covariance for %s: %s", name, skipped[name])
            else:
                # The patches of one batch are in memory together, N numbers each.
                patches = self.patches * (width if width <= WIDE else WIDE**2 // width)
                each = max(1.0, patches / count) / len(site.calls)
                sums = _Sums(site.layer.groups) if width <= self.largest else self._sketched(width, name, program)
                taps[name] = _Tap(site, each, program.generator(f"calibrate/{name}"), sums)
        return taps, skipped

    def _sketched(self, width: int, name: str, program: Program) -> NystromSketch:
        log.info(
            "calibrate: the %d x %d covariance of %s is kept as rank %d plus diagonal", width, width, name, self.sketch
        )
        return NystromSketch(width, self.sketch, program.generator(f"calibrate/{name}/sketch"))


def _footprint(layer: Layer) -> int:
    """Return the bytes of a layer's input and output for one sample, in fp32."""
    return 4 * (layer.in_channels * math.prod(layer.extent) + layer.out_channels * math.prod(layer.out_extent))


def _up_to(graph: fx.GraphModule, modules: Set[nn.Module]) -> nn.Module:
    """Return the graph up to the last call that reaches one of the modules, over the same modules and tensors."""
    nodes = list(graph.graph.nodes)
    last = max(
        (
            place
            for place, node in enumerate(nodes)
            if node.op == "call_module" and not modules.isdisjoint(graph.get_submodule(str(node.target)).modules())
        ),
        default=len(nodes) - 1,
    )
    if last >= len(nodes) - 2:  # only the output follows
        return graph
    short = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in nodes[: last + 1]:
        copies[node] = short.node_copy(node, copies.__getitem__)
    short.output(copies[nodes[last]])
    return fx.GraphModule(graph, short)


@dataclass
class _Sums:
    """The covariance as a running sum of matrices, one for each group."""

    groups: int = 1
    total: Tensor | None = None
    seen: int = 0

    def add(self, rows: Tensor) -> None:
        if self.groups == 1:
            product = inner_products(rows).double()
        else:
            product = inner_products(rows.reshape(len(rows), self.groups, -1).movedim(1, 0)).double()
        self.total = product if self.total is None else self.total.add_(product)
        self.seen += len(rows)

    def result(self) -> Covariance:
        assert self.total is not None  # the caller checks ``seen``
        mean = self.total.div_(self.seen)
        return Full(mean, self.seen) if self.groups == 1 else PerGroup(mean, self.seen)


class _Shared:
    """The taps by the patches that they read: the value, by identity and version, and the geometry."""

    def __init__(self) -> None:
        self._known: dict[Layer, list[tuple[weakref.ref[Tensor], int, _Tap]]] = {}

    def first(self, tap: _Tap, x: Tensor) -> _Tap:
        """Return the first tap that reads the same patches; a value that was changed in place since is another."""
        if x.is_inference():  # it has no version
            return tap
        layer = tap.site.layer
        known = self._known.setdefault(replace(layer, out_channels=layer.groups, bias=False), [])
        for value, version, other in known:
            if value() is x and version == x._version:
                return other
        known.append((weakref.ref(x), x._version, tap))
        return tap


@dataclass
class _Tap:
    """A hook that accumulates the covariance of one module's input.

    Attributes:
        each: patches of a sample to read at each call.
        source: another layer's tap that reads the same patches; this one then reads none.
    """

    site: Site
    each: float
    generator: torch.Generator
    sums: _Sums | NystromSketch
    source: _Tap | None = None
    _samples: int = 0
    _shared: _Shared | None = None

    def begin(self, samples: int, shared: _Shared | None) -> None:
        """Prepare for a batch of so many samples; look for a tap to share with if ``shared`` is given."""
        self._samples, self._shared = samples, shared

    def __call__(self, module: nn.Module, arguments: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        if self.source is not None:
            return
        x = input_of(arguments, named)
        if self._shared is not None and len(self.site.calls) == 1:
            first = self._shared.first(self, x)
            if first is not self:
                self.source = first
                return
        if not all_finite(x):
            raise InputError(f"NaN or Inf reaches the layer '{self.site.name}' on calibration data")
        rows = draw_rows(self.site.layer, x, math.ceil(self.each * self._samples), self.generator)
        self.sums.add(patches_at(self.site.layer, x, rows))

    def covariance(self) -> Covariance:
        """Return the covariance; it uses up the sums."""
        if not self.sums.seen:
            raise InputError(f"no calibration data reached the layer '{self.site.name}'")
        return self.sums.result()
