"""``Program``: the one thing that flows through the passes: graph, inputs, task, target, facts and history."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, fx, nn

from tdcompile.data.task import Task
from tdcompile.errors import InputError, first_line
from tdcompile.ir.diagnostics import Diagnostic, Reason
from tdcompile.ir.dynamic_shapes import Axis
from tdcompile.ir.facts import Facts
from tdcompile.ir.graph_edits import attribute
from tdcompile.ir.layer import Layer
from tdcompile.ir.modules import called_differently, input_of, separate_attention
from tdcompile.ir.target import Budget, Target


@dataclass(frozen=True)
class Change:
    """What a pass did to a layer, in a sentence."""

    layer: str
    step: str
    what: str


@dataclass(frozen=True)
class Site:
    """A convolution or linear layer of the graph, by its module's name.

    Attributes:
        calls: one ``Layer`` for each time the module is called; a shared module has several.
        module: the module itself, whose tensors belong to the program.
        inner: the name of the untraced leaf that contains it; None where the graph calls it directly.
    """

    name: str
    module: nn.Module
    calls: tuple[Layer, ...]
    inner: str | None = None

    @property
    def layer(self) -> Layer:
        """The layer at its first call."""
        return self.calls[0]

    @property
    def weight(self) -> Tensor:
        """``(T, C / groups, *kernel)``, detached."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)  # ``Layer.of`` takes nothing without one
        return weight.detach()


@dataclass(frozen=True)
class Program:
    """A network under compilation; every pass returns a new one.

    Attributes:
        graph: the network; its example ``inputs`` have a batch of at least 2 where that axis stays open.
        dense: the traced network as it came; the teacher of tuning and the reference of every figure.
        keep_dense: layer names the user wants left alone, with the reason to report.
        seed: where every random draw comes from, through ``generator``.
        frontend: what traced the network, ``fx`` or ``export``.
        dynamic_batch: whether the batch axis stays open; otherwise the model takes the batch of ``inputs`` alone.
        axes: those that stay open beside it.
        workspace: a folder in which a pass may keep what it needs to resume; None keeps nothing.
    """

    graph: fx.GraphModule
    inputs: tuple[Tensor, ...]
    dense: fx.GraphModule
    task: Task = field(default_factory=Task)
    target: Target = field(default_factory=Target)
    budget: Budget = field(default_factory=lambda: Budget(latency=0.5))
    facts: Facts = field(default_factory=Facts)
    history: tuple[Change | Diagnostic, ...] = ()
    keep_dense: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0
    frontend: Literal["fx", "export"] = "fx"
    dynamic_batch: bool = True
    axes: tuple[Axis, ...] = ()
    workspace: Path | None = None

    def generator(self, purpose: str) -> torch.Generator:
        """A generator that depends on the seed and the purpose alone, so that passes do not disturb each other."""
        return torch.Generator().manual_seed(hash_text(f"{self.seed}/{purpose}"))

    def with_(self, **changes: object) -> Program:
        """A copy with some attributes replaced."""
        return replace(self, **changes)  # type: ignore[arg-type]  # the names are this class's own


