"""The whole command in two processes: one plan, one folder, and what is raised in the first is raised in both."""

import atexit
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tdcompile.errors import BudgetError
from tdcompile.training.distributed import count, from_first, is_first

NETWORK = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
"""


def launch(folder: Path, port: int, *command: str) -> "subprocess.CompletedProcess[str]":
    """What ``torchrun`` does."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(
        [sys.executable, *launcher, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=280
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(NETWORK)
    generator = np.random.default_rng(0)
    y = generator.integers(0, 4, 160)
    x = generator.random((160, 1, 8, 8), dtype=np.float32) + y[:, None, None, None]
    np.savez(tmp_path / "data.npz", x=x.astype(np.float32), y=y)
    return tmp_path


def test_the_command_in_two_processes_writes_one_folder_of_one_network(folder: Path, free_port: int) -> None:
    flags = ["--input", "1x1x8x8", "--data", "npz:data.npz", "--calibrate", "32"]
    tune = ["--budget", "macs=0.6", "--tune", "epochs=1,batch=16,trial=0", "-o", "out"]
    run = launch(folder, free_port, "-m", "tdcompile", "compile", "net.py:build", *flags, *tune)
    assert run.returncode == 0, run.stderr[-3000:]
    report = json.loads((folder / "out" / "report.json").read_text())
    assert report["tuning_curve"]
    assert run.stdout.count("report:") == 1
    assert [entry.name for entry in folder.iterdir() if "out" in entry.name] == ["out"]


@pytest.mark.slow
def test_a_budget_that_cannot_be_met_is_told_and_ends_both(folder: Path, free_port: int) -> None:
    run = launch(
        folder, free_port, "-m", "tdcompile", "compile", "net.py:build", "--input", "1x1x8x8", "--budget", "macs=0.001"
    )
    assert run.returncode != 0
    assert "raise the budget" in run.stderr
    assert not [*folder.glob("out/*")]


def test_alone_the_work_is_simply_done() -> None:
    assert count() == 1
    assert is_first()
    assert from_first(lambda: 3, cpu=True) == 3
    with pytest.raises(ZeroDivisionError):
        from_first(lambda: 1 // 0, cpu=True)


def _waits(rank: int, port: int, out: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    # registered first, so run last: the bond is to be undone before the process ends
    atexit.register(lambda: Path(f"{out}/{rank}.bond").write_text(str(torch.distributed.is_initialized())))
    calls: list[int] = []
    found = from_first(lambda: calls.append(rank) or {"from": rank}, cpu=True)

    def fail() -> None:
        raise BudgetError("no plan")

    with pytest.raises(BudgetError, match="no plan"):
        from_first(fail, cpu=True)
    torch.save({"found": found["from"], "calls": calls}, f"{out}/{rank}.pt")
    assert torch.distributed.is_initialized()


def test_of_two_processes_the_first_works_and_both_know(tmp_path: Path, free_port: int) -> None:
    torch.multiprocessing.spawn(_waits, (free_port, str(tmp_path)), nprocs=2)
    first, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first == {"found": 0, "calls": [0]}
    assert other == {"found": 0, "calls": []}
    assert [(tmp_path / f"{rank}.bond").read_text() for rank in range(2)] == ["False", "False"]
