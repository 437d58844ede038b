"""The command ``tdcompile``: arguments in, results on stdout, everything else on stderr, an exit code out."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Annotated, Any

import typer

from tdcompile.cli.console import Answer, messages, tell
from tdcompile.cli.interruption import terminable, was_interrupted
from tdcompile.cli.options import signed
from tdcompile.errors import InputError, TdcompileError
from tdcompile.support.quiet import native_output_to_stderr

INTERRUPTED = 130
UNAVAILABLE = 5

_NETWORK = ("source", "weights", "input", "frontend")
_COMMON = ("seed", "json", "verbose", "quiet")
_PLAN = (
    *(*_NETWORK, "dynamic_batch", "dynamic", "data", "normalize", "calibrate", "target", "threads", "grain", "budget"),
    *("decompose", "ranks", "importance", "keep_dense", "recipe", "jobs", "out"),
)
_COMPILE = ("eval", "plan", "tune", "max_drop", "min_speedup", "pipeline", "dry_run", "resume")
_STUDY = ("methods", "compressions", "layers", "seeds", "tune", "jobs", "ray", "out", "resume")


@dataclass(frozen=True)
class Verb:
    """One command: the function that does it, which is imported when it is called, and the options it takes."""

    name: str
    home: str
    function: str
    options: tuple[str, ...]
    about: str


VERBS = (
    Verb(
        "compile",
        "cli.compile",
        "compile_network",
        (*_PLAN, *_COMPILE, *_COMMON),
        "A network in, a smaller, faster, verified ONNX model out, with a report on every layer.",
    ),
    Verb(
        "analyze",
        "cli.inspect",
        "analyze",
        (*_NETWORK, "dynamic_batch", *_COMMON),
        "Every layer, and what could be done to it.",
    ),
    Verb(
        "study",
        "cli.study",
        "study",
        (*(*_NETWORK, "data", "normalize", "calibrate", "eval", "target"), *_STUDY, *_COMMON),
        "How well approximation errors foretell accuracy, layer by layer and form by form (arXiv 2305.05318).",
    ),
    Verb("plan", "cli.compile", "plan", (*_PLAN, *_COMMON), "Choose forms and ranks, and change nothing."),
    Verb(
        "validate",
        "cli.validate_bench",
        "validate",
        (
            *("model", "against", "weights", "input", "frontend", "dynamic_batch", "dynamic", "target", "threads"),
            *("rtol", "atol"),
            *_COMMON,
        ),
        "Run a model against another one, or against the PyTorch network it came from; exit 3 if they differ.",
    ),
    Verb(
        "bench",
        "cli.validate_bench",
        "bench",
        (*("models", "input", "target", "threads", "batch", "seconds"), *_COMMON),
        "Time models against each other, in turns.",
    ),
    Verb(
        "list",
        "cli.inspect",
        "list_plugins",
        ("kind", "schema", "json", "verbose", "quiet"),
        "passes, decompositions, selectors, scores, costs, models, data or recipes, with their options.",
    ),
    Verb(
        "doctor",
        "cli.doctor",
        "doctor",
        ("target", "json", "verbose", "quiet"),
        "Whether this environment can do it; exit 5 if not.",
    ),
    Verb(
        "demo",
        "cli.compile",
        "demo",
        (*("out", "budget", "tune", "target", "threads", "resume"), *_COMMON),
        "Compile a network that ships with its weights, on data that needs no download.",
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # whatever stands in for a stream in a test or a notebook
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        answer = _app(arguments)(arguments, prog_name="tdcompile", standalone_mode=False)
    except _UsageError as error:
        tell(f"error: {error.format_message()}")  # type: ignore[attr-defined]  # typer's own errors have it
        tell(f"'{_usage_of(error)} --help' lists what there is")
        return InputError.exit_code
    if not isinstance(answer, Answer):
        return int(answer or 0)  # --help or --version have printed what there is to print
    try:
        answer.show()
    except BrokenPipeError:  # the reader has seen enough; Python must not find out again when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return answer.code


# typer brings a click of its own or uses the installed one, depending on its version; this is the class in either.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def _usage_of(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    return str(context.command_path) if context is not None else "tdcompile"


def _app(arguments: Sequence[str]) -> typer.Typer:
    app = typer.Typer(
        name="tdcompile",
        help="A tensor-decomposition compiler: a PyTorch network in, a smaller, faster, verified ONNX model out.",
        add_completion=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for verb in VERBS:
        app.command(verb.name)(signed(_answering(verb, arguments), verb.options, verb.about))
    app.callback(invoke_without_command=True)(_top)
    return app


def _top(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if show_version:
        typer.echo(f"tdcompile {version('tdcompile')}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())
    else:
        return
    raise typer.Exit


def _answering(verb: Verb, arguments: Sequence[str]) -> Callable[[Mapping[str, Any]], Answer]:
    """The verb's function, held to the promises of the command: a clean stdout, one sentence for every failure."""

    def answer(given: Mapping[str, Any]) -> Answer:
        with contextlib.ExitStack() as stack:
            stack.enter_context(native_output_to_stderr())
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            stack.enter_context(messages(verbose=given["verbose"], quiet=given["quiet"]))
            stack.enter_context(terminable())
            try:
                # imported here: --help and a mistyped option are answered without loading torch
                function = getattr(importlib.import_module(f"tdcompile.{verb.home}"), verb.function)
                result: Answer = function({**given, "command": ("tdcompile", *arguments)})
                return result
            except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  # the last line of defence: one sentence each
                if given["verbose"]:
                    traceback.print_exc(file=sys.stderr)
                code, sentence = _failure(error)
                tell(sentence)
                return Answer(code=code)

    return answer


def _failure(error: BaseException) -> tuple[int, str]:
    """The exit code of a failure and the sentence that tells it."""
    if was_interrupted(error):
        how_to_go_on = str(error) if isinstance(error, KeyboardInterrupt) else ""
        return INTERRUPTED, f"interrupted; {how_to_go_on or 'nothing was written'}"
    if isinstance(error, TdcompileError):
        return error.exit_code, f"error: {' '.join(str(error).split())}"
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return InputError.exit_code, f"error: {where}{error.strerror or error}"
    if isinstance(error, ImportError):
        return UNAVAILABLE, f"error: {error}; 'tdcompile doctor' looks the installation over"
    said = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
    said += "".join(f", {note}" for note in getattr(error, "__notes__", ()))
    return TdcompileError.exit_code, f"error: {said}; run again with -v for the traceback"
