"""What native libraries print of their own accord goes to stderr: stdout is for results."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator

_STDOUT, _STDERR = 1, 2


@contextlib.contextmanager
def native_output_to_stderr() -> Iterator[None]:
    """While it lasts, file descriptor 1 is stderr, for all threads; nothing happens where there is no descriptor.

    Replacing ``sys.stdout`` would not do: a C library writes to the descriptor.
    """
    with contextlib.suppress(AttributeError, ValueError):  # no stdout, or a closed one
        sys.stdout.flush()
    try:
        kept = os.dup(_STDOUT)
        os.dup2(_STDERR, _STDOUT)
    except OSError:
        yield
        return
    try:
        yield
    finally:
        _flush_c()
        os.dup2(kept, _STDOUT)
        os.close(kept)


def _flush_c() -> None:
    """Empty C's own buffers, which would otherwise reach the restored descriptor later."""
    with contextlib.suppress(OSError, TypeError, AttributeError):  # a platform without a handle on the running program
        ctypes.CDLL(None).fflush(None)
