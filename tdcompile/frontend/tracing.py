"""A module to a ``Program``: by symbolic tracing where that sees all layers, by ``torch.export`` where it does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from keyword import iskeyword
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from tdcompile.errors import FixedAxisError, InputError
from tdcompile.frontend.equivalence import (
    Case,
    isolated_copy,
    output_difference,
    record_cases,
    restoring_state,
    run_network,
)
from tdcompile.frontend.half_precision import half_dtypes, inputs_to_single_precision, to_single_precision
from tdcompile.frontend.parametrizations import without_parametrizations
from tdcompile.frontend.select import Frontend, FrontendSelector, Traced, describe_sizes
from tdcompile.frontend.signature import Call
from tdcompile.ir.diagnostics import Diagnostic, DiagnosticCode
from tdcompile.ir.dynamic_shapes import Axis, batch_of, open_axes, shares_batch
from tdcompile.ir.modules import evaluating, keep_separate, not_finite, parent_of, separate_attention
from tdcompile.ir.program import Program, sites_of

# What is said where a network pads.
_PADDING = (
    "torch's fused kernels of nn.TransformerEncoder, which run in eval mode without gradients, answer 0 where a mask "
    "says that the input is padding; the compiled model answers there as the layers do"
)
_QUANTISED = ("torch.ao.nn.quantized", "torch.nn.quantized", "torch.ao.nn.intrinsic.quantized")


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
    ``Diagnostic`` with the code ``not_traced`` in the history says why. The graph is run against the network, at
    another batch size too, before it is taken.

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
    check_is_network(module)
    call = Call.of(module, inputs)
    call = call.having([x.detach().clone() for x in call.tensors])  # a network may work in place on what it is given
    if dynamic_batch and any(b and len(x) == 1 for x, b in zip(call.tensors, shares_batch(call.tensors), strict=True)):
        call = call.having(batch_of(call.tensors, 2))
    axes = open_axes(dynamic, call.names, call.tensors)
    _check_weights(module)
    # without the fused attention kernels, which bypass the layers that they are made of
    with evaluating(module), separate_attention(), restoring_state(module):
        own = isolated_copy(module)  # a network may change as it answers
        if own is not module:
            keep_separate(own)
        plain = without_parametrizations(own)
        single = to_single_precision(plain)
        if single is plain:
            cases, changed = _record_cases(own, module, call, axes, dynamic_batch)
        else:
            cases, changed = _record_cases_in_fp32(own, single, call, axes, dynamic_batch)
            call = cases[0].call
        traced = FrontendSelector(single, call, axes, dynamic_batch, cases).choose(frontend)
        traced.graph.eval()
        if changed:
            _copy_buffers(traced.graph, {id(b) for name, b in single.named_buffers() if name in changed})
        history = [
            *_tracing_notes(traced, changed, half_dtypes(module) if single is not plain else ""),
            *(
                [Diagnostic("warning", DiagnosticCode.PADDING, _PADDING)]
                if single is own and _fused_kernels_zero_padding(isolated_copy(module), cases[0])
                else []
            ),
            *_untouched_weights(traced.graph, call.tensors),
        ]
    return Program(
        graph=traced.graph,
        inputs=call.tensors,
        dense=traced.graph,
        history=tuple(history),
        frontend=traced.frontend,
        dynamic_batch=dynamic_batch,
        axes=axes,
    )


def check_is_network(module: object) -> None:
    """A module in Python.

    Raises:
        InputError: it is TorchScript, or no module.
    """
    if isinstance(module, torch.jit.ScriptModule | torch.jit.ScriptFunction):
        raise InputError("the network is TorchScript, which torch.fx and torch.export do not take: give its nn.Module")
    if not isinstance(module, nn.Module):
        raise InputError(f"the network is a {type(module).__name__}: give an nn.Module, the built one, not its class")


def _record_cases(
    own: nn.Module, module: nn.Module, call: Call, axes: tuple[Axis, ...], dynamic_batch: bool
) -> tuple[list[Case], list[str]]:
    """What a copy of a network answers.

    Raises:
        InputError: it does not, or in two ways.
    """
    try:
        return record_cases(own, call, axes, dynamic_batch)
    except InputError as error:
        if error.__cause__ is None or isinstance(error, FixedAxisError) or own is module:
            raise
        try:
            run_network(module, call)
        except Exception:  # noqa: BLE001  # nor does the network itself
            raise error from error.__cause__
        raise InputError(
            "the network runs and a copy of it does not, so that it cannot be traced: a hook or a function of its own "
            f"holds on to the original; it says: {error}"
        ) from error


def _tracing_notes(traced: Traced, changed: Sequence[str], half: str) -> list[Diagnostic]:
    """What became of a network otherwise than its user may think."""
    told = [
        Diagnostic(
            "warning",
            DiagnosticCode.NOT_TRACED,
            f"symbolic tracing stops inside '{name or 'the network'}': {why}",
            name or None,
        )
        for name, why in traced.leaves.items()
    ]
    told += [
        Diagnostic(
            "warning",
            DiagnosticCode.UNTRIED,
            f"whether it does something else where {describe_sizes(sizes)} takes too much memory to try",
        )
        for sizes in traced.untried
    ]
    if half:
        reason = f"its weights are {half}: it is compiled in float32, which onnxruntime has kernels for"
        told.append(Diagnostic("info", DiagnosticCode.HALF_PRECISION, reason))
    if changed:
        reason = f"it changes {', '.join(changed)} as it answers: the compiled model answers as in the first calls"
        told.append(Diagnostic("warning", DiagnosticCode.STATE, reason))
    return told


def _record_cases_in_fp32(
    own: nn.Module, single: nn.Module, call: Call, axes: tuple[Axis, ...], dynamic_batch: bool
) -> tuple[list[Case], list[str]]:
    """What a network of half precision answers in float32.

    Raises:
        InputError: it does not, and does in its own precision.
    """
    try:
        return record_cases(single, call.having(inputs_to_single_precision(call.tensors)), axes, dynamic_batch)
    except InputError as error:
        record_cases(own, call, axes, dynamic_batch)  # says so where it does not run at all
        raise InputError(
            f"its weights are {half_dtypes(own)}, it is compiled in float32, and its own code makes other numbers of "
            f"what it computes: build it in float32; it says: {error}"
        ) from error


def _fused_kernels_zero_padding(module: nn.Module, case: Case) -> bool:
    """Whether torch's fused kernels answer otherwise than the layers that they stand for."""
    if case.call.tensors[0].is_meta or not any(isinstance(part, nn.TransformerEncoder) for part in module.modules()):
        return False
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(True)
    try:
        return output_difference(run_network(module, case.call), case.outputs) is not None
    except RuntimeError:  # the fused kernels do not take every mask that the layers do
        return False
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _copy_buffers(graph: fx.GraphModule, known: set[int]) -> None:
    """Give a graph copies of these buffers, which it changes as it runs: the network's stay as they are."""
    for name, buffer in list(graph.named_buffers()):
        if id(buffer) in known:
            setattr(parent_of(graph, name)[0], name.rpartition(".")[2], buffer.clone())


