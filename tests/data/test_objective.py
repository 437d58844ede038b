"""Tasks: what targets mean, what each task measures, and what fits none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tdcompile.data.metric import About, Metric, metric_of
from tdcompile.data.objective import NAMES, Example, Objective, check_metric, resolve_objective
from tdcompile.data.task import Batch, Task
from tdcompile.data.task_kinds import KINDS
from tdcompile.errors import InputError

TOKENS = torch.randint(0, 11, (4, 6), generator=torch.Generator().manual_seed(0))
IMAGES = torch.rand(4, 3, 8, 8)


def resolved(
    outputs: Tensor | Sequence[Tensor],
    targets: Any,
    inputs: Tensor = IMAGES,
    causal: bool = True,
    **asked: Any,
) -> Objective | None:
    found = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    names = [f"output_{place}" for place in range(len(found))]
    example = Example(Batch((inputs,), targets), found, targets)
    return resolve_objective(Task(**asked), example, names, lambda tokens, scored: causal)[0]


def score(objective: Objective, outputs: Tensor, targets: Any, inputs: Tensor = IMAGES) -> float:
    meter = objective.meter()
    for half in (slice(0, 2), slice(2, None)):  # in two batches
        meter.update([outputs[half]], Batch((inputs[half],), targets[half] if targets is not None else None))
    return meter.compute()


SCORES = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0], [0.0, 1.0, 0.5], [1.0, 0.0, 5.0]])
CLASSES = torch.tensor([0, 1, 2, 2])
MASKS = torch.randint(0, 3, (4, 8, 8), generator=torch.Generator().manual_seed(1))
PLACES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))
NEXT = torch.randn(4, 6, 11, generator=torch.Generator().manual_seed(3))


def iou(scores: Tensor, masks: Tensor, ignored: int) -> float:
    found, counted = scores.argmax(1), masks != ignored
    shares = []
    for label in range(scores.shape[1]):
        a, b = (found == label) & counted, (masks == label) & counted
        if (a | b).any():
            shares.append(float((a & b).sum() / (a | b).sum()))
    return sum(shares) / len(shares)


PARTLY = torch.where(torch.rand(4, 8, 8, generator=torch.Generator().manual_seed(4)) < 0.2, 255, MASKS)
LABELS = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])
VALUES = torch.randn(4, 1, generator=torch.Generator().manual_seed(5))
RESTORED = (IMAGES + 0.1 * torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(6))).clamp(0, 1)


@pytest.mark.parametrize(
    ("outputs", "targets", "kind", "metric", "wanted"),
    [
        (SCORES, CLASSES, "classification", About("accuracy", True, "%"), 0.75),
        (SCORES, F.one_hot(CLASSES, 3), "classification", About("accuracy", True, "%"), 0.75),
        (SCORES, F.one_hot(CLASSES, 3).float(), "classification", About("accuracy", True, "%"), 0.75),
        (SCORES[:, :1] - 1.5, torch.tensor([1, 0, 0, 1]), "classification", About("accuracy", True, "%"), 0.75),
        (SCORES[:, 0] - 1.5, torch.tensor([1.0, 0, 0, 1]), "classification", About("accuracy", True, "%"), 0.75),
        (PLACES[:, :1], (MASKS[:, None] > 0).float(), "segmentation", About("mIoU", True, "%"), None),
        (SCORES[:, :1].sigmoid(), torch.tensor([True, False, False, True]), "classification", None, 1.0),
        (SCORES - 0.6, LABELS, "multilabel", About("F1", True, "%"), 6 / 13),
        (PLACES, MASKS, "segmentation", About("mIoU", True, "%"), iou(PLACES, MASKS, -1)),
        (PLACES, PARTLY, "segmentation", About("mIoU", True, "%"), iou(PLACES, PARTLY, 255)),
        (VALUES, VALUES[:, 0] + 0.5, "regression", About("MAE", False), 0.5),
        (PLACES[:, :2, 0], PLACES[:, :2, 0] - 0.25, "regression", About("MAE", False), 0.25),
        (RESTORED, IMAGES, "restoration", About("PSNR", True, "dB"), None),
    ],
)
def test_a_task_is_guessed_from_targets_and_output(
    outputs: Tensor, targets: Tensor, kind: str, metric: About | None, wanted: float | None
) -> None:
    objective = resolved(outputs, targets)
    assert objective is not None
    assert objective.kind.name == kind
    if metric is not None:
        assert objective.metric.about == metric
    found = score(objective, outputs, targets)
    if wanted is not None:
        assert found == pytest.approx(wanted, abs=1e-5)
    if kind == "restoration":
        assert found == pytest.approx(10 * math.log10(1 / float((outputs - targets).square().mean())), rel=1e-4)


def test_a_language_model_predicts_the_next_token_and_an_encoder_does_not() -> None:
    language = resolved(NEXT, None, TOKENS)
    assert language is not None
    wanted = math.exp(float(F.cross_entropy(NEXT[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())))
    assert score(language, NEXT, None, TOKENS) == pytest.approx(wanted, rel=1e-4)
    assert resolved(NEXT, None, TOKENS, causal=False) is None
    alike = resolved(NEXT, TOKENS, TOKENS)  # the targets are the tokens: they are shifted
    assert alike is not None
    assert score(alike, NEXT, TOKENS, TOKENS) == pytest.approx(wanted, rel=1e-4)
    masked = torch.full_like(TOKENS, -100)
    masked[:, 2] = (TOKENS[:, 2] + 1) % 11  # a masked model answers at its own place
    own = resolved(NEXT, masked, TOKENS)
    assert own is not None
    at_place = math.exp(float(F.cross_entropy(NEXT[:, 2], masked[:, 2])))
    assert score(own, NEXT, masked, TOKENS) == pytest.approx(at_place, rel=1e-4)


@pytest.mark.parametrize("name", sorted(KINDS))
def test_every_task_has_a_loss_with_a_gradient_that_falls_where_the_metric_gets_better(name: str) -> None:
    """Contract of ``TaskKind``: descent on the loss improves the metric in its direction."""
    cases: dict[str, tuple[Tensor, Any, Tensor]] = {
        "classification": (SCORES, CLASSES, IMAGES),
        "multilabel": (SCORES, LABELS, IMAGES),
        "segmentation": (PLACES, PARTLY, IMAGES),
        "regression": (VALUES, VALUES + 1.0, IMAGES),
        "restoration": (RESTORED, IMAGES, IMAGES),
        "language": (NEXT, None, TOKENS),
    }
    outputs, targets, inputs = cases[name]
    objective = resolved(outputs, targets, inputs, kind=name)
    assert objective is not None
    moved = outputs.clone().requires_grad_()
    optimizer = torch.optim.Adam([moved], 0.05)
    losses = []
    for _ in range(60):
        loss = objective.loss([moved], Batch((inputs,), targets))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    before, after = (score(objective, x.detach(), targets, inputs) for x in (outputs, moved))
    assert objective.metric.about.drop(before, after) < 0


@pytest.mark.parametrize(
    ("outputs", "targets", "asked", "says"),
    [
        (SCORES, torch.tensor([0, 1, 2, 3]), {}, "labels go up to 3, and the network's output is 4x3"),
        (PLACES, torch.full((4, 8, 8), 3), {}, "a target is 3, and the network's output 4x3x8x8 has 3 class scores"),
        (PLACES, MASKS[:, :4], {}, "no built-in task fits them"),
        (PLACES, torch.full((4, 8, 8), 255), {}, "no target counts: all of the first samples are 255"),
        (SCORES, CLASSES * 1j, {}, "no built-in task fits them"),
        (SCORES, CLASSES, {"kind": "segmentation"}, "segmentation takes a class number for each place"),
        (SCORES, None, {"kind": "classification"}, "needs targets, and the data have none"),
        (SCORES, CLASSES, {"kind": "clasification"}, "did you mean 'classification'"),
        (SCORES, {"boxes": CLASSES, "labels": CLASSES}, {}, "2 targets .boxes, labels., which no built-in task takes"),
        (SCORES, CLASSES, {"output": "output_3"}, "there is no output 'output_3'"),
        (SCORES, CLASSES, {"metric": "F1Scor"}, "torchmetrics has no 'F1Scor'.*F1Score"),
        (SCORES, CLASSES, {"metric": lambda a, b: 0.0}, "does not say whether higher is better"),
        (SCORES, None, {"loss": F.mse_loss}, "--loss reads targets, and the data have none"),
        (SCORES, CLASSES, {"kind": "agreement", "loss": F.mse_loss}, "leave --loss and --metric out"),
    ],
)
def test_what_fits_no_task_is_refused(outputs: Tensor, targets: Any, asked: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        resolved(outputs, targets, **asked)


def test_agreement_measures_no_targets() -> None:
    assert "agreement" in NAMES
    assert resolved(SCORES, CLASSES, kind="agreement") is None
    assert resolved(SCORES, None) is None


def right(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return for each sample whether it is right."""
    return (outputs.argmax(1) == targets).float()


