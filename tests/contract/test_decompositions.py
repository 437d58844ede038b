"""What every registered decomposition promises, over layers of every kind; what it does not accept it refuses."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import tdcompile
from tdcompile.core.decomposition import Decomposition, relative_error
from tdcompile.core.registry import find, make
from tdcompile.errors import TdcompileError
from tdcompile.ir.conv_modules import TransposedConv
from tdcompile.ir.diagnostics import Reason
from tdcompile.ir.layer import Layer, LayerKind, Ranks, owner
from tdcompile.numerics.covariance import Covariance, Full, Identity, LowRankPlusDiagonal, PerGroup
from tdcompile.numerics.low_rank import PRECISE

FORMS = find(Decomposition)
GRAIN = 4
# How far above the truth ``errors`` may lie, and how far below, for forms whose ``factorize`` iterates; the others tell
# it exactly.
ESTIMATES = {"cp": (0.1, 0.02), "cp4": (0.1, 0.02), "tucker2": (0.05, 1e-4)}
EXACT = (1e-4, 1e-4)


# How many times the largest of the factors may be the smallest, by the root-mean-square norm of an output's row: these
# are balanced by that, and others differently.
EVEN = 1.01
UNEVEN = {
    # Each component's norms are made equal instead, and the factors' own with them: their rows, C, T or r, are not.
    "cp": 4.0,
    "cp4": 4.0,
    # So is each index of a bond, of cores that have r t1 and t2 rows.
    "tt-linear": 5.0,
}


def imbalance(factors: Sequence[Tensor]) -> float:
    gains = [float(factor.norm()) / math.sqrt(len(factor)) for factor in factors]
    return max(gains) / min(gains)


def _transposed(module: nn.Module) -> TransposedConv:
    return TransposedConv.of(module, {})


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv": (lambda: nn.Conv2d(16, 12, 3, padding=1), (2, 16, 7, 9)),
    "stride (1, 2)": (lambda: nn.Conv2d(8, 12, 3, stride=(1, 2), padding=1), (2, 8, 7, 9)),
    "stride (2, 2), no bias": (lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False), (2, 8, 8, 9)),
    "padding (2, 1), kernel (3, 5)": (lambda: nn.Conv2d(8, 12, (3, 5), padding=(2, 1)), (2, 8, 7, 9)),
    "same, dilation 2": (lambda: nn.Conv2d(8, 12, 3, padding="same", dilation=2), (2, 8, 9, 8)),
    "same, even kernel": (lambda: nn.Conv2d(8, 12, (2, 4), padding="same"), (2, 8, 7, 9)),
    "same, even kernel, reflect": (
        lambda: nn.Conv2d(8, 12, (4, 2), padding="same", padding_mode="reflect"),
        (2, 8, 7, 9),
    ),
    "valid, stride (2, 1)": (lambda: nn.Conv2d(8, 12, 3, padding="valid", stride=(2, 1)), (2, 8, 7, 9)),
    "reflect": (lambda: nn.Conv2d(8, 12, 3, padding=(1, 2), padding_mode="reflect", stride=2), (2, 8, 7, 9)),
    "replicate": (lambda: nn.Conv2d(8, 12, 3, padding=(2, 1), padding_mode="replicate"), (2, 8, 7, 9)),
    "circular": (lambda: nn.Conv2d(8, 12, (5, 3), padding=(2, 1), padding_mode="circular"), (2, 8, 7, 9)),
    "dilation (1, 2)": (lambda: nn.Conv2d(8, 12, 3, dilation=(1, 2), padding=(1, 2), stride=2), (2, 8, 8, 9)),
    "one input channel": (lambda: nn.Conv2d(1, 16, 3, padding=1), (2, 1, 7, 9)),
    "few outputs": (lambda: nn.Conv2d(24, 2, 3, padding=1), (2, 24, 7, 9)),
    "row kernel": (lambda: nn.Conv2d(8, 12, (1, 5), padding=(0, 2)), (2, 8, 7, 9)),
    "conv1d": (lambda: nn.Conv1d(8, 12, 5, stride=2, padding=2), (2, 8, 11)),
    "conv3d": (lambda: nn.Conv3d(6, 8, 3, padding=1, stride=(1, 2, 2)), (2, 6, 4, 5, 6)),
    "transposed": (lambda: _transposed(nn.ConvTranspose2d(12, 16, 4, stride=2, padding=1)), (2, 12, 5, 6)),
    "transposed, dilated, padded after": (
        lambda: _transposed(nn.ConvTranspose2d(24, 12, (3, 2), (2, 3), 1, (1, 2), dilation=(2, 1), bias=False)),
        (2, 24, 5, 4),
    ),
    "transposed 1d": (lambda: _transposed(nn.ConvTranspose1d(12, 16, 8, stride=4)), (2, 12, 9)),
    "transposed in groups": (lambda: _transposed(nn.ConvTranspose2d(6, 12, 3, 2, groups=3)), (2, 6, 4, 3)),
    "1x1": (lambda: nn.Conv2d(12, 16, 1), (2, 12, 7, 9)),
    "1x1, stride 2, padded": (lambda: nn.Conv2d(24, 16, 1, stride=2, padding=1, bias=False), (2, 24, 7, 9)),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, padding=1, groups=2), (2, 8, 7, 9)),
    "1x1 in groups": (lambda: nn.Conv1d(24, 32, 1, groups=2), (2, 24, 7)),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8), (2, 8, 7, 9)),
    "linear": (lambda: nn.Linear(36, 24), (3, 36)),
    "linear over tokens": (lambda: nn.Linear(24, 40, bias=False), (2, 5, 24)),
    "linear to one": (lambda: nn.Linear(24, 1), (2, 24)),
}
SKETCHED = {"conv", "conv1d", "conv3d", "transposed", "1x1", "linear", "linear over tokens"}  # one of each kind
IN_GROUPS = {"grouped", "transposed in groups", "1x1 in groups"}  # for ``grouped`` and no other form


def case(name: str) -> tuple[nn.Module, Layer, Tensor]:
    torch.manual_seed(len(name))
    build, shape = LAYERS[name]
    module = build()
    x = torch.randn(shape)
    layer = Layer.of(module, shape[1:-1] if isinstance(module, nn.Linear) else shape[2:])
    assert layer is not None
    return module, layer, x


def moments_of(layer: Layer) -> Covariance:
    """Of inputs as behind a rectifier: non-negative, correlated between channels and between neighbours."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(layer.in_channels, layer.in_channels, generator=generator, dtype=torch.float64)
    mix *= torch.linspace(1.0, 0.1, layer.in_channels, dtype=torch.float64)
    sizes = [kernel + 5 for kernel in layer.kernel]
    x = torch.randn(80, *sizes, layer.in_channels, generator=generator, dtype=torch.float64)
    for axis in range(1, len(sizes) + 1):
        x = x + x.roll(1, axis)
    x = (x @ mix).relu().movedim(-1, 1)
    for axis, kernel in enumerate(layer.kernel, start=2):
        x = x.unfold(axis, kernel, 1)
    axes = len(sizes)
    patches = x.movedim(1, axes + 1).flatten(0, axes).flatten(1)
    second = patches.T @ patches / len(patches)
    if layer.groups == 1:
        return Full(second, len(patches))
    width = len(second) // layer.groups
    parts = [second[at : at + width, at : at + width] for at in range(0, len(second), width)]
    return PerGroup(torch.stack(parts), len(patches))


