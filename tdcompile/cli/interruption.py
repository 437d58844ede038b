"""Ctrl-C and SIGTERM: both raise ``KeyboardInterrupt``, also found if a library replaced it by another error."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Handle SIGTERM like Ctrl-C within this context, so that a stopped job says how to resume it."""
    if threading.current_thread() is not threading.main_thread():  # Python allows signal handlers only there
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def was_interrupted(error: BaseException | None) -> bool:
    """Return whether an error is an interruption or follows from one: an interrupted import fails in many ways."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False
