"""Networks of any task compile with their own targets: the metric is measured in onnxruntime, tuned for and gated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tdcompile
from tdcompile.artifact.report import Report
from tdcompile.backend.session import infer, open_session
from tdcompile.ir.target import Target

COUNT = 192


def images(seed: int = 0) -> Tensor:
    """Return smooth images ``(COUNT, 3, 16, 16)`` in [0, 1]."""
    noise = torch.randn(COUNT, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, size=16, mode="bicubic").sigmoid()


class Dense(nn.Module):
    """A convolutional network with an output for each place, or one for each image."""

    def __init__(self, channels: int, *, pooled: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Conv2d(32, channels, 1)
        self.pooled = pooled

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.body(x))
        return y.mean((2, 3)) if self.pooled else y


class Language(nn.Module):
    """A causal network of tokens: each place sees the four before it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 32)
        self.mix = nn.Conv1d(32, 64, 4)
        self.out = nn.Linear(64, 20)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = F.pad(self.embedding(input_ids).transpose(1, 2), (3, 0))
        return self.out(self.mix(x).relu().transpose(1, 2))


def chain() -> Tensor:
    """Return token sequences ``(COUNT, 12)`` in which a token nearly tells the next."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, 20, (COUNT,), generator=generator)]
    for _ in range(11):
        odd = torch.rand(COUNT, generator=generator) < 0.1
        rows.append(torch.where(odd, torch.randint(0, 20, (COUNT,), generator=generator), (3 * rows[-1] + 1) % 20))
    return torch.stack(rows, 1)


def trained(network: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor], steps: int = 60) -> nn.Module:
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    network.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss(network(x)).backward()
        optimizer.step()
    return network.eval()


@dataclass(frozen=True)
class Case:
    network: Callable[[], nn.Module]
    x: Tensor
    y: Tensor | None
    metric: str
    check: Callable[[Tensor], float]


def cases() -> dict[str, Case]:
    x, ids = images(), chain()
    bright, masks = x.mean((1, 2, 3), keepdim=False)[:, None], (3 * x[:, 0]).long().clamp(0, 2)
    many = (x.mean((2, 3)) > 0.5).long()
    blurred = F.avg_pool2d(x, 3, 1, 1)
    test = slice(128, None)

    def next_tokens(y: Tensor) -> float:
        return float(F.cross_entropy(y[:, :-1].flatten(0, 1), ids[test][:, 1:].flatten()).exp())

    torch.manual_seed(0)
    return {
        "segmentation": Case(
            lambda: trained(Dense(3), x, lambda y: F.cross_entropy(y, masks)), x, masks, "mIoU",
            lambda y: float(np.mean([
                float(((y.argmax(1) == c) & (masks[test] == c)).sum() / ((y.argmax(1) == c) | (masks[test] == c)).sum())
                for c in range(3)
            ])),
        ),
        "regression": Case(
            lambda: trained(Dense(1, pooled=True), x, lambda y: F.mse_loss(y, bright)), x, bright[:, 0], "MAE",
            lambda y: float((y - bright[test]).abs().mean()),
        ),
        "multilabel": Case(
            lambda: trained(Dense(3, pooled=True), x, lambda y: F.binary_cross_entropy_with_logits(y, many.float())),
            x, many, "F1",
            lambda y: float(2 * ((y > 0) & (many[test] == 1)).sum() / ((y > 0).sum() + many[test].sum())),
        ),
        "restoration": Case(
            lambda: trained(Dense(3), blurred, lambda y: F.l1_loss(y, x)), blurred, x, "PSNR",
            lambda y: float(-10 * (y - x[test]).square().mean().log10()),
        ),
        "language": Case(
            lambda: trained(Language(), ids, lambda y: F.cross_entropy(y[:, :-1].flatten(0, 1), ids[:, 1:].flatten())),
            ids, None, "perplexity", next_tokens,
        ),
    }  # fmt: skip


CASES = cases()


def parts(case: Case) -> tuple[Any, Any]:
    train, test = (
        tdcompile.Tensors(case.x[at], None if case.y is None else case.y[at]) for at in (slice(128), slice(128, None))
    )
    return train, test


@pytest.mark.usefixtures("brief_timing")
@pytest.mark.parametrize("name", sorted(CASES))
def test_a_network_of_any_task_compiles_and_its_metric_is_that_of_the_onnx_file(name: str) -> None:
    case = CASES[name]
    compiled = tdcompile.compile(
        case.network(),
        case.x[:2],
        data=parts(case),
        budget={"macs": 0.7},
        tune="epochs=2,trial=0,lr=0.01",
        max_drop="20%",
    )
    report: Report = compiled.report
    assert report.metric is not None
    assert (report.metric.task, report.metric.name) == (name, case.metric)
    assert f"task guessed from the targets: {name}" in " ".join(report.notes)
    session = open_session(compiled.onnx, Target())
    rows = [infer(session, [case.x[128 + at : 130 + at]])[0] for at in range(0, 64, 2)]
    own = case.check(torch.from_numpy(np.concatenate(rows)))
    assert report.compiled.score == pytest.approx(own, rel=1e-3)
    dense, after = report.dense.score, report.compiled.score
    assert dense is not None
    assert after is not None
    gate = next(gate for gate in report.gates if gate.name == "max-drop")
    assert gate.sentence.startswith(case.metric)
    assert gate.value == pytest.approx(report.metric.about.drop(dense, after), abs=1e-6)
    assert case.metric in report.verdict
    assert report.tuning_curve[0].heldout_score is not None
    assert case.metric.lower() in tdcompile.artifact.report.render_html(report).lower()


@pytest.mark.usefixtures("brief_timing")
def test_a_metric_and_a_loss_of_ones_own_lead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.py").write_text(
        "def loss(outputs, targets):\n    return (outputs - targets['depth']).square().mean()\n\n"
        "def close(outputs, targets):\n    return ((outputs - targets['depth']).abs() < 0.1)[:, 0].float()\n"
    )
    case = CASES["regression"]
    depth = case.x.mean((1, 2, 3))[:, None]
    monkeypatch.chdir(tmp_path)
    compiled = tdcompile.compile(
        case.network(), {"x": case.x[:2]}, data=({"x": case.x, "depth": depth, "w": depth},) * 2, budget={"macs": 0.7},
        loss="own.py:loss", metric="own.py:close{higher=true,unit=%}", tune="epochs=1,trial=0,lr=0.01,labels=1",
    )  # fmt: skip
    report = compiled.report
    assert report.metric is not None
    assert (report.metric.task, report.metric.name, report.metric.unit) == ("own", "close", "%")
    assert report.compiled.score is not None
    assert report.compiled.score > 0.5
    assert "close" in report.verdict


class Mean(nn.Module):
    """Answers with one number for the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 96), nn.ReLU(), nn.Linear(96, 96))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).mean()


