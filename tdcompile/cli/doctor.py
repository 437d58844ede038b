"""The command ``doctor``: checks whether this environment can compile.

Each check imports what it needs itself: in a broken installation the other checks must still run.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from json import dumps

from rich.table import Table
from rich.text import Text

from tdcompile.cli.console import Answer
from tdcompile.cli.options import Json, Quiet, Target, Verbose
from tdcompile.errors import InputError, TdcompileError, UnavailableError, nearest

_DEVICES = ("cpu", "cuda")
_WORTH = 1.2  # speed-up below which bf16 is not recommended
# For each extra: its purpose, and the packages it brings.
_EXTRAS = {"data": ("to read such data", ("datasets", "pyarrow", "PIL", "sklearn")), "ray": ("for --ray", ("ray",))}


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: the subject of the check.
        passed: whether the check passed.
        found: the details.
        needed: whether ``tdcompile doctor`` fails if the check does.
    """

    name: str
    passed: bool
    found: str
    needed: bool = True


def doctor(
    target: Target = None,
    json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> Answer:
    """Check whether this environment can compile; exit 5 if not.

    Raises:
        InputError: there is no such target.
    """
    target = "cpu" if target is None else target
    if target not in _DEVICES:
        raise InputError(f"there is no target '{target}': {nearest(target, _DEVICES)}")
    checks, about = examine(target), machine()
    code = UnavailableError.exit_code if any(check.needed and not check.passed for check in checks) else 0
    if json:
        document = {"environment": about, "checks": [dataclasses.asdict(check) for check in checks]}
        return Answer((dumps(document, indent=1),), code)
    environment = Table("", "found", title="environment", title_justify="left")
    for name, value in about.items():
        environment.add_row(name, Text(value))
    table = Table("", "check", "found", title="checks", title_justify="left")
    for check in checks:
        table.add_row("ok" if check.passed else "FAILS" if check.needed else "absent", check.name, Text(check.found))
    verdict = f"this environment can{'' if code == 0 else 'not'} compile for {target}"
    return Answer((environment, table, verdict), code)


def examine(target: str = "cpu") -> list[Check]:
    """Run all checks; the CUDA provider is needed only if CUDA is the target."""
    return [
        _tried("packages", _packages),
        _tried("one onnxruntime", _one_onnxruntime),
        _tried("CPU provider", partial(_provider, "cpu")),
        _tried("CUDA provider", partial(_provider, "cuda"), needed=target == "cuda"),
        _tried("cache folder", _cache),
        _tried("int8", partial(_int8, target), needed=False),
        _tried("fast bf16", partial(_fast_bf16, target), needed=False),
        *(_tried(f"extra '{name}'", partial(_extra, name), needed=False) for name in _EXTRAS),
    ]


def machine() -> dict[str, str]:
    """Return versions and machine, as far as they are known."""
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
    """Return the required packages without onnxruntime, which has its own check."""
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
    return _provider_of(device, "fp32")


def _provider_of(device: str, precision: str) -> str:
    from tdcompile.backend.session import open_probe
    from tdcompile.recipes import load_recipe

    session = open_probe(load_recipe(None, {"target": device, "precision": precision}).device())
    return f"{session.get_providers()[0]} opens a session"


def _int8(device: str) -> str:
    """What int8 and fp16 bring on this machine."""
    if device == "cuda":
        _provider_of(device, "int8")
        return "TensorRT opens a session: --precision int8 or fp16"
    from tdcompile.backend.quantized_form import form_of, integer_instructions
    from tdcompile.ir.target import Target

    form, found = form_of(Target()), integer_instructions()
    if form.reduced:
        raise UnavailableError(
            f"this processor has {found}: int8 models take smaller weights and are hardly faster than fp32"
        )
    return f"{found}: --precision int8 makes convolutions and products about 2 to 4 times as fast; fp16 is for GPUs"


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
