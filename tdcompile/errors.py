"""Errors: one root, one class for each exit code of the command, and the hint that names the nearest known word."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import ClassVar


class TdcompileError(Exception):
    """A promise was broken; the message says what, where, what was expected and what to do."""

    exit_code: ClassVar[int] = 1


class InputError(TdcompileError):
    """What the user gave cannot be used: a file, an option, a plan, a tensor."""

    exit_code: ClassVar[int] = 2


class UnwrittenError(InputError):
    """What has been worked out cannot be kept, for example because the disk is full; what was kept before stays."""


class FixedAxisError(InputError):
    """The network fixes the length of an axis that is to stay open."""


class UntraceableError(InputError):
    """A front end cannot pass through the network; another one may."""


class ParityError(TdcompileError):
    """Two models that should compute the same function do not."""

    exit_code: ClassVar[int] = 3


class BudgetError(TdcompileError):
    """No plan meets the budget, or a gate was not passed."""

    exit_code: ClassVar[int] = 4


class UnavailableError(TdcompileError):
    """This environment cannot do what was asked: a provider or a package is missing."""

    exit_code: ClassVar[int] = 5


@contextmanager
def during(what: str) -> Iterator[None]:
    """Notes on any failure inside where it happened: a plug-in's own error names neither the plug-in nor the layer."""
    try:
        yield
    except Exception as error:
        error.add_note(what)
        raise


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint that ends a message about an unknown word.

    Returns:
        ``did you mean 'x'? known: a, b, x``, without the question where nothing is near.
    """
    names = sorted(known)
    return " ".join(filter(None, (did_you_mean(word, names), f"known: {', '.join(names) or 'none'}")))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``did you mean 'x'?`` with the known word that is most like this one, or nothing if none is like it."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else ""


def first_line(error: BaseException) -> str:
    """Of what an error says; its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
