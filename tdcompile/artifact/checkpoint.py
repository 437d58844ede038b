"""``Checkpoint``: a compilation between two passes, saved on disk; ``SaveCheckpoint``: the hook that saves it."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError
from pydantic_core import PydanticSerializationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tdcompile.artifact.folder import load_graph, save_weights
from tdcompile.backend.environment import peak_memory_mb
from tdcompile.core.hooks import Hook, RunRecord, Work
from tdcompile.core.passes import Pass
from tdcompile.core.registry import foreign_packages
from tdcompile.core.serialization import fact_from_plain, fact_to_plain
from tdcompile.errors import InputError, TdcompileError, UnwrittenError, first_line
from tdcompile.ir.diagnostics import Diagnostic
from tdcompile.ir.facts import Fact, Facts
from tdcompile.ir.measurements import Calibration
from tdcompile.ir.program import Change, Program
from tdcompile.numerics.covariance import Covariance, from_tensors
from tdcompile.training.distributed import is_first

log = logging.getLogger("tdcompile")
_HISTORY: TypeAdapter[tuple[Change | Diagnostic, ...]] = TypeAdapter(tuple[Change | Diagnostic, ...])


class Restored(NamedTuple):
    """A restored state: the program after ``done`` steps, and the figures of the earlier runs."""

    program: Program
    done: int
    record: RunRecord


@dataclass(frozen=True)
class Checkpoint:
    """A folder with the state after the last finished step of one compilation.

    Attributes:
        folder: the folder; the first save makes it.
        key: the parts that identify the compilation, such as options, network and data; only a state with an equal key
            is restored.
    """

    folder: Path
    key: Mapping[str, str]

    def save(self, program: Program, done: int, record: RunRecord) -> None:
        """Save a program after ``done`` steps; the earlier state stays valid until this one is complete.

        Args:
            program: the program to save.
            done: the number of finished steps.
            record: the figures of the run.

        Raises:
            UnwrittenError: the state cannot be written, for example because the disk is full.
        """
        try:
            self._write(program, done, record)
        except (OSError, SafetensorError) as error:
            raise UnwrittenError(f"the state of this run cannot be saved in {self.folder}: {error}") from error

    def _write(self, program: Program, done: int, record: RunRecord) -> None:
        draft = self.folder / f"state.{os.getpid()}"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        facts: dict[str, Any] = {}
        for fact in program.facts:
            if isinstance(fact, Calibration):
                save_file(_tensors(fact), draft / "moments.safetensors")
                facts["Calibration"] = {
                    "skipped": dict(fact.skipped),
                    "samples": fact.samples,
                    "shrunk": dict(fact.shrunk),
                    "patches": {name: m.samples for name, m in _distinct(fact).items()},
                    "layers": _owners(fact),
                }
            else:
                facts[_tag(type(fact))] = _plain(fact)
        if program.graph is not program.dense:
            save_weights(program.graph, draft / "graph.safetensors", {})
        history = _HISTORY.dump_python(program.history, mode="json")
        state = {"key": dict(self.key), "done": done, "facts": facts, "history": history}
        state |= {**_figures(record), "eval": program.task.evaluate}
        (draft / "state.json").write_text(json.dumps(state))
        state_folder, former = self.folder / "state", self.folder / "state.former"
        shutil.rmtree(former, ignore_errors=True)
        if state_folder.exists():
            state_folder.rename(former)
        draft.rename(state_folder)  # ``restore`` finds the earlier state until this line
        shutil.rmtree(former, ignore_errors=True)

    def note(self, record: RunRecord) -> None:
        """Save the figures of an interrupted run beside the state that it has saved or started from."""
        file = self.folder / "state" / "state.json"
        try:
            draft = file.with_suffix(f".{os.getpid()}")
            draft.write_text(json.dumps(json.loads(file.read_text()) | _figures(record)))
            draft.replace(file)
        except (OSError, ValueError) as error:  # they are lost; the state is not
            log.debug("the figures of the run are not saved in %s: %s", self.folder, error)

    def restore(self, program: Program) -> Restored | None:
        """Return the saved state on top of a program without facts; None without a readable state.

        Raises:
            InputError: the state belongs to another compilation; it stays on disk.
        """
        folder = self.folder / "state"
        folder = folder if folder.exists() else self.folder / "state.former"
        try:
            state = json.loads((folder / "state.json").read_text())
            others = self._others(state, program)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._warn(error)
            return None
        if others:
            raise InputError(
                f"the state in {self.folder} is of another compilation, with another {', another '.join(others)}: "
                "give the arguments of that compilation, or leave out --resume to start anew"
            )
        try:
            facts = [_fact(name, value, folder) for name, value in state["facts"].items()]
            graph = program.dense
            if (folder / "graph.safetensors").exists():
                graph = load_graph(folder / "graph.safetensors", trusted=_packages(program))
            history = _HISTORY.validate_python(tuple(state["history"]))
            restored = replace(program, graph=graph, facts=Facts(*facts), history=history)
            record = RunRecord(
                dict(state["seconds"]),
                state["before_tuning"],
                earlier=float(state.get("total", sum(state["seconds"].values()))),
                peak_memory_mb=float(state.get("peak_memory_mb", 0.0)),
            )
            return Restored(restored, int(state["done"]), record)
        except (OSError, ValueError, KeyError, ValidationError, SafetensorError, TdcompileError) as error:
            self._warn(error)
            return None

    def _others(self, state: Mapping[str, Any], program: Program) -> list[str]:
        """Return the parts of the key that differ from a saved state, each with its saved value if short."""
        saved = state["key"]
        if not isinstance(saved, Mapping):
            return ["version of tdcompile"]
        others = [name for name in {**self.key, **saved} if saved.get(name) != self.key.get(name)]
        told = {name: saved[name] for name in others if len(saved.get(name, "")) in range(1, 64)}  # no digests
        if state["before_tuning"] is not None and state["eval"] != program.task.evaluate:
            others, told["eval"] = (
                [*others, "eval"],
                json.dumps(state["eval"]),
            )  # the number of samples behind the accuracy
        return [f"{name} ({told[name]})" if name in told else name for name in others]

    def _warn(self, error: Exception) -> None:
        log.warning("the state in %s cannot be read (%s): starting anew", self.folder, error)

    def drop(self) -> None:
        """Delete the folder: the compilation is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)


