"""Top-1 accuracy of a PyTorch network on samples."""

from __future__ import annotations

import torch
from torch import nn

from tdcompile.data.class_scores import logits
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
        assert batch.targets is not None  # labels exist, because ``classes`` is set
        scores = logits(module(*(x.to(device) for x in batch.inputs)))
        right += int((scores.argmax(1).cpu() == batch.targets).sum())
        seen += len(batch.targets)
    module.train(training)
    return right / seen
