"""``objective_of``: the loss and the metric of a program's task, from its targets and the dense network's outputs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tdcompile.data.nesting import tensors_in
from tdcompile.data.objective import Example, Objective, check_metric, has_targets, resolve_objective
from tdcompile.data.task import Batch, Note, Task
from tdcompile.errors import InputError, first_line
from tdcompile.ir.facts import Fact
from tdcompile.ir.memory import samples_within
from tdcompile.ir.modules import evaluating, output_names, outputs_of, separate_attention
from tdcompile.ir.program import Program
from tdcompile.support.heap import keep_freed_memory

# Most samples in one pass, and the bytes that its outputs may take: scores of a language model are large.
_AT_ONCE, _OUTPUT_BYTES = 256, 2**28
_FIRST = 8  # samples on which the dense network is run to find out what targets mean
_MANY = 256  # samples that tell one-hot rows from rows of any number of labels


@dataclass(frozen=True)
class Scoring(Fact):
    """The objective of a program's task.

    Attributes:
        objective: loss and metric; None if only the agreement with the dense network can be measured.
        notes: what the report says about it.
    """

    objective: Objective | None = None
    notes: tuple[Note, ...] = ()


def objective_of(program: Program) -> Objective | None:
    """Return loss and metric of a program's task; None if only the agreement with the dense network can be measured.

    Raises:
        InputError: task, loss, metric or output are unknown or do not fit targets and outputs.
    """
    return scoring(program).objective


def is_scored(program: Program) -> bool:
    """Return whether there are test samples with targets, on which the metric is measured."""
    objective, test = objective_of(program), program.task.test
    if objective is None or test is None or not program.task.tested:
        return False
    return has_targets(objective, test.batch([0]))


def scoring(program: Program) -> Scoring:
    """Return the objective of a program's task, and what the report says about it.

    The dense network is run on a few samples, because its outputs tell what the targets mean; the result is cached.

    Raises:
        InputError: task, loss, metric or output are unknown or do not fit, or are given without data.
    """
    return program.facts.derived(Scoring, lambda: _scoring(program))


@torch.no_grad()
def _scoring(program: Program) -> Scoring:
    task = program.task
    given = [samples for samples in (task.train, task.test) if samples is not None and len(samples)]
    samples = next((part for part in given if part.batch([0]).targets is not None), next(iter(given), None))
    if samples is None:
        asked = {"task": task.kind, "loss": task.loss, "metric": task.metric, "output": task.output}
        if named := [name for name, value in asked.items() if value is not None]:
            raise InputError(f"--{named[0]} has no effect without samples: give --data")
        return Scoring()
    size = _FIRST if program.dynamic_batch else len(program.inputs[0])
    count = min(size, len(samples))
    batch = samples.batch([min(place, count - 1) for place in range(size if not program.dynamic_batch else count)])
    try:
        with evaluating(program.dense), separate_attention():
            answer = program.dense(*batch.copies())
    except (RuntimeError, IndexError) as error:
        raise InputError(f"the network does not run on the first samples: {first_line(error)}") from error
    outputs = [y.detach() for y in tensors_in(answer)]
    names = program.onnx.output_names or output_names(answer)

    def causal(tokens: int, scored: int) -> bool:
        return _is_causal(program, batch, (tokens, scored), outputs[scored])

    known = _told_by_many(batch.targets)
    many = samples.batch(range(min(_MANY, len(samples)))).targets if known else batch.targets
    objective, notes = resolve_objective(task, Example(batch, outputs, many), names, causal)
    if objective is not None:
        check_metric(objective, outputs, batch)
        _check_classes(objective, task, outputs[objective.output])
    return Scoring(objective, notes)


def network_score(program: Program, module: nn.Module) -> float | None:
    """Return the metric of a network on the test samples, in eval mode; None if it is not measured.

    Args:
        program: gives task and objective.
        module: the network, with the outputs of the program's.
    """
    task, objective = program.task, objective_of(program)
    if objective is None or task.test is None or not is_scored(program):
        return None
    return score_of(objective, module, task.test.batches(samples_at_once(program), limit=task.evaluate))


def score_of(objective: Objective, module: nn.Module, batches: Iterable[Batch]) -> float:
    """Return the metric of a network in eval mode over batches with targets."""
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    meter = objective.meter()
    with keep_freed_memory():
        for batch in batches:
            meter.update(outputs_of(module, batch.on(device).inputs), batch)
    return meter.compute()


def samples_at_once(program: Program) -> int:
    """Return the samples to run in one pass: 256, or fewer if the dense network takes much memory."""
    each = sum(y.nbytes for y in outputs_of(program.dense, program.inputs)) // len(program.inputs[0])
    return max(1, min(samples_within(program, _AT_ONCE), _OUTPUT_BYTES // max(each, 1)))


def _told_by_many(targets: object) -> bool:
    """Return whether more samples may tell what the targets are: rows may be one-hot, and floats zeros and ones."""
    return isinstance(targets, Tensor) and (targets.dim() == 2 or targets.is_floating_point())


def _is_causal(program: Program, batch: Batch, places: tuple[int, int], scores: Tensor) -> bool:
    """Return whether the scores of all tokens but the last stay the same if the last token changes.

    Args:
        program: gives the dense network.
        batch: samples.
        places: index of the input that holds the tokens, and of the output that holds the scores.
        scores: that output for the samples, ``(N, T, classes)``.
    """
    tokens, scored = places
    x = batch.inputs[tokens].clone()
    other = x[x != x[0, -1]]
    x[:, -1] = other[0] if len(other) else (x[0, -1] + 1) % scores.shape[2]
    inputs = tuple(x if place == tokens else y for place, y in enumerate(batch.inputs))
    changed = outputs_of(program.dense, inputs)[scored]
    return torch.allclose(changed[:, :-1], scores[:, :-1], rtol=1e-3, atol=1e-4 * float(scores.abs().max()))


def _check_classes(objective: Objective, task: Task, output: Tensor) -> None:
    """Require a score for every class of training and test samples.

    Raises:
        InputError: the class numbers go higher.
    """
    known = [samples.classes for samples in (task.train, task.test) if samples is not None]
    most = max((classes or 0 for classes in known), default=0)
    if objective.classes is not None and most > objective.classes:
        shape = "x".join(map(str, output.shape))
        raise InputError(
            f"the labels go up to {most - 1}, and the network's output is {shape}: expected a score for each class"
        )
