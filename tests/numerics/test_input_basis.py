"""Input maps: nested, orthonormal; the regression through them is the least-squares one, at every level."""

import pytest
import torch
from torch import Tensor

from tdcompile.numerics.covariance import Full, Identity
from tdcompile.numerics.input_basis import core_of, input_map, refine, regress, residuals

GROUPS, TAPS, OUTPUTS = 7, 3, 5


def problem(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(OUTPUTS, GROUPS * TAPS, generator=generator, dtype=torch.float64)
    x = torch.randn(200, GROUPS * TAPS, generator=generator, dtype=torch.float64)
    x = (x @ torch.randn(GROUPS * TAPS, GROUPS * TAPS, generator=generator, dtype=torch.float64)).relu()
    return flat, x.T @ x / len(x)


def spread_out(basis: Tensor) -> Tensor:
    """B = Aᵀ ⊗ I, written out."""
    return torch.kron(basis.T.contiguous(), torch.eye(TAPS, dtype=basis.dtype))


@pytest.mark.parametrize("data", [False, True])
def test_an_input_map_is_orthonormal_and_nested(data: bool) -> None:
    flat, second = problem()
    metric = Full(second, 200) if data else Identity.of(flat)
    whole = input_map(flat, metric, TAPS, GROUPS)
    assert torch.allclose(whole.T @ whole, torch.eye(GROUPS, dtype=whole.dtype), atol=1e-10)
    for rank in range(1, GROUPS):
        part = input_map(flat, metric, TAPS, rank)
        assert torch.allclose(part @ part.T, whole[:, :rank] @ whole[:, :rank].T, atol=1e-8)


def test_where_the_moment_is_a_kronecker_product_the_map_is_the_optimum() -> None:
    flat, second = problem()
    blocks = second.reshape(GROUPS, TAPS, GROUPS, TAPS)
    channels, taps = torch.einsum("gkhk->gh", blocks) / TAPS, torch.einsum("gkgl->kl", blocks) / GROUPS
    exact = torch.kron(channels, taps)
    rank = 3
    found = float(residuals(flat, Full(exact, 1), input_map(flat, Full(exact, 1), TAPS, rank), [rank]).sum())
    root, tap_root = torch.linalg.cholesky(channels), torch.linalg.cholesky(taps)
    white = (root.T @ (flat.reshape(OUTPUTS, GROUPS, TAPS) @ tap_root)).movedim(1, 0).flatten(1)
    best = float(torch.linalg.svdvals(white)[rank:].square().sum())
    whole = float(((flat @ exact) * flat).sum())
    assert best / whole <= found / whole + 1e-9 <= best / whole + 1e-3  # the ridge keeps it from being met


@pytest.mark.parametrize("data", [False, True])
def test_the_core_is_the_least_squares_one(data: bool) -> None:
    flat, second = problem()
    metric = Full(second, 200) if data else Identity.of(flat)
    basis = input_map(flat, metric, TAPS, 3)
    b = spread_out(basis)
    s = (
        torch.eye(len(second), dtype=second.dtype)
        if metric.is_identity
        else second + metric.ridge() * torch.eye(len(second))
    )
    expected = torch.linalg.solve(b @ s @ b.T, b @ s @ flat.T).T
    assert torch.allclose(core_of(flat, metric, basis), expected, atol=1e-8)
    explained, equations = regress(flat, metric, basis)
    assert torch.allclose(equations.settle(explained), expected, atol=1e-8)


def test_a_map_of_all_inputs_is_exact() -> None:
    flat, second = problem()
    basis = input_map(flat, Full(second, 200), TAPS, GROUPS)
    assert torch.allclose(core_of(flat, Full(second, 200), basis) @ spread_out(basis), flat, atol=1e-12)


@pytest.mark.parametrize("data", [False, True])
def test_residuals_of_all_levels_are_those_of_each_level_alone(data: bool) -> None:
    flat, second = problem()
    metric = Full(second, 200) if data else Identity.of(flat)
    basis = input_map(flat, metric, TAPS, GROUPS)
    levels = [0, 1, 2, 5, GROUPS]
    found = residuals(flat, metric, basis, levels)
    assert found.shape == (OUTPUTS, len(levels))
    for column, level in enumerate(levels):
        part = basis[:, :level]
        left = flat - core_of(flat, metric, part) @ spread_out(part)
        truth = ((left @ metric) * left).sum(1)
        assert torch.allclose(found[:, column], truth, atol=1e-7 * float(flat.square().sum()))


def test_refining_the_map_never_raises_the_error_and_keeps_it_orthonormal() -> None:
    for seed in range(5):
        flat, second = problem(seed)
        basis = input_map(flat, Full(second, 200), TAPS, 3)
        before = float(residuals(flat, Full(second, 200), basis, [3]).sum())
        refined = refine(flat, Full(second, 200), core_of(flat, Full(second, 200), basis), basis, 5)
        assert torch.allclose(refined.T @ refined, torch.eye(3, dtype=refined.dtype), atol=1e-10)
        assert float(residuals(flat, Full(second, 200), refined, [3]).sum()) <= before * (1 + 1e-6)


def test_a_map_that_is_already_exact_stays() -> None:
    flat, second = problem()
    basis = input_map(flat, Full(second, 200), TAPS, GROUPS)
    refined = refine(flat, Full(second, 200), core_of(flat, Full(second, 200), basis), basis, 3)
    assert torch.allclose(refined @ refined.T, basis @ basis.T, atol=1e-6)
