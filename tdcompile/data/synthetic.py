"""The data ``synthetic``: samples that a compilation makes from the network itself; how they are asked for."""

from __future__ import annotations

from typing import Any

NAME = "synthetic"
ABOUT = "made from the statistics of the network's batch norm; calibrates and tunes, measures no quality"


def is_synthetic(spec: str) -> bool:
    """Return whether a data text asks for synthetic samples, with options in braces or without."""
    return spec.partition("{")[0] == NAME


def split_synthetic(data: Any) -> tuple[str, Any]:
    """Return the text that asks for synthetic training samples, or an empty one, and the test samples beside them.

    Args:
        data: a text such as ``synthetic`` or ``synthetic{images=128}``, a pair of such a text and test samples, or
            other data.
    """
    first, test = data if isinstance(data, tuple | list) and len(data) == 2 else (data, None)
    return (first, test) if isinstance(first, str) and is_synthetic(first) else ("", None)
