"""``summarise``: a program and its outcome as a ``Report``: figures, rows, gates and the verdict."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tdcompile.artifact.report import (
    Agreement,
    Approximation,
    CompiledFigures,
    Epoch,
    Figures,
    Gate,
    Goal,
    GoalPlan,
    Iteration,
    LayerRow,
    NoisyValue,
    Onnx,
    OutputAgreement,
    Quality,
    Quantization,
    Ratio,
    Report,
    ReportedMetric,
    Synthetic,
    Tuned,
    TunedInt8,
)
from tdcompile.artifact.report import Reason as ReportedReason
from tdcompile.artifact.report import Variant as ReportedVariant
from tdcompile.backend.environment import environment, peak_memory_mb
from tdcompile.backend.evaluation import Evaluation
from tdcompile.backend.export_and_measure import MeasuredNetwork, Outcome, Part, Variant, parts_of
from tdcompile.backend.fake_parity import FakeParity
from tdcompile.backend.learned_quantization import LearnedScales
from tdcompile.backend.parity import Parity
from tdcompile.backend.quality_drop import Drop, judged, quality_drop
from tdcompile.core.plan import DENSE, Candidate, RankPlan
from tdcompile.data.metric import About
from tdcompile.data.task import ENOUGH, Task
from tdcompile.ir.diagnostics import Diagnostic, Reason, ReasonCode
from tdcompile.ir.measurements import GoalSearch, Rehearsal, SyntheticSamples
from tdcompile.ir.program import Change, Program, sites_of
from tdcompile.ir.scoring import objective_of
from tdcompile.ir.target import LATENCY_TOLERANCE, LIMITED, Cost
from tdcompile.support.allowed_drop import AllowedDrop
from tdcompile.training.run_state import Int8Tuning, Tuning

# Allowed excess of counted figures, which are exact except for rounding.
ROUNDING = 1e-3
# Below this speed over int8 alone a loss of quality is a bad bargain: the MobileNetV2 of docs/results/precision.md lost
# 5 points for 1.015 times the speed.
BARGAIN = 1.1
MARGIN = 1.1  # the latency of a small int8 model over fp32 changes by as much from one compilation to the next
_FP32_ONLY = 2  # models of a compilation to fp32: dense and compiled


@dataclass(frozen=True)
class Run:
    """Figures of all runs of a compilation: seconds of each pass and in total, score before the first training pass.

    Attributes:
        source: the source of the network, or the name of its class.
        max_drop: gate: largest allowed loss of quality.
        min_speedup: gate: smallest allowed ratio of dense to compiled latency.
        peak_memory_mb: the highest memory of earlier runs of a resumed compilation, in MB.
        metadata: the user's entries of the models' metadata.
        labels: class names.
    """

    source: str
    pipeline: str
    seconds: Mapping[str, float]
    total: float
    before_tuning: float | None
    max_drop: AllowedDrop | None = None
    min_speedup: float | None = None
    peak_memory_mb: float = 0.0
    metadata: Mapping[str, str] = field(default_factory=dict)
    labels: tuple[str, ...] = ()


def summarise(program: Program, outcome: Outcome, run: Run) -> Report:
    """Return all figures of a compilation; ``gates`` states whether budget and gates are met."""
    dense, compiled = outcome.dense, outcome.compiled
    plan, rehearsal, tuning = program.facts.get(RankPlan), program.facts.get(Rehearsal), program.facts.get(Tuning)
    ratio = Ratio(
        params=dense.params / compiled.params,
        macs=dense.macs / max(compiled.macs, 1),
        latency=compiled.timing.speedup.value,
        latency_interval=(compiled.timing.speedup.low, compiled.timing.speedup.high),
    )
    gates, goal = tuple(_gates(program, run, outcome)), program.facts.get(GoalSearch)
    enough = goal.head if goal else _int8_alone(program, run, outcome)
    return Report(
        source=run.source,
        verdict=_verdict(outcome, program, ratio, gates, enough),
        seed=program.seed,
        pipeline=run.pipeline,
        frontend=program.frontend,
        selector=plan.selector if plan else "",
        gap=plan.gap if plan else None,
        budget=program.budget.shares,
        gates=gates,
        metric=_metric(program),
        goal=_goal(goal) if goal else None,
        dense=Figures(**_figures(dense)),
        compiled=CompiledFigures(**_figures(compiled), score_before_tuning=run.before_tuning),
        precision=plan.precision if plan else program.target.precision,
        variants=tuple(_variants(outcome)),
        quantization=_quantization(outcome),
        ratio=ratio,
        realised=ratio.latency / ratio.macs if ratio.latency is not None else None,
        predicted_latency_ms=_predicted(plan, dense),
        parity=_agreement(compiled.parity),
        dense_parity=_agreement(dense.parity),
        quality=_quality(outcome.evaluation, program),
        approximation_error=Approximation(max_abs=outcome.approximation[0], max_rel=outcome.approximation[1]),
        synthetic=_synthetic(program.facts.get(SyntheticSamples)),
        layers=tuple(_rows(program, plan, outcome)),
        iterations=tuple(
            Iteration(
                round=number,
                predicted_ms=entry.predicted * 1e3,
                measured_ms=entry.measured * 1e3,
                put_back=entry.put_back,
            )
            for number, entry in enumerate(rehearsal.rounds if rehearsal else (), start=1)
        ),
        tuning=Tuned(**_tuned(tuning)) if tuning and tuning.epochs else None,
        tuning_curve=tuple(
            Epoch(epoch=e.epoch, train_loss=e.train_loss, heldout_score=e.heldout_score)
            for e in (tuning.curve if tuning else ())
        ),
        tuning_int8=_tuned_int8(program),
        seconds={**run.seconds, "total": run.total},
        peak_memory_mb=max(run.peak_memory_mb, peak_memory_mb()),
        environment=environment(program.target),
        onnx=Onnx(
            opset=compiled.exported.opset,
            ir=compiled.exported.ir,
            inputs=compiled.exported.input_names,
            outputs=compiled.exported.output_names,
            metadata=dict(run.metadata),
            labels=run.labels,
        ),
        notes=tuple(_notes(program, outcome)),
    )


def _tuned(tuning: Tuning) -> dict[str, Any]:
    kept = next((epoch for epoch in tuning.curve if epoch.epoch == tuning.best_epoch), None)
    return {
        "epochs": tuning.epochs,
        "kept_epoch": tuning.best_epoch,
        "rate": tuning.rate,
        "optimizer": tuning.optimizer,
        "seconds": tuning.seconds,
        "heldout_before": tuning.start_score,
        "heldout_after": tuning.start_score if kept is None else kept.heldout_score,
    }


def _tuned_int8(program: Program) -> TunedInt8 | None:
    tuning, learned = program.facts.get(Int8Tuning), program.facts.get(LearnedScales)
    if tuning is None or learned is None or not tuning.epochs:
        return None
    return TunedInt8(**_tuned(tuning), scales=len(learned.scales))


def _goal(found: GoalSearch) -> Goal:
    return Goal(
        name=found.goal,
        max_drop=found.max_drop,
        samples=found.samples,
        plans=tuple(
            GoalPlan(precision=one.precision, asked=one.asked, kept=one.kept, drop=one.drop, within=one.within)
            for one in found.probes
        ),
    )


def _figures(network: MeasuredNetwork) -> dict[str, Any]:
    return {
        "params": network.params,
        "macs": network.macs,
        "latency_ms": network.timing.median * 1e3,
        "onnx_bytes": network.exported.bytes,
        "score": network.score,
    }


def _synthetic(made: SyntheticSamples | None) -> Synthetic | None:
    if made is None:
        return None
    return Synthetic(samples=made.count, norms=made.norms, shift=made.shift, spread=made.spread)


def _agreement(parity: Parity) -> Agreement:
    return Agreement(provider=parity.provider, max_abs=parity.max_abs, max_rel=parity.max_rel, cases=len(parity.cases))


def _predicted(plan: RankPlan | None, dense: MeasuredNetwork) -> float | None:
    """Return the plan's predicted latency, scaled to the dense latency measured now."""
    if plan is None or not plan.dense.seconds or not plan.predicted.seconds:
        return None
    return plan.predicted.seconds / plan.dense.seconds * dense.timing.median * 1e3


