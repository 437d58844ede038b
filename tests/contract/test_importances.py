"""What every registered score promises."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import tdcompile
from tdcompile.core.importance import Importance
from tdcompile.core.pipeline import Pipeline
from tdcompile.core.plan import Importances
from tdcompile.core.registry import find, make
from tdcompile.data.task import Samples, Task, Tensors
from tdcompile.errors import InputError
from tdcompile.ir.program import Program, sites

SCORES = sorted(find(Importance))
NEED_DATA = {"fisher", "lwiq", "noise", "probe", "taylor"}


def bright(labelled: bool = True, seed: int = 0) -> Tensors:
    """Two classes, bright and dark."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(120) % 2
    x = torch.randn(120, 3, 8, 8, generator=generator) + (2.0 * y - 1).view(-1, 1, 1, 1)
    return Tensors(x, y if labelled else None)


class Branches(nn.Module):
    """A branch that reaches the output, and one that is multiplied by zero."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())
        self.alive, self.dead = nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.fc = nn.Linear(12, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.fc((self.alive(x) + 0.0 * self.dead(x)).relu().mean((2, 3)))


def program(train: Samples | None = None) -> Program:
    torch.manual_seed(0)
    made = tdcompile.trace(Branches().eval(), (torch.randn(2, 3, 8, 8),))
    return made.with_(task=Task(train, calibrate=64))


def scored(name: str, given: Program) -> dict[str, float]:
    return dict(Pipeline.parse(f"score{{by={name}}}").run(given).facts[Importances].scores)


@pytest.mark.parametrize("name", SCORES)
def test_every_layer_has_a_finite_score_that_the_seed_decides(name: str) -> None:
    given = program(bright())
    scores = scored(name, given)
    assert list(scores) == list(sites(given))
    assert all(math.isfinite(score) and score >= 0 for score in scores.values())
    torch.rand(5)  # somebody else's draw
    assert scored(name, program(bright())) == scores


def test_auto_is_taylor_where_there_are_labels_and_none_where_there_are_not() -> None:
    labelled = program(bright())
    found, taylor = scored("auto", labelled), scored("taylor{order=1,samples=128}", labelled)
    assert taylor["dead"] == 0.0
    assert found["dead"] == 1.0
    known = {name: score for name, score in taylor.items() if score}
    assert sum(found[name] for name in known) == pytest.approx(len(known))  # so that 1 is the mean
    assert all(found[name] / found["fc"] == pytest.approx(score / taylor["fc"]) for name, score in known.items())
    assert len(set(found.values())) > 2
    for train in (None, bright(labelled=False)):
        assert set(scored("auto", program(train)).values()) == {1.0}
    small = scored("auto{largest=4}", labelled)  # of which the last layer alone is: its two classes
    assert set(small.values()) == {1.0}


class Odd(nn.Module):
    """What makes gradients difficult: two outputs, a detached one, one of places, a layer that is called on crops."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b, self.c = nn.Linear(192, 16), nn.Linear(16, 16), nn.Linear(16, 2)

    def forward(self, x: torch.Tensor) -> object:
        h = self.a(x.flatten(1)).relu()
        if self.kind == "crops":
            return self.c(self.b(torch.cat([h, h])).relu()[: h.shape[0]] + self.b(h))
        out = self.c(self.b(h).relu())
        if self.kind == "features":
            return out, self.b(h)
        return out.detach() if self.kind == "detached" else out.unsqueeze(-1).expand(-1, -1, 3)


@pytest.mark.parametrize("kind", ["features", "detached", "crops"])
def test_auto_takes_any_network(kind: str) -> None:
    torch.manual_seed(0)
    made = tdcompile.trace(Odd(kind).eval(), (torch.randn(2, 3, 8, 8),)).with_(task=Task(bright(), calibrate=64))
    scores = scored("auto", made)
    assert set(scores) == {"a", "b", "c"}
    assert all(score > 0 for score in scores.values())
    assert (len(set(scores.values())) > 1) == (kind == "crops")


def test_targets_that_do_not_fit_the_outputs_are_refused() -> None:
    made = tdcompile.trace(Odd("places").eval(), (torch.randn(2, 3, 8, 8),)).with_(task=Task(bright(), calibrate=64))
    with pytest.raises(InputError, match=r"the network's output is 8x2x3: expected a score for each class"):
        scored("auto", made)


@pytest.mark.parametrize("name", ["fisher", "taylor"])
def test_gradients_that_do_not_come_count_nothing(name: str) -> None:
    torch.manual_seed(0)
    made = tdcompile.trace(Odd("detached").eval(), (torch.randn(2, 3, 8, 8),)).with_(task=Task(bright(), calibrate=64))
    assert set(scored(name, made).values()) == {1.0}


@pytest.mark.parametrize("name", SCORES)
def test_scoring_leaves_the_network_alone(name: str) -> None:
    given = program(bright())
    before = {key: value.clone() for key, value in given.graph.state_dict().items()}
    make(Importance, name).score(given)
    assert all(torch.equal(value, before[key]) for key, value in given.graph.state_dict().items())
    assert all(p.grad is None for p in given.graph.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in given.graph.modules())


@pytest.mark.parametrize("name", SCORES)
def test_without_data_a_score_that_needs_them_says_so(name: str) -> None:
    if name in NEED_DATA:
        with pytest.raises(InputError, match=f"'{name}'"):
            make(Importance, name).score(program())
    else:
        assert make(Importance, name).score(program())


@pytest.mark.parametrize("name", ["fisher", "noise", "probe", "taylor", "taylor{order=1}"])
def test_a_layer_that_nothing_depends_on_has_no_score(name: str) -> None:
    scores = make(Importance, name).score(program(bright()))
    assert scores["dead"] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("name", ["noise", "probe", "taylor", "fisher"])
def test_labels_are_not_needed(name: str) -> None:
    scores = make(Importance, name).score(program(bright(labelled=False)))
    assert scores["alive"] > scores["dead"]


@pytest.mark.parametrize("name", ["lwiq", "probe{measure=metric}"])
def test_labels_that_are_needed_are_asked_for(name: str) -> None:
    with pytest.raises(InputError, match="targets"):
        make(Importance, name).score(program(bright(labelled=False)))


@pytest.mark.parametrize("text", ["noise{error=0}", "noise{samples=1}", "taylor{order=3}", "lwiq{judged=0}"])
def test_options_out_of_range_are_refused(text: str) -> None:
    with pytest.raises(InputError):
        make(Importance, text)


@pytest.mark.parametrize("text", ["probe{share=0}", "taylor{share=1.5}"])
def test_a_share_outside_its_range_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="share="):
        make(Importance, text).score(program(bright()))
