"""``recalibrate``: re-estimate the batch-norm running statistics of the compressed network on training samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tdcompile.core.passes import Rewritten, TunePass
from tdcompile.data.task import Samples, lacking
from tdcompile.errors import InputError
from tdcompile.ir.diagnostics import Diagnostic, DiagnosticCode
from tdcompile.ir.facts import Aspect, Shared
from tdcompile.ir.graph_edits import calls_of, copy_weights
from tdcompile.ir.modules import input_of
from tdcompile.ir.program import Change, Program
from tdcompile.passes.tune._node_values import Stream, follows, samples_in_memory
from tdcompile.support.progress import report_progress

# Share of the samples that judge the new statistics, their largest number, and the samples in one batch of them.
_JUDGE_SHARE, _JUDGES, _JUDGE_BATCH = 5, 256, 64
# Approximate limit in MB for the values between layers while the statistics are judged.
_MEMORY = 1000


@dataclass(frozen=True)
class Recalibrate(TunePass):
    """Re-estimate batch-norm running statistics on training samples; no weight changes.

    The mean and variance of each layer's input are pooled over all samples, in the compressed and in the dense network.
    The change between the two is applied to the statistics from training, which come from more images and augmented
    ones: mean + (m − m_dense), variance · v / v_dense. A dense network keeps its statistics. While they are pooled,
    batch norm normalises by the current batch, so that wrong statistics of one layer do not reach the next.

    A layer keeps its old statistics if the new ones bring its output no nearer to the dense network's on held-out
    samples. The layers are judged in forward order, each behind the layers that were judged before.

    Attributes:
        samples: upper bound on the training samples to read; as many as calibration reads (``--calibrate``) if fewer.
        batch: samples in one forward pass; larger batches cost memory and did not raise accuracy in our measurements.
        relative: apply the change to the statistics from training; false sets the pooled statistics.
        judge: keep new statistics only where they lower the error on held-out samples.
    """

    name: ClassVar[str] = "recalibrate"
    touches: ClassVar[frozenset[Aspect]] = frozenset({Aspect.STATISTICS})
    samples: Annotated[int, Field(ge=2)] = 2048
    batch: Annotated[int, Field(ge=2)] = 64
    relative: bool = True
    judge: bool = True

    def tune(self, graph: fx.GraphModule, program: Program) -> Rewritten:
        """Set the running statistics of every batch-norm layer.

        Raises:
            InputError: NaN or Inf reaches a batch-norm layer.
        """
        layers = _norms(graph)
        if not layers:
            return Rewritten(
                graph,
                [
                    Diagnostic(
                        "info",
                        DiagnosticCode.NO_BATCHNORM,
                        "recalibrate: the network has no batch-norm layer with running statistics",
                    )
                ],
            )
        train = program.task.train
        why = lacking(train) or ("no training sample is to be read (--calibrate)" if program.task.calibrate < 1 else "")
        if train is None or why:
            told = f"recalibrate: {why}, and batch-norm statistics take two"
            return Rewritten(graph, [Diagnostic("warning", DiagnosticCode.NO_DATA, told)])
        judges = min(_JUDGES, len(train) // _JUDGE_SHARE) if self.judge else 0
        count = max(2, min(self.samples, program.task.calibrate, len(train) - judges))
        order = train.shuffled(program.generator(self.name))
        chosen, judging = order.subset(range(count)), order.subset(range(count, count + judges))
        old = {name: _Statistics.of(module) for name, module in layers.items()}
        known = _norms(program.dense) if self.relative else {}
        compared = known.keys() & layers.keys()
        pools, before = self._both_pooled(graph, program, chosen) if compared else (*self._pooled([graph], chosen), {})
        for name, module in layers.items():
            pools[name].settle(name, module, before.get(name), known.get(name))
        undone = _undo_worse(graph, program, old, judging)
        told = f"{len(layers)} batch-norm layers on {count} samples"
        told += f"; {len(undone)} undone, because held-out error did not fall: {', '.join(undone)}" if undone else ""
        return Rewritten(graph, [Change("", self.name, told)])

    def _both_pooled(
        self, graph: fx.GraphModule, program: Program, chosen: Samples
    ) -> tuple[dict[str, _Pool], dict[str, _Pool]]:
        """Return the pooled statistics in the compressed and in the dense network.

        Plans share those of the dense network, unless samples differ each time they are read, as augmented ones do:
        both networks must see the same.
        """
        train, shared = program.task.train, program.facts.derived(Shared, Shared).values
        _, digest = chosen.fingerprint()
        key = (self.name, len(chosen), self.batch, program.seed, digest, id(train), id(program.dense))
        if digest and key in shared:
            (pools,) = self._pooled([graph], chosen)
            _, _, dense = shared[key]
        else:
            pools, dense = self._pooled([graph, copy_weights(program.dense)], chosen)
            shared[key] = train, program.dense, dense  # kept, so that no other object gets their ids
        return pools, dense

    def _pooled(self, graphs: Sequence[fx.GraphModule], samples: Samples) -> list[dict[str, _Pool]]:
        """Return, for each graph, the pooled statistics of every batch-norm layer's input.

        The running statistics are overwritten.
        """
        count, pools, hooks = len(samples), [], []
        for graph in graphs:
            graph.eval()
            pools.append({name: _Pool() for name in _norms(graph)})
            for name, module in _norms(graph).items():
                module.train()
                hooks.append(module.register_forward_pre_hook(pools[-1][name], with_kwargs=True))
        try:
            with torch.no_grad():
                # Equal parts: a last batch of one sample has no variance.
                parts = torch.arange(count).tensor_split(min(math.ceil(count / self.batch), count // 2))
                for done, part in enumerate(parts, start=1):
                    batch = samples.batch(part.tolist())
                    for graph in graphs:
                        graph(*batch.copies())
                    report_progress(done, len(parts), "batches")
        finally:
            for hook in hooks:
                hook.remove()
            for graph in graphs:
                graph.eval()
        return pools


@dataclass(frozen=True)
class _Statistics:
    """Running mean and variance of a layer."""

    mean: Tensor
    variance: Tensor

    @classmethod
    def of(cls, module: _BatchNorm) -> _Statistics:
        assert module.running_mean is not None  # ``_norms`` skips layers without running statistics
        assert module.running_var is not None
        return cls(module.running_mean.clone(), module.running_var.clone())

    def write(self, module: _BatchNorm) -> None:
        assert module.running_mean is not None
        assert module.running_var is not None
        module.running_mean.copy_(self.mean)
        module.running_var.copy_(self.variance)


@torch.no_grad()
def _undo_worse(graph: fx.GraphModule, program: Program, old: Mapping[str, _Statistics], samples: Samples) -> list[str]:
    """Give layers their old statistics where the new ones do not lower the held-out error; return their names.

    A layer that is called more than once keeps the new statistics, as do all layers of a network that changes values
    in a way that cannot be followed, and all layers if there are no held-out samples.
    """
    dense = program.dense.eval()
    if not (len(samples) and follows(graph, program.inputs) and follows(dense, program.inputs)):
        return []
    layers = _norms(graph)
    new = {name: _Statistics.of(module) for name, module in layers.items()}
    for name, module in layers.items():
        old[name].write(module)
    count = min(len(samples), samples_in_memory(graph, program.inputs, _MEMORY))
    batches = [batch.inputs for batch in samples.batches(_JUDGE_BATCH, limit=count)]
    ours, theirs = Stream(graph, batches), Stream(dense, batches)
    undone = []
    nodes = {str(node.target): node for node in graph.graph.nodes if node.op == "call_module"}
    for name in (name for name in nodes if name in layers):
        module, calls, targets = layers[name], calls_of(graph, name), calls_of(dense, name)
        if len(calls) == len(targets) == 1:
            (source,) = calls[0].all_input_nodes
            x, aim = ours.read(calls[0], source), theirs.values(targets[0])
            before = _error(module, x, aim)
            new[name].write(module)
            if not _error(module, x, aim) < before:
                old[name].write(module)
                undone.append(name)
        else:
            new[name].write(module)
        ours.changed(calls)
    return undone


def _error(module: nn.Module, inputs: Sequence[object], targets: Sequence[object]) -> float:
    """Return the sum of squared differences of a layer's output from its targets over all batches."""
    return sum(
        float((module(x) - target).square().sum(dtype=torch.float64))
        for x, target in zip(inputs, targets, strict=True)
        if isinstance(x, Tensor) and isinstance(target, Tensor)
    )


