"""``quality_drop``: how much quality a model loses against the dense one, in points or percent; the only such rule.

Gates of the report, the search for a goal and the sweep use it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tdcompile.backend.evaluation import Evaluation
from tdcompile.data.task import FEW
from tdcompile.support.allowed_drop import AllowedDrop

# Without --max-drop a compiled network may lose this many points of a metric in percent, this many percent of another
# metric or, without targets, this many points of top-1 agreement, or have this relative error in percent, before
# its answers count as changed. docs/results/changed-answers.md has the measurements behind the first and the others.
CHANGED_POINTS = AllowedDrop(10.0)
CHANGED_SCORE = AllowedDrop(50.0, relative=True)
CHANGED_AGREEMENT = 30.0
CHANGED_ERROR = 50.0
_ROUNDING = 1e-9  # differences of scores are sums of rounded floats


@dataclass(frozen=True)
class Drop:
    """A loss of quality and its limit.

    Attributes:
        value: the loss in the unit of the limit: that of the metric, points of agreement, or percent of relative error;
            None if an output is not finite.
        limit: the largest allowed loss.
        sentence: both, for people.
    """

    value: float | None
    limit: float
    sentence: str

    @property
    def passed(self) -> bool:
        """Whether the loss is within its limit."""
        return self.value is not None and self.value <= self.limit + _ROUNDING


def judged(evaluation: Evaluation) -> bool:
    """Return whether the samples tell a loss of quality: with targets any do, else at least ``FEW`` with an output."""
    return evaluation.dense_score is not None or (evaluation.samples >= FEW and bool(evaluation.outputs))


def quality_drop(max_drop: AllowedDrop | None, evaluation: Evaluation) -> Drop:
    """Return the loss of the metric, in its direction and unit; without targets that of the answers.

    Args:
        max_drop: the largest allowed loss; None allows one of the constants above, by the kind of figure.
        evaluation: a model and the dense one on the same samples.
    """
    about, dense, compiled = evaluation.metric, evaluation.dense_score, evaluation.compiled_score
    if about is None or dense is None or compiled is None:
        return _answers_drop(max_drop, evaluation)
    changed = CHANGED_POINTS if about.scale > 1 else CHANGED_SCORE
    limit = (max_drop or changed).of(dense * about.scale)
    drop = about.drop(dense, compiled)
    return Drop(drop, limit, f"{about.dropping(drop)}, {limit:.4g} allowed")


def _answers_drop(max_drop: AllowedDrop | None, evaluation: Evaluation) -> Drop:
    """Return the loss of the output that is nearest to its limit or farthest beyond it.

    An output of class scores is judged by the loss of top-1 agreement, in points, another by its relative error, in
    percent.
    """
    on = f"on {evaluation.samples} samples"
    found: list[tuple[float, Drop]] = []
    for output in evaluation.outputs:
        if output.agreement is not None and math.isfinite(output.relative_error):
            value, limit = 100 * (1 - output.agreement), CHANGED_AGREEMENT if max_drop is None else max_drop.of(100)
            sentence = f"top-1 agreement with the dense network drops by {value:.2f} points {on}, {limit:g} allowed"
        else:
            value = 100 * output.relative_error if math.isfinite(output.relative_error) else math.inf
            limit = CHANGED_ERROR if max_drop is None else max_drop.of(100)
            sentence = f"the outputs differ by {value:.1f}% from the dense network's {on}, {limit:g}% allowed"
        found.append((value / max(limit, _ROUNDING), Drop(value if math.isfinite(value) else None, limit, sentence)))
    if not found:
        return Drop(None, 0.0, f"there is no output to compare {on}")
    return max(found, key=lambda one: one[0])[1]
