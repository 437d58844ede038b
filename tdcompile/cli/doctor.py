"""``tdcompile doctor``: whether this environment can do what tdcompile does, one check at a time.

What is looked at is imported where it is looked at: a broken installation is what the doctor is asked about.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.table import Table
from rich.text import Text

from tdcompile.cli.console import Answer
from tdcompile.errors import InputError, TdcompileError, UnavailableError, nearest

_DEVICES = ("cpu", "cuda")
_WORTH = 1.2  # times as fast, below which bf16 is nothing to advise
# What an extra is for, and what is imported of it.
_EXTRAS = {"data": ("to read such data", ("datasets", "pyarrow", "PIL", "sklearn")), "ray": ("for --ray", ("ray",))}


@dataclass(frozen=True)
class Check:
    """What was looked at, what was found, and whether what was asked can be done without it.

    Attributes:
        passed: it is as it should be.
        needed: where it is not, ``tdcompile doctor`` fails.
    """

    name: str
    passed: bool
    found: str
    needed: bool = True


def doctor(given: Mapping[str, Any]) -> Answer:
    """The environment and the checks; exit code 5 where one fails that is needed.

    Raises:
        InputError: there is no such target.
    """
    target = given["target"] or "cpu"
    if target not in _DEVICES:
        raise InputError(f"there is no target '{target}': {nearest(target, _DEVICES)}")
    checks, about = examine(target), machine()
    code = UnavailableError.exit_code if any(check.needed and not check.passed for check in checks) else 0
    if given["json"]:
        document = {"environment": about, "checks": [dataclasses.asdict(check) for check in checks]}
        return Answer((json.dumps(document, indent=1),), code)
    environment = Table("", "found", title="environment", title_justify="left")
    for name, value in about.items():
        environment.add_row(name, Text(value))
    table = Table("", "check", "found", title="checks", title_justify="left")
    for check in checks:
        table.add_row("ok" if check.passed else "FAILS" if check.needed else "absent", check.name, Text(check.found))
    verdict = f"this environment can{'' if code == 0 else 'not'} compile for {target}"
    return Answer((environment, table, verdict), code)


def examine(target: str = "cpu") -> list[Check]:
    """All checks, those of a CUDA device counting only where it is the target."""
    return [
        _tried("packages", _packages),
        _tried("one onnxruntime", _one_onnxruntime),
        _tried("CPU provider", partial(_provider, "cpu")),
        _tried("CUDA provider", partial(_provider, "cuda"), needed=target == "cuda"),
        _tried("cache folder", _cache),
        _tried("fast bf16", partial(_fast_bf16, target), needed=False),
        *(_tried(f"extra '{name}'", partial(_extra, name), needed=False) for name in _EXTRAS),
    ]


def machine() -> dict[str, str]:
    """Versions and machine, as far as they can be told."""
    try:
        from tdcompile.backend.environment import environment
        from tdcompile.ir.target import Target

        return environment(Target())
    except Exception as error:  # noqa: BLE001  # a broken installation raises anything
        return {"python": platform.python_version(), "os": platform.platform(), "onnxruntime": f"fails: {error}"}


def _tried(name: str, look: Callable[[], str], *, needed: bool = True) -> Check:
    try:
        return Check(name, True, look(), needed)
    except TdcompileError as error:
        return Check(name, False, str(error), needed)
    except Exception as error:  # noqa: BLE001  # a broken installation raises anything, and every other check still counts
        return Check(name, False, f"{type(error).__name__}: {error}", needed)


def _packages() -> str:
    versions = dict(_versions())
    missing = [name for name, found in versions.items() if found is None]
    if missing:
        raise UnavailableError(f"{', '.join(missing)} not installed: pip install tdcompile")
    return ", ".join(f"{name} {found}" for name, found in versions.items())


def _versions() -> Iterator[tuple[str, str | None]]:
    for name in _needed():
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield name, None


def _needed() -> list[str]:
    """The names of what the installed package asks for, but for onnxruntime, which has a check of its own."""
    asked = [text for text in importlib.metadata.requires("tdcompile") or () if "extra ==" not in text]
    names = dict.fromkeys(match[0] for text in asked if (match := re.match(r"[\w.-]+", text)))
    return [name for name in names if not name.startswith("onnxruntime")]


def _one_onnxruntime() -> str:
    from tdcompile.backend.environment import distributions

    wheels = distributions()
    if len(wheels) != 1:
        found = " and ".join(f"{name} {found}" for name, found in wheels.items()) or "none"
        raise UnavailableError(
            f"expected one, found {found}: uninstall every onnxruntime, then install tdcompile, which brings its own"
        )
    return " ".join(next(iter(wheels.items())))


def _provider(device: str) -> str:
    """A session on the smallest of models: that a provider is listed as available proves nothing."""
    from tdcompile.backend.session import open_probe
    from tdcompile.recipes import load_recipe

    session = open_probe(load_recipe(None, {"target": device}).device())
    return f"{session.get_providers()[0]} opens a session"


def _fast_bf16(device: str) -> str:
    from tdcompile.training.mixed_precision import bf16_speedup

    gain = bf16_speedup(device)
    if gain < _WORTH:
        raise UnavailableError(f"a training step in bf16 takes {1 / gain:.1f} times what it takes in fp32")
    return f"a training step goes {gain:.1f} times as fast as in fp32: --tune epochs=N,precision=bf16"


def _cache() -> str:
    from tdcompile.backend.layer_timing import cache_folder

    folder = cache_folder()
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
        raise UnavailableError(f"measurements cannot be kept in {folder}: set TDCOMPILE_CACHE to a folder of yours")
    return str(folder)


def _extra(name: str) -> str:
    purpose, packages = _EXTRAS[name]
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise UnavailableError(f"{', '.join(missing)} not installed: pip install 'tdcompile[{name}]' {purpose}")
    return ", ".join(packages)
