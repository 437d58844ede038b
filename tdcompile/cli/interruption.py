"""Ctrl-C and SIGTERM: both raise ``KeyboardInterrupt``, known again where a library has made another error of it."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """While it lasts, SIGTERM is handled like Ctrl-C, so that a job that is stopped says how to go on."""
    if threading.current_thread() is not threading.main_thread():  # Python sets handlers there alone
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
    """Whether an error is an interruption or came of one: an import that is interrupted fails in many ways."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False
