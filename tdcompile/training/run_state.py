"""``Tuning``: how a training run went, for the report; ``Saved``: what an interrupted one goes on from."""

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
from typing import Any, NamedTuple

import torch
from torch import nn

from tdcompile.core.plugin import Plugin
from tdcompile.errors import UnwrittenError
from tdcompile.ir.facts import Fact

log = logging.getLogger("tdcompile")


class Epoch(NamedTuple):
    """One epoch of training; the held-out figures are None where nothing is held out, or without labels."""

    epoch: int
    train_loss: float
    heldout_accuracy: float | None
    heldout_loss: float | None


@dataclass(frozen=True)
class Tuning(Fact):
    """How a training run went.

    Attributes:
        epochs: how many were run; 0 where there was nothing to train on.
        curve: one entry an epoch.
        best_epoch: whose weights were kept; 0 are those before training.
        seconds: of all epochs, those before an interruption included.
        start_accuracy: on the held-out samples before training.
        rate: the highest learning rate.
    """

    epochs: int = 0
    curve: tuple[Epoch, ...] = ()
    best_epoch: int = 0
    seconds: float = 0.0
    start_accuracy: float | None = None
    rate: float | None = None


@dataclass(frozen=True)
class Saved:
    """The state of a training run on disk, good for the run with the same key alone.

    Attributes:
        folder: where it lies; None keeps nothing.
        key: see ``key_of``.
    """

    folder: Path | None
    key: str

    def read(self, device: torch.device) -> dict[str, Any] | None:
        """The state of a run, its tensors on the device; None where there is none, or one of another run."""
        where = "cpu" if device.type == "cpu" else device  # torch knows no place 'cpu:0', as several processes have it
        if self.folder is None or not (self.folder / "state.pt").is_file():
            return None
        path = self.folder / "state.pt"
        try:
            if not zipfile.is_zipfile(path):  # torch's reader of its older format raises anything at all
                raise OSError("it is no whole zip file")
            state: dict[str, Any] = torch.load(path, map_location=where, weights_only=True)
        except (RuntimeError, OSError, pickle.UnpicklingError) as error:
            log.warning("the saved training state %s cannot be read and is left aside: %s", path, error)
            return None
        if state.get("key") != self.key:
            log.info("the saved training state %s is of another run and is left aside", path)
            return None
        return state

    def write(self, state: dict[str, Any]) -> None:
        """Keep a state, whole or not at all.

        Raises:
            UnwrittenError: the folder cannot be written.
        """
        if self.folder is None:
            return
        part = self.folder / "state.pt.part"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            torch.save({**state, "key": self.key}, part)
            os.replace(part, self.folder / "state.pt")
        except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError on a full disk
            raise UnwrittenError(f"the training state cannot be written to {self.folder}: {error}") from error

    def clear(self) -> None:
        """Forget the state: what the run made is kept elsewhere."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def kept_in(workspace: Path | None, step: Plugin) -> Path | None:
    """Where a pass keeps its training; None without a workspace."""
    return None if workspace is None else workspace / step.name


def key_of(modules: Iterable[nn.Module], *facts: object) -> str:
    """A digest of the modules' parameters and buffers, names, shapes and values, and of whatever else decides a run."""
    digest = hashlib.sha256(repr(facts).encode())
    for module in modules:
        for name, tensor in module.state_dict().items():
            plain = isinstance(tensor, torch.Tensor) and not tensor.is_quantized
            if not plain:  # a quantised layer's state holds other things too
                digest.update(f"{name}:{tensor}".encode())
                continue
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
