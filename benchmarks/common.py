"""Parts of all benchmarks: reference networks, and a table in Markdown and JSON with its provenance."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import Any

import torch
from results import Table

import tdcompile
from tdcompile.backend.environment import environment
from tdcompile.backend.quantized_form import integer_instructions
from tdcompile.core.network import Network
from tdcompile.core.registry import make
from tdcompile.data.loading import load_data
from tdcompile.data.task import Samples, Task
from tdcompile.frontend.load_network import load_weights
from tdcompile.ir.program import Program
from tdcompile.ir.target import Budget, Target


def network(name: str, seed: int) -> tuple[torch.nn.Module, torch.Tensor]:
    """Return a reference network with random weights, and one input sample."""
    torch.manual_seed(seed)
    made = make(Network, name)
    return made.build(), torch.randn(1, *made.input_shapes[0])


def trained(
    name: str, weights: Path | None, data: str, seed: int
) -> tuple[torch.nn.Module, Samples | None, Samples | None]:
    """Return a reference network for CIFAR-10 with its training and test samples; random weights without a file."""
    train, test = load_data(data, (3, 32, 32), "imagenet", seed)
    torch.manual_seed(seed)
    module = make(Network, name).build()
    if weights is not None:
        load_weights(module, weights)
    return module, train, test


def traced(
    name: str, weights: Path, data: str, macs: float, seed: int
) -> tuple[Program, Samples | None, Samples | None]:
    """Return a trained reference network as a program under a budget of MACs, with training and test samples."""
    module, train, test = trained(name, weights, data, seed)
    program = tdcompile.trace(module, (torch.randn(2, 3, 32, 32),))
    return program.with_(task=Task(train, test, source=data), budget=Budget(macs=macs), seed=seed), train, test


def percent(share: float | None) -> float | None:
    """Return an accuracy in [0, 1] in percent, to two digits."""
    return None if share is None else round(share * 100, 2)


def publish(
    title: str,
    rows: Sequence[dict[str, Any]],
    seed: int,
    target: Target,
    file: Path | None,
    formats: Mapping[str, str] | None = None,
) -> None:
    """Print the rows as a Markdown table and write them as JSON in the schema of ``docs/measurements/``.

    Args:
        formats: Format specifications of columns that override the default of ``Table.of_records``.
    """
    described = surroundings(target)
    table = Table.of_records(
        rows,
        formats or {},
        title=title,
        command=shlex.join(["python", *map(_portable, sys.argv)]),
        data=_option("--data"),
        seed=seed,
        machine=machine(described),
        date=date.today().isoformat(),
        commit=commit(),
        environment=described,
    )
    print(f"### {title}\n\n{table.markdown()}\n\n{table.provenance()}\n", flush=True)
    if file is not None:
        table.write(file)


def surroundings(target: Target) -> dict[str, str]:
    """Return the versions and the machine that figures depend on."""
    described = {**environment(target), "int8": integer_instructions()}
    if "transformers" in sys.modules:  # the benchmark compiles its networks
        described["transformers"] = version("transformers")
    return described


def machine(described: dict[str, str]) -> str:
    """Describe the machine and the versions that figures depend on in one line."""
    device = described.get("gpu") or f"{described['cpu']} ({described['int8']})"
    parts = [device, f"{described['cores']} cores", f"{described['threads']} thread(s)"]
    named = ("onnxruntime", "torch", "transformers")
    return ", ".join([*parts, *(f"{name} {text}" for name, text in described.items() if name.startswith(named))])


def _portable(argument: str) -> str:
    """Drop the folders of this machine from an absolute path, also after a scheme such as ``parquet:``."""
    scheme, colon, path = argument.rpartition(":")
    return f"{scheme}{colon}{PurePath(path).name}" if PurePath(path).is_absolute() else argument


def _option(name: str) -> str | None:
    """Return the value that the command line gives an option."""
    words = [word for argument in sys.argv for word in argument.split("=", 1)] + [""]
    return _portable(words[words.index(name) + 1]) if name in words else None


def commit() -> str | None:
    """Return the commit of the project's checkout, or ``None`` outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
