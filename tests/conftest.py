"""What every test needs: GPU tests are skipped, with the reason, where onnxruntime's CUDA provider does not load."""

from __future__ import annotations

import functools
import socket

import pytest
import torch

import tdcompile.backend.export_and_measure
import tdcompile.compiler
from tdcompile.backend.session import open_probe
from tdcompile.errors import UnavailableError
from tdcompile.ir.target import Target


@functools.cache
def _why_no_gpu() -> str | None:
    """The reason why the CUDA provider does not run here; None where it does."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device"
    try:
        open_probe(Target("cuda"))
    except UnavailableError as error:
        return str(error)
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and (reason := _why_no_gpu()) is not None:
        pytest.skip(reason)


@pytest.fixture
def free_port() -> int:
    """A port of this machine at which processes may meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(autouse=True)
def brief_timing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time compiled models for a tenth of a second in place of three; a test marked ``timed`` keeps the real time."""
    if request.node.get_closest_marker("timed") is None:
        brief = functools.partial(tdcompile.backend.export_and_measure.measure, seconds=0.1)
        monkeypatch.setattr(tdcompile.compiler, "measure", brief)
