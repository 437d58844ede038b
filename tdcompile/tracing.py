"""A module to a ``Program``: symbolic tracing, untraceable parts as leaves, functional layers turned into modules."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tdcompile.errors import InputError
from tdcompile.layer import Refusal, unset
from tdcompile.program import Program, sites_of
from tdcompile.surgery import attribute


class _Tracer(fx.Tracer):
    """Symbolic tracing in which some sub-modules are taken as they are."""

    def __init__(self, leaves: Mapping[str, str]) -> None:
        super().__init__()
        self.leaves = leaves
        self.stack: list[str] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """torch.nn's own modules except containers, and what an earlier attempt could not trace."""
        return module_qualified_name in self.leaves or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward, args, kwargs):  # type: ignore[no-untyped-def]  # fx's own signature
        """Keep the stack of modules while an error may be raised in them."""
        self.stack.append(self.path_of_module(m))
        result = super().call_module(m, forward, args, kwargs)
        self.stack.pop()
        return result


def trace(module: nn.Module, inputs: Sequence[Tensor]) -> Program:
    """Trace a network.

    A sub-module that symbolic tracing cannot pass through (control flow on values, say) becomes a leaf: its own layers
    are still found and rewritten, and a ``Refusal`` with the code ``not_traced`` in the history says why.
    The module is put into eval mode for tracing and put back; its tensors are shared, not copied.

    Args:
        module: the network.
        inputs: example inputs in the order of ``forward``'s arguments; a batch of 1 is doubled.

    Raises:
        InputError: the network does not run on these inputs, or holds NaN or Inf.
    """
    inputs = tuple(_batched(x) for x in inputs)
    _check_weights(module)
    training = module.training
    module.eval()
    try:
        sites_of(module, inputs)  # runs it once: a wrong input is told before tracing is tried
        graph, leaves = _trace(module)
    finally:
        module.train(training)
    _modularise(graph)
    graph.eval()
    history = [
        Refusal(name, "not_traced", f"symbolic tracing stops inside '{name or 'the network'}': {why}")
        for name, why in leaves.items()
    ]
    return Program(graph=graph, inputs=inputs, dense=graph, history=tuple(history))


def _trace(module: nn.Module) -> tuple[fx.GraphModule, dict[str, str]]:
    """Trace, making a leaf of the innermost module that fails until it succeeds."""
    leaves: dict[str, str] = {}
    while True:
        tracer = _Tracer(leaves)
        try:
            graph = tracer.trace(module)
        except Exception as error:  # noqa: BLE001  # a network's forward may raise anything on proxies
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            if not tracer.stack:
                return _whole(module), {"": reason}
            leaves[tracer.stack[-1]] = reason
            continue
        return fx.GraphModule(module, graph), leaves


def _whole(module: nn.Module) -> fx.GraphModule:
    """A graph of one node that calls the network itself, for one that cannot be traced at its top."""
    holder = nn.Module()
    holder.add_module("network", module)
    graph = fx.Graph()
    values = tuple(graph.placeholder(name) for name in _arguments(module))
    graph.output(graph.call_module("network", values))
    return fx.GraphModule(holder, graph)


def _arguments(module: nn.Module) -> list[str]:
    parameters = inspect.signature(module.forward).parameters.values()
    return [
        p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]


def _modularise(graph: fx.GraphModule) -> None:
    """Turn ``F.conv*``/``F.linear`` on parameters into calls of modules over the same parameters."""
    made: dict[tuple[object, ...], str] = {}
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or node.target not in _BUILDERS:
            continue
        call = _Call.of(graph, node)
        if call is None:
            continue
        key = (id(call.weight), id(call.bias), tuple(sorted(call.options.items(), key=str)))
        name = made.get(key)
        if name is None:
            name = made[key] = _fresh(graph, call.name)
            graph.add_submodule(name, _BUILDERS[node.target](call))
        with graph.graph.inserting_before(node):
            new = graph.graph.call_module(name, (call.input,))
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()


class _Call:
    """A functional call whose weight, and bias if any, are parameters of the network."""

    def __init__(self, node: fx.Node, weight: nn.Parameter, bias: nn.Parameter | None, options: dict[str, Any]) -> None:
        self.input, self.weight, self.bias, self.options = (
            node.args[0] if node.args else node.kwargs["input"],
            weight,
            bias,
            options,
        )
        self.name = ""

    @classmethod
    def of(cls, graph: fx.GraphModule, node: fx.Node) -> _Call | None:
        """Read a call; None where its weight is computed, an option is, or an argument is missing."""
        names = _SIGNATURES[node.target]  # type: ignore[index]  # the caller has looked
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        weight, bias = (_parameter(graph, given.get(key)) for key in ("weight", "bias"))
        options = {key: value for key, value in given.items() if key not in ("input", "weight", "bias")}
        computed = any(isinstance(value, fx.Node) for value in options.values())
        if weight is None or computed or (given.get("bias") is not None and bias is None):
            return None
        call = cls(node, weight, bias, {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})
        call.name = str(given["weight"].target)  # type: ignore[union-attr]
        return call


def _parameter(graph: fx.GraphModule, node: object) -> nn.Parameter | None:
    if isinstance(node, fx.Node) and node.op == "get_attr":
        value = attribute(graph, str(node.target))
        return value if isinstance(value, nn.Parameter) else None
    return None


def _linear(call: _Call) -> nn.Module:
    module = unset(nn.Linear, call.weight.shape[1], call.weight.shape[0], bias=call.bias is not None)
    return _own(module, call)


def _conv(kind: type[nn.Module]) -> Callable[[_Call], nn.Module]:
    def build(call: _Call) -> nn.Module:
        out, inner, *kernel = call.weight.shape
        groups = call.options.get("groups", 1)
        module = unset(
            kind,
            inner * groups,
            out,
            tuple(kernel),
            bias=call.bias is not None,
            **call.options,
        )
        return _own(module, call)

    return build


def _own(module: nn.Module, call: _Call) -> nn.Module:
    module.weight, module.bias = call.weight, call.bias  # type: ignore[assignment]  # the network's own parameters
    return module


_CONV_SIGNATURE = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_SIGNATURES = {
    F.linear: ("input", "weight", "bias"),
    F.conv1d: _CONV_SIGNATURE,
    F.conv2d: _CONV_SIGNATURE,
    F.conv3d: _CONV_SIGNATURE,
}
_BUILDERS = {F.linear: _linear, F.conv1d: _conv(nn.Conv1d), F.conv2d: _conv(nn.Conv2d), F.conv3d: _conv(nn.Conv3d)}


def _fresh(graph: fx.GraphModule, weight: str) -> str:
    """A module name for a functional layer: its weight's, ``blocks.0.w`` giving ``blocks.0.w_layer``."""
    name, count = f"{weight}_layer", 1
    while name in dict(graph.named_modules()):
        name, count = f"{weight}_layer{count}", count + 1
    return name


def _batched(x: Tensor) -> Tensor:
    """At least two samples: exporters freeze a batch of 1."""
    return torch.cat([x, x]) if x.dim() and x.shape[0] == 1 else x


def _check_weights(module: nn.Module) -> None:
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and tensor.device.type != "meta" and not bool(torch.isfinite(tensor).all()):
            raise InputError(f"the weight '{name}' holds NaN or Inf: the checkpoint is damaged or training diverged")
