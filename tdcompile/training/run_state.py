"""``Tuning``: the figures of a training run, for the report; ``Saved``: its state on disk, to resume from."""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import shutil
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from tdcompile.core.plugin import Plugin
from tdcompile.errors import UnwrittenError
from tdcompile.ir.facts import Fact

log = logging.getLogger("tdcompile")

Optimizer = Literal["sgd", "adam"]


class Epoch(NamedTuple):
    """One epoch of training; the held-out figures are None without a held-out split or without labels."""

    epoch: int
    train_loss: float
    heldout_score: float | None
    heldout_loss: float | None


@dataclass(frozen=True)
class Tuning(Fact):
    """The figures of a training run.

    Attributes:
        epochs: the number of epochs; 0 without training samples.
        curve: one entry an epoch.
        best_epoch: the epoch whose weights were kept; 0 keeps the weights before training.
        seconds: the duration of all epochs, including epochs before an interruption.
        start_score: the metric on the held-out split before training; None without targets.
        rate: the highest learning rate.
        optimizer: whose rate it is.
    """

    epochs: int = 0
    curve: tuple[Epoch, ...] = ()
    best_epoch: int = 0
    seconds: float = 0.0
    start_score: float | None = None
    rate: float | None = None
    optimizer: Optimizer = "sgd"


@dataclass(frozen=True)
class Int8Tuning(Tuning):
    """The figures of a training run through the rounding of int8."""


@dataclass(frozen=True)
class Saved:
    """The state of a training run on disk; only a run with the same key resumes from it.

    Attributes:
        folder: the folder of the state; None saves nothing.
        key: the digest of all that decides the run; see ``key_of``.
    """

    folder: Path | None
    key: str

    def read(self, device: torch.device) -> dict[str, Any] | None:
        """Return the state with its tensors on the device; None without a readable state of this run."""
        where = "cpu" if device.type == "cpu" else device  # torch.load rejects 'cpu:0', the device in several processes
        if self.folder is None or not (self.folder / "state.pt").is_file():
            return None
        path = self.folder / "state.pt"
        try:
            if not zipfile.is_zipfile(path):  # torch's reader of its older format raises errors of any type
                raise OSError("it is not a complete zip file")
            state: dict[str, Any] = torch.load(path, map_location=where, weights_only=True)
        except (RuntimeError, OSError, pickle.UnpicklingError) as error:
            log.warning("the saved training state %s cannot be read and is ignored: %s", path, error)
            return None
        if state.get("key") != self.key:
            log.info("the saved training state %s belongs to another run and is ignored", path)
            return None
        return state

    def write(self, state: dict[str, Any]) -> None:
        """Write a state atomically.

        Raises:
            UnwrittenError: the state cannot be written, for example because the disk is full.
        """
        if self.folder is None:
            return
        part = self.folder / "state.pt.part"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            torch.save({**state, "key": self.key}, part)
            os.replace(part, self.folder / "state.pt")
        except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
            raise UnwrittenError(f"the training state cannot be written to {self.folder}: {error}") from error


def state_folder(workspace: Path | None, step: Plugin) -> Path | None:
    """Return the folder of a pass's training state; None without a workspace."""
    return None if workspace is None else workspace / step.name


def delete_state(workspace: Path | None, step: Plugin) -> None:
    """Delete the training state of a pass: its result is saved, or another run begins."""
    folder = state_folder(workspace, step)
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def key_of(modules: Iterable[nn.Module], *facts: object) -> str:
    """Return a digest of the modules' parameters and buffers and of other facts that decide a run."""
    digest = hashlib.sha256(repr(facts).encode())
    for module in modules:
        for name, tensor in module.state_dict().items():
            plain = isinstance(tensor, torch.Tensor) and not tensor.is_quantized
            if not plain:  # the state of a quantised layer holds other values too
                digest.update(f"{name}:{tensor}".encode())
                continue
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
