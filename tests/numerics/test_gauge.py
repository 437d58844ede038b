"""Gauges: rotations are orthogonal and even, and the noise of rounding falls to its lower bound."""

import pytest
import torch

from tdcompile.numerics.gauge import channel_gauge, rotation, spreading_gauge


@pytest.mark.parametrize("order", [1, 2, 3, 5, 7, 8, 12, 20, 24, 40, 48, 92, 100])
def test_a_rotation_is_orthogonal_and_even_where_a_hadamard_matrix_is_known(order):
    made = rotation(order, torch.Generator().manual_seed(0))
    torch.testing.assert_close(made @ made.T, torch.eye(order, dtype=torch.float64))
    even = bool((made.abs() - order**-0.5).abs().max() < 1e-12)
    assert even == (order in (1, 2, 8, 12, 20, 24, 40, 48))  # 92 and 100 need other constructions than these


def test_the_noise_is_the_least_that_any_gauge_reaches():
    draw = torch.Generator().manual_seed(1)
    root, reader = torch.randn(16, 16, generator=draw).double(), torch.randn(40, 16, generator=draw).double()
    root *= torch.logspace(0, -2, 16, dtype=torch.float64)
    moment, gram = root @ root.T, reader.T @ reader

    def noise(gauge):
        """Return the noise power of a quantiser whose range is proportional to the largest root mean square."""
        inverse = torch.linalg.inv(gauge)
        return float((gauge @ moment @ gauge.T).diagonal().max() * torch.trace(gram @ inverse @ inverse.T))

    least = noise(spreading_gauge(moment, gram, draw))
    singular = torch.linalg.svdvals(reader @ torch.linalg.cholesky(moment))
    assert least == pytest.approx(float(singular.sum()) ** 2 / 16, rel=1e-3)
    assert least < 0.6 * noise(torch.eye(16, dtype=torch.float64))
    for _ in range(20):
        assert noise(torch.randn(16, 16, generator=draw).double()) > least


def test_a_singular_moment_gives_a_gauge_that_can_be_inverted():
    moment = torch.diag(torch.tensor([1.0, 0.1, 0.0, 0.0]))
    made = spreading_gauge(moment, torch.eye(4), torch.Generator().manual_seed(0))
    assert float(torch.linalg.cond(made)) < 1e4
    assert torch.isfinite(spreading_gauge(torch.zeros(3, 3), torch.zeros(3, 3), torch.Generator())).all()


def test_dead_channels_keep_their_scale():
    torch.testing.assert_close(channel_gauge(torch.zeros(2), torch.zeros(2)), torch.ones(2).double())
    made = channel_gauge(torch.tensor([0.0, 0.0, 0.0]), torch.tensor([10.0, 1e-9, 0.0]))
    torch.testing.assert_close(made, torch.tensor([0.1, 1e3, 1.0]).double(), rtol=1e-5, atol=0)
