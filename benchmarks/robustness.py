"""Networks, data and checkpoints that users brought, each run from the command and compared with what should come."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from subprocess import PIPE, STDOUT
from typing import Annotated, Any

import typer
from common import publish
from robustness_cases import CASES, PREPARE, Case, Ran, UnlikeError

from tdcompile.errors import InputError
from tdcompile.ir.target import Target

OK, NOT, LATER = "ok", "not", "later"
REFUSED = InputError.exit_code
_PASSES = ("] calibrate:", "] score:", "] propose:")  # as the command lists finished passes
_SECONDS = 300.0  # a compilation of these networks takes 10 to 40 s on an idle core
_SEEN = 160  # characters of the last message that the table shows


def main(
    folder: Annotated[Path, typer.Argument(help="folder with the files of the cases; it is copied, not changed")],
    only: Annotated[str, typer.Option(help="cases whose names contain one of these, comma-separated")] = "",
    seconds: Annotated[float, typer.Option(help="time limit of one command")] = _SECONDS,
    keep: Annotated[Path | None, typer.Option(help="work in this folder, and keep it")] = None,
    json: Annotated[Path | None, typer.Option(help="also write the table here")] = None,
) -> None:
    """Run every case from the command, one after the other; exit with 1 if one is not as it should be."""
    chosen = _chosen(only.split(","))
    if not chosen:
        sys.exit(f"error: no case has a name with {only!r}; the cases are {', '.join(case.name for case in CASES)}")
    if not folder.is_dir():
        sys.exit(f"error: {folder} is no folder: give the one with the files of the cases")
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(keep or scratch) / "cases"
        shutil.copytree(folder, place, dirs_exist_ok=True)
        for command in PREPARE:
            ran = run(command, place, place, seconds)
            if ran.code:
                sys.exit(f"error: {command!r} ended with {ran.code}: {ran.said}")
        rows = []
        for case in chosen:
            rows.append(judged(case, place, seconds))
            print(" | ".join(str(rows[-1][name]) for name in ("case", "verdict", "seen")), flush=True)
    counts = {verdict: sum(row["verdict"].startswith(verdict) for row in rows) for verdict in (OK, LATER, NOT)}
    title = f"{len(rows)} cases: {counts[OK]} as they should be, {counts[LATER]} refused until later, {counts[NOT]} not"
    publish(title, rows, 0, Target(), json, {"seconds": ".0f"})
    if counts[NOT]:
        sys.exit(1)


def _chosen(parts: list[str]) -> list[Case]:
    """Return the cases with one of these parts in their names, and those that they need, in order."""
    wanted = [case for case in CASES if any(part in case.name for part in parts)]
    names = {case.name for case in wanted} | {case.needs for case in wanted}
    return [case for case in CASES if case.name in names]


def judged(case: Case, place: Path, seconds: float) -> dict[str, Any]:
    """Run a case in the folder, and return its row of the table."""
    begun = time.perf_counter()
    out = place / "out" / case.name
    ran = run(case.command, place, out, seconds)
    took = time.perf_counter() - begun
    problem = problem_of(case, ran)
    passed = f"{LATER}: {case.later}" if case.later else OK
    return {
        "case": case.name,
        "command": case.command,
        "expected": case.expected,
        "seen": f"exit {ran.code}: {_short(ran.said)}",
        "verdict": f"{NOT}: {problem}" if problem else passed,
        "seconds": took,
    }


def problem_of(case: Case, ran: Ran) -> str | None:
    """Return how a run differs from what should come, or None."""
    if ran.code not in case.codes:
        return f"exit {ran.code}, not {' or '.join(map(str, case.codes))}"
    if "Traceback" in ran.text:
        return "a traceback"
    if ran.code == REFUSED and ran.out.exists():
        return "something is written although the command is refused"
    if ran.code == REFUSED and any(step in ran.text for step in _PASSES):
        return "it is refused only after passes have run"
    if missing := [part for part in case.says if part not in ran.said_all]:
        return f"the messages lack {missing[0]!r}"
    try:
        if ran.code == 0 and case.check is not None:
            case.check(ran)
    except UnlikeError as error:
        return str(error)
    return None


def run(command: str, place: Path, out: Path, seconds: float) -> Ran:
    """Run ``tdcompile …`` or ``python …`` in a folder; ``tdcompile compile`` writes to ``out``.

    A command that takes longer than ``seconds`` is ended, and its exit code is 124.
    """
    program, *arguments = shlex.split(command)
    words = [sys.executable, *(["-m", "tdcompile"] if program == "tdcompile" else []), *arguments]
    if arguments[:1] == ["compile"]:
        words += ["-o", str(out.relative_to(place))]
    plain = {**os.environ, "NO_COLOR": "1", "COLUMNS": "1000"}
    try:
        done = subprocess.run(words, cwd=place, env=plain, stdout=PIPE, stderr=STDOUT, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return Ran(place, out, 124, f"it took over {seconds:g} s")
    return Ran(place, out, done.returncode, done.stdout)


def _short(text: str) -> str:
    return text if len(text) <= _SEEN else text[: _SEEN - 1] + "…"


if __name__ == "__main__":
    typer.run(main)
