"""A sketched second moment: exact where it can be, near in the metric that counts, and as small as it says."""

import pytest
import torch
from torch import Tensor, nn

import tdcompile
from tdcompile.core.decomposition import relative_error
from tdcompile.core.pipeline import Pipeline
from tdcompile.data.task import Tensors
from tdcompile.errors import InputError
from tdcompile.ir.layer import Layer
from tdcompile.ir.measurements import Moments
from tdcompile.numerics.covariance import Range, Sketch
from tdcompile.numerics.input_basis import between_groups, between_taps
from tdcompile.numerics.low_rank import low_rank, low_rank_errors, ridge, root_of
from tdcompile.passes.decompose.svd import SVD
from tdcompile.passes.decompose.tt_linear import TTLinear


def stream(count: int, size: int, rank: int, noise: float, seed: int = 0) -> Tensor:
    """Of low rank plus noise, with a mean, as behind a rectifier."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(rank, size, generator=generator) * torch.logspace(0, -1, rank)[:, None]
    x = (torch.randn(count, rank, generator=generator) @ mix).relu()
    return x + noise * x.std() * torch.randn(count, size, generator=generator)


def sketch_of(x: Tensor, rank: int, batch: int = 64, seed: int = 1) -> Sketch:
    gathered = Range(x.shape[1], rank, torch.Generator().manual_seed(seed))
    for start in range(0, len(x), batch):
        gathered.add(x[start : start + batch])
    return gathered.result()


def moment(x: Tensor) -> Tensor:
    return x.double().T @ x.double() / len(x)


def matrix(sketch: Sketch) -> Tensor:
    return torch.eye(len(sketch), dtype=torch.float64) @ sketch


def test_a_moment_of_no_more_than_the_rank_is_kept_exactly() -> None:
    x = stream(60, 300, 20, 0.1)
    exact, found = moment(x), matrix(sketch_of(x, 64))
    assert float((found - exact).norm() / exact.norm()) < 1e-6


def test_a_sketch_is_never_more_than_the_moment_and_its_diagonal_is_exact() -> None:
    x = stream(2000, 200, 20, 0.2)
    sketch, exact = sketch_of(x, 40), moment(x)
    seen = sketch.factor.double() @ sketch.factor.double().T
    assert float(torch.linalg.eigvalsh(exact - seen)[0]) > -1e-6 * float(exact.trace())
    assert torch.allclose(sketch.diagonal().double(), exact.diagonal(), rtol=1e-5)
    assert float(sketch.rest.min()) >= 0
    assert 0 < float(sketch.rest.sum()) < 0.5 * float(exact.trace())


def test_batches_do_not_matter_and_the_seed_decides_everything() -> None:
    x = stream(500, 120, 10, 0.1)
    first, again, batched, other = (sketch_of(x, 20, b, s) for b, s in ((64, 1), (64, 1), (500, 1), (64, 2)))
    assert torch.equal(first.factor, again.factor)
    assert torch.equal(first.rest, again.rest)
    assert torch.allclose(matrix(first), matrix(batched), atol=1e-5)
    assert not torch.allclose(matrix(first), matrix(other), atol=1e-5)


@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_it_multiplies_and_reports_like_the_matrix_it_stands_for(precision: torch.dtype) -> None:
    sketch = sketch_of(stream(500, 150, 10, 0.1), 140)
    whole = sketch.factor.double() @ sketch.factor.double().T + torch.diag(sketch.rest.double())
    flat = torch.randn(7, 150, dtype=precision)
    product = flat @ sketch
    assert product.dtype == precision
    assert torch.allclose(product.double(), flat.double() @ whole, rtol=1e-4, atol=1e-4)
    assert torch.allclose(sketch.diagonal().double(), whole.diagonal(), rtol=1e-5)
    assert ridge(sketch) == pytest.approx(ridge(whole), rel=1e-5)
    assert sketch.shape == (len(sketch), len(sketch)) == tuple(whole.shape)
    root = root_of(sketch, 0.5).double()
    assert torch.allclose(root @ root.T, whole + 0.5 * torch.eye(150), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("outputs", [60, 400], ids=["wide", "tall"])
def test_errors_and_factors_from_a_sketch_are_near_those_from_the_moment(outputs: int) -> None:
    x = stream(3000, 300, 30, 0.1)
    exact, sketch = moment(x), sketch_of(x, 128)
    weight = torch.randn(outputs, 300, generator=torch.Generator().manual_seed(3))
    known = low_rank_errors(weight, exact)
    assert float((low_rank_errors(weight, sketch) - known).abs().max()) < 0.03
    for rank in (5, 20, 40):
        last, first = low_rank(weight, sketch, rank)
        truth = relative_error(weight, last @ first, Moments(exact, len(x)))
        assert truth == pytest.approx(float(known[rank]), rel=0.03)
        last, first = low_rank(weight, None, rank)
        assert truth < 0.95 * relative_error(weight, last @ first, Moments(exact, len(x)))


def test_a_sketch_holds_so_many_figures_for_each_input_and_gathers_with_twice_as_many() -> None:
    size, rank = 3000, 16
    gathered = Range(size, rank, torch.Generator().manual_seed(0))
    gathered.add(torch.randn(32, size))
    held = sum(value.numel() for value in vars(gathered).values() if isinstance(value, Tensor))
    assert held == size * (2 * rank + 1)
    sketch = gathered.result()
    assert sketch.factor.numel() + sketch.rest.numel() == size * (rank + 1)


def test_svd_and_tt_linear_take_one_and_are_exact_at_exact_ranks() -> None:
    x = stream(1000, 96, 12, 0.1)
    layer, weight = Layer("linear", 96, 64), torch.randn(64, 96)
    moments = Moments(sketch_of(x, 32), len(x))
    for form in (SVD(), TTLinear()):
        space = form.rank_space(layer, 4)
        told = form.errors(layer, weight, space, moments)
        for ranks, estimate in list(zip(space, told, strict=True))[:: max(len(space) // 4, 1)]:
            found = form.reconstruct(layer, form.factorize(layer, weight, ranks, moments))
            assert estimate == pytest.approx(relative_error(weight, found, moments), abs=0.01)
        whole = form.reconstruct(layer, form.factorize(layer, weight, form.exact_ranks(layer), moments))
        assert relative_error(weight, whole, moments) < 1e-5


@pytest.mark.parametrize("taps", [1, 4])
def test_its_blocks_are_those_of_the_matrix_it_stands_for(taps: int) -> None:
    sketch = sketch_of(stream(500, 60, 10, 0.1), 20)
    whole, groups = matrix(sketch), 60 // taps
    parts = whole.reshape(groups, taps, groups, taps)
    near = {"rtol": 1e-4, "atol": 1e-5}
    over_taps, over_groups = between_groups(sketch, taps).double(), between_taps(sketch, taps).double()
    torch.testing.assert_close(over_taps, parts.diagonal(dim1=1, dim2=3).mean(-1), **near)
    torch.testing.assert_close(over_groups, parts.diagonal(dim1=0, dim2=2).mean(-1), **near)
    middle = whole.reshape(3, 4, 5, 3, 4, 5).diagonal(dim1=0, dim2=3).diagonal(dim1=1, dim2=3).mean((-1, -2))
    torch.testing.assert_close(sketch.between(3, 4, 5).double(), middle, **near)


def test_what_needs_the_entries_gets_them_unless_they_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    sketch = sketch_of(stream(50, 40, 5, 0.1), 8)
    entries = Moments(sketch, 50).second
    assert entries.dtype == torch.float64
    torch.testing.assert_close(entries, matrix(sketch), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr("tdcompile.ir.measurements.ENTIRE", 39)
    with pytest.raises(InputError, match=r"40 inputs is a sketch, too large .*--keep-dense"):
        Moments(sketch, 50).second  # noqa: B018  # the access is what is refused
    second = torch.eye(3, dtype=torch.float64)
    assert Moments(second, 1).second is second


def test_inputs_that_are_all_zero_are_no_trouble() -> None:
    sketch = sketch_of(torch.zeros(10, 30), 4)
    assert not bool(sketch.factor.any() or sketch.rest.any())
    assert low_rank_errors(torch.randn(5, 30), sketch).tolist() == [0.0] * 6


def test_a_network_of_wide_convolutions_is_factorised_by_its_data() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 3, 8, 8).repeat_interleave(4, dim=1).relu()  # twelve channels of rank 3
    net = nn.Sequential(nn.Conv2d(12, 24, 3), nn.ReLU(), nn.Conv2d(24, 24, 3)).eval()
    program = tdcompile.trace(net, (x[:2],)).with_(budget=tdcompile.Budget(macs=0.3), task=tdcompile.Task(Tensors(x)))
    lost = {}
    for start in ("", "calibrate,", "calibrate{largest=10,sketch=100},"):
        made = Pipeline.parse(f"{start}propose{{decompose=tucker2+channel}},score,choose,factorize").run(program)
        with torch.no_grad():
            lost[start] = float((made.graph(x) - net(x)).norm())
    plain, exact, sketched = lost.values()
    assert sketched == pytest.approx(exact, rel=0.1)
    assert sketched < 0.6 * plain
