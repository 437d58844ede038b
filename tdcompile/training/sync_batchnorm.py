"""Batch norm over the whole batch while several processes train, on a CPU too."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tdcompile.ir.modules import computed_by
from tdcompile.training.distributed import count


def synchronized_batchnorm(network: nn.Module) -> AbstractContextManager[None]:
    """Normalise over all processes' shares of a batch for a while, in batch norm that is in training mode.

    ``torch.nn.SyncBatchNorm`` does so on GPUs only. Classes that override ``forward`` are not changed, and nothing is
    in a single process. Module types and state-dict keys stay.
    """
    found = [part for part in network.modules() if isinstance(part, _BatchNorm)] if count() > 1 else []
    norms = [part for part in found if type(part).forward is _BatchNorm.forward and "forward" not in vars(part)]
    return computed_by(_normalised, norms)


def _normalised(module: _BatchNorm, x: Tensor) -> Tensor:
    """Normalise ``(N, C, ...)`` over N and the axes after C of all processes, in at least fp32; N may differ."""
    if not module.training:
        return _BatchNorm.forward(module, x)
    module._check_input_dim(x)  # type: ignore[no-untyped-call]
    axes, shape = [axis for axis in range(x.dim()) if axis != 1], (1, -1, *(1 for _ in x.shape[2:]))
    with torch.autocast(x.device.type, enabled=False):
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        sums = _sum_over_processes(torch.cat((values.sum(axes), values.new_tensor([x.numel() / x.shape[1]]))))
        mean, size = sums[:-1] / sums[-1], sums[-1].detach()
        centred = values - mean.view(shape)  # before squaring, which cancels for values far from 0
        variance = _sum_over_processes(centred.square().sum(axes)) / size
        _track(module, mean.detach(), variance.detach() * size / (size - 1))
        scale = (variance + module.eps).rsqrt()
        if module.weight is not None:
            scale = scale * module.weight
        made = centred * scale.view(shape)
        if module.bias is not None:
            made = made + module.bias.view(shape)
    return made.to(x.dtype)


@torch.no_grad()
def _track(module: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    """Update the running statistics, the variance unbiased, as torch does."""
    if module.running_mean is None or module.running_var is None or module.num_batches_tracked is None:
        return
    module.num_batches_tracked.add_(1)
    share = 1.0 / float(module.num_batches_tracked) if module.momentum is None else module.momentum
    for kept, new in ((module.running_mean, mean), (module.running_var, variance)):
        kept.lerp_(new.to(kept.dtype), share)


def _sum_over_processes(x: Tensor) -> Tensor:
    total: Tensor = _Sum.apply(x)  # type: ignore[no-untyped-call]
    return total


class _Sum(torch.autograd.Function):
    """Sum over all processes; each has its own loss, and the gradient is that of the sum of the losses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _sum_over_processes(gradients[0])
