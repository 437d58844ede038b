"""``modularise``: functional layers in a graph, ``F.conv2d`` or ``aten.linear``, as modules over their weights.

From there on a layer is a module with a name, whichever front end has found it. A weight that is computed from
parameters alone (a slice of a packed projection, a transposed matrix) is computed once, here.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tdcompile.constants import Constants
from tdcompile.layer import TransposedConv, unset
from tdcompile.surgery import module_at

aten = torch.ops.aten

_LINEAR = ("input", "weight", "bias")
_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_ADDMM = ("bias", "input", "weight")
_NORM = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled")
_DROPOUT = ("input", "p", "training", "inplace")
_TENSORS = ("weight", "bias", "running_mean", "running_var")
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED_CONVS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_CHANNEL_DROPOUTS: dict[object, type[nn.Dropout1d | nn.Dropout2d | nn.Dropout3d]] = {
    **{F.dropout1d: nn.Dropout1d, F.dropout2d: nn.Dropout2d, F.dropout3d: nn.Dropout3d},
    **{3: nn.Dropout1d, 4: nn.Dropout2d, 5: nn.Dropout3d},
}
_PARAMETRIZED = ".parametrizations.weight."  # where torch keeps what a parametrised weight is computed from
# What a run-time check is in a traced graph: it has done its work when the graph is compared with the network.
_CHECKS = {
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
}


@dataclass(frozen=True)
class _Call:
    """A functional call whose weight, and bias if any, are constants of the network."""

    node: fx.Node
    input: fx.Node
    tensors: Mapping[str, Tensor]
    options: Mapping[str, Any]

    @property
    def key(self) -> tuple[object, ...]:
        """The same for calls of the same layer."""
        held = tuple(id(self.tensors.get(name)) for name in _TENSORS) if self.tensors else (_path(self.node),)
        return (_BUILDERS[self.node.target], *held, tuple(sorted(self.options.items(), key=str)))


def modularise(graph: fx.GraphModule) -> None:
    """Turn every layer on constant weights into a call of a module; drop run-time checks and what nothing reads."""
    for node in list(graph.graph.nodes):
        if node.op == "call_function" and node.target in _CHECKS and not node.users:
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    _in_order(graph)
    names, constants = _Names(graph), Constants(graph)
    read = [(node, call) for node in graph.graph.nodes if (call := _read(node, constants)) is not None]
    modules = _transposed(graph, constants)
    made: dict[tuple[object, ...], nn.Module | None] = {}
    for node, call in read:
        if call.key not in made:
            made[call.key] = _BUILDERS[node.target](call, constants)
    built = [(node, call) for node, call in read if made[call.key] is not None]
    called = names.of(built, constants)
    for node, call in built:
        name, module = called[call.key], made[call.key]
        assert module is not None  # ``built`` has no other
        modules[name] = module.train(graph.training)
        with graph.graph.inserting_before(node):
            new = graph.graph.create_node("call_module", name, (_given(node)["input"],))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        _erase(graph.graph, node)
    _drop_unread(graph)  # what is computed once is there once, and its original is gone
    for name in sorted(modules, key=lambda name: name.count(".")):
        graph.add_submodule(name, modules[name])
    graph.graph.lint()
    graph.recompile()


def _in_order(graph: fx.GraphModule) -> None:
    """Give torch's modules their arguments in order, where the network names them: passes read what is the first."""
    for node in graph.graph.nodes:
        part = module_at(graph, node)
        if part is None or not node.kwargs or not type(part).__module__.startswith("torch.nn."):
            continue
        given, named = list(node.args), dict(node.kwargs)
        for parameter in list(inspect.signature(part.forward).parameters.values())[len(given) :]:
            if parameter.name not in named or parameter.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
                break
            given.append(named.pop(parameter.name))
        node.args, node.kwargs = tuple(given), named