def _rows(program: Program, plan: RankPlan | None, outcome: Outcome) -> Iterator[LayerRow]:
    """Return one row for each layer of the dense network, in the order of first calls."""
    for name, whole in outcome.dense.parts.items():
        choice = plan.choices.get(name) if plan else None
        parts = parts_of(outcome.compiled.parts, name)
        known = plan.reasons.get(name) if plan else None
        yield LayerRow(
            name=name,
            decomposition=choice.form if choice else str(DENSE.spec()),
            ranks=choice.ranks if choice else (),
            error=choice.error if choice else 0.0,
            macs_before=_macs([whole]),
            macs_after=_macs(parts),
            params_before=whole.params,
            params_after=sum(part.params for part in parts),
            ms_before=_milliseconds(outcome.dense, name),
            ms_after=_milliseconds(outcome.compiled, name),
            refusal=_reason(choice, known),
        )


def _macs(parts: Sequence[Part]) -> int:
    return sum(call.macs for part in parts for call in part.calls)


def _milliseconds(network: MeasuredNetwork, name: str) -> float | None:
    seconds = network.layer_seconds.get(name)
    return seconds * 1e3 if seconds else None


def _reason(choice: Candidate | None, known: Reason | None) -> ReportedReason | None:
    if choice is not None and not choice.is_dense:
        return None
    if known is None:
        return ReportedReason(code=ReasonCode.NOT_IN_PLAN, reason="the plan does not mention it")
    return ReportedReason(code=known.code, reason=known.text)


