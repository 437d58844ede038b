"""Samples that one pass may hold: fewer where the values between layers take much memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, fx

from tdcompile.data.nesting import tensors_in
from tdcompile.ir.modules import outputs_of
from tdcompile.ir.program import Program

_PASS_BYTES = 2**28  # of the largest value in one pass; a pass keeps about three such values
_ALL_BYTES = 2**27  # of all values of one pass, where all are kept: those of two models, before and after rounding


class Footprint(NamedTuple):
    """Bytes of the values that the modules of a network return for one sample: of the largest, and of all."""

    largest: int
    total: int


_known: WeakKeyDictionary[fx.GraphModule, Footprint] = WeakKeyDictionary()


def footprint(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Footprint:
    """Return what a graph keeps for one sample, from a run on inputs."""
    sizes = [max((x.nbytes for x in inputs), default=1)]
    hooks = [
        module.register_forward_hook(lambda _, __, value: sizes.append(sum(x.nbytes for x in tensors_in(value))))
        for module in graph.modules()
        if module is not graph
    ]
    try:
        outputs_of(graph, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    count = len(inputs[0]) if inputs and inputs[0].dim() else 1
    return Footprint(max(1, max(sizes) // max(count, 1)), max(1, sum(sizes) // max(count, 1)))


def samples_within(program: Program, most: int, *, kept: bool = False) -> int:
    """Return the number of samples to run in one pass, from 1 to ``most``.

    Args:
        program: the network.
        most: the number for a network of small values.
        kept: all values of the pass are kept, not only those that are still read.
    """
    if program.dense not in _known:
        _known[program.dense] = footprint(program.dense, program.inputs)
    each = _known[program.dense]
    return max(1, min(most, _ALL_BYTES // each.total if kept else _PASS_BYTES // each.largest))
