"""How modules are run and looked at: outputs, hooks, attention taken apart, evaluation mode."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import transformer
from torch.utils import _pytree as pytree


def outputs_of(module: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that a network in eval mode returns for the inputs, nested ones in order; its mode is put back."""
    with evaluating(module), torch.no_grad(), separate_attention():
        # a network may work in place, and return a parameter
        return [y.detach() for y in tensors_in(module(*(x.clone() for x in inputs)))]


@contextmanager
def computed_by(forward: Callable[[Any, Tensor], Tensor], modules: Sequence[nn.Module]) -> Iterator[None]:
    """Modules that compute by a function of themselves and their input, for a while; they stay what they are."""
    for module in modules:
        module.forward = partial(forward, module)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode for a while; every part then has the mode again that it had."""
    modes = [(part, part.training) for part in module.modules()]
    with suppress(NotImplementedError):  # what torch.export gives back is in one mode for good
        module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def separate_attention() -> Iterator[None]:
    """For a while without torch's fused attention kernels, which read the weights of layers that may be replaced.

    Nor do torch's transformers look into a mask to see whether it is the causal one, which is a hint to those kernels
    and no more: what depends on the values in a mask is no graph.
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
    """Take torch's fused kernels from the transformers in a network, in place: its layers are then called one by one.

    They read ``linear1.weight``, which a layer that has taken its place may not have. Of ``nn.TransformerEncoder`` they
    set padded positions to 0, too.
    """
    for part in module.modules():
        if isinstance(part, nn.TransformerEncoder):
            part.use_nested_tensor = False
        elif isinstance(part, nn.TransformerEncoderLayer):
            part.activation_relu_or_gelu = 0


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors in a nesting of sequences, mappings, dataclasses and what torch knows as a tree, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif type(value) in pytree.SUPPORTED_NODES:
        for item in pytree.tree_leaves(value):
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))


def register_trees(value: object) -> None:
    """Make torch know the dataclasses in a nesting as trees, as ``torch.export.register_dataclass`` does."""
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
    """The first parameter or buffer with NaN or Inf, and how many values are; buffers may hold -Inf, as masks do."""
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


def called_differently(module: nn.Module) -> bool:
    """Whether calling a module does more than its class says: hooks, or a ``forward`` of its own."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def input_of(arguments: Sequence[Tensor], named: Mapping[str, Tensor]) -> Tensor:
    """What a layer is called on, as a hook with keyword arguments sees it."""
    return arguments[0] if arguments else next(iter(named.values()))


def parent_of(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds ``name`` and the last part of the name."""
    parent, _, leaf = name.rpartition(".")
    return (root.get_submodule(parent) if parent else root), leaf
