"""``LayerwiseLoss``: layer-output and weight distillation are the means they say, and end when tuning ends."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tdcompile
from tdcompile.core.decomposition import Decomposition
from tdcompile.core.pipeline import Pipeline
from tdcompile.core.plan import Candidate, RankPlan
from tdcompile.core.registry import make
from tdcompile.data.task import Batch, Task, Tensors
from tdcompile.errors import InputError
from tdcompile.ir.graph_edits import copy_weights
from tdcompile.ir.layer import Layer
from tdcompile.ir.program import Program, sites_of
from tdcompile.ir.target import Cost
from tdcompile.training import distillation
from tdcompile.training.distillation import (
    Distillation,
    LayerwiseLoss,
    RememberedAnswers,
    ScoredOutputs,
    output_energies,
)


def noise(labelled: bool = True) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 3, 8, 8, generator=generator), torch.randint(4, (64,), generator=generator)
    return Tensors(x, y if labelled else None)


class Twice(nn.Module):
    """A layer that is called twice, one of each kind, and one that stays dense."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.body = nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect")
        self.point = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        x = self.body(self.body(x).relu()).relu()
        return self.head(self.point(x).relu().mean((2, 3)))


FORMS = "tucker2+svd"


@pytest.fixture
def program() -> Program:
    torch.manual_seed(0)
    program = tdcompile.trace(Twice().eval(), (torch.randn(2, 3, 8, 8),))
    program = program.with_(budget=tdcompile.Budget(macs=0.4), task=Task(noise(), calibrate=32))
    return Pipeline.parse(f"score,propose{{decompose={FORMS}}},choose,factorize").run(program)


