"""``Findings``: the measurements of an approximation-error study, cell by cell, and their tables for a terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from statistics import fmean
from typing import Literal

from pydantic import BaseModel, ConfigDict
from rich.table import Table
from rich.text import Text

from tdcompile.data.metric import About

When = Literal["before", "after"]
Question = Literal["methods", "layers", "overall"]
ErrorName = Literal[
    "weights_absolute",
    "weights_relative",
    "weights_scaled",
    "features_absolute",
    "features_relative",
    "features_scaled",
]

# Names of the errors in tables and plots.
ERRORS: Mapping[ErrorName, str] = {
    "weights_absolute": "weights, absolute",
    "weights_relative": "weights, relative",
    "weights_scaled": "weights, scaled",
    "features_absolute": "features, absolute",
    "features_relative": "features, relative",
    "features_scaled": "features, scaled",
}
QUESTIONS: Mapping[Question, str] = {
    "methods": "across methods",
    "layers": "across layers",
    "overall": "overall",
}


class _Part(BaseModel):
    """Base of the parts: immutable, no unknown fields, no NaN or Inf, which JSON cannot express."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class Cell(_Part):
    """One compressed layer: its six errors, and the scores of the whole network."""

    key: str
    """Digest of everything that decides the cell: network, data, settings, layer, decomposition, ranks and seed."""
    layer: str
    method: str
    ranks: tuple[int, ...]
    compression: float
    """Share of the layer's weights to remove."""
    kept: float
    """Share of the layer's weights that these ranks keep."""
    seed: int
    """Seed of the calibration sample and of fine-tuning; the factors do not depend on it."""
    weights_absolute: float
    weights_relative: float
    weights_scaled: float
    features_absolute: float
    features_relative: float
    features_scaled: float
    score_before: float
    """The metric on the test samples before fine-tuning; a share in [0, 1] if its unit is %."""
    score_after: float | None
    """The metric after fine-tuning of the whole network; null without fine-tuning."""
    seconds: float

    def error(self, name: ErrorName) -> float:
        """Return one of the six errors."""
        return float(getattr(self, name))

    def score(self, when: When) -> float | None:
        """Return the metric before or after fine-tuning."""
        return self.score_before if when == "before" else self.score_after


class Failure(_Part):
    """A cell that could not be measured, and the reason."""

    layer: str
    method: str
    compression: float
    seed: int
    reason: str


class Omission(_Part):
    """A layer to which a method does not apply, and the reason."""

    layer: str
    method: str
    reason: str


class Tau(_Part):
    """Kendall's τ between one error and the loss of quality, for one question at one level."""

    when: When
    question: Question
    level: float | None
    """The compression; null pools all compressions."""
    error: ErrorName
    mean: float | None
    """Mean over the seeds; null if no group has two cells that differ."""
    sd: float | None
    """The population standard deviation over the seeds; 0 for one seed."""
    groups: int
    """Largest number of layers, or methods, over which τ was averaged for one seed."""


class Findings(_Part):
    """All measurements of an approximation-error study."""

    schema_version: Literal[2] = 2
    source: str
    data: str
    metric: About
    """The metric of all scores."""
    dense_score: float
    methods: tuple[str, ...]
    compressions: tuple[float, ...]
    layers: tuple[str, ...]
    seeds: tuple[int, ...]
    tune: str
    """The fine-tuning pass, or ``none``."""
    calibrate: int
    """Number of training samples over which feature errors are averaged."""
    tested: int
    """Number of test samples of each score."""
    cells: tuple[Cell, ...]
    taus: tuple[Tau, ...]
    omitted: tuple[Omission, ...] = ()
    failed: tuple[Failure, ...] = ()
    seconds: float
    """Total time of all cells, over all processes and interrupted runs."""
    environment: dict[str, str]

    @property
    def moments(self) -> tuple[When, ...]:
        """``before``, and ``after`` if the network was fine-tuned."""
        return ("before",) if self.tune == "none" else ("before", "after")

    def tau(self, when: When, question: Question, level: float | None, error: ErrorName) -> Tau:
        """Return one of ``taus``."""
        wanted = (when, question, level, error)
        return next(tau for tau in self.taus if (tau.when, tau.question, tau.level, tau.error) == wanted)

    def to_json(self) -> str:
        """Return the text of ``study.json``."""
        return self.model_dump_json(indent=1) + "\n"

    @classmethod
    def schema_json(cls) -> str:  # type: ignore[override]  # pydantic's own, of this name, is deprecated
        """Return the JSON schema of ``study.json``."""
        return json.dumps(cls.model_json_schema(mode="serialization"), indent=1) + "\n"


