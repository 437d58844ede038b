"""``LayerCall``: a functional call, such as ``F.conv2d`` or ``aten.linear``, and its equivalent module."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tdcompile.frontend.constants import Constants
from tdcompile.ir.conv_modules import TransposedConv, uninitialised

aten = torch.ops.aten

_LINEAR = ("input", "weight", "bias")
_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_ADDMM = ("bias", "input", "weight")
_NORM = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled")
_DROPOUT = ("input", "p", "training", "inplace")
TENSORS = ("weight", "bias", "running_mean", "running_var")
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_CHANNEL_DROPOUTS: dict[object, type[nn.Dropout1d | nn.Dropout2d | nn.Dropout3d]] = {
    **{F.dropout1d: nn.Dropout1d, F.dropout2d: nn.Dropout2d, F.dropout3d: nn.Dropout3d},
    **{3: nn.Dropout1d, 4: nn.Dropout2d, 5: nn.Dropout3d},
}


@dataclass(frozen=True)
class LayerCall:
    """A functional call whose weight and bias are constants of the network.

    Attributes:
        node: the call.
        input: the node of its input.
        tensors: weight, bias and running statistics, as far as given, by argument name.
        options: all other arguments by name.
    """

    node: fx.Node
    input: fx.Node
    tensors: Mapping[str, Tensor]
    options: Mapping[str, Any]

    @property
    def key(self) -> tuple[object, ...]:
        """Return a key that is equal for calls of one layer."""
        held = tuple(id(self.tensors.get(name)) for name in TENSORS) if self.tensors else (traced_in(self.node),)
        return (_BUILDERS[self.node.target], *held, tuple(sorted(self.options.items(), key=str)))

    def build(self, constants: Constants) -> nn.Module | None:
        """Return an equivalent module, or None if torch has none."""
        return _BUILDERS[self.node.target](self, constants)


def arguments(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of a layer's call by the names of its signature."""
    names = _SIGNATURES[node.target]  # the caller has checked that it is there
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def read_layer_call(node: fx.Node, constants: Constants) -> LayerCall | None:
    """Return a layer's call, or None if the node is none.

    Weight and options must not depend on an input of the network, the layer's input must, and a weight must be given.
    """
    if node.op != "call_function" or node.target not in _BUILDERS:
        return None
    given = arguments(node)
    source = given.get("input")
    if not isinstance(source, fx.Node) or constants.sources(source) is not None:
        return None
    if given.get("weight") is None and _BUILDERS[node.target] not in _WEIGHTLESS:
        return None
    tensors: dict[str, Tensor] = {}
    for name in TENSORS:
        if given.get(name) is None:
            continue
        trained = name in ("weight", "bias")
        value = constants.parameter(given[name]) if trained else constants.value(given[name])
        if value is None:
            return None
        tensors[name] = value
    options = {key: _frozen(value) for key, value in given.items() if key not in (*TENSORS, "input")}
    computed: list[fx.Node] = []
    fx.map_arg((*options.values(),), computed.append)
    return None if computed else LayerCall(node, source, tensors, options)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value


def _linear(call: LayerCall, constants: Constants) -> nn.Module | None:
    weight = call.tensors["weight"]
    if weight.dim() != 2:
        return None
    module = uninitialised(nn.Linear, weight.shape[1], weight.shape[0], bias="bias" in call.tensors)
    return _with_weights(module, call)


def _transposed_linear(call: LayerCall, constants: Constants) -> nn.Module | None:
    """Build a linear layer from ``x @ weight`` of ``addmm`` or ``matmul``, whose weight is ``(C, T)``."""
    weight, dims = call.tensors["weight"], _rank_of(call.input)
    if weight.dim() != 2 or any(call.options.get(scale, 1) != 1 for scale in ("beta", "alpha")):
        return None
    if "bias" in call.tensors and call.tensors["bias"].shape != weight.shape[1:]:
        return None
    if (dims is not None and dims < 2) or not constants.read_only_by(arguments(call.node)["weight"], call.node):
        return None
    turned = nn.Parameter(weight.detach().t().contiguous(), requires_grad=weight.requires_grad)
    module = uninitialised(nn.Linear, *weight.shape, bias="bias" in call.tensors)
    return _with_weights(module, LayerCall(call.node, call.input, {**call.tensors, "weight": turned}, call.options))


