"""Where an int8 model rounds a weight: by the operator that reads it, since one weight may be read float elsewhere."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from tdcompile.backend.quantize import stored_values
from tdcompile.errors import TdcompileError
from tdcompile.ir.modules import parent_of

# Functions that read rows of a table, which stays float.
_LOOKUPS = (
    functional.embedding,
    functional.embedding_bag,
    torch.embedding,
    torch.ops.aten.embedding.default,
    torch.ops.aten._embedding_bag.default,
)
_APART = "weight_apart"  # begins the names of tensors that nodes read apart from others


class UnmatchedError(TdcompileError):
    """A tensor or weight that is quantised in the ONNX model has no counterpart in the PyTorch graph."""


@dataclass(frozen=True)
class WeightUse:
    """A stored float tensor that an operator of the float model reads.

    Attributes:
        module: the module that the operator belongs to; empty for the network itself.
        name: of the tensor in the float model.
        values: in the float model.
        rounded: what the same operator reads in the int8 model; None if the values are equal.
        only: whether no other operator reads the tensor of this name.
        operator: the ONNX operator.
    """

    module: str
    name: str
    values: Tensor
    rounded: Tensor | None
    only: bool
    operator: str

    def among(self, places: Sequence[str]) -> list[str]:
        """Return those of the names of equal parameters that the operator may read: its own name, or its module's."""
        inside = [place for place in places if self.module and place.startswith(f"{self.module}.")]
        named = self.only and self.name in (inside if self.module else places)
        return [self.name] if named else inside


def weight_uses(floats: onnx.ModelProto, integers: onnx.ModelProto) -> Iterator[WeightUse]:
    """Yield the stored float tensors of a float model, once for each operator that reads them."""
    after = stored_values(integers)
    before = {name: torch.from_numpy(value.copy()) for name, value in stored_values(floats).items()}
    readers = {node.name: node for node in integers.graph.node}
    count = Counter(name for node in floats.graph.node for name in node.input)
    for node in floats.graph.node:
        reader = readers.get(node.name)
        if reader is None:
            continue
        for name, other in zip(node.input, reader.input, strict=False):
            if name in before:
                new = torch.from_numpy(after[other].copy()) if other in after else before[name]
                rounded = None if torch.equal(new, before[name]) else new
                module = node.name.rpartition("/")[0]
                yield WeightUse(module, name, before[name], rounded, count[name] == 1, node.op_type)


def oriented(own: Tensor, original: Tensor, value: Tensor) -> Tensor | None:
    """Return the value in the shape of a parameter, if the original is that parameter or its transpose; else None."""
    if own.shape == original.shape and torch.equal(own, original):
        return value
    if own.dim() == original.dim() == 2 and own.shape == original.T.shape and torch.equal(own, original.T):
        return value.T
    if own.numel() == original.numel() and torch.equal(own.reshape(-1), original.reshape(-1)):
        return value.reshape(own.shape)
    return None


def round_weights(graph: fx.GraphModule, floats: onnx.ModelProto, integers: onnx.ModelProto) -> None:
    """Give a graph, in place, the weights and biases that the operators of an int8 model read.

    A tensor that is rounded for some of its readers only is untied: they get a parameter of their own.

    Raises:
        UnmatchedError: a weight of the model is not a parameter or buffer of the graph, or the module that reads it
            reads it float too.
    """
    own = {name: value for name, value in tensors_of(graph).items() if value.is_floating_point()}
    originals = {name: value.detach().clone() for name, value in own.items()}
    alike: dict[tuple[str, ...], list[WeightUse]] = {}
    for use in weight_uses(floats, integers):
        places = tuple(equal_tensors(originals, use.values))
        if not places and use.rounded is not None:
            raise UnmatchedError(f"the weight '{use.name}' of the int8 model is not a parameter of the PyTorch graph")
        alike.setdefault(places, []).append(use)
    for places, uses in alike.items():
        made = [(use, _placed(originals[places[0]], use)) for use in uses if use.rounded is not None]
        if made and len(made) == len(uses) and all(torch.equal(value, made[0][1]) for _, value in made):
            for place in places:
                own[place].data.copy_(_placed(originals[place], made[0][0]))
        elif made:
            _round_some(graph, originals, places, uses)


