"""How a long pass tells its progress to whoever watches."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar

# Set by the driver while a pass runs: how far it is, how far it has to go, a word on how it goes.
progress: ContextVar[Callable[[int, int, str], None] | None] = ContextVar("progress", default=None)


def report_progress(done: int, of: int, note: str = "") -> None:
    """Tell whoever watches that a long pass has got so far."""
    watcher = progress.get()
    if watcher is not None:
        watcher(done, of, note)