class _Pool:
    """Count, mean and sum of squared deviations of a layer's input for each channel, merged by batch (Chan 1979)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def __call__(self, module: nn.Module, arguments: Sequence[Tensor], named: Mapping[str, Tensor]) -> None:
        x = input_of(arguments, named)
        variance, mean = torch.var_mean(x, [axis for axis in range(x.ndim) if axis != 1], correction=0)
        count, mean = x.numel() // x.shape[1], mean.double()
        share = count / (self.count + count)
        off = mean - self.mean
        self.squares = self.squares + variance.double() * count + off.square() * self.count * share
        self.mean = self.mean + off * share
        self.count += count

    def settle(self, name: str, module: _BatchNorm, before: _Pool | None, dense: _BatchNorm | None) -> None:
        """Write the statistics into the layer; a layer that was never called keeps its own.

        Args:
            before: statistics pooled in the dense network.
            dense: the dense network's layer with its statistics from training; None sets the pooled statistics.
        """
        if self.count < 2:
            return
        mean, variance = self.statistics(name)
        if before is not None and dense is not None:
            old_mean, old_variance = before.statistics(name)
            trained = _Statistics.of(dense)
            tiny = torch.finfo(torch.float32).tiny
            mean = trained.mean + (mean - old_mean)
            variance = trained.variance * (variance / old_variance.clamp(min=tiny))
        _Statistics(mean, variance).write(module)

    def statistics(self, name: str) -> tuple[Tensor, Tensor]:
        """Return mean and unbiased variance."""
        mean, variance = torch.as_tensor(self.mean), torch.as_tensor(self.squares) / (self.count - 1)
        if not (mean.isfinite().all() and variance.isfinite().all()):
            raise InputError(f"NaN or Inf reaches the batch-norm layer '{name}': check the data and the weights")
        return mean, variance


def _norms(graph: fx.GraphModule) -> dict[str, _BatchNorm]:
    return {
        name: module
        for name, module in graph.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
