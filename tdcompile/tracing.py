"""A module to a ``Program``: by symbolic tracing where that sees all layers, by ``torch.export`` where it does not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from keyword import iskeyword
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from tdcompile.errors import FixedAxisError, InputError, UntraceableError
from tdcompile.exported import exported
from tdcompile.functional import modularise
from tdcompile.layer import Refusal
from tdcompile.precision import half_kinds, in_single, inputs_in_single
from tdcompile.program import Program, sites_of
from tdcompile.signature import BATCH, Axis, Call, batch_of, open_axes, resized, shares_batch, sized
from tdcompile.surgery import evaluating, not_finite, register_trees, separate_attention, tensors_in
from tdcompile.symbolic import symbolic
from tdcompile.unparametrised import unparametrised

Frontend = Literal["auto", "fx", "export"]

# How far a graph's outputs may be from the network's, of the largest: the same operators in the same order leave
# rounding alone, and that of a few more or fewer bits where a layer is computed by another kernel.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Batches at which a graph is held against its network, beside that of the example and the next.
_BATCHES = (1, 8)
_QUANTISED = ("torch.ao.nn.quantized", "torch.nn.quantized", "torch.ao.nn.intrinsic.quantized")
# Layers without a form here, which no front end opens: what is not seen in them is not missed.
_CLOSED = (nn.RNNBase, nn.RNNCellBase, nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True)
class _Traced:
    graph: fx.GraphModule
    leaves: Mapping[str, str]
    frontend: Literal["fx", "export"]


def trace(
    module: nn.Module,
    inputs: Sequence[Any] | Mapping[str, Any] | Tensor,
    *,
    frontend: Frontend = "auto",
    dynamic_batch: bool = True,
    dynamic: Sequence[str] = (),
) -> Program:
    """Trace a network.

    ``torch.fx`` keeps the network's own modules; ``torch.export`` passes through more of what Python can write. With
    ``auto`` the first is taken where it sees every layer, the second where it does not. What neither passes through
    (control flow on values, say) becomes a leaf of the first: its own layers are still found and rewritten, and a
    ``Refusal`` with the code ``not_traced`` in the history says why. The graph is run against the network, at another
    batch size too, before it is taken.

    The module is put into eval mode for tracing and put back; its tensors are shared, not copied, but for those of
    half precision, which become float32: passes run on the program then want samples in float32 (``compile`` sees
    to that itself).

    Args:
        module: the network.
        inputs: example inputs: a tensor, the arguments in order, or a mapping by name; tensors may stand inside them.
        frontend: ``fx`` or ``export`` to force one.
        dynamic_batch: leave the batch axis open; a batch of 1 is then doubled, because tracing takes 1 for a constant.
        dynamic: other axes to leave open, ``NAME:AXIS`` or ``NAME:AXIS=LABEL``.

    Raises:
        InputError: the network does not run on these inputs, holds NaN or Inf, fixes an axis that is to stay open, or
            the front end that was asked for cannot trace it.
    """
    call = Call.of(module, inputs)
    call = call.having([x.detach().clone() for x in call.tensors])  # a network may work in place on what it is given
    if dynamic_batch and any(batched and len(x) == 1 for x, batched in _batched(call)):
        call = call.having(batch_of(call.tensors, 2))
    axes = open_axes(dynamic, call.names, call.tensors)
    lazy = next((name for name, weight in module.named_parameters() if is_lazy(weight)), None)
    if lazy is not None:
        raise InputError(f"the weight '{lazy}' has no size yet: run the network once before it is compiled")
    _check_weights(module)
    word = next((name for name, _ in module.named_modules() if any(map(iskeyword, name.split(".")))), None)
    if word is not None:
        raise InputError(f"the part '{word}' is named by a word of Python, which torch's graphs cannot hold: rename it")
    # without the fused attention kernels, which bypass the layers that they are made of
    with evaluating(module), separate_attention():
        plain = unparametrised(module)
        single = in_single(plain)
        if single is not plain:
            call = call.having(inputs_in_single(call.tensors))
        cases = _cases(single if single is not plain else module, call, axes, dynamic_batch)
        traced = _Fronts(single, call, axes, dynamic_batch, cases).choose(frontend)
    history = [
        Refusal(name, "not_traced", f"symbolic tracing stops inside '{name or 'the network'}': {why}")
        for name, why in traced.leaves.items()
    ]
    if single is not plain:
        reason = f"its weights are {half_kinds(module)}: it is compiled in float32, which onnxruntime has kernels for"
        history.append(Refusal("", "half_precision", reason))
    traced.graph.eval()
    history += _left(traced.graph, call.tensors)
    return Program(
        graph=traced.graph,
        inputs=call.tensors,
        dense=traced.graph,
        history=tuple(history),
        frontend=traced.frontend,
        dynamic_batch=dynamic_batch,
        axes=axes,
    )


@dataclass(frozen=True)
class _Case:
    """Inputs, and what the network answers to them."""

    what: str
    call: Call
    outputs: list[Tensor]


@dataclass(frozen=True)
class _Fronts:
    """The front ends, tried on one network."""

    module: nn.Module
    call: Call
    axes: tuple[Axis, ...]
    dynamic_batch: bool
    cases: Sequence[_Case]

    def choose(self, frontend: Frontend) -> _Traced:
        if frontend != "auto":
            return self._fx() if frontend == "fx" else self._export()
        refused: dict[str, InputError] = {}
        found = self._tried(self._fx, refused)
        if found is not None and not found.leaves and not _hidden(found.graph, self.call.tensors):
            return found
        other = self._tried(self._export, refused)
        fixed = next((error for error in refused.values() if isinstance(error, FixedAxisError)), None)
        if other is not None:
            return other
        if found is not None and (fixed is None or not found.leaves):
            return found
        if fixed is not None:
            raise fixed
        said = "; ".join(f"{name}: {error}" for name, error in refused.items())
        raise UntraceableError(f"neither front end can trace the network ({said})")

    def _tried(self, front: Callable[[], _Traced], refused: dict[str, InputError]) -> _Traced | None:
        try:
            return front()
        except (UntraceableError, FixedAxisError) as error:
            refused[front.__name__.strip("_")] = error
            return None

    def _fx(self) -> _Traced:
        graph, leaves = symbolic(_apart(self.module), self.call)
        return self._at_other_batches(self._checked(_Traced(graph, leaves, "fx")))

    def _export(self) -> _Traced:
        graph, sizes = exported(_apart(self.module), self.call, dynamic_batch=self.dynamic_batch, axes=self.axes)
        traced = self._checked(_Traced(graph, {}, "export"))
        for name, (least, largest) in sizes.items():
            for size in (least - 1 if least > 2 else None, largest + 1 if largest is not None else None):
                if size is not None and not self.call.tensors[0].is_meta:
                    self._goes_on(traced.graph, name, size)
        return self._at_other_batches(traced)

    def _at_other_batches(self, traced: _Traced) -> _Traced:
        """A batch of one is a constant to torch, and a network may go another way at it, or at some round number."""
        if self.dynamic_batch and any(shares_batch(self.call.tensors)) and not self.call.tensors[0].is_meta:
            for size in _BATCHES:
                self._goes_on(traced.graph, BATCH, size)
        return traced

    def _goes_on(self, graph: fx.GraphModule, name: str, size: int) -> None:
        """Try the first size at which a branch in the network was seen to go another way.

        Raises:
            FixedAxisError: the network takes that size, and the graph gives something else.
        """
        own = [axis for axis in self.axes if axis.name == name]
        other = self.call.having(
            batch_of(self.call.tensors, size) if name == BATCH else sized(self.call.tensors, own, size)
        )
        try:
            expected = _answer(self.module, other)
        except Exception:  # noqa: BLE001  # a size that the network itself does not take
            return
        try:
            with torch.no_grad():
                wrong = _difference(expected, list(tensors_in(graph(*(x.clone() for x in other.tensors)))))
        except Exception as error:  # noqa: BLE001  # as above: a graph fails in any way
            wrong = _first(error)
        if wrong is not None:
            what = "the batch" if name == BATCH else f"the axis '{name}'"
            instead = "--no-dynamic-batch" if name == BATCH else "no --dynamic for it"
            raise FixedAxisError(
                f"the network does something else where {what} is {size} than where it is as in the example, so that "
                f"axis cannot stay open: give {instead}"
            )

    def _checked(self, traced: _Traced) -> _Traced:
        """The graph with its layers as modules, which answers like the network.

        Raises:
            UntraceableError: it does not.
        """
        modularise(traced.graph)
        traced.graph.eval()
        for case in self.cases:
            try:
                with torch.no_grad():
                    got = list(tensors_in(traced.graph(*(x.clone() for x in case.call.tensors))))
            except Exception as error:  # a graph that took an input's size for a constant fails in any way
                raise UntraceableError(f"its graph does not run {case.what}: {_first(error)}") from error
            wrong = _difference(case.outputs, got)
            if wrong is not None:
                self._random(case)
                raise UntraceableError(f"its graph does not compute what the network computes {case.what}: {wrong}")
        return traced

    def _random(self, case: _Case) -> None:
        again = _answer(self.module, case.call)
        if _difference(case.outputs, again) is not None:
            raise InputError(
                "the network gives different answers to the same inputs in eval mode: it draws random numbers, and a "
                "compiled model cannot be checked against it; turn that off where the network is built"
            )


def _cases(module: nn.Module, call: Call, axes: Sequence[Axis], dynamic_batch: bool) -> list[_Case]:
    """The network's answers to the example inputs, and to others of every size that is to stay open.

    Raises:
        InputError: the network does not run on the inputs.
        FixedAxisError: it does, but not on another size.
    """
    try:
        cases = [_Case("on the example inputs", call, _answer(module, call))]
    except InputError:
        raise
    except Exception as error:  # whatever the network's own code raises
        raise InputError(f"the network does not run on an input of {_shapes(call)}: {_first(error)}") from error
    others = []
    if dynamic_batch and any(shares_batch(call.tensors)):
        size = next(len(x) for x, batched in _batched(call) if batched)
        others.append((f"at a batch of {size + 1}", batch_of(call.tensors, size + 1), "--no-dynamic-batch"))
    if axes:
        names = ", ".join(dict.fromkeys(axis.name for axis in axes))
        others.append((f"with {names} one longer", resized(call.tensors, axes, 1), "no --dynamic for it"))
    for what, tensors, instead in others:
        if not cases[0].call.tensors[0].is_meta:
            other = call.having(tensors)
            try:
                cases.append(_Case(what, other, _answer(module, other)))
            except Exception as error:
                raise FixedAxisError(
                    f"the network runs on an input of {_shapes(call)} and not {what}, so that axis cannot stay open: "
                    f"give {instead}; it says: {_first(error)}"
                ) from error
    return cases


@torch.no_grad()
def _answer(module: nn.Module, call: Call) -> list[Tensor]:
    args, kwargs = call.split([x.clone() for x in call.tensors])  # a network may work in place
    output = module(*args, **kwargs)
    plain = next((leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, int | float | str)), None)
    if plain is not None:
        raise InputError(
            f"among what the network returns is {plain!r}, and an ONNX model returns tensors alone: return it as a "
            "tensor, or leave it out"
        )
    register_trees(output)  # torch.export asks for it
    return list(tensors_in(output))


def _difference(expected: Sequence[Tensor], got: Sequence[Tensor]) -> str | None:
    """What is wrong with a graph's outputs, in a few words; None where nothing is."""
    if len(expected) != len(got):
        return f"{len(got)} outputs for {len(expected)}"
    for place, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            return f"output {place} is {tuple(ours.shape)} {ours.dtype} for {tuple(theirs.shape)} {theirs.dtype}"
        if ours.is_meta or not ours.numel():
            continue
        a, b = ours.detach().double(), theirs.detach().double()
        finite = torch.isfinite(b)
        scale = float(b[finite].abs().max()) if bool(finite.any()) else 0.0
        most = float((a - b)[finite].abs().max()) if bool(finite.any()) else 0.0
        same = bool(((a == b) | (a.isnan() & b.isnan()))[~finite].all())
        if not same or not most <= _TOLERANCE.get(theirs.dtype, 0.0) * max(scale, 1e-3):
            return f"output {place} differs by {most:.3g} on a scale of {scale:.3g}"
    return None