right.higher_is_better = True  # type: ignore[attr-defined]
right.unit = "%"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("metric", "about"),
    [
        (right, About("right", True, "%")),
        (torchmetrics.classification.MulticlassAccuracy(3, average="micro"), About("MulticlassAccuracy", True)),
        ("MulticlassAccuracy{num_classes=3,average=micro,unit=%,name=top-1}", About("top-1", True, "%")),
        ("Accuracy{task=multiclass,num_classes=3}", None),
    ],
)
def test_a_metric_of_ones_own_is_measured(metric: Any, about: About | None) -> None:
    objective = resolved(SCORES, CLASSES, metric=metric)
    assert objective is not None
    if about is not None:
        assert objective.metric.about == about
    assert score(objective, SCORES, CLASSES) == pytest.approx(0.75)
    assert score(objective, SCORES, CLASSES) == pytest.approx(0.75)  # a second meter starts anew


def test_own_loss_and_metric_see_any_targets_and_all_outputs() -> None:
    def loss(outputs: tuple[Tensor, Tensor], targets: dict[str, Tensor]) -> Tensor:
        return (outputs[0] - targets["a"]).square().mean() + (outputs[1] - targets["b"]).abs().mean()

    def worst(outputs: tuple[Tensor, Tensor], targets: dict[str, Tensor]) -> float:
        return float((outputs[1] - targets["b"]).abs().max())

    targets = {"a": SCORES + 1, "b": VALUES - 2}
    metric = Metric("worst", False, metric_of_function(worst), raw=True)
    objective = resolved((SCORES, VALUES), targets, loss=loss, metric=metric)
    assert objective is not None
    batch = Batch((IMAGES,), targets)
    assert float(objective.loss([SCORES, VALUES], batch)) == pytest.approx(3.0)
    meter = objective.meter()
    meter.update([SCORES, VALUES], batch)
    assert meter.compute() == pytest.approx(2.0, rel=1e-5)


