"""torch's ONNX translations of its operators, read once in a process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any
from unittest import mock

from torch.onnx._internal import _lazy_import


@contextlib.contextmanager
def translations_read_once() -> Iterator[None]:
    """Give ``torch.onnx.export`` the list of translations that an earlier call made; do nothing for another torch.

    Without it every export parses the source of about 500 functions, for more than a second, to learn the domain of
    each. The list depends on torch and onnxscript alone.
    """
    found = getattr(_lazy_import, "onnxscript_apis", None)
    read: Callable[[], Any] | None = getattr(found, "get_torchlib_ops", None)
    if found is None or read is None:
        yield
        return
    with mock.patch.object(found, "get_torchlib_ops", partial(_kept, read), create=True):
        yield


@cache
def _kept(read: Callable[[], Any]) -> Any:
    return read()
