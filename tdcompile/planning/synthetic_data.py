"""The data ``synthetic``: when samples can be made from a network, when not, and how they become training samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tdcompile.core.hooks import Hook, Work
from tdcompile.core.passes import Pass
from tdcompile.core.registry import make
from tdcompile.data.task import Task, Tensors
from tdcompile.errors import InputError
from tdcompile.ir.diagnostics import Diagnostic, DiagnosticCode
from tdcompile.ir.measurements import SyntheticSamples
from tdcompile.ir.modules import trained_norms
from tdcompile.ir.program import Program

_NO_STATISTICS = (nn.LayerNorm, nn.GroupNorm)


def refusal(program: Program) -> str | None:
    """Return why no samples can be made from a network, and what to do; None if they can."""
    real = "give real samples"
    if len(program.inputs) != 1:
        return f"the network takes {len(program.inputs)} inputs, and samples are made for one; {real}"
    first = program.inputs[0]
    if not first.is_floating_point():
        kind = str(first.dtype).removeprefix("torch.")
        return f"the network's input is {kind}, and samples are made by gradients, which need floats; {real}"
    if any(axis for axis in program.samples_along):
        return f"the batch of the network's input is not its first axis; {real}"
    if trained_norms(program.dense):
        return None
    parts = list(program.dense.modules())
    if any(isinstance(part, _BatchNorm) and part.running_mean is not None for part in parts):
        return "the network's batch norm has never been trained; give trained weights, or real samples"
    other = next((type(part).__name__ for part in parts if isinstance(part, _NO_STATISTICS)), None)
    why = f"its {other} stores no statistics of the data" if other else "it never had any, or it is folded"
    return f"samples are made from the statistics of batch norm, and the network has none ({why}); {real}"


def check_synthetic(program: Program, max_drop: float | str | None) -> None:
    """Refuse synthetic samples where they cannot be made, or where they would have to judge.

    Raises:
        InputError: see ``refusal``; or ``max_drop`` is set, and there are no real test samples.
    """
    task = program.task
    if not task.synthetic:
        return
    if why := refusal(program):
        raise InputError(f"data=synthetic: {why}")
    if max_drop is not None and not task.tested:
        raise InputError(
            f"max_drop={max_drop} bounds the loss of quality, which synthetic samples do not tell: "
            "give real samples, in Python data=('synthetic', test) with real test samples"
        )


def offer(program: Program) -> list[Diagnostic]:
    """Return a message that says what synthetic samples would bring, if there is no data and they can be made."""
    if program.task.trainable or refusal(program) is not None:
        return []
    text = (
        "there is no data, so factors minimise the error of weights and not of outputs: --data synthetic makes samples "
        "from the statistics of batch norm; ResNet-20 at half of its MACs has 87.4 % accuracy with them, and 81.9 % "
        "without (docs/guides/no-data.md)"
    )
    return [Diagnostic("info", DiagnosticCode.NO_DATA, text)]


def cautions(task: Task, trainer: str | None) -> list[Diagnostic]:
    """Return a warning if a pass of this name trains on synthetic samples, which can cost accuracy unseen."""
    if not task.synthetic or trainer is None:
        return []
    text = (
        f"'{trainer}' trains on synthetic samples: that can lose accuracy (docs/results/no-data.md), and only real "
        "test samples tell"
    )
    return [Diagnostic("warning", DiagnosticCode.SYNTHETIC, text)]


def makers(task: Task) -> list[Pass]:
    """Return the pass that makes the training samples; none if they are real."""
    return [make(Pass, task.synthetic)] if task.synthetic else []


class BringSamples(Hook):
    """Put the synthetic samples into the task once they are made, or restored with the state of an earlier run."""

    def begin(self, program: Program, steps: Sequence[Pass], done: int) -> tuple[Program, int]:
        """Add the samples of an earlier run."""
        return _with_samples(program), done

    def around(self, step: Pass, position: int, program: Program, work: Work) -> Program:
        """Add the samples that the step made."""
        return _with_samples(work())


def _with_samples(program: Program) -> Program:
    made, task = program.facts.get(SyntheticSamples), program.task
    if made is None or not task.synthetic or task.train is not None:
        return program
    try:
        samples = Tensors(load_file(made.file)["x"])
    except (OSError, SafetensorError, KeyError) as error:
        raise InputError(
            f"the synthetic samples of the earlier run cannot be read ({error}): leave out --resume"
        ) from error
    return program.with_(task=replace(task, train=samples))
