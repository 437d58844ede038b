"""``Ledger``: the finished cells of a study on disk, one line of JSON each, so that a study can be resumed."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from pydantic import ValidationError

from tdcompile.errors import InputError
from tdcompile.studies.findings import Cell

NAME = "cells.jsonl"
_RESULTS = {NAME, "study.json", "study.html"}

log = logging.getLogger("tdcompile")


class Ledger:
    """Keep cells in ``OUT/cells.jsonl``; without a folder, in memory only.

    Args:
        out: the folder, made when the first cell is written; None writes nothing.
        resume: use the cells that the folder holds already.

    Raises:
        InputError: the folder holds other files, or it holds cells and ``resume`` is false.
    """

    def __init__(self, out: Path | None, *, resume: bool) -> None:
        self.out = out
        self.cells: dict[str, Cell] = {}
        if out is not None:
            _check(out)
            self.cells = _read(out / NAME)
            if self.cells and not resume:
                raise InputError(
                    f"{out} holds {len(self.cells)} finished cells of a study: go on with --resume, or give another -o"
                )
            if resume and not self.cells:
                log.warning("there is no interrupted study in %s: starting anew", out)

    def add(self, cell: Cell) -> None:
        """Write a cell's line, and flush it to the disk.

        Raises:
            InputError: the line cannot be written.
        """
        self.cells[cell.key] = cell
        if self.out is None:
            return
        try:
            fresh = not self.out.exists()
            self.out.mkdir(parents=True, exist_ok=True)
            if not fresh:
                _mend(self.out / NAME)
            with (self.out / NAME).open("a", encoding="utf-8") as file:
                file.write(cell.model_dump_json() + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise InputError(f"cannot write {self.out / NAME}: {error.strerror or error}") from error

    def finish(self, files: dict[str, str]) -> None:
        """Write the result files; each is replaced as a whole.

        Raises:
            InputError: a file cannot be written.
        """
        if self.out is None:
            return
        for name, content in files.items():
            draft = self.out / f".{name}.{os.getpid()}"
            try:
                self.out.mkdir(parents=True, exist_ok=True)
                draft.write_text(content, encoding="utf-8")
                draft.replace(self.out / name)
            except OSError as error:
                raise InputError(f"cannot write {self.out / name}: {error.strerror or error}") from error
            finally:
                draft.unlink(missing_ok=True)


def _check(out: Path) -> None:
    """Require, before any work, a folder that a study may write to."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give another -o, a folder that does not exist yet")
    foreign = sorted({path.name for path in out.iterdir()} - _RESULTS) if out.exists() else []
    if foreign:
        raise InputError(f"{out} holds {foreign[0]}, which no study wrote; move it or give another -o")
    parent = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        raise InputError(f"cannot write into {parent}; give an -o in a folder that you may write to")


def _read(path: Path) -> dict[str, Cell]:
    """Return the cells of a ledger by key, without a line that a crash cut short."""
    cells = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else (), start=1):
        try:
            cell = Cell.model_validate_json(line)
        except ValidationError:
            log.warning("line %d of %s is not a cell and is ignored", number, path)
            continue
        cells[cell.key] = cell
    return cells


def _mend(path: Path) -> None:
    """End a last line that was cut short, so that the next line starts anew."""
    if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        with path.open("a", encoding="utf-8") as file:
            file.write("\n")