def pairs(program: Program, x: torch.Tensor, name: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What the layer gives at each call, dense and compressed."""
    found: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for graph, outputs in zip((program.dense, program.graph), found, strict=True):
        part = graph.get_submodule(name)
        last = part[-1] if isinstance(part, nn.Sequential) else part
        hook = last.register_forward_hook(lambda m, a, out, outputs=outputs: outputs.append(out.detach()))
        graph(x)
        hook.remove()
    return found


def layers_of(program: Program) -> dict[str, Layer]:
    return {name: site.layer for name, site in sites_of(program.dense, program.inputs).items()}


def replaced(program: Program) -> list[str]:
    return [n for n, c in program.facts[RankPlan].choices.items() if not c.is_dense]


def test_outputs_count_by_their_mean_squared_difference_at_every_call(program: Program) -> None:
    assert {"body", "stem"} <= set(replaced(program))
    x = torch.randn(5, 3, 8, 8)
    layers = LayerwiseLoss(program.dense, program.graph, program.facts[RankPlan], layers_of(program), 0.5, 0.0)
    with layers.watching():
        program.graph(x), program.dense(x)
        found = layers.take()
    each = {name: list(zip(*pairs(program, x, name), strict=True)) for name in replaced(program)}
    assert len(each["body"]) == 2
    expected = sum(F.mse_loss(a, b) for calls in each.values() for a, b in calls)
    assert float(expected) > 0
    torch.testing.assert_close(found, 0.5 * expected)


def test_weights_count_by_their_mean_squared_difference(program: Program) -> None:
    layers = LayerwiseLoss(program.dense, program.graph, program.facts[RankPlan], layers_of(program), 0.0, 2.0)
    expected = torch.zeros(())
    for name in replaced(program):
        new = program.graph.get_submodule(name)
        layer = program.dense.get_submodule(name)
        if isinstance(layer, nn.Linear):
            basis = torch.eye(layer.in_features)
            composed = (new(basis) - new(torch.zeros_like(basis))).T
        else:  # the response to one channel of one pixel, turned round
            side, taps = 9, layer.kernel_size[0]
            x = torch.zeros(layer.in_channels, layer.in_channels, side, side)
            x[range(len(x)), range(len(x)), side // 2, side // 2] = 1
            start = side // 2 - taps // 2
            response = (new(x) - new(torch.zeros_like(x)))[:, :, start : start + taps, start : start + taps]
            composed = response.flip(2, 3).transpose(0, 1)
        expected = expected + F.mse_loss(composed, layer.weight)
    torch.testing.assert_close(layers.take(), 2.0 * expected, rtol=1e-4, atol=1e-7)


def test_factors_that_compute_the_layers_cost_nothing() -> None:
    given = tdcompile.trace(Twice().eval(), (torch.randn(2, 3, 8, 8),))
    sites = layers_of(given)
    exact = make(Decomposition, "tucker2").exact_ranks(sites["body"])
    choices = {name: Candidate.dense(Cost()) for name in sites}
    plan = RankPlan({**choices, "body": Candidate(make(Decomposition, "tucker2"), exact, 0.0, Cost())}, Cost(), Cost())
    made = Pipeline.parse("factorize").run(given.with_(facts=given.facts.having(plan)))
    teacher = copy_weights(made.dense)
    layers = LayerwiseLoss(teacher, made.graph, plan, sites, 1.0, 1.0)
    with layers.watching():
        x = torch.randn(4, 3, 8, 8)
        loss = Distillation(teacher, 4.0, 0.0, layers)
        assert float(loss(made.graph(x), Batch((x,), None)).detach()) == pytest.approx(0.0, abs=1e-6)


def test_what_works_in_place_behind_a_layer_does_not_change_what_was_seen() -> None:
    torch.manual_seed(0)

    def given(inplace: bool) -> nn.Module:
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 16, 3), nn.ReLU(inplace=inplace), nn.Conv2d(16, 16, 3), nn.ReLU(inplace=inplace)
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)).eval()

    losses, x = [], torch.randn(4, 3, 8, 8)
    for inplace in (False, True):
        made = tdcompile.trace(given(inplace), (x[:2],)).with_(budget=tdcompile.Budget(macs=0.4))
        made = Pipeline.parse(f"score,propose{{decompose={FORMS}}},choose,factorize").run(made)
        layers = LayerwiseLoss(made.dense, made.graph, made.facts[RankPlan], layers_of(made), 1.0, 0.0)
        with layers.watching():
            made.graph(x), made.dense(x)
            losses.append(float(layers.take().detach()))
    assert losses[0] > 0
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_gradients_reach_the_factors_and_not_the_teacher(program: Program) -> None:
    layers = LayerwiseLoss(program.dense, program.graph, program.facts[RankPlan], layers_of(program), 1.0, 1.0)
    teacher = copy_weights(program.dense)
    layers = LayerwiseLoss(teacher, program.graph, program.facts[RankPlan], layers_of(program), 1.0, 1.0)
    loss = Distillation(teacher, 4.0, 0.0, layers)
    x = torch.randn(4, 3, 8, 8)
    with layers.watching():
        torch.autograd.backward(loss(program.graph(x), Batch((x,), None)))
    assert all(p.grad is None for p in teacher.parameters())
    for name in replaced(program):
        assert all(p.grad is not None for p in program.graph.get_submodule(name).parameters())


def test_finetune_with_them_ends_nearer_to_the_dense_layers_and_leaves_no_hook(program: Program) -> None:
    def distance(after: Program) -> float:
        layers = LayerwiseLoss(after.dense, after.graph, after.facts[RankPlan], layers_of(after), 0.0, 1.0)
        return float(layers.take().detach())

    with torch.no_grad():  # plain factors are at their nearest already
        for parameter in program.graph.get_submodule("body").parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    options = "epochs=2,lr=0.05,batch=16,holdout=0,trial=0"
    without = Pipeline.parse(f"finetune{{{options}}}").run(program)
    with_them = Pipeline.parse(f"finetune{{{options},outputs=1,weights=100}}").run(program)
    assert distance(with_them) < 0.9 * distance(without)
    modules = [*with_them.graph.modules(), *with_them.dense.modules()]
    assert not any(module._forward_hooks for module in modules)


def test_without_a_plan_it_is_refused() -> None:
    program = tdcompile.trace(Twice().eval(), (torch.randn(2, 3, 8, 8),)).with_(task=Task(noise()))
    with pytest.raises(InputError, match="plan"):
        Pipeline.parse("finetune{outputs=1,epochs=1,trial=0}").run(program)


class Many(nn.Module):
    """Scores, places, a mask, zeros but for rounding, whole numbers, and nothing."""

    def forward(self, x: torch.Tensor) -> tuple[object, ...]:
        mask = torch.where(x > 0, 0.0, -torch.inf)
        centred = (x - x.mean(1, keepdim=True)).mean(1)
        return x, {"places": 2 * x, "mask": mask}, centred, x.argmax(1), x[:0], torch.fft.fft(x)


def test_of_the_other_outputs_those_count_that_are_finite_and_more_than_rounding() -> None:
    x = torch.randn(6, 4)
    found, left = output_energies(Many(), Tensors(x), 0.5)
    assert found == {1: pytest.approx(8 * float(x.square().mean()))}
    assert left.keys() == {2, 3}
    assert "finite" in left[2]
    assert "zero" in left[3]
    assert output_energies(Many(), Tensors(x), 0.0) == ({}, {})
    loss, batch = Distillation(Many(), 4.0, 0.0, scored=ScoredOutputs(others=found)), Batch((x,), None)
    assert float(loss(Many()(x), batch)) == pytest.approx(0.0, abs=1e-6)
    scores, named, *rest = Many()(x)
    given = (scores, {"places": 3 * x, "mask": named["mask"] + 1.0}, torch.zeros(6), *rest[1:])
    assert float(loss(given, batch)) == pytest.approx(0.5 * 0.25, rel=1e-5)


@pytest.mark.parametrize(("kept", "asked"), [(4, [0, 1, 2, 3]), (2, [0, 1, 2, 3, 2, 3]), (0, [0, 1, 2, 3] * 2)])
def test_answers_are_remembered_while_there_is_room(
    monkeypatch: pytest.MonkeyPatch, kept: int, asked: list[int]
) -> None:
    monkeypatch.setattr(distillation, "_REMEMBERED_BYTES", kept * 4 * 3)  # three numbers of four bytes each
    seen: list[int] = []

    class Counting(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(int(x[0]))
            return x + 1

    teacher = RememberedAnswers(Counting())
    for _ in range(2):
        teacher.restart()
        for batch in range(4):
            torch.testing.assert_close(teacher(torch.full((3,), float(batch))), torch.full((3,), batch + 1.0))
    assert seen == asked
