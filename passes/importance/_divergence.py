"""The divergence between the outputs of two networks on training samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdcompile.data.class_scores import classified, logits
from tdcompile.data.task import Batch
from tdcompile.errors import InputError
from tdcompile.ir.program import Program


def drawn(program: Program, samples: int | None, purpose: str, who: str, batch: int = 128) -> list[Batch]:
    """Draw batches of training samples.

    Args:
        samples: number of samples; by default as many as calibration reads.
        purpose: seeds the draw together with the seed of the program.
        who: names the caller in messages.

    Raises:
        InputError: there are no training samples.
    """
    train = program.task.train
    if train is None or len(train) == 0:
        raise InputError(f"{who} needs training samples: give data, or take 'relative-error' or 'none'")
    count = min(len(train), samples or program.task.calibrate)
    return list(train.shuffled(program.generator(purpose)).batches(batch, limit=count))


@torch.no_grad()
def answers(module: nn.Module, batches: Sequence[Batch]) -> list[Tensor]:
    """Return the network's output in eval mode for each batch: ``(N, classes)`` or another shape."""
    module.eval()
    return [logits(module(*batch.copies())) for batch in batches]


def divergence(wanted: Sequence[Tensor], given: Sequence[Tensor]) -> float:
    """Return the mean KL(wanted ‖ given) for class scores, or the squared error over the energy for other outputs.

    Raises:
        InputError: an output holds NaN or Inf.
    """
    lost, whole, count = 0.0, 0.0, 0
    for a, b in zip(wanted, given, strict=True):
        if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise InputError("NaN or Inf appears in the network's output on the training samples")
        if classified(a):
            lost += float(
                F.kl_div(b.double().log_softmax(1), a.double().log_softmax(1), reduction="sum", log_target=True)
            )
            count += len(a)
        else:
            lost += float((a.double() - b.double()).square().sum())
            whole += float(a.double().square().sum())
    return lost / count if count else lost / max(whole, 1e-30)
