"""``FormSeconds``: the processor seconds of a pass by layer and by form, for ``-v``."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

log = logging.getLogger("tdcompile")

Given = TypeVar("Given")
Result = TypeVar("Result")

_HEADER = ("form", "layers", "ranks", "seconds", "share")


def timed(work: Callable[[Given], Result], given: Given) -> tuple[Result, float]:
    """Return the result, and the seconds that all threads of this process computed for it."""
    start = time.process_time()
    return work(given), time.process_time() - start


class FormSeconds:
    """Sums of seconds by form; each layer is logged once it is done, and all forms at the end.

    Args:
        step: name of the pass.
    """

    def __init__(self, step: str) -> None:
        self._step = step
        self._seconds: dict[str, float] = {}
        self._layers: Counter[str] = Counter()
        self._ranks: Counter[str] = Counter()
        self._layer: list[tuple[str, float]] = []

    def add(self, form: str, seconds: float, ranks: int = 1) -> None:
        """Add the seconds of a form on the current layer.

        Args:
            form: name of the form.
            seconds: of all its ranks together.
            ranks: how many ranks were computed.
        """
        self._seconds[form] = self._seconds.get(form, 0.0) + seconds
        self._layers[form] += 1
        self._ranks[form] += ranks
        self._layer.append((form, seconds))

    def layer_done(self, name: str) -> None:
        """Log the layer, the slowest form first; a layer without forms is not logged."""
        if self._layer:
            parts = sorted(self._layer, key=lambda part: -part[1])
            told = ", ".join(f"{form} {seconds:.2f} s" for form, seconds in parts)
            log.debug("%s: %s: %s", self._step, name, told)
        self._layer = []

    def all_done(self) -> None:
        """Log a table of all forms, the slowest first."""
        if self._seconds:
            log.debug("%s: processor seconds by form\n%s", self._step, self.table())

    def table(self) -> str:
        """Return the table as text: a line for each form, and the sum."""
        whole = sum(self._seconds.values())
        rows = [
            (form, str(self._layers[form]), str(self._ranks[form]), f"{seconds:.2f}", f"{seconds / (whole or 1):.0%}")
            for form, seconds in sorted(self._seconds.items(), key=lambda item: -item[1])
        ]
        rows.append(("all", "", str(self._ranks.total()), f"{whole:.2f}", ""))
        widths = [max(map(len, column)) for column in zip(_HEADER, *rows, strict=True)]
        return "\n".join(_line(row, widths) for row in (_HEADER, *rows))


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    (first, *others), (width, *rest) = row, widths
    aligned = [first.ljust(width), *(text.rjust(size) for text, size in zip(others, rest, strict=True))]
    return "  ".join(aligned).rstrip()
