"""Edits of ``torch.fx`` graphs: copies that share or own their tensors, replacing and dropping modules."""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import transformer
from torch.utils import _pytree as pytree

_IN_PLACE = {operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv}


def copy_graph(graph: fx.GraphModule) -> fx.GraphModule:
    """A new graph and module tree over the same tensors: a network of many gigabytes is not duplicated."""
    shared: dict[int, object] = {id(t): t for t in chain(graph.parameters(), graph.buffers())}
    return copy.deepcopy(graph, shared)


def copy_weights(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy with tensors of its own, for a pass that trains."""
    return copy.deepcopy(graph)


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


def works_in_place(node: fx.Node, module: nn.Module) -> bool:
    """Whether a node of a graph may change a tensor that it reads.

    Args:
        module: what holds the modules that the graph calls.
    """
    if node.op == "call_module":
        parts = module.get_submodule(str(node.target)).modules()
        return any(bool(getattr(part, "inplace", False)) for part in parts)
    if node.op not in ("call_function", "call_method"):
        return False
    called = getattr(node.target, "overloadpacket", node.target)  # of an ATen operator: "relu_", not "relu_.default"
    name = called if isinstance(called, str) else getattr(called, "__name__", "")
    written = name.endswith("_") and not name.endswith("__")
    return node.target in _IN_PLACE or written or bool(node.kwargs.get("inplace", False))


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


def replace_module(graph: fx.GraphModule, name: str, new: nn.Module) -> None:
    """Put a module in another's place under the same name, at every call.

    Where the graph calls the module itself and the new one is a sequence, each member becomes a node of its own,
    named ``name.0``, ``name.1``, ...; inside an untraced leaf the sequence stays one module.
    """
    nodes = [node for node in graph.graph.nodes if node.op == "call_module" and node.target == name]
    parent, leaf = parent_of(graph, name)
    old = getattr(parent, leaf)
    for other, module in list(graph.named_modules(remove_duplicate=False)):  # a shared module has several names
        if module is old:
            holder, key = parent_of(graph, other)
            setattr(holder, key, new)
    for node in nodes:
        if isinstance(new, nn.Sequential):
            _spread(graph, node, len(new))


def _spread(graph: fx.GraphModule, node: fx.Node, count: int) -> None:
    value: fx.Node = node.args[0] if node.args else next(iter(node.kwargs.values()))  # type: ignore[assignment]
    with graph.graph.inserting_before(node):
        for position in range(count):
            value = graph.graph.call_module(f"{node.target}.{position}", (value,))
    node.replace_all_uses_with(value)
    graph.graph.erase_node(node)


def calls_of(graph: fx.GraphModule, name: str) -> list[fx.Node]:
    """The nodes that call a module by this name."""
    return [node for node in graph.graph.nodes if node.op == "call_module" and node.target == name]


def module_at(graph: fx.GraphModule, node: fx.Node | object) -> nn.Module | None:
    """The module that a node calls; None where it calls none."""
    if isinstance(node, fx.Node) and node.op == "call_module":
        return graph.get_submodule(str(node.target))
    return None


def only_user(node: fx.Node) -> fx.Node | None:
    """The one node that reads this one; None where there are several or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def drop_node(graph: fx.GraphModule, node: fx.Node) -> None:
    """Take a node out, its readers reading its first argument instead, and its module where nothing else calls it."""
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]  # a call_module's first argument is a node
    graph.graph.erase_node(node)
    if node.op == "call_module" and not calls_of(graph, str(node.target)):
        graph.delete_submodule(str(node.target))


def attribute(root: object, path: str) -> object:
    """The value at a dotted path."""
    return operator.attrgetter(path)(root)
