"""``Objective``: the loss and the metric of a network's outputs; a built-in task, or the user's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tdcompile.data.class_scores import of_tokens
from tdcompile.data.metric import Metric, checked_loss, loss_of, metric_of
from tdcompile.data.nesting import first_not_finite, map_tensors, tensors_in
from tdcompile.data.task import Batch, Note, Task, is_whole
from tdcompile.data.task_kinds import (
    KINDS,
    Classification,
    Language,
    Multilabel,
    Own,
    Regression,
    Restoration,
    Segmentation,
    TaskKind,
    UnfitError,
    described,
    one_hot,
    shape_of,
    size_of,
)
from tdcompile.errors import InputError, nearest

AGREEMENT = "agreement"
NAMES = (*KINDS, AGREEMENT)
_IMAGE_CHANNELS = (1, 3, 4)


@dataclass(frozen=True)
class Objective:
    """The loss and the metric of a network's outputs.

    Attributes:
        kind: the built-in task, or ``Own``.
        metric: the metric that reports, gates and choices use.
        own_loss: the user's loss; None takes that of the task.
        output: index of the scored output.
        outputs: number of the network's outputs.
        chosen: whether the scored output was asked for: a metric of one's own then gets it alone.
    """

    kind: TaskKind
    metric: Metric
    own_loss: Callable[[Any, Any], Tensor] | None = field(default=None, compare=False)
    output: int = 0
    outputs: int = 1
    chosen: bool = False

    @property
    def trains(self) -> bool:
        """Whether there is a loss to train on."""
        return self.own_loss is not None or self.kind.trains

    @property
    def needs_no_targets(self) -> bool:
        """Whether the inputs are the targets, and neither loss nor metric of one's own asks for others."""
        return self.kind.needs_no_targets and not self.metric.raw and self.own_loss is None

    @property
    def class_axis(self) -> int | None:
        """Axis of the class scores in the scored output; None if it holds none."""
        return self.kind.class_axis

    @property
    def classes(self) -> int | None:
        """Number of classes of a classification; None for other tasks."""
        return self.kind.classes

    def loss(self, outputs: Sequence[Tensor], batch: Batch) -> Tensor:
        """Return the mean loss over a batch; the user's own sees all outputs and the targets as they are."""
        if self.own_loss is not None:
            given = outputs[0] if self.outputs == 1 else tuple(outputs)
            targets = map_tensors(lambda y: y.to(outputs[0].device), batch.targets)
            value = checked_loss(self.own_loss, given, targets)
            if outputs[0].requires_grad and not value.requires_grad:
                raise InputError("--loss gives a number without a gradient: compute it from the outputs by torch")
            return value
        return self.kind.loss(*self.kind.pair(outputs[self.output], batch))

    def meter(self) -> ObjectiveMeter:
        """Return a meter that has seen nothing."""
        return ObjectiveMeter(self)


def has_targets(objective: Objective, batch: Batch) -> bool:
    """Return whether a batch has what the objective compares outputs with."""
    return batch.targets is not None or objective.needs_no_targets


def check_metric(objective: Objective, outputs: Sequence[Tensor], batch: Batch) -> None:
    """Try the metric on a few samples before any work.

    Raises:
        InputError: it fails, or is not one number. A metric that is NaN may need more samples.
    """
    if first_not_finite(outputs[objective.output]) is not None:
        return  # calibration names the layer that gives NaN or Inf
    meter = ObjectiveMeter(objective)
    meter.update(outputs, batch)
    meter.tried()


class ObjectiveMeter:
    """The metric of an objective, accumulated over batches of a network's outputs."""

    def __init__(self, objective: Objective) -> None:
        self._objective, self._meter = objective, objective.metric.make()
        self.samples = 0

    def update(self, outputs: Sequence[Tensor], batch: Batch) -> None:
        """Add a batch.

        Raises:
            InputError: an output or a target holds NaN, or the metric fails; the message names the sample.
        """
        objective = self._objective
        output = outputs[objective.output]
        if not output.ndim:
            raise InputError(
                f"the metric '{objective.metric.name}' needs an output with a value for each sample; the scored output "
                "is one number for a whole batch"
            )
        if (bad := first_not_finite(output)) is not None:
            raise InputError(
                f"the metric '{objective.metric.name}' is undefined: the network's output for sample "
                f"{self.samples + bad} holds NaN or Inf"
            )
        if objective.metric.raw:
            given: Any = output if objective.outputs == 1 or objective.chosen else tuple(outputs)
            self._meter.update(given, map_tensors(lambda y: y.to(output.device), batch.targets))
        else:
            self._meter.update(*objective.kind.pair(output, batch))
        self.samples += len(output)

    def tried(self) -> float:
        """Return the metric, which may be NaN.

        Raises:
            InputError: it fails, is infinite, or is not one number.
        """
        value = self._meter.compute()
        if math.isinf(value):
            raise InputError(
                f"the metric '{self._objective.metric.name}' is infinite over {self.samples} samples, so that no "
                "difference can be told: targets that equal the outputs, as for PSNR, may be left out"
            )
        return value

    def compute(self) -> float:
        """Return the metric.

        Raises:
            InputError: it is NaN or infinite.
        """
        value = self.tried()
        if math.isnan(value):
            raise InputError(
                f"the metric '{self._objective.metric.name}' is NaN over {self.samples} samples, whose outputs are "
                "finite: check that the targets vary"
            )
        return value


