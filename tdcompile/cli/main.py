"""The command ``tdcompile``: results go to stdout, everything else to stderr, and an exit code is returned."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Annotated, Any

import typer

# None of these imports torch: the commands import it when they run, so that --help answers at once.
from tdcompile.cli.compile import compile_network, demo, plan
from tdcompile.cli.console import Answer, messages, tell
from tdcompile.cli.doctor import doctor
from tdcompile.cli.inspect import analyze, list_plugins
from tdcompile.cli.interruption import terminable, was_interrupted
from tdcompile.cli.study import study
from tdcompile.cli.sweep import sweep
from tdcompile.cli.validate_bench import bench, validate
from tdcompile.errors import InputError, TdcompileError
from tdcompile.support.quiet import native_output_to_stderr

INTERRUPTED = 130
UNAVAILABLE = 5

_COMMANDS: dict[str, Callable[..., Answer]] = {
    "compile": compile_network,
    "sweep": sweep,
    "analyze": analyze,
    "study": study,
    "plan": plan,
    "validate": validate,
    "bench": bench,
    "list": list_plugins,
    "doctor": doctor,
    "demo": demo,
}


# Loops for which a thread of GNU OpenMP, which torch uses on Linux, waits for the others of an operation before it
# sleeps. By default it spins on, and takes the time from those that it waits for where processors are shared. On two
# processors and two threads, an eigendecomposition of 600 x 600 takes 0.07 s idle and 0.15 s beside two busy processes;
# 9.7 s there at ten times as many loops, and 0.29 s and 0.52 s if threads sleep at once.
SPINS = "10000"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return the exit code."""
    # It is read when torch is loaded.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # a test or a notebook may replace the stream
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        answer = app(arguments, prog_name="tdcompile", standalone_mode=False, obj=("tdcompile", *arguments))
    except _UsageError as error:
        tell(f"error: {error.format_message()}")  # type: ignore[attr-defined]  # typer's own errors have it
        tell(f"'{_usage_of(error)} --help' lists commands and options")
        return InputError.exit_code
    if not isinstance(answer, Answer):
        return int(answer or 0)  # --help and --version print for themselves
    try:
        answer.show()
    except BrokenPipeError:  # the reader closed the pipe; Python must not fail again when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return answer.code


# The class of usage errors: typer uses the installed click, or its own, depending on the version.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def _usage_of(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    return str(context.command_path) if context is not None else "tdcompile"


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


def _answering(command: Callable[..., Answer]) -> Callable[..., Answer]:
    """Wrap a command: only its result goes to stdout, and every failure becomes one sentence and an exit code."""

    @functools.wraps(command)
    def answer(**given: Any) -> Answer:
        with contextlib.ExitStack() as stack:
            stack.enter_context(native_output_to_stderr())
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            stack.enter_context(messages(verbose=given["verbose"], quiet=given["quiet"]))
            stack.enter_context(terminable())
            try:
                return command(**given)
            except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  # no error may reach the user as a traceback
                if given["verbose"]:
                    traceback.print_exc(file=sys.stderr)
                code, sentence = _failure(error)
                tell(sentence)
                return Answer(code=code)

    return answer


def _failure(error: BaseException) -> tuple[int, str]:
    """Return the exit code of a failure, and the sentence that describes it."""
    if was_interrupted(error):
        how_to_go_on = str(error) if isinstance(error, KeyboardInterrupt) else ""
        return INTERRUPTED, f"interrupted; {how_to_go_on or 'nothing was written'}"
    if isinstance(error, TdcompileError):
        return error.exit_code, f"error: {' '.join(str(error).split())}"
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return InputError.exit_code, f"error: {where}{error.strerror or error}"
    if isinstance(error, ImportError):
        return UNAVAILABLE, f"error: {error}; 'tdcompile doctor' checks the installation"
    said = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
    said += "".join(f", {note}" for note in getattr(error, "__notes__", ()))
    return TdcompileError.exit_code, f"error: {said}; run again with -v for the traceback"


app = typer.Typer(
    name="tdcompile",
    help="A tensor-decomposition compiler: a PyTorch network in, a smaller, faster, verified ONNX model out.",
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.callback(invoke_without_command=True)(_top)
for _name, _command in _COMMANDS.items():
    app.command(_name, help=inspect.cleandoc(_command.__doc__ or "").partition("\n\n")[0])(_answering(_command))
