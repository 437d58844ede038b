"""``only_writer``: one process at a time writes to an output folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from tdcompile.errors import InputError


@contextlib.contextmanager
def only_writer(out: Path) -> Iterator[None]:
    """Hold the lock of an output folder within this context; the system frees it if the process dies.

    The lock is a file beside the folder, because the folder itself is replaced as a whole. It is deleted at the end.

    Raises:
        InputError: another process holds the lock, or the lock cannot be written.
    """
    place = out.resolve()
    path = place.with_name(f".{place.name}.lock")
    made = [folder for folder in path.parents if not folder.exists()]  # the innermost first
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()  # raises the reason; FileLock reports a place that cannot be written as held
        lock = FileLock(path)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(f"another process is writing {out}: wait for its end, or give another -o") from error
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows deletes no open file: the lock file then stays
            path.unlink()  # before the release: a process that waits for this file finds it deleted, and makes its own
        lock.release()
        for folder in made:
            with contextlib.suppress(OSError):  # not empty: the result is there
                folder.rmdir()
