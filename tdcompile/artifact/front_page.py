"""The page of a sweep, and its charts: quality against milliseconds and megabytes, as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files

from jinja2 import Environment, StrictUndefined, Template

from tdcompile.artifact.front import Across, Sweep, SweepModel, SweepPoint
from tdcompile.core.plan import RankPlan
from tdcompile.support.formatting import milliseconds, size

_LEFT, _RIGHT, _TOP, _BOTTOM = 62.0, 444.0, 30.0, 252.0  # the plot's edges in the view box of 460 x 300
_INSET = 14.0  # between an edge and the outermost mark
_TICKS = 4  # wanted steps of an axis
_LISTED = 16  # layers of a plan in a tooltip
_NAMES: dict[Across, str] = {"latency_ms": "latency (ms)", "megabytes": "ONNX file (MB)"}
_DENSE = "dense"


@dataclass(frozen=True)
class Mark:
    """A model in a chart.

    Attributes:
        kind: CSS classes: network, precision, and whether another model beats it.
        says: the tooltip.
        label: text beside the mark; often empty.
    """

    x: float
    y: float
    kind: str
    says: str
    label: str = ""


@dataclass(frozen=True)
class Tick:
    """A labelled place of an axis."""

    place: float
    label: str


@dataclass(frozen=True)
class Chart:
    """Quality against a cost, in the coordinates of the view box."""

    title: str
    up: str
    marks: tuple[Mark, ...]
    line: tuple[tuple[float, float], ...]
    knee: Mark | None
    across_ticks: tuple[Tick, ...]
    up_ticks: tuple[Tick, ...]


@dataclass(frozen=True)
class _Axis:
    """A linear scale from values to places."""

    values: Sequence[float]
    start: float
    end: float

    def at(self, value: float) -> float:
        low, high = min(self.values), max(self.values)
        share = (value - low) / (high - low) if high > low else 0.5
        inset = _INSET if self.end > self.start else -_INSET
        return round(self.start + inset + share * (self.end - self.start - 2 * inset), 1)

    def ticks(self, text: str, times: float = 1.0) -> tuple[Tick, ...]:
        """Return ticks at round values within the range.

        Args:
            text: a format with ``{}``.
            times: a factor of the shown value.
        """
        low, high = min(self.values) * times, max(self.values) * times
        if high <= low:
            return (Tick(self.at(low / times), text.format(f"{low:.4g}")),)
        rough = (high - low) / _TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * one for one in (1, 2, 5, 10) if power * one >= rough)
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        return tuple(Tick(self.at(n * step / times), text.format(f"{n * step:.4g}")) for n in range(first, last + 1))


def render_front(sweep: Sweep) -> str:
    """Return the sweep as one HTML page without scripts, other files or network access."""
    environment = _environment()
    charts = [chart(sweep, across) for across in _NAMES]
    page = _template(environment, "front.html.j2")
    knee, precisions = sweep.knee(), list(dict.fromkeys(model.precision for model, _ in sweep.models()))
    made: str = page.render(
        sweep=sweep, charts=charts, rows=_rows(sweep), knee=knee, precisions=precisions, svg=_svg(environment)
    )
    return made + "\n"


def render_chart(sweep: Sweep, across: Across = "latency_ms") -> str:
    """Return one chart as an SVG file of its own, for a README."""
    environment = _environment()
    return str(_svg(environment)(chart(sweep, across))) + "\n"


def chart(sweep: Sweep, across: Across) -> Chart:
    """Place every model that has a quality."""
    judged = [(model, point) for model, point in sweep.models() if model.quality is not None]
    front, knee, measure = sweep.front(across), sweep.knee(across), sweep.measure
    x = _Axis([getattr(model, across) for model, _ in judged] or [0.0, 1.0], _LEFT, _RIGHT)
    y = _Axis([model.quality or 0.0 for model, _ in judged] or [0.0, 1.0], _BOTTOM, _TOP)

    def mark(model: SweepModel, point: SweepPoint | None) -> Mark:
        beaten = all(model is not other for other, _ in front)
        kind = f"{model.network} {model.precision}{' beaten' if beaten else ''}"
        label = f"dense {model.precision}" if point is None else ""
        return Mark(x.at(getattr(model, across)), y.at(model.quality or 0.0), kind, _says(sweep, model, point), label)

    marks = tuple(mark(model, point) for model, point in judged)
    return Chart(
        title=_NAMES[across],
        up=measure.name if measure else "",
        marks=marks,
        line=tuple((x.at(getattr(model, across)), y.at(model.quality or 0.0)) for model, _ in front),
        knee=mark(*knee) if knee else None,
        across_ticks=x.ticks("{}"),
        up_ticks=y.ticks(f"{{}} {measure.unit}".rstrip() if measure else "{}", measure.scale if measure else 1.0),
    )


def _says(sweep: Sweep, model: SweepModel, point: SweepPoint | None) -> str:
    name = sweep.measure.name if sweep.measure else ""
    figures = f"{milliseconds(model.latency_ms)}, {size(model.onnx_bytes)}, {name} {sweep.text(model)}"
    if point is None:
        return f"dense network in {model.precision}: {figures}"
    return f"{point.title}, {model.precision}: {figures}\n{_told(point.plan)}"


def _told(plan: RankPlan) -> str:
    """Return the layers of a plan that are replaced, one on a line."""
    replaced = {name: choice for name, choice in plan.choices.items() if not choice.is_dense}
    lines = [f"{name}: {choice.form} {'×'.join(map(str, choice.ranks))}" for name, choice in replaced.items()]
    more = [f"and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
    kept = len(plan.choices) - len(replaced)
    return "\n".join([*lines[:_LISTED], *more, *([f"{kept} layers stay dense"] if kept else [])])


def _rows(sweep: Sweep) -> list[tuple[str, str, str, str, str, str]]:
    """Return a row of text for each model: name, latency, size, quality, forms, and file of the plan."""
    rows = []
    for model, point in sweep.models():
        named = f"{_DENSE} {model.precision}" if point is None else f"{point.title}, {model.precision}"
        forms = "" if point is None else _forms(point.plan)
        figures = milliseconds(model.latency_ms), size(model.onnx_bytes), sweep.text(model)
        rows.append((named, *figures, forms, "" if point is None else point.plan_file))
    return rows


def _forms(plan: RankPlan) -> str:
    """Return how many layers have each form, the commonest first."""
    forms = [choice.decomposition.spec().name for choice in plan.choices.values()]
    ranked = sorted(dict.fromkeys(forms), key=lambda form: (form == _DENSE, -forms.count(form)))
    return ", ".join(f"{forms.count(form)} {form}" for form in ranked)


def _environment() -> Environment:
    return Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def _template(environment: Environment, name: str) -> Template:
    return environment.from_string(files("tdcompile.artifact").joinpath(name).read_text(encoding="utf-8"))


def _svg(environment: Environment) -> Callable[[Chart], str]:
    macro: Callable[[Chart], str] = getattr(_template(environment, "front.svg.j2").module, "svg")  # noqa: B009
    return macro
