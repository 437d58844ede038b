"""Class scores in the output of a network: where they are, and whether an output holds them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor


def logits(output: object) -> Tensor:
    """Return the class scores of a network's output: the tensor, or the first tensor of a sequence or mapping."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output
    assert isinstance(values, Iterable)  # a network returns tensors, or a nesting of them
    return logits(next(iter(values)))


def classified(output: Tensor) -> bool:
    """Return whether an output has the shape of class scores, ``(N, classes)``."""
    return output.dim() == 2 and output.shape[1] > 1
