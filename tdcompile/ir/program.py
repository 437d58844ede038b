"""``Program``, the value that passes take and return, and ``sites``, its convolution and linear layers."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx, nn

from tdcompile.data.task import Task
from tdcompile.errors import InputError, first_line
from tdcompile.ir.diagnostics import Diagnostic, Reason, ReasonCode
from tdcompile.ir.dynamic_shapes import Axis, default_batch_axes
from tdcompile.ir.facts import Aspect, Fact, Facts
from tdcompile.ir.graph_edits import attribute
from tdcompile.ir.layer import Layer
from tdcompile.ir.modules import called_differently, input_of, separate_attention
from tdcompile.ir.onnx_format import OnnxFormat
from tdcompile.ir.target import Budget, Target


@dataclass(frozen=True)
class Change:
    """A change that a pass made to a layer, as a sentence."""

    layer: str
    step: str
    what: str


@dataclass(frozen=True)
class Site:
    """A convolution or linear layer of the graph, by its module's name.

    Attributes:
        name: the name of the module in the graph.
        module: the module itself; its tensors belong to the program.
        calls: one ``Layer`` for each call of the module; a shared module has several.
        inner: the name of the untraced leaf that contains the module; None if the graph calls it directly.
    """

    name: str
    module: nn.Module
    calls: tuple[Layer, ...]
    inner: str | None = None

    @property
    def layer(self) -> Layer:
        """The layer at the first call."""
        return self.calls[0]

    @property
    def weight(self) -> Tensor:
        """The weight of shape ``(T, C / groups, *kernel)``, detached."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)  # ``Layer.of`` accepts no module without a weight
        return weight.detach()


