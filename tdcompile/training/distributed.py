"""One command in several processes (``torchrun``, ``accelerate launch``): the first decides and writes, all train."""

from __future__ import annotations

import atexit
import functools
import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed
from accelerate.state import PartialState
from torch import Tensor

from tdcompile.errors import TdcompileError

T = TypeVar("T")

_PATIENCE = timedelta(days=7)  # how long the others wait for what the first works out; a search may take hours


def count() -> int:
    """How many processes take part: those of a launcher, which tells each of them its place (``LOCAL_RANK``)."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def is_first() -> bool:
    """Whether this is the process that decides, measures and writes: the only one, or the first of several."""
    return count() == 1 or int(os.environ.get("RANK", "0")) == 0


def devices(cpu: bool) -> PartialState:
    """The view that accelerate has of this process, and the bond between the processes, which the first call makes."""
    if count() == 1:
        return PartialState(cpu=cpu)
    _part_at_exit()
    return PartialState(cpu=cpu, timeout=_PATIENCE)


@functools.cache
def _part_at_exit() -> None:
    """A process that ends with the bond in place may be aborted: its threads still listen for the others."""
    atexit.register(_part)


def _part() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def from_first(work: Callable[[], T], cpu: bool) -> T:
    """What the first process finds, in every process; the others wait, and what is raised there is raised here.

    Latency is measured by one process alone, and what was measured decides: left to themselves, two processes would
    train two networks.

    Args:
        work: gives something that can be pickled; called in the first process.
        cpu: whether training is to be on the CPU.

    Raises:
        Exception: what ``work`` raised in the first process.
    """
    if count() == 1:
        return work()
    state = devices(cpu)
    found: list[Any] = [None, None]
    raised: BaseException | None = None
    if is_first():
        try:
            found[0] = work()
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  # told to those who wait, then raised
            raised = error
            found[1] = error if isinstance(error, TdcompileError) else TdcompileError(f"the first process: {error}")
    torch.distributed.broadcast_object_list(found, src=0, device=state.device)
    if raised is not None:
        raise raised
    if found[1] is not None:
        raise found[1]
    result: T = found[0]
    return result


def same_in_all(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors with the first process's; each has as many, of the same shapes, in the same order."""
    if count() > 1:
        for tensor in tensors:
            torch.distributed.broadcast(tensor, src=0)


def mean_of_all(value: Tensor) -> Tensor:
    """The mean over all processes of a value that needs no gradient; every one of them has to come here."""
    if count() > 1:
        value = value.clone()
        torch.distributed.all_reduce(value)
        value = value / count()
    return value


def no_gpu(device: str) -> bool:
    """Whether training for a target goes to the CPU: its device is, or there is no GPU here."""
    return device == "cpu" or not torch.cuda.is_available()