def _transposed(graph: fx.GraphModule, constants: Constants) -> dict[str, nn.Module]:
    """What takes the place of torch's own transposed convolutions, by name."""
    found: dict[str, nn.Module] = {}
    for node in graph.graph.nodes:
        part = module_at(graph, node) if str(node.target) not in found else None
        if isinstance(part, _TRANSPOSED_CONVS) and len(node.args) == 1 and not node.kwargs:
            found[str(node.target)] = TransposedConv.of(part, constants.turned)
    return found


def _drop_unread(graph: fx.GraphModule) -> None:
    """Take parameters and buffers that no node reads out of the graph's own containers; modules keep theirs."""
    read = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    for path, part in graph.named_modules():
        if part is graph or type(part) is nn.Module:
            for kept in (part._parameters, part._buffers):
                for name in list(kept):
                    if (f"{path}.{name}" if path else name) not in read:
                        del kept[name]


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """Take out a node, and what only it has read."""
    pending = [node]
    while pending:
        gone = pending.pop()
        if gone.users or gone.op in ("placeholder", "call_module"):
            continue
        sources = gone.all_input_nodes
        graph.erase_node(gone)
        pending += [source for source in sources if not source.users and not source.is_impure()]


def _given(node: fx.Node) -> dict[str, Any]:
    names = _SIGNATURES[node.target]  # the caller has looked
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _read(node: fx.Node, constants: Constants) -> _Call | None:
    """A call; None where its weight is computed from an input, its input is not, or an option is, or one is missing."""
    if node.op != "call_function" or node.target not in _BUILDERS:
        return None
    given = _given(node)
    source = given.get("input")
    if not isinstance(source, fx.Node) or constants.sources(source) is not None:
        return None
    if given.get("weight") is None and _BUILDERS[node.target] not in _WEIGHTLESS:
        return None
    tensors: dict[str, Tensor] = {}
    for name in _TENSORS:
        if given.get(name) is None:
            continue
        trained = name in ("weight", "bias")
        value = constants.parameter(given[name]) if trained else constants.of(given[name])
        if value is None:
            return None
        tensors[name] = value
    options = {key: _frozen(value) for key, value in given.items() if key not in (*_TENSORS, "input")}
    computed: list[fx.Node] = []
    fx.map_arg((*options.values(),), computed.append)
    return None if computed else _Call(node, source, tensors, options)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value


def _linear(call: _Call, constants: Constants) -> nn.Module | None:
    weight = call.tensors["weight"]
    if weight.dim() != 2:
        return None
    module = unset(nn.Linear, weight.shape[1], weight.shape[0], bias="bias" in call.tensors)
    return _own(module, call)


def _transposed_linear(call: _Call, constants: Constants) -> nn.Module | None:
    """``x @ weight``, as ``addmm`` and ``matmul`` have it: the weight is ``(C, T)``."""
    weight, dims = call.tensors["weight"], _dims(call.input)
    if weight.dim() != 2 or any(call.options.get(scale, 1) != 1 for scale in ("beta", "alpha")):
        return None
    if "bias" in call.tensors and call.tensors["bias"].shape != weight.shape[1:]:
        return None
    if (dims is not None and dims < 2) or not constants.only(_given(call.node)["weight"], call.node):
        return None
    turned = nn.Parameter(weight.detach().t().contiguous(), requires_grad=weight.requires_grad)
    module = unset(nn.Linear, *weight.shape, bias="bias" in call.tensors)
    return _own(module, _Call(call.node, call.input, {**call.tensors, "weight": turned}, call.options))


def _conv(call: _Call, constants: Constants) -> nn.Module | None:
    return _convolution(call, constants, _CONVS, call.options)


def _transposed_conv(call: _Call, constants: Constants) -> nn.Module | None:
    return _convolution(call, constants, _TRANSPOSED_CONVS, call.options)


def _either_conv(call: _Call, constants: Constants) -> nn.Module | None:
    """``aten.convolution``, which has one option more."""
    options = dict(call.options)
    if options.pop("transposed"):
        return _convolution(call, constants, _TRANSPOSED_CONVS, options)
    options.pop("output_padding")
    return _convolution(call, constants, _CONVS, options)


