"""``without_autocast``: run ``torch.autocast`` regions of a network in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def without_autocast() -> Iterator[set[str]]:
    """Ignore ``torch.autocast`` inside the context, and collect the dtypes that regions ask for, such as ``bfloat16``.

    ``torch.fx`` loses a region and ``torch.export`` hides the layers in it. onnxruntime has no bf16 kernels on a CPU.
    """
    found: set[str] = set()
    enter, leave = torch.autocast.__enter__, torch.autocast.__exit__

    def record(region: Any) -> Any:
        if region._enabled:
            found.add(str(region.fast_dtype).removeprefix("torch."))
        return region

    torch.autocast.__enter__ = record  # type: ignore[method-assign]
    torch.autocast.__exit__ = lambda *_: False  # type: ignore[method-assign]
    try:
        yield found
    finally:
        torch.autocast.__enter__, torch.autocast.__exit__ = enter, leave  # type: ignore[method-assign]
