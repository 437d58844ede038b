"""Error-preserving correction: a CP of lower sensitivity at nearly the same error (Phan et al. 2020).

It is apart from the fit in ``cp`` because it starts from any CP, however that was found.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tdcompile.numerics.cp import balanced, cp_compose

# Upper bound on passes over the modes; earlier stop once a pass lowers the sensitivity by less than this share.
CYCLES, SETTLED = 50, 0.01
# Halvings of the interval for the logarithm of a step's ridge: 60 reach the precision of float64.
HALVINGS = 60


def sensitivity(factors: Sequence[Tensor]) -> float:
    """Return the sensitivity Σ_n I_n Σ_r Π_{m≠n} ‖a_r^(m)‖² of Phan et al. 2020, for any number of modes.

    Suppose noise of variance σ² is added to every entry of the factors ``(I_n, rank)``. To first order, the expected
    squared change of the tensor is σ² times the sensitivity.
    """
    squares = torch.stack([factor.square().sum(0) for factor in factors])
    modes = range(len(factors))
    return sum(len(factors[n]) * float(squares[[m for m in modes if m != n]].prod(0).sum()) for n in modes)


def allowed(error: float, growth: float) -> float:
    """Return the relative error at which the noise-to-signal ratio e² / (1 − e²) is ``growth``² times as large.

    For a small error this is ``growth`` times the error, and never more. It stays below 1, at which a CP of zeros would
    be the least sensitive (this project's completion; the paper bounds the error itself).
    """
    return growth * error / math.sqrt(1 + (growth**2 - 1) * min(error, 1.0) ** 2)


@torch.no_grad()
def correct(tensor: Tensor, factors: Sequence[Tensor], bound: float, cycles: int = CYCLES) -> list[Tensor]:
    """Return a CP of lower sensitivity whose relative error is at most ``bound``, or the given one, balanced.

    Mode by mode, ``bounded`` finds the factor that minimises the sensitivity under the bound exactly. Between steps the
    norm of each component is split over the modes in proportion to √I_n, which is the least sensitive split. The
    returned factors have equal norms; their sensitivity is a constant times that one, and so falls with it.

    Args:
        tensor: ``(I_1, I_2, ...)``.
        factors: ``(I_n, rank)``, float64.
        bound: upper bound on the relative error.
        cycles: upper bound on the passes over all modes.
    """
    tensor = tensor.double()
    energy = float(tensor.square().sum())
    best = balanced(factors)
    least, found = sensitivity(best), best
    for _ in range(cycles):
        for mode in range(tensor.ndim):
            found = _spread(found)
            gram = torch.stack([f.T @ f for n, f in enumerate(found) if n != mode]).prod(0)
            product, weights = _contracted(tensor, found, mode), mode_weights(found, mode)
            step = bounded(product, gram, weights, energy, bound**2 * energy)
            found[mode] = found[mode] if step is None else step
        found = balanced(found)
        error, now = float((tensor - cp_compose(found)).norm()), sensitivity(found)
        if error > bound * math.sqrt(energy) * (1 + 1e-9) or now >= least:  # allow round-off
            break
        best, gained, least = found, 1 - now / least, now
        if gained < SETTLED:
            break
    return best


def bounded(product: Tensor, gram: Tensor, weights: Tensor, energy: float, bound: float) -> Tensor | None:
    """Return the X that minimises Σ_r w_r ‖x_r‖² subject to ``energy`` − 2⟨X, P⟩ + ⟨X, X G⟩ ≤ ``bound``, or None.

    With P = T_(n) Z and G = Zᵀ Z this is the residual of T_(n) ≈ X Zᵀ. The minimiser is the ridge solution
    X(l) = P (G + l W)⁻¹ with the residual at its bound. The residual rises with l, so that bisection finds l. In the
    eigenvectors of W^-½ G W^-½, each trial is a sum over the rank.

    Args:
        product: P, ``(I, rank)``.
        gram: G, ``(rank, rank)``.
        weights: w, ``(rank,)``.
        energy, bound: squared norms; the bound is below the energy.
    """
    tiny = torch.finfo(gram.dtype).tiny ** 0.5
    scale = weights.clamp_min(float(weights.max()) * torch.finfo(gram.dtype).eps + tiny).rsqrt()
    values, vectors = torch.linalg.eigh(scale[:, None] * gram * scale)
    turned = (product * scale) @ vectors
    seen = values > values[-1] * len(values) * torch.finfo(gram.dtype).eps + tiny
    values, vectors, turned = values[seen], vectors[:, seen], turned[:, seen]
    explained = turned.square().sum(0) / values
    slack = bound - (energy - float(explained.sum()))
    if not 0 < slack < float(explained.sum()):
        return None

    # A trial is a short sum: numpy calls cost a fifth of torch's.
    shares, squares = explained.cpu().numpy(), values.cpu().numpy()

    def loss(log: float) -> float:
        return float((shares * (math.exp(log) / (squares + math.exp(log))) ** 2).sum())

    low, high = math.log(float(values[0])) - 40, math.log(float(values[-1]))
    while loss(high) < slack:
        high += 1
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if loss(middle) <= slack else (low, middle)
    found: Tensor = (turned / (values + math.exp(low))) @ vectors.T * scale
    return found


def mode_weights(factors: Sequence[Tensor], mode: int) -> Tensor:
    """Return w, ``(rank,)``: Σ_r w_r ‖a_r^(n)‖² is the part of the sensitivity that depends on the factor of mode n."""
    squares = torch.stack([factor.square().sum(0) for factor in factors])
    others = [n for n in range(len(factors)) if n != mode]
    parts = [len(factors[n]) * squares[[m for m in others if m != n]].prod(0) for n in others]
    return torch.stack(parts).sum(0)


def _contracted(tensor: Tensor, factors: Sequence[Tensor], mode: int) -> Tensor:
    """Return the tensor times the factors of all other modes, ``(I_n, rank)``; the longest first, to save memory."""
    others = sorted((n for n in range(tensor.ndim) if n != mode), key=lambda n: len(factors[n]), reverse=True)
    first, *rest = others
    product: Tensor = torch.tensordot(
        tensor, factors[first], dims=([first], [0])
    )  # axes: the other modes in order, then the rank
    left = [n for n in range(tensor.ndim) if n != first]
    for n in rest:
        place = left.index(n)
        product = (product.movedim(place, -2) * factors[n]).sum(-2)
        left.remove(n)
    return product


def _spread(factors: Sequence[Tensor]) -> list[Tensor]:
    """Return the same CP with ‖a_r^(n)‖² in proportion to I_n, which minimises its sensitivity."""
    sizes = [len(factor) for factor in factors]
    mean = math.exp(sum(map(math.log, sizes)) / len(sizes))
    return [factor * math.sqrt(size / mean) for factor, size in zip(balanced(factors), sizes, strict=True)]
