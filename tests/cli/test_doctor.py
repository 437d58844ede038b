"""The doctor says what is wrong, each check on its own, and fails only over what was asked for."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from pathlib import Path

import pytest

import tdcompile.backend.session
import tdcompile.training.mixed_precision
from tdcompile.cli.doctor import Check, examine, machine
from tdcompile.cli.main import main
from tdcompile.errors import UnavailableError


def check(name: str, target: str = "cpu") -> Check:
    return next(check for check in examine(target) if check.name == name)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TDCOMPILE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_sound_environment_passes_and_nothing_is_written(cache: Path) -> None:
    assert [found.name for found in examine() if found.needed and not found.passed] == []
    assert not cache.exists()


def test_the_machine_is_told() -> None:
    assert machine().keys() >= {"python", "torch", "onnx", "cpu", "provider"}


def test_a_broken_installation_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(target: object) -> dict[str, str]:
        raise ImportError("libonnxruntime.so is gone")

    monkeypatch.setattr(tdcompile.backend.environment, "environment", broken)
    assert "libonnxruntime.so is gone" in machine()["onnxruntime"]


@pytest.mark.parametrize(
    ("wheels", "named"),
    [({"onnxruntime": "1.31", "onnxruntime-gpu": "1.30"}, "onnxruntime 1.31 and onnxruntime-gpu 1.30"), ({}, "none")],
)
def test_there_is_one_onnxruntime(
    wheels: dict[str, str],
    named: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tdcompile.backend.environment, "distributions", lambda: wheels)
    found = check("one onnxruntime")
    assert not found.passed
    assert named in found.found
    assert main(["doctor"]) == UnavailableError.exit_code
    assert "cannot compile for cpu" in capsys.readouterr().out


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version

    def without_onnxsim(name: str) -> str:
        if name == "onnxsim":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without_onnxsim)
    found = check("packages")
    assert (found.passed, found.needed) == (False, True)
    assert "onnxsim not installed" in found.found


def test_an_extra_may_be_absent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = check("extra 'data'")
    assert (found.passed, found.needed) == (False, False)
    assert "tdcompile[data]" in found.found
    assert main(["doctor"]) == 0
    assert "absent" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("gain", "passed", "told"), [(1.94, True, "1.9 times as fast"), (0.5, False, "2.0 times what")]
)
def test_bf16_is_advised_where_it_is_fast(
    gain: float, passed: bool, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tdcompile.training.mixed_precision, "bf16_speedup", lambda device: gain)
    found = check("fast bf16")
    assert (found.passed, found.needed) == (passed, False)
    assert told in found.found
    assert ("precision=bf16" in found.found) == passed


def test_the_cache_must_be_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TDCOMPILE_CACHE", str(tmp_path / "file" / "cache"))
    found = check("cache folder")
    assert not found.passed
    assert "TDCOMPILE_CACHE" in found.found


def test_cuda_counts_only_where_it_is_the_target(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    open_session = tdcompile.backend.session.open_session

    def without_cuda(model: bytes, target: tdcompile.backend.session.Target) -> object:
        if target.device == "cuda":
            raise UnavailableError("libcublas.so is missing")
        return open_session(model, target)

    monkeypatch.setattr(tdcompile.backend.session, "open_session", without_cuda)
    assert main(["doctor"]) == 0
    assert "libcublas.so is missing" in capsys.readouterr().out
    assert main(["doctor", "--target", "cuda", "--json"]) == UnavailableError.exit_code
    document = json.loads(capsys.readouterr().out)
    failed = [found["name"] for found in document["checks"] if found["needed"] and not found["passed"]]
    assert failed == ["CUDA provider"]
    assert "python" in document["environment"]


def test_an_unknown_target_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--target", "cdua"]) == 2
    assert "did you mean 'cuda'?" in capsys.readouterr().err
