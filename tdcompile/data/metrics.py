"""Accuracy of a network on samples, and the class scores behind it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from tdcompile.data.task import Samples
from tdcompile.support.heap import keep_freed_memory


@torch.no_grad()
@keep_freed_memory()
def accuracy(module: nn.Module, samples: Samples | None, limit: int | None = None) -> float | None:
    """Return top-1 accuracy in [0, 1], or None without samples or labels.

    The module runs in eval mode; its mode is restored.
    """
    if samples is None or samples.classes is None or len(samples) == 0:
        return None
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    training, right, seen = module.training, 0, 0
    module.eval()
    for batch in samples.batches(limit=limit):
        assert batch.labels is not None  # labels exist, because ``classes`` is set
        scores = logits(module(*(x.to(device) for x in batch.inputs)))
        right += int((scores.argmax(1).cpu() == batch.labels).sum())
        seen += len(batch.labels)
    module.train(training)
    return right / seen


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
