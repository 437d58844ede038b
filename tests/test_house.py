"""The house rules that import-linter cannot state: the plug-in rule, packaging, one onnxruntime, safe loading."""

import ast
import re
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CORE, PLUGINS = ROOT / "tdcompile", [ROOT / "passes", ROOT / "models"]


def imports(file):
    """Modules that a file imports when it runs, with those inside functions; not those for types alone."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


ROOMS = sorted(file for file in CORE.rglob("__init__.py") if file.parent != CORE)


@pytest.mark.parametrize("file", ROOMS, ids=lambda file: file.parent.name)
def test_a_room_imports_nothing_on_its_own(file):
    assert not list(imports(file))


def test_few_files_lie_outside_the_rooms():
    assert len(list(CORE.glob("*.py"))) <= 8


@pytest.mark.parametrize(
    "file",
    sorted(file for folder in PLUGINS for file in folder.rglob("*.py")),
    ids=lambda f: f"{f.parent.name}-{f.stem}",
)
def test_a_plug_in_imports_of_plug_ins_only_the_helpers_of_its_own_folder(file):
    own = "tdcompile." + ".".join(file.parent.relative_to(ROOT).parts) + "._"
    plugged = [m for m in imports(file) if m.startswith(("tdcompile.passes", "tdcompile.models"))]
    assert not [m for m in plugged if not m.startswith(own)]


@pytest.mark.parametrize(
    "file",
    sorted(f for folder in (CORE, *PLUGINS) for f in folder.rglob("*.py")),
    ids=lambda f: f"{f.parent.name}-{f.stem}",
)
def test_a_file_says_what_lives_there_and_neither_prints_nor_unpickles(file):
    text = file.read_text()
    assert ast.get_docstring(ast.parse(text))
    for call in (n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call)):
        assert getattr(call.func, "id", "") != "print" or file.parent.name == "models"
        if ast.unparse(call.func) == "torch.load":
            assert [k for k in call.keywords if k.arg == "weights_only" and getattr(k.value, "value", False) is True]


def test_the_packages_listed_are_the_folders_of_the_tree():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {
        "tdcompile." + ".".join(file.parent.relative_to(ROOT).parts)
        for folder in PLUGINS
        for file in folder.rglob("__init__.py")
    }
    folders |= {".".join(file.parent.relative_to(ROOT).parts) for file in CORE.rglob("__init__.py")}
    assert set(listed) == folders


def test_there_is_one_onnxruntime_and_the_project_asks_for_one_on_every_platform():
    installed = {d.metadata["Name"] for d in distributions() if re.match(r"onnxruntime(-|$)", d.metadata["Name"] or "")}
    assert len(installed) == 1, f"several onnxruntime distributions overwrite each other: {installed}"
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [r for r in map(Requirement, project["dependencies"]) if r.name.startswith("onnxruntime")]
    for system in ("Linux", "Windows", "Darwin"):
        for machine in ("x86_64", "aarch64", "AMD64", "arm64"):
            env = {"platform_system": system, "platform_machine": machine}
            assert len([r for r in asked if r.marker.evaluate(env)]) == 1, env


def test_ci_runs_what_the_readme_says():
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert "make test" in (ROOT / "README.md").read_text()
