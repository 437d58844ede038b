"""``trace``: turn a module into a ``Program``, by ``torch.fx`` if it sees every layer, else by ``torch.export``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from keyword import iskeyword
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from tdcompile.errors import FixedAxisError, InputError
from tdcompile.frontend.autocast import without_autocast
from tdcompile.frontend.equivalence import (
    Case,
    isolated_copy,
    output_difference,
    record_cases,
    restoring_state,
    run_network,
)
from tdcompile.frontend.half_precision import half_dtypes, inputs_to_single_precision, to_single_precision
from tdcompile.frontend.open_axes import check_recurrent_time, entries_not_samples, find_batch_axes, prober, settle_axes
from tdcompile.frontend.parametrizations import without_parametrizations
from tdcompile.frontend.select import Frontend, FrontendSelector, Traced, describe_sizes
from tdcompile.frontend.signature import Call
from tdcompile.frontend.wrappers import unwrapped, without_compiled_parts, wrappers_of
from tdcompile.ir.diagnostics import Diagnostic, DiagnosticCode
from tdcompile.ir.dynamic_shapes import Axis, batch_of, batch_size, open_axes, read_batch_axes
from tdcompile.ir.modules import evaluating, keep_separate, not_finite, outputs_of, parent_of, separate_attention
from tdcompile.ir.program import Program, sites_of

# Text of the warning about padding masks.
_PADDING = (
    "torch's fused kernels of nn.TransformerEncoder, which run in eval mode without gradients, return 0 where a mask "
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
    batch_axis: Sequence[str] = (),
) -> Program:
    """Trace a network.

    ``torch.fx`` keeps the network's own modules; ``torch.export`` supports more Python code. ``auto`` takes the first
    if it sees every layer, and the second otherwise. A module that neither can trace (control flow on values, for
    instance) becomes a leaf of the first: its layers are still found and rewritten, and a ``Diagnostic`` with the code
    ``not_traced`` says why. The graph's outputs are compared with the network's, at another batch size too.

    The module is in eval mode during tracing, and its mode is restored. Its tensors are shared, except those of half
    precision, which become float32: passes on the program then need float32 samples (``compile`` casts them).

    Args:
        module: the network.
        inputs: example inputs: a tensor, the arguments in order, or a mapping by name; tensors may be nested.
        frontend: ``fx`` or ``export`` to force one.
        dynamic_batch: make the batch axis dynamic; a batch of 1 is then doubled, since tracing treats 1 as a constant.
        dynamic: further dynamic axes, ``NAME:AXIS``, ``NAME:AXIS=LABEL`` or ``NAME:AXIS%STEP``. Axes of one label have
            one size. If the network does not run at sizes in between, the step is found.
        batch_axis: axis of the samples in an input, ``NAME=AXIS`` or ``NAME=none``. By default it is the first axis of
            the inputs that are as long as the first one, or what is found if the network does not run along that.

    Raises:
        InputError: the network does not run on the inputs, holds NaN or Inf, fixes an axis that is to be dynamic, or
            cannot be traced by the requested front end.
    """
    check_is_network(module)
    wrappers, module = wrappers_of(module), unwrapped(module)
    call = Call.of(module, inputs)
    call = call.with_tensors([x.detach().clone() for x in call.tensors])  # a network may change its inputs in place
    if batch_axis and not dynamic_batch:
        raise InputError("a batch axis is given, and the batch is fixed: leave out --batch-axis or --no-dynamic-batch")
    batch: tuple[int | None, ...] = (None,) * len(call.tensors)
    if dynamic_batch:
        batch = read_batch_axes(batch_axis, call.names, call.tensors)
    axes = open_axes(dynamic, call.names, call.tensors, batch)
    _check_weights(module)
    # without the fused attention kernels, which bypass the layers
    with evaluating(module), separate_attention(), restoring_state(module), without_autocast() as regions:
        own = isolated_copy(module)  # a call may change the network's state
        if own is not module:
            keep_separate(without_compiled_parts(own))
        plain = without_parametrizations(own)
        single = to_single_precision(plain)
        half = call
        if single is not plain:
            call = call.with_tensors(inputs_to_single_precision(call.tensors))
        call, batch, axes, settled = _settled(single, call, (batch, axes), fixed=bool(batch_axis))
        if single is plain:
            cases, changed = _record_cases(own, module, call, axes, batch)
        else:
            cases, changed = _record_cases_in_fp32(own, single, (half, call), axes, batch)
        traced = FrontendSelector(single, call, axes, batch, cases).choose(frontend)
        traced.graph.eval()
        if changed:
            _copy_buffers(traced.graph, {id(b) for name, b in single.named_buffers() if name in changed})
        history = [
            *settled,
            *_wrapper_notes(wrappers, regions),
            *_tracing_notes(traced, changed, half_dtypes(module) if single is not plain else ""),
            *(
                [Diagnostic("warning", DiagnosticCode.PADDING, _PADDING)]
                if single is own and _fused_kernels_zero_padding(isolated_copy(module), cases[0])
                else []
            ),
            *_untouched_weights(traced.graph, call.tensors),
        ]
    if regions and traced.leaves:
        _check_without_regions(traced, cases[0])
    return Program(
        graph=traced.graph,
        inputs=call.tensors,
        dense=traced.graph,
        history=tuple(history),
        frontend=traced.frontend,
        dynamic_batch=dynamic_batch and any(axis is not None for axis in batch),
        axes=axes,
        samples_along=batch if dynamic_batch else (),
    )


def _settled(
    module: nn.Module, call: Call, given: tuple[tuple[int | None, ...], tuple[Axis, ...]], *, fixed: bool
) -> tuple[Call, tuple[int | None, ...], tuple[Axis, ...], list[Diagnostic]]:
    """Return the call with a batch of at least 2, the batch axes, the open axes, and what to tell about them.

    Args:
        module: the network.
        call: the example inputs.
        given: the batch axes and the open axes, by default or as the user gives them.
        fixed: the batch axes are those of the user.
    """
    batch, axes = given
    runs, notes = prober(module, call), list[Diagnostic]()
    if runs is not None:
        batch, notes = find_batch_axes(module, call, batch, runs, search=not fixed)
        entries = [] if fixed else entries_not_samples(call, batch, runs)
        if entries:
            batch, axes = (None,) * len(batch), (*entries, *axes)
            note = f"'{entries[0].name}' is open, and no batch: the network does not run with one entry along it"
            notes = [Diagnostic("info", DiagnosticCode.OPEN_AXES, note)]
        axes, told = settle_axes(call, axes, runs)
        notes += told
    if batch_size(call.tensors, batch) == 1:
        call = call.with_tensors(batch_of(call.tensors, 2, batch))
    check_recurrent_time(module, call, batch, axes)
    return call, batch, axes, notes


def check_is_network(module: object) -> None:
    """Check that an object is an ``nn.Module``.

    Raises:
        InputError: it is TorchScript, or not a module.
    """
    if isinstance(module, torch.jit.ScriptModule | torch.jit.ScriptFunction):
        raise InputError("the network is TorchScript, which torch.fx and torch.export do not take: give its nn.Module")
    if not isinstance(module, nn.Module):
        raise InputError(f"the network is a {type(module).__name__}: give an nn.Module, the built one, not its class")


def _record_cases(
    own: nn.Module, module: nn.Module, call: Call, axes: tuple[Axis, ...], batch: tuple[int | None, ...]
) -> tuple[list[Case], list[str]]:
    """Record the outputs of a copy of a network.

    Raises:
        InputError: the copy or the network does not run, or outputs differ between calls on equal inputs.
    """
    try:
        return record_cases(own, call, axes, batch)
    except InputError as error:
        if error.__cause__ is None or isinstance(error, FixedAxisError) or own is module:
            raise
        try:
            run_network(module, call)
        except Exception:  # noqa: BLE001  # the network itself does not run either
            raise error from error.__cause__
        raise InputError(
            "the network runs and a copy of it does not, so that it cannot be traced: a hook or a function of its own "
            f"holds on to the original; it says: {error}"
        ) from error


def _wrapper_notes(wrappers: Sequence[str], regions: set[str]) -> list[Diagnostic]:
    told = []
    if wrappers:
        reason = f"the network inside {', in '.join(reversed(wrappers))} is compiled, under the names it has there"
        told.append(Diagnostic("info", DiagnosticCode.WRAPPED, reason))
    if regions:
        reason = f"its autocast regions ({', '.join(sorted(regions))}) are compiled in float32"
        told.append(Diagnostic("info", DiagnosticCode.HALF_PRECISION, reason))
    return told


def _check_without_regions(traced: Traced, case: Case) -> None:
    """Require that modules which are called as they are have no autocast region: later passes would run it.

    Raises:
        InputError: they have one.
    """
    if output_difference(case.outputs, outputs_of(traced.graph, case.call.tensors)) is not None:
        name = next(iter(traced.leaves)) or "the network"
        raise InputError(
            f"symbolic tracing stops inside '{name}', which has an autocast region and cannot be compiled in float32: "
            "switch autocast off where the network is built"
        )


def _tracing_notes(traced: Traced, changed: Sequence[str], half: str) -> list[Diagnostic]:
    """Return notes on what a user may not expect of the traced graph."""
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
            f"not checked against the network where {describe_sizes(sizes)}: the inputs take too much memory",
        )
        for sizes in traced.untried
    ]
    if half:
        reason = f"its weights are {half}: it is compiled in float32, which onnxruntime has kernels for"
        told.append(Diagnostic("info", DiagnosticCode.HALF_PRECISION, reason))
    if changed:
        reason = f"a call changes {', '.join(changed)}: the compiled model computes what the first calls do"
        told.append(Diagnostic("warning", DiagnosticCode.STATE, reason))
    return told


def _record_cases_in_fp32(
    own: nn.Module, single: nn.Module, calls: tuple[Call, Call], axes: tuple[Axis, ...], batch: tuple[int | None, ...]
) -> tuple[list[Case], list[str]]:
    """Record the outputs of a half-precision network in float32; ``calls`` are those in half precision and in float32.

    Raises:
        InputError: it does not run in float32.
    """
    half, call = calls
    try:
        return record_cases(single, call, axes, batch)
    except InputError as error:
        record_cases(own, half, axes, batch)  # raises if it does not run at all
        raise InputError(
            f"its weights are {half_dtypes(own)}, it is compiled in float32, and its own code casts tensors to "
            f"another dtype: build it in float32; it says: {error}"
        ) from error


def _fused_kernels_zero_padding(module: nn.Module, case: Case) -> bool:
    """Return whether torch's fused kernels compute something else than the layers, on padded inputs."""
    if case.call.tensors[0].is_meta or not any(isinstance(part, nn.TransformerEncoder) for part in module.modules()):
        return False
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(True)
    try:
        return output_difference(run_network(module, case.call), case.outputs) is not None
    except RuntimeError:  # the fused kernels reject some masks that the layers accept
        return False
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _copy_buffers(graph: fx.GraphModule, known: set[int]) -> None:
    """Replace buffers that a call changes by copies, so that the network keeps its own."""
    for name, buffer in list(graph.named_buffers()):
        if id(buffer) in known:
            setattr(parent_of(graph, name)[0], name.rpartition(".")[2], buffer.clone())


def _untouched_weights(graph: fx.GraphModule, inputs: tuple[Tensor, ...]) -> list[Diagnostic]:
    """Return why weights outside convolutions and linear layers stay unchanged, one note per reason."""
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
    """Return why a weight stays unchanged, from its use."""
    target = str(getattr(reader, "target", ""))
    if isinstance(part, nn.RNNBase | nn.RNNCellBase) or any(kind in target for kind in ("lstm", "gru", "rnn")):
        return "a recurrent layer is one operator over all its steps"
    if isinstance(part, nn.Embedding | nn.EmbeddingBag) or "embedding" in target:
        return "an embedding is a lookup in a table, without products to save"
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
