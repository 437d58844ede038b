"""Write the compiled network in int8: single layers in float where that pays, or exactly as it was tuned."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor, fx

from tdcompile.backend.deployment import held_out_batches, sample_activations, write_deployed
from tdcompile.backend.evaluation import filled_batches
from tdcompile.backend.learned_quantization import LearnedScales
from tdcompile.backend.lowering import timing_inputs
from tdcompile.backend.quantize import Quantized, exact_overrides, write_quantized
from tdcompile.backend.quantized_form import form_of
from tdcompile.backend.quantized_parity import check_quantized
from tdcompile.backend.sensitive_layers import (
    LARGER,
    LARGER_OF_SMALLEST,
    NOISE_SAMPLES,
    SLOWER,
    Trial,
    back_to_float,
    suspects,
    tensor_noise,
)
from tdcompile.backend.session import time_models
from tdcompile.core.plan import RankPlan
from tdcompile.errors import ParityError, TdcompileError
from tdcompile.ir.measurements import GoalSearch
from tdcompile.ir.memory import samples_within
from tdcompile.ir.program import Program
from tdcompile.ir.target import LATENCY_TOLERANCE

CHECKED = 64  # samples on which an int8 model is compared with its own rounded floats


def compiled_int8(program: Program, graph: fx.GraphModule, source: Path, path: Path, dense: Path) -> Quantized:
    """Write the compiled network in int8: with the scales that it was tuned with, else with scales by ranges.

    Args:
        program: gives samples, target, plan and what was tuned.
        graph: the compiled network in its exported form.
        source: its model in fp32.
        path: the file to write.
        dense: the dense model in fp32, against which latency is measured.

    Raises:
        TdcompileError: the file does not have the scales that the network was tuned with.
    """
    learned = program.facts.get(LearnedScales)
    if learned is None or not learned.fit(graph):
        return chosen_int8(program, source, path, dense)[0]
    made = as_tuned(program, source, path, learned)
    if dict(made.scales) != dict(learned.scales):
        raise TdcompileError(
            f"{path.name} does not have the scales that the network was tuned with: leave finetune-int8 out"
        )
    return made


def as_tuned(program: Program, source: Path, path: Path, learned: LearnedScales) -> Quantized:
    """Write a network in int8 with given scales; weights are rounded as in tuning."""
    keep = {*program.keep_fp32, *learned.floats}
    form = form_of(program.target)
    exact = exact_overrides(source, learned.scales, form)
    made = write_quantized(source, path, None, form, keep=keep, overrides=exact)
    return _explained(made, learned.floats)


def chosen_int8(program: Program, source: Path, path: Path, dense: Path) -> tuple[Quantized, Mapping[str, str]]:
    """Write a network in int8, and let layers go back to float if the quantisation error falls enough.

    The samples that judge are neither test samples nor, if there are enough, those that gave the ranges. The latency
    budget must hold as measured, and what costs more than ``SLOWER`` of it must take half of the error off; without
    one, the model may become slower by ``SLOWER`` and larger by ``LARGER``.

    Returns:
        what was written, and the layers that went back to float with the reason.
    """
    seen = sample_activations(program, source)
    first = write_deployed(program, source, path, "int8", seen)
    plan = program.facts.get(RankPlan)
    assert first is not None  # int8 is quantised
    if plan is None:
        return first, {}
    share, tolerated = program.budget.latency, 1 + LATENCY_TOLERANCE
    goal = program.facts.get(GoalSearch)
    largest = first.bytes * (1 + (LARGER_OF_SMALLEST if goal and goal.goal == "smallest" else LARGER))
    judges, known = list(held_out_batches(program, CHECKED)), {}
    noises = tensor_noise(path, source, judges[: max(1, NOISE_SAMPLES // max(1, len(judges[0][0])))])
    layers = [name for name in plan.choices if name not in program.keep_fp32]

    def judge(model: Quantized) -> Trial:
        if model.path not in known:
            timings = time_models([dense, path, model.path], timing_inputs(program), program.target, seconds=1.0)
            first_speed, own = timings[1].speedup.value, timings[2].speedup.value
            if share is None:
                allowed = own * (1 + SLOWER) >= first_speed and model.bytes <= largest
            else:
                allowed = 1 / own <= share * tolerated
            try:
                error = check_quantized(model.path, source, judges, program.target).error
            except ParityError:  # ``measure`` raises it again if it is the model to keep
                error = math.inf
            known[model.path] = Trial(error, allowed, first_speed / own - 1)
        return known[model.path]

    with tempfile.TemporaryDirectory(prefix="tdcompile-") as folder:

        def write(floats: frozenset[str]) -> Quantized:
            made = Path(folder) / f"{'+'.join(sorted(floats))}.onnx"
            trial = write_deployed(program, source, made, "int8", seen, floats)
            assert trial is not None  # int8 is quantised
            return trial

        _, reasons = back_to_float(first, suspects(noises, source, layers), write, judge)
    if not reasons:
        return first, {}
    final = write_deployed(program, source, path, "int8", seen, reasons)
    assert final is not None  # int8 is quantised
    return _explained(final, reasons), reasons


def _explained(made: Quantized, reasons: Mapping[str, str]) -> Quantized:
    """Return a model with the reasons of the layers that went back to float."""
    owners = {name: next((layer for layer in reasons if is_of(name, layer)), "") for name in made.floats}
    return replace(made, floats={name: reasons.get(owners[name], why) for name, why in made.floats.items()})


def is_of(own: str, name: str) -> bool:
    """Return whether a module is a layer or a factor of it, by their names."""
    return own == name or own.startswith(f"{name}.")


def judged_inputs(program: Program, size: int = CHECKED // 8) -> Iterator[tuple[Tensor, ...]]:
    """Yield inputs of test or held-out samples, else of training samples, in batches of at most a size.

    The batches are so small that all values of a network can be kept.
    """
    samples = program.task.judges or program.task.train
    assert samples is not None  # int8 needs samples
    size = samples_within(program, size, kept=True)
    for batch, _ in filled_batches(samples, program, size, min(CHECKED, len(samples))):
        yield batch.inputs
