"""Scores of a language model: each token is a sample, and needs no label."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdcompile.core.importance import Importance
from tdcompile.core.registry import make
from tdcompile.data.class_scores import of_tokens
from tdcompile.data.task import Task, Tensors
from tdcompile.frontend.tracing import trace
from tdcompile.ir.program import Program
from tdcompile.passes.importance._trial import trials

WORDS, LENGTH = 24, 6


class Language(nn.Module):
    """Ids ``(N, L)`` to scores ``(N, L, width)``; each token sees those before it."""

    def __init__(self, width: int = WORDS) -> None:
        super().__init__()
        self.words, self.first, self.last = nn.Embedding(WORDS, 12), nn.Linear(12, 16), nn.Linear(16, width)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the scores."""
        return self.last(torch.tanh(self.first(self.words(ids))).cumsum(1))


def program_of(network: nn.Module, ids: Tensor) -> Program:
    return trace(network.eval(), (ids[:2],)).with_(task=Task(train=Tensors(ids), calibrate=len(ids)))


@pytest.fixture
def ids() -> Tensor:
    torch.manual_seed(0)
    return torch.randint(WORDS, (8, LENGTH))


def test_taylor_takes_each_position_as_a_sample(ids: Tensor) -> None:
    network = Language()
    program = program_of(network, ids)
    found = make(Importance, "taylor{order=2,batch=8}").score(program)
    assert program.task.train is not None
    train = program.task.train.shuffled(program.generator("taylor")).batch(range(8)).inputs[0]
    states = network.words(train).detach()
    hidden = network.first(states).detach().requires_grad_()
    out = network.last(torch.tanh(hidden).cumsum(1))
    classes = torch.multinomial(
        out.detach().flatten(0, 1).softmax(1), 1, generator=program.generator("taylor/classes")
    ).squeeze(1)
    gradients = torch.autograd.grad(F.cross_entropy(out.flatten(0, 1), classes, reduction="sum"), (hidden, out))
    inputs, tried, expected = (states, torch.tanh(hidden).cumsum(1).detach()), trials(program, 0.5), {}
    for name, x, g in zip(("first", "last"), inputs, gradients, strict=True):
        moved = F.linear(x, tried[name].weight - network.get_submodule(name).weight.detach())
        expected[name] = float((g * moved).sum(-1).square().sum()) / tried[name].error ** 2
    assert found["first"] / found["last"] == pytest.approx(expected["first"] / expected["last"], rel=1e-4)


def test_auto_is_taylor_for_a_language_model(ids: Tensor) -> None:
    program = program_of(Language(), ids)
    found = make(Importance, f"auto{{tokens={8 * LENGTH}}}").score(program)
    taylor = make(Importance, "taylor{order=2,samples=8,batch=8}").score(program)
    assert found["first"] / found["last"] == pytest.approx(taylor["first"] / taylor["last"])
    assert found["first"] != found["last"]


def test_auto_scores_hidden_states_of_an_encoder_equally(ids: Tensor) -> None:
    assert len(set(make(Importance, "auto").score(program_of(Language(WORDS - 8), ids)).values())) == 1


def test_a_layer_whose_output_a_few_tokens_dominate_is_not_free(ids: Tensor) -> None:
    network = Language()
    with torch.no_grad():  # a word of enormous norm, which saturates tanh whatever else the layer does
        network.words.weight[0] *= 1000
        network.first.weight.mul_(torch.linspace(1, 0.5, 16)[:, None])
    ids[:, 0] = 0
    program = program_of(network, ids)
    assert make(Importance, "auto").score(program)["first"] > 0


def test_scores_of_tokens_are_told_from_other_outputs(ids: Tensor) -> None:
    scores = torch.randn(8, LENGTH, WORDS)
    assert of_tokens([ids], scores)
    assert of_tokens([ids, torch.ones(8, LENGTH, dtype=torch.bool), torch.randn(8, 3)], scores)
    assert not of_tokens([ids + WORDS], scores)
    assert not of_tokens([ids - 1 - WORDS], scores)
    assert not of_tokens([torch.randn(8, LENGTH)], scores)
    assert not of_tokens([ids], scores[:, 0])
    assert not of_tokens([ids], scores.long())
    assert not of_tokens([ids[0]], scores)
    assert not of_tokens([], scores)
