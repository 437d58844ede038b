"""Run and inspect modules: outputs, hooks, evaluation mode, attention without fused kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import transformer
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from tdcompile.data.nesting import tensors_in


def outputs_of(module: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Run a network in eval mode, restore its mode, and return the tensors of its output in order."""
    with evaluating(module), torch.no_grad(), separate_attention():
        # clone: a network may change its input; detach: it may return a parameter
        return [y.detach() for y in tensors_in(module(*(x.clone() for x in inputs)))]


@contextmanager
def computed_by(forward: Callable[[Any, Tensor], Tensor], modules: Sequence[nn.Module]) -> Iterator[None]:
    """Replace the ``forward`` of modules by a function of the module and its input inside the context."""
    for module in modules:
        module.forward = partial(forward, module)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Set eval mode inside the context and restore the mode of every submodule after it."""
    modes = [(part, part.training) for part in module.modules()]
    with suppress(NotImplementedError):  # a module from torch.export cannot change its mode
        module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def separate_attention() -> Iterator[None]:
    """Disable torch's fused attention kernels inside the context.

    The kernels read the weights of layers that may be replaced. Mask inspection is disabled too: it depends on data and
    cannot be traced, and its result is only a hint to those kernels.
    """
    fused, looks = torch.backends.mha.get_fastpath_enabled(), transformer._detect_is_causal_mask
    torch.backends.mha.set_fastpath_enabled(False)
    transformer._detect_is_causal_mask = _as_told
    try:
        yield
    finally:
        transformer._detect_is_causal_mask = looks
        torch.backends.mha.set_fastpath_enabled(fused)


def _as_told(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
    return bool(is_causal)


def keep_separate(module: nn.Module) -> None:
    """Disable the fused kernels of the transformers in a network, in place, so that each layer is called.

    The kernels read ``linear1.weight``, which a replaced layer may not have. In ``nn.TransformerEncoder`` they also set
    padded positions to 0.
    """
    for part in module.modules():
        if isinstance(part, nn.TransformerEncoder):
            part.use_nested_tensor = False
        elif isinstance(part, nn.TransformerEncoderLayer):
            part.activation_relu_or_gelu = 0


def output_names(value: object) -> list[str]:
    """Return a name for each tensor of an output: the keys of mappings and dataclasses, else ``output_0``, ...

    The exported model has the same names, unless one is that of an input.
    """
    if isinstance(value, Tensor):
        return ["output"]
    named = isinstance(value, Mapping) or (dataclasses.is_dataclass(value) and not isinstance(value, type))
    if named:
        return list(_keys(value, ""))
    return [f"output_{place}" for place in range(sum(1 for _ in tensors_in(value)))]


def _keys(value: object, prefix: str) -> Iterator[str]:
    """Yield the path of keys to each tensor, joined by ``_``."""
    if isinstance(value, Tensor):
        yield prefix
        return
    if isinstance(value, Mapping):
        items: Iterable[tuple[object, object]] = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    elif dataclasses.is_dataclass(value):
        items = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    else:
        return
    for key, item in items:
        yield from _keys(item, f"{prefix}_{key}" if prefix else str(key))


def register_trees(value: object) -> None:
    """Register all nested dataclasses by ``torch.export.register_dataclass``."""
    if isinstance(value, Tensor | str) or (type(value) in pytree.SUPPORTED_NODES and dataclasses.is_dataclass(value)):
        return
    if isinstance(value, Mapping):
        inside: Iterable[object] = value.values()
    elif isinstance(value, list | tuple):
        inside = value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        torch.export.register_dataclass(type(value))
        inside = [getattr(value, field.name) for field in dataclasses.fields(value)]
    else:
        return
    for part in inside:
        register_trees(part)


def not_finite(module: nn.Module) -> tuple[str, int] | None:
    """Return the first parameter or buffer with NaN or Inf and the number of such values.

    Buffers may contain -Inf, because masks do.
    """
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        if not value.is_floating_point() or value.is_meta:
            continue
        bad = ~torch.isfinite(value.detach())
        if name not in parameters:
            bad &= ~torch.isneginf(value.detach())
        if bad.any():
            return name, int(bad.sum())
    return None


def trained_norms(module: nn.Module) -> list[_BatchNorm]:
    """Return the batch-norm layers whose running statistics have seen data, in the order of the module tree."""
    return [part for part in module.modules() if isinstance(part, _BatchNorm) and _is_trained(part)]


def _is_trained(norm: _BatchNorm) -> bool:
    mean, variance = norm.running_mean, norm.running_var
    return mean is not None and variance is not None and (bool(mean.any()) or bool((variance != 1).any()))


def called_differently(module: nn.Module) -> bool:
    """Return whether a module has hooks or its own ``forward``, so that a call does more than its class defines."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def input_of(arguments: Sequence[Tensor], named: Mapping[str, Tensor]) -> Tensor:
    """Return the input of a layer from the arguments that a hook with keyword arguments gets."""
    return arguments[0] if arguments else next(iter(named.values()))


def parent_of(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that contains ``name``, and the last part of the name."""
    parent, _, leaf = name.rpartition(".")
    return (root.get_submodule(parent) if parent else root), leaf