@dataclass(frozen=True)
class Sites(Fact):
    """The calls of every convolution and linear layer, by name; ``sites`` joins them with the modules of a graph.

    It holds no module, so it stays true for a copy of the graph with other weights.

    Attributes:
        calls: for each layer one ``Layer`` a call, in the order of first calls.
        inner: for each layer the untraced leaf that contains it; None if the graph calls the layer directly.
    """

    reads: ClassVar[frozenset[Aspect]] = frozenset({Aspect.TOPOLOGY})
    calls: Mapping[str, tuple[Layer, ...]] = field(default_factory=dict)
    inner: Mapping[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Program:
    """A network under compilation; every pass returns a new program.

    Attributes:
        graph: the network as it is now.
        inputs: example inputs; with ``dynamic_batch`` their batch is at least 2.
        dense: the network as it was traced, or as exact passes rewrote it: the teacher in tuning, and the reference of
            every figure.
        task: samples for calibration, training and test.
        target: the device to compile for.
        budget: the shares of the dense cost that the compiled network may have.
        facts: results of analysis passes.
        history: changes so far, and layers left as they were with the reason.
        keep_dense: names of layers that the user keeps dense, with the reason to report.
        keep_fp32: names of layers that stay float in an int8 model.
        seed: the seed of every random draw; see ``generator``.
        frontend: the tracer that made the graph, ``fx`` or ``export``.
        dynamic_batch: whether the exported model takes any batch size; otherwise only that of ``inputs``.
        axes: other axes that the exported model takes at any size.
        samples_along: axis of the samples in each input; empty if it is the first where that is as long as the first
            input's. See ``batch_axes``.
        onnx: versions of the exported models and names of their outputs.
        workspace: a folder in which a pass may keep state to resume from; None if nothing is kept.
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
    keep_fp32: frozenset[str] = frozenset()
    seed: int = 0
    frontend: Literal["fx", "export"] = "fx"
    dynamic_batch: bool = True
    axes: tuple[Axis, ...] = ()
    samples_along: tuple[int | None, ...] = ()
    onnx: OnnxFormat = field(default_factory=OnnxFormat)
    workspace: Path | None = None

    @property
    def batch_axes(self) -> tuple[int | None, ...]:
        """The dynamic batch axis of each input; None for an input without one, and for all if the batch is fixed."""
        if not self.dynamic_batch:
            return (None,) * len(self.inputs)
        return self.samples_along or default_batch_axes(self.inputs)

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs: those of the graph's placeholders."""
        found = [str(node.target) for node in self.graph.graph.nodes if node.op == "placeholder"]
        return tuple(found) if len(found) == len(self.inputs) else tuple(f"x{i}" for i in range(len(self.inputs)))

    def generator(self, purpose: str) -> torch.Generator:
        """Return a generator seeded by the seed and the purpose: draws of one pass do not change those of another."""
        return torch.Generator().manual_seed(hash_text(f"{self.seed}/{purpose}"))

    def with_(self, **changes: object) -> Program:
        """Return a copy with some attributes replaced; derived facts are dropped if graph, inputs or task are."""
        if changes.keys() & {"graph", "inputs", "task"} and "facts" not in changes:
            changes["facts"] = self.facts.without_derived()
        return replace(self, **changes)  # type: ignore[arg-type]  # the names are attributes of this class


def hash_text(text: str) -> int:
    """Return a 63-bit number for a text, equal in every run; Python's ``hash`` differs between runs."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def sites(program: Program) -> dict[str, Site]:
    """Return every convolution and linear layer of the graph by name, in the order of first calls.

    The network runs once on the example inputs; the result is cached until a pass changes the topology.

    Raises:
        InputError: the network does not run on the example inputs.
    """

    def compute() -> Sites:
        found = sites_of(program.graph, program.inputs)
        calls = {name: site.calls for name, site in found.items()}
        return Sites(calls, {name: site.inner for name, site in found.items()})

    known = program.facts.derived(Sites, compute)
    modules = dict(program.graph.named_modules())
    return {name: Site(name, modules[name], calls, known.inner[name]) for name, calls in known.calls.items()}


@torch.no_grad()
def sites_of(graph: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Site]:
    """Find the layers of a module by running it once; a module with two names is listed under the first.

    If a network folds another axis into the batch (tokens, windows, frames), a layer runs several times for each
    sample: a linear layer has that axis in its ``extent``, and a convolution counts as called several times. If the
    batch is not the first axis, as in torch's attention, the extent of a linear layer is its rows for one sample.

    Raises:
        InputError: the module does not run on the inputs.
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
            assert isinstance(weight, Tensor)  # ``Layer.of`` accepts no module without a weight
            if not isinstance(module, nn.Linear) and x.dim() != weight.dim():
                return  # a convolution of one sample without a batch axis
            repeats = len(x) // batch if x.dim() and len(x) % batch == 0 else 1
            layer = Layer.of(module, _extent(module, x, repeats, batch))
            assert layer is not None  # the loop skips modules of other kinds
            calls.setdefault(name, []).extend([layer] * (1 if layer.kind == "linear" else max(1, repeats)))

        hooks.append(module.register_forward_pre_hook(record, with_kwargs=True))
    training = graph.training
    try:
        with separate_attention():
            graph.eval()(*(x.clone() for x in inputs))  # the network may write into its inputs
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
    """Return the layers that no decomposition may replace, with the reason.

    A layer is kept dense if the user asks for it, or if it has a hook, a shared weight, or a weight that is not
    floating point. Every pass that chooses layers calls this first; ``factorize`` refuses a plan for such a layer.
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
            kept[name] = Reason(ReasonCode.EXCLUDED_BY_USER, program.keep_dense[name])
        elif called_differently(site.module):
            lost = "it has a forward hook or a forward of its own, which factors would lose"
            kept[name] = Reason(ReasonCode.HOOKED, lost)
        elif sharing:
            kept[name] = Reason(ReasonCode.TIED_PARAMETER, f"its weight also belongs to {', '.join(sharing)}")
        elif site.weight.is_meta or not site.weight.is_floating_point():
            what = f"its weight is {site.weight.dtype} on {site.weight.device}"
            kept[name] = Reason(ReasonCode.NO_FLOAT_WEIGHT, what)
    return kept


def _extent(module: nn.Module, x: Tensor, repeats: int, batch: int) -> tuple[int, ...]:
    if isinstance(module, nn.Linear):
        rows = math.prod(x.shape[:-1])
        if x.dim() > 1 and len(x) % batch and rows % batch == 0:
            return (rows // batch,)
        return (*((repeats,) if repeats > 1 else ()), *x.shape[1:-1])
    return tuple(x.shape[2:])


def _leaf(name: str, called: set[str]) -> str:
    """Return the traced leaf whose name is a prefix of this name; the network itself is ''."""
    parts = name.split(".")
    return next((p for i in range(len(parts), 0, -1) if (p := ".".join(parts[:i])) in called), "")


def parameters_of(module: nn.Module) -> int:
    """Return the number of parameters; shared ones count once."""
    return sum(math.prod(p.shape) for p in module.parameters())
