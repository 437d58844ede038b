"""``refit``: refit the factors layer by layer to the dense network's output, given the compressed layers before.

A factorisation is optimal for the inputs that a layer has in the dense network. In the compressed network its inputs
carry the errors of the layers before it. ``refit`` visits the layers in forward order. It fits the linear map from the
compressed inputs to the dense target by least squares over unlabelled samples. The map has an intercept if the layer
has a bias or a batch norm behind it. It is then factorised in the metric of those inputs; a layer that was left dense
becomes the map itself. The target is the dense network's value behind the layer, its batch norm and the addition of a
shortcut. A block therefore also corrects errors that arrive through its shortcut (this project's completion). Zhang et
al. 2016, arXiv 1505.06798, reconstruct one layer's output from approximated layers before it.

An int8 plan that leaves all layers dense has no error to repair but that of rounding. Then the layers read inputs that
are rounded to 8 bits, as in the int8 model: least squares on noisy inputs shrinks weights that magnify the noise (this
project's completion). The fits stay only if they clearly lower the error of the outputs on held-out samples.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import ClassVar

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tdcompile.backend.compiled_int8 import is_of
from tdcompile.backend.quantized_form import QuantizedForm, form_of
from tdcompile.core.decomposition import Decomposition
from tdcompile.core.passes import Rewritten, TunePass
from tdcompile.core.plan import Candidate, RankPlan
from tdcompile.data.task import lacking
from tdcompile.errors import InputError
from tdcompile.ir.diagnostics import Diagnostic, DiagnosticCode
from tdcompile.ir.graph_edits import calls_of, copy_graph, module_at, only_user
from tdcompile.ir.im2col import draw_rows, patches_at, values_at
from tdcompile.ir.layer import Layer, owner
from tdcompile.ir.modules import parent_of
from tdcompile.ir.program import Change, Program, Site, kept_dense, sites_of
from tdcompile.ir.target import Cost
from tdcompile.numerics.covariance import WIDE, Full
from tdcompile.numerics.finite import all_finite
from tdcompile.passes.tune._least_squares import Sums
from tdcompile.passes.tune._node_values import Stream, follows, samples_in_memory
from tdcompile.support.options import Count, NonNegative
from tdcompile.support.progress import report_progress

_ATEN = torch.ops.aten
_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_", _ATEN.add.Tensor, _ATEN.add_.Tensor)
# Ridges to try, as multiples of the given one, if a layer has fewer than ``_PLENTY`` rows for each input: on a language
# model with 5 rows for each input, the given ridge tripled the divergence that a hundred times as much lowers.
_RIDGES = (1.0, 10.0, 100.0, 1000.0)
_PLENTY = 10
# Ridges to try on rounded inputs. Batch norm magnifies directions of almost no variance, and with them the noise of
# rounding; a pull to the dense weight would keep what magnifies it. An output takes another fit if that has less than
# this share of its loss, and all fits stay only if that is so for the outputs: those for any lower loss, on CIFAR-10,
# cost EfficientNet-Lite0 5 of 20 images of ImageNet.
_ROUNDED_RIDGES, _CLEARLY = (1.0, 1e-2, 1e-4), 0.8
# Share of the samples that judge a fit, and their largest number.
_JUDGE_SHARE, _JUDGES = 5, 256
# A token whose value behind the layer is longer than this multiple of the median gets a weight below 1:
# the first token of a language model can be a thousand times as long as the others.
_LONG = 10.0
# Channels that batch norm scales by less than this share of its largest scale: dividing by their scale would magnify
# noise, so their scale is raised to this share.
_FAINT = 1e-2


@dataclass(frozen=True)
class Refit(TunePass):
    """Refit each layer to the dense network's outputs, given the compressed layers before it; no labels are read.

    Attributes:
        samples: number of training samples to read.
        rows: rows of the regression for each of a layer's N inputs (C·K), spread over all samples. At a third of the
            MACs of ResNet-20, 30 lose 0.7 points against 100, and more than 100 gain nothing.
        places: upper bound on the output positions of each sample in the regression; so many judge a fit.
        ridge: pull of the dense weight on a fitted map, relative to the inputs' mean variance.
        dense: also fit layers that were left dense.
        blocks: take the value behind the addition of a shortcut as the target, not the layer's own output.
        sweeps: number of passes over all layers.
        batch: samples in one forward pass.
        memory: approximate limit in MB for the values between layers; fewer samples are read if they would exceed it.
    """

    name: ClassVar[str] = "refit"
    samples: Count = 2048
    rows: Count = 100
    places: Count = 64
    ridge: NonNegative = 1e-3
    dense: bool = True
    blocks: bool = True
    sweeps: Count = 1
    batch: Count = 128
    memory: Count = 2000

    @torch.no_grad()
    def tune(self, graph: fx.GraphModule, program: Program) -> Rewritten:
        """Fit the layers in forward order.

        Raises:
            InputError: NaN or Inf reaches a layer.
        """
        train = program.task.train
        why = lacking(train)
        if train is None or why:
            return Rewritten(graph, [Diagnostic("warning", DiagnosticCode.NO_DATA, f"refit: {why}")])
        limit = min(len(train), samples_in_memory(graph, program.inputs, self.memory))
        judges = min(_JUDGES, max(1, limit // _JUDGE_SHARE))
        count = min(self.samples, limit - judges)
        chosen = train.shuffled(program.generator(self.name))
        graph.eval()
        if not (follows(graph, program.inputs) and follows(program.dense.eval(), program.inputs)):
            why = "refit: the network changes a value in place in a way that cannot be followed layer by layer"
            return Rewritten(graph, [Diagnostic("warning", DiagnosticCode.IN_PLACE, why)])
        parts = [range(i, min(i + self.batch, count)) for i in range(0, count, self.batch)]
        fitted = len(parts)
        parts += [range(i, min(i + self.batch, count + judges)) for i in range(count, count + judges, self.batch)]
        batches = [chosen.batch(part).inputs for part in parts]
        plan = program.facts.get(RankPlan)
        choices = plan.choices if plan else {}
        in_int8 = (plan.precision if plan else program.target.precision) == "int8"
        form = form_of(program.target) if in_int8 and all(choice.is_dense for choice in choices.values()) else None
        before = copy_graph(graph)
        streams = Stream(graph, batches, _integer_layers(graph, program), form), Stream(program.dense.eval(), batches)
        values = _Values(*streams, [len(part) for part in parts], fitted)
        history: list[Change | Diagnostic] = []
        todo = [(sweep, name, site) for sweep in range(self.sweeps) for name, site in self._sites(program).items()]
        for done, (sweep, name, site) in enumerate(todo, start=1):
            report_progress(done, len(todo), name)
            choice = choices.get(name, Candidate.dense(Cost()))
            if choice.is_dense and not self.dense:
                continue
            aim = _Aim.of(graph, program.dense, site, self.blocks)
            if isinstance(aim, Diagnostic):
                history += [aim] if sweep == 0 else []
            else:
                history.append(Change(name, self.name, self._fit(aim, choice, program, values)))
        if form is None:
            return Rewritten(graph, history)
        old, new = (_output_error(one, program, batches[fitted:], form) for one in (before, graph))
        if new < _CLEARLY * old:
            return Rewritten(graph, history)
        why = f"refit: fits to rounded inputs do not clearly lower the error of the outputs: {old:.3g} and {new:.3g}"
        return Rewritten(before, [Diagnostic("info", DiagnosticCode.NOT_REFITTED, why)])

    def _sites(self, program: Program) -> dict[str, Site]:
        """Return the dense network's layers in the order of their calls, without those that must stay dense."""
        found = sites_of(program.dense, program.inputs)
        kept = kept_dense(program.with_(graph=program.dense), found)
        return {name: site for name, site in found.items() if name not in kept}

    def _fit(self, aim: _Aim, choice: Candidate, program: Program, values: _Values) -> str:
        """Fit one layer, and judge the fit."""
        layer, affine = aim.site.layer, aim.site.layer.bias or aim.norm is not None
        fit, judge = Sums(affine), Sums(affine)
        generator = program.generator(f"refit/{aim.site.name}")
        samples = sum(values.sizes[: values.fitted])
        each = min(self.places, max(1.0, self.rows * aim.site.weight[0].numel() / samples))
        for place, (source, target, end) in enumerate(aim.read(values.ours, values.theirs)):
            if not (all_finite(source) and all_finite(target)):
                raise InputError(f"refit: NaN or Inf reaches the layer '{aim.site.name}'")
            most = math.ceil((each if place < values.fitted else self.places) * values.sizes[place])
            rows = draw_rows(layer, source, most, generator)
            x, t = patches_at(layer, source, rows), values_at(layer, target, rows)
            weights = _weights(values_at(layer, end, rows)) if layer.kind == "linear" else None
            (fit if place < values.fitted else judge).add(x, t, weights)
        told = aim.write(fit, judge, choice, self._slope(aim, fit, judge, rounds=values.ours.rounds))
        values.ours.changed(aim.chain)
        return told

    def _slope(self, aim: _Aim, fit: Sums, judge: Sums, *, rounds: bool) -> Tensor:
        """Return the fit; with few rows that of the ridge with least held-out loss.

        On rounded inputs an output takes a fit only where that is clearly better than its own weights: a calibration
        set says nothing about directions in which it does not vary.
        """
        prior = aim.site.weight.flatten(1).double()
        few = fit.rows < _PLENTY * prior.shape[1]
        ridges = _RIDGES if few else _ROUNDED_RIDGES if rounds else (1.0,)
        slopes = [fit.fit(prior, self.ridge * share) for share in ridges]
        if few:
            slopes = [min(slopes, key=lambda slope: judge.loss(slope, fit.intercept(slope)))]
        return _clearly_best([prior, *slopes], fit, judge) if rounds else slopes[0]


