"""What is alive at once while a large linear layer is factorised, counted tensor by tensor."""

import weakref
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tdcompile.core.decomposition import Decomposition
from tdcompile.ir.layer import Layer
from tdcompile.numerics.covariance import Identity, LowRankPlusDiagonal
from tdcompile.numerics.nystrom import NystromSketch
from tdcompile.passes.analyze.calibrate import Calibrate
from tdcompile.passes.decompose.svd import SVD
from tdcompile.passes.decompose.tt_linear import TTLinear

WIDE, TALL = Layer("linear", 8192, 2048), Layer("linear", 1024, 16384)
VGG = Layer("linear", 25088, 4096)  # VGG-16's first linear layer: its moment matrix would take 2.5 GB in float32
GIGABYTE = 1e9


class Alive(TorchDispatchMode):
    """Bytes of all tensors that operations have made and that are still there, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.users: Counter[int] = Counter()
        self.now = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes():
                place, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
                if place in self.users or place not in given:  # not a view of what was there before
                    self.now += 0 if self.users[place] else size
                    self.users[place] += 1
                    weakref.finalize(tensor, self.gone, place, size)
        self.most = max(self.most, self.now)
        return made

    def gone(self, place: int, size: int) -> None:
        self.users[place] -= 1
        if not self.users[place]:
            del self.users[place]
            self.now -= size


def peak(work: Callable[[], object]) -> int:
    alive = Alive()
    with alive:
        work()
    return alive.most


def test_the_count_is_right() -> None:
    x = torch.zeros(1000)

    def work() -> None:
        y = x + 1  # 4 kB
        z = y.reshape(10, 100) * 2  # 8 kB
        del y
        z = z.double()  # 12 kB
        z.add_(1)

    assert peak(work) == 12000


@pytest.mark.parametrize("data", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "sketch"])
@pytest.mark.parametrize(
    ("form", "layer", "ranks"),
    [(SVD(), WIDE, (256,)), (SVD(), TALL, (256,)), (TTLinear(), WIDE, (64,)), (TTLinear(), TALL, (64,))],
    ids=["svd, wide", "svd, tall", "tt-linear, wide", "tt-linear, tall"],
)
def test_beside_the_weight_there_is_less_than_twice_as_much(
    form: Decomposition, layer: Layer, ranks: tuple[int, ...], data: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(layer.weight_shape, generator=generator)
    inputs = layer.in_channels
    factor = torch.randn(inputs, 64, generator=generator)
    moments = LowRankPlusDiagonal(factor, torch.ones(inputs), 64) if data else Identity(inputs)
    own = weight.numel() * weight.element_size()
    assert peak(lambda: form.factorize(layer, weight, ranks, moments)) < 2 * own
    assert peak(lambda: form.errors(layer, weight, [ranks, form.exact_ranks(layer)], moments)) < 2 * own


def test_a_sketch_of_vgg16s_widest_layer_takes_less_than_a_gigabyte() -> None:
    generator, made = torch.Generator().manual_seed(0), []
    batches = [torch.rand(Calibrate.batch, VGG.in_channels, generator=generator) for _ in range(2)]

    def work() -> None:
        gathered = NystromSketch(VGG.in_channels, Calibrate.sketch, generator)
        for batch in batches:
            gathered.add(batch)
        made.append(gathered.result())

    least = 2 * 8 * VGG.in_channels * Calibrate.sketch  # the probes and their sums, or this counts nothing
    assert least < peak(work) < GIGABYTE
    squares = torch.stack([batch.double().square().mean(0) for batch in batches]).mean(0)
    torch.testing.assert_close(made[0].diagonal().double(), squares, rtol=1e-4, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("data", [False, True], ids=["plain", "sketch"])
@pytest.mark.parametrize(("form", "ranks"), [(SVD(), (512,)), (TTLinear(), (128,))], ids=["svd", "tt-linear"])
def test_vgg16s_widest_layer_is_factorised_in_less_than_a_gigabyte_beside_it(
    form: Decomposition, ranks: tuple[int, ...], data: bool
) -> None:
    generator, inputs = torch.Generator().manual_seed(0), VGG.in_channels
    weight = torch.randn(VGG.weight_shape, generator=generator)
    factor = torch.randn(inputs, Calibrate.sketch, generator=generator) if data else None
    moments = Identity(inputs) if factor is None else LowRankPlusDiagonal(factor, torch.ones(inputs), 1024)
    assert peak(lambda: form.factorize(VGG, weight, ranks, moments)) < GIGABYTE
    assert peak(lambda: form.errors(VGG, weight, [ranks, form.exact_ranks(VGG)], moments)) < GIGABYTE
