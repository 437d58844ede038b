"""Shrinkage toward the identity: the share falls with the samples, keeps the trace, and helps where they are few."""

import pytest
import torch
from sklearn.covariance import OAS
from torch import Tensor

from tdcompile.numerics.covariance import Covariance, Full, Identity, LowRankPlusDiagonal, PerGroup
from tdcompile.numerics.low_rank import low_rank
from tdcompile.numerics.shrinkage import oas_share


def rows(count: int, size: int = 40, seed: int = 0, decay: float = 1.5) -> Tensor:
    """Correlated rows of mean 0."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    mix *= torch.logspace(0, -decay, size, dtype=torch.float64)[:, None]
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed + count), dtype=torch.float64) @ mix


def full(x: Tensor) -> Full:
    return Full(x.T @ x / len(x), len(x))


def as_low_rank(covariance: Full) -> LowRankPlusDiagonal:
    values, vectors = torch.linalg.eigh(covariance.matrix)
    factor = (vectors * values.clamp(min=0).sqrt())[:, 10:].flip(1)
    return LowRankPlusDiagonal(factor, covariance.diagonal() - factor.square().sum(1), covariance.samples)


FEW = full(rows(30))


@pytest.mark.parametrize("count", [8, 30, 200])
def test_for_independent_rows_the_share_is_that_of_scikit_learn(count: int) -> None:
    x = rows(count)
    theirs = OAS(assume_centered=True).fit(x.numpy())
    share = oas_share(full(x), count)
    assert share == pytest.approx(theirs.shrinkage_, rel=0.02)
    shrunk = full(x).shrunk(share).matrix
    torch.testing.assert_close(shrunk, torch.from_numpy(theirs.covariance_), rtol=0.02, atol=1e-3)


def test_rows_of_few_samples_count_for_less() -> None:
    known = full(rows(400))
    shares = [oas_share(known, samples) for samples in (4, 40, 400)]
    assert 1 > shares[0] > shares[1] > shares[2] > 0


@pytest.mark.parametrize(
    "covariance",
    [
        full(rows(30)),
        as_low_rank(full(rows(30))),
        PerGroup(torch.stack([full(rows(30, seed=s)).matrix for s in (0, 1)]), 30),
    ],
    ids=lambda known: type(known).__name__,
)
def test_every_form_is_mixed_with_a_multiple_of_the_identity_of_equal_trace(covariance: Covariance) -> None:
    dense, mixed = covariance.dense(), covariance.shrunk(0.25).dense()
    mean = dense.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    torch.testing.assert_close(mixed, 0.75 * dense + 0.25 * mean * torch.eye(dense.shape[-1], dtype=dense.dtype))
    one = covariance.of_group(0)
    assert one.squared_norm() == pytest.approx(float(one.dense().square().sum()))
    assert 0 < oas_share(covariance, 4) < 1


def test_without_data_or_spread_there_is_nothing_to_shrink() -> None:
    assert oas_share(Identity(10), 0) == 0.0
    assert oas_share(Full(2 * torch.eye(10, dtype=torch.float64), 3), 3) == 0.0
    assert oas_share(Full(torch.zeros(10, 10, dtype=torch.float64), 3), 3) == 0.0


def test_factors_from_few_rows_lose_less_on_others_if_the_moment_is_shrunk() -> None:
    weight = torch.randn(20, 40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    judge, lost = full(rows(20_000, decay=0.5)), []
    for count in (10, 11, 12, 13, 14):
        few = full(rows(count, decay=0.5))
        pair = (low_rank(weight, moments, 8) for moments in (few, few.shrunk(oas_share(few, count))))
        lost.append([judge.energy(weight - last @ first) for last, first in pair])
    sampled, shrunk = torch.tensor(lost).mean(0)
    assert shrunk < 0.97 * sampled