def hash_text(text: str) -> int:
    """A stable 63-bit number for a text (Python's own ``hash`` changes from run to run)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def sites(program: Program) -> dict[str, Site]:
    """Every convolution and linear layer of the graph in the order of its first call, found by running the inputs once.

    Raises:
        InputError: the inputs do not fit the network.
    """
    return sites_of(program.graph, program.inputs)


@torch.no_grad()
def sites_of(graph: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Site]:
    """Like ``sites``, for a module that belongs to no program; a module under two names is listed under the first.

    Where a network folds another axis into the batch (tokens, windows, frames), a layer works so many times for each
    sample: that axis is one of a linear layer's ``extent``, and a convolution counts as called so many times. Where the
    batch is not the first axis, as in torch's attention, what a linear layer does for one sample is told by its rows.
    """
    batch = next((len(x) for x in inputs if x.dim()), 1) or 1
    names = {module: name for name, module in graph.named_modules()}
    calls: dict[str, list[Layer]] = {}
    hooks = []
    for module, name in names.items():
        if Layer.of(module, ()) is None:
            continue

        def record(
            module: nn.Module, arguments: tuple[Tensor, ...], named: dict[str, Tensor], name: str = name
        ) -> None:
            x = input_of(arguments, named)
            weight = module.weight
            assert isinstance(weight, Tensor)  # ``Layer.of`` takes nothing without one
            if not isinstance(module, nn.Linear) and x.dim() != weight.dim():
                return  # a convolution of one sample without a batch axis
            repeats = len(x) // batch if x.dim() and len(x) % batch == 0 else 1
            layer = Layer.of(module, _extent(module, x, repeats, batch))
            assert layer is not None  # the loop has left the others out
            calls.setdefault(name, []).extend([layer] * (1 if layer.kind == "linear" else max(1, repeats)))

        hooks.append(module.register_forward_pre_hook(record, with_kwargs=True))
    training = graph.training
    try:
        with separate_attention():
            graph.eval()(*(x.clone() for x in inputs))  # a network may work in place
    except (RuntimeError, TypeError, IndexError, ValueError) as error:
        shapes = ", ".join("x".join(map(str, x.shape)) + f":{str(x.dtype).removeprefix('torch.')}" for x in inputs)
        reason = first_line(error)
        raise InputError(f"the network does not run on an input of {shapes}: {reason}") from error
    finally:
        graph.train(training)
        for hook in hooks:
            hook.remove()
    modules = dict(graph.named_modules())
    called = (
        {str(n.target) for n in graph.graph.nodes if n.op == "call_module"}
        if isinstance(graph, fx.GraphModule)
        else set()
    )
    return {
        name: Site(name, modules[name], tuple(layers), None if name in called else _leaf(name, called))
        for name, layers in calls.items()
    }


def kept_dense(program: Program, found: Mapping[str, Site]) -> dict[str, Reason]:
    """The layers that no form may replace, and why: kept by the user, with a hook, or on a weight of others or of none.

    Every pass that chooses layers asks this first; ``factorize`` refuses a plan that has not.
    """
    owners: dict[int, list[str]] = {}
    for name, module in program.graph.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    for node in program.graph.graph.nodes:
        if node.op == "get_attr":
            reader = next((user.name for user in node.users), node.name)
            weight = attribute(program.graph, str(node.target))
            owners.setdefault(id(weight), []).append(f"the operator '{reader}'")
    kept: dict[str, Reason] = {}
    for name, site in found.items():
        sharing = [other for other in owners.get(id(site.module.weight), ()) if other != name]
        if name in program.keep_dense:
            kept[name] = Reason("excluded_by_user", program.keep_dense[name])
        elif called_differently(site.module):
            lost = "it has a forward hook or a forward of its own, which factors would lose"
            kept[name] = Reason("hooked", lost)
        elif sharing:
            kept[name] = Reason("tied_parameter", f"its weight also belongs to {', '.join(sharing)}")
        elif site.weight.is_meta or not site.weight.is_floating_point():
            what = f"its weight is {site.weight.dtype} on {site.weight.device}"
            kept[name] = Reason("no_float_weight", what)
    return kept


def _extent(module: nn.Module, x: Tensor, repeats: int, batch: int) -> tuple[int, ...]:
    if isinstance(module, nn.Linear):
        rows = math.prod(x.shape[:-1])
        if x.dim() > 1 and len(x) % batch and rows % batch == 0:
            return (rows // batch,)
        return (*((repeats,) if repeats > 1 else ()), *x.shape[1:-1])
    return tuple(x.shape[2:])


def _leaf(name: str, called: set[str]) -> str:
    """The traced leaf whose name is a prefix of this one; the network itself is ''."""
    parts = name.split(".")
    return next((p for i in range(len(parts), 0, -1) if (p := ".".join(parts[:i])) in called), "")


def parameters_of(module: nn.Module) -> int:
    """How many parameters, shared ones once."""
    return sum(math.prod(p.shape) for p in module.parameters())
