"""The wheel holds everything: installed alone in an empty folder, the command lists its plug-ins and runs the demo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command: str, cwd: Path, path: Path | None = None) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} | ({"PYTHONPATH": str(path)} if path else {})
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # setuptools builds beside the sources, and these are not to be touched
    files = run("git", "ls-files", cwd=ROOT).splitlines()
    for name in files:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source), cwd=folder)
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_every_source_and_what_goes_with_it(wheel: Path) -> None:
    packed = set(zipfile.ZipFile(wheel).namelist())
    tracked = run("git", "ls-files", "tdcompile", "passes", "models", cwd=ROOT).splitlines()
    for name in tracked:
        place = name if name.startswith("tdcompile/") else f"tdcompile/{name}"
        assert place in packed, f"{name} is not in the wheel"
    assert not [name for name in packed if name.startswith(("tests", "benchmarks", "passes", "models"))]


@pytest.mark.slow
def test_the_demo_runs_from_an_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "install", "--no-deps", "--target", str(site), str(wheel), cwd=tmp_path)
    tdcompile = (sys.executable, "-m", "tdcompile")
    where = run(sys.executable, "-c", "import tdcompile; print(tdcompile.__file__)", cwd=tmp_path, path=site)
    assert where.startswith(str(site))
    assert "tucker2" in run(*tdcompile, "list", "decompositions", cwd=tmp_path, path=site)
    report = json.loads(run(*tdcompile, "demo", "-o", "out", "--json", cwd=tmp_path, path=site))
    assert report["compiled"]["macs"] < report["dense"]["macs"]
    assert (tmp_path / "out" / "model.onnx").is_file()
    if report["precision"] == "int8":
        assert [one["file"] for one in report["variants"]][2:] == ["dense.int8.onnx", "model.onnx"]
        assert (tmp_path / "out" / "dense.int8.onnx").is_file()
