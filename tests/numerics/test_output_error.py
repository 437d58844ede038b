"""The metric of a layer's output: its channel root, and least squares that never make a factor worse."""

import math

import pytest
import torch
from torch import Tensor

from tdcompile.core.decomposition import relative_error
from tdcompile.numerics.covariance import Covariance, Full
from tdcompile.numerics.output_error import OutputMetric


def case(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Covariance]:
    generator = torch.Generator().manual_seed(seed)
    weight, last, before = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((6, 4, 3, 3), (6, 5), (5, 36))
    )
    x = torch.randn(200, 36, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 3, 36)
    return weight, last, before, Full(x.T @ x / 200, 200)


def test_a_refit_factor_is_never_worse_and_its_error_is_told() -> None:
    weight, last, before, moments = case()
    found, told = OutputMetric(weight, moments).refit(last, before)
    assert told == pytest.approx(relative_error(weight, (found @ before).reshape(weight.shape), moments))
    assert told < relative_error(weight, (last @ before).reshape(weight.shape), moments)
    again, still = OutputMetric(weight, moments).refit(found, before)
    assert still <= told
    assert torch.allclose(again, found, rtol=1e-2, atol=1e-2)


def test_one_scale_is_the_best_there_is() -> None:
    weight, last, before, moments = case()
    approximation = (0.2 * weight.flatten(1) + 0.01 * last @ before).reshape(weight.shape)
    metric = OutputMetric(weight, moments)
    scale, told = metric.scale(approximation.split(4))
    assert (scale, told) == pytest.approx(metric.scale([approximation]))
    assert told == pytest.approx(relative_error(weight, scale * approximation, moments))
    for other in (0.9 * scale, 1.1 * scale, 1.0):
        assert told < relative_error(weight, other * approximation, moments)


def test_the_error_is_that_of_the_contract() -> None:
    weight, last, before, moments = case()
    approximation = (last @ before).reshape(weight.shape)
    told = OutputMetric(weight, moments).error(approximation)
    assert told == pytest.approx(relative_error(weight, approximation, moments))


def test_a_factor_within_a_bound_meets_it_and_is_smaller() -> None:
    weight, last, before, moments = case()
    metric = OutputMetric(weight, moments)
    found, least = metric.refit(last, before)
    smaller = metric.refit_within(before, torch.ones(5, dtype=torch.float64), 1.05 * least)
    assert smaller is not None
    assert metric.error((smaller @ before).reshape(weight.shape)) == pytest.approx(1.05 * least)
    assert float(smaller.norm()) < float(found.norm())
    assert metric.refit_within(before, torch.ones(5, dtype=torch.float64), 0.95 * least) is None


def test_the_channel_root_is_that_of_the_mean_over_the_taps() -> None:
    weight, _, _, moments = case()
    root = OutputMetric(weight, moments).channel_root(4)
    taps = [moments.dense()[k::9, k::9] for k in range(9)]
    assert torch.allclose(root @ root.T, torch.stack(taps).mean(0), rtol=1e-3, atol=1e-3)
    assert torch.equal(root, root.tril())


def test_round_off_below_zero_is_no_direction_that_costs_nothing() -> None:
    weight, last, _, _ = case()
    generator = torch.Generator().manual_seed(1)
    patch = torch.rand(36, generator=generator, dtype=torch.float64)
    rounding = torch.randn(36, 36, generator=generator, dtype=torch.float64)
    truly = torch.outer(patch, patch)
    second = truly + 1e-7 * (rounding + rounding.T)
    assert float(torch.linalg.eigvalsh(second)[0]) < 0
    hidden = torch.randn(5, 36, generator=generator, dtype=torch.float64)
    hidden -= (hidden @ patch)[:, None] * patch / patch.square().sum()  # what an un-whitened basis is full of
    before = 100 * hidden + patch
    found, told = OutputMetric(weight, Full(second, 200)).refit(last, before)
    assert float(found.norm()) < 2 * float(last.norm())
    told_before, true_before, true = (
        relative_error(weight, (factor @ before).reshape(weight.shape), Full(of, 200))
        for factor, of in ((last, second), (last, truly), (found, truly))
    )
    assert told <= told_before
    assert true <= true_before
    assert told == pytest.approx(true, abs=0.05)


def test_an_output_of_round_off_alone_is_lost_by_nothing() -> None:
    weight, last, before, _ = case()
    metric = OutputMetric(weight, Full(-1e-7 * torch.eye(36), 1))
    assert metric.error(torch.zeros_like(weight)) == 0
    found, told = metric.refit(last, before)
    assert bool(torch.isfinite(found).all())
    assert told == 0
    assert math.isnan(OutputMetric(weight, Full(torch.full((36, 36), math.nan), 1)).error(torch.zeros_like(weight)))


def test_inputs_that_are_all_zero_are_no_trouble() -> None:
    weight, last, before, _ = case()
    metric = OutputMetric(weight, Full(torch.zeros(36, 36), 1))
    assert torch.allclose(metric.refit(last, before)[0], last)
    assert metric.scale([weight]) == (1.0, 0.0)
    assert bool(torch.isfinite(metric.channel_root(4)).all())
