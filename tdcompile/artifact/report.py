"""``Report``: every figure of one compilation, its schema, its tables and its self-contained page."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Literal

from jinja2 import Environment, StrictUndefined
from pydantic import BaseModel, ConfigDict
from rich.table import Table
from rich.text import Text

from tdcompile.data.metric import About
from tdcompile.support.formatting import change, count, milliseconds, percent, size, times


class _Part(BaseModel):
    """Base of the report's models: immutable; rejects unknown names, and NaN and Inf, which JSON lacks."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class Figures(_Part):
    """What a network costs and achieves."""

    params: int
    macs: int
    """Multiply-accumulates of one sample, in convolutions and linear layers."""
    latency_ms: float | None
    """Median of one run in onnxruntime on the target; null where nothing was timed.

    On a CPU with one thread it is processor time, which other processes do not change."""
    onnx_bytes: int
    score: float | None
    """The metric on the test samples, a share in [0, 1] if its unit is %; null without targets."""


class CompiledFigures(Figures):
    """The figures of the compiled network."""

    score_before_tuning: float | None = None


class ReportedMetric(_Part):
    """The metric of all scores."""

    task: str
    """What the targets are: a built-in task, or ``own``."""
    name: str
    unit: str
    """Empty if the metric has none. Scores in % are shares in [0, 1]; they differ by points."""
    higher_is_better: bool

    @property
    def about(self) -> About:
        """How scores are read and shown."""
        return About(self.name, self.higher_is_better, self.unit)


class Ratio(_Part):
    """Dense over compiled: 2 is half of the dense figure."""

    params: float
    macs: float
    latency: float | None
    """Median over rounds in which both models ran once."""
    latency_interval: tuple[float, float] | None = None
    """95 % confidence interval of that median."""

    @property
    def latency_text(self) -> str:
        """The latency ratio with its interval, for people."""
        interval = self.latency_interval
        between = f" ({interval[0]:.2f}–{interval[1]:.2f})" if self.latency is not None and interval else ""
        return f"{times(self.latency)}{between}"


class Agreement(_Part):
    """The export error: the ONNX model in onnxruntime against the PyTorch network it came from, on equal inputs."""

    provider: str
    max_abs: float
    max_rel: float
    """The largest difference over the largest value of the same output."""
    cases: int


class OutputAgreement(_Part):
    """One output of the compiled network against the dense network's; null where a figure is not finite."""

    relative_error: float | None
    """Root of the squared differences over the squared deviations of the dense output from its mean over samples."""
    cosine: float | None
    """Mean over the samples of the cosine between both outputs."""
    agreement: float | None = None
    """Share of samples with the same top-1 class; null if the output is not class scores."""
    divergence: float | None = None
    """Mean KL divergence from the dense network's class probabilities, in nats."""


class Quality(_Part):
    """How much of the dense network's answers the compiled model keeps, in onnxruntime; no label is read."""

    samples: int
    source: Literal["test", "held-out training"]
    outputs: tuple[OutputAgreement, ...]


class Synthetic(_Part):
    """The training samples were made from the statistics of the dense network's batch norm."""

    samples: int
    norms: int
    """Number of batch-norm layers whose statistics the samples match."""
    shift: float
    """How far the mean of a channel is off, in standard deviations of training; median over all channels."""
    spread: float
    """How far the standard deviation of a channel is off, relative to training; median over all channels."""


class Approximation(_Part):
    """The approximation error: the compiled PyTorch network against the dense one, on equal inputs; expected."""

    max_abs: float
    max_rel: float


class Reason(_Part):
    """Why a layer was left dense: a code for machines and a sentence for people."""

    code: str
    reason: str


class LayerRow(_Part):
    """One convolution or linear layer of the dense network and what became of it."""

    name: str
    decomposition: str
    """``dense`` where it was left alone."""
    ranks: tuple[int, ...]
    error: float
    """Relative error of the layer's output."""
    macs_before: int
    macs_after: int
    params_before: int
    params_after: int
    ms_before: float | None = None
    """Inside the whole graph."""
    ms_after: float | None = None
    refusal: Reason | None = None


class Gate(_Part):
    """A condition on the result that was asked for."""

    name: str
    limit: float
    value: float | None
    passed: bool
    sentence: str


class GoalPlan(_Part):
    """A plan that the search for a goal built and judged on training samples set aside."""

    precision: Literal["fp32", "fp16", "int8"]
    asked: float
    """Share of the dense network's latency or parameters that it was chosen for."""
    kept: float
    """Share of the dense network's latency, as measured, or of the bytes of its weights."""
    drop: float | None
    """Loss of quality, in the unit of the limit; null if an output is not finite."""
    within: bool


class Goal(_Part):
    """The search for a goal."""

    name: Literal["fastest", "smallest"]
    max_drop: str
    """As it was given: in the metric's unit, or relative with ``%``."""
    samples: int
    """Training samples set aside, on which the plans were judged."""
    plans: tuple[GoalPlan, ...]
    """In the order in which they were built."""


class Epoch(_Part):
    """One epoch of tuning; held out is a part of the training samples."""

    epoch: int
    train_loss: float
    heldout_score: float | None