@dataclass(frozen=True)
class _Values:
    """The values of both networks over all batches.

    Attributes:
        ours: values of the compressed network.
        theirs: values of the dense network.
        sizes: number of samples of each batch.
        fitted: number of batches to fit to; the others judge.
    """

    ours: Stream
    theirs: Stream
    sizes: Sequence[int]
    fitted: int


@dataclass
class _Aim:
    """A layer of the compressed graph and the target of its fit.

    Attributes:
        site: the layer in the dense network.
        chain: its nodes in the compressed graph.
        source: the node in the compressed graph whose value it reads.
        ours: the node in the compressed graph whose value is fitted to the value of ``end``.
        end: the node in the dense graph whose value is the target.
        norm: the batch norm between the layer and ``ours``, if there is one.
        other: the node of the shortcut in the compressed graph, if there is one.
    """

    site: Site
    graph: fx.GraphModule
    chain: Sequence[fx.Node]
    source: fx.Node
    ours: fx.Node
    end: fx.Node
    norm: _BatchNorm | None
    other: fx.Node | None

    @classmethod
    def of(cls, graph: fx.GraphModule, dense: fx.GraphModule, site: Site, blocks: bool) -> _Aim | Diagnostic:
        """Return the fit of a layer, or the reason why it cannot be fitted."""
        name, width = site.name, site.weight[0].numel()
        chain = _chain(graph, name)
        if len(site.calls) > 1 or site.inner is not None or not chain:
            where = "called more than once" if len(site.calls) > 1 else "inside a module that could not be traced"
            return Diagnostic("info", DiagnosticCode.NOT_REFITTED, f"refit: it is {where}", name)
        if site.layer.groups > 1 or width > WIDE:
            what = f"has {site.layer.groups} groups" if site.layer.groups > 1 else f"has {width} inputs"
            return Diagnostic(
                "info",
                DiagnosticCode.NOT_REFITTED,
                f"refit: it {what}; one regression takes one group of at most {WIDE}",
                name,
            )
        ours, theirs = _behind(graph, chain[-1], blocks), _behind(dense, calls_of(dense, name)[0], blocks)
        if [end is None for end in ours] != [end is None for end in theirs]:
            return Diagnostic(
                "info",
                DiagnosticCode.NOT_REFITTED,
                "refit: what follows it is not what follows it in the dense network",
                name,
            )
        norm, source = module_at(graph, ours[1]), chain[0].args[0]
        assert isinstance(source, fx.Node)  # a call_module of one argument
        behind = norm if isinstance(norm, _BatchNorm) else None
        return cls(site, graph, chain, source, ours[0], theirs[0], behind, ours[2])

    def read(self, ours: Stream, theirs: Stream) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the layer's input, its target and the dense network's value, batch by batch.

        The target is that value with batch norm and the shortcut undone.
        """
        others = repeat(None) if self.other is None else ours.read(self.ours, self.other)
        sources = ours.read(self.chain[0], self.source)
        for source, target, other in zip(sources, theirs.values(self.end), others, strict=False):
            assert isinstance(source, Tensor)  # the input and output of a convolution or linear layer are tensors
            assert isinstance(target, Tensor)
            wanted = target - other if isinstance(other, Tensor) else target
            if self.norm is not None:
                shape = (1, -1, *[1] * (wanted.ndim - 2))
                scale, shift = _affine(self.norm)
                wanted = (wanted - shift.reshape(shape)) / scale.reshape(shape)
            yield source, wanted, target

    def write(self, sums: Sums, judge: Sums, choice: Candidate, slope: Tensor) -> str:
        """Replace the layer by its fit if that is better on held-out rows; return a text with both errors there."""
        name, dtype = self.site.name, self.site.weight.dtype
        layer = replace(self.site.layer, bias=sums.affine)
        weight = slope.reshape(layer.weight_shape).to(dtype)
        form = None if choice.is_dense else choice.decomposition
        if form is None:
            new = layer.build()
            owner(new).weight = nn.Parameter(weight)
            if sums.affine:
                owner(new).bias = nn.Parameter(sums.intercept(slope).to(dtype))
        else:
            factors = form.factorize(layer, weight, choice.ranks, Full(sums.covariances()[0], sums.rows))
            slope = form.reconstruct(layer, factors).flatten(1).double()
            new = form.build(layer, choice.ranks, factors, sums.intercept(slope).to(dtype) if sums.affine else None)
        parent, leaf = parent_of(self.graph, name)
        old = getattr(parent, leaf)
        before, after = (judge.loss(*_effective(form, layer, module)) / judge.spread for module in (old, new))
        if not after < before:
            return f"undone: held-out error of its output {before:.3g} before and {after:.3g} after"
        setattr(parent, leaf, new)
        return f"held-out error of its output {before:.3g} before and {after:.3g} after"


def _clearly_best(slopes: Sequence[Tensor], fit: Sums, judge: Sums) -> Tensor:
    """Return for each output the first map, or a later one whose held-out loss is clearly lower."""
    best, *others = slopes
    losses = judge.losses(best, fit.intercept(best))
    for slope in others:
        found = judge.losses(slope, fit.intercept(slope))
        better = found < _CLEARLY * losses
        best, losses = torch.where(better[:, None], slope, best), torch.where(better, found, losses)
    return best


def _output_error(
    graph: fx.GraphModule, program: Program, batches: Sequence[tuple[Tensor, ...]], form: QuantizedForm
) -> float:
    """Return the squared difference of a graph's outputs in int8 from the dense network's, over the latter's spread."""
    power = spread = 0.0
    outputs = []
    for one, stream in (
        (graph, Stream(graph, batches, _integer_layers(graph, program), form)),
        (program.dense, Stream(program.dense, batches)),
    ):
        (end,) = (node for node in one.graph.nodes if node.op == "output")
        values = [value for node in end.all_input_nodes for value in stream.read(end, node)]
        outputs.append([v.double() for v in values if isinstance(v, Tensor) and v.is_floating_point()])
    for ours, dense in zip(*outputs, strict=True):
        power += float((ours - dense).square().sum())
        spread += float((dense - dense.mean(0)).square().sum())
    return power / max(spread, 1e-30)


