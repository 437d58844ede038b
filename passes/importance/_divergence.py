"""How far a network's answers are from others, on samples of the training part: what scores and probes measure."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdcompile.data.metrics import classified, logits
from tdcompile.data.task import Batch
from tdcompile.errors import InputError
from tdcompile.ir.program import Program


def drawn(program: Program, samples: int | None, purpose: str, who: str, batch: int = 128) -> list[Batch]:
    """Batches of training samples, as many as asked for or as calibration reads, drawn for a purpose.

    Raises:
        InputError: there are none.
    """
    train = program.task.train
    if train is None or len(train) == 0:
        raise InputError(f"{who} needs training samples: give data, or take 'relative-error' or 'none'")
    count = min(len(train), samples or program.task.calibrate)
    return list(train.shuffled(program.generator(purpose)).batches(batch, limit=count))


@torch.no_grad()
def answers(module: nn.Module, batches: Sequence[Batch]) -> list[Tensor]:
    """The scores of a network in eval mode, ``(N, classes)`` or of another shape, for each batch."""
    module.eval()
    return [logits(module(*batch.copies())) for batch in batches]


def divergence(wanted: Sequence[Tensor], given: Sequence[Tensor]) -> float:
    """Mean KL(wanted ‖ given) over samples for class scores; for other outputs the mean squared error over the energy.

    Raises:
        InputError: a NaN or an infinity among the answers.
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
