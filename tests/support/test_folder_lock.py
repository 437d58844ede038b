"""Two processes do not write to one output folder at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tdcompile.errors import InputError
from tdcompile.support.folder_lock import only_writer

HOLD = """
import sys
from pathlib import Path
from tdcompile.support.folder_lock import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_ends_or_dies(tmp_path: Path) -> None:
    out = tmp_path / "new" / "made"
    for end in ("close", "kill"):
        command = [sys.executable, "-c", HOLD, str(out)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
            assert other.stdout is not None
            assert other.stdin is not None
            assert other.stdout.readline() == "held\n"
            with (
                pytest.raises(InputError, match=r"another process is writing .*made: wait for"),
                only_writer(out),
            ):
                pass
            with only_writer(out.with_name("another")):
                pass
            if end == "kill":
                other.kill()
            else:
                other.stdin.close()
            other.wait(60)
    with only_writer(out):
        assert (out.parent / ".made.lock").exists()


def test_the_lock_leaves_nothing_behind_and_keeps_what_was_written(tmp_path: Path) -> None:
    out = tmp_path / "new" / "made"
    with pytest.raises(ValueError, match="failed"), only_writer(out):
        raise ValueError("failed")
    assert not list(tmp_path.iterdir())
    with only_writer(out):
        out.mkdir()
    assert [path.name for path in out.parent.iterdir()] == ["made"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    if Path("/proc/self").exists():  # files cannot be made there, not even by root
        with pytest.raises(InputError, match=r"cannot write /proc/.made.lock"), only_writer(Path("/proc/made")):
            pass
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*file"), only_writer(tmp_path / "file" / "made"):
        pass
