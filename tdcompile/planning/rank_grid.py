"""Ranks of a layer: candidates on a grid (``grid``, ``tied``, ``train_space``), and ranks for a share of the weights.

``ranks_for`` follows the approximation-error study, arXiv 2305.05318. Its text states compression as the share that is
*removed*, its appendix lists ranks by the share that is *kept*. Here a share is always the share that is kept.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right

from tdcompile.core.decomposition import Decomposition
from tdcompile.core.rank_space import tied
from tdcompile.errors import InputError
from tdcompile.ir.layer import Layer, Ranks


def weights_of(form: Decomposition, layer: Layer, ranks: Ranks) -> int:
    """How many weights the form has at these ranks; biases are not counted, for the dense layer has them too."""
    return sum(math.prod(part.weight_shape) for part in form.blueprint(layer, ranks))


def ranks_for(form: Decomposition, layer: Layer, kept: float) -> Ranks:
    """The ranks at which a form keeps a share of the layer's weights, as nearly as whole ranks do.

    All ranks are one share x of the exact ones. For CP, x P(exact) is the weights wanted, and for Tucker with full
    kernel modes x is the common share of T and C that solves the quadratic a x² + b x; rounded to the nearest, these
    are the ranks published for CP of four modes (``cp4``) and for Tucker. The published TT ranks follow no one rule, so
    this is our completion for them: one rank for all bonds (``tied``), that whose weights come nearest.

    Args:
        form: one that does not refuse the layer.
        layer: the dense one.
        kept: in (0, 1], of the dense weights. The ranks are at least 1 and at most the exact ones, so what they really
            keep (``weights_of``) may be more or less.

    Raises:
        InputError: the share is not in (0, 1].
    """
    if not 0.0 < kept <= 1.0:
        raise InputError(f"{kept:g} is no share of a layer's weights to keep: 0.25 keeps a quarter")
    wanted, exact = kept * math.prod(layer.weight_shape), form.exact_ranks(layer)
    if len(exact) > 1 and not (
        form.modes and all(form.modes)
    ):  # a bond that is of no unfolding (out or in) lies inside a train
        return _train(form, layer, exact, wanted)
    share = _share(form, layer, exact, wanted)
    return tuple(min(max(round(share * rank), 1), rank) for rank in exact)


def _share(form: Decomposition, layer: Layer, exact: Ranks, wanted: float) -> float:
    """The positive root of a x² + b x = wanted: a small layer lies between two ranks at most.

    a and b follow from the weights at x = 1 and x = 2; the root is written so that it bears a = 0.
    """
    once, twice = (weights_of(form, layer, tuple(times * rank for rank in exact)) for times in (1, 2))
    square, line = (twice - 2 * once) / 2, (4 * once - twice) / 2
    return 2 * wanted / (line + math.sqrt(line**2 + 4 * square * wanted))


def _train(form: Decomposition, layer: Layer, exact: Ranks, wanted: float) -> Ranks:
    """Of one rank for all bonds, each at most the exact one, that whose weights come nearest; of two the smaller."""

    def weights(rank: int) -> int:
        return weights_of(form, layer, tied(exact, rank))

    above = bisect_left(range(1, max(exact)), wanted, key=weights) + 1
    return tied(exact, min((max(above - 1, 1), above), key=lambda rank: abs(weights(rank) - wanted)))


def train_space(form: Decomposition, layer: Layer, grain: int, members: int) -> list[Ranks]:
    """Ranks of a tensor train, one for all bonds: multiples of the grain with fewer MACs than dense, and the exact.

    Args:
        members: how many there are at most beside the exact ranks.
    """
    exact = form.exact_ranks(layer)

    def macs(step: int) -> int:
        return form.macs(layer, tied(exact, step * grain))

    top = bisect_right(range(1, max(exact) // grain + 1), layer.macs - 1, key=macs)
    steps = sorted({math.ceil(top * i / members) for i in range(1, members + 1)} - {0})
    return [*dict.fromkeys(ranks for step in steps if (ranks := tied(exact, step * grain)) != exact), exact]
