"""Class names from a text file, one a line."""

from __future__ import annotations

from pathlib import Path

from tdcompile.errors import InputError


def read_class_names(path: Path) -> tuple[str, ...]:
    """Return the lines of a UTF-8 text file; empty lines at its end are left out.

    Raises:
        InputError: the file cannot be read, holds no name, or has an empty line before the last name.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except OSError as error:
        raise InputError(f"the class names {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"the class names {path} are not UTF-8: {error.reason} at byte {error.start}") from error
    names = tuple(line.strip() for line in lines)
    if not names:
        raise InputError(f"the class names {path} are empty: write one name a line")
    if "" in names:
        raise InputError(f"line {names.index('') + 1} of the class names {path} is empty: write one name a line")
    return names
