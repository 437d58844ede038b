"""What libraries print of their own accord: native ones to stderr, for stdout is for results; exporters nowhere."""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

_STDOUT, _STDERR = 1, 2
_CHATTY = ("torch", "onnxscript", "onnx_ir")


@contextmanager
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


@contextmanager
def captured_output() -> Iterator[io.StringIO]:
    """Keep what torch's exporters and onnxsim print, warn and log, each of which they do."""
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
