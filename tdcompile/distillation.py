"""``Distillation``: the loss of tuning, which learns from the dense network and from labels where there are any."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdcompile.task import Batch, logits


class Distillation(nn.Module):
    """The loss: maps the compressed network's scores ``(N, classes, ...)`` and their batch to a scalar."""

    def __init__(self, teacher: nn.Module, temperature: float, labels: float) -> None:
        super().__init__()
        self.teacher = teacher.eval().requires_grad_(False)
        self.temperature, self.labels = temperature, labels

    def forward(self, scores: Tensor, batch: Batch) -> Tensor:
        """(1 - labels) · T² · KL + labels · cross-entropy; a mean squared error where the scores are no classes."""
        with torch.no_grad():
            wanted = logits(self.teacher(*batch.inputs))
        if scores.ndim < 2 or scores.shape[1] < 2:
            return F.mse_loss(scores, wanted)
        soft, target = ((x / self.temperature).log_softmax(1) for x in (scores, wanted))
        loss = F.kl_div(soft, target, reduction="batchmean", log_target=True) * self.temperature**2
        if self.labels and batch.labels is not None:
            loss = (1 - self.labels) * loss + self.labels * F.cross_entropy(scores, batch.labels)
        return loss