def _gates(program: Program, run: Run, outcome: Outcome) -> Iterator[Gate]:
    """Return the gates: the measured budget, ``--max-drop`` and ``--min-speedup``."""
    yield from budget_gates(program, outcome)
    if run.min_speedup is not None:
        speedup = outcome.compiled.timing.speedup.value
        yield Gate(
            name="min-speedup",
            limit=run.min_speedup,
            value=speedup,
            passed=speedup >= run.min_speedup,
            sentence=f"{speedup:.2f} times as fast as dense, {run.min_speedup:g} wanted",
        )
    if outcome.evaluation is not None and judged(outcome.evaluation):
        yield _quality_gate(quality_drop(run.max_drop, outcome.evaluation), run.max_drop)


def budget_gates(program: Program, outcome: Outcome) -> Iterator[Gate]:
    """Return a gate for each share of the budget; a measured latency may exceed its share slightly."""
    networks = (outcome.dense, outcome.compiled)  # seconds in units of the dense network's
    costs = [Cost(n.params, n.macs, 0.0, 1 / n.timing.speedup.value) for n in networks]
    for name, share in program.budget.shares.items():
        before, after = (getattr(cost, LIMITED[name]) for cost in costs)
        kept = after / before if before else 1.0
        passed = kept <= share * (1 + (LATENCY_TOLERANCE if name == "latency" else ROUNDING))
        word = "keeps" if kept <= share * (1 + ROUNDING) else "comes near enough to" if passed else "was to keep"
        sentence = f"{name} {word} {share:g} of the dense network's: {kept:.3f} measured"
        yield Gate(name=name, limit=share, value=kept, passed=passed, sentence=sentence)


def _quality_gate(drop: Drop, max_drop: AllowedDrop | None) -> Gate:
    """Return the gate on a loss of quality; without ``max_drop`` it is ``answers``."""
    name = "answers" if max_drop is None else "max-drop"
    return Gate(name=name, limit=drop.limit, value=drop.value, passed=drop.passed, sentence=drop.sentence)


def _metric(program: Program) -> ReportedMetric | None:
    objective = objective_of(program)
    if objective is None:
        return None
    about = objective.metric.about
    return ReportedMetric(
        task=objective.kind.name, name=about.name, unit=about.unit, higher_is_better=about.higher_is_better
    )