def _untouched_weights(graph: fx.GraphModule, inputs: tuple[Tensor, ...]) -> list[Diagnostic]:
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
                found.setdefault(_why_untouched(part, readers.get(path)), []).append(path)
    return [
        Diagnostic("info", DiagnosticCode.NO_LAYER, f"left as it is: {', '.join(names[:4])}{_more(names)}: {reason}")
        for reason, names in found.items()
    ] + [
        Diagnostic(
            "info",
            DiagnosticCode.QUANTISED,
            f"left as they are: {', '.join(quantised[:4])}{_more(quantised)}: they are quantised",
        )
        for _ in quantised[:1]
    ]


def _why_untouched(part: nn.Module, reader: fx.Node | None) -> str:
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


def _check_weights(module: nn.Module) -> None:
    lazy = next((name for name, weight in module.named_parameters() if is_lazy(weight)), None)
    if lazy is not None:
        raise InputError(f"the weight '{lazy}' has no size yet: run the network once before it is compiled")
    found = not_finite(module)
    if found is not None:
        raise InputError(f"the weight '{found[0]}' holds NaN or Inf: the checkpoint is damaged or training diverged")
    word = next((name for name, _ in module.named_modules() if any(map(iskeyword, name.split(".")))), None)
    if word is not None:
        raise InputError(f"the part '{word}' is named by a word of Python, which torch's graphs cannot hold: rename it")
