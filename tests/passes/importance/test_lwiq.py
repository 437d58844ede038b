"""``lwiq``: the layer that carries the classes is the important one, one pass does, and judging is on other samples."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import nn

import tdcompile
from tdcompile.core.importance import Importance
from tdcompile.core.pipeline import Pipeline
from tdcompile.core.plan import RankPlan
from tdcompile.core.registry import make
from tdcompile.data.task import Batch, Samples, Task, Tensors
from tdcompile.errors import InputError
from tdcompile.ir.program import Program
from tdcompile.passes.importance.lwiq import _points, _Proxy


class Hidden(Samples):
    """Two classes told apart by the sign of the product of two channels: no linear map of the input tells them."""

    classes = 2

    def __init__(self, count: int = 600) -> None:
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, (count, 2), generator=generator) * 2.0 - 1
        self.y = (signs.prod(1) > 0).long()
        noise = 0.1 * torch.randn(count, 2, 6, 6, generator=generator)
        self.x = signs.view(-1, 2, 1, 1).expand(-1, -1, 6, 6) + noise
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, indices: object) -> Batch:
        places = list(indices)  # type: ignore[call-overload]
        self.read += places
        return Batch((self.x[places],), self.y[places])


class Finder(nn.Module):
    """The first convolution mixes channels without telling the classes apart; the second one, behind it, does."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.find = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)
        self.act, self.relu, self.fc = nn.Identity(), nn.ReLU(), nn.Linear(8, 2)
        with torch.no_grad():
            for conv in (self.mix, self.find):
                conv.weight.zero_()
                conv.bias.zero_()
            for i, (a, b) in enumerate(((1, 1), (1, -1), (-1, 1), (-1, -1))):
                self.mix.weight[i, :, 1, 1] = torch.tensor([a, b])
                for copy in (i, i + 4):  # each behind a ReLU lights up for one combination of signs
                    self.find.weight[copy, i, 1, 1] = 1.0
                    self.find.bias[copy] = -1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.relu(self.find(self.act(self.mix(x)))).mean((2, 3)))


def program(train: Samples) -> Program:
    torch.manual_seed(0)
    made = tdcompile.trace(Finder().eval(), (torch.randn(2, 2, 6, 6),))
    return made.with_(task=Task(train, calibrate=200), budget=tdcompile.Budget(macs=0.6))


def test_the_layer_that_tells_the_classes_apart_is_the_important_one() -> None:
    scores = make(Importance, "lwiq").score(program(Hidden()))
    assert scores["find"] > 3 * scores["mix"]
    assert scores["find"] > 3 * scores["fc"]


def test_accuracy_is_of_samples_that_were_not_imprinted_and_each_is_read_once() -> None:
    samples = Hidden()
    make(Importance, "lwiq{judged=0.5}").score(program(samples))
    assert len(samples.read) == 300
    assert len(set(samples.read)) == 300


def test_a_second_budget_costs_no_second_pass() -> None:
    passes: list[int] = []

    def count(module: nn.Module, arguments: object, output: torch.Tensor) -> None:
        if isinstance(module, nn.Linear):  # the head, with which every pass ends
            passes.append(len(output))

    given = Pipeline.parse("calibrate,propose{decompose=tt+svd}").run(program(Hidden()))
    hook = nn.modules.module.register_module_forward_hook(count)  # of all modules: one of a layer's own keeps it dense
    try:
        given = Pipeline.parse("score{by=lwiq}").run(given)
        scored = len(passes)
        plans = [
            Pipeline.parse("choose{by=lwiq}").run(given.with_(budget=tdcompile.Budget(macs=share))).facts[RankPlan]
            for share in (0.95, 0.2)  # ranks of 2 are exact and take 0.24
        ]
    finally:
        hook.remove()
    # 200 samples to imprint and 100 to judge by, in batches; the others are the example, for the layers' shapes.
    assert [count for count in passes[:scored] if count > 2] == [128, 72, 100]
    assert passes[scored:] == []
    assert plans[1].predicted.macs < plans[0].predicted.macs


def test_a_class_that_is_not_seen_is_told() -> None:
    samples = Hidden()
    samples.y = torch.zeros_like(samples.y)
    samples.y[0] = 1
    with pytest.raises(InputError, match="no sample of class 1"):
        make(Importance, "lwiq{samples=5}").score(program(samples))


