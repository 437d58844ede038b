"""``fold-batchnorm``: fold batch normalisation into the convolution or linear layer, or its last factor, before it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_conv_bn_weights, fuse_linear_bn_eval

from tdcompile.core.passes import RewritePass, Rewritten
from tdcompile.ir.conv_modules import TransposedConv
from tdcompile.ir.graph_edits import calls_of, drop_node, module_at, only_user
from tdcompile.ir.layer import Layer
from tdcompile.ir.modules import called_differently, parent_of
from tdcompile.ir.program import Change, Program, sites

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class FoldBatchnorm(RewritePass):
    """Fold batch norm into the layer before it if nothing else reads that layer."""

    name: ClassVar[str] = "fold-batchnorm"
    lowering: ClassVar[int] = 1

    def rewrite(self, graph: fx.GraphModule, program: Program) -> Rewritten:
        """Replace each ``layer -> batch norm`` by one layer; the function in eval mode does not change."""
        history, found = [], sites(program)
        for node in list(graph.graph.nodes):
            norm = module_at(graph, node)
            if not isinstance(norm, _NORMS) or norm.running_mean is None:
                continue
            source = cast(fx.Node, node.args[0])  # the input of a module call is a node
            layer = module_at(graph, source)
            if layer is None or Layer.of(layer, ()) is None or only_user(source) != node:
                continue
            if len(calls_of(graph, str(source.target))) > 1 or len(calls_of(graph, str(node.target))) > 1:
                continue  # shared: another call may not be followed by this normalisation
            if called_differently(layer) or called_differently(norm):
                continue  # a hook may change the value between the two
            if isinstance(layer, nn.Linear) and found[str(source.target)].layer.extent:
                continue  # on (N, L, C) batch norm reads axis 1, which is not the features
            parent, leaf = parent_of(graph, str(source.target))
            setattr(parent, leaf, _fused(layer.eval(), norm.eval()))
            history.append(Change(str(source.target), self.name, f"took in {node.target}"))
            drop_node(graph, node)
        return Rewritten(graph, history)


def _fused(layer: nn.Module, norm: nn.Module) -> nn.Module:
    norm = cast(nn.BatchNorm2d, norm)  # for mypy; the number of axes does not matter
    if isinstance(layer, nn.Linear):
        return fuse_linear_bn_eval(layer, _affine(norm))
    if isinstance(layer, TransposedConv):
        fused = copy.copy(layer)
        mean, var = norm.running_mean, norm.running_var
        assert mean is not None  # the caller has looked
        assert var is not None  # it comes with the mean
        weight, bias = fuse_conv_bn_weights(layer.weight, layer.bias, mean, var, norm.eps, norm.weight, norm.bias)
        fused._parameters = {"weight": weight, "bias": bias}
        return fused
    return fuse_conv_bn_eval(cast(nn.Conv2d, layer), norm)


def _affine(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """Return the norm with a scale and a shift, which torch's fusion into linear layers requires."""
    if norm.affine:
        return norm
    full = copy.copy(norm)
    mean = norm.running_mean
    assert mean is not None  # the caller has looked
    full._parameters = {"weight": nn.Parameter(torch.ones_like(mean)), "bias": nn.Parameter(torch.zeros_like(mean))}
    return full
