"""``transpose-spatial``: exchange height and width where k x 1 convolutions read maps of width 1.

onnxruntime runs a 1 x k convolution over a 1 x H map faster than a k x 1 convolution over an H x 1 map (this project's
rewrite; ``benchmarks/transposed_kernels.py`` measures it). The pass finds regions of operators that treat both axes
alike, and exchanges kernels, strides, padding and dilation there. The map is transposed where it enters and leaves a
region, which moves no value: one of its axes has size 1.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tdcompile.core.passes import RewritePass, Rewritten
from tdcompile.ir.conv_modules import Pad, TransposedConv
from tdcompile.ir.diagnostics import Diagnostic, DiagnosticCode, Reason
from tdcompile.ir.graph_edits import module_at, replace_module
from tdcompile.ir.modules import called_differently
from tdcompile.ir.program import Change, Program, kept_dense, sites

_HEIGHT, _WIDTH = 2, 3  # of (N, C, H, W)

# Modules with settings for each spatial axis: two numbers, or those before and after each axis from the last one.
_SETTINGS: Mapping[type[nn.Module], tuple[str, ...]] = {
    nn.Conv2d: ("kernel_size", "stride", "padding", "dilation", "_reversed_padding_repeated_twice"),
    TransposedConv: ("kernel_size", "stride", "padding", "dilation", "output_padding"),
    nn.MaxPool2d: ("kernel_size", "stride", "padding", "dilation"),
    nn.AvgPool2d: ("kernel_size", "stride", "padding"),
    nn.AdaptiveAvgPool2d: ("output_size",),
    nn.AdaptiveMaxPool2d: ("output_size",),
    nn.ZeroPad2d: ("padding",),
    nn.ConstantPad2d: ("padding",),
    nn.ReflectionPad2d: ("padding",),
    nn.ReplicationPad2d: ("padding",),
    nn.CircularPad2d: ("padding",),
    Pad: ("amounts",),
}
# Modules that compute each position alike, or from all positions together.
_ALIKE = frozenset(
    {
        *(nn.BatchNorm2d, nn.GroupNorm, nn.InstanceNorm2d, nn.Identity),
        *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout),
        *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid),
        *(nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.Threshold),
    }
)
_ALIKE_FUNCTIONS = frozenset(
    {
        *("relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "elu", "elu_", "selu", "celu", "gelu"),
        *("silu", "silu_", "mish", "sigmoid", "sigmoid_", "tanh", "tanh_", "hardswish", "hardsigmoid", "hardtanh"),
        *("softplus", "softsign", "logsigmoid", "threshold", "dropout", "dropout2d", "alpha_dropout", "clone"),
        *("neg", "abs", "exp", "log", "sqrt", "rsqrt", "square", "clamp", "clamp_min", "clamp_max"),
        *("add", "add_", "iadd", "sub", "isub", "mul", "mul_", "imul", "div", "true_divide", "truediv"),
        *("maximum", "minimum"),
    }
)
_POOLS = frozenset({"max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d"})
_PADS = frozenset({"pad", "constant_pad_nd"})
_JOINS = frozenset({"cat", "concat"})
_PLACES = (torch, F, operator, torch._C._nn)
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class _Exchange:
    """What a node becomes when height and width are exchanged; None leaves that part as it is."""

    module: nn.Module | None = None
    args: tuple[Any, ...] | None = None
    kwargs: dict[str, Any] | None = None


_ALIKE_EXCHANGE = _Exchange()


@dataclass(frozen=True)
class TransposeSpatial(RewritePass):
    """Turn k x 1 convolutions over maps of width 1 into 1 x k convolutions, which run faster; nothing is lost."""

    name: ClassVar[str] = "transpose-spatial"
    exact: ClassVar[bool] = True

    def rewrite(self, graph: fx.GraphModule, program: Program) -> Rewritten:
        """Exchange the axes in every region that has such a convolution; say why one of them stays as it is."""
        if not any(map(_is_tall, graph.modules())):
            return Rewritten(graph)
        narrow = _narrow(graph, program.inputs)
        tall = [node for node in narrow if _is_tall(module_at(graph, node))]
        if not tall:
            return Rewritten(graph)
        kept = kept_dense(program.with_(keep_dense={}), sites(program))
        exchanges = {node: made for node in narrow if (made := _exchange(graph, node, kept)) is not None}
        region = _region(graph, exchanges, tall)
        layers = list(dict.fromkeys(str(node.target) for node in tall if node in region))
        for node in region:
            _apply(graph, node, exchanges[node])
        _put_borders(graph, region)
        changes = [Change(name, self.name, "a k x 1 kernel became 1 x k") for name in layers]
        told = [
            Diagnostic("info", DiagnosticCode.TRANSPOSED_KERNELS, f"'{name}' keeps its k x 1 kernel: {reason}")
            for name, reason in _left(graph, tall, region, kept).items()
        ]
        if layers:
            text = (
                f"the k x 1 kernels of {', '.join(layers)} became 1 x k, in the dense model too: "
                "onnxruntime runs them faster, and the outputs stay the same"
            )
            told.insert(0, Diagnostic("info", DiagnosticCode.TRANSPOSED_KERNELS, text))
        return Rewritten(graph, [*changes, *told])


@torch.no_grad()
def _narrow(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> list[fx.Node]:
    """Return the nodes that map values of ``(N, C, H, 1)`` to one of that form, in the graph's order."""
    flat: set[fx.Node] = set()

    class Shapes(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, Tensor) and value.dim() == 4 and value.shape[_WIDTH] == 1:
                flat.add(n)
            return value

    Shapes(graph).run(*(x.clone() for x in inputs))  # a network may change its input
    return [n for n in graph.graph.nodes if n in flat and n.all_input_nodes and flat.issuperset(n.all_input_nodes)]