def _variants(outcome: Outcome) -> Iterator[ReportedVariant]:
    """Yield the models of a compilation to another precision than fp32."""
    for one in outcome.variants if len(outcome.variants) > _FP32_ONLY else ():
        outputs = one.evaluation.outputs if one.evaluation else ()
        agreeing = [output.agreement for output in outputs if output.agreement is not None]
        errors = [output.relative_error for output in outputs if math.isfinite(output.relative_error)]
        reference = one is outcome.variants[0]
        yield ReportedVariant(
            network=one.network,
            precision=one.precision,
            file=one.path.name,
            latency_ms=one.timing.median * 1e3,
            speedup=one.timing.speedup.value,
            speedup_interval=(one.timing.speedup.low, one.timing.speedup.high),
            onnx_bytes=one.bytes,
            score=one.score,
            agreement=1.0 if reference and outcome.evaluation else min(agreeing, default=None),
            relative_error=0.0 if reference and outcome.evaluation else max(errors, default=None),
        )


def _quantization(outcome: Outcome) -> Quantization | None:
    last = outcome.variants[-1] if outcome.variants else None
    if last is None or last.quantized is None or last.rounding is None:
        return None
    return Quantization(
        family=last.quantized.form.family,
        error=last.rounding.error,
        rounding=last.rounding.kernels,
        fake=last.fake.difference if isinstance(last.fake, FakeParity) else None,
        fake_note=last.fake if isinstance(last.fake, str) else "",
        floats=dict(last.quantized.floats),
        worst=tuple(NoisyValue(name=one.name, snr_db=one.snr, own_snr_db=one.own) for one in last.worst),
    )


def _dense_int8(program: Program, outcome: Outcome) -> Variant | None:
    """Return the dense network in int8 if it was measured and latency is all that the budget asks for."""
    if set(program.budget.shares) != {"latency"}:
        return None
    return next((v for v in outcome.variants if (v.network, v.precision) == ("dense", "int8")), None)


def _int8_alone(program: Program, run: Run, outcome: Outcome) -> str:
    """Return a phrase if the dense network in int8 meets the latency budget and the gates; else an empty text."""
    dense, share = _dense_int8(program, outcome), program.budget.latency
    if dense is None or share is None:
        return ""
    speedup = dense.timing.speedup.value
    met = 1 / speedup <= share * (1 + LATENCY_TOLERANCE) and (run.min_speedup is None or speedup >= run.min_speedup)
    if dense.evaluation is not None and judged(dense.evaluation):
        met = met and quality_drop(run.max_drop, dense.evaluation).passed
    if not met:
        return ""
    better = outcome.compiled.timing.speedup.value / speedup
    beside = f"{better:.2f} times as fast as that" if better >= 1 else f"{1 / better:.2f} times as slow as that"
    return (
        f"int8 alone is enough: the dense network in int8 is {speedup:.2f} times as fast; the compiled one is {beside}"
    )


def _bad_bargain(program: Program, outcome: Outcome) -> str:
    """Return a phrase if the compiled network is hardly faster than int8 alone, and worse; else an empty text."""
    dense, objective, score = _dense_int8(program, outcome), objective_of(program), outcome.compiled.score
    if dense is None or objective is None or dense.score is None or score is None:
        return ""
    return bad_bargain(
        objective.metric.about, dense.score, score, dense.timing.speedup.value, outcome.compiled.timing.speedup.value
    )


def bad_bargain(about: About, alone: float, score: float, alone_speedup: float, speedup: float) -> str:
    """Return what int8 alone would be if the compiled network is less than ``BARGAIN`` times as fast, and worse.

    Args:
        about: the metric.
        alone, score: values of the metric: of the dense network in int8, and of the compiled network.
        alone_speedup, speedup: of the same, over the dense network in fp32.
    """
    faster, drop = speedup / alone_speedup, about.drop(alone, score)
    if faster >= BARGAIN or drop <= 0:
        return ""
    pace = f"{faster:.2f} times as slow" if faster >= 1 else f"{1 / faster:.2f} times as fast"
    share = math.ceil(100 * MARGIN / alone_speedup) / 100
    asked = f": --budget latency={share:g} leaves room for it" if share < 1 else ""
    return f"; int8 alone is {pace} as that and has {about.name} {about.text(alone)}{asked}"


