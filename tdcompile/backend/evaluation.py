"""``evaluate``: run exported models in onnxruntime over samples: the metric, and agreement with the dense model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

# isort: split
import onnxruntime as ort

from tdcompile.backend.session import infer, open_session
from tdcompile.data.metric import About
from tdcompile.data.objective import Objective, has_targets
from tdcompile.data.quality import OutputComparison, OutputQuality, compare_outputs
from tdcompile.data.task import FEW, Batch, Samples
from tdcompile.errors import RuinedError
from tdcompile.ir.memory import samples_within
from tdcompile.ir.modules import outputs_of
from tdcompile.ir.program import Program
from tdcompile.ir.scoring import is_scored, objective_of
from tdcompile.support.processors import free_processors

# Upper bound on the bytes of one model's outputs for a batch; the comparison holds both outputs in float64.
_OUTPUT_BYTES = 2**27
_BATCH = 32  # as fast as 128 or faster, and a quarter of the memory
# Samples, and samples in one batch, of the check before the export.
_CHECKED, _CHECKED_BATCH = 64, 8
# Top-1 agreement below which class scores can be ruined: their error is large too if all scores of a class are shifted.
_RUINED = 0.5


@dataclass(frozen=True)
class Evaluation:
    """Both models on the same samples.

    Attributes:
        samples: number of samples.
        dense_score: the task's metric of the dense model; None without targets.
        compiled_score: the metric of the compiled model.
        outputs: each output of the compiled model against the dense model's.
        metric: what the scores are.
    """

    samples: int
    dense_score: float | None
    compiled_score: float | None
    outputs: tuple[OutputQuality, ...]
    metric: About | None = None


def evaluate(
    dense: Path, others: Sequence[Path], samples: Samples | None, program: Program, limit: int | None = None
) -> list[Evaluation]:
    """Run models over the samples and compare each with the first; nothing if there are no samples.

    Args:
        dense: the file of the dense model.
        others: the files of the models to compare with it.
        samples: the samples to judge by.
        program: gives the target, and the batch if it is fixed.
        limit: upper bound on the number of samples.

    Raises:
        InputError: the samples do not fit the models.
    """
    if samples is None or len(samples) == 0:
        return []
    target = replace(program.target, threads=max(program.target.threads, free_processors()))
    sessions = [open_session(path, target) for path in (dense, *others)]
    each = sum(y.nbytes for y in infer(sessions[0], program.inputs)) // len(program.inputs[0])
    size = max(1, min(samples_within(program, _BATCH), _OUTPUT_BYTES // max(each, 1)))
    batches = filled_batches(samples, program, size, limit)
    return _compared([partial(_outputs, session) for session in sessions], batches, _objective(program, samples))


def evaluate_graph(program: Program, samples: Samples, limit: int | None = None) -> Evaluation:
    """Run the program's graph and the dense network in PyTorch over the samples.

    Args:
        program: the two networks.
        samples: the samples to judge by; at least one.
        limit: upper bound on the number of samples.
    """

    def outputs(graph: nn.Module, inputs: Sequence[Tensor], count: int) -> list[Tensor]:
        return [y[:count] if y.ndim else y for y in outputs_of(graph, inputs)]

    batches = filled_batches(samples, program, samples_within(program, _BATCH), limit)
    networks = [partial(outputs, graph) for graph in (program.dense, program.graph)]
    return _compared(networks, batches, _objective(program, samples))[0]


def _objective(program: Program, samples: Samples) -> Objective | None:
    """Return the objective, if the samples have what it compares outputs with."""
    objective = objective_of(program)
    return objective if objective is not None and has_targets(objective, samples.batch([0])) else None


def _compared(
    networks: Sequence[Callable[[Sequence[Tensor], int], list[Tensor]]],
    batches: Iterable[tuple[Batch, int]],
    objective: Objective | None,
) -> list[Evaluation]:
    """Compare all networks but the first with the first.

    Args:
        networks: each returns the outputs for the first samples of a batch: inputs, and how many to count.
        batches: see ``filled_batches``.
        objective: gives the metric; None without targets.
    """
    about = objective.metric.about if objective else None
    comparisons: list[list[OutputComparison]] = [[] for _ in networks[1:]]
    meters, seen = [objective.meter() if objective else None for _ in networks], 0
    for batch, count in batches:
        theirs, *ours = (outputs(batch.inputs, count) for outputs in networks)
        for place, own in enumerate(ours):
            comparisons[place] = comparisons[place] or [OutputComparison() for _ in theirs]
            compare_outputs(comparisons[place], theirs, own)
        seen += count
        for meter, answers in zip(meters, (theirs, *ours), strict=True):
            if meter is not None:
                meter.update(answers, batch.first(count))
    first, *scores = [None if meter is None else meter.compute() for meter in meters]
    return [
        Evaluation(seen, first, score, tuple(one.result() for one in compared if one.samples), about)
        for score, compared in zip(scores, comparisons, strict=True)
    ]


def check_answers(program: Program) -> None:
    """Require, before the export, that the outputs of the network still depend on its inputs as the dense ones do.

    Without targets, both PyTorch networks are run on a few test or held-out samples.

    Raises:
        RuinedError: the relative error of an output is not below 1, that of a network that always answers with the
            mean, and class scores agree on fewer than half of the samples.
    """
    samples = program.task.judges
    if is_scored(program) or samples is None or len(samples) < FEW:
        return
    comparisons: list[OutputComparison] = []
    for batch in samples.batches(_CHECKED_BATCH, limit=_CHECKED):
        theirs, ours = (outputs_of(module, batch.inputs) for module in (program.dense, program.graph))
        comparisons = comparisons or [OutputComparison() for _ in theirs]
        compare_outputs(comparisons, theirs, ours)
    results = [comparison.result() for comparison in comparisons if comparison.samples]
    ruined = [y for y in results if not y.relative_error < 1 and (y.agreement is None or y.agreement < _RUINED)]
    if not ruined:
        return
    worst = ruined[0]
    agreeing = "" if worst.agreement is None else f", top-1 agrees on {worst.agreement:.1%}"
    raise RuinedError(
        f"the compiled network is ruined: its outputs differ by {worst.relative_error:.3g} times the spread of the "
        f"dense network's on {comparisons[0].samples} samples{agreeing}; raise the budget, give more "
        "samples or tune; --max-drop 100 exports it all the same"
    )


def _outputs(session: ort.InferenceSession, inputs: Sequence[Tensor], count: int) -> list[Tensor]:
    """Return the outputs for the first ``count`` samples of a batch."""
    found = [torch.from_numpy(y) for y in infer(session, inputs)]
    return [y[:count] if y.ndim else y for y in found]


def filled_batches(samples: Samples, program: Program, size: int, limit: int | None) -> Iterator[tuple[Batch, int]]:
    """Yield batches and the number of samples to count: a model of a fixed batch gets its last batch filled up."""
    count = len(samples) if limit is None else min(limit, len(samples))
    if program.dynamic_batch:
        for batch in samples.batches(size, limit=count):
            yield batch, len(batch.inputs[0])
        return
    size = len(program.inputs[0])
    for start in range(0, count, size):
        places = [min(start + i, count - 1) for i in range(size)]
        yield samples.batch(places), min(size, count - start)
