"""``Sums``: least squares from running sums; fits an affine map from a layer's inputs to target outputs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tdcompile.numerics.inner_products import inner_products


@dataclass
class Sums:
    """Running sums of inputs z, ``(n, d)``, and targets t, ``(n, m)``, in float64.

    Attributes:
        affine: fit an intercept. False fits a linear map, and second moments are about the origin, not the means.
        rows: number of rows.
        count: sum of the rows' weights, equal to ``rows`` without weights.
    """

    affine: bool = True
    rows: int = 0
    count: float = 0
    inner: Tensor = field(default_factory=lambda: torch.zeros(()))
    cross: Tensor = field(default_factory=lambda: torch.zeros(()))
    z: Tensor = field(default_factory=lambda: torch.zeros(()))
    t: Tensor = field(default_factory=lambda: torch.zeros(()))
    squares: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, z: Tensor, t: Tensor, weights: Tensor | None = None) -> None:
        """Add rows of inputs z and targets t; ``weights``, ``(n,)``, scale their squared errors."""
        self.rows += len(z)
        if weights is not None:
            self.count += float(weights.sum())
            self.z = self.z + (weights.double() @ z.double())
            self.t = self.t + (weights.double() @ t.double())
            z, t = z * weights.sqrt()[:, None], t * weights.sqrt()[:, None]
        else:
            self.count += len(z)
            self.z, self.t = self.z + z.double().sum(0), self.t + t.double().sum(0)
        self.inner = self.inner + inner_products(z).double()
        self.cross = self.cross + (t.T @ z).double()
        self.squares = self.squares + t.double().square().sum(0)

    @property
    def spread(self) -> float:
        """Return the variance of the targets, summed over the outputs."""
        return max(float((self.squares / self.count - (self.t / self.count).square()).sum()), 1e-30)

    def covariances(self) -> tuple[Tensor, Tensor]:
        """Return the covariance of z, ``(d, d)``, and of t with z, ``(m, d)``; second moments without an intercept."""
        n = self.count
        if not self.affine:
            return self.inner / n, self.cross / n
        return self.inner / n - self.z.outer(self.z) / n**2, self.cross / n - self.t.outer(self.z) / n**2

    def fit(self, prior: Tensor, ridge: float) -> Tensor:
        """Return M, ``(m, d)``: min E‖t − t̄ − M (z − z̄)‖² + ridge·s·‖M − prior‖², with s the mean variance of z."""
        own, cross = self.covariances()
        weight = ridge * float(own.diagonal().mean().clamp_min(torch.finfo(own.dtype).tiny ** 0.5))
        system = own + weight * torch.eye(len(own), dtype=own.dtype, device=own.device)
        found: Tensor = torch.linalg.solve(system, (cross + weight * prior.double()).T).T
        return found

    def intercept(self, slope: Tensor) -> Tensor:
        """Return b, ``(m,)``, so that M z + b has the mean of the targets; 0 without an intercept."""
        if not self.affine:
            return torch.zeros_like(self.t)
        b: Tensor = (self.t - slope.double() @ self.z) / self.count
        return b

    def losses(self, slope: Tensor, bias: Tensor) -> Tensor:
        """Return the mean of (t − M z − b)² over the rows for each output, ``(m,)``."""
        M, b = slope.double(), bias.double()
        fitted = ((M @ self.inner) * M).sum(1) + self.count * b.square() + 2 * b * (M @ self.z)
        across = (M * self.cross).sum(1) + b * self.t
        return ((self.squares - 2 * across + fitted) / self.count).clamp_min(0.0)

    def loss(self, slope: Tensor, bias: Tensor) -> float:
        """Return the mean of ‖t − M z − b‖² over the rows."""
        return float(self.losses(slope, bias).sum())
