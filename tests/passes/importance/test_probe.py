"""``probe`` and ``noise``: what the answers really lose when one layer is compressed, or disturbed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tdcompile.core.importance import Importance
from tdcompile.core.registry import make
from tdcompile.data.task import Task, Tensors
from tdcompile.errors import InputError
from tdcompile.frontend.tracing import trace
from tdcompile.ir.program import Program
from tdcompile.passes.importance._trial import trials


def program() -> tuple[nn.Sequential, Program, torch.Tensor]:
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 8)).eval()
    x = torch.randn(64, 12)
    labels = net(x).argmax(1)
    return net, trace(net, (x[:2],)).with_(task=Task(train=Tensors(x, labels, classes=8))), x


@torch.no_grad()
def compressed(net: nn.Sequential, place: int, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    layer = net[place]
    assert isinstance(layer, nn.Linear)
    kept = layer.weight.clone()
    layer.weight.copy_(weight)
    answer: torch.Tensor = net(x)
    layer.weight.copy_(kept)
    return answer


@pytest.mark.parametrize("measure", ["kl", "metric"])
def test_the_score_is_the_loss_for_each_unit_of_squared_error(measure: str) -> None:
    net, given, x = program()
    wanted, lost = net(x).detach(), {}
    for name, trial in trials(given, 0.5).items():
        answer = compressed(net, int(name), trial.weight, x)
        if measure == "kl":
            p, q = wanted.double().log_softmax(1), answer.double().log_softmax(1)
            change = float((p.exp() * (p - q)).sum(1).mean())
        else:
            change = float((answer.argmax(1) != wanted.argmax(1)).double().mean())
        lost[name] = change / trial.error**2
    scores = make(Importance, f"probe{{measure={measure}}}").score(given)
    assert scores["0"] / scores["2"] == pytest.approx(lost["0"] / lost["2"], rel=1e-3)


@pytest.mark.parametrize("text", ["probe{samples=0}", "error{samples=-5}", "lwiq{samples=0}", "noise{samples=1}"])
def test_no_samples_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="samples"):
        make(Importance, text)


def test_noise_of_another_size_scores_layers_alike() -> None:
    _, given, _ = program()
    small, large = (make(Importance, f"noise{{error={error}}}").score(given) for error in (0.02, 0.1))
    assert small["0"] / small["2"] == pytest.approx(large["0"] / large["2"], rel=0.1)
    assert small["0"] != pytest.approx(small["2"], rel=0.05)