@pytest.mark.usefixtures("brief_timing")
def test_outputs_that_cannot_be_compared_have_no_figure_and_no_bound() -> None:
    x = torch.randn(96, 16)
    data = tdcompile.Tensors(x[:64]), tdcompile.Tensors(x[64:])
    report = tdcompile.compile(Mean().eval(), x[:2], data=data, budget={"macs": 0.5}).report
    assert "quality not measured, because no output has a real value for each sample" in report.verdict
    assert "answers" not in {gate.name for gate in report.gates}
    for bound in ({"budget": {"macs": 0.5}}, {"goal": "smallest"}):
        with pytest.raises(tdcompile.TdcompileError, match="bounds the loss of quality, and the network has no output"):
            tdcompile.compile(Mean().eval(), x[:2], data=data, max_drop=1, **bound)


@pytest.mark.usefixtures("brief_timing")
def test_of_several_outputs_the_one_asked_for_is_scored() -> None:
    net = CASES["multilabel"].network()

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"features": self.net.body(x), "scores": self.net(x)}

    case = CASES["multilabel"]
    for output in ("scores", 1):
        report = tdcompile.compile(
            Two().eval(), case.x[:2], data=parts(case), budget={"macs": 0.8}, output=output
        ).report
        assert report.metric is not None
        assert report.metric.name == "F1"
        assert report.dense.score == pytest.approx(case.check(net(case.x[128:]).detach()), rel=1e-3)
    with pytest.raises(tdcompile.TdcompileError, match=r"there is no output 'score': .*'scores'"):
        tdcompile.compile(Two().eval(), case.x[:2], data=parts(case), budget={"macs": 0.8}, output="score")
