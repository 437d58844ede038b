"""Format numbers for people: counts, sizes, milliseconds, shares, ratios."""

from __future__ import annotations

import math
from collections.abc import Sequence


def change(before: str, after: str) -> str:
    """Return ``a → b``, or one of the two if they are equal."""
    return before if before == after else f"{before} → {after}"


def count(number: float) -> str:
    """Format 12345678 as ``12.3 M``."""
    for power, unit in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if number >= 0.9995 * 10**power:
            return f"{_three(number / 10**power)} {unit}"
    return f"{number:g}"


def size(number: float) -> str:
    """Format a number of bytes: 12345678 as ``12.3 MB``."""
    text = count(number)
    return f"{text}B" if text[-1].isalpha() else f"{text} B"


def milliseconds(number: float | None, unit: str = " ms") -> str:
    """Format 3.14 as ``3.14 ms``; None, which means not measured, is a dash."""
    return "–" if number is None else f"{_three(number)}{unit}"


def percent(share: float | None) -> str:
    """Format 0.8831 as ``88.31 %``; None is a dash."""
    return "–" if share is None else f"{share * 100:.2f} %"


def times(ratio: float | None) -> str:
    """Format 2.41 as ``2.41×``; None is a dash."""
    return "–" if ratio is None else f"{ratio:.2f}×"


def join_first(names: Sequence[str], between: str, most: int = 4) -> str:
    """Join the first texts, and count the others: ``a, b, c, d and 2 more``."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return between.join(names[:most]) + more


def _three(number: float) -> str:
    """Format three significant digits without an exponent."""
    rounded = float(f"{number:.3g}")
    whole = math.floor(math.log10(abs(rounded))) if rounded else 0
    return f"{rounded:.{min(max(0, 2 - whole), 6)}f}"