def _conv(call: LayerCall, constants: Constants) -> nn.Module | None:
    return _convolution(call, constants, _CONVS, call.options)


def _transposed_conv(call: LayerCall, constants: Constants) -> nn.Module | None:
    return _convolution(call, constants, TRANSPOSED_CONVS, call.options)


def _either_conv(call: LayerCall, constants: Constants) -> nn.Module | None:
    """Build either kind of convolution from ``aten.convolution``, which has the option ``transposed``."""
    options = dict(call.options)
    if options.pop("transposed"):
        return _convolution(call, constants, TRANSPOSED_CONVS, options)
    options.pop("output_padding")
    return _convolution(call, constants, _CONVS, options)


def _convolution(
    call: LayerCall, constants: Constants, kinds: Sequence[type[nn.Module]], options: Mapping[str, Any]
) -> nn.Module | None:
    weight, dims = call.tensors["weight"], _rank_of(call.input)
    axes = weight.dim() - 2
    if not 1 <= axes <= 3 or dims not in (None, axes + 2):
        return None
    groups = options.get("groups", 1)
    first, second, *kernel = weight.shape
    turned = kinds is TRANSPOSED_CONVS
    spread = {key: _per_axis(value, axes) if key != "groups" else value for key, value in options.items()}
    inputs, outputs = (first, second * groups) if turned else (second * groups, first)
    module = _with_weights(
        uninitialised(kinds[axes - 1], inputs, outputs, tuple(kernel), bias="bias" in call.tensors, **spread), call
    )
    return TransposedConv.of(module, constants.transposed) if isinstance(module, TRANSPOSED_CONVS) else module


def _per_axis(value: Any, axes: int) -> Any:
    """Return one value per axis, where a call may give a single value for all axes."""
    if isinstance(value, str):
        return value
    values = value if isinstance(value, tuple) else (value,)
    return values * axes if len(values) == 1 else values


def _batch_norm(call: LayerCall, constants: Constants) -> nn.Module | None:
    dims, mean = _rank_of(call.input), call.tensors.get("running_mean")
    if call.options.get("training") or mean is None or dims not in _NORMS:
        return None
    affine = "weight" in call.tensors and "bias" in call.tensors
    if affine != ("weight" in call.tensors or "bias" in call.tensors):
        return None
    module = _NORMS[dims](len(mean), call.options["eps"], call.options["momentum"], affine, device=mean.device)
    module.running_mean, module.running_var = mean, call.tensors["running_var"]
    return _with_weights(module, call) if affine else module


def _dropout(call: LayerCall, constants: Constants) -> nn.Module | None:
    """Build a dropout module: tracing runs in eval mode, and the module is active again in training."""
    return nn.Dropout(call.options.get("p", 0.5))


def _channel_dropout(call: LayerCall, constants: Constants) -> nn.Module | None:
    """Build channel dropout by the function that is called, or by the input's axes for ATen's one operator."""
    kind = _CHANNEL_DROPOUTS.get(call.node.target) or _CHANNEL_DROPOUTS.get(_rank_of(call.input))
    return kind(call.options.get("p", 0.5)) if kind is not None else None


def _alpha_dropout(call: LayerCall, constants: Constants) -> nn.Module | None:
    return nn.AlphaDropout(call.options.get("p", 0.5))


def _with_weights(module: nn.Module, call: LayerCall) -> nn.Module:
    module.weight, module.bias = call.tensors["weight"], call.tensors.get("bias")  # type: ignore[assignment]  # parameters
    return module


def _rank_of(node: fx.Node) -> int | None:
    """Return the number of axes of a node's value, or None if the front end does not know it."""
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else None


def traced_in(node: fx.Node) -> str:
    """Return the name of the module in which a node was traced, empty if unknown."""
    stack = node.meta.get("nn_module_stack")
    return str(next(reversed(stack.values()))[0]).partition("@")[0] if stack else ""


_Builder = Callable[[LayerCall, Constants], nn.Module | None]
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