def _hidden(graph: fx.GraphModule, inputs: tuple[Tensor, ...]) -> list[str]:
    """Weights in the graph's leaves that no layer of it has: of attention as one module, of a parametrised layer."""
    known = {id(site.module.weight) for site in sites_of(graph, inputs).values()}
    found = []
    for node in graph.graph.nodes:
        if node.op == "call_module" and (leaf := graph.get_submodule(str(node.target))) is not None:
            found += [
                f"{node.target}.{name}"
                for name, part in leaf.named_modules()
                if not isinstance(part, _CLOSED)
                for weight in part.parameters(recurse=False)
                if weight.dim() > 1 and id(weight) not in known
            ]
    return found


def _left(graph: fx.GraphModule, inputs: tuple[Tensor, ...]) -> list[Refusal]:
    """Why weights that are in no convolution or linear layer are left alone, one entry for each reason."""
    known = {id(site.module.weight) for site in sites_of(graph, inputs).values()}
    readers = {str(n.target): next(iter(n.users), n) for n in graph.graph.nodes if n.op == "get_attr"}
    found: dict[str, list[str]] = {}
    quantised = [name for name, part in graph.named_modules() if type(part).__module__.startswith(_QUANTISED)]
    for name, part in graph.named_modules():
        for key, weight in part.named_parameters(recurse=False):
            if weight.dim() > 1 and id(weight) not in known:
                path = f"{name}.{key}" if name else key
                known.add(id(weight))
                found.setdefault(_use(part, readers.get(path)), []).append(path)
    return [
        Refusal("", "no_layer", f"left as it is: {', '.join(names[:4])}{_more(names)}: {reason}")
        for reason, names in found.items()
    ] + [
        Refusal("", "quantised", f"left as they are: {', '.join(quantised[:4])}{_more(quantised)}: they are quantised")
        for _ in quantised[:1]
    ]


