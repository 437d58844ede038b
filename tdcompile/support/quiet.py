"""Control what libraries print: native output goes to stderr or nowhere, and that of exporters is captured."""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

_STDOUT, _STDERR = 1, 2
_DROPPING = threading.RLock()
_CHATTY = ("torch", "onnxscript", "onnx_ir")


@contextmanager
def native_output_to_stderr() -> Iterator[None]:
    """Redirect file descriptor 1 to stderr, in all threads; do nothing if the descriptor is not there.

    Replacing ``sys.stdout`` is not enough: a C library writes to the descriptor.
    """
    with _redirected(_STDERR):
        yield


@contextmanager
def native_output_dropped() -> Iterator[None]:
    """Drop what is written to file descriptor 1, in all threads; do nothing if the descriptor is not there.

    One thread at a time: the second would take the first one's redirection for the original descriptor.
    """
    with _DROPPING, open(os.devnull, "wb") as nowhere, _redirected(nowhere.fileno()):
        yield


@contextmanager
def _redirected(place: int) -> Iterator[None]:
    """Redirect file descriptor 1 to another descriptor."""
    with contextlib.suppress(AttributeError, ValueError):  # no stdout, or a closed one
        sys.stdout.flush()
    _flush_c()
    try:
        kept = os.dup(_STDOUT)
        os.dup2(place, _STDOUT)
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
    """Flush C's own buffers, which would otherwise reach the restored descriptor later."""
    with contextlib.suppress(OSError, TypeError, AttributeError):  # a platform without a handle on the running program
        ctypes.CDLL(None).fflush(None)


@contextmanager
def captured_output() -> Iterator[io.StringIO]:
    """Capture what torch's exporters and onnxsim print, warn and log, and yield it as a buffer."""
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    known = [logging.getLogger(name) for name in _CHATTY]
    known += [
        logger
        for name, logger in logging.root.manager.loggerDict.items()
        if isinstance(logger, logging.Logger) and name.partition(".")[0] in _CHATTY and logger not in known
    ]
    before = [(logger, logger.handlers, logger.propagate) for logger in known]
    for logger in known:
        logger.handlers, logger.propagate = [handler] if logger.name in _CHATTY else [], logger.name not in _CHATTY
    try:
        with redirect_stdout(said), redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield said
    finally:
        for logger, handlers, propagate in before:
            logger.handlers, logger.propagate = handlers, propagate
