"""Several processes (``torchrun``, ``accelerate launch``): the first decides and writes files, all of them train."""

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

_TIMEOUT = timedelta(days=7)  # timeout of the wait for the first process, whose search for ranks may take hours


def count() -> int:
    """Return the number of processes; a launcher sets ``WORLD_SIZE`` and ``LOCAL_RANK`` in each."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def is_first() -> bool:
    """Return whether this process decides, measures and writes files: it is the only one, or has rank 0."""
    return count() == 1 or int(os.environ.get("RANK", "0")) == 0


def devices(cpu: bool) -> PartialState:
    """Return accelerate's state of this process; the first call initialises the process group."""
    if count() == 1:
        return PartialState(cpu=cpu)
    _destroy_group_at_exit()
    return PartialState(cpu=cpu, timeout=_TIMEOUT)


@functools.cache
def _destroy_group_at_exit() -> None:
    """Leave the process group before exit: the threads of an initialised group may abort the process."""
    atexit.register(_destroy_group)


def _destroy_group() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def from_first(work: Callable[[], T], cpu: bool) -> T:
    """Call ``work`` in the first process, and return its result in every process.

    The other processes wait. An error in the first process is raised in all. Decisions depend on measured latency,
    which differs between processes: if each measured for itself, they would train different networks.

    Args:
        work: returns a value that can be pickled.
        cpu: whether training runs on the CPU.

    Raises:
        Exception: ``work`` raised it in the first process.
    """
    if count() == 1:
        return work()
    state = devices(cpu)
    found: list[Any] = [None, None]
    raised: BaseException | None = None
    if is_first():
        try:
            found[0] = work()
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  # sent to the other processes, then raised
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
    """Overwrite tensors with those of the first process; number, order and shapes must agree in all processes."""
    if count() > 1:
        for tensor in tensors:
            torch.distributed.broadcast(tensor, src=0)


def mean_of_all(value: Tensor) -> Tensor:
    """Return the mean over all processes of a value without gradient; every process must call this."""
    if count() > 1:
        value = value.clone()
        torch.distributed.all_reduce(value)
        value = value / count()
    return value


def no_gpu(device: str) -> bool:
    """Return whether training for a target runs on the CPU: the target is a CPU, or this machine has no GPU."""
    return device == "cpu" or not torch.cuda.is_available()
