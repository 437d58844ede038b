"""Class scores in the output of a network: where they are, and whether an output holds them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

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


def of_tokens(inputs: Sequence[Tensor], output: Tensor) -> bool:
    """Return whether an output holds the scores of a language model, ``(N, L, V)``: a class for each of V tokens.

    The network then reads whole numbers ``(N, L)``, all below V. Hidden states of an encoder are narrower than its
    vocabulary.
    """
    numbers = [x for x in inputs if not x.is_floating_point() and not x.is_complex()]
    scores = output.dim() == 3 and output.is_floating_point() and output.shape[2] > 1
    return bool(scores and numbers) and all(
        x.dim() == 2 and x.numel() > 0 and int(x.min()) >= 0 and int(x.max()) < output.shape[2] for x in numbers
    )
