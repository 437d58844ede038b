"""``grouped``: each group is decomposed as a layer of its own; the groups share ranks and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import tdcompile
from tdcompile.core.decomposition import relative_error
from tdcompile.core.pipeline import Pipeline
from tdcompile.core.plan import Candidates, RankPlan
from tdcompile.core.rank_selector import RankSelector
from tdcompile.core.registry import find
from tdcompile.data.task import Task, Tensors
from tdcompile.errors import InputError
from tdcompile.ir.diagnostics import Reason
from tdcompile.ir.layer import Layer
from tdcompile.ir.measurements import Calibration
from tdcompile.numerics.covariance import Full, Identity, PerGroup
from tdcompile.passes.analyze.calibrate import Calibrate
from tdcompile.passes.analyze.propose import Propose
from tdcompile.passes.decompose.channel import Channel
from tdcompile.passes.decompose.grouped import Grouped
from tdcompile.passes.importance._trial import trials

CONV = nn.Conv2d(32, 48, 3, padding=1, groups=4)


def drawn(*shape: int) -> Tensors:
    return Tensors(torch.randn(*shape, generator=torch.Generator().manual_seed(1)))


def moments_of(module: nn.Module, samples: Tensors) -> Calibration:
    program = tdcompile.trace(nn.Sequential(module).eval(), (samples.inputs[0][:2],)).with_(task=Task(samples))
    return Calibrate(patches=100).run(program).facts[Calibration]


def layer_of(module: nn.Conv2d) -> Layer:
    layer = Layer.of(module, (7, 6))
    assert layer is not None
    return layer


def test_a_group_gets_the_factors_that_it_would_have_alone() -> None:
    torch.manual_seed(0)
    layer, weight = layer_of(CONV), CONV.weight.detach()
    one = replace(layer, in_channels=8, out_channels=12, groups=1)
    roots = torch.randn(4, 72, 72, dtype=torch.float64)
    moments = PerGroup(roots @ roots.mT, 100)
    first, last = Grouped().factorize(layer, weight, (3,), moments)
    for place, own in enumerate(weight.chunk(4)):
        alone = Channel().factorize(one, own, (3,), Full(moments.matrices[place], 100))
        torch.testing.assert_close(first.chunk(4)[place], alone[0])
        torch.testing.assert_close(last.chunk(4)[place], alone[1])


def test_the_blueprint_is_in_groups_and_saves_what_one_group_saves() -> None:
    layer = layer_of(CONV)
    first, last = Grouped().blueprint(layer, (3,))
    assert (first.in_channels, first.out_channels, first.groups, first.kernel) == (32, 12, 4, (3, 3))
    assert (last.in_channels, last.out_channels, last.groups, last.kernel) == (12, 48, 4, (1, 1))
    assert first.macs + last.macs == 4 * (8 * 3 * 9 + 3 * 12) * 42


@pytest.mark.parametrize(
    ("module", "code"),
    [
        (nn.Conv2d(8, 8, 3), "ungrouped"),
        (nn.Conv2d(8, 16, 3, groups=8), "depthwise"),
        (nn.Conv2d(8, 4, 3, groups=4), "small"),
    ],
)
def test_what_it_refuses(module: nn.Conv2d, code: str) -> None:
    refusal = Grouped().refuse(layer_of(module))
    assert refusal is not None
    assert refusal.code == code


@pytest.mark.parametrize("option", ["form", "pointwise"])
@pytest.mark.parametrize("text", ["grouped", "grouped{form=channel}", "nonsense"])
def test_a_group_in_groups_and_an_unknown_form_are_refused(option: str, text: str) -> None:
    with pytest.raises(InputError, match="must be one of channel, cp"):
        Grouped(**{option: text})


@pytest.mark.parametrize("selector", find(RankSelector))
@pytest.mark.parametrize("form", ["channel", "tucker2", "tt", "cp"])
def test_every_selector_knows_what_to_do_with_it(selector: str, form: str) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(32, 48, 3, groups=2), nn.ReLU(), nn.Conv2d(48, 32, 3), nn.Flatten())
    program = tdcompile.trace(module.eval(), torch.randn(2, 32, 7, 7)).with_(budget=tdcompile.Budget(macs=0.5))
    proposed = f"propose{{decompose=grouped{{form={form}}}+channel,spectra=true}}"
    plan = Pipeline.parse(f"{proposed},score,choose{{by={selector}}}").run(program).facts[RankPlan]
    assert plan.choices["0"].form.partition("{")[0] in ("grouped", "dense")


def test_scores_see_layers_in_groups() -> None:
    """A layer without a trial would count for nothing, and be given away."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(16, 16, 3, groups=2), nn.Conv2d(16, 32, 1, groups=4), nn.Conv2d(32, 8, 3))
    program = tdcompile.trace(module.eval(), torch.randn(2, 16, 9, 9))
    assert {name: trial.error > 0 for name, trial in trials(program, 0.5).items()} == {"0": True, "1": True, "2": True}


def test_another_form_for_the_groups() -> None:
    layer = layer_of(CONV)
    assert len(Grouped(form="tucker2").blueprint(layer, (3, 4))) == 3
    weight = CONV.weight.detach()
    factors = Grouped(form="tucker2").factorize(layer, weight, (12, 8), Identity.of(weight))
    assert relative_error(weight, Grouped(form="tucker2").reconstruct(layer, factors), Identity.of(weight)) < 1e-5


def test_calibration_gives_moments_for_each_group() -> None:
    x = drawn(16, 8, 6, 6)
    found = moments_of(nn.Conv2d(8, 12, 3, padding=1, groups=2), x).covariances["0"]
    patches = torch.nn.functional.unfold(x.inputs[0], 3, padding=1).movedim(1, 2).flatten(0, 1)
    whole = (patches.T @ patches / len(patches)).double()
    torch.testing.assert_close(found.dense(), torch.stack([whole[:36, :36], whole[36:, 36:]]), rtol=1e-4, atol=1e-5)


def test_a_layer_of_small_groups_says_what_the_form_for_groups_says() -> None:
    module = nn.Sequential(nn.Conv2d(8, 4, 3, groups=4))
    program = tdcompile.trace(module.eval(), torch.randn(2, 8, 6, 6)).with_(budget=tdcompile.Budget(macs=0.5))
    (reason,) = Propose().run(program).facts[Candidates].reasons.values()
    assert isinstance(reason, Reason)
    assert reason.code == "small"
    assert "each of its 4 groups" in reason.text
