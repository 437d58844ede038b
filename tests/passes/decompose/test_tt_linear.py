"""``tt-linear``: the TT-matrix of a linear layer."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from tdcompile.core.decomposition import Decomposition, relative_error
from tdcompile.core.registry import make
from tdcompile.errors import InputError
from tdcompile.ir.layer import Layer
from tdcompile.numerics.covariance import Covariance, Full, Identity, LowRankPlusDiagonal
from tdcompile.passes.decompose.tt_linear import TTLinear, modes_of


@given(st.integers(1, 2000), st.integers(1, 4))
def test_modes_multiply_to_the_size_and_are_above_one(size: int, count: int) -> None:
    modes = modes_of(size, count)
    if modes:
        assert math.prod(modes) == size
        assert min(modes) > 1
        assert len(modes) == count
        assert list(modes) == sorted(modes)


def test_modes_are_as_near_to_each_other_as_can_be() -> None:
    assert modes_of(768, 2) == (24, 32)
    assert modes_of(512, 3) == (8, 8, 8)
    assert modes_of(26, 2) == (2, 13)
    assert modes_of(7, 2) == modes_of(6, 3) == modes_of(1, 1) == ()


@pytest.mark.parametrize(
    ("module", "extent", "code"),
    [
        (nn.Conv2d(8, 8, 1), (5, 5), "kind"),
        (nn.Conv2d(8, 8, 3, groups=4), (5, 5), "grouped"),
        (nn.Linear(64, 7), (), "shape"),
        (nn.Linear(2, 64), (), "shape"),
    ],
)
def test_what_it_cannot_do_it_refuses(module: nn.Module, extent: tuple[int, ...], code: str) -> None:
    layer = Layer.of(module, extent)
    assert layer is not None
    refusal = TTLinear().refuse(layer)
    assert refusal is not None
    assert refusal.code == code


def test_the_number_of_cores_is_an_option() -> None:
    form = make(Decomposition, "tt-linear{cores=3}")
    assert form == TTLinear(3)
    assert str(form.spec()) == "tt-linear{cores=3}"
    assert (len(form.modes), len(TTLinear().modes)) == (2, 1)
    with pytest.raises(InputError, match="cores=1 must be a whole number of at least 2"):
        make(Decomposition, "tt-linear{cores=1}")
    assert form.refuse(Layer("linear", 64, 6)) is not None
    assert TTLinear().refuse(Layer("linear", 64, 6)) is None


@pytest.mark.parametrize("cores", [2, 3])
@pytest.mark.parametrize(("lead", "bias"), [((), True), ((5,), False), ((3, 4), True)])
@pytest.mark.parametrize("exact", [True, False])
def test_the_chain_computes_what_its_factors_stand_for(
    cores: int, lead: tuple[int, ...], bias: bool, exact: bool
) -> None:
    form, module = TTLinear(cores), nn.Linear(24, 60, bias=bias)
    layer = Layer.of(module, lead)
    assert layer is not None
    ranks = form.exact_ranks(layer) if exact else (3,) * (cores - 1)
    factors = form.factorize(layer, module.weight, ranks, Identity.of(module.weight))
    built = form.build(layer, ranks, factors, module.bias)
    x = torch.randn(2, *lead, 24)
    with torch.no_grad():
        if exact:
            assert relative_error(module.weight, form.reconstruct(layer, factors), Identity.of(module.weight)) < 1e-5
        module.weight.copy_(form.reconstruct(layer, factors))
        assert torch.allclose(built(x), module(x), atol=1e-5)
    parts = form.blueprint(layer, ranks)
    assert sum(part.params for part in parts) == sum(p.numel() for p in built.parameters())
    with FlopCounterMode(display=False) as counter:
        built(x)
    assert counter.get_total_flops() == 2 * len(x) * sum(part.macs for part in parts)


def test_the_chain_is_traced_and_exported_with_any_batch() -> None:
    form, module = TTLinear(3), nn.Linear(24, 60)
    layer = Layer.of(module, (5,))
    assert layer is not None
    built = form.build(
        layer, (4, 4), form.factorize(layer, module.weight, (4, 4), Identity.of(module.weight)), module.bias
    )
    x = torch.randn(2, 5, 24)
    assert torch.equal(fx.symbolic_trace(built)(x), built(x))
    exported = torch.export.export(built, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert torch.allclose(exported.module()(x[:1].repeat(7, 1, 1)), built(x[:1]).repeat(7, 1, 1), atol=1e-6)


def test_a_kronecker_product_has_rank_one() -> None:
    layer = Layer("linear", 24, 60)
    generator = torch.Generator().manual_seed(0)
    (t1, t2), (c1, c2) = tuple(reversed(modes_of(60, 2))), modes_of(24, 2)
    weight = torch.kron(torch.randn(t1, c1, generator=generator), torch.randn(t2, c2, generator=generator))
    factors = TTLinear().factorize(layer, weight, (1,), Identity.of(weight))
    assert relative_error(weight, TTLinear().reconstruct(layer, factors), Identity.of(weight)) < 1e-5
    assert float(factors[0].norm()) == pytest.approx(float(factors[1].norm()), rel=1e-4)


@pytest.mark.parametrize("sketched", [False, True])
@pytest.mark.parametrize("cores", [2, 3])
def test_where_the_input_is_loud_the_weight_is_kept(cores: int, sketched: bool) -> None:
    form, layer = TTLinear(cores), Layer("linear", 256, 512)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(512, 256, generator=generator)
    modes = modes_of(256, cores)
    spread = [torch.logspace(0, -1.5, size, dtype=torch.float64).diag() for size in modes]
    turned = [torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0] for size in modes]
    second = torch.ones(1, 1, dtype=torch.float64)
    for values, vectors in zip(spread, turned, strict=True):
        second = torch.kron(second, vectors @ values @ vectors.T)
    moments = Full(second, 1000)
    seen_as = sketch_of(second, 64) if sketched else moments
    ranks = form.rank_space(layer, 1)[len(form.rank_space(layer, 1)) // 2]
    plain, aware = (
        form.reconstruct(layer, form.factorize(layer, weight, ranks, seen)) for seen in (Identity.of(weight), seen_as)
    )
    kept, more = (1 - relative_error(weight, found, moments) ** 2 for found in (plain, aware))
    assert more > 2 * kept  # of the output's energy, of a weight that has no order of its own
    assert relative_error(weight, aware, Identity.of(weight)) > relative_error(weight, plain, Identity.of(weight))


def sketch_of(second: torch.Tensor, rank: int) -> Covariance:
    """The leading directions of S, and what they leave of its diagonal."""
    values, vectors = torch.linalg.eigh(second)
    factor = (vectors * values.clamp_min(0).sqrt())[:, -rank:].flip(1)
    return LowRankPlusDiagonal(factor, (second.diagonal() - factor.square().sum(1)).clamp_min(0), 1000)


@pytest.mark.parametrize("cores", [2, 3])
def test_data_never_harm_and_the_errors_are_told(cores: int) -> None:
    form, layer = TTLinear(cores), Layer("linear", 256, 512)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(512, 256, generator=generator)
    x = torch.randn(1000, 256, generator=generator, dtype=torch.float64) + 0.5
    moments = Full(x.T @ x / 1000, 1000)
    space = form.rank_space(layer, 1)
    assert len(space) > 4
    for seen in (Identity.of(weight), moments, sketch_of(moments.dense(), 64)):
        told = form.errors(layer, weight, space, seen)
        assert told[-1] == 0.0
        for ranks, estimate in list(zip(space, told, strict=True))[:-1:3]:
            found = form.reconstruct(layer, form.factorize(layer, weight, ranks, seen))
            assert estimate == pytest.approx(relative_error(weight, found, seen), abs=0.01)
            plain = form.reconstruct(layer, form.factorize(layer, weight, ranks, Identity.of(weight)))
            assert seen.is_identity or relative_error(weight, found, seen) <= relative_error(weight, plain, seen) + 1e-6


def test_a_rank_dearer_than_dense_is_not_proposed() -> None:
    assert TTLinear().rank_space(Layer("linear", 64, 64), 16) == [(64,)]
    large = TTLinear().rank_space(Layer("linear", 4096, 4096), 16)
    assert large[0] == (16,)
    assert large[-1] == TTLinear().exact_ranks(Layer("linear", 4096, 4096))
