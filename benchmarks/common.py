"""What the benchmarks share: one table, in Markdown and JSON, with the command, seed, versions and machine of it."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import tdcompile
from tdcompile.backend.runtime import environment
from tdcompile.data import load_data
from tdcompile.network import Network
from tdcompile.program import Program
from tdcompile.registry import make
from tdcompile.source import load_weights
from tdcompile.target import Budget, Target
from tdcompile.task import Samples, Task


def network(name: str, seed: int) -> tuple[torch.nn.Module, torch.Tensor]:
    """A reference network with random weights, and one sample to go through it."""
    torch.manual_seed(seed)
    made = make(Network, name)
    return made.build(), torch.randn(1, *made.input_shapes[0])


def trained(name: str, weights: Path, data: str, seed: int) -> tuple[torch.nn.Module, Samples | None, Samples | None]:
    """A reference network for CIFAR-10 with its weights, and the images to train and to test on."""
    train, test = load_data(data, (3, 32, 32), "imagenet", seed)
    module = make(Network, name).build()
    load_weights(module, weights)
    return module, train, test


def traced(
    name: str, weights: Path, data: str, macs: float, seed: int
) -> tuple[Program, Samples | None, Samples | None]:
    """That network as a program under a budget of MACs, and the images to train and to test on."""
    module, train, test = trained(name, weights, data, seed)
    program = tdcompile.trace(module, (torch.randn(2, 3, 32, 32),))
    return program.with_(task=Task(train, test, source=data), budget=Budget(macs=macs), seed=seed), train, test


def percent(share: float | None) -> str | None:
    """An accuracy in [0, 1] as a table has it."""
    return None if share is None else f"{share * 100:.2f}"


def publish(title: str, rows: Sequence[dict[str, Any]], seed: int, target: Target, file: Path | None) -> None:
    """Print the rows as a Markdown table under what made them, and write the same as JSON."""
    described = environment(target)
    command = shlex.join(["python", *sys.argv])
    print(f"### {title}\n\n`{command}`, seed {seed}, {machine(described)}\n")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(_text(row.get(column)) for column in columns) + " |")
    print(flush=True)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        document = {"title": title, "command": command, "seed": seed, "environment": described, "rows": list(rows)}
        file.write_text(json.dumps(document, indent=1) + "\n")


def machine(described: dict[str, str]) -> str:
    """One line about the machine."""
    device = described.get("gpu") or described["cpu"]
    runtime = next((f"{k} {v}" for k, v in described.items() if k.startswith("onnxruntime")), "")
    return f"{device}, {described['cores']} cores, {described['threads']} thread(s), {runtime}"


def _text(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