def _verdict(outcome: Outcome, program: Program, ratio: Ratio, gates: Sequence[Gate], enough: str) -> str:
    missed = [gate.sentence for gate in gates if not gate.passed]
    changed = any(gate.name == "answers" and not gate.passed for gate in gates)
    speed = ratio.latency or 1.0
    pace = f"{speed:.2f} times as fast" if speed >= 1.0 else f"{1 / speed:.2f} times as slow"
    pace += " as the dense network"
    objective = objective_of(program)
    before, after = outcome.dense.score, outcome.compiled.score
    if objective is not None and before is not None and after is not None:
        about = objective.metric.about
        quality = f", {about.name} {about.text(before)} to {about.text(after)}"
    elif outcome.evaluation is not None and not outcome.evaluation.outputs:
        quality = ", quality not measured, because no output has a real value for each sample"
    elif outcome.evaluation is not None:
        quality = f", {_kept(outcome.evaluation)}"
    else:
        quality = f", quality not measured, because {_unmeasured(program.task)}"
    head = "the network's answers have changed: " if changed else f"{enough}: " if enough else ""
    quality += "; calibrated on synthetic samples" if program.task.synthetic else ""
    head += f"{pace}, with {ratio.macs:.2f} times fewer MACs and {ratio.params:.2f} times fewer parameters{quality}"
    head += "" if enough else _bad_bargain(program, outcome)
    if speed < 1.0 and "latency" not in {gate.name for gate in gates}:
        head += "; it was chosen without measuring time: --budget latency=SHARE keeps only what is faster"
    return f"{head}; not met: {'; '.join(missed)}" if missed else f"{head}; verified in onnxruntime"


def _unmeasured(task: Task) -> str:
    """Return why there are no samples to judge by."""
    if task.train is None:
        return "there are no samples"
    if task.synthetic:
        return "the samples are synthetic: give real ones"
    return f"{len(task.train)} training samples are too few to hold some out: give test samples, or at least {ENOUGH}"


def _kept(evaluation: Evaluation) -> str:
    """Return how far the outputs are from the dense network's, as a phrase."""
    error = _largest_error(evaluation)
    agreeing = [output.agreement for output in evaluation.outputs if output.agreement is not None]
    kept = f"top-1 agreement {min(agreeing):.1%} and " if agreeing else ""
    why = "without a metric, which needs test samples with targets"
    return f"{kept}relative error {error:.1%} on {evaluation.samples} samples, {why}"


def _largest_error(evaluation: Evaluation) -> float:
    """Return the largest relative error of an output; infinite if an output holds NaN or Inf."""
    errors = [output.relative_error for output in evaluation.outputs]
    return max((error if math.isfinite(error) else math.inf for error in errors), default=0.0)


def _quality(evaluation: Evaluation | None, program: Program) -> Quality | None:
    if evaluation is None:
        return None
    outputs = tuple(
        OutputAgreement(
            relative_error=output.relative_error if math.isfinite(output.relative_error) else None,
            cosine=output.cosine if math.isfinite(output.cosine) else None,
            agreement=output.agreement,
            divergence=output.divergence
            if output.divergence is not None and math.isfinite(output.divergence)
            else None,
        )
        for output in evaluation.outputs
    )
    return Quality(
        samples=evaluation.samples, source="test" if program.task.tested else "held-out training", outputs=outputs
    )


def _notes(program: Program, outcome: Outcome) -> Iterator[str]:
    """Yield messages from the history and the exports that no row contains."""
    yield from history_notes(program.history, sites_of(program.dense, program.inputs))
    for name, reason in outcome.slower.items():
        yield f"'{name}' is not faster in the compiled model: {reason.text}; --keep-dense {name} leaves it dense"
    for network, role in ((outcome.dense, "dense"), (outcome.compiled, "compiled")):
        yield from (f"{role} model: {n.text}" for n in (*network.exported.notes, *network.parity.notes))


def history_notes(history: Iterable[Change | Diagnostic], layers: Container[str]) -> Iterator[str]:
    """Yield messages about the network, and warnings; the reason of a layer is in its row."""
    for entry in history:
        if isinstance(entry, Diagnostic) and (entry.layer not in layers or entry.level == "warning"):
            yield entry.text
