"""The normal equations in the metric of a sketch equal those of the matrix that it stands for, and take less memory."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tdcompile.core.decomposition import Decomposition
from tdcompile.core.registry import find
from tdcompile.ir.layer import Layer
from tdcompile.numerics.covariance import Full, LowRankPlusDiagonal
from tdcompile.numerics.input_basis import regress, residuals

GROUPS = 12
WIDE = Layer("conv", 256, 32, (8, 8), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))


def case(taps: int, rank: int, scale: float = 1.0) -> tuple[Tensor, LowRankPlusDiagonal, Tensor]:
    generator = torch.Generator().manual_seed(taps)
    flat = torch.randn(9, GROUPS * taps, generator=generator, dtype=torch.float64)
    factor = scale * torch.randn(GROUPS * taps, 8, generator=generator) * torch.logspace(0, -2, 8)
    rest = 0.01 * scale**2 * torch.rand(GROUPS * taps, generator=generator)
    basis = torch.linalg.qr(torch.randn(GROUPS, rank, generator=generator, dtype=torch.float64)).Q
    return flat, LowRankPlusDiagonal(factor, rest, 1), basis


def near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9 * float(expected.norm()))


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e3])
@pytest.mark.parametrize(("taps", "rank"), [(1, 5), (4, 5), (4, GROUPS)])
def test_what_is_explained_and_the_cores_are_those_of_the_matrix(taps: int, rank: int, scale: float) -> None:
    _, sketch, basis = case(taps, rank, scale)
    cross = torch.randn(7, rank * taps, dtype=torch.float64)
    extra = sketch.ridge()
    whole, normal = sketch.dense() + extra * torch.eye(len(sketch)), sketch.normal_equations(basis)
    for size in (0, 1, rank):
        taken = torch.kron(basis[:, :size].T.contiguous(), torch.eye(taps, dtype=torch.float64))
        expected = torch.linalg.solve(taken @ whole @ taken.T, cross[:, : size * taps].T).T
        ((energy, core),) = normal.levels(cross, [size])
        near(core, expected)
        near(energy, (expected * cross[:, : size * taps]).sum(1))
    explained = normal.explained(cross)
    near(explained @ explained.T, expected @ cross.T)
    near(normal.settle(explained), expected)
    for (energy, core), size in zip(normal.levels(cross, [0, 2, rank]), (0, 2, rank), strict=True):
        ((alone, own),) = normal.levels(cross, [size])
        near(energy, alone)
        near(core, own)


@pytest.mark.parametrize("taps", [1, 4])
def test_a_regression_in_a_sketch_is_that_in_its_matrix(taps: int) -> None:
    flat, sketch, basis = case(taps, 6)
    second, levels = Full(sketch.dense(), 1), [0, 1, 4, 6]
    near(residuals(flat, sketch, basis, levels), residuals(flat, second, basis, levels))
    explained, equations = regress(flat, sketch, basis)
    expected, full = regress(flat, second, basis)
    near(equations.settle(explained), full.settle(expected))


class Largest(TorchDispatchMode):
    """How many figures the largest tensor has that an operation has made."""

    figures = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.figures = max([self.figures, *(x.untyped_storage().nbytes() // x.element_size() for x in _tensors(made))])
        return made


def _tensors(values: object) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def largest(work: Callable[[], object]) -> int:
    mode = Largest()
    with mode:
        work()
    return mode.figures


@pytest.mark.parametrize(
    "form", [name for name, kind in find(Decomposition).items() if name not in ("svd", "tt-linear")]
)
def test_no_form_makes_a_matrix_of_as_many_rows_and_columns_as_there_are_inputs(form: str) -> None:
    layer, made = Layer("conv", 256, 32, (8, 8), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1)), find(Decomposition)[form]()
    if made.refuse(layer) is not None:  # ``grouped``, which no sketch is for
        return
    inputs = 256 * 9
    weight = torch.randn(layer.weight_shape)
    sketch = LowRankPlusDiagonal(torch.randn(inputs, 16), torch.rand(inputs), 100)
    space = made.rank_space(layer, 8)
    assert largest(lambda: sketch.dense()) == inputs**2  # or this counts nothing
    assert largest(lambda: made.errors(WIDE, weight, space, sketch)) < inputs**2 / 4
    assert largest(lambda: made.factorize(WIDE, weight, space[len(space) // 2], sketch)) < inputs**2 / 4