def _use(part: nn.Module, reader: fx.Node | None) -> str:
    """What a weight is for."""
    target = str(getattr(reader, "target", ""))
    if isinstance(part, nn.RNNBase | nn.RNNCellBase) or any(kind in target for kind in ("lstm", "gru", "rnn")):
        return "a recurrent layer is one operator that goes through its steps by itself"
    if isinstance(part, nn.Embedding | nn.EmbeddingBag) or "embedding" in target:
        return "a table that is looked up computes nothing"
    if isinstance(part, nn.MultiheadAttention):
        return "symbolic tracing takes attention for one operator; --frontend export sees its projections"
    if isinstance(part, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return "a transposed convolution is rewritten where the graph itself calls it, with its input alone"
    what = target if reader is not None and reader.op != "get_attr" else type(part).__name__
    return f"{what} is neither a convolution nor a linear layer on a weight of its own"


def _more(names: Sequence[str]) -> str:
    return f" and {len(names) - 4} more" if len(names) > 4 else ""


def _apart(module: nn.Module) -> nn.Module:
    """A copy over the same tensors: what a network keeps while it is traced, in a cache say, is no use afterwards."""
    try:
        return copy.deepcopy(module, {id(t): t for t in (*module.parameters(), *module.buffers())})
    except Exception:  # noqa: BLE001  # a network may hold anything, and what cannot be copied is traced itself
        return module


def _batched(call: Call) -> list[tuple[Tensor, bool]]:
    return list(zip(call.tensors, shares_batch(call.tensors), strict=True))


def _shapes(call: Call) -> str:
    return ", ".join(f"{'x'.join(map(str, x.shape))}:{str(x.dtype).removeprefix('torch.')}" for x in call.tensors)


def _first(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _check_weights(module: nn.Module) -> None:
    found = not_finite(module)
    if found is not None:
        raise InputError(f"the weight '{found[0]}' holds NaN or Inf: the checkpoint is damaged or training diverged")
