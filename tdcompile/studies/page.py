"""The page of a study: tables of τ, and plots of error against the metric and of τ by level, as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from tdcompile.studies.findings import (
    ERRORS,
    QUESTIONS,
    ErrorName,
    Findings,
    Question,
    When,
    level_name,
    loss_of_quality,
    mean_score,
    notes,
    told,
)
from tdcompile.support.formatting import percent

_WIDTH, _HEIGHT = 400, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 378, 12, 222
_SMALLEST, _LARGEST = 2.5, 5.0  # radii: a larger point means a higher compression


@dataclass(frozen=True)
class Mark:
    """A point of a plot: position, size, series and tooltip."""

    x: float
    y: float
    radius: float
    series: int
    says: str


@dataclass(frozen=True)
class Plot:
    """A plot in the coordinates of its view box.

    Attributes:
        across: labels of the horizontal axis, by position.
        up: labels of the vertical axis, lowest and highest.
        zero: position of the horizontal line at zero.
    """

    title: str
    marks: tuple[Mark, ...]
    across: tuple[tuple[float, str], ...]
    up: tuple[str, str]
    zero: float | None = None

    def series(self) -> list[list[Mark]]:
        """Return the marks of each series in order, to draw lines through them."""
        numbers = dict.fromkeys(mark.series for mark in self.marks)
        return [[mark for mark in self.marks if mark.series == number] for number in numbers]


def render_html(findings: Findings) -> str:
    """Render the study as one page without scripts, other files or network access."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": percent, "level": level_name, "told": told}
    template = environment.from_string(files("tdcompile.studies").joinpath("page.html.j2").read_text(encoding="utf-8"))
    return (
        template.render(
            study=findings,
            errors=ERRORS,
            questions=QUESTIONS,
            mean_score=mean_score,
            notes=notes(findings),
            scatters={when: [scatter(findings, error, when) for error in ERRORS] for when in findings.moments},
            trends={when: [trend(findings, question, when) for question in QUESTIONS] for when in findings.moments},
            box=(_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM),
        )
        + "\n"
    )


def scatter(findings: Findings, error: ErrorName, when: When) -> Plot:
    """Plot one error of every cell against the loss of quality, the error on a logarithmic axis; a series is a method.

    The loss is logarithmic too if none is negative: a share of zero is drawn as half a test sample. An error of zero is
    drawn as the smallest other error.
    """
    about = findings.metric
    cells = [(cell, score) for cell in findings.cells if (score := cell.score(when)) is not None]
    values = [cell.error(error) for cell, _ in cells]
    least = min((value for value in values if value > 0), default=1.0)
    across = [math.log10(max(value, least)) for value in values]
    losses = [loss_of_quality(about, score) for _, score in cells]
    smallest = 0.5 / findings.tested if about.scale > 1 else min((loss for loss in losses if loss > 0), default=1.0)
    up = [math.log10(max(loss, smallest)) for loss in losses] if min(losses, default=0.0) >= 0 else losses
    ranked = sorted(findings.compressions)
    step = (_LARGEST - _SMALLEST) / max(len(ranked) - 1, 1)
    marks = tuple(
        Mark(
            x=_scaled(x, across, _LEFT + 10, _RIGHT - 10),
            y=_scaled(y, up, _BOTTOM - 10, _TOP + 10),
            radius=_SMALLEST + step * ranked.index(cell.compression),
            series=findings.methods.index(cell.method),
            says=f"{cell.layer}, {cell.method} {list(cell.ranks)}, {level_name(cell.compression)}, seed {cell.seed}: "
            f"error {cell.error(error):.3g}, {about.name} {about.text(score)}",
        )
        for (cell, score), x, y in zip(cells, across, up, strict=True)
    )
    ends = zip((_LEFT + 10.0, _RIGHT - 10.0), (min(across, default=0.0), max(across, default=0.0)), strict=True)
    labels = tuple((place, f"{10**value:.3g}") for place, value in ends)
    ordered = sorted((score for _, score in cells), key=lambda score: loss_of_quality(about, score)) or [0.0]
    return Plot(ERRORS[error], marks, labels, (about.text(ordered[0]), about.text(ordered[-1])))


def trend(findings: Findings, question: Question, when: When) -> Plot:
    """Plot τ of every error by level, on an axis from −1 to 1; a series is an error."""
    levels = sorted(findings.compressions)
    places = [_scaled(i, range(len(levels)), _LEFT + 40, _RIGHT - 40) for i in range(len(levels))]
    marks = []
    for number, error in enumerate(ERRORS):
        for place, level in zip(places, levels, strict=True):
            tau = findings.tau(when, question, level, error)
            if tau.mean is not None:
                says = f"{ERRORS[error]}, {level_name(level)}: {told(tau)}"
                marks.append(Mark(place, _scaled(tau.mean, (-1.0, 1.0), _BOTTOM, _TOP), 3.0, number, says))
    names = tuple((place, level_name(level)) for place, level in zip(places, levels, strict=True))
    return Plot(QUESTIONS[question], tuple(marks), names, ("−1", "1"), _scaled(0.0, (-1.0, 1.0), _BOTTOM, _TOP))


def _scaled(value: float, values: Sequence[float], start: float, end: float) -> float:
    """Scale a value to the range from start to end; to the middle if all values are equal."""
    low, high = min(values), max(values)
    share = (value - low) / (high - low) if high > low else 0.5
    return round(start + share * (end - start), 1)
