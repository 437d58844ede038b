"""Sensitivity of a CP against noise itself; correction keeps its bound and tames components that cancel."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tdcompile.numerics.cp import balanced, component_norm, cp_als, cp_compose, slice_start
from tdcompile.numerics.cp_correction import allowed, bounded, correct, mode_weights, sensitivity

SHAPES = st.lists(st.integers(2, 7), min_size=3, max_size=4)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(tensor: Tensor, factors: list[Tensor]) -> float:
    return float((tensor - cp_compose(factors)).norm() / tensor.norm())


def fitted(tensor: Tensor, rank: int) -> list[Tensor]:
    return cp_als(tensor, [factor[:, :rank] for factor in slice_start(tensor)[1]], 20)


def diverging(gap: float) -> tuple[Tensor, list[Tensor]]:
    """x⊗x⊗y + x⊗y⊗x + y⊗x⊗x, of rank 3, is the limit of ((x + εy)⊗³ − x⊗³) / ε: two components that diverge."""
    x, y = torch.linalg.qr(random(6, 2))[0].T
    parts = [(x, x, y), (x, y, x), (y, x, x)]
    tensor = torch.stack([torch.einsum("i,j,k->ijk", *part) for part in parts]).sum(0)
    near = torch.stack([x + gap * y, x], dim=1)
    return tensor, balanced([near, near, near * torch.tensor([1 / gap, -1 / gap], dtype=near.dtype)])


@pytest.mark.parametrize("shape", [(5, 7, 4), (6, 5, 3, 3)])
def test_the_sensitivity_is_the_mean_squared_error_under_small_noise(shape: tuple[int, ...]) -> None:
    factors = [random(size, 4, seed=size) for size in shape]
    whole, deviation, generator = cp_compose(factors), 1e-4, torch.Generator().manual_seed(0)
    changes = [
        cp_compose([f + deviation * torch.randn(f.shape, generator=generator, dtype=f.dtype) for f in factors]) - whole
        for _ in range(500)
    ]
    measured = float(torch.stack(changes).square().flatten(1).sum(1).mean()) / deviation**2
    assert sensitivity(factors) == pytest.approx(measured, rel=0.1)


def test_the_weights_of_the_modes_are_its_share() -> None:
    factors = [random(size, 3, seed=size) for size in (4, 5, 6)]
    for mode, factor in enumerate(factors):
        fixed = sensitivity([torch.zeros_like(f) if n == mode else f for n, f in enumerate(factors)])
        part = float((mode_weights(factors, mode) * factor.square().sum(0)).sum())
        assert sensitivity(factors) == pytest.approx(fixed + part)


@given(st.floats(0, 1), st.floats(1, 3))
def test_the_allowed_error_grows_by_at_most_the_ratio_and_never_to_one(value: float, growth: float) -> None:
    found = allowed(value, growth)
    assert value * (1 - 1e-12) <= found <= value * growth * (1 + 1e-12)
    assert found < 1 or value > 1 - 1e-9
    assert allowed(value, 1.0) == value
    if 0.01 < value < 0.99:
        assert found**2 / (1 - found**2) == pytest.approx(growth**2 * value**2 / (1 - value**2), rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(SHAPES, st.integers(1, 6), st.floats(1, 1.3), st.integers(0, 100))
def test_correction_never_exceeds_its_bound_and_never_raises_the_sensitivity(
    shape: list[int], rank: int, growth: float, seed: int
) -> None:
    tensor = random(*shape, seed=seed)
    factors = fitted(tensor, rank)
    bound = allowed(error(tensor, factors), growth)
    before = [factor.clone() for factor in factors]
    found = correct(tensor, factors, bound)
    assert error(tensor, found) <= bound * (1 + 1e-6) + 1e-9
    assert sensitivity(found) <= sensitivity(factors) * (1 + 1e-9)
    norms = torch.stack([factor.norm(dim=0) for factor in found])
    assert torch.allclose(norms, norms[:1].expand_as(norms))
    assert all(torch.equal(a, b) for a, b in zip(before, factors, strict=True))


def test_components_that_cancel_shrink_by_a_large_factor_at_hardly_more_error() -> None:
    tensor, factors = diverging(0.01)
    assert component_norm(factors) > 50 * float(tensor.norm())
    bound = 0.05
    assert error(tensor, factors) < bound
    found = correct(tensor, factors, bound)
    assert error(tensor, found) <= bound * (1 + 1e-6)
    assert component_norm(found) < component_norm(factors) / 5
    assert sensitivity(found) < sensitivity(factors) / 10


def test_a_cp_that_is_exact_and_far_from_degenerate_is_left_as_it_is() -> None:
    factors = balanced([torch.linalg.qr(random(size, 3, seed=size))[0] for size in (9, 8, 7)])
    tensor = cp_compose(factors)
    found = correct(tensor, factors, allowed(error(tensor, factors), 1.05))
    for a, b in zip(factors, found, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_a_well_conditioned_cp_under_noise_changes_by_no_more_than_its_slack() -> None:
    factors = balanced([torch.linalg.qr(random(size, 3, seed=size))[0] for size in (9, 8, 7)])
    noise = random(9, 8, 7, seed=1)
    tensor = cp_compose(factors) + 0.1 * noise * cp_compose(factors).norm() / noise.norm()
    best = cp_als(tensor, factors, 50)
    found = correct(tensor, best, allowed(error(tensor, best), 1.02))
    assert sensitivity(found) > 0.9 * sensitivity(best)
    assert float((cp_compose(found) - cp_compose(best)).norm() / tensor.norm()) < 0.03


def test_the_bounded_step_meets_its_bound_at_the_least_weighted_norm() -> None:
    target, basis, weights = random(6, 40), random(40, 5, seed=1), torch.tensor([1.0, 4.0, 0.2, 9.0, 1.0]).double()
    energy = float(target.square().sum())
    least = float((target - target @ torch.linalg.pinv(basis.T) @ basis.T).square().sum())
    bound = (least + energy) / 2
    found = bounded(target @ basis, basis.T @ basis, weights, energy, bound)
    assert found is not None
    assert float((target - found @ basis.T).square().sum()) == pytest.approx(bound, rel=1e-9)
    # Stationary: the gradient of the residual is that of the weighted norm times one multiplier.
    pull = (target - found @ basis.T) @ basis
    ratio = pull / (found * weights)
    assert torch.allclose(ratio, ratio.mean().expand_as(ratio), rtol=1e-6)
    assert bounded(target @ basis, basis.T @ basis, weights, energy, least * 0.99) is None


def test_a_tensor_of_zeros_and_components_of_zero_are_no_trouble() -> None:
    zeros = [torch.zeros(size, 2, dtype=torch.float64) for size in (4, 3, 5)]
    assert all(not bool(f.any()) for f in correct(torch.zeros(4, 3, 5), zeros, 0.5))
    tensor = random(4, 3, 5)
    factors = [torch.nn.functional.pad(factor, (0, 1)) for factor in fitted(tensor, 2)]
    found = correct(tensor, factors, allowed(error(tensor, factors), 1.1))
    assert all(math.isfinite(float(factor.norm())) for factor in found)
    assert sensitivity(found) < sensitivity(factors)