def _is_tall(module: nn.Module | None) -> bool:
    """Return whether a module is a k x 1 convolution."""
    return type(module) is nn.Conv2d and module.kernel_size[0] > 1 and module.kernel_size[1] == 1


def _region(graph: fx.GraphModule, exchanges: dict[fx.Node, _Exchange], tall: Sequence[fx.Node]) -> dict[fx.Node, None]:
    """Return the nodes of all connected parts with a k x 1 convolution, in the graph's order.

    A module changes for all its calls, so that its calls are left out unless all of them are in the region.
    """
    calls: dict[nn.Module, list[fx.Node]] = {}
    for node in graph.graph.nodes:
        if (module := module_at(graph, node)) is not None:
            calls.setdefault(module, []).append(node)
    left = dict(exchanges)
    while True:
        chosen = {node for part in _parts(left) if not part.isdisjoint(tall) for node in part}
        changed = [node for node in left if left[node].module is not None]
        split = [node for node in changed if not chosen.issuperset(calls[graph.get_submodule(str(node.target))])]
        if chosen.isdisjoint(split):
            return {node: None for node in exchanges if node in chosen}
        for node in split:
            del left[node]


def _exchange(graph: fx.GraphModule, node: fx.Node, kept: Mapping[str, Reason]) -> _Exchange | None:
    """Return what one node becomes, or None if it reads an axis in a way of its own."""
    module = module_at(graph, node)
    if module is not None:
        alone = len(node.args) == 1 and not node.kwargs  # a size of the output may follow the input
        return _module_exchange(module) if alone and str(node.target) not in kept else None
    if node.op not in ("call_function", "call_method"):
        return None
    name = _name(node)
    if name in _ALIKE_FUNCTIONS and all(isinstance(x, (fx.Node, *_PLAIN)) for x in _values(node)):
        return _ALIKE_EXCHANGE
    if name in _JOINS:
        along = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        return _ALIKE_EXCHANGE if along in (0, 1, -4, -3) else None
    if name in _PADS:
        return _with_settings(node, _exchanged_padding)
    return _with_settings(node, _exchanged) if name in _POOLS else None