def tables(findings: Findings) -> list[Table]:
    """Return the tables for a terminal: scores, then τ before and after fine-tuning."""
    return [_scores(findings), *(_taus(findings, when) for when in findings.moments)]


def notes(findings: Findings) -> list[str]:
    """Return one sentence for each part that is missing from the findings."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for one in findings.omitted:
        reasons.setdefault((one.layer, one.reason), []).append(one.method)
    left_out = [f"left out: {layer} by {', '.join(names)}: {reason}" for (layer, reason), names in reasons.items()]
    failed = [
        f"failed: {one.layer} by {one.method}, {level_name(one.compression)}, seed {one.seed}: {one.reason}"
        for one in findings.failed
    ]
    alike = [
        f"no τ {when} fine-tuning: {findings.metric.name} is the same in all cells"
        for when in findings.moments
        if len({cell.score(when) for cell in findings.cells}) < 2
    ]
    return left_out + failed + alike


def level_name(level: float | None) -> str:
    """Write ``0.75`` as ``75 % removed``."""
    return "all levels" if level is None else f"{100 * level:g} % removed"


def told(tau: Tau) -> str:
    """Write ``0.51 ± 0.02``, or a dash if there is no τ."""
    if tau.mean is None:
        return "–"
    return f"{tau.mean:.2f}" + (f" ± {tau.sd:.2f}" if tau.sd else "")


def loss_of_quality(about: About, score: float) -> float:
    """Return a number that falls as the metric gets better: the share that is wrong for a metric in %."""
    if not about.higher_is_better:
        return score
    return 1 - score if about.scale > 1 else -score


def mean_score(findings: Findings, method: str, level: float, when: When) -> float | None:
    """Return the mean metric over layers and seeds; None if no cell has one."""
    found = [
        score
        for cell in findings.cells
        if (cell.method, cell.compression) == (method, level) and (score := cell.score(when)) is not None
    ]
    return fmean(found) if found else None


def _scores(findings: Findings) -> Table:
    about = findings.metric
    title = f"mean {about.name} with one layer compressed; dense {about.text(findings.dense_score)}"
    table = Table(title=title, title_justify="left")
    table.add_column("method")
    table.add_column("fine-tuning")
    for level in findings.compressions:
        table.add_column(level_name(level), justify="right")
    for method in findings.methods:
        for when in findings.moments:
            scores = [mean_score(findings, method, level, when) for level in findings.compressions]
            table.add_row(*map(Text, (method, when, *map(about.text, scores))))
    return table


def _taus(findings: Findings, when: When) -> Table:
    seeds = f", mean ± sd over {len(findings.seeds)} seeds" if len(findings.seeds) > 1 else ""
    table = Table(
        title=f"Kendall's τ with the loss of {findings.metric.name} {when} fine-tuning{seeds}", title_justify="left"
    )
    table.add_column("question")
    table.add_column("level")
    for name in ERRORS.values():
        table.add_column(name, justify="right")
    for question, words in QUESTIONS.items():
        for level in (*findings.compressions, None):
            row = [told(findings.tau(when, question, level, error)) for error in ERRORS]
            table.add_row(*map(Text, (words, level_name(level), *row)))
    return table