def metric_of_function(function: Any) -> Any:
    function.higher_is_better = False
    return metric_of(function).make


def test_a_metric_that_is_nan_names_the_sample() -> None:
    def ratio(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.sum(1) / targets

    ratio.higher_is_better = True  # type: ignore[attr-defined]
    objective = resolved(SCORES, CLASSES, metric=ratio)
    assert objective is not None
    outputs = SCORES.clone()
    outputs[2] = 0.0
    with pytest.raises(InputError, match="'ratio' is NaN on sample 2"):
        score(objective, outputs, torch.tensor([1, 1, 0, 1]))
    outputs[3, 1] = math.nan
    with pytest.raises(InputError, match="output for sample 3 holds NaN"):
        score(objective, outputs, CLASSES)


def test_a_metric_gets_the_output_that_was_asked_for_and_else_all() -> None:
    seen: list[Any] = []

    def size(outputs: Any, targets: Tensor) -> float:
        seen.append(outputs)
        return 1.0

    size.higher_is_better = True  # type: ignore[attr-defined]
    for asked in ({"output": 1}, {}):
        objective = resolved((SCORES, VALUES), CLASSES, metric=size, **asked)
        assert objective is not None
        objective.meter().update([SCORES, VALUES], Batch((IMAGES,), CLASSES))
    assert seen[0] is VALUES
    assert isinstance(seen[1], tuple)


def test_an_infinite_metric_and_one_of_an_output_without_samples_are_refused() -> None:
    images = torch.rand(4, 3, 8, 8)
    equal = resolved(images, images.clone())
    assert equal is not None
    assert equal.metric.name == "PSNR"
    for act in (lambda: check_metric(equal, [images], Batch((IMAGES,), images)), lambda: score(equal, images, images)):
        with pytest.raises(InputError, match="'PSNR' is infinite over"):
            act()
    single = resolved(SCORES, CLASSES, metric=lambda_metric())
    assert single is not None
    with pytest.raises(InputError, match="the scored output is one number for a whole batch"):
        single.meter().update([SCORES.mean()], Batch((IMAGES,), CLASSES))


def lambda_metric() -> Any:
    def one(outputs: Any, targets: Any) -> float:
        return 1.0

    one.higher_is_better = True  # type: ignore[attr-defined]
    return one


class Own(torchmetrics.Metric):
    """Returns a plain number, or fails where the outputs are no class scores."""

    higher_is_better = True

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        assert outputs.dim() == 2, "no class scores"

    def compute(self) -> float:
        return 0.5


def test_a_torchmetrics_class_of_ones_own_may_return_a_number_and_its_failure_is_told() -> None:
    objective = resolved(SCORES, CLASSES, metric=Own)
    assert objective is not None
    assert score(objective, SCORES, CLASSES) == 0.5
    with pytest.raises(InputError, match="the metric Own failed: AssertionError: no class scores"):
        score(objective, PLACES, CLASSES)


@given(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3), st.booleans(), st.sampled_from(["%", "dB", ""]))
def test_a_drop_is_worse_in_the_metrics_direction(dense: float, compiled: float, higher: bool, unit: str) -> None:
    about = About("m", higher, unit)
    better = (compiled > dense) == higher
    drop = about.drop(dense, compiled)
    assert drop == 0 if dense == compiled else (drop < 0) == better
    assert about.drop(compiled, dense) == pytest.approx(-drop)


