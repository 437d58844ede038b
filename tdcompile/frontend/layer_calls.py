"""``LayerCall``: a functional call, ``F.conv2d`` or ``aten.linear``, and the module that computes the same."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tdcompile.frontend.constants import Constants
from tdcompile.ir.layer import TransposedConv, unset

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
    """A functional call whose weight, and bias if any, are constants of the network."""

    node: fx.Node
    input: fx.Node
    tensors: Mapping[str, Tensor]
    options: Mapping[str, Any]

    @property
    def key(self) -> tuple[object, ...]:
        """The same for calls of the same layer."""
        held = tuple(id(self.tensors.get(name)) for name in TENSORS) if self.tensors else (traced_in(self.node),)
        return (_BUILDERS[self.node.target], *held, tuple(sorted(self.options.items(), key=str)))

    def build(self, constants: Constants) -> nn.Module | None:
        """The layer as a module, which computes what the call does; None where torch has none that does."""
        return _BUILDERS[self.node.target](self, constants)


def arguments(node: fx.Node) -> dict[str, Any]:
    """What a call that ``read_layer_call`` knows was given, by the names of its signature."""
    names = _SIGNATURES[node.target]  # the caller has looked
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def read_layer_call(node: fx.Node, constants: Constants) -> LayerCall | None:
    """A layer's call; None where weight or options are computed from an input, the input is not, or one is missing."""
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
        value = constants.parameter(given[name]) if trained else constants.of(given[name])
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
    module = unset(nn.Linear, weight.shape[1], weight.shape[0], bias="bias" in call.tensors)
    return _with_weights(module, call)


def _transposed_linear(call: LayerCall, constants: Constants) -> nn.Module | None:
    """``x @ weight``, as ``addmm`` and ``matmul`` have it: the weight is ``(C, T)``."""
    weight, dims = call.tensors["weight"], _rank_of(call.input)
    if weight.dim() != 2 or any(call.options.get(scale, 1) != 1 for scale in ("beta", "alpha")):
        return None
    if "bias" in call.tensors and call.tensors["bias"].shape != weight.shape[1:]:
        return None
    if (dims is not None and dims < 2) or not constants.only(arguments(call.node)["weight"], call.node):
        return None
    turned = nn.Parameter(weight.detach().t().contiguous(), requires_grad=weight.requires_grad)
    module = unset(nn.Linear, *weight.shape, bias="bias" in call.tensors)
    return _with_weights(module, LayerCall(call.node, call.input, {**call.tensors, "weight": turned}, call.options))


def _conv(call: LayerCall, constants: Constants) -> nn.Module | None:
    return _convolution(call, constants, _CONVS, call.options)


def _transposed_conv(call: LayerCall, constants: Constants) -> nn.Module | None:
    return _convolution(call, constants, TRANSPOSED_CONVS, call.options)


def _either_conv(call: LayerCall, constants: Constants) -> nn.Module | None:
    """``aten.convolution``, which has one option more."""
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
        unset(kinds[axes - 1], inputs, outputs, tuple(kernel), bias="bias" in call.tensors, **spread), call
    )
    return TransposedConv.of(module, constants.turned) if isinstance(module, TRANSPOSED_CONVS) else module


def _per_axis(value: Any, axes: int) -> Any:
    """One figure for each axis, where a call may give one for all."""
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
    """In eval mode, in which a network is traced, it does nothing; as a module it comes back with training."""
    return nn.Dropout(call.options.get("p", 0.5))


def _channel_dropout(call: LayerCall, constants: Constants) -> nn.Module | None:
    """By what the network calls; ATen has one operator for all."""
    kind = _CHANNEL_DROPOUTS.get(call.node.target) or _CHANNEL_DROPOUTS.get(_rank_of(call.input))
    return kind(call.options.get("p", 0.5)) if kind is not None else None


def _alpha_dropout(call: LayerCall, constants: Constants) -> nn.Module | None:
    return nn.AlphaDropout(call.options.get("p", 0.5))


def _with_weights(module: nn.Module, call: LayerCall) -> nn.Module:
    module.weight, module.bias = call.tensors["weight"], call.tensors.get("bias")  # type: ignore[assignment]  # parameters
    return module


def _rank_of(node: fx.Node) -> int | None:
    """How many axes a value has, where the front end knows."""
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else None


def traced_in(node: fx.Node) -> str:
    """The module that a node was traced in, as the front end tells it."""
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
