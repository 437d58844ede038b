"""Gauges: invertible matrices between two linear maps that leave their product and lower the noise of rounding.

For z = A x and y = B z every invertible G gives y = (B G⁻¹)(G A) x. A quantiser with one step D for all channels of G z
adds noise of power D² / 12 · tr(M G⁻¹ G⁻ᵀ) to y, with M = Bᵀ B, and D is proportional to the range of G z.
"""

from __future__ import annotations

import torch
from scipy.fft import dct
from scipy.linalg import hadamard
from sympy import isprime
from torch import Tensor

# Smallest eigenvalue of a second moment relative to the mean: directions without energy would make G ill-conditioned.
_FLOOR = 1e-6
# Smallest largest value of a channel relative to the largest of all: a channel that is nearly dead in the samples would
# be scaled up without limit.
_DEAD = 1e-4


def rotation(order: int, generator: torch.Generator) -> Tensor:
    """Return an orthogonal matrix in float64 that spreads each direction evenly over the channels.

    It is a Hadamard matrix by Sylvester's or Paley's construction where one has the order, otherwise a DCT-II whose
    columns have random signs.

    >>> rotation(12, torch.Generator()).abs().unique(dim=0).unique().numel()
    1
    """
    for factor in (2**power for power in range(order.bit_length())):
        rest, left = divmod(order, factor)
        if left:
            break
        paley = _paley(rest)
        if paley is not None:
            doubled = torch.from_numpy(hadamard(factor, dtype=float))
            spread: Tensor = torch.kron(doubled, paley) / order**0.5
            return spread
    signs = torch.randint(2, (order,), generator=generator).double() * 2 - 1
    cosines: Tensor = torch.from_numpy(dct(torch.eye(order, dtype=torch.float64).numpy(), axis=0, norm="ortho"))
    return cosines * signs


def _paley(order: int) -> Tensor | None:
    """Return the Hadamard matrix of order q + 1 for a prime q = 3 mod 4; also those of orders 1 and 2."""
    if order <= 2:
        return torch.from_numpy(hadamard(order, dtype=float))
    prime = order - 1
    if prime % 4 != 3 or not isprime(prime):
        return None
    places = torch.arange(prime)
    squares = torch.full((prime,), -1.0, dtype=torch.float64)
    squares[places**2 % prime] = 1.0
    squares[0] = 0.0
    made = torch.ones(order, order, dtype=torch.float64)
    made[1:, 1:] = squares[(places[:, None] - places) % prime] + torch.eye(prime, dtype=torch.float64)
    made[1:, 0] = -1.0
    return made


def spreading_gauge(moment: Tensor, gram: Tensor, generator: torch.Generator) -> Tensor:
    """Return the gauge of least noise for a latent whose range is proportional to its root mean square.

    It is Q T^(1/2) V^(-1/2) with T = (V^(1/2) M V^(1/2))^(1/2): the square-root split of the SVD in the metric of the
    samples, then the rotation Q that gives all channels about the same power.

    Args:
        moment: V, the second moment E[z zᵀ] of the latent, ``(r, r)``.
        gram: M, the Gram matrix of what reads the latent, ``(r, r)``.
        generator: draws the signs where no Hadamard matrix is known.
    """
    root, inverse = _roots(moment.double())
    values, vectors = torch.linalg.eigh(root @ gram.double() @ root)
    floor = _FLOOR * values.mean().clamp(min=torch.finfo(torch.float64).tiny)
    fourth = values.clamp(min=floor) ** 0.25  # T^(1/2), and T is a root already
    gauge: Tensor = rotation(len(moment), generator) @ (fourth[:, None] * vectors.T) @ inverse
    return gauge


def _roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the square root of a positive semidefinite matrix and the inverse of that root."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp(min=_FLOOR * values.mean().clamp(min=torch.finfo(torch.float64).tiny)).sqrt()
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T


def channel_gauge(low: Tensor, high: Tensor) -> Tensor:
    """Return the factor d of each channel that gives all channels the largest magnitude 1, at a positive value.

    d = 1 / max |z| is optimal among diagonal gauges for every reader. The sign shortens the range of an unsigned
    quantiser, whose zero point is free.

    Args:
        low, high: least and largest value of each channel, ``(r,)``.

    >>> channel_gauge(torch.tensor([-4.0, -1.0, 0.0]), torch.tensor([2.0, 2.0, 0.0]))
    tensor([-0.2500,  0.5000,  1.0000], dtype=torch.float64)
    """
    low, high = low.double(), high.double()
    largest = torch.maximum(-low, high)
    top = float(largest.max()) if len(largest) else 0.0
    if not top > 0:
        return torch.ones_like(largest)
    scale = torch.where(largest > 0, largest.clamp(min=_DEAD * top).reciprocal(), 1.0)
    return torch.where(-low > high, -scale, scale)