def _convolution(
    call: _Call, constants: Constants, kinds: Sequence[type[nn.Module]], options: Mapping[str, Any]
) -> nn.Module | None:
    weight, dims = call.tensors["weight"], _dims(call.input)
    axes = weight.dim() - 2
    if not 1 <= axes <= 3 or dims not in (None, axes + 2):
        return None
    groups = options.get("groups", 1)
    first, second, *kernel = weight.shape
    turned = kinds is _TRANSPOSED_CONVS
    spread = {key: _each(value, axes) if key != "groups" else value for key, value in options.items()}
    inputs, outputs = (first, second * groups) if turned else (second * groups, first)
    module = _own(unset(kinds[axes - 1], inputs, outputs, tuple(kernel), bias="bias" in call.tensors, **spread), call)
    return TransposedConv.of(module, constants.turned) if isinstance(module, _TRANSPOSED_CONVS) else module


def _each(value: Any, axes: int) -> Any:
    """One figure for each axis, where a call may give one for all."""
    if isinstance(value, str):
        return value
    values = value if isinstance(value, tuple) else (value,)
    return values * axes if len(values) == 1 else values


def _batch_norm(call: _Call, constants: Constants) -> nn.Module | None:
    dims, mean = _dims(call.input), call.tensors.get("running_mean")
    if call.options.get("training") or mean is None or dims not in _NORMS:
        return None
    affine = "weight" in call.tensors and "bias" in call.tensors
    if affine != ("weight" in call.tensors or "bias" in call.tensors):
        return None
    module = _NORMS[dims](len(mean), call.options["eps"], call.options["momentum"], affine, device=mean.device)
    module.running_mean, module.running_var = mean, call.tensors["running_var"]
    return _own(module, call) if affine else module


def _dropout(call: _Call, constants: Constants) -> nn.Module | None:
    """In eval mode, in which a network is traced, it does nothing; as a module it comes back with training."""
    return nn.Dropout(call.options.get("p", 0.5))


def _channel_dropout(call: _Call, constants: Constants) -> nn.Module | None:
    """By what the network calls; ATen has one operator for all."""
    kind = _CHANNEL_DROPOUTS.get(call.node.target) or _CHANNEL_DROPOUTS.get(_dims(call.input))
    return kind(call.options.get("p", 0.5)) if kind is not None else None


def _alpha_dropout(call: _Call, constants: Constants) -> nn.Module | None:
    return nn.AlphaDropout(call.options.get("p", 0.5))


def _own(module: nn.Module, call: _Call) -> nn.Module:
    module.weight, module.bias = call.tensors["weight"], call.tensors.get("bias")  # type: ignore[assignment]  # parameters
    return module


def _dims(node: fx.Node) -> int | None:
    """How many axes a value has, where the front end knows."""
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else None


