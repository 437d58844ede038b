"""Kendall's τ: that of scipy, of the right sign, within the right groups, over the seeds."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean, pstdev

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau

from tdcompile.data.metric import About
from tdcompile.studies.correlation import kendall, taus
from tdcompile.studies.findings import Cell, Tau

ACCURACY = About("accuracy", True, "%")


def cell(
    layer: str,
    method: str,
    error: float,
    wrong: float,
    *,
    seed: int = 0,
    level: float = 0.5,
    tuned: float | None = None,
) -> Cell:
    """A cell with these errors in all six places, ``features_absolute`` negated in rank."""
    figures = dict.fromkeys(("weights_absolute", "weights_relative", "weights_scaled"), error)
    figures |= {"features_absolute": 1 / error, "features_relative": error, "features_scaled": error}
    return Cell(
        key=f"{layer}{method}{seed}{level}",
        layer=layer,
        method=method,
        ranks=(1,),
        compression=level,
        kept=1 - level,
        seed=seed,
        score_before=1 - wrong,
        score_after=None if tuned is None else 1 - tuned,
        seconds=1.0,
        **figures,
    )


def of(found: Iterable[Tau], question: str, error: str = "weights_relative", level: float | None = 0.5) -> Tau:
    return next(t for t in found if (t.question, t.error, t.level) == (question, error, level))


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5)), min_size=2, max_size=12))
def test_tau_is_scipys_and_the_pairs_that_agree_less_those_that_do_not(pairs: list[tuple[int, int]]) -> None:
    x, y = zip(*pairs, strict=True)
    found = kendall(x, y)
    if len(set(x)) < 2 or len(set(y)) < 2:
        assert found is None
        return
    assert found == pytest.approx(kendalltau(x, y).statistic)
    places = [(i, j) for i in range(len(x)) for j in range(i)]
    signs = [(x[i] - x[j]) * (y[i] - y[j]) for i, j in places]
    if all(signs):  # without ties it is the paper's 2(k − d) / (m(m − 1))
        assert found == pytest.approx((sum(s > 0 for s in signs) - sum(s < 0 for s in signs)) / len(places))


def test_a_larger_error_and_a_larger_test_error_agree() -> None:
    cells = [cell("a", "cp", 0.1, 0.2), cell("a", "tt", 0.2, 0.3), cell("a", "svd", 0.3, 0.9)]
    found = taus(cells, (0.5,), ("before",), ACCURACY)
    assert of(found, "methods").mean == 1.0
    assert of(found, "methods", "features_absolute").mean == -1.0


def test_each_question_compares_within_its_groups() -> None:
    # within each layer the errors rank right, within each method wrong
    cells = [cell("a", "cp", 0.1, 0.5), cell("a", "tt", 0.2, 0.6), cell("b", "cp", 0.3, 0.1), cell("b", "tt", 0.4, 0.2)]
    found = taus(cells, (0.5,), ("before",), ACCURACY)
    assert (of(found, "methods").mean, of(found, "methods").groups) == (1.0, 2)
    assert (of(found, "layers").mean, of(found, "layers").groups) == (-1.0, 2)
    errors, rates = [c.weights_relative for c in cells], [1 - c.score_before for c in cells]
    assert of(found, "overall").mean == pytest.approx(kendalltau(errors, rates).statistic)


def test_levels_are_kept_apart_and_pooled() -> None:
    cells = [cell("a", m, e, w, level=0.5) for m, e, w in (("cp", 0.1, 0.1), ("tt", 0.2, 0.2))]
    cells += [cell("a", m, e, w, level=0.9) for m, e, w in (("cp", 0.3, 0.4), ("tt", 0.4, 0.3))]
    found = taus(cells, (0.5, 0.9), ("before",), ACCURACY)
    assert of(found, "methods", level=0.5).mean == 1.0
    assert of(found, "methods", level=0.9).mean == -1.0
    assert of(found, "methods", level=None).mean == pytest.approx(4 / 6)  # five pairs agree, one does not


def test_seeds_are_averaged_and_never_mixed() -> None:
    cells = [cell("a", m, e, w, seed=0) for m, e, w in (("cp", 0.1, 0.1), ("tt", 0.2, 0.2), ("svd", 0.3, 0.3))]
    cells += [cell("a", m, e, w, seed=1) for m, e, w in (("cp", 0.1, 0.2), ("tt", 0.2, 0.1), ("svd", 0.3, 0.3))]
    tau = of(taus(cells, (0.5,), ("before",), ACCURACY), "methods")
    assert tau.mean == pytest.approx(fmean([1.0, 1 / 3]))
    assert tau.sd == pytest.approx(pstdev([1.0, 1 / 3]))


def test_after_tuning_only_what_was_tuned_counts() -> None:
    cells = [cell("a", "cp", 0.1, 0.2, tuned=0.3), cell("a", "tt", 0.2, 0.3, tuned=0.1), cell("a", "svd", 0.3, 0.4)]
    found = {tau.when: tau for tau in taus(cells, (0.5,), ("before", "after"), ACCURACY) if tau.question == "overall"}
    assert found["before"].mean == 1.0
    assert found["after"].mean == -1.0


def test_nothing_to_compare_gives_no_tau() -> None:
    cells = [cell("a", "cp", 0.1, 0.2), cell("a", "tt", 0.2, 0.2), cell("b", "svd", 0.3, 0.4)]
    found = taus(cells, (0.5,), ("before",), ACCURACY)
    assert of(found, "methods").mean is None
    assert of(found, "methods").groups == 0
    assert of(found, "overall").mean is not None