@dataclass(frozen=True)
class Example:
    """Some samples, and what the dense network answers.

    Attributes:
        batch: the samples.
        outputs: the dense network's outputs for them.
        targets: the targets of more samples, which tell one-hot rows from other rows.
    """

    batch: Batch
    outputs: Sequence[Tensor]
    targets: Any


def resolve_objective(
    task: Task, example: Example, names: Sequence[str], causal: Callable[[int, int], bool]
) -> tuple[Objective | None, tuple[Note, ...]]:
    """Return the objective of a task, and what the report says about it; None if only agreement can be measured.

    Args:
        task: gives the kind, loss, metric and output that were asked for.
        example: some samples and the dense network's outputs.
        names: names of the outputs.
        causal: returns whether scores depend on earlier tokens only, given the indices of the tokens' input and of
            the scores' output.

    Raises:
        InputError: kind, loss, metric or output are unknown, or do not fit targets and outputs.
    """
    batch, outputs = example.batch, example.outputs
    place = _scored(task.output, names)
    own_loss = None if task.loss is None else loss_of(task.loss)
    own_metric = None if task.metric is None else metric_of(task.metric)
    if task.kind == AGREEMENT:
        if own_loss or own_metric:
            raise InputError(f"--task {AGREEMENT} compares with the dense network: leave --loss and --metric out")
        return None, ()
    if task.kind is not None and task.kind not in NAMES:
        raise InputError(f"--task: there is no task '{task.kind}': {nearest(task.kind, NAMES)}")
    output = outputs[place]
    if task.kind is not None:
        if batch.targets is None and task.kind != Language.name:
            raise InputError(f"--task {task.kind} needs targets, and the data have none")
        kind = KINDS[task.kind].fit(output, batch)
    else:
        guessed = _guessed(output, example, lambda tokens: causal(tokens, place), owned=own_metric is not None)
        if guessed is None:
            if own_loss or own_metric:
                given = "--loss" if own_loss else "--metric"
                raise InputError(f"{given} reads targets, and the data have none")
            return None, ()
        kind = guessed
    metric = own_metric or kind.metric()
    objective = Objective(kind, metric, own_loss, place, len(outputs), chosen=task.output is not None)
    direction = "higher is better" if metric.higher_is_better else "lower is better"
    unit = f" in {metric.unit}" if metric.unit else ""
    how = "task" if task.kind else "task guessed from the targets"
    notes = [Note(f"{how}: {kind.name} ({kind.told()}); metric: {metric.name}{unit}, {direction}")]
    if not objective.trains:
        notes.append(Note("the targets have no loss (--loss): tuning distils from the dense network alone"))
    return objective, tuple(notes)


def _scored(wanted: str | int | None, names: Sequence[str]) -> int:
    """Return the index of the scored output.

    Raises:
        InputError: there is no such output.
    """
    if wanted is None:
        return 0
    if isinstance(wanted, int) or wanted.isdecimal():
        if int(wanted) < len(names):
            return int(wanted)
    elif wanted in names:
        return list(names).index(wanted)
    raise InputError(f"--output: there is no output '{wanted}': {nearest(str(wanted), names)}")


def _guessed(output: Tensor, example: Example, causal: Callable[[int], bool], *, owned: bool) -> TaskKind | None:
    """Return the task that targets and output fit, or None without targets.

    Raises:
        InputError: the targets fit no task, and there is no metric of one's own.
    """
    batch = example.batch
    if batch.targets is None:
        if not of_tokens(batch.inputs, output):
            return None
        language = Language.fit(output, batch)
        return language if causal(language.tokens) else None
    found = list(tensors_in(batch.targets))
    if len(found) != 1 or not isinstance(batch.targets, Tensor):
        if owned:
            return Own()
        raise InputError(
            f"the data have {len(found)} targets ({described(batch.targets)}), which no built-in task takes: choose "
            "one by --targets KEY, or give --metric file.py:callable"
        )
    reasons = []
    for kind in _candidates(output, batch, example.targets):
        try:
            return kind.fit(output, batch)
        except UnfitError as error:
            reasons.append(str(error))
    if owned:
        return Own()
    target = found[0]
    why = f": {reasons[0]}" if reasons else ""
    raise InputError(
        f"the targets are {shape_of(target)}, and the network's output is {size_of(output)}{why}; no built-in task "
        "fits them (--task names one, --metric file.py:callable brings your own)"
    )


def _candidates(output: Tensor, batch: Batch, many: Tensor) -> list[type[TaskKind]]:
    """Return the tasks to try, the likeliest first."""
    y: Tensor = batch.targets
    whole = is_whole(y) or y.dtype is torch.bool
    binary = not y.is_complex() and bool(((many == 0) | (many == 1)).all())
    if y.dim() <= 1 or (y.dim() == 2 and y.shape[1] == 1):
        return [Classification] if whole else [Classification, Regression] if binary else [Regression]
    if of_tokens(batch.inputs, output) and whole:
        return [Language]
    if y.dim() == 2 and output.dim() == 2:
        if one_hot(many) and (binary or whole):
            return [Classification, Multilabel]
        return [Multilabel, Regression] if binary else [Regression]
    if whole or (binary and output.dim() > 2 and output.shape[1] == 1):
        return [Segmentation, Regression]
    first = batch.inputs[0]
    image = output.dim() == 4 and output.shape[1] in _IMAGE_CHANNELS
    restored = image and first.dim() == 4 and first.shape[1] == output.shape[1]
    return [Restoration, Regression] if restored else [Regression, Segmentation]