def equal_tensors(own: Mapping[str, Tensor], values: Tensor) -> list[str]:
    """Return the names of the tensors that have these values, as they are, transposed or in another shape."""
    return [name for name, value in own.items() if oriented(value.detach(), values, values) is not None]


def tensors_of(graph: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers under all their names."""
    return dict((*graph.named_parameters(remove_duplicate=False), *graph.named_buffers(remove_duplicate=False)))


def _placed(own: Tensor, use: WeightUse) -> Tensor:
    assert use.rounded is not None
    value = oriented(own, use.values, use.rounded)
    assert value is not None
    return value


def _round_some(
    graph: fx.GraphModule, originals: Mapping[str, Tensor], places: Sequence[str], uses: Sequence[WeightUse]
) -> None:
    """Round equal tensors at the places where they are read rounded."""
    floats = [use for use in uses if use.rounded is None]
    kept = {place for use in floats for place in use.among(places)}
    done: set[str] = set()  # a module that is called twice has two biases, which differ by less than a step
    for use in uses:
        if use.rounded is None:
            continue
        found = use.among(places)
        if both := kept & set(found):
            raise UnmatchedError(f"the module '{use.module}' reads the weight '{min(both)}' both float and rounded")
        if not found and not done.issuperset(places):
            found = [*places]
            if not _round_reads(graph, places, use, originals):
                if floats:
                    raise UnmatchedError(f"the PyTorch graph does not tell where the weight '{use.name}' is rounded")
                for place in places:
                    _replace(graph, place, _placed(originals[place], use))
        else:
            for place in set(found) - done:
                _replace(graph, place, _placed(originals[place], use))
        done |= set(found)


def _round_reads(graph: fx.GraphModule, places: Sequence[str], use: WeightUse, originals: Mapping[str, Tensor]) -> bool:
    """Round a tensor where the graph itself reads it, except for rows of a table; return whether it does."""
    read = [node for node in graph.graph.nodes if node.op == "get_attr" and node.target in places]
    readers = {node: users for node in read if (users := [user for user in node.users if not _looks_up(user)])}
    for node, users in readers.items():
        _retarget(graph, node, users, _placed(originals[str(node.target)], use).clone())
    return bool(readers)


def _replace(graph: fx.GraphModule, place: str, value: Tensor) -> None:
    """Put a tensor of its own at a place, so that other names of the old one and rows of a table keep theirs."""
    keep_lookups(graph, place)
    layer, name = parent_of(graph, place)
    value = value.clone()
    setattr(layer, name, nn.Parameter(value, requires_grad=False) if name in layer._parameters else value)


def keep_lookups(graph: fx.GraphModule, place: str) -> None:
    """Give the nodes of a graph that read rows of a table the tensor under another name, if they read it at a place."""
    for node in [node for node in graph.graph.nodes if node.op == "get_attr" and node.target == place]:
        users = [user for user in node.users if _looks_up(user)]
        if users:
            layer, leaf = parent_of(graph, place)
            _retarget(graph, node, users, getattr(layer, leaf))


def _looks_up(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in _LOOKUPS


def _retarget(graph: fx.GraphModule, node: fx.Node, users: Sequence[fx.Node], value: Tensor) -> None:
    """Let users of a ``get_attr`` node read a tensor that has another name."""
    name = next(name for i in itertools.count() if not hasattr(graph, name := f"{_APART}_{i}"))
    if isinstance(value, nn.Parameter):
        graph.register_parameter(name, value)
    else:
        graph.register_buffer(name, value)
    with graph.graph.inserting_before(node):
        made = graph.graph.get_attr(name)
    for user in users:
        user.replace_input_with(node, made)
    graph.recompile()
