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
from tdcompile.numerics.covariance import Covariance, Full, Identity, LowRankPlusDiagonal, PerGroup, from_tensors
from tdcompile.numerics.low_rank import low_rank, low_rank_errors
from tdcompile.numerics.nystrom import NystromSketch
from tdcompile.passes.decompose.svd import SVD
from tdcompile.passes.decompose.tt_linear import TTLinear


def stream(count: int, size: int, rank: int, noise: float, seed: int = 0) -> Tensor:
    """Of low rank plus noise, with a mean, as behind a rectifier."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(rank, size, generator=generator) * torch.logspace(0, -1, rank)[:, None]
    x = (torch.randn(count, rank, generator=generator) @ mix).relu()
    return x + noise * x.std() * torch.randn(count, size, generator=generator)


def sketch_of(x: Tensor, rank: int, batch: int = 64, seed: int = 1) -> LowRankPlusDiagonal:
    gathered = NystromSketch(x.shape[1], rank, torch.Generator().manual_seed(seed))
    for start in range(0, len(x), batch):
        gathered.add(x[start : start + batch])
    return gathered.result()


def moment(x: Tensor) -> Tensor:
    return x.double().T @ x.double() / len(x)


def matrix(sketch: LowRankPlusDiagonal) -> Tensor:
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
    assert sketch.ridge() == pytest.approx(Full(whole, 1).ridge(), rel=1e-5)
    assert sketch.shape == (len(sketch), len(sketch)) == tuple(whole.shape)
    root = sketch.root(0.5).double()
    assert torch.allclose(root @ root.T, whole + 0.5 * torch.eye(150), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("outputs", [60, 400], ids=["wide", "tall"])
def test_errors_and_factors_from_a_sketch_are_near_those_from_the_moment(outputs: int) -> None:
    x = stream(3000, 300, 30, 0.1)
    exact, sketch = moment(x), sketch_of(x, 128)
    weight = torch.randn(outputs, 300, generator=torch.Generator().manual_seed(3))
    known = low_rank_errors(weight, Full(exact, len(x)))
    assert float((low_rank_errors(weight, sketch) - known).abs().max()) < 0.03
    for rank in (5, 20, 40):
        last, first = low_rank(weight, sketch, rank)
        truth = relative_error(weight, last @ first, Full(exact, len(x)))
        assert truth == pytest.approx(float(known[rank]), rel=0.03)
        last, first = low_rank(weight, Identity.of(weight), rank)
        assert truth < 0.95 * relative_error(weight, last @ first, Full(exact, len(x)))


def test_a_sketch_holds_so_many_figures_for_each_input_and_gathers_with_twice_as_many() -> None:
    size, rank = 3000, 16
    gathered = NystromSketch(size, rank, torch.Generator().manual_seed(0))
    gathered.add(torch.randn(32, size))
    held = sum(value.numel() for value in vars(gathered).values() if isinstance(value, Tensor))
    assert held == size * (2 * rank + 1)
    sketch = gathered.result()
    assert sketch.factor.numel() + sketch.rest.numel() == size * (rank + 1)


def test_svd_and_tt_linear_take_one_and_are_exact_at_exact_ranks() -> None:
    x = stream(1000, 96, 12, 0.1)
    layer, weight = Layer("linear", 96, 64), torch.randn(64, 96)
    moments = sketch_of(x, 32)
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
    over_taps, over_groups = sketch.between_groups(taps).double(), sketch.between_taps(taps).double()
    torch.testing.assert_close(over_taps, parts.diagonal(dim1=1, dim2=3).mean(-1), **near)
    torch.testing.assert_close(over_groups, parts.diagonal(dim1=0, dim2=2).mean(-1), **near)
    middle = whole.reshape(3, 4, 5, 3, 4, 5).diagonal(dim1=0, dim2=3).diagonal(dim1=1, dim2=3).mean((-1, -2))
    torch.testing.assert_close(sketch.between(3, 4, 5).double(), middle, **near)


def test_what_needs_the_entries_gets_them_unless_they_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    sketch = sketch_of(stream(50, 40, 5, 0.1), 8)
    entries = sketch.dense()
    assert entries.dtype == torch.float64
    torch.testing.assert_close(entries, matrix(sketch), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr("tdcompile.numerics.covariance.DENSE_LIMIT", 39)
    with pytest.raises(InputError, match=r"40 inputs .* too large .*limit 39.*--keep-dense"):
        sketch.dense()
    second = torch.eye(3, dtype=torch.float64)
    assert Full(second, 1).dense() is second


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


def test_the_identity_is_the_matrix_of_ones_on_the_diagonal() -> None:
    weight = torch.randn(5, 3, 4, dtype=torch.float64)
    flat, identity = weight.flatten(1), Identity.of(weight)
    full = Full(identity.dense(), 1)
    assert identity.is_identity
    assert not full.is_identity
    assert identity.shape == full.shape == (12, 12)
    assert torch.equal(flat @ identity, flat)
    assert identity.energy(flat) == pytest.approx(full.energy(flat))
    assert torch.equal(identity.diagonal(), full.diagonal())
    torch.testing.assert_close(identity.root(3.0) @ identity.root(3.0).T, 4 * full.dense())
    torch.testing.assert_close(identity.between_groups(4), full.between_groups(4))
    torch.testing.assert_close(identity.between_taps(4), full.between_taps(4))
    basis = torch.linalg.qr(torch.randn(3, 2, dtype=torch.float64)).Q
    near = {"rtol": 1e-3, "atol": 1e-3}  # the ridge of the matrix
    ours, theirs = identity.normal_equations(basis), full.normal_equations(basis)
    found, expected = ours.residuals(flat, flat, [0, 1, 2]), theirs.residuals(flat, flat, [0, 1, 2])
    torch.testing.assert_close(found, expected, **near)
    pairs = zip(
        ours.levels(ours.cross(flat, flat), [1, 2]), theirs.levels(theirs.cross(flat, flat), [1, 2]), strict=True
    )
    for (energy, core), (other, same) in pairs:
        torch.testing.assert_close(energy, other, **near)
        torch.testing.assert_close(core, same, **near)


def test_each_group_has_a_matrix_and_a_root_is_asked_of_one_group() -> None:
    roots = torch.randn(2, 6, 6, dtype=torch.float64)
    groups = PerGroup(roots @ roots.mT, 50)
    flat = torch.randn(8, 6, dtype=torch.float64)
    assert (groups.groups, len(groups), groups.samples) == (2, 6, 50)
    alone = [part @ groups.of_group(place) for place, part in enumerate(flat.chunk(2))]
    torch.testing.assert_close(flat @ groups, torch.cat(alone))
    energies = [groups.of_group(place).energy(part) for place, part in enumerate(flat.chunk(2))]
    assert groups.energy(flat) == pytest.approx(sum(energies))
    with pytest.raises(TypeError, match=r"root\(\) of 2 groups .*of_group"):
        groups.root(1.0)


@pytest.mark.parametrize("kind", ["identity", "full", "low rank", "groups"])
def test_every_kind_comes_back_from_its_tensors(kind: str) -> None:
    matrix = moment(stream(50, 12, 3, 0.1))
    made: dict[str, Covariance] = {
        "identity": Identity(12),
        "full": Full(matrix, 50),
        "low rank": sketch_of(stream(50, 12, 3, 0.1), 4),
        "groups": PerGroup(matrix.expand(2, 12, 12), 50),
    }
    covariance = made[kind]
    back = from_tensors(covariance.tensors(), covariance.samples)
    flat = torch.randn(4, 12, dtype=torch.float64)
    assert type(back) is type(covariance)
    assert back.samples == covariance.samples
    assert torch.equal(flat @ back, flat @ covariance)
    assert back.is_finite()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_found_in_every_kind(bad: float) -> None:
    broken = torch.eye(4, dtype=torch.float64)
    broken[1, 2] = bad
    for covariance in (Full(broken, 1), PerGroup(broken[None], 1), LowRankPlusDiagonal(broken, torch.ones(4), 1)):
        assert not covariance.is_finite()
