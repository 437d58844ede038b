"""Automatic mixed precision: the autocast dtype of each ``Precision``, and where bf16 is faster than fp32."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdcompile.ir.modules import computed_by

Precision = Literal["fp32", "bf16", "fp16"]
AUTOCAST: dict[Precision, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def bf16_speedup(device: str) -> float:
    """Measure how many times faster a training step of a convolution is in bf16 than in fp32: 64 channels, 16×16.

    On one thread: several wait for the slowest, and a busy processor then decides the ratio.
    """
    from torch.utils.benchmark import Timer  # takes 0.2 s to import, and only the doctor needs it

    x = torch.randn(32, 64, 16, 16, device=device).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(64, 64, 3, 3, device=device).contiguous(memory_format=torch.channels_last).requires_grad_()

    def step(half: bool) -> None:
        with torch.autocast(device, torch.bfloat16, half):
            loss = F.conv2d(x, weight, padding=1).sum()
        torch.autograd.grad(loss, (x, weight))

    whole, half = (
        Timer("step(half)", globals={"step": step, "half": half}, num_threads=1)
        .blocked_autorange(min_run_time=0.1)
        .median
        for half in (False, True)
    )
    return float(whole / half)


def strided_depthwise_in_fp32(
    network: nn.Module, precision: Precision, device: torch.device
) -> AbstractContextManager[None]:
    """Compute strided depthwise convolutions in fp32 for a while, if a network trains in bf16 on a CPU.

    Their gradient takes 7 to 15 times as long in bf16 as in fp32 (torch 2.13, AVX-512 BF16). In a ResNet-20 of CP
    layers, two such convolutions took a fifth of a step.
    """
    slow = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1 != max(m.stride)]
    if precision != "bf16" or device.type != "cpu":
        slow = []
    return computed_by(_in_fp32, slow)


def _in_fp32(module: nn.Conv2d, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return nn.Conv2d.forward(module, x.float())
