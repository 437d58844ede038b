"""Truncated SVDs, plain and whitened, against torch's own; the errors of all ranks; balance."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tdcompile.errors import InputError
from tdcompile.numerics.cholesky import cholesky, definite, ridge
from tdcompile.numerics.covariance import Full, Identity
from tdcompile.numerics.low_rank import (
    balance,
    leading,
    low_rank,
    low_rank_errors,
    operands,
    unfold,
)

SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(0, 10_000))


def weight_and_second(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(4 * columns, columns, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    return flat, x.T @ x / len(x)


def test_an_unfolding_puts_its_axis_first_and_keeps_the_order_of_the_others() -> None:
    x = torch.arange(24).reshape(2, 3, 4)
    assert torch.equal(unfold(x, 0), x.reshape(2, 12))
    assert torch.equal(unfold(x, 1)[2], x[:, 2].flatten())
    assert unfold(x, 2).shape == (4, 6)


@settings(max_examples=40, deadline=None)
@given(SHAPES)
def test_the_plain_errors_are_those_of_the_best_approximation(shape: tuple[int, int, int]) -> None:
    flat, _ = weight_and_second(*shape)
    values = torch.linalg.svdvals(flat)
    errors = low_rank_errors(flat, Identity.of(flat))
    assert len(errors) == min(flat.shape) + 1
    for rank in range(1, len(errors)):
        last, first = low_rank(flat, Identity.of(flat), rank)
        truth = float((flat - last @ first).norm() / flat.norm())
        assert math.isclose(truth, float(values[rank:].norm() / values.norm()), abs_tol=1e-7)
        assert math.isclose(truth, float(errors[rank]), abs_tol=1e-6)
    assert float(errors[0]) == pytest.approx(1.0)


@settings(max_examples=40, deadline=None)
@given(SHAPES)
def test_the_whitened_errors_are_true_and_no_worse_than_plain(shape: tuple[int, int, int]) -> None:
    flat, second = weight_and_second(*shape)

    def error(approximation: Tensor) -> float:
        residual = flat - approximation
        return float((((residual @ second) * residual).sum() / ((flat @ second) * flat).sum()).clamp(min=0).sqrt())

    errors = low_rank_errors(flat, Full(second, 1))
    best = torch.linalg.svdvals(flat @ torch.linalg.cholesky(second + 1e-12 * torch.eye(len(second))))
    for rank in range(1, len(errors)):
        last, first = low_rank(flat, Full(second, 1), rank)
        truth = error(last @ first)
        assert math.isclose(truth, float(errors[rank]), abs_tol=1e-6)
        plain_last, plain_first = low_rank(flat, Identity.of(flat), rank)
        assert truth <= error(plain_last @ plain_first) + 1e-6
        assert truth <= float(best[rank:].norm() / best.norm()) + 2e-2  # the optimum; the ridge keeps it from being met


def test_both_factors_carry_the_same_share_of_every_component() -> None:
    flat, _ = weight_and_second(6, 10, 0)
    last, first = low_rank(flat, Identity.of(flat), 4)
    assert torch.allclose(last.norm(dim=0), first.norm(dim=1))


@pytest.mark.parametrize("shape", [(3, 8), (8, 3)])
@pytest.mark.parametrize("data", [False, True])
def test_leading_vectors_are_orthonormal_up_to_the_whole_space(shape: tuple[int, int], data: bool) -> None:
    flat, second = weight_and_second(*shape, seed=1)
    vectors = leading(flat, Full(second, 1) if data else Identity.of(flat), shape[0])
    assert torch.allclose(vectors.T @ vectors, torch.eye(shape[0], dtype=torch.float64), atol=1e-12)


def test_a_weight_of_zeros_and_a_moment_of_zeros_give_finite_factors() -> None:
    flat, second = torch.zeros(4, 6, dtype=torch.float64), torch.zeros(6, 6, dtype=torch.float64)
    for metric in (Identity.of(flat), Full(second, 1)):
        assert all(bool(torch.isfinite(factor).all()) for factor in balance(low_rank(flat, metric, 2)))
        assert low_rank_errors(flat, metric).tolist() == [0.0] * 5
    assert bool(torch.isfinite(cholesky(second, ridge(second.diagonal()))).all())


@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_a_ridge_grows_only_where_it_leaves_a_matrix_indefinite(precision: torch.dtype) -> None:
    _, second = weight_and_second(6, 9, 2)
    values, vectors = torch.linalg.eigh(second)
    second = second.to(precision)
    root, extra = definite(second, 0.5)
    assert extra == 0.5
    assert torch.allclose(root @ root.T, second + 0.5 * torch.eye(9, dtype=precision), atol=1e-4)
    for least in (-1e-4, -1.0):
        values[0] = least * values[-1]
        rounded = (vectors * values @ vectors.T).to(precision)
        root, extra = definite(rounded, 1e-12)
        assert root.dtype is precision
        assert torch.allclose(root, root.tril())
        assert torch.allclose(root @ root.T, rounded + extra * torch.eye(9, dtype=precision), rtol=1e-4, atol=1e-4)
        below = -float(torch.linalg.eigvalsh(rounded.double())[0])
        assert 2 * below <= extra <= 9 * below + 1e-12


def test_nan_is_no_round_off() -> None:
    with pytest.raises(RuntimeError, match="cholesky"):
        definite(torch.full((3, 3), math.nan), 1.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_figures_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(InputError, match=r"the weight .* NaN or Inf"):
        operands(torch.full((2, 2), bad), Identity(2), 2)
    with pytest.raises(InputError, match=r"the covariance .* NaN or Inf"):
        operands(torch.ones(2, 2), Full(torch.full((2, 2), bad), 1), 2)


def test_large_matrices_are_worked_in_single_precision() -> None:
    assert operands(torch.ones(2, 3, 1), Identity(3), 2048)[0].dtype == torch.float64
    flat, second = operands(torch.ones(2, 3, 1), Full(torch.eye(3, dtype=torch.float64), 1), 2049)
    assert flat.dtype == torch.float32
    assert second.dense().dtype == torch.float32


def test_balance_keeps_the_product_and_evens_the_gains() -> None:
    factors = (torch.randn(4, 9) * 1e4, torch.randn(6, 4) * 1e-3, torch.randn(8, 6))
    even = balance(factors)
    assert torch.allclose(even[2] @ even[1] @ even[0], factors[2] @ factors[1] @ factors[0], rtol=1e-4, atol=1e-4)
    gains = [float(factor.norm()) / len(factor) ** 0.5 for factor in even]
    assert max(gains) == pytest.approx(min(gains), rel=1e-5)