class _Names:
    """Names for new modules in a graph."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self._called = {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
        self._known = {name for name, _ in graph.named_modules()}
        self._inside: dict[str, set[str]] = {}  # what the graph reads or calls, by every part that it is in
        for node in graph.graph.nodes:
            if node.op in ("get_attr", "call_module"):
                parts = str(node.target).split(".")
                for end in range(1, len(parts)):
                    self._inside.setdefault(".".join(parts[:end]), set()).add(str(node.target))

    def of(self, read: Sequence[tuple[fx.Node, _Call]], constants: Constants) -> dict[tuple[object, ...], str]:
        """That of the part whose weight it is, ``fc`` for ``fc.weight``, if that part is nothing else.

        Otherwise, for a weight among others, ``blocks.0.w_layer`` after ``blocks.0.w``; for what has no weight the
        part that it was traced in.
        """
        found: dict[tuple[object, ...], str] = {}
        for node, call in read:
            holder = self._holder(node, constants)
            if call.key not in found and holder and holder not in self._called:
                found[call.key] = self._take(holder)
        for node, call in read:
            if call.key not in found:
                found[call.key] = self._fresh(self._base(node, constants))
        return found

    def _holder(self, node: fx.Node, constants: Constants) -> str:
        """The part that is nothing but this layer; nothing where there is none."""
        weight = _given(node).get("weight")
        if not isinstance(weight, fx.Node):
            path = _path(node)
            return "" if path in self._inside else path
        source = self._base(node, constants)
        if _PARAMETRIZED in source:
            holder, leaf = source.partition(_PARAMETRIZED)[0], "weight"
        else:
            holder, _, leaf = source.rpartition(".")
        own = {str(other.target) for other in _reads(node)}
        return holder if leaf == "weight" and self._inside.get(holder, set()) <= own else ""

    def _base(self, node: fx.Node, constants: Constants) -> str:
        weight = _given(node).get("weight")
        if not isinstance(weight, fx.Node):
            path = _path(node)
            return f"{path}.dropout" if path else node.name
        sources = constants.sources(weight)
        assert sources  # what is computed from an input has been left alone
        return str(sources[0].target)

    def _fresh(self, base: str) -> str:
        """A name that is not inside a layer or another module that the graph calls."""
        parts = base.split(".")
        for end in range(1, len(parts)):
            if ".".join(parts[:end]) in self._called:
                parts = [*parts[: end - 1], "_".join(parts[end - 1 :])]
                break
        base = ".".join(parts)
        name, count = f"{base}_layer", 1
        while name in self._known:
            name, count = f"{base}_layer{count}", count + 1
        return self._take(name)

    def _take(self, name: str) -> str:
        self._called.add(name)
        self._known.add(name)
        return name


def _reads(node: fx.Node) -> list[fx.Node]:
    """The parameters and buffers that a call reads."""
    found, pending = [], [value for name in _TENSORS if isinstance(value := _given(node).get(name), fx.Node)]
    while pending:
        other = pending.pop()
        found += [other] if other.op == "get_attr" else []
        pending += other.all_input_nodes
    return found


def _path(node: fx.Node) -> str:
    """The module that a node was traced in, as the front end tells it."""
    stack = node.meta.get("nn_module_stack")
    return str(next(reversed(stack.values()))[0]).partition("@")[0] if stack else ""


_Builder = Callable[[_Call, Constants], nn.Module | None]
_TABLE: tuple[tuple[tuple[Any, ...], Sequence[str], _Builder], ...] = (
    ((F.linear, aten.linear.default), _LINEAR, _linear),
    ((torch.addmm, aten.addmm.default), _ADDMM, _transposed_linear),
    (
        (torch.matmul, torch.mm, operator.matmul, aten.matmul.default, aten.mm.default),
        ("input", "weight"),
        _transposed_linear,
    ),
    (
        (
            *(F.conv1d, F.conv2d, F.conv3d),
            *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default),
            *(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding),
        ),
        _CONV,
        _conv,
    ),
    (
        (
            *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
            *(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input),
        ),
        _TRANSPOSED,
        _transposed_conv,
    ),
    ((aten.convolution.default,), (*_CONV[:6], "transposed", "output_padding", "groups"), _either_conv),
    ((aten.batch_norm.default,), _NORM, _batch_norm),
    ((F.dropout, torch.dropout, aten.dropout.default, aten.dropout_.default), _DROPOUT, _dropout),
    ((F.dropout1d, F.dropout2d, F.dropout3d, aten.feature_dropout.default), _DROPOUT, _channel_dropout),
    ((F.alpha_dropout, aten.alpha_dropout.default), _DROPOUT, _alpha_dropout),
)
_WEIGHTLESS = (_batch_norm, _dropout, _channel_dropout, _alpha_dropout)
_SIGNATURES = {target: names for targets, names, _ in _TABLE for target in targets}
_BUILDERS = {target: builder for targets, _, builder in _TABLE for target in targets}
