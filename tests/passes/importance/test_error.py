import pytest
import torch
from torch import nn

from tdcompile.core.importance import Importance
from tdcompile.core.registry import make
from tdcompile.errors import InputError
from tdcompile.ir.program import sites
from tdcompile.passes.importance._divergence import drawn
from tdcompile.passes.importance._trial import trials
from tdcompile.passes.importance.error import Error
from tdcompile.planning.approximation_error import feature_errors


def test_without_data_the_weights_relative_error_is_the_candidates_own(program):
    scores = Error().score(program)
    assert list(scores.values()) == pytest.approx([1.0] * len(scores))


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_the_absolute_error_weighs_by_norm_and_the_scaled_one_by_size_too(program, share):
    weights = {name: site.weight for name, site in sites(program).items()}
    absolute = Error(scaling="absolute", share=share).score(program)
    scaled = Error(scaling="scaled", share=share).score(program)
    one, other = weights["shared"], weights["head"]
    assert absolute["shared"] / absolute["head"] == pytest.approx(float((one.norm() / other.norm()) ** 2), rel=1e-4)
    sizes = other.numel() / one.numel()
    assert scaled["shared"] / scaled["head"] == pytest.approx(
        absolute["shared"] / absolute["head"] * sizes**2, rel=1e-4
    )


@pytest.mark.parametrize("scaling", ["absolute", "relative", "scaled"])
def test_of_features_it_is_the_error_of_the_layers_output(program, scaling):
    scores = Error(of="features", scaling=scaling, samples=40).score(program)
    batches = drawn(program, 40, "error", "")

    def price(name):
        trial = trials(program, 0.5)[name]
        found = feature_errors(program.graph, trial.site, trial.weight, batches)
        return getattr(found, scaling) ** 2 / trial.error**2

    assert scores["stem"] / scores["head"] == pytest.approx(price("stem") / price("head"), rel=1e-5)


def test_a_layer_that_answers_loudly_has_a_larger_absolute_error_and_the_same_relative_one(program):
    with torch.no_grad():
        program.graph.head.bias.zero_()
    before = {s: Error(of="features", scaling=s).score(program) for s in ("absolute", "relative")}
    with torch.no_grad():
        program.graph.head.weight.mul_(10)
    after = {s: Error(of="features", scaling=s).score(program) for s in ("absolute", "relative")}

    def against(scores, scaling):
        return scores[scaling]["head"] / scores[scaling]["stem"]

    assert against(after, "absolute") == pytest.approx(100 * against(before, "absolute"), rel=1e-4)
    assert against(after, "relative") == pytest.approx(against(before, "relative"), rel=1e-3)


def test_a_layer_of_low_rank_counts_as_its_weight_does_and_not_as_nothing(program):
    with torch.no_grad():
        weight = program.graph.shared.weight
        weight.copy_(torch.einsum("or,irkl->oikl", torch.randn(8, 2), torch.randn(8, 2, 3, 3)))
    scores = Error(share=0.9).score(program)
    assert scores["shared"] == pytest.approx(scores["stem"], rel=0.01)


def test_an_unknown_error_is_refused_with_those_there_are():
    with pytest.raises(InputError, match="weights"):
        make(Importance, "error{of=biases}")


def test_a_layer_no_form_applies_to_counts_nothing(program):
    program.graph.stem = nn.Conv2d(3, 8, 3, padding=1, bias=True)
    assert Error(forms=("svd",)).score(program)["shared"] == 0.0
