"""How much a network itself amplifies rounding: its outputs in fp32 against fp64, and the node where they part."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from tdcompile.ir.modules import outputs_of

# Relative difference of a node's values in fp32 and fp64 above which they have parted. Rounding alone is about 1e-6;
# a model may differ from its network by this much of the output's scale (``parity.TOLERANCE``).
PARTED = 1e-3


@dataclass(frozen=True)
class Parting:
    """Where fp32 and fp64 part.

    Attributes:
        node: the name of the layer or of the graph's node; None if they agree everywhere.
        before: largest relative difference of any node before it.
        after: relative difference at the node; the largest of all nodes if they agree everywhere.
    """

    node: str | None
    before: float
    after: float

    def __str__(self) -> str:
        if self.node is None:
            return f"fp32 and fp64 agree to {self.after:.2g} of the scale at every node of the PyTorch graph"
        return (
            f"fp32 and fp64 of the PyTorch graph part at '{self.node}': {self.after:.2g} of the scale, "
            f"{self.before:.2g} before it"
        )


@torch.no_grad()
def own_deviation(network: nn.Module, inputs: Sequence[Tensor], output: int) -> float | None:
    """Return the largest difference of an output in fp32 and in fp64; None if the network does not run in fp64.

    Args:
        network: the network in eval mode, in fp32; it is copied.
        inputs: its inputs in order.
        output: index of the output.
    """
    try:
        single = outputs_of(network, [x.clone() for x in inputs])[output]
        double = outputs_of(in_double(network), [_widened(x) for x in inputs])[output]
        if single.shape != double.shape or not single.is_floating_point():
            return None
        found = (single.double() - double.double())[torch.isfinite(double)]
    except Exception:  # noqa: BLE001  # a network's own code may insist on fp32, or memory may not suffice
        return None
    return float(found.abs().max()) if found.numel() else None


@torch.no_grad()
def first_parting(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Parting | None:
    """Run a graph in fp32 and fp64 side by side; return the first node where they part, or None if fp64 does not run.

    Args:
        graph: the graph in eval mode, in fp32; it is copied.
        inputs: its inputs in order.
    """
    before = 0.0
    try:
        doubled = in_double(graph)
        assert isinstance(doubled, fx.GraphModule)  # a copy has the class of the original
        single, double = fx.Interpreter(graph), fx.Interpreter(doubled)
        single.args_iter, double.args_iter = (iter([x.clone() for x in inputs]), iter([_widened(x) for x in inputs]))
        twins = {node.name: node for node in doubled.graph.nodes}
        for node in graph.graph.nodes:
            if node.op == "output":
                break
            if node.name not in twins:  # a check of dtypes, which is left out in fp64
                continue
            ours, theirs = single.run_node(node), double.run_node(twins[node.name])
            single.env[node], double.env[twins[node.name]] = ours, theirs
            found = _relative(ours, theirs)
            if found > PARTED:
                return Parting(str(node.target) if node.op == "call_module" else node.name, before, found)
            before = max(before, found)
            for interpreter, own in ((single, node), (double, twins[node.name])):
                for gone in interpreter.user_to_last_uses.get(own, []):
                    interpreter.env.pop(gone, None)
    except Exception:  # noqa: BLE001  # as above
        return None
    return Parting(None, before, before)


def in_double(network: nn.Module) -> nn.Module:
    """Return a copy of a network in fp64; conversions to fp32 in its graph become conversions to fp64."""
    copied = copy.deepcopy(network).double()
    for part in copied.modules():
        for key, value in vars(part).items():
            if isinstance(value, Tensor):
                vars(part)[key] = _widened(value)
        if isinstance(part, fx.GraphModule):
            _widen_casts(part)
    return copied


def _widen_casts(graph: fx.GraphModule) -> None:
    for node in list(graph.graph.nodes):
        if "_assert_tensor_metadata" in str(node.target):
            graph.graph.erase_node(node)
            continue
        node.args, node.kwargs = map_aggregate(node.args, _widened_dtype), map_aggregate(node.kwargs, _widened_dtype)
        if node.op == "call_method" and node.target == "float":
            node.target = "double"
    graph.recompile()


def _widened_dtype(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def _widened(x: Tensor) -> Tensor:
    return x.detach().double() if x.is_floating_point() else x.detach().clone()


def _relative(ours: Any, theirs: Any) -> float:
    """Return the largest difference of the tensors in two values, relative to the second's largest value."""
    most = 0.0
    for a, b in zip(pytree.tree_leaves(ours), pytree.tree_leaves(theirs), strict=True):
        if not isinstance(a, Tensor) or not a.is_floating_point() or a.shape != b.shape or not a.numel():
            continue
        finite = torch.isfinite(a) & torch.isfinite(b)
        wide = b.double().where(finite, 0.0)
        scale = float(wide.abs().max())
        most = max(most, float((a.double().where(finite, 0.0) - wide).abs().max()) / scale if scale else 0.0)
    return most