class SaveCheckpoint(Hook):
    """Save the state after every step, in the first process only; restore it first if asked.

    Args:
        checkpoint: the folder of the state.
        record: saved with the program, and restored with it.
        resume: whether to start from the saved state, if there is one.
    """

    def __init__(self, checkpoint: Checkpoint, record: RunRecord, *, resume: bool) -> None:
        self._checkpoint, self._record, self._resume = checkpoint, record, resume
        self._saved = False  # whether the state on disk belongs to this run

    def begin(self, program: Program, steps: Sequence[Pass], done: int) -> tuple[Program, int]:
        """Return the saved program and its number of steps.

        Raises:
            InputError: the state belongs to another compilation.
        """
        restored = self._checkpoint.restore(program) if self._resume else None
        if restored is None:
            return program, done
        earlier, self._saved = restored.record, True
        for name, seconds in earlier.seconds.items():
            self._record.add(name, seconds)
        self._record.before_tuning = earlier.before_tuning
        self._record.earlier, self._record.peak_memory_mb = earlier.earlier, earlier.peak_memory_mb
        return restored.program, restored.done

    def around(self, step: Pass, position: int, program: Program, work: Work) -> Program:
        """Run the step, then save; save the figures alone if the step fails or is interrupted.

        Raises:
            UnwrittenError: see ``Checkpoint.save``.
        """
        start = time.perf_counter()
        try:
            after = work()
        except BaseException:
            self._record.add(step.name, time.perf_counter() - start)
            self.note()
            raise
        if is_first():
            self._checkpoint.save(after, position + 1, self._record)
            self._saved = True
        return after

    def note(self) -> None:
        """Save the figures of the run beside its state, if it has one."""
        if self._saved and is_first():
            self._checkpoint.note(self._record)


def _figures(record: RunRecord) -> dict[str, Any]:
    """Return the figures of all runs up to now as JSON."""
    return {
        "seconds": record.seconds,
        "before_tuning": record.before_tuning,
        "total": record.total,
        "peak_memory_mb": max(record.peak_memory_mb, peak_memory_mb()),
    }


def _plain(fact: Fact) -> Any:
    """Return a fact as JSON.

    Raises:
        TdcompileError: the fact holds a value without a JSON form.
    """
    try:
        return fact_to_plain(fact)
    except (PydanticSchemaGenerationError, PydanticSerializationError) as error:
        raise TdcompileError(
            f"the fact {type(fact).__name__} cannot be saved between passes: let it hold only numbers, texts, "
            f"and lists and mappings of them ({first_line(error)})"
        ) from error


def _packages(program: Program) -> tuple[str, ...]:
    """Return the packages of the user's classes and plug-ins; they are imported already, so the state may name them."""
    return (*{type(module).__module__ for module in program.dense.modules()}, *foreign_packages())


def _owners(calibration: Calibration) -> dict[str, str]:
    """Return for each layer the first layer that has the same covariance object: itself, unless it shares one."""
    first: dict[int, str] = {}
    return {layer: first.setdefault(id(known), layer) for layer, known in calibration.covariances.items()}


def _distinct(calibration: Calibration) -> dict[str, Covariance]:
    """Return each covariance object once, by its first layer."""
    return {owner: calibration.covariances[owner] for owner in _owners(calibration).values()}


def _tensors(calibration: Calibration) -> dict[str, Tensor]:
    """Return the tensors of all covariance objects, by ``name/layer``."""
    distinct = _distinct(calibration).items()
    return {f"{name}/{layer}": tensor for layer, known in distinct for name, tensor in known.tensors().items()}


def _fact(name: str, value: dict[str, Any], folder: Path) -> Fact:
    if name == "Calibration":
        tensors: dict[str, dict[str, Tensor]] = {layer: {} for layer in value["patches"]}
        for key, tensor in load_file(folder / "moments.safetensors").items():
            name, _, layer = key.partition("/")
            tensors[layer][name] = tensor
        distinct = {layer: from_tensors(tensors[layer], count) for layer, count in value["patches"].items()}
        covariances = {layer: distinct[owner] for layer, owner in value["layers"].items()}
        return Calibration(covariances, value["skipped"], value["samples"], value.get("shrunk", {}))
    return fact_from_plain({_tag(kind): kind for kind in _kinds(Fact)}[name], value)


def _kinds(kind: type[Fact]) -> Iterator[type[Fact]]:
    """Yield the classes of facts; a class that is defined again, as in a notebook, comes last."""
    for child in kind.__subclasses__():
        yield child
        yield from _kinds(child)


def _tag(kind: type[Fact]) -> str:
    """Return the name of a fact in a state; facts of plug-ins may have the name of another's fact."""
    own = kind.__module__.partition(".")[0] == "tdcompile"
    return kind.__name__ if own else f"{kind.__module__}:{kind.__qualname__}"