def test_a_reading_of_accuracy_looks_behind_the_layer_alone() -> None:
    scores = make(Importance, "lwiq{reading=accuracy,eps=0}").score(program(Hidden()))
    assert scores["mix"] == pytest.approx(0.5 * scores["find"], rel=0.3)  # guessing, and knowing
    gains = make(Importance, "lwiq{eps=0}").score(program(Hidden()))
    assert gains["mix"] < 0.2 * gains["find"]
    assert gains["fc"] == 0 < scores["fc"] <= scores["find"]


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.5])
def test_eps_is_the_share_of_the_largest_gain_that_a_layer_without_any_has(eps: float) -> None:
    scores = make(Importance, f"lwiq{{eps={eps}}}").score(program(Hidden()))
    assert scores["fc"] / scores["find"] == pytest.approx(eps / (1 + eps))


class Beside(nn.Module):
    """Two layers that read the input; behind the second one outliers are no larger than the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.bounded, self.tanh = nn.Linear(2, 2), nn.Linear(2, 2), nn.Tanh()
        for layer in (self.open, self.bounded):
            layer.weight.data, layer.bias.data = torch.eye(2), torch.zeros(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.open(x) + self.tanh(self.bounded(x))


@pytest.mark.parametrize(("cosine", "share"), [("true", 1.0), ("false", 0.6)])
def test_normalised_activations_are_not_led_astray_by_large_ones(cosine: str, share: float) -> None:
    labels = torch.arange(400) % 2
    x = nn.functional.one_hot(labels, 2).float()
    x[::20, 0] = -1000.0  # a tenth of class 0
    made = tdcompile.trace(Beside().eval(), (x[:2],)).with_(task=Task(Tensors(x, labels), calibrate=200))
    scores = make(Importance, f"lwiq{{reading=accuracy,eps=0,cosine={cosine}}}").score(made)
    assert scores["open"] / scores["bounded"] == pytest.approx(share, abs=0.1)


class Halves(nn.Module):
    """What one half of an image holds less the other: from the image that the first layer passes on."""

    def __init__(self) -> None:
        super().__init__()
        self.keep, self.tell = nn.Conv2d(1, 1, 1), nn.Linear(64, 2)
        self.keep.weight.data, self.keep.bias.data = torch.ones(1, 1, 1, 1), torch.zeros(1)
        left = (torch.arange(64) % 8 < 4).float()
        self.tell.weight.data, self.tell.bias.data = torch.stack([left, 1 - left]), torch.zeros(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tell(self.keep(x).flatten(1))


@pytest.mark.parametrize(("embedding", "share"), [(1, 0.5), (4, 1.0), (512, 1.0)])
def test_a_longer_embedding_keeps_places_apart(embedding: int, share: float) -> None:
    labels = torch.arange(400) % 2
    sides = nn.functional.one_hot(labels, 2).float().repeat_interleave(4, 1)
    x = sides.view(-1, 1, 1, 8).expand(-1, 1, 8, 8) + 0.1 * torch.rand(400, 1, 8, 8)
    made = tdcompile.trace(Halves().eval(), (x[:2],)).with_(task=Task(Tensors(x, labels), calibrate=200))
    scores = make(Importance, f"lwiq{{reading=accuracy,eps=0,embedding={embedding}}}").score(made)
    assert scores["keep"] / scores["tell"] == pytest.approx(share, abs=0.15)


@pytest.mark.parametrize(
    ("axes", "shape", "length"),
    [
        (2, (4, 32, 20, 20), 32 * 4 * 4),
        (1, (4, 32, 100), 32 * 16),
        (3, (4, 16, 8, 8, 8), 16 * 3**3),
        (2, (4, 600, 5, 5), 600),
        (0, (4, 7, 24), 24),  # tokens
        (0, (4, 5, 6, 24), 24),
        (0, (12, 24), 24),  # three to a sample, folded into the batch
        (2, (8, 16, 2, 2), 16 * 4),
    ],
)
def test_an_embedding_is_of_about_the_length_asked_for(axes: int, shape: tuple[int, ...], length: int) -> None:
    z = _Proxy(axes, 512, False)._embedded(torch.randn(shape), 4)
    assert z is not None
    assert z.shape == (4, length)


def test_a_signal_is_pooled_along_its_length_and_its_channels_are_kept() -> None:
    x = torch.arange(4.0).view(1, 4, 1).expand(2, 4, 100)
    z = _Proxy(1, 4, False)._embedded(x, 2)
    assert z is not None
    assert z[0].tolist() == [0, 1, 2, 3]


def test_what_does_not_go_by_sample_is_left_out() -> None:
    assert _Proxy(0, 512, False)._embedded(torch.randn(5, 8), 4) is None
    assert _Proxy(2, 512, False)._embedded(torch.randn(4, 8), 4) is None


class Residual(nn.Module):
    """Two blocks with shortcuts; the branch of the first adds nothing, and that of the second passes on what it reads.

    The sum behind the first block therefore knows all that the stem has found, the layer before it nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act, self.fc = Finder(), nn.ReLU(), nn.Linear(8, 2)
        self.first, self.second, self.third, self.fourth = (nn.Conv2d(8, 8, 1) for _ in range(4))
        for conv in (self.first, self.second, self.third, self.fourth):
            conv.weight.data, conv.bias.data = torch.eye(8).view(8, 8, 1, 1), torch.zeros(8)
        self.second.weight.data.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.stem.find(self.stem.mix(x)))
        x = x + self.second(self.act(self.first(x)))
        x = x + self.fourth(self.act(self.third(x)))
        return self.fc(x.mean((2, 3)))