def _module_exchange(module: nn.Module) -> _Exchange | None:
    kind = type(module)
    if called_differently(module):
        return None
    if kind in _ALIKE:
        return _ALIKE_EXCHANGE
    if kind not in _SETTINGS or (isinstance(module, nn.Conv2d | TransposedConv) and module.kernel_size[1] != 1):
        return None
    made = copy.copy(module)
    for setting in _SETTINGS[kind]:
        setattr(made, setting, _exchanged(getattr(module, setting)))
    weight = made._parameters.get("weight")
    if weight is not None:
        turned = weight.detach().transpose(_HEIGHT, _WIDTH).contiguous()
        made._parameters = {**made._parameters, "weight": nn.Parameter(turned, requires_grad=weight.requires_grad)}
    return _Exchange(module=made)


def _name(node: fx.Node) -> str | None:
    """Return the name of one of torch's or Python's operators, or None for another function."""
    target = node.target
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return target.overloadpacket.__name__ if target.namespace == "aten" else None
    name = getattr(target, "__name__", "")
    return name if any(getattr(place, name, None) is target for place in _PLACES) else None


def _values(node: fx.Node) -> list[object]:
    return [*node.args, *node.kwargs.values()]


def _with_settings(node: fx.Node, change: Callable[[Any], Any]) -> _Exchange:
    """Exchange every list among the arguments."""
    args = tuple(change(value) for value in node.args)
    return _Exchange(args=args, kwargs={key: change(value) for key, value in node.kwargs.items()})


def _exchanged(value: Any) -> Any:
    """Exchange two settings, or two pairs of them; a single one holds for both axes."""
    if not isinstance(value, list | tuple) or len(value) < 2:
        return value
    return type(value)([*value[len(value) // 2 :], *value[: len(value) // 2]])


def _exchanged_padding(value: Any) -> Any:
    """Exchange the first two pairs of the amounts for ``pad``, which begin with the last axis."""
    if not isinstance(value, list | tuple):
        return value
    width, height, rest = value[:2], value[2:4] or (0, 0), value[4:]
    return type(value)([*height, *width, *rest])


def _parts(exchanges: Mapping[fx.Node, _Exchange]) -> list[set[fx.Node]]:
    """Return the connected parts of the nodes that can be exchanged."""
    found: list[set[fx.Node]] = []
    for node in exchanges:
        joined = [part for part in found if not part.isdisjoint(node.all_input_nodes)]
        found = [part for part in found if part not in joined] + [{node}.union(*joined)]
    return found


def _apply(graph: fx.GraphModule, node: fx.Node, exchange: _Exchange) -> None:
    if exchange.module is not None and module_at(graph, node) is not exchange.module:
        replace_module(graph, str(node.target), exchange.module)
    node.args = node.args if exchange.args is None else exchange.args
    node.kwargs = node.kwargs if exchange.kwargs is None else exchange.kwargs


def _put_borders(graph: fx.GraphModule, region: Collection[fx.Node]) -> None:
    """Transpose each value that enters the region, and each value that leaves it."""
    entering: dict[fx.Node, fx.Node] = {}
    for node in region:
        for source in [source for source in node.all_input_nodes if source not in region]:
            if source not in entering:
                with graph.graph.inserting_before(node):
                    entering[source] = graph.graph.call_function(torch.transpose, (source, _HEIGHT, _WIDTH))
            node.replace_input_with(source, entering[source])
    for node in region:
        readers = [user for user in node.users if user not in region]
        if readers:
            with graph.graph.inserting_after(node):
                leaving = graph.graph.call_function(torch.transpose, (node, _HEIGHT, _WIDTH))
            for user in readers:
                user.replace_input_with(node, leaving)


def _left(
    graph: fx.GraphModule, tall: Iterable[fx.Node], region: Collection[fx.Node], kept: Mapping[str, Reason]
) -> dict[str, str]:
    """Return why each k x 1 convolution outside the region stays as it is."""
    names = [str(node.target) for node in tall if node not in region]
    shared = "another call of it reads a wider map"
    return {name: kept[name].text if name in kept else shared for name in names}
