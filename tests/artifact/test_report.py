"""The report keeps the names the outside relies on, says everything it knows, and its page needs nothing else."""

import json
import math
from html.parser import HTMLParser
from io import StringIO
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from rich.console import Console

from tdcompile.artifact.report import Report, render_html, tables
from tdcompile.artifact.summary import bad_bargain, budget_gates, history_notes
from tdcompile.backend.evaluation import Evaluation
from tdcompile.backend.quality_drop import judged, quality_drop
from tdcompile.backend.session import Timing
from tdcompile.data.metric import About
from tdcompile.data.quality import OutputQuality
from tdcompile.errors import InputError
from tdcompile.ir.diagnostics import Diagnostic
from tdcompile.ir.program import Change
from tdcompile.ir.target import Budget
from tdcompile.support.allowed_drop import AllowedDrop
from tdcompile.support.formatting import count, milliseconds, size

VOID = {"meta", "line", "rect", "polyline"}
ACCURACY = About("accuracy", True, "%")
FIGURES = {"params": 2000, "macs": 40_000, "latency_ms": 3.0, "onnx_bytes": 9000, "score": 0.9}
PARITY = {"provider": "CPUExecutionProvider", "max_abs": 1e-5, "max_rel": 2e-6, "cases": 5}
DENSE_ROW = {"decomposition": "dense", "ranks": [], "error": 0.0, "macs_before": 7000, "macs_after": 7000}


@pytest.mark.parametrize(
    ("about", "alone", "score", "speedup", "told"),
    [
        (ACCURACY, 0.658, 0.604, 1.73, "is 1.01 times as slow as that and has accuracy 65.80 %: --budget latency=0.65"),
        (ACCURACY, 0.658, 0.604, 1.6, "is 1.07 times as fast as that and has accuracy 65.80 %: --budget latency=0.65"),
        (About("MAE", False), 0.2, 0.3, 1.73, "and has MAE 0.2: --budget latency=0.65"),
        (About("MAE", False), 0.3, 0.2, 1.73, None),  # better than int8 alone
        (ACCURACY, 0.658, 0.604, 1.9, None),  # worth its loss to those who asked for it
    ],
)
def test_the_verdict_tells_what_a_little_more_latency_would_keep(
    about: About, alone: float, score: float, speedup: float, told: str | None
) -> None:
    found = bad_bargain(about, alone, score, 1.705, speedup)
    assert (told in found) if told else not found


def document(**changes: Any) -> dict[str, Any]:
    whole = {
        "source": "net.py:build",
        "verdict": "2.00× faster.",
        "seed": 0,
        "pipeline": "calibrate,propose,choose{by=knapsack},factorize",
        "selector": "knapsack",
        "gap": 0.001,
        "budget": {"latency": 0.5},
        "metric": {"task": "classification", "name": "accuracy", "unit": "%", "higher_is_better": True},
        "gates": [
            {"name": "min-speedup", "limit": 1.5, "value": 2.0, "passed": True, "sentence": "2.00× is enough"},
            {"name": "max-drop", "limit": 1.0, "value": None, "passed": False, "sentence": "there are no labels"},
        ],
        "dense": FIGURES,
        "compiled": {
            "params": 1000,
            "macs": 16_000,
            "latency_ms": 1.5,
            "onnx_bytes": 5000,
            "score": 0.88,
            "score_before_tuning": 0.5,
        },
        "ratio": {"params": 2.0, "macs": 2.5, "latency": 2.0, "latency_interval": [1.98, 2.03]},
        "realised": 0.8,
        "predicted_latency_ms": 1.45,
        "parity": PARITY,
        "dense_parity": PARITY,
        "approximation_error": {"max_abs": 0.7, "max_rel": 0.1},
        "layers": [
            {
                "name": "conv1",
                "decomposition": "tucker2",
                "ranks": [32, 16],
                "error": 0.125,
                "macs_before": 33_000,
                "macs_after": 9000,
                "params_before": 1500,
                "params_after": 500,
                "ms_before": 2.0,
                "ms_after": 0.5,
            },
            {
                "name": "fc[bold]",
                **DENSE_ROW,
                "params_before": 500,
                "params_after": 500,
                "refusal": {"code": "slower_in_graph", "reason": "svd[16] took 0.2 ms, the dense layer 0.1 ms"},
            },
        ],
        "iterations": [{"round": 1, "predicted_ms": 1.4, "measured_ms": 1.6, "put_back": ["fc[bold]"]}],
        "tuning": {"epochs": 2, "kept_epoch": 2, "rate": 0.03, "seconds": 60.0},
        "tuning_curve": [
            {"epoch": 1, "train_loss": 1.5, "heldout_score": 0.7},
            {"epoch": 2, "train_loss": 0.5, "heldout_score": 0.86},
        ],
        "seconds": {"calibrate": 1.0, "choose": 2.0, "total": 3.5},
        "peak_memory_mb": 512.0,
        "environment": {"torch": "2.x", "cpu": "a <fast> one"},
        "notes": ["leaf 'attn' was not traced"],
    }
    return whole | changes


