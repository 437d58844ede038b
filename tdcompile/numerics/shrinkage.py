"""How far a second moment of few samples is to be shrunk toward a multiple of the identity."""

from __future__ import annotations

import math

from tdcompile.numerics.covariance import Covariance


def oas_share(covariance: Covariance, samples: int) -> float:
    """Return the share of the identity that oracle approximating shrinkage gives (Chen, Wiesel, Eldar, Hero 2010).

    Their equation 23 for Gaussian rows of mean 0. Rows of one sample, the patches of an image or the tokens of a text,
    are alike: the number of independent rows lies between that of the samples and that of the rows. The geometric mean
    of both is taken, which of the three gave the least error on held-out images (``benchmarks/few_samples.py``).

    Args:
        covariance: a second moment with its number of rows; of a grouped layer, the mean over the groups counts.
        samples: the number of samples that the rows come from, at most that of the rows.

    Returns:
        A share in [0, 1]; 0 without data.
    """
    rows, inputs = covariance.samples, len(covariance)
    if covariance.is_identity or rows < 1 or inputs < 2:
        return 0.0
    independent = math.sqrt(rows * max(samples, 1))
    shares = [_share(covariance.of_group(place), independent) for place in range(covariance.groups)]
    return sum(shares) / len(shares)


def _share(covariance: Covariance, rows: float) -> float:
    inputs = len(covariance)
    trace, squares = float(covariance.diagonal().sum()), covariance.squared_norm()
    spread = squares - trace**2 / inputs
    if trace <= 0.0 or spread <= 0.0:  # no input, or a multiple of I already
        return 0.0
    share = ((1 - 2 / inputs) * squares + trace**2) / ((rows + 1 - 2 / inputs) * spread)
    return min(share, 1.0)