def test_a_blocks_first_layer_is_measured_against_the_sum_that_it_reads() -> None:
    made = tdcompile.trace(Residual().eval(), (torch.randn(2, 2, 6, 6),), frontend="fx")
    made = made.with_(task=Task(Hidden(), calibrate=200))
    total, _ = (node for node in made.graph.graph.nodes if node.target is operator.add)
    assert _points(made.graph, tdcompile.sites(made)["third"])[0] is total
    known = make(Importance, "lwiq{reading=accuracy,eps=0}").score(made)
    assert known["third"] == pytest.approx(known["stem.find"])
    assert known["second"] == pytest.approx(0.5 * known["third"], rel=0.3)  # it can but guess
    gains = make(Importance, "lwiq{eps=0}").score(made)
    # Against the layer before it in the network, which knows nothing, it would gain as much as the stem does.
    assert gains["third"] < 0.02 * gains["stem.find"]
    assert gains["first"] < 0.02 * gains["stem.find"]


class Guarded(nn.Module):
    """A convolution in a module that cannot be traced, and which is called by keyword or not."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return scale * self.conv(x) if bool(torch.isfinite(x).all()) else x


class ByKeyword(Residual):
    def __init__(self, named: bool) -> None:
        super().__init__()
        self.third, self.named = Guarded(self.third), named

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.stem.find(self.stem.mix(x)))
        return self.fc((self.third(scale=1.0, x=x) if self.named else self.third(x, 1.0)).mean((2, 3)))


def test_what_is_given_by_keyword_is_read_too() -> None:
    scores, calls = [], []
    for named in (True, False):
        made = tdcompile.trace(ByKeyword(named).eval(), (torch.randn(2, 2, 6, 6),), frontend="fx")
        calls += [(len(node.args), list(node.kwargs)) for node in made.graph.graph.nodes if node.target == "third"]
        scores.append(make(Importance, "lwiq{eps=0}").score(made.with_(task=Task(Hidden(), calibrate=200))))
    assert calls == [(0, ["scale", "x"]), (2, [])]
    assert scores[0] == scores[1]
    assert scores[0]["third.conv"] < 0.02 * scores[0]["stem.find"]


class Signals(nn.Module):
    """Told apart by which of two channels is loud; a layer inside an attention gives no tensor alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv1d(2, 8, 5, padding=2), nn.ReLU()
        self.attention, self.fc = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.conv(x)).transpose(1, 2)
        return self.fc((x + self.attention(x, x, x)[0]).mean(1))


@pytest.mark.parametrize("frontend", ["fx", "export"])
def test_signals_and_attention_have_scores(frontend: str) -> None:
    torch.manual_seed(0)
    labels = torch.arange(300) % 2
    x = torch.randn(300, 2, 20) * torch.stack([1 + 2.0 * labels, 3 - 2.0 * labels], 1)[:, :, None]
    made = tdcompile.trace(Signals().eval(), (x[:2],), frontend=frontend)
    made = made.with_(task=Task(Tensors(x, labels), calibrate=200))
    scores = make(Importance, "lwiq").score(made)
    assert set(scores) == set(tdcompile.sites(made))
    assert all(0 < score < 10 for score in scores.values())
    assert scores["conv"] > scores["fc"]
