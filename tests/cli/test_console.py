"""Results go to stdout as they are; progress is one line a stage in a log and a bar on a terminal."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from typing import Any, cast

import pytest
from rich.table import Table

from tdcompile.cli.console import WIDTH, Answer, Lines, messages, tell, watching
from tdcompile.core.hooks import Hook
from tdcompile.core.passes import Pass
from tdcompile.core.registry import make
from tdcompile.ir.program import Program

PROGRAM = cast("Program", None)  # a watcher draws the time a pass took, and does not look at what it made


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def two_passes(watch: Hook) -> None:
    for position, name in enumerate(("calibrate", "propose")):
        step = make(Pass, name)
        watch.started(step, position, 2)
        watch.advanced(step, 3, 7, "features[0]")
        watch.finished(step, PROGRAM, 1.25)


def test_a_log_gets_one_line_a_stage_and_what_follows(capsys: pytest.CaptureFixture[str]) -> None:
    with watching(quiet=False, then="verify") as watch:
        assert isinstance(watch, Lines)
        two_passes(watch)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["[1/2] calibrate: 1.2 s", "[2/2] propose: 1.2 s", "verify"]


def test_a_terminal_gets_bars_with_names_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with watching(quiet=False, then="verify") as watch:
        assert watch is not None
        step = make(Pass, "calibrate")
        watch.started(step, 0, 1)
        watch.advanced(step, 3, 7, "features[0]")
        cast("Any", watch)._progress.refresh()
        watch.finished(step, PROGRAM, 1.25)
    drawn = terminal.getvalue()
    assert "calibrate" in drawn
    assert "3/7" in drawn
    assert "features[0]" in drawn
    assert "verify" in drawn


def test_quiet_draws_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with watching(quiet=True) as watch:
        assert watch is None
    assert capsys.readouterr() == ("", "")


def test_an_answer_is_written_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("layer", "form")
    table.add_row("fc", "svd")
    Answer(("[bold]" + "x" * 300, table, "ended\n")).show()
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == "[bold]" + "x" * 300
    assert lines[-1] == "ended"
    assert any("fc" in line and "svd" in line for line in lines)
    assert max(map(len, lines[1:])) <= WIDTH
    assert err == ""


@pytest.mark.parametrize(
    ("verbose", "quiet", "seen"),
    [(False, False, {"warning", "error"}), (True, False, {"debug", "warning", "error"}), (False, True, {"error"})],
)
def test_the_log_is_told_as_loud_as_asked(
    verbose: bool, quiet: bool, seen: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    log = logging.getLogger("tdcompile")
    before = log.level, log.propagate, list(log.handlers)
    with messages(verbose=verbose, quiet=quiet):
        for level in ("debug", "warning", "error"):
            getattr(log, level)("of %s", level)
    assert {line.partition(":")[0] for line in capsys.readouterr().err.splitlines()} == seen
    assert (log.level, log.propagate, list(log.handlers)) == before


def test_the_warnings_of_libraries_are_kept_for_verbose() -> None:
    with messages(verbose=False, quiet=False):
        warnings.warn("for programmers", stacklevel=1)
    with messages(verbose=True, quiet=False), pytest.warns(UserWarning, match="for programmers"):
        warnings.warn("for programmers", stacklevel=1)


def test_tell_is_one_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    tell("here")
    assert capsys.readouterr() == ("", "here\n")