class Iteration(_Part):
    """One round of the in-graph check: a plan predicted, measured, and the layers that were slower put back."""

    round: int
    predicted_ms: float
    measured_ms: float
    put_back: tuple[str, ...] = ()


class Tuned(_Part):
    """How tuning went: its highest learning rate, and the epoch whose weights were kept, 0 for those before it."""

    epochs: int
    kept_epoch: int
    rate: float | None
    optimizer: str = "sgd"
    seconds: float
    heldout_before: float | None = None
    """The metric on the held-out samples before the first epoch; null without targets."""
    heldout_after: float | None = None
    """The metric on the held-out samples, of the epoch that was kept."""


class TunedInt8(Tuned):
    """How tuning through the rounding of int8 went."""

    scales: int
    """Number of activations whose scales were trained."""


class Onnx(_Part):
    """The compiled ONNX model as its consumers see it."""

    opset: int
    ir: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    metadata: dict[str, str] = {}
    """The entries that the user gave."""
    labels: tuple[str, ...] = ()
    """Class names."""


class Variant(_Part):
    """One exported model: a network in a precision."""

    network: Literal["dense", "compiled"]
    precision: Literal["fp32", "fp16", "int8"]
    file: str
    latency_ms: float | None
    speedup: float
    """Latency of the dense model in fp32 over this one's, paired by rounds."""
    speedup_interval: tuple[float, float] | None = None
    onnx_bytes: int
    score: float | None = None
    """The metric on the test samples; null without targets."""
    agreement: float | None = None
    """Share of samples with the top-1 class of the dense model in fp32; null if the output is not class scores."""
    relative_error: float | None = None
    """Of the outputs against those of the dense model in fp32."""

    @property
    def title(self) -> str:
        """The network and its precision."""
        return f"{self.network} {self.precision}"


class NoisyValue(_Part):
    """A value in the int8 model, by the module that computes it, against the same value in fp32."""

    name: str
    snr_db: float
    """Signal over noise of all roundings up to here, in dB."""
    own_snr_db: float
    """Signal over noise of this value's rounding alone, in dB."""


class Quantization(_Part):
    """How the compiled network became int8."""

    family: str
    """The kernels that the model is made for."""
    error: float
    """The quantisation error: the int8 model against its own network in fp32, relative to the outputs' spread."""
    rounding: float
    """What onnxruntime's integer kernels differ from the same roundings in floats, relative to the same spread."""
    fake: float | None = None
    """Difference of the int8 model without optimisations and the fake-quantised PyTorch graph, relative to the outputs'
    spread; None if the graph cannot be built. From equal inputs both round alike."""
    fake_note: str = ""
    """Why the fake-quantised graph cannot be built."""
    floats: dict[str, str] = {}
    """Layers that stay float, with the reason."""
    worst: tuple[NoisyValue, ...] = ()
    """The values with most noise, the worst first."""


class Report(_Part):
    """Every figure of one compilation."""

    schema_version: Literal[2] = 2
    source: str
    verdict: str
    """One sentence."""
    seed: int
    pipeline: str
    frontend: str = "fx"
    """What traced the network: ``fx`` or ``export``."""
    selector: str
    gap: float | None
    """Relative optimality gap of the plan that the selector proved."""
    budget: dict[str, float]
    """The share of each dense figure that may be kept."""
    gates: tuple[Gate, ...] = ()
    metric: ReportedMetric | None = None
    """What the scores are; null without targets."""
    goal: Goal | None = None
    """Null if a budget was asked for."""
    dense: Figures
    compiled: CompiledFigures
    precision: Literal["fp32", "fp16", "int8"] = "fp32"
    """Number format of the compiled model."""
    variants: tuple[Variant, ...] = ()
    """All models that were written; only of a compilation to another precision than fp32."""
    quantization: Quantization | None = None
    ratio: Ratio
    realised: float | None
    """Latency ratio over MAC ratio: 1 where every saved operation saved its time."""
    predicted_latency_ms: float | None
    parity: Agreement
    dense_parity: Agreement | None = None
    quality: Quality | None = None
    """Null without samples."""
    approximation_error: Approximation | None = None
    synthetic: Synthetic | None = None
    """Null if the training samples are real, or if there are none."""
    layers: tuple[LayerRow, ...]
    iterations: tuple[Iteration, ...] = ()
    tuning: Tuned | None = None
    tuning_curve: tuple[Epoch, ...] = ()
    tuning_int8: TunedInt8 | None = None
    """The epochs after those of ``tuning`` that ran through the rounding of int8; null without such epochs."""
    seconds: dict[str, float]
    """Of each pass, and ``total``; a resumed compilation sums its runs."""
    peak_memory_mb: float
    """The highest of all runs."""
    environment: dict[str, str]
    onnx: Onnx | None = None
    notes: tuple[str, ...] = ()
    """What did not go the usual way, a sentence each."""

    @property
    def scored(self) -> About | None:
        """The metric, if the test samples have targets."""
        return self.metric.about if self.metric is not None and self.dense.score is not None else None

    @property
    def met(self) -> bool:
        """Whether the result meets the budget and every gate."""
        return all(gate.passed for gate in self.gates)

    def to_json(self) -> str:
        """Return the text of ``report.json``."""
        return self.model_dump_json(indent=1) + "\n"

    @classmethod
    def schema_json(cls) -> str:  # type: ignore[override]  # pydantic's own, of this name, is deprecated
        """Return the JSON schema of ``report.json``."""
        return json.dumps(cls.model_json_schema(mode="serialization"), indent=1) + "\n"