def test_a_metric_is_tried_before_any_work_and_later_targets_are_checked() -> None:
    wrong = resolved(SCORES, CLASSES, metric="MulticlassConfusionMatrix{num_classes=3,higher=true}")
    assert wrong is not None
    with pytest.raises(InputError, match=r"gives \(3, 3\); one number is needed"):
        check_metric(wrong, [SCORES], Batch((IMAGES,), CLASSES))
    precision = resolved(SCORES, LABELS, metric="MultilabelAveragePrecision{num_labels=3,unit=%}")
    assert precision is not None
    check_metric(precision, [SCORES], Batch((IMAGES,), LABELS))  # integer labels reach the metric
    places = resolved(PLACES, MASKS)
    assert places is not None
    odd = MASKS.clone()
    odd[2, 3, 3] = 200
    with pytest.raises(InputError, match="the target of sample 2 of a batch is 200 somewhere"):
        places.loss([PLACES], Batch((IMAGES,), odd))
    rows = resolved(SCORES, F.one_hot(CLASSES, 3))
    assert rows is not None
    with pytest.raises(InputError, match="neither one-hot nor holds probabilities"):
        score(rows, SCORES, torch.ones(4, 3))


def test_a_loss_without_a_gradient_or_that_is_nan_is_refused() -> None:
    grown = SCORES.clone().requires_grad_()
    for loss, says in (
        (lambda outputs, targets: torch.tensor(1.0), "without a gradient"),
        (lambda outputs, targets: outputs.sum() * math.nan, "--loss gives nan on finite outputs"),
    ):
        objective = resolved(SCORES, CLASSES, loss=loss)
        assert objective is not None
        with pytest.raises(InputError, match=says):
            objective.loss([grown], Batch((IMAGES,), CLASSES))
