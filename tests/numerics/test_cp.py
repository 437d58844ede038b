"""CP and tensor train on tensors alone: exact where they must be, as good as tensorly's where not, repeatable."""

import math

import pytest
import tensorly as tl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorly.decomposition import parafac
from torch import Tensor

from tdcompile.errors import InputError
from tdcompile.numerics import cp, tensor_train
from tdcompile.numerics.cp import (
    DEGENERATE,
    balanced,
    columns_product,
    component_norm,
    cp_als,
    cp_compose,
    cp_exact,
    slice_start,
)
from tdcompile.numerics.tensor_train import share_bond, tail, tt_compose, tt_svd


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(tensor: Tensor, other: Tensor) -> float:
    return float((tensor - other).norm() / tensor.norm())


def start(tensor: Tensor, rank: int) -> list[Tensor]:
    return [factor[:, :rank] for factor in slice_start(tensor)[1]]


@given(st.lists(st.integers(1, 5), min_size=3, max_size=5), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_the_exact_cp_is_exact_for_every_shape(shape: list[int], more: int) -> None:
    tensor = random(*shape)
    rank = tensor.numel() // max(shape) + more
    factors = cp_exact(tensor, rank)
    assert [tuple(factor.shape) for factor in factors] == [(size, rank) for size in shape]
    assert error(tensor, cp_compose(factors)) < 1e-12


@given(st.lists(st.integers(1, 6), min_size=3, max_size=4))
@settings(max_examples=40, deadline=None)
def test_the_slices_give_a_cp_whose_error_is_told_at_every_rank(shape: list[int]) -> None:
    tensor = random(*shape)
    left, factors = slice_start(tensor)
    assert len(left) == factors[0].shape[1] + 1
    for rank in range(1, len(left)):
        assert error(tensor, cp_compose([f[:, :rank] for f in factors])) == pytest.approx(float(left[rank]), abs=1e-6)
    assert float(left[-1]) < 1e-6


@pytest.mark.parametrize(("shape", "rank"), [((16, 12, 9), 10), ((16, 12, 9), 60), ((10, 16, 3, 5), 30)])
def test_least_squares_end_no_worse_than_those_of_tensorly(shape: tuple[int, ...], rank: int) -> None:
    tensor = random(*shape)
    ours = error(tensor, cp_compose(cp_als(tensor, start(tensor, rank), 30)))
    with tl.backend_context("pytorch"):
        theirs = parafac(tensor, rank, n_iter_max=30, init="random", random_state=0, tol=0)
        assert ours <= error(tensor, tl.cp_to_tensor(theirs)) + 0.01


def test_every_sweep_lowers_the_error_below_that_of_the_start() -> None:
    tensor = random(12, 10, 3, 3)
    left = slice_start(tensor)[0]
    errors = [error(tensor, cp_compose(cp_als(tensor, start(tensor, 20), sweeps, 0.0))) for sweeps in (1, 2, 5, 20)]
    assert [float(left[20]), *errors] == sorted([float(left[20]), *errors], reverse=True)
    assert errors[-1] < 0.95 * float(left[20])


def test_a_tensor_of_low_rank_is_found() -> None:
    tensor = cp_compose([random(size, 3, seed=size) for size in (14, 11, 9)])
    assert error(tensor, cp_compose(cp_als(tensor, start(tensor, 3), 200, 0.0))) < 1e-3


def test_components_leave_with_their_norm_spread_equally() -> None:
    factors = cp_als(random(12, 10, 9), start(random(12, 10, 9), 8), 5)
    norms = torch.stack([factor.norm(dim=0) for factor in factors])
    assert torch.allclose(norms, norms[:1].expand_as(norms))
    lopsided = [factors[0] * 1e4, factors[1] * 1e-4, factors[2]]
    assert torch.allclose(cp_compose(balanced(lopsided)), cp_compose(factors))


def test_components_that_grow_and_cancel_are_refitted(monkeypatch: pytest.MonkeyPatch) -> None:
    # x⊗x⊗y + x⊗y⊗x + y⊗x⊗x has rank 3 and is the limit of ((x + εy)⊗³ - x⊗³) / ε, whose two components diverge.
    x, y = torch.eye(2, dtype=torch.float64)
    parts = [(x, x, y), (x, y, x), (y, x, x)]
    tensor = sum((torch.einsum("i,j,k->ijk", *part) for part in parts), torch.zeros(2, 2, 2, dtype=torch.float64))
    near = torch.stack([x + 0.01 * y, x], dim=1)
    diverging = [near, near, near * torch.tensor([100.0, -100.0])]
    factors = cp_als(tensor, diverging, 30)
    assert component_norm(factors) <= DEGENERATE * float(tensor.norm())
    assert error(tensor, cp_compose(factors)) < 0.1
    monkeypatch.setattr(cp, "DEGENERATE", math.inf)
    assert component_norm(cp_als(tensor, diverging, 30)) > DEGENERATE * float(tensor.norm())


def test_a_large_tensor_keeps_its_precision_and_is_fitted_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = random(40, 50).float()
    cores = tt_svd(tensor, (7,))
    assert cores[0].dtype == torch.float64
    monkeypatch.setattr(tensor_train, "LARGE", 1999)
    large = tt_svd(tensor, (7,))
    assert large[0].dtype == torch.float32
    assert error(tensor, tt_compose(large)) == pytest.approx(error(tensor, tt_compose(cores)), rel=1e-5)
    assert tt_svd(tensor.half(), (7,))[0].dtype == torch.float32
    assert tt_svd(tensor.double(), (7,))[0].dtype == torch.float64


def test_an_empty_weight_is_no_trouble() -> None:
    tensor = torch.zeros(4, 5, 3, dtype=torch.float64)
    assert float(cp_compose(cp_als(tensor, start(tensor, 2), 3)).norm()) == 0.0
    assert float(tt_compose(tt_svd(tensor, (2, 2))).norm()) == 0.0


def test_the_same_tensor_gives_the_same_factors_and_is_left_as_it_was() -> None:
    tensor = random(30, 1100, 2)
    before = tensor.clone()
    torch.manual_seed(1)
    first = [*cp_als(tensor, start(tensor, 6), 4), *tt_svd(tensor, (6, 2))]
    torch.manual_seed(2)
    second = [*cp_als(tensor, start(tensor, 6), 4), *tt_svd(tensor, (6, 2))]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(tensor, before)


@given(st.lists(st.integers(2, 5), min_size=3, max_size=4))
@settings(max_examples=40, deadline=None)
def test_a_train_with_full_bonds_is_exact_and_orthonormal_from_the_left(shape: list[int]) -> None:
    tensor = random(*shape)
    bonds = [min(math.prod(shape[:i]), math.prod(shape[i:])) for i in range(1, len(shape))]
    cores = tt_svd(tensor, bonds)
    assert error(tensor, tt_compose(cores)) < 1e-12
    for core in cores[:-1]:
        assert torch.allclose(core.flatten(0, 1).T @ core.flatten(0, 1), torch.eye(core.shape[2], dtype=core.dtype))


def test_a_cut_train_is_off_by_at_most_what_the_unfoldings_leave() -> None:
    tensor = random(12, 3, 3, 14)
    bonds = (5, 9, 6)
    tails = [float(tail(tensor.flatten(0, i).flatten(1), bond)[-1]) for i, bond in enumerate(bonds)]
    found = error(tensor, tt_compose(tt_svd(tensor, bonds))) ** 2 * float(tensor.square().sum())
    assert max(tails) - 1e-9 <= found <= sum(tails) + 1e-9


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (1100, 1300)])
def test_the_tail_is_that_of_the_singular_values(shape: tuple[int, int]) -> None:
    decay = torch.arange(1, min(shape) + 1, dtype=torch.float64) ** -1.0
    Q, R = (torch.linalg.qr(random(size, min(shape), seed=size))[0] for size in shape)
    found = tail((Q * decay) @ R.T, 6)
    expected = decay.square().sum() - torch.cat([decay.new_zeros(1), decay.square().cumsum(0)])[:7]
    assert torch.allclose(found, expected, rtol=1e-2)


@pytest.mark.parametrize("bonds", [(13, 9, 6), (2, 7, 6), (5, 9, 15), (0, 1, 1)])
def test_bonds_that_no_train_can_have_are_an_error(bonds: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="can be 1 to"):
        tt_svd(random(12, 3, 3, 14), bonds)


def test_a_shared_bond_has_equal_norms_on_both_sides_and_the_same_product() -> None:
    left, right = random(2, 3, 4) * 100, random(4, 5, 6)
    a, b = share_bond(left, right)
    assert torch.allclose(a.flatten(0, 1).norm(dim=0), b.flatten(1).norm(dim=1))
    assert torch.allclose(torch.tensordot(a, b, dims=1), torch.tensordot(left, right, dims=1))


def test_the_columns_product_runs_through_the_last_index_first() -> None:
    A, B = random(3, 4), random(5, 4)
    assert torch.allclose(columns_product([A, B]), torch.einsum("ar,br->abr", A, B).reshape(15, 4))
    assert columns_product([A]) is A