def _integer_layers(graph: fx.GraphModule, program: Program) -> list[fx.Node]:
    """Return the nodes that read rounded values in an int8 model: convolutions and linear layers not kept in float."""
    return [
        node
        for node in graph.graph.nodes
        if isinstance(module_at(graph, node), (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear))
        and not any(is_of(str(node.target), name) for name in program.keep_fp32)
    ]


def _weights(values: Tensor) -> Tensor:
    """Return the weights of rows, ``(n,)``: 1, but less for rows far longer than the median."""
    length = torch.linalg.vector_norm(values, dim=1)
    shares: Tensor = _LONG * length.median() / length.clamp_min(torch.finfo(length.dtype).tiny)
    return shares.clamp(max=1).square()


def _chain(graph: fx.GraphModule, name: str) -> list[fx.Node]:
    """Return the nodes of a layer: its own, or the nodes of its factors in order."""
    own = calls_of(graph, name)
    if own:
        return own
    nodes = [n for n in graph.graph.nodes if n.op == "call_module" and str(n.target).rpartition(".")[0] == name]
    return [n for n in nodes if str(n.target).rpartition(".")[2].isdigit()]


def _effective(form: Decomposition | None, layer: Layer, module: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the map that a module computes, ``(T, C·K)``, and its bias."""
    factors = [p.detach() for p in module.parameters() if p.ndim > 1]
    weight = factors[0] if form is None else form.reconstruct(layer, factors)
    biases = [p.detach() for p in module.parameters() if p.ndim == 1]
    return weight.flatten(1), biases[0] if biases else torch.zeros(layer.out_channels)


def _behind(graph: fx.GraphModule, node: fx.Node, blocks: bool) -> tuple[fx.Node, fx.Node | None, fx.Node | None]:
    """Return the last node before a nonlinearity, the batch norm on the way, and the shortcut's node."""
    end, norm = node, None
    follower = only_user(end)
    if isinstance(module_at(graph, follower), _BatchNorm):
        assert follower is not None
        end, norm = follower, follower
        follower = only_user(end)
    if blocks and follower is not None and follower.target in _ADDITIONS and not follower.kwargs:
        others = [a for a in follower.args if a is not end]
        if len(follower.args) == 2 and len(others) == 1 and isinstance(others[0], fx.Node):
            other = others[0]
            if not _depends(other, node):
                return follower, norm, other
    return end, norm, None


def _depends(node: fx.Node, on: fx.Node) -> bool:
    """Return whether a node's value depends on another node."""
    todo, seen = [node], {node}
    while todo:
        current = todo.pop()
        if current is on:
            return True
        new = [n for n in current.all_input_nodes if n not in seen]
        seen.update(new)
        todo += new
    return False


def _affine(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Return scale and shift of a batch norm in eval mode; ``_FAINT`` bounds the scale from below."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight
    least = _FAINT * float(scale.abs().max().clamp_min(torch.finfo(scale.dtype).tiny))
    scale = torch.where(scale.abs() < least, torch.full_like(scale, least).copysign(scale), scale)
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias
