"""``Sweep``: the models of several budgets, their front and its knee, and the files that a sweep writes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Literal

from rich.table import Table

from tdcompile.artifact.folder import write_folder
from tdcompile.artifact.report import Report
from tdcompile.core.plan import RankPlan
from tdcompile.data.metric import About
from tdcompile.ir.target import Precision
from tdcompile.support.formatting import milliseconds, size

FORMAT = 1  # the format of sweep.json
Across = Literal["latency_ms", "megabytes"]
_AGREEMENT, _ERROR = About("top-1 agreement", True, "%"), About("relative error", False, "%")
_LEAST_BEND = 3  # points that a knee needs: two ends and one between
_BEND = 1e-6  # height above the line, as a share of the front's, that is more than rounding


@dataclass(frozen=True)
class SweepModel:
    """One ONNX model of a sweep.

    Attributes:
        network: dense or compiled.
        latency_ms: median milliseconds of a run; all models of a sweep are in proportion to one dense latency.
        onnx_bytes: size of the file.
        quality: see ``Sweep.measure``; values in ``%`` are shares. None without samples, or if an output is not finite.
    """

    network: Literal["dense", "compiled"]
    precision: Precision
    latency_ms: float
    onnx_bytes: int
    quality: float | None

    @property
    def megabytes(self) -> float:
        """The size of the file in MB."""
        return self.onnx_bytes / 1e6


@dataclass(frozen=True)
class SweepPoint:
    """One budget of a sweep: the plan, and the models that were built and measured.

    Attributes:
        number: from 1, in the order of budgets, the smallest first.
        budget: the share of the dense cost that was asked for, by name.
        plan: builds the compiled network again (``compile(plan=...)``).
        models: the compiled network in fp32, and in the plan's precision if that is another.
        seconds: the time from the choice of the plan to the last measurement.
    """

    number: int
    budget: Mapping[str, float]
    plan: RankPlan
    models: tuple[SweepModel, ...]
    seconds: float

    @property
    def model(self) -> SweepModel:
        """The compiled network in the plan's precision."""
        return self.models[-1]

    @property
    def title(self) -> str:
        """The budget as text."""
        return ", ".join(f"{name}={share:.3g}" for name, share in self.budget.items())

    @property
    def plan_file(self) -> str:
        """The name of the plan's file."""
        return f"plan-{self.number}.json"


@dataclass(frozen=True)
class Sweep:
    """The models of several budgets, from one calibration and one table of prices.

    Attributes:
        source: where the network came from, or the name of its class.
        measure: what ``SweepModel.quality`` is: the task's metric on test samples with targets, else the top-1
            agreement with the dense network, or the relative error. None without samples.
        dense: the dense network in fp32, and in the precision asked for if that is another.
        points: one for each budget, the smallest budget first.
        seconds: of the whole sweep; of its ``shared`` part, all before the first plan; and of the points.
        environment: versions and machine.
        notes: budgets that gave no model, a sentence each.
    """

    source: str
    measure: About | None
    dense: tuple[SweepModel, ...]
    points: tuple[SweepPoint, ...]
    seconds: Mapping[str, float]
    environment: Mapping[str, str]
    notes: tuple[str, ...] = ()

    def models(self) -> list[tuple[SweepModel, SweepPoint | None]]:
        """Return every model with its point; the dense ones, which have none, come first."""
        return [
            *((model, None) for model in self.dense),
            *((model, point) for point in self.points for model in point.models),
        ]

    def front(self, across: Across = "latency_ms") -> list[tuple[SweepModel, SweepPoint | None]]:
        """Return the models that no other beats in both quality and latency or size, the cheapest first.

        Along the front quality and cost rise strictly. Without quality it is empty.

        Args:
            across: the cost.
        """
        judged = [(model, point) for model, point in self.models() if model.quality is not None]
        found: list[tuple[SweepModel, SweepPoint | None]] = []
        for model, point in sorted(judged, key=lambda one: (getattr(one[0], across), -self._good(one[0]))):
            if not found or self._good(model) > self._good(found[-1][0]):
                found.append((model, point))
        return found

    def knee(self, across: Across = "latency_ms") -> tuple[SweepModel, SweepPoint | None] | None:
        """Return the model of the front that lies farthest above the line through its ends; None without a bend.

        Below the knee a saving costs more quality than on average, above it less.
        """
        front = self.front(across)
        if len(front) < _LEAST_BEND:
            return None
        (first, _), (last, _) = front[0], front[-1]

        def above(model: SweepModel) -> float:
            along = (getattr(model, across) - getattr(first, across)) / (getattr(last, across) - getattr(first, across))
            up = (self._good(model) - self._good(first)) / (self._good(last) - self._good(first))
            return float(up - along)

        best = max(front[1:-1], key=lambda one: above(one[0]))
        return best if above(best[0]) > _BEND else None

    def text(self, model: SweepModel) -> str:
        """Return the quality of a model as text; a dash without one."""
        return "–" if self.measure is None or model.quality is None else self.measure.text(model.quality)

    def _good(self, model: SweepModel) -> float:
        """Return the quality so that more is better."""
        sign = 1 if self.measure is None or self.measure.higher_is_better else -1
        return sign * (model.quality or 0.0)

    def to_json(self) -> str:
        """Return the text of ``sweep.json``; plans are in the files that it names."""
        document = {
            "format": FORMAT,
            "source": self.source,
            "measure": None if self.measure is None else asdict(self.measure),
            "dense": [_plain(model) for model in self.dense],
            "points": [
                {
                    "number": point.number,
                    "budget": dict(point.budget),
                    "plan": point.plan_file,
                    "models": [_plain(model) for model in point.models],
                    "seconds": point.seconds,
                }
                for point in self.points
            ],
            "knee": {across: _number(self.knee(across)) for across in ("latency_ms", "megabytes")},
            "seconds": dict(self.seconds),
            "environment": dict(self.environment),
            "notes": list(self.notes),
        }
        return json.dumps(document, indent=1) + "\n"

    def table(self) -> Table:
        """Return the sweep for a terminal."""
        table = Table(title=f"sweep of {self.source}", title_justify="left")
        table.add_column("model")
        for heading in ("latency", "ONNX file", self.measure.name if self.measure else "quality"):
            table.add_column(heading, justify="right")
        knee, front = self.knee(), self.front()
        for model, point in self.models():
            mark = " (knee)" if knee and model is knee[0] else "" if any(model is m for m, _ in front) else " (beaten)"
            named = f"{model.network} {model.precision}" if point is None else f"{point.title} {model.precision}"
            figures = milliseconds(model.latency_ms), size(model.onnx_bytes), self.text(model)
            table.add_row(named + (mark if front else ""), *figures)
        return table

    def save(self, out: str | Path, command: Sequence[str] = ()) -> Path:
        """Write one folder: ``sweep.json``, ``sweep.html``, the plan of every point, and a picture of the front.

        Args:
            out: the folder; an existing one must be empty or written by tdcompile.
            command: the command line, for the manifest.

        Raises:
            InputError: the folder has other files, or cannot be written.
        """
        from tdcompile.artifact.front_page import render_chart, render_front  # the page imports this module

        plans = {point.plan_file: point.plan.to_json() for point in self.points}
        picture = {"front.svg": render_chart(self)} if self.front() else {}
        files = {"sweep.json": self.to_json(), "sweep.html": render_front(self), **picture, **plans}
        return write_folder(Path(out), files, info={"versions": dict(self.environment), "command": list(command)})


def models_of(report: Report) -> tuple[About | None, tuple[SweepModel, ...]]:
    """Return the measure of quality, and the models of one compilation: dense, compiled, and both in its precision."""
    outputs = report.quality.outputs if report.quality else ()
    agreement = min((one.agreement for one in outputs if one.agreement is not None), default=None)
    error = max((math.inf if one.relative_error is None else one.relative_error for one in outputs), default=None)
    scored = report.scored
    measure = scored or (_AGREEMENT if agreement is not None else _ERROR if outputs else None)

    def quality(score: float | None, agreeing: float | None, off: float | None) -> float | None:
        found = score if scored else agreeing if agreement is not None else off
        return None if found is None or not math.isfinite(found) else found

    if report.variants:
        return measure, tuple(
            SweepModel(
                one.network,
                one.precision,
                one.latency_ms or 0.0,
                one.onnx_bytes,
                quality(one.score, one.agreement, one.relative_error),
            )
            for one in report.variants
        )
    dense, compiled, faster = report.dense, report.compiled, report.ratio.latency or 1.0
    own = quality(compiled.score, agreement, error)
    perfect = (1.0, 0.0) if outputs else (None, None)
    whole = dense.latency_ms or 0.0
    return measure, (
        SweepModel("dense", "fp32", whole, dense.onnx_bytes, quality(dense.score, *perfect)),
        SweepModel("compiled", "fp32", whole / faster, compiled.onnx_bytes, own),
    )


def joined(runs: Sequence[Sequence[SweepModel]]) -> tuple[tuple[SweepModel, ...], list[tuple[SweepModel, ...]]]:
    """Return the dense models, and the compiled models of each run in proportion to one dense latency.

    A run times its models together, so that their ratios are exact, and the machine may differ between two runs.

    Args:
        runs: the models of each compilation, the dense one in fp32 first.
    """
    if not runs:
        return (), []
    whole = median(run[0].latency_ms for run in runs)
    scaled = [[replace(one, latency_ms=one.latency_ms / run[0].latency_ms * whole) for one in run] for run in runs]
    dense: dict[Precision, list[SweepModel]] = {}
    for run in scaled:
        for one in run:
            if one.network == "dense":
                dense.setdefault(one.precision, []).append(one)
    shared = tuple(replace(some[0], latency_ms=median(one.latency_ms for one in some)) for some in dense.values())
    return shared, [tuple(one for one in run if one.network == "compiled") for run in scaled]


def _plain(model: SweepModel) -> dict[str, object]:
    return {
        "network": model.network,
        "precision": model.precision,
        "latency_ms": model.latency_ms,
        "onnx_bytes": model.onnx_bytes,
        "quality": model.quality,
    }


def _number(knee: tuple[SweepModel, SweepPoint | None] | None) -> int | None:
    return knee[1].number if knee is not None and knee[1] is not None else None
