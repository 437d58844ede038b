"""Kendall's τ between approximation errors and the loss of quality, for each level and question of a study."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, pstdev

from scipy.stats import kendalltau

from tdcompile.data.metric import About
from tdcompile.studies.findings import ERRORS, QUESTIONS, Cell, ErrorName, Question, Tau, When, loss_of_quality

# The property that all cells of a group share; errors are compared only within groups.
_GROUP: Mapping[Question, Callable[[Cell], str]] = {
    "methods": lambda cell: cell.layer,
    "layers": lambda cell: cell.method,
    "overall": lambda cell: "",
}


def kendall(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Return Kendall's τ-b, the default of scipy; None for fewer than two pairs, or if one side is constant.

    arXiv 2305.05318 writes τ-a: τ = 2(k − d) / (m(m − 1)), with k concordant and d discordant of m(m − 1)/2 pairs. τ-b
    divides by the number of untied pairs. Without ties the two agree. Test accuracies over few samples do tie, and τ-a
    would count a tied pair as evidence against a correlation.
    """
    if len(x) < 2 or len(set(x)) < 2 or len(set(y)) < 2:
        return None
    tau = float(kendalltau(x, y).statistic)
    return tau if math.isfinite(tau) else None


def taus(
    cells: Sequence[Cell], compressions: Sequence[float], moments: Sequence[When], about: About
) -> tuple[Tau, ...]:
    """Return τ of every error with the loss of quality, for each moment, question and level, and over all levels.

    For each seed τ is computed in each group and averaged over the groups. The groups are the layers if methods are
    compared, and the methods if layers are compared; ``overall`` is one group. Mean and standard deviation are taken
    over the seeds. The paper takes the logarithm of the classification error; this changes no rank and no τ.

    Args:
        cells: the cells of all seeds.
        compressions: the levels.
        moments: ``before`` fine-tuning, ``after`` it, or both.
        about: the metric, whose direction says what is worse.
    """
    return tuple(
        _tau(
            [(cell, loss) for cell in cells if (loss := _loss(cell, when, about)) is not None],
            when,
            question,
            level,
            error,
        )
        for when in moments
        for question in QUESTIONS
        for level in (*compressions, None)
        for error in ERRORS
    )


def _loss(cell: Cell, when: When, about: About) -> float | None:
    score = cell.score(when)
    return None if score is None else loss_of_quality(about, score)


def _tau(
    cells: Sequence[tuple[Cell, float]], when: When, question: Question, level: float | None, error: ErrorName
) -> Tau:
    by_seed: dict[int, dict[str, list[tuple[float, float]]]] = {}
    for cell, loss in cells:
        if level in (None, cell.compression):
            groups = by_seed.setdefault(cell.seed, {})
            groups.setdefault(_GROUP[question](cell), []).append((cell.error(error), loss))
    found = [[tau for pairs in groups.values() if (tau := _of(pairs)) is not None] for groups in by_seed.values()]
    means = [fmean(each) for each in found if each]
    return Tau(
        when=when,
        question=question,
        level=level,
        error=error,
        mean=fmean(means) if means else None,
        sd=pstdev(means) if means else None,
        groups=max(map(len, found), default=0),
    )


def _of(pairs: Sequence[tuple[float, float]]) -> float | None:
    errors, losses = zip(*pairs, strict=True)
    return kendall(errors, losses)
