"""Ranks of a layer: candidates on a grid (``grid``, ``tied``, ``train_space``), and ranks for a share of the weights.

``ranks_for`` follows the approximation-error study, arXiv 2305.05318. Its text states compression as the share that is
*removed*; its appendix lists ranks by the share that is *kept*. In this module a share is always the kept share.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right

from tdcompile.core.decomposition import Decomposition
from tdcompile.core.rank_space import tied
from tdcompile.errors import InputError
from tdcompile.ir.layer import Layer, Ranks


def weights_of(form: Decomposition, layer: Layer, ranks: Ranks) -> int:
    """Return the number of weights of the form at these ranks; biases are not counted, the dense layer has them too."""
    return sum(math.prod(part.weight_shape) for part in form.blueprint(layer, ranks))


def ranks_for(form: Decomposition, layer: Layer, kept: float) -> Ranks:
    """Return the ranks at which a form keeps a share of the layer's weights, as nearly as whole ranks can.

    All ranks are one share x of the exact ones. For CP, x P(exact) equals the wanted weights. For Tucker with full
    kernel modes, x is the common share of T and C that solves the quadratic a x² + b x. Rounded to the nearest, these
    are the published ranks of four-mode CP (``cp4``) and Tucker. The published TT ranks follow no single rule. Our
    completion for them: one rank for all internal ranks (``tied``), the one whose weights come nearest.

    Args:
        form: a decomposition that accepts the layer.
        layer: the dense layer.
        kept: share of the dense weights, in (0, 1]. The ranks are at least 1 and at most the exact ones, so the
            share that they really keep (``weights_of``) may differ.

    Raises:
        InputError: the share is not in (0, 1].
    """
    if not 0.0 < kept <= 1.0:
        raise InputError(f"{kept:g} is no share of a layer's weights to keep: 0.25 keeps a quarter")
    wanted, exact = kept * math.prod(layer.weight_shape), form.exact_ranks(layer)
    if len(exact) > 1 and not (
        form.modes and all(form.modes)
    ):  # a rank of no unfolding (out or in) lies inside a train
        return _train(form, layer, exact, wanted)
    share = _share(form, layer, exact, wanted)
    return tuple(min(max(round(share * rank), 1), rank) for rank in exact)


def _share(form: Decomposition, layer: Layer, exact: Ranks, wanted: float) -> float:
    """Return the positive root of a x² + b x = wanted.

    a and b follow from the weights at x = 1 and x = 2. The formula of the root also holds for a = 0.
    """
    once, twice = (weights_of(form, layer, tuple(times * rank for rank in exact)) for times in (1, 2))
    square, line = (twice - 2 * once) / 2, (4 * once - twice) / 2
    return 2 * wanted / (line + math.sqrt(line**2 + 4 * square * wanted))


def _train(form: Decomposition, layer: Layer, exact: Ranks, wanted: float) -> Ranks:
    """Return the tied ranks whose weights come nearest; the smaller ones if two are equally near."""

    def weights(rank: int) -> int:
        return weights_of(form, layer, tied(exact, rank))

    above = bisect_left(range(1, max(exact)), wanted, key=weights) + 1
    return tied(exact, min((max(above - 1, 1), above), key=lambda rank: abs(weights(rank) - wanted)))


def train_space(form: Decomposition, layer: Layer, grain: int, members: int) -> list[Ranks]:
    """Return tied ranks of a tensor train: multiples of the grain with fewer MACs than dense, and the exact ranks.

    Args:
        members: maximum number of ranks beside the exact ones.
    """
    exact = form.exact_ranks(layer)

    def macs(step: int) -> int:
        return form.macs(layer, tied(exact, step * grain))

    top = bisect_right(range(1, max(exact) // grain + 1), layer.macs - 1, key=macs)
    steps = sorted({math.ceil(top * i / members) for i in range(1, members + 1)} - {0})
    return [*dict.fromkeys(ranks for step in steps if (ranks := tied(exact, step * grain)) != exact), exact]
