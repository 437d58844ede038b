"""Errors: one base class, one class for each exit code of the command, and hints for misspelt words."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import ClassVar


class TdcompileError(Exception):
    """Base of all errors. The message says what is wrong, where, what was expected, and what to do."""

    exit_code: ClassVar[int] = 1


class InputError(TdcompileError):
    """An input of the user cannot be used: a file, an option, a plan, a tensor."""

    exit_code: ClassVar[int] = 2


class UnwrittenError(InputError):
    """Results cannot be written, for example because the disk is full; earlier state is kept."""


class FixedAxisError(InputError):
    """The network fixes the length of an axis that is declared dynamic.

    Attributes:
        reason: what the network says at another length; empty if it says nothing.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class UntraceableError(InputError):
    """A front end cannot trace the network; another one may."""


class ParityError(TdcompileError):
    """Two models that should compute the same function do not."""

    exit_code: ClassVar[int] = 3


class BudgetError(TdcompileError):
    """No plan meets the budget, or the result fails a gate."""

    exit_code: ClassVar[int] = 4


class RuinedError(BudgetError):
    """The compiled network's outputs say nothing about the dense network's; it is not exported."""


class UnavailableError(TdcompileError):
    """The environment lacks an execution provider or a package."""

    exit_code: ClassVar[int] = 5


@contextmanager
def during(what: str) -> Iterator[None]:
    """Add a note to any error raised inside: the error of a plug-in names neither the plug-in nor the layer."""
    try:
        yield
    except Exception as error:
        error.add_note(what)
        raise


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a hint for an unknown word.

    Returns:
        ``did you mean 'x'? known: a, b, x``, without the question if no known word is similar.
    """
    names = sorted(known)
    return " ".join(filter(None, (did_you_mean(word, names), f"known: {', '.join(names) or 'none'}")))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``did you mean 'x'?`` with the known word that is most like this one, or nothing if none is like it."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class name if the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
