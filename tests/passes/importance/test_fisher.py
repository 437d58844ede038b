import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tdcompile.data.task import Task, Tensors
from tdcompile.errors import InputError
from tdcompile.frontend.tracing import trace
from tdcompile.passes.importance.fisher import Fisher


def test_scores_are_finite_of_mean_one_and_zero_for_what_the_loss_ignores(program):
    scores = Fisher().score(program)
    assert set(scores) == {"stem", "shared", "dead", "head"}
    assert sum(scores.values()) / 4 == pytest.approx(1.0)
    assert scores["dead"] == pytest.approx(0.0, abs=1e-9)
    assert min(scores["stem"], scores["shared"], scores["head"]) > 0.01


def test_the_score_is_what_autograd_says_sample_by_sample(program):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4)).eval()
    x, labels = torch.randn(12, 6), torch.randint(4, (12,))
    traced = trace(net, (x[:2],)).with_(task=Task(train=Tensors(x, labels), calibrate=12))
    gradients, energies = {"0": 0.0, "2": 0.0}, {"0": 0.0, "2": 0.0}
    for sample, label in zip(x, labels, strict=True):
        first = net[0](sample).detach().requires_grad_()
        last = net[2](net[1](first))
        g_last, g_first = torch.autograd.grad(F.cross_entropy(last[None], label[None]), (last, first))
        for name, g, y in (("0", g_first, first - net[0].bias), ("2", g_last, last - net[2].bias)):
            gradients[name] += float(g.square().sum()) / 12
            energies[name] += float(y.detach().square().sum()) / 12
    expected = {name: gradients[name] * energies[name] / size for name, size in (("0", 10), ("2", 4))}
    scores = Fisher(batch=5).score(traced)
    assert scores["0"] / scores["2"] == pytest.approx(expected["0"] / expected["2"], rel=1e-4)


def test_it_predicts_the_second_order_loss_of_a_random_error():
    """Importance · error² orders layers as ½ E[(g·δy)²] does, over errors of no preferred direction."""
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)).eval()
    x = torch.randn(256, 16)
    scores = Fisher().score(trace(net, (x[:2],)).with_(task=Task(train=Tensors(x))))
    rises = {}
    with torch.no_grad():
        clean = net(x).log_softmax(1)
        for index in ("0", "2", "4"):
            weight, kept = net[int(index)].weight, net[int(index)].weight.clone()
            total = 0.0
            for _ in range(20):
                weight.copy_(kept + 0.02 * kept.norm() * F.normalize(torch.randn(kept.numel()), dim=0).view_as(kept))
                total += float((clean.exp() * (clean - net(x).log_softmax(1))).sum(1).mean())
            weight.copy_(kept)
            rises[index] = total
    scale = sum(rises.values()) / sum(scores.values())
    for index, rise in rises.items():
        assert scores[index] * scale == pytest.approx(rise, rel=0.6)


def test_the_batch_does_not_change_the_score_and_the_samples_may(program):
    assert Fisher(batch=3).score(program) == pytest.approx(Fisher(batch=32).score(program), rel=1e-3)
    assert Fisher(samples=4).score(program) != Fisher(samples=32).score(program)


def test_the_same_seed_gives_the_same_score_and_labels_are_not_needed(program):
    unlabelled = program.task.train
    unlabelled.targets = None
    assert Fisher().score(program) == Fisher().score(program)
    assert Fisher().score(program) != Fisher().score(program.with_(seed=1))


def test_the_program_is_left_as_it_was(program):
    program.graph.train()
    for parameter in program.graph.shared.parameters():
        parameter.requires_grad_(False)
    state = {name: tensor.clone() for name, tensor in program.graph.state_dict().items()}
    with torch.no_grad():
        Fisher().score(program)
    assert all(torch.equal(state[name], tensor) for name, tensor in program.graph.state_dict().items())
    assert all(p.grad is None for p in program.graph.parameters())
    assert [p.requires_grad for p in program.graph.shared.parameters()] == [False]
    assert program.graph.training
    assert not any(module._forward_hooks for module in program.graph.modules())


def test_frozen_weights_are_scored_alike(program):
    free = Fisher().score(program)
    for parameter in program.graph.parameters():
        parameter.requires_grad_(False)
    assert Fisher().score(program) == pytest.approx(free, rel=1e-5)


def test_without_data_it_says_what_to_take_instead(program):
    with pytest.raises(InputError, match="'relative-error'"):
        Fisher().score(program.with_(task=Task()))


def test_a_network_without_class_scores_is_refused():
    net = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
    x = torch.randn(4, 3, 8, 8)
    with pytest.raises(InputError, match="4x4x6x6"):
        Fisher().score(trace(net, (x[:2],)).with_(task=Task(train=Tensors(x))))


def test_a_nan_in_calibration_is_said(program):
    x = torch.randn(8, 3, 8, 8)
    x[3] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        Fisher().score(program.with_(task=Task(train=Tensors(x))))


@pytest.mark.parametrize("options", [{"batch": "0"}, {"samples": "0"}])
def test_options_below_one_are_refused(options):
    with pytest.raises(InputError, match="at least 1"):
        Fisher.from_options(options)
