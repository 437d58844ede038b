"""The front of a sweep rises strictly, its knee lies on it, and its page needs nothing else."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdcompile.artifact.folder import verify
from tdcompile.artifact.front import Sweep, SweepModel, SweepPoint, joined
from tdcompile.artifact.front_page import chart, render_chart, render_front
from tdcompile.core.decomposition import Decomposition
from tdcompile.core.plan import Candidate, RankPlan
from tdcompile.core.registry import make
from tdcompile.data.metric import About
from tdcompile.errors import InputError
from tdcompile.ir.target import Cost

PLAN = RankPlan({"conv<1>": Candidate(make(Decomposition, "svd"), (4,)), "fc": Candidate.dense(Cost())})
FIGURES = st.tuples(st.floats(0.1, 10.0), st.integers(1_000, 9_000_000), st.none() | st.floats(0.0, 1.0))


def model(latency, size, quality, network="compiled", precision="fp32"):
    return SweepModel(network, precision, latency, size, quality)


def sweep(figures, dense=(10.0, 9_000_000, 1.0)):
    points = tuple(
        SweepPoint(n, {"latency": n / 10}, PLAN, (model(*one),), 1.0) for n, one in enumerate(figures, start=1)
    )
    return Sweep(
        "net.py:build", About("accuracy", True, "%"), (model(*dense, "dense"),), points, {"total": 2.0}, {"torch": "2"}
    )


@given(st.lists(FIGURES, max_size=9))
def test_the_front_rises_strictly_and_nothing_beats_it(figures):
    made = sweep(figures)
    for across in ("latency_ms", "megabytes"):
        front = [one for one, _ in made.front(across)]
        costs, qualities = [getattr(one, across) for one in front], [one.quality for one in front]
        assert costs == sorted(set(costs))
        assert qualities == sorted(set(qualities))
        for one, _ in made.models():
            if one.quality is not None:
                assert any(getattr(f, across) <= getattr(one, across) and f.quality >= one.quality for f in front)
        knee = made.knee(across)
        assert knee is None or any(knee[0] is one for one in front[1:-1])


def test_the_knee_is_where_the_front_bends_and_a_straight_front_has_none():
    bent = sweep([(1.0, 10, 0.1), (2.0, 20, 0.2), (3.0, 30, 0.97), (6.0, 60, 0.99)])
    assert bent.knee()[1].number == 3
    assert sweep([(1.0, 10, 0.1), (5.5, 40, 0.55)]).knee() is None
    assert sweep([]).knee() is None
    assert sweep([(1.0, 10, None)], (10.0, 90, None)).front() == []


def test_a_metric_that_falls_is_read_in_its_direction():
    points = [(1.0, 10, 30.0), (3.0, 30, 19.0), (6.0, 60, 18.5)]
    made = replace(sweep(points, (9.0, 90, 18.0)), measure=About("perplexity", False))
    assert [one.quality for one, _ in made.front()] == [30.0, 19.0, 18.5, 18.0]
    assert made.knee()[1].number == 2
    assert made.text(made.points[1].model) == "19.00"


def test_latencies_of_several_runs_are_in_proportion_to_one_dense_latency():
    fast, slow = (
        [model(dense, 90, 1.0, "dense"), model(dense / 2, 40, 0.9), model(dense / 4, 9, 0.9, precision="int8")]
        for dense in (2.0, 4.0)
    )
    dense, runs = joined([fast, slow])
    assert [one.latency_ms for one in dense] == [3.0]
    assert [[one.latency_ms for one in run] for run in runs] == [[1.5, 0.75]] * 2
    assert joined([]) == ((), [])


def test_the_page_holds_every_model_its_plan_and_the_knee_and_needs_no_network():
    made = sweep([(1.0, 10_000, 0.1), (3.0, 30_000, 0.97), (9.0, 60_000, 0.99), (9.5, 70_000, 0.5)])
    page = render_front(made)
    HTMLParser().feed(page)
    assert not re.search(r"<script|<link|src=|url\(|@import", page)
    assert set(re.findall(r"https?://[^\s\"<]+", page)) <= {"http://www.w3.org/2000/svg"}
    assert page.count("<circle") == 2 * (4 + 1)  # two charts: the points, and the ring around the knee
    assert page.count("<rect") == 2
    assert page.count("beaten") >= 2
    assert "conv&lt;1&gt;: svd 4" in page
    assert "conv<1>" not in page
    assert "The knee is latency=0.2" in page
    for number in range(1, 5):
        assert f"plan-{number}.json" in page
    alone = render_chart(made)
    assert alone.lstrip().startswith("<svg xmlns=")


@given(st.lists(FIGURES, max_size=6))
def test_every_mark_lies_within_the_view_box(figures):
    for across in ("latency_ms", "megabytes"):
        drawn = chart(sweep(figures), across)
        assert all(62 <= mark.x <= 444 and 30 <= mark.y <= 252 for mark in drawn.marks)
        assert all(62 <= tick.place <= 444 for tick in drawn.across_ticks)
        assert all(30 <= tick.place <= 252 for tick in drawn.up_ticks)


def test_a_sweep_without_samples_has_a_table_and_no_chart():
    made = sweep([(1.0, 10_000, None)], (10.0, 90, None))
    page = render_front(made)
    assert "<svg" not in page
    assert "plan-1.json" in page


def test_the_folder_is_whole_and_refuses_one_of_others(tmp_path: Path):
    made = sweep([(1.0, 10_000, 0.1), (3.0, 30_000, 0.97), (9.0, 60_000, 0.99)])
    made.save(tmp_path / "out")
    verify(tmp_path / "out")
    document = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [point["plan"] for point in document["points"]] == ["plan-1.json", "plan-2.json", "plan-3.json"]
    assert document["knee"]["latency_ms"] == 2
    for point in document["points"]:
        assert RankPlan.from_json((tmp_path / "out" / point["plan"]).read_text()) == PLAN
    assert (tmp_path / "out" / "front.svg").read_text() == render_chart(made)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(InputError, match="is not a tdcompile output folder"):
        made.save(tmp_path / "mine")
