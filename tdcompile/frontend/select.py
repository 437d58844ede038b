"""``FrontendSelector``: choose between ``torch.fx`` and ``torch.export`` and check each graph against the network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import fx, nn

from tdcompile.errors import FixedAxisError, InputError, UntraceableError, first_line
from tdcompile.frontend.equivalence import Case, isolated_copy, output_difference, run_network
from tdcompile.frontend.fx_trace import trace_with_fx
from tdcompile.frontend.guards import Sizes
from tdcompile.frontend.modularize import modularize
from tdcompile.frontend.signature import Call
from tdcompile.frontend.torch_export import trace_with_export
from tdcompile.ir.dynamic_shapes import BATCH, Axis, batch_of, shares_batch, sized
from tdcompile.ir.modules import tensors_in
from tdcompile.ir.program import sites_of

Frontend = Literal["auto", "fx", "export"]

# Batches at which a graph is held against its network, beside that of the example and the next.
_EXTRA_BATCHES = (1, 8)
# A graph is run at other sizes where its inputs grow by so much and hold so many numbers, or beyond by so many.
_MAX_GROWTH, _MAX_NUMBERS, _MAX_NUMBERS_BEYOND_GROWTH = 64, 2**26, 2**20
# A whole number is taken for a word, which costs what so many numbers do.
_NUMBERS_PER_TOKEN = 64
# Layers without a form here, which no front end opens: what is not seen in them is not missed.
_OPAQUE_LAYERS = (nn.RNNBase, nn.RNNCellBase, nn.Embedding, nn.EmbeddingBag)
# What functions come from that run nothing of the network's own.
_LIBRARY_PACKAGES = ("torch", "_operator", "operator", "builtins", "math")


@dataclass(frozen=True)
class Traced:
    """A graph that answers like the network.

    Attributes:
        leaves: the parts that symbolic tracing could not pass through, each with its reason.
        untried: sizes at which the network may go another way, and which take too much memory to try.
    """

    graph: fx.GraphModule
    leaves: Mapping[str, str]
    frontend: Literal["fx", "export"]
    untried: Sequence[Sizes] = ()


@dataclass(frozen=True)
class FrontendSelector:
    """The front ends, tried on one network.

    Attributes:
        cases: what the network answers; every graph is to answer the same.
    """

    module: nn.Module
    call: Call
    axes: tuple[Axis, ...]
    dynamic_batch: bool
    cases: Sequence[Case]

    def choose(self, frontend: Frontend) -> Traced:
        """The graph of a front end; with ``auto``, of symbolic tracing if that sees every layer.

        Raises:
            UntraceableError: what was asked for cannot trace the network.
            FixedAxisError: the network fixes an axis that is to stay open.
        """
        if frontend != "auto":
            return self._fx() if frontend == "fx" else self._export()
        refused: dict[str, InputError] = {}
        found = self._tried(self._fx, refused)
        if found is not None and not found.leaves and not _weights_inside_leaves(found.graph, self.call):
            return found
        other = self._tried(self._export, refused)
        fixed = next((error for error in refused.values() if isinstance(error, FixedAxisError)), None)
        if other is not None:
            return other
        if found is not None and (fixed is None or not found.leaves):
            leaves = {name: f"{why}; torch.export: {refused['export']}" for name, why in found.leaves.items()}
            return replace(found, leaves=leaves)
        if fixed is not None:
            raise fixed
        said = "; ".join(f"{name}: {error}" for name, error in refused.items())
        raise UntraceableError(f"neither front end can trace the network ({said})")

    def _tried(self, front: Callable[[], Traced], refused: dict[str, InputError]) -> Traced | None:
        try:
            return front()
        except (UntraceableError, FixedAxisError) as error:
            refused[front.__name__.strip("_")] = error
            return None

    def _fx(self) -> Traced:
        graph, leaves = trace_with_fx(isolated_copy(self.module), self.call)
        traced = self._checked(Traced(graph, leaves, "fx"))
        untried = self._same_way_within(graph) if leaves or _calls_own_code(graph) else []
        self._at_other_sizes(graph, [])
        return replace(traced, untried=untried)

    def _same_way_within(self, graph: fx.GraphModule) -> list[Sizes]:
        """Try the network's own code, which the graph runs in its leaves and a model has one way through.

        Gives what was not tried, as ``_at_other_sizes`` does.

        Raises:
            FixedAxisError: it goes another way at some other size.
        """
        call = Call.of(graph, self.call.tensors)
        try:
            way, turning = trace_with_export(
                isolated_copy(graph), call, dynamic_batch=self.dynamic_batch, axes=self.axes
            )
        except (UntraceableError, FixedAxisError):  # what cannot be exported does not become a model
            return []
        longer = {axis.name: self.call.tensors[axis.input].shape[axis.axis] + 1 for axis in self.axes}
        batch = next((len(x) for x, b in zip(self.call.tensors, shares_batch(self.call.tensors), strict=True) if b), 0)
        turning += [[{BATCH: batch + 1}]] if self.dynamic_batch and batch else []
        return self._at_other_sizes(way, [*turning, *([[longer]] if longer else [])])

    def _export(self) -> Traced:
        graph, turning = trace_with_export(
            isolated_copy(self.module), self.call, dynamic_batch=self.dynamic_batch, axes=self.axes
        )
        traced = self._checked(Traced(graph, {}, "export"))
        return replace(traced, untried=self._at_other_sizes(graph, turning))

    def _at_other_sizes(self, graph: fx.GraphModule, turning: Sequence[Sequence[Sizes]]) -> list[Sizes]:
        """Run the graph where the network may go another way: a batch of one is a constant to torch, for instance.

        Args:
            graph: one way through the network.
            turning: for each condition some sizes that break it, of which the first that the network takes is run.

        Returns:
            Sizes that would have taken too much memory, where no others broke their condition.

        Raises:
            FixedAxisError: the network takes a size, and the graph gives something else.
        """
        if self.call.tensors[0].is_meta:
            return []
        batched = self.dynamic_batch and any(shares_batch(self.call.tensors))
        known: dict[frozenset[tuple[str, int]], bool | None] = {}
        untried: list[Sizes] = []
        for ways in (*turning, *([{BATCH: size}] for size in _EXTRA_BATCHES if batched)):
            dear: list[Sizes] = []
            for sizes in ways:
                if not self._affordable(sizes):
                    dear.append(sizes)
                    continue
                key = frozenset(sizes.items())
                if key not in known:
                    known[key] = self._differs(graph, self._of(sizes))
                if known[key]:
                    raise FixedAxisError(
                        f"the network does something else where {describe_sizes(sizes)} than where it is as in the "
                        "example, so that axis cannot stay open: give "
                        + ("--no-dynamic-batch" if list(sizes) == [BATCH] else "no --dynamic for it")
                    )
                if known[key] is False:
                    break
            else:
                untried += dear[:1]
        return untried

    def _affordable(self, sizes: Sizes) -> bool:
        """Whether inputs of these sizes are in proportion to the example; a word is more than a pixel."""
        most = 0
        growth = 1.0
        for place, (x, batched) in enumerate(zip(self.call.tensors, shares_batch(self.call.tensors), strict=True)):
            times = sizes.get(BATCH, len(x)) / max(len(x), 1) if batched else 1.0
            for axis in self.axes:
                if axis.input == place:
                    times *= sizes.get(axis.name, x.shape[axis.axis]) / x.shape[axis.axis]
            growth = max(growth, times)
            most += int(x.numel() * times * (1 if x.is_floating_point() else _NUMBERS_PER_TOKEN))
        return most <= (_MAX_NUMBERS if growth <= _MAX_GROWTH else _MAX_NUMBERS_BEYOND_GROWTH)

    def _of(self, sizes: Sizes) -> Call:
        """The example inputs with some axes of other sizes."""
        tensors = self.call.tensors
        for name, size in sizes.items():
            own = [axis for axis in self.axes if axis.name == name]
            tensors = batch_of(tensors, size) if name == BATCH else sized(tensors, own, size)
        return self.call.having(tensors)

    def _differs(self, graph: fx.GraphModule, call: Call) -> bool | None:
        """Whether the graph gives something else than the network; None where that does not take these inputs."""
        try:
            expected = run_network(self.module, call)
        except Exception:  # noqa: BLE001  # a size that the network itself does not take
            return None
        try:
            return output_difference(expected, _run_graph(graph, call)) is not None
        except Exception:  # noqa: BLE001  # as above: a graph fails in any way
            return True

    def _checked(self, traced: Traced) -> Traced:
        """The graph with its layers as modules, which answers like the network.

        Raises:
            UntraceableError: it does not.
        """
        modularize(traced.graph)
        traced.graph.eval()
        for case in self.cases:
            try:
                got = _run_graph(traced.graph, case.call)
            except Exception as error:  # a graph that took an input's size for a constant fails in any way
                raise UntraceableError(f"its graph does not run {case.what}: {first_line(error)}") from error
            wrong = output_difference(case.outputs, got)
            if wrong is not None:
                raise UntraceableError(f"its graph does not compute what the network computes {case.what}: {wrong}")
        return traced


def describe_sizes(sizes: Sizes) -> str:
    """The sizes of some open axes in words."""
    return " and ".join(
        f"the batch is {size}" if name == BATCH else f"the axis '{name}' is {size}" for name, size in sizes.items()
    )


@torch.no_grad()
def _run_graph(graph: fx.GraphModule, call: Call) -> list[torch.Tensor]:
    return list(tensors_in(graph(*(x.clone() for x in call.tensors))))


def _calls_own_code(graph: fx.GraphModule) -> bool:
    """Whether a graph calls functions of the network's own, which ``torch.fx.wrap`` leaves in it as they are."""
    return any(
        node.op == "call_function"
        and str(getattr(node.target, "__module__", "")).partition(".")[0] not in _LIBRARY_PACKAGES
        for node in graph.graph.nodes
    )


def _weights_inside_leaves(graph: fx.GraphModule, call: Call) -> list[str]:
    """Weights in the graph's leaves that no layer of it has: of attention as one module, of a parametrised layer."""
    known = {id(site.module.weight) for site in sites_of(graph, call.tensors).values()}
    found = []
    for node in graph.graph.nodes:
        if node.op == "call_module" and (leaf := graph.get_submodule(str(node.target))) is not None:
            found += [
                f"{node.target}.{name}"
                for name, part in leaf.named_modules()
                if not isinstance(part, _OPAQUE_LAYERS)
                for weight in part.parameters(recurse=False)
                if weight.dim() > 1 and id(weight) not in known
            ]
    return found
