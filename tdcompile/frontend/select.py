"""``FrontendSelector``: choose between ``torch.fx`` and ``torch.export`` and check each graph against the network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import fx, nn

from tdcompile.data.nesting import tensors_in
from tdcompile.errors import FixedAxisError, InputError, UntraceableError, first_line
from tdcompile.frontend.equivalence import Case, isolated_copy, output_difference, restoring_state, run_network
from tdcompile.frontend.fx_trace import trace_with_fx
from tdcompile.frontend.guards import Sizes
from tdcompile.frontend.modularize import modularize
from tdcompile.frontend.signature import Call
from tdcompile.frontend.torch_export import trace_with_export
from tdcompile.ir.dynamic_shapes import BATCH, Axis, batch_of, batch_size, sized
from tdcompile.ir.program import sites_of

Frontend = Literal["auto", "fx", "export"]

# Batch sizes of the equivalence check, beside the example's and the next larger one; the second only where code may
# compare the size with a number: torch.export records such comparisons, and symbolic tracing does not.
_EXTRA_BATCHES = (1, 8)
# Limits of the check at other sizes: growth of the inputs, numbers in them, and numbers if they grow by more.
_MAX_GROWTH, _MAX_NUMBERS, _MAX_NUMBERS_BEYOND_GROWTH = 64, 2**26, 2**20
# An integer is assumed to be a token, which costs as much as this many numbers.
_NUMBERS_PER_TOKEN = 64
# Layers without a decomposition, which no front end opens: weights inside them do not count as hidden.
_OPAQUE_LAYERS = (nn.RNNBase, nn.RNNCellBase, nn.Embedding, nn.EmbeddingBag)
# Packages whose functions do not run the network's own code.
_LIBRARY_PACKAGES = ("torch", "_operator", "operator", "builtins", "math")


@dataclass(frozen=True)
class Traced:
    """A graph that is equivalent to the network.

    Attributes:
        leaves: modules that symbolic tracing could not pass through, with reasons.
        untried: sizes that violate a guard of the trace and take too much memory to try.
    """

    graph: fx.GraphModule
    leaves: Mapping[str, str]
    frontend: Literal["fx", "export"]
    untried: Sequence[Sizes] = ()


@dataclass(frozen=True)
class FrontendSelector:
    """Tries the front ends on one network.

    Attributes:
        batch: the dynamic batch axis of each input, or None.
        cases: the network's recorded outputs, which every graph must reproduce.
    """

    module: nn.Module
    call: Call
    axes: tuple[Axis, ...]
    batch: tuple[int | None, ...]
    cases: Sequence[Case]

    def choose(self, frontend: Frontend) -> Traced:
        """Return the graph of a front end; ``auto`` takes symbolic tracing if it sees every layer.

        Raises:
            UntraceableError: the requested front end cannot trace the network.
            FixedAxisError: the network fixes an axis that is to be dynamic.
        """
        if frontend != "auto":
            return self._fx(self._drafted()) if frontend == "fx" else self._export()
        refused: dict[str, InputError] = {}
        drafted = self._tried("fx", self._drafted, refused)
        if drafted is not None and drafted.leaves:  # then export goes first: all its checks would be repeated
            other = self._tried("export", self._export, refused)
            if other is not None:
                return other
        found = self._tried("fx", lambda: self._fx(drafted), refused) if drafted is not None else None
        if found is not None and not found.leaves and not _weights_inside_leaves(found.graph, self.call):
            return found
        if "export" not in refused:
            other = self._tried("export", self._export, refused)
            if other is not None:
                return other
        refused = {name: refused[name] for name in ("fx", "export") if name in refused}
        fixed = next((error for error in refused.values() if isinstance(error, FixedAxisError)), None)
        if found is not None and (fixed is None or not found.leaves):
            leaves = {name: f"{why}; torch.export: {refused['export']}" for name, why in found.leaves.items()}
            return replace(found, leaves=leaves)
        if fixed is not None:
            raise fixed
        said = "; ".join(f"{name}: {error}" for name, error in refused.items())
        raise UntraceableError(f"neither front end can trace the network ({said})")

    def _tried(self, name: str, front: Callable[[], Traced], refused: dict[str, InputError]) -> Traced | None:
        try:
            return front()
        except (UntraceableError, FixedAxisError) as error:
            refused[name] = error
            return None

    def _drafted(self) -> Traced:
        """Return the graph of symbolic tracing, unchecked."""
        graph, leaves = trace_with_fx(isolated_copy(self.module), self.call)
        return Traced(graph, leaves, "fx")

    def _fx(self, drafted: Traced) -> Traced:
        traced = self._checked(drafted)
        untried = self._check_leaf_code(traced.graph) if traced.leaves or _calls_own_code(traced.graph) else []
        self._at_other_sizes(traced.graph, [])
        return replace(traced, untried=untried)

    def _check_leaf_code(self, graph: fx.GraphModule) -> list[Sizes]:
        """Check the network's own code inside the graph's leaves, of which a model contains one control path.

        Returns:
            Sizes that were not tried, see ``_at_other_sizes``.

        Raises:
            FixedAxisError: the code takes another path at another size.
        """
        call = Call.of(graph, self.call.tensors)
        try:
            path, violations = trace_with_export(self._forgetting(graph), call, batch=self.batch, axes=self.axes)
        except (UntraceableError, FixedAxisError):  # the export to ONNX will fail too
            return []
        longer = {axis.name: self.call.tensors[axis.input].shape[axis.axis] + axis.step for axis in self.axes}
        size = batch_size(self.call.tensors, self.batch)
        violations += [[{BATCH: size + 1}]] if size is not None else []
        return self._at_other_sizes(path, [*violations, *([[longer]] if longer else [])])

    def _export(self) -> Traced:
        copied = self._forgetting(self.module)
        graph, violations = trace_with_export(copied, self.call, batch=self.batch, axes=self.axes)
        traced = self._checked(Traced(graph, {}, "export"))
        extra = _EXTRA_BATCHES if violations else _EXTRA_BATCHES[:1]
        return replace(traced, untried=self._at_other_sizes(graph, violations, extra))

    def _forgetting(self, module: nn.Module) -> nn.Module:
        """Return a copy of a network or its graph that was last called at another size than the example's.

        A network may keep what it computed for the size of its last call, such as the grid of a detector. Where the
        sizes are equal, torch.export would take that for a constant, and the size with it.
        """
        copied, shapes = isolated_copy(module), [x.shape for x in self.call.tensors]
        other = next((c.call for c in self.cases if [x.shape for x in c.call.tensors] != shapes), None)
        if other is not None:
            with suppress(Exception), restoring_state(copied):  # a graph of a fixed size may refuse another
                run_network(copied, Call.of(copied, other.tensors) if module is not self.module else other)
        return copied

    def _at_other_sizes(
        self, graph: fx.GraphModule, violations: Sequence[Sequence[Sizes]], extra: Sequence[int] = _EXTRA_BATCHES
    ) -> list[Sizes]:
        """Compare graph and network at sizes that violate a guard; torch treats a batch of one as a constant, too.

        Args:
            graph: the trace of one control path of the network.
            violations: for each guard some sizes that violate it; the first that the network accepts is run.
            extra: further batch sizes to run.

        Returns:
            Sizes that take too much memory, one for each guard that no other size violates.

        Raises:
            FixedAxisError: the network accepts a size at which the graph's outputs differ.
        """
        if self.call.tensors[0].is_meta:
            return []
        batched = batch_size(self.call.tensors, self.batch) is not None
        known: dict[frozenset[tuple[str, int]], bool | None] = {}
        untried: list[Sizes] = []
        for choices in (*violations, *([{BATCH: size}] for size in extra if batched)):
            too_large: list[Sizes] = []
            for sizes in filter(self._in_steps, choices):
                if not self._affordable(sizes):
                    too_large.append(sizes)
                    continue
                key = frozenset(sizes.items())
                if key not in known:
                    known[key] = self._differs(graph, self._call_of_size(sizes))
                if known[key]:
                    raise FixedAxisError(
                        f"the network does something else where {describe_sizes(sizes)} than where it is as in the "
                        f"example, so that axis cannot stay open: give {self._instead(sizes)}"
                    )
                if known[key] is False:
                    break
            else:
                untried += too_large[:1]
        return untried

    def _instead(self, sizes: Sizes) -> str:
        """Return what to give where the network does something else at these sizes."""
        if list(sizes) == [BATCH]:
            return "--no-dynamic-batch"
        lengths = {axis.name: self.call.tensors[axis.input].shape[axis.axis] for axis in self.axes}
        changed = next((name for name in sizes if name in lengths), "")
        alike = [name for name, length in lengths.items() if changed and length == lengths[changed]]
        one = f", or one label for {' and '.join(alike)} if they are to be equal" if len(alike) > 1 else ""
        return f"no --dynamic for it{one}"

    def _in_steps(self, sizes: Sizes) -> bool:
        """Return whether the model is to take these sizes: they differ from the example's by whole steps."""
        return all(
            (sizes[axis.name] - self.call.tensors[axis.input].shape[axis.axis]) % axis.step == 0
            for axis in self.axes
            if axis.name in sizes
        )

    def _affordable(self, sizes: Sizes) -> bool:
        """Return whether inputs of these sizes are small enough to run, relative to the example."""
        most = 0
        growth = 1.0
        for place, (x, along) in enumerate(zip(self.call.tensors, self.batch, strict=True)):
            times = 1.0 if along is None else sizes.get(BATCH, x.shape[along]) / max(x.shape[along], 1)
            for axis in self.axes:
                if axis.input == place:
                    times *= sizes.get(axis.name, x.shape[axis.axis]) / x.shape[axis.axis]
            growth = max(growth, times)
            most += int(x.numel() * times * (1 if x.is_floating_point() else _NUMBERS_PER_TOKEN))
        return most <= (_MAX_NUMBERS if growth <= _MAX_GROWTH else _MAX_NUMBERS_BEYOND_GROWTH)

    def _call_of_size(self, sizes: Sizes) -> Call:
        """Return the example inputs with other sizes of some axes."""
        tensors = self.call.tensors
        for name, size in sizes.items():
            own = [axis for axis in self.axes if axis.name == name]
            tensors = batch_of(tensors, size, self.batch) if name == BATCH else sized(tensors, own, size)
        return self.call.with_tensors(tensors)

    def _differs(self, graph: fx.GraphModule, call: Call) -> bool | None:
        """Return whether the graph's outputs differ from the network's, or None if the network rejects the inputs."""
        try:
            expected = run_network(self.module, call)
        except Exception:  # noqa: BLE001  # the network itself rejects the size
            return None
        try:
            return output_difference(expected, _run_graph(graph, call)) is not None
        except Exception:  # noqa: BLE001  # a graph may fail in any way
            return True

    def _checked(self, traced: Traced) -> Traced:
        """Turn the graph's layers into modules and check that it is equivalent to the network.

        Raises:
            UntraceableError: it is not.
        """
        modularize(traced.graph)
        traced.graph.eval()
        for case in self.cases:
            try:
                got = _run_graph(traced.graph, case.call)
            except Exception as error:  # a graph with a size as a constant may fail in any way
                raise UntraceableError(f"its graph does not run {case.what}: {first_line(error)}") from error
            wrong = output_difference(case.outputs, got)
            if wrong is not None:
                raise UntraceableError(f"its graph does not compute what the network computes {case.what}: {wrong}")
        return traced


def describe_sizes(sizes: Sizes) -> str:
    """Return sizes of dynamic axes in words."""
    return " and ".join(
        f"the batch is {size}" if name == BATCH else f"the axis '{name}' is {size}" for name, size in sizes.items()
    )


@torch.no_grad()
def _run_graph(graph: fx.GraphModule, call: Call) -> list[torch.Tensor]:
    return list(tensors_in(graph(*(x.clone() for x in call.tensors))))


def _calls_own_code(graph: fx.GraphModule) -> bool:
    """Return whether a graph calls the network's own functions, which ``torch.fx.wrap`` keeps as single nodes."""
    return any(
        node.op == "call_function"
        and str(getattr(node.target, "__module__", "")).partition(".")[0] not in _LIBRARY_PACKAGES
        for node in graph.graph.nodes
    )


def _weights_inside_leaves(graph: fx.GraphModule, call: Call) -> list[str]:
    """Return weights in the graph's leaves that belong to no layer of it, such as those of an attention module."""
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