def tables(report: Report) -> list[Table]:
    """Return the report for a terminal: both networks compared, and the layers."""
    return [_networks(report), *([_variants(report)] if report.variants else []), _layers(report)]


def render_html(report: Report) -> str:
    """Return the report as one HTML page without external files, scripts or network access."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"count": count, "ms": milliseconds, "percent": percent, "times": times, "size": size}
    template = environment.from_string(
        files("tdcompile.artifact").joinpath("report.html.j2").read_text(encoding="utf-8")
    )
    models = (variant_headings(report), variant_rows(report)) if report.variants else None
    return template.render(report=report, rows=comparison(report), models=models, change=change) + "\n"


def comparison(report: Report) -> list[tuple[str, str, str, str]]:
    """Return rows of text: the quantity, its dense and compiled values, and their ratio."""
    dense, compiled, ratio = report.dense, report.compiled, report.ratio
    rows = [
        ("latency", milliseconds(dense.latency_ms), milliseconds(compiled.latency_ms), ratio.latency_text),
        ("MACs", count(dense.macs), count(compiled.macs), times(ratio.macs)),
        ("parameters", count(dense.params), count(compiled.params), times(ratio.params)),
        (
            "ONNX file",
            size(dense.onnx_bytes),
            size(compiled.onnx_bytes),
            times(dense.onnx_bytes / compiled.onnx_bytes if compiled.onnx_bytes else None),
        ),
    ]
    if report.metric is not None and dense.score is not None and compiled.score is not None:
        about = report.metric.about
        change = about.change(dense.score, compiled.score)
        rows.append((about.name, about.text(dense.score), about.text(compiled.score), change))
    return rows + (_quality_rows(report.quality) if report.quality else [])


def _quality_rows(quality: Quality) -> list[tuple[str, str, str, str]]:
    rows = []
    for number, output in enumerate(quality.outputs, start=1):
        of = f" of output {number}" if len(quality.outputs) > 1 else ""
        if output.agreement is not None:
            rows.append((f"top-1 agreement{of}", "", percent(output.agreement), ""))
        error = "not finite" if output.relative_error is None else percent(output.relative_error)
        rows.append((f"relative error{of}", "", error, ""))
        if output.agreement is None and output.cosine is not None:
            rows.append((f"cosine{of}", "", f"{output.cosine:.4f}", ""))
    return rows


def _networks(report: Report) -> Table:
    table = Table(title="dense against compiled", title_justify="left")
    for heading, side in (("", "left"), ("dense", "right"), ("compiled", "right"), ("dense / compiled", "right")):
        table.add_column(heading, justify="left" if side == "left" else "right")
    for row in comparison(report):
        table.add_row(*row)
    return table


def variant_rows(report: Report) -> list[tuple[str, ...]]:
    """Return a row of text for each model: what it is, latency, speed-up, file size, score or agreement."""
    about = report.scored
    return [
        (
            one.title,
            milliseconds(one.latency_ms),
            times(one.speedup),
            size(one.onnx_bytes),
            percent(one.agreement) if about is None else about.text(one.score),
        )
        for one in report.variants
    ]


def variant_headings(report: Report) -> tuple[str, ...]:
    """Return the headings of ``variant_rows``."""
    quality = report.scored.name if report.scored else "top-1 agreement"
    return ("model", "latency", "faster", "ONNX file", quality)


def _variants(report: Report) -> Table:
    table = Table(title="all models", title_justify="left")
    for place, heading in enumerate(variant_headings(report)):
        table.add_column(heading, justify="right" if place else "left")
    for row in variant_rows(report):
        table.add_row(*row)
    return table


def _layers(report: Report) -> Table:
    timed = any(layer.ms_before is not None for layer in report.layers)
    table = Table(title="layers", title_justify="left")
    table.add_column("layer", overflow="fold")
    table.add_column("form")
    for heading in ("error", "params", "MACs", *(["ms"] if timed else [])):
        table.add_column(heading, justify="right")
    table.add_column("left dense because", overflow="fold")
    for layer in report.layers:
        form = " ".join((layer.decomposition, "×".join(map(str, layer.ranks)))).strip()
        cells = [
            layer.name,
            form,
            percent(layer.error),
            change(count(layer.params_before), count(layer.params_after)),
            change(count(layer.macs_before), count(layer.macs_after)),
            *([change(milliseconds(layer.ms_before, ""), milliseconds(layer.ms_after, ""))] if timed else []),
            layer.refusal.code if layer.refusal else "",
        ]
        table.add_row(*map(Text, cells))  # ``Text``, because rich would read brackets in names as markup
    return table
