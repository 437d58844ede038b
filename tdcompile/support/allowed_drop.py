"""``AllowedDrop``: the largest loss of quality, in the metric's unit or as a share of the dense network's value."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tdcompile.errors import InputError


@dataclass(frozen=True)
class AllowedDrop:
    """A limit on the loss of quality.

    Attributes:
        value: the limit: points for a metric in percent, else in the metric's unit; percent if it is relative.
        relative: the limit is a share of the dense network's value.
    """

    value: float
    relative: bool = False

    @classmethod
    def parse(cls, given: float | str) -> AllowedDrop:
        """Read ``1``, or ``2%`` for a relative limit.

        Raises:
            InputError: it is neither, negative, or not finite.
        """
        text = str(given).strip()
        relative = text.endswith("%")
        try:
            value = float(text.removesuffix("%"))
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < 0:
            raise InputError(
                f"max-drop '{given}' must be a number of at least 0 in the metric's unit, such as 1, or a share of the "
                "dense network's value, such as 2%"
            )
        return cls(value, relative)

    def of(self, dense: float) -> float:
        """Return the limit in the unit of ``dense``, the dense network's value as it is shown."""
        return abs(dense) * self.value / 100 if self.relative else self.value

    def __str__(self) -> str:
        return f"{self.value:g}{'%' if self.relative else ''}"