def report(**changes: Any) -> Report:
    return Report.model_validate(document(**changes))


BARE = {
    "dense": FIGURES | {"latency_ms": None, "score": None},
    "compiled": FIGURES | {"latency_ms": None, "score": None},
    "ratio": {"params": 1.0, "macs": 1.0, "latency": None},
    "realised": None,
    "predicted_latency_ms": None,
    "gap": None,
    "selector": "",
    "budget": {},
    "gates": [],
    "layers": [],
    "iterations": [],
    "tuning": None,
    "tuning_curve": [],
    "notes": [],
    "seconds": {},
    "environment": {},
    "dense_parity": None,
    "approximation_error": None,
}


class Page(HTMLParser):
    """Checks that every tag is closed where it should be, and collects text and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def printed(shown: Report, width: int = 160) -> str:
    console = Console(file=StringIO(), width=width)
    for table in tables(shown):
        console.print(table)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_it_says_at_which_rate_the_tuning_was_and_what_it_kept() -> None:
    assert "2 epochs of SGD at a rate of 0.03" in render_html(report())
    assert "the weights of epoch 2 were kept" in render_html(report())
    adam = {"epochs": 2, "kept_epoch": 2, "rate": 0.03, "optimizer": "adam", "seconds": 60.0}
    assert "2 epochs of Adam at a rate of 0.03" in render_html(report(tuning=adam))
    none = {"epochs": 2, "kept_epoch": 0, "rate": 0.03, "seconds": 60.0}
    assert "all did worse on held-out samples than the start" in render_html(report(tuning=none))


def test_the_names_that_others_rely_on_are_there() -> None:
    found = json.loads(report().to_json())
    for name in ("dense", "compiled"):
        assert {"params", "macs", "latency_ms", "onnx_bytes", "score"} <= set(found[name])
    assert found["compiled"]["score_before_tuning"] == 0.5
    assert set(found["ratio"]) == {"params", "macs", "latency", "latency_interval"}
    assert set(found["parity"]) == {"provider", "max_abs", "max_rel", "cases"}
    row = {"name", "decomposition", "ranks", "error", "macs_before", "macs_after", "ms_before", "ms_after", "refusal"}
    assert all(row <= set(layer) for layer in found["layers"])
    others = {"realised", "predicted_latency_ms", "seconds", "peak_memory_mb", "budget", "gates", "environment"}
    assert others <= set(found)
    assert found["schema_version"] == 2


def test_the_text_reads_back_to_an_equal_report() -> None:
    assert Report.model_validate_json(report().to_json()) == report()


def test_the_schema_describes_what_is_written() -> None:
    schema = json.loads(Report.schema_json())
    assert set(schema["properties"]) == set(json.loads(report().to_json()))
    assert "Latency ratio over MAC ratio" in schema["properties"]["realised"]["description"]
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize(
    "changes",
    [
        {"realised": float("nan")},
        {"seconds": {"total": float("inf")}},
        {"parity": PARITY | {"max_rel": float("nan")}},
        {"unknown": 1},
        {"dense": FIGURES | {"flops": 1}},
        {"schema_version": 1},
    ],
)
def test_nan_inf_and_unknown_names_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        report(**changes)


def test_a_report_does_not_change() -> None:
    with pytest.raises(ValidationError):
        report().seed = 1  # type: ignore[misc]


def test_the_first_table_sets_dense_against_compiled() -> None:
    text = printed(report())
    for row in (
        ("latency", "3.00 ms", "1.50 ms", "2.00× (1.98–2.03)"),
        ("MACs", "40.0 k", "16.0 k", "2.50×"),
        ("parameters", "2.00 k", "1.00 k", "2.00×"),
        ("ONNX file", "9.00 kB", "5.00 kB", "1.80×"),
        ("accuracy", "90.00 %", "88.00 %", "-2.00 points"),
    ):
        assert any(all(cell in line for cell in row) for line in text.splitlines()), row


def test_the_second_table_has_every_layer_and_why_one_was_left() -> None:
    lines = printed(report()).splitlines()
    assert any("conv1" in x and "tucker2 32×16" in x and "33.0 k → 9.00 k" in x and "2.00 → 0.500" in x for x in lines)
    assert any("fc[bold]" in line and "dense" in line and "slower_in_graph" in line for line in lines)


def test_without_timing_and_labels_the_tables_leave_them_out() -> None:
    text = printed(report(**BARE | {"layers": [{"name": "a", **DENSE_ROW, "params_before": 1, "params_after": 1}]}))
    assert "accuracy" not in text
    assert " ms " not in text
    assert "–" in text


def test_the_page_says_everything() -> None:
    page = Page(render_html(report()))
    for words in (
        "2.00× faster.",
        "88.00 %",
        "-2.00 points",
        "80 % of the saved work",
        "32 × 16",
        "12.50 %",
        "svd[16] took 0.2 ms, the dense layer 0.1 ms",
        "Approximation error",
        "Export error",
        "expected",
        "there are no labels",
        "not passed",
        "50.00 % of the dense latency",
        "leaf 'attn' was not traced",
        "a <fast> one",
        "calibrate,propose,choose{by=knapsack},factorize",
        "Accuracy on held-out training samples",
        "3.50 s",
        "within 0.10 % of the best plan",
    ):
        assert words in page.text, words
    assert page.tags.count("circle") == 4  # two epochs in two curves
    widths = [float(v.rstrip("%")) for name, v in page.attributes if name == "width" and v.endswith("%")]
    assert all(0 <= width <= 100 for width in widths)
    assert 25.0 in widths  # 0.5 of 2.0 ms


@pytest.mark.parametrize("changes", [{}, BARE, {"compiled": FIGURES | {"macs": 10**9}}])
def test_the_page_needs_nothing_from_outside(changes: dict[str, Any]) -> None:
    text = render_html(report(**changes))
    page = Page(text)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not {"href", "src", "onclick", "onload"} & {name for name, _ in page.attributes}
    assert "://" not in text
    assert "url(" not in text
    assert "prefers-color-scheme: dark" in text


def test_a_bare_report_leaves_sections_out() -> None:
    page = Page(render_html(report(**BARE)))
    sections = {value for name, value in page.attributes if name == "id"}
    assert sections == {"figures", "accuracy", "errors", "seconds", "environment"}
    assert "no metric was measured" in page.text


def test_a_curve_of_one_epoch_or_without_held_out_samples_is_drawn() -> None:
    page = Page(render_html(report(tuning_curve=[{"epoch": 1, "train_loss": 0.0, "heldout_score": None}])))
    assert page.tags.count("circle") == 1


def test_text_from_outside_stays_text() -> None:
    page = Page(render_html(report(verdict="<script>alert(1)</script>", environment={"<b>": "</table>"})))
    assert "script" not in page.tags
    assert "<script>alert(1)</script>" in page.text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1.00 k"), (12_345_678, "12.3 M"), (999_999, "1.00 M"), (1.814e9, "1.81 G")],
)
def test_counts_have_three_digits_and_a_unit(number: float, text: str) -> None:
    assert count(number) == text
    assert size(number) == (f"{text}B" if number >= 1000 else f"{text} B")


@given(st.floats(1e-4, 1e5))
def test_milliseconds_keep_three_digits(number: float) -> None:
    assert float(milliseconds(number, "")) == pytest.approx(number, rel=5.1e-3, abs=1e-6)
    assert "e" not in milliseconds(number, "")


def test_what_was_not_measured_is_a_dash() -> None:
    assert milliseconds(None) == "–"
    assert milliseconds(0.0) == "0.00 ms"


@pytest.mark.parametrize(
    ("kept", "passed", "word"),
    [(0.49, True, "keeps"), (0.5, True, "keeps"), (0.515, True, "comes near enough to"), (0.53, False, "was to keep")],
)
def test_a_latency_near_its_budget_counts_as_kept_and_is_told_as_it_is(kept: float, passed: bool, word: str) -> None:
    timings = [Timing.of([1.0]), Timing.of([kept], [1.0])]
    networks = [SimpleNamespace(params=10, macs=10, timing=timing) for timing in timings]
    program: Any = SimpleNamespace(budget=Budget(latency=0.5))
    outcome: Any = SimpleNamespace(dense=networks[0], compiled=networks[1])
    (gate,) = budget_gates(program, outcome)
    assert (gate.passed, gate.value) == (passed, pytest.approx(kept))
    assert gate.sentence == f"latency {word} 0.5 of the dense network's: {kept:.3f} measured"


def test_accuracy_may_fall_by_the_points_allowed_and_rise_by_any() -> None:
    for limit, dense, compiled, passed in ((1.0, 0.9, 0.895, True), (1.0, 0.9, 0.85, False), (0.0, 0.8, 0.9, True)):
        drop = quality_drop(AllowedDrop(limit), Evaluation(4, dense, compiled, (), ACCURACY))
        assert drop.passed == passed
        assert drop.value == pytest.approx((dense - compiled) * 100)
    assert quality_drop(None, Evaluation(4, 0.9, 0.81, (), ACCURACY)).passed
    assert not quality_drop(None, Evaluation(4, 0.9, 0.79, (), ACCURACY)).passed


@pytest.mark.parametrize(
    ("limit", "about", "dense", "compiled", "passed", "says"),
    [
        ("2%", About("PSNR", True, "dB"), 30.0, 29.5, True, "PSNR drops by 0.5 dB, 0.6 allowed"),
        ("0.4", About("PSNR", True, "dB"), 30.0, 29.5, False, "PSNR drops by 0.5 dB, 0.4 allowed"),
        ("10%", About("perplexity", False), 20.0, 21.0, True, "perplexity rises by 1, 2 allowed"),
        ("0.5", About("MAE", False), 2.0, 3.0, False, "MAE rises by 1, 0.5 allowed"),
        (None, About("MAE", False), 2.0, 2.9, True, "MAE rises by 0.9, 1 allowed"),
        (None, About("mIoU", True, "%"), 0.8, 0.65, False, "mIoU drops by 15.00 points, 10 allowed"),
        ("2%", About("mIoU", True, "%"), 0.5, 0.495, True, "mIoU drops by 0.50 points, 1 allowed"),
    ],
)
def test_a_loss_of_quality_is_in_the_metrics_direction_and_unit(
    limit: str | None, about: About, dense: float, compiled: float, passed: bool, says: str
) -> None:
    drop = quality_drop(None if limit is None else AllowedDrop.parse(limit), Evaluation(4, dense, compiled, (), about))
    assert (drop.passed, drop.sentence) == (passed, says)


@pytest.mark.parametrize("text", ["", "x", "-1", "nan", "inf", "2%%", "-2%"])
def test_an_allowed_drop_is_a_number_or_percent(text: str) -> None:
    with pytest.raises(InputError, match="must be a number of at least 0"):
        AllowedDrop.parse(text)


def test_notes_are_messages_about_the_network_and_warnings() -> None:
    history = (
        Change("conv", "factorize", "svd[3]"),
        Diagnostic("info", "half_precision", "about the network"),
        Diagnostic("warning", "not_traced", "about a module", "block"),
        Diagnostic("info", "depthwise", "in the layer's row", "conv"),
        Diagnostic("warning", "caution", "about a layer", "conv"),
    )
    assert list(history_notes(history, {"conv"})) == ["about the network", "about a module", "about a layer"]


def evaluation(*outputs):
    return Evaluation(40, None, None, tuple(outputs))


@pytest.mark.parametrize(
    ("outputs", "max_drop", "passed"),
    [
        ([OutputQuality(0.6, 0.9, 0.71, 0.1)], None, True),
        ([OutputQuality(0.4, 0.9, 0.69, 0.1)], None, False),
        ([OutputQuality(0.49, 0.9)], None, True),
        ([OutputQuality(0.51, 0.9)], None, False),
        ([OutputQuality(0.4, 0.9, 0.9, 0.1), OutputQuality(0.51, 0.9)], None, False),
        ([OutputQuality(0.1, 0.9), OutputQuality(math.nan, math.nan)], None, False),
        ([OutputQuality(math.nan, math.nan), OutputQuality(0.1, 0.9)], None, False),
        ([OutputQuality(0.6, 0.9, 0.8, 0.1)], 20.0, True),
        ([OutputQuality(0.6, 0.9, 0.8, 0.1)], 19.0, False),
        ([OutputQuality(0.2, 0.9)], 20.0, True),
        ([OutputQuality(0.21, 0.9)], 20.0, False),
        ([], None, False),
    ],
)
def test_without_labels_lost_agreement_or_the_relative_error_is_bounded(outputs, max_drop, passed):
    drop = quality_drop(None if max_drop is None else AllowedDrop(max_drop), evaluation(*outputs))
    assert drop.passed == passed
    assert "40 samples" in drop.sentence


def test_few_samples_judge_only_if_they_have_labels():
    compared = (OutputQuality(0.1, 0.9),)
    assert [judged(Evaluation(*one, compared)) for one in ((7, None, None), (8, None, None), (1, 0.5, 0.5))] == [
        *(False, True, True)
    ]
    assert not judged(Evaluation(8, None, None, ()))  # no output can be compared
