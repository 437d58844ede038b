"""Tensor trains of one tensor share the basis of the first unfolding, and are the same as without it."""

from __future__ import annotations

import pytest
import torch

from tdcompile.numerics.tensor_train import SKETCHED, first_basis, tt_compose, tt_svd


@pytest.mark.parametrize("ranks", [(1, 1, 1), (4, 9, 5), (6, 18, 10)])
def test_a_train_from_the_shared_basis_is_the_train(ranks: tuple[int, ...]) -> None:
    tensor = torch.randn(6, 3, 3, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    first = first_basis(tensor)
    assert first is not None
    shared, alone = tt_svd(tensor, ranks, first), tt_svd(tensor, ranks)
    assert [core.shape for core in shared] == [core.shape for core in alone]
    torch.testing.assert_close(tt_compose(shared), tt_compose(alone), atol=1e-10, rtol=0)


def test_two_cores_leave_nothing_to_share() -> None:
    tensor = torch.randn(6, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shared = tt_svd(tensor, (3,), first_basis(tensor))
    torch.testing.assert_close(tt_compose(shared), tt_compose(tt_svd(tensor, (3,))))


def test_there_is_no_shared_basis_where_ranks_decide_how_it_is_computed() -> None:
    assert first_basis(torch.zeros(20, 3, 3)) is None  # the first mode is the longest
    size = max(size for size, _ in SKETCHED) + 1
    assert first_basis(torch.zeros(size, 1, size)) is None  # its vectors are sketched