def sketch_of(layer: Layer) -> Covariance:
    """Low rank and the rest of the diagonal, of the same inputs."""
    return sketched(moments_of(layer))


def sketched(whole: Covariance) -> Covariance:
    values, vectors = torch.linalg.eigh(whole.dense())
    kept = slice(-max(len(values) // 3, 1), None)
    factor = vectors[:, kept] * values[kept].clamp(min=0).sqrt()
    rest = (whole.dense().diagonal() - factor.square().sum(1)).clamp(min=0)
    return LowRankPlusDiagonal(factor.float(), rest.float(), whole.samples)


# Of the largest eigenvalue of moments of low rank, what round-off leaves of the others, below zero as often as above.
ROUNDED = 1e-5
LITTLE = ("zero", "tiny", "rank 1", "rank 1, rounded", "rank 1, rounded and tiny", "zero but for round-off")


def of_little(kind: str, layer: Layer) -> tuple[Covariance, Covariance]:
    """Moments of data that show little, and the same without round-off."""
    whole = moments_of(layer)
    seen = whole.dense() if layer.groups > 1 else whole.dense()[None]
    generator = torch.Generator().manual_seed(1)
    patch = torch.randn(seen.shape[:2], generator=generator, dtype=torch.float64).relu()
    single = patch[:, :, None] * patch[:, None, :]
    stray = torch.randn(seen.shape, generator=generator, dtype=torch.float64)
    stray = stray + stray.mT
    sizes = [torch.linalg.matrix_norm(each, 2)[:, None, None] for each in (single, stray)]
    stray *= ROUNDED * sizes[0] / sizes[1]
    told, true = {
        "zero": (0 * seen, 0 * seen),
        "tiny": (1e-12 * seen, 1e-12 * seen),
        "rank 1": (single, single),
        "rank 1, rounded": (single + stray, single),
        "rank 1, rounded and tiny": (1e-12 * (single + stray), 1e-12 * single),
        "zero but for round-off": (stray, 0 * seen),
    }[kind]
    one = layer.groups == 1
    covariance = Full if one else PerGroup
    return covariance(told[0] if one else told, 80), covariance(true[0] if one else true, 80)


MOMENTS: dict[str, Callable[[Layer], Covariance]] = {
    "plain": lambda layer: Identity(layer.in_channels // layer.groups * layer.taps),
    "data": moments_of,
    "sketch": sketch_of,  # of a layer in groups there is none
}
ACCEPTED = [(form, name) for form, kind in FORMS.items() for name in LAYERS if kind().refuse(case(name)[1]) is None]


def accepted(form: str, name: str) -> tuple[Decomposition, nn.Module, Layer, Tensor, Tensor]:
    module, layer, x = case(name)
    return FORMS[form](), module, layer, owner(module).weight.detach(), x


@pytest.mark.parametrize("form", FORMS)
def test_a_form_accepts_some_layers_and_refuses_the_others_with_a_reason(form: str) -> None:
    decomposition = FORMS[form]()
    refusals = {name: decomposition.refuse(case(name)[1]) for name in LAYERS}
    assert None in refusals.values()
    for refusal in (r for r in refusals.values() if r is not None):
        assert isinstance(refusal, Reason)
        assert refusal.code.replace("-", "").isalnum()
        assert len(refusal.text) > 10
    depthwise = refusals["depthwise"]
    assert depthwise is not None
    assert depthwise.code in {"depthwise", "kind"}  # a form of linear layers refuses every convolution alike
    assert {name for name in IN_GROUPS if refusals[name] is None} == (IN_GROUPS if form == "grouped" else set())


@pytest.mark.parametrize("form", FORMS)
def test_the_text_of_a_form_reads_back(form: str) -> None:
    assert make(Decomposition, str(FORMS[form]().spec())) == FORMS[form]()
    assert FORMS[form].summary()


@pytest.mark.parametrize(("form", "name"), ACCEPTED)
def test_exact_ranks_compute_the_layer(form: str, name: str) -> None:
    decomposition, module, layer, weight, x = accepted(form, name)
    bias = owner(module).bias
    before = weight.clone()
    ranks = decomposition.exact_ranks(layer)
    factors = decomposition.factorize(layer, weight, ranks, Identity.of(weight))
    built = decomposition.build(layer, ranks, factors, bias)
    with torch.no_grad():
        expected, found = module(x), built(x)
    assert found.shape == expected.shape
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    assert torch.equal(owner(module).weight, before)
    assert relative_error(weight, decomposition.reconstruct(layer, factors), Identity.of(weight)) < 1e-5


@pytest.mark.parametrize(("form", "name"), ACCEPTED)
def test_exact_ranks_stay_exact_with_moments(form: str, name: str) -> None:
    decomposition, _, layer, weight, _ = accepted(form, name)
    for moments in (moments_of(layer), *(() if name in IN_GROUPS else (sketch_of(layer),))):
        factors = decomposition.factorize(layer, weight, decomposition.exact_ranks(layer), moments)
        assert relative_error(weight, decomposition.reconstruct(layer, factors), moments) < 1e-5


@pytest.mark.parametrize(("form", "name"), ACCEPTED)
def test_a_blueprint_is_what_is_built(form: str, name: str) -> None:
    decomposition, module, layer, weight, x = accepted(form, name)
    space = decomposition.rank_space(layer, GRAIN)
    for ranks in (space[0], space[-1]):
        blueprint = decomposition.blueprint(layer, ranks)
        assert len(decomposition.modes) in (0, len(ranks))  # none where the number of ranks is an option
        assert [part.bias for part in blueprint] == [False] * (len(blueprint) - 1) + [layer.bias]
        factors = decomposition.factorize(layer, weight, ranks, Identity.of(weight))
        assert [tuple(factor.shape) for factor in factors] == [part.weight_shape for part in blueprint]
        assert {factor.dtype for factor in factors} == {torch.float32}
        built = decomposition.build(layer, ranks, factors, owner(module).bias)
        assert sum(p.numel() for p in built.parameters()) == sum(part.params for part in blueprint)
        with torch.no_grad():
            dense = module(x)
            assert built(x).shape == dense.shape
        assert decomposition.reconstruct(layer, factors).shape == weight.shape


def _is_a_rank_space(decomposition: Decomposition, layer: Layer, grain: int, space: Sequence[Ranks]) -> None:
    exact = decomposition.exact_ranks(layer)
    macs = {ranks: sum(part.macs for part in decomposition.blueprint(layer, ranks)) for ranks in space}
    assert space[-1] == exact
    assert len(space) == len(macs) <= 400
    assert [macs[ranks] for ranks in space[:-1]] == sorted(macs[ranks] for ranks in space[:-1])
    assert all(macs[ranks] <= layer.macs for ranks in space[:-1])
    for ranks in space:
        assert all(rank % grain == 0 or rank == full for rank, full in zip(ranks, exact, strict=True))
    for small in space[:: max(len(space) // 20, 1)]:
        for large in space[:: max(len(space) // 20, 1)]:
            if all(a <= b for a, b in zip(small, large, strict=True)):
                assert macs[small] <= macs[large]


@pytest.mark.parametrize(("form", "name"), ACCEPTED)
def test_a_rank_space_runs_from_the_cheapest_to_the_exact_ranks_on_the_grain(form: str, name: str) -> None:
    decomposition, _, layer, _, _ = accepted(form, name)
    for grain in (1, GRAIN, 16):
        _is_a_rank_space(decomposition, layer, grain, list(decomposition.rank_space(layer, grain)))


@pytest.mark.parametrize(("form", "name"), ACCEPTED)
def test_the_default_rank_space_holds_for_every_form(form: str, name: str) -> None:
    decomposition, _, layer, _, _ = accepted(form, name)
    for grain in (1, GRAIN, 16):
        _is_a_rank_space(decomposition, layer, grain, list(Decomposition.rank_space(decomposition, layer, grain)))


@pytest.mark.parametrize(("form", "name"), ACCEPTED)
def test_the_default_reconstruct_is_what_the_form_computes_itself(form: str, name: str) -> None:
    decomposition, _, layer, weight, _ = accepted(form, name)
    space = decomposition.rank_space(layer, GRAIN)
    for ranks in {space[0], space[len(space) // 2], space[-1]}:
        factors = [torch.randn(part.weight_shape).requires_grad_() for part in decomposition.blueprint(layer, ranks)]
        assert decomposition.ranks_of(layer, factors) == ranks
        own, default = (
            decomposition.reconstruct(layer, factors),
            Decomposition.reconstruct(decomposition, layer, factors),
        )
        assert default.dtype is torch.float32
        torch.testing.assert_close(default, own, rtol=1e-4, atol=1e-4)
        direction = torch.randn(weight.shape)
        gradients = [torch.autograd.grad((made * direction).sum(), factors) for made in (own, default)]
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_the_default_errors_are_those_of_the_factors(form: str) -> None:
    name = next(name for accepting, name in ACCEPTED if accepting == form)
    decomposition, _, layer, weight, _ = accepted(form, name)
    plain, ranks = Identity.of(weight), decomposition.rank_space(layer, 1)[0]
    approximation = decomposition.reconstruct(layer, decomposition.factorize(layer, weight, ranks, plain))
    found = Decomposition.errors(decomposition, layer, weight, [ranks, decomposition.exact_ranks(layer)], plain)
    assert found == pytest.approx([relative_error(weight, approximation, plain), 0.0], abs=1e-5)


@pytest.mark.parametrize("data", MOMENTS)
@pytest.mark.parametrize(
    ("form", "name"), [case for case in ACCEPTED if FORMS[case[0]].error_bounds is not Decomposition.error_bounds]
)
def test_bounds_of_errors_are_not_above_them(form: str, name: str, data: str) -> None:
    decomposition, _, layer, weight, _ = accepted(form, name)
    space, moments = list(decomposition.rank_space(layer, 1)), MOMENTS[data](layer)
    bounds = decomposition.error_bounds(layer, weight, space, moments)
    for bound, error in zip(bounds, decomposition.errors(layer, weight, space, moments), strict=True):
        assert 0 <= bound <= error + 1e-6
    assert max(bounds) > 0.1


def test_a_form_without_bounds_of_its_own_bounds_nothing() -> None:
    decomposition, _, layer, weight, _ = accepted("svd", "linear")
    assert decomposition.error_bounds(layer, weight, [(1,), (2,)], Identity.of(weight)) == [0, 0]


@pytest.mark.parametrize("form", FORMS)
def test_the_default_refusal_leaves_out_no_layer_that_a_form_takes_unless_it_is_too_small(form: str) -> None:
    decomposition = FORMS[form]()
    for layer in (case(name)[1] for name in LAYERS):
        own = decomposition.refuse(layer)
        if own is None:
            default = Decomposition.refuse(decomposition, layer)
            assert default is None or default.code == "small"
        elif form not in ("grouped", "tt-linear"):  # these look at the groups and at the features themselves
            assert Decomposition.refuse(decomposition, layer) == own


def test_factors_that_no_ranks_give_are_an_error_that_names_their_shapes() -> None:
    layer = Layer("linear", 12, 8)
    with pytest.raises(TdcompileError, match=r"'svd' factors of the shapes \(3, 12\), \(8, 4\)"):
        make(Decomposition, "svd").ranks_of(layer, [torch.zeros(3, 12), torch.zeros(8, 4)])


@pytest.mark.parametrize(
    ("form", "name", "data"),
    [(*case, data) for case in ACCEPTED for data in MOMENTS if data != "sketch" or case[1] in SKETCHED],
)
def test_errors_are_those_of_the_factors_and_data_never_make_them_worse(form: str, name: str, data: str) -> None:
    decomposition, _, layer, weight, _ = accepted(form, name)
    space = list(decomposition.rank_space(layer, GRAIN))
    parts = 3 if form in ESTIMATES else 6  # those iterate, and take the time
    members = sorted({round(i * (len(space) - 1) / parts) for i in range(parts + 1)})
    moments = MOMENTS[data](layer)
    told = decomposition.errors(layer, weight, space, moments)
    assert len(told) == len(space)
    above, below = ESTIMATES.get(form, EXACT)
    for member in members:
        factors = decomposition.factorize(layer, weight, space[member], moments)
        truth = relative_error(weight, decomposition.reconstruct(layer, factors), moments)
        assert -below <= told[member] - truth <= above, (space[member], told[member], truth)
        if not moments.is_identity:
            plain = decomposition.factorize(layer, weight, space[member], Identity.of(weight))
            assert truth <= relative_error(weight, decomposition.reconstruct(layer, plain), moments) + 1e-6
        assert imbalance(factors) < UNEVEN.get(form, EVEN)


@pytest.mark.parametrize(
    ("form", "name", "data"),
    [
        (*case, data)
        for case in ACCEPTED
        if case[1] in ("conv", "grouped", "linear")
        for data in (("data",) if case[1] in IN_GROUPS else ("data", "sketch"))
    ],
)
def test_data_bring_something_in_the_middle_of_the_ranks(form: str, name: str, data: str) -> None:
    decomposition, _, layer, weight, _ = accepted(form, name)
    space, moments = decomposition.rank_space(layer, 1), MOMENTS[data](layer)
    ranks = space[(len(space) - 2) // 2]  # the exact ones come last
    lost = [
        relative_error(weight, decomposition.reconstruct(layer, factors), moments)
        for factors in (decomposition.factorize(layer, weight, ranks, seen) for seen in (Identity.of(weight), moments))
    ]
    assert lost[1] < 0.95 * lost[0], lost


@pytest.mark.parametrize("scale", [0.01, 100.0])
@pytest.mark.parametrize(
    ("form", "name"), [case for case in ACCEPTED if case[1] in ("conv", "1x1", "grouped", "linear")]
)
def test_factors_of_small_and_large_weights_are_balanced_too(form: str, name: str, scale: float) -> None:
    decomposition, _, layer, weight, _ = accepted(form, name)
    space = decomposition.rank_space(layer, GRAIN)
    factors = decomposition.factorize(layer, scale * weight, space[(len(space) - 1) // 2], Identity.of(weight))
    assert imbalance(factors) < UNEVEN.get(form, EVEN)


@pytest.mark.parametrize("form", FORMS)
def test_a_weight_in_double_precision_gives_factors_in_it(form: str) -> None:
    name = next(name for accepting, name in ACCEPTED if accepting == form)
    decomposition, _, layer, weight, _ = accepted(form, name)
    factors = decomposition.factorize(layer, weight.double(), decomposition.exact_ranks(layer), Identity.of(weight))
    assert {factor.dtype for factor in factors} == {torch.float64}


@pytest.mark.parametrize("data", MOMENTS)
@pytest.mark.parametrize("precise", [0, 20, 60])
@pytest.mark.parametrize(
    ("form", "name"), [case for case in ACCEPTED if case[1] in ("conv", "few outputs", "1x1", "linear")]
)
def test_a_layer_too_large_for_float64_fares_as_in_it(
    form: str, name: str, precise: int, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decomposition, _, layer, weight, _ = accepted(form, name)
    moments = MOMENTS[data](layer)
    space = decomposition.rank_space(layer, GRAIN)
    middle = space[len(space) // 2]
    wanted = decomposition.errors(layer, weight, space, moments)
    monkeypatch.setattr("tdcompile.numerics.low_rank.PRECISE", precise)
    assert decomposition.errors(layer, weight, space, moments) == pytest.approx(wanted, rel=0.02, abs=2e-3)
    factors = decomposition.factorize(layer, weight, middle, moments)
    assert {factor.dtype for factor in factors} == {weight.dtype}
    error = relative_error(weight, decomposition.reconstruct(layer, factors), moments)
    assert error == pytest.approx(decomposition.errors(layer, weight, [middle], moments)[0], rel=0.15, abs=2e-3)


@pytest.mark.parametrize(
    ("kind", "precise"), [*((kind, PRECISE) for kind in LITTLE), ("rank 1", 0), ("rank 1, rounded", 0)]
)
@pytest.mark.parametrize(
    ("form", "name", "data"),
    [
        (*case, data)
        for case in ACCEPTED
        if case[1] in ("conv", "1x1", "grouped", "linear")
        for data in (("data",) if case[1] in IN_GROUPS else ("data", "sketch"))
    ],
)
def test_data_that_show_little_give_finite_factors_and_errors_that_hold(
    form: str, name: str, data: str, kind: str, precise: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tdcompile.numerics.low_rank.PRECISE", precise)
    decomposition, _, layer, weight, _ = accepted(form, name)
    moments, truly = of_little(kind, layer)
    if data == "sketch":
        moments = sketched(moments)
        truly = moments if kind == "tiny" else truly  # the others are of a rank that a sketch holds
    space = decomposition.rank_space(layer, GRAIN)
    told = decomposition.errors(layer, weight, space, moments)
    above, below = ESTIMATES.get(form, EXACT)
    slack = 0.0 if precise else 1e-3
    if "rounded" in kind:  # as much of the output's energy may be that of the weight where there are no data
        largest = float(torch.linalg.matrix_norm(truly.dense(), 2).max())
        slack += math.sqrt(ROUNDED * largest * float(weight.square().sum()) / truly.energy(weight.flatten(1).double()))
    for member in sorted({0, (len(space) - 1) // 2, len(space) - 1}):
        factors = decomposition.factorize(layer, weight, space[member], moments)
        assert all(bool(torch.isfinite(factor).all()) for factor in factors)
        approximation = decomposition.reconstruct(layer, factors)
        assert float(approximation.norm()) < 2 * float(weight.norm())  # no direction of round-off was made use of
        assert math.isfinite(told[member])
        if kind != "zero but for round-off":  # of which no error is anything
            truth = relative_error(weight, approximation, truly)
            assert -below - slack <= told[member] - truth <= above + slack, (space[member], told[member], truth)


def test_a_form_of_three_methods_is_proposed_chosen_compiled_and_reported() -> None:
    @dataclass(frozen=True)
    class Rows(Decomposition):
        """A convolution to the outputs of largest norm, then a 1x1 to all of them."""

        name: ClassVar[str] = "largest-rows"
        kinds: ClassVar[frozenset[LayerKind]] = frozenset({"conv"})

        def exact_ranks(self, layer: Layer) -> Ranks:
            return (layer.out_channels,)

        def blueprint(self, layer: Layer, ranks: Ranks) -> tuple[Layer, ...]:
            last = replace(layer.point(), in_channels=ranks[0], extent=layer.out_extent)
            return replace(layer, out_channels=ranks[0], bias=False), last

        def factorize(self, layer: Layer, weight: Tensor, ranks: Ranks, covariance: Covariance) -> tuple[Tensor, ...]:
            flat = weight.flatten(1).double()
            first = flat[flat.norm(dim=1).argsort(descending=True)[: ranks[0]]]
            return self.shaped(layer, ranks, (first, flat @ torch.linalg.pinv(first)), weight.dtype)

    try:
        torch.manual_seed(0)
        form, x = Rows(), torch.randn(2, 8, 7, 9)
        network = nn.Sequential(nn.Conv2d(8, 12, 3, stride=(1, 2), padding=1), nn.ReLU(), nn.Linear(5, 4)).eval()
        with torch.no_grad():
            network[0].weight[6:] = torch.einsum("ij,jckl->ickl", torch.rand(6, 6), network[0].weight[:6])  # of rank 6
        compiled = tdcompile.compile(network, x, budget={"macs": 0.9}, decompose=("largest-rows",), tune="none")
        conv, linear = compiled.report.layers
        assert (conv.decomposition, linear.decomposition) == ("largest-rows", "dense")
        assert conv.error is not None
        assert conv.error < 1
        layer = Layer.of(network[0], (7, 9))
        assert layer is not None
        refused = form.refuse(Layer("linear", 5, 4))
        assert refused is not None
        assert (refused.code, refused.text) == ("kind", "largest-rows is a form of convolutions")
        assert form.rank_space(layer, 4) == [(4,), (8,), (12,)]
        torch.testing.assert_close(
            form.reconstruct(layer, form.factorize(layer, network[0].weight, (12,), Identity.of(network[0].weight))),
            network[0].weight,
            rtol=1e-4,
            atol=1e-5,
        )
    finally:
        Rows.name = ""
