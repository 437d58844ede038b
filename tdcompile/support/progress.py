"""Progress of a long pass: the pass reports, and the watcher that the driver has set is called."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar

# Set by the driver while a pass runs. Arguments: steps done, steps in total, a short note.
progress: ContextVar[Callable[[int, int, str], None] | None] = ContextVar("progress", default=None)


def report_progress(done: int, of: int, note: str = "") -> None:
    """Report ``done`` of ``of`` steps to the watcher, if there is one."""
    watcher = progress.get()
    if watcher is not None:
        watcher(done, of, note)
