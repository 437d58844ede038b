"""Checks of samples and options against a traced network, before any pass runs."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tdcompile.core.pipeline import Pipeline
from tdcompile.data.quality import comparable
from tdcompile.data.task import ENOUGH, Task
from tdcompile.errors import InputError, nearest
from tdcompile.ir.diagnostics import Diagnostic, DiagnosticCode
from tdcompile.ir.modules import outputs_of, trained_norms
from tdcompile.ir.onnx_format import OnnxFormat, check_int8_opset
from tdcompile.ir.program import Program, sites
from tdcompile.ir.scoring import is_scored
from tdcompile.ir.target import AskedPrecision, Target

_SCALE_SAMPLES = 64  # of which the variance behind the first layers is taken
_EQUAL_SAMPLES = 64  # that are compared with the first; data that differ do so at the second, as a rule
# Bounds on variance and mean at the first batch norm, against training. CIFAR-10 gives ResNet-20 and -56 0.98 to 1.0
# times the variance of training and a mean off by 0.04 standard deviations; without normalisation 0.06 times (values
# from 0 to 1), or 4,000 times and off by 28 (0 to 255); normalised by other means and deviations, 0.2 times.
FAR, SHIFT = 8.0, 4.0


def check_training_samples(pipeline: Pipeline, task: Task) -> None:
    """Require training samples if a pass trains.

    Raises:
        InputError: a pass trains, and the task has no training samples.
    """
    if pipeline.trainer and not task.trainable:
        raise InputError(f"'{pipeline.trainer}' trains, and there is nothing to train on: give data")


def check_samples_to_judge(max_drop: float | str | None, task: Task) -> None:
    """Require samples to judge the compiled network on if its loss of quality is bounded.

    Raises:
        InputError: ``max_drop`` is set, and the task has neither test nor held-out samples.
    """
    if max_drop is not None and (task.judges is None or not len(task.judges)):
        raise InputError(
            f"max_drop={max_drop} bounds the loss of quality, and there are no samples to measure it "
            f"on: give data with test samples, or at least {ENOUGH} training samples"
        )


def check_outputs_to_judge(asked: str, program: Program) -> None:
    """Require an output that can be compared sample by sample, where a loss of quality is bounded without a metric.

    Args:
        asked: what bounds it, for the message.
        program: the traced network and its task.

    Raises:
        InputError: no output has a real value for each sample.
    """
    if is_scored(program):
        return
    if not any(map(comparable, outputs_of(program.graph, program.inputs))):
        raise InputError(
            f"{asked} bounds the loss of quality, and the network has no output with a real value for each sample that "
            "could be compared: let it return one"
        )


def check_sample_inputs(program: Program) -> None:
    """Require that samples have as many inputs as the network, and the batch along their first axis.

    Raises:
        InputError: a sample has fewer or more, or the network takes batches of an input along another axis.
    """
    sampled = any(samples is not None and len(samples) for samples in (program.task.train, program.task.test))
    other = next((axis for axis in program.samples_along if axis), None)
    if sampled and other is not None:
        raise InputError(
            f"a batch of the data lies along axis 0, and the network takes an input with its batch along axis {other}: "
            "wrap the network so that it takes the batch first"
        )
    for samples, what in ((program.task.train, "training"), (program.task.test, "test")):
        if samples is not None and len(samples):
            count = len(next(samples.batches(1, limit=1)).inputs)
            if count != len(program.inputs):
                raise InputError(
                    f"a {what} sample has {count} input(s), and the network was given {len(program.inputs)}"
                )


def check_precision(target: Target, form: OnnxFormat) -> None:
    """Refuse a precision that the target has no kernels for.

    Raises:
        InputError: fp16 on CPU, or int8 at an opset before ``INT8_OPSET``.
    """
    if target.precision == "fp16" and target.device == "cpu":
        raise InputError(
            "fp16 on CPU is slower than fp32: onnxruntime's CPU provider has few fp16 kernels and converts to fp32 "
            "around the rest; take --precision int8 or fp32, or --target cuda"
        )
    if target.precision == "int8":
        check_int8_opset(form.opset)


def calibrated(target: Target, task: Task, asked: AskedPrecision) -> tuple[Target, list[Diagnostic]]:
    """Return the target, and a message if ``auto`` leaves int8 out because there are no samples for ranges.

    Raises:
        InputError: int8 is asked for, and there are no training samples.
    """
    if target.precision != "int8" or task.trainable:
        return target, []
    if asked != "auto":
        raise InputError(
            "int8 needs calibration samples, which tell the ranges of activations: give --data, or take "
            "--precision fp32"
        )
    why = "precision=auto leaves int8 out: there are no calibration samples (--data), which tell the ranges"
    return replace(target, precision="fp32"), [Diagnostic("warning", DiagnosticCode.NOT_QUANTIZED, why)]


def check_not_quantised(program: Program) -> None:
    """Refuse int8 for a network that is quantised already.

    Raises:
        InputError: a module is one of torch's quantised ones.
    """
    told = (entry for entry in program.history if isinstance(entry, Diagnostic))
    known = next((entry for entry in told if entry.code == DiagnosticCode.QUANTISED), None)
    if known is not None and program.target.precision == "int8":
        raise InputError(f"int8 needs a float network; {known.text}: give the network from before its quantisation")


def equal_samples_warnings(program: Program) -> list[Diagnostic]:
    """Return a warning if the calibration samples are one sample, or ``_EQUAL_SAMPLES`` of them have equal values."""
    train = program.task.train
    if train is None or len(train) == 0:
        return []
    if len(train) == 1:
        why = "calibration reads one sample only: the factors fit that sample, so give more if others matter"
        return [Diagnostic("warning", DiagnosticCode.DATA, why)]
    try:
        first = train.batch([0]).inputs
        places = range(0, len(train), max(1, len(train) // _EQUAL_SAMPLES))
        others = (train.batch([place]).inputs for place in places[1:])
        if any(not torch.equal(x, y) for other in others for x, y in zip(first, other, strict=True)):
            return []
    except (RuntimeError, InputError):
        return []  # calibration says what does not fit
    values = {float(x.reshape(-1)[0]) for x in first if x.numel() and bool((x == x.reshape(-1)[0]).all())}
    constant = f", all {values.pop():g}" if len(values) == len(first) == 1 else ""
    why = (
        f"the {len(train)} calibration samples have equal values{constant}: the compiled network may be useless on any "
        "other input, so check how the data are read"
    )
    return [Diagnostic("warning", DiagnosticCode.DATA, why)]


@torch.no_grad()
def scale_warnings(program: Program) -> list[Diagnostic]:
    """Return a warning if the calibration samples have another scale than the network was trained with.

    The first trained batch norm knows the mean and the variance of its input in training. The samples are far off if
    the median over its channels of the variance's ratio is outside ``1 / FAR`` to ``FAR``, or that of the mean's shift
    is above ``SHIFT`` standard deviations. Networks without batch norm do not say what they expect.
    """
    train = program.task.train
    norm = next(iter(trained_norms(program.graph)), None)
    if norm is None or train is None or program.target.precision != "int8":
        return []
    mean, variance = norm.running_mean, norm.running_var
    assert isinstance(mean, Tensor)  # ``trained_norms`` has looked
    assert isinstance(variance, Tensor)
    seen: list[Tensor] = []
    handle = norm.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().transpose(0, 1).flatten(1)))
    size = _SCALE_SAMPLES if program.dynamic_batch else len(program.inputs[0])
    try:
        if len(train) >= size or program.dynamic_batch:
            outputs_of(program.graph, next(train.batches(size, limit=size)).inputs)
    except RuntimeError:
        return []  # calibration says what does not fit
    finally:
        handle.remove()
    if not seen:
        return []
    values = torch.cat(seen, 1).double()
    spread = variance.double().clamp(min=torch.finfo(torch.float32).tiny)
    ratio = float((values.var(1, correction=0) / spread).median())
    shift = float(((values.mean(1) - mean.double()).abs() / spread.sqrt()).median())
    unknown = not (math.isfinite(ratio) and math.isfinite(shift))  # the ranges tell what is not finite
    if unknown or (1 / FAR <= ratio <= FAR and shift <= SHIFT):
        return []
    why = (
        f"the calibration samples have another scale than the network expects: behind the first layers their variance "
        f"is {ratio:.2g} times that of training and their mean is off by {shift:.2g} standard deviations; int8 takes "
        "its ranges from them, so check --normalize and the preprocessing"
    )
    return [Diagnostic("warning", DiagnosticCode.DATA, why)]


def float_layers(program: Program, patterns: Sequence[str]) -> frozenset[str]:
    """Return the layers that ``--keep-fp32`` patterns match.

    Raises:
        InputError: a pattern matches no layer, or the compiled model is not int8.
    """
    if patterns and program.target.precision != "int8":
        raise InputError(
            f"keep_fp32 '{patterns[0]}' has no effect in {program.target.precision}: take --precision int8, or leave "
            "it out"
        )
    return frozenset(_matched(program, patterns, "keep-fp32"))


def check_class_names(program: Program, names: Sequence[str]) -> None:
    """Require an output with as many scores as class names, along its second or last axis; two may share one score.

    Raises:
        InputError: no output has that many scores.
    """
    shapes = [tuple(y.shape) for y in outputs_of(program.graph, program.inputs)] if names else []
    scores = {size for shape in shapes if len(shape) > 1 for size in (shape[1], shape[-1])}
    if names and len(names) not in scores | ({2} if 1 in scores else set()):
        told = ", ".join("×".join(map(str, shape)) for shape in shapes)
        raise InputError(f"{len(names)} class names are given as labels, and the network's output is {told}")


def matched_layers(program: Program, patterns: Sequence[str]) -> dict[str, str]:
    """Return the layers that ``--keep-dense`` patterns match, with the reason to report.

    Raises:
        InputError: a pattern matches no layer, or the network has no layer to factorise.
    """
    found = sites(program)
    if not found:
        said = "; ".join(entry.text for entry in program.history if isinstance(entry, Diagnostic))
        raise InputError(f"the network has no convolution or linear layer to factorise{f': {said}' if said else ''}")
    return {
        name: f"left alone as asked by '{pattern}'"
        for name, pattern in _matched(program, patterns, "keep-dense").items()
    }


def _matched(program: Program, patterns: Sequence[str], option: str) -> dict[str, str]:
    """Return the layers that the globs of an option match, each with the last glob that does.

    Raises:
        InputError: a pattern matches no layer.
    """
    found, kept = sites(program), dict[str, str]()
    for pattern in patterns:
        matched = fnmatch.filter(found, pattern)
        if not matched:
            raise InputError(f"--{option} '{pattern}' matches no layer: {nearest(pattern, found)}")
        kept |= dict.fromkeys(matched, pattern)
    return kept
