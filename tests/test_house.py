"""The house rules: floors, the plug-in rule, packaging, one onnxruntime, no unsafe loading, no printing."""

import ast
import re
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CORE, PLUGINS = ROOT / "tdcompile", [ROOT / "passes", ROOT / "models"]

# A file imports from floors below its own, and from those of its own floor that stand before it here.
FLOORS = """
    errors spec noise memory sketch linalg multilinear degeneracy anchors normal inputmap

    plugin facts layer callables vocabulary extras processes workers

    target task surgery amp batchnorm signature images tuning metric calibration patches regression streams

    program augment readers

    samples ranks kinds decomposition fractions approximation importance network polyadic selection

    registry divergence trial pricing single_rank relaxation progressive pipeline planfile distillation training
    tables

    frontend.turns frontend.constants frontend.calls frontend.functional frontend.symbolic frontend.exported
    frontend.unparametrised frontend.precision frontend.answers frontend.fronts frontend.tracing
    backend.export backend.runtime backend.validate backend.microbench backend.transplant
    data source recipes architecture

    backend.attribution backend.inference artifact checkpoint outcome report summary compiler
    studies.findings studies.correlation studies.cell studies.ledger studies.crew studies.page studies.experiment
    __init__

    commands.console commands.interruption commands.options commands.examples commands.anatomy commands.job
    commands.doctor

    commands.compile commands.inspect commands.models commands.study cli __main__
"""
ORDER = {name: place for place, name in enumerate(FLOORS.split())}


def imports(file):
    """Modules that a file imports when it runs, with those inside functions; not those for types alone."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from [module for module in inner if module.removeprefix("tdcompile.") in ORDER] or [node.module]
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


CORE_FILES = {".".join(file.relative_to(CORE).with_suffix("").parts): file for file in sorted(CORE.rglob("*.py"))}
FOLDERS = {name: file for name, file in CORE_FILES.items() if name.endswith(".__init__")}


def test_every_core_file_has_a_floor_and_no_floor_names_a_file_that_is_gone():
    assert CORE_FILES.keys() - FOLDERS.keys() == set(ORDER)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_of_the_core_imports_nothing_of_its_own_accord(folder):
    assert not list(imports(FOLDERS[folder]))


@pytest.mark.parametrize("name", ORDER)
def test_a_file_imports_only_from_below(name):
    for module in imports(CORE_FILES[name]):
        if module.startswith("tdcompile."):
            assert not module.startswith(("tdcompile.passes", "tdcompile.models")), "the core never imports a plug-in"
            assert ORDER[module.removeprefix("tdcompile.")] < ORDER[name], f"{name} imports {module} from above"


@pytest.mark.parametrize(
    "file",
    sorted(file for folder in PLUGINS for file in folder.rglob("*.py")),
    ids=lambda f: f"{f.parent.name}-{f.stem}",
)
def test_a_plug_in_imports_no_other_plug_in(file):
    assert not [m for m in imports(file) if m.startswith(("tdcompile.passes", "tdcompile.models"))]


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
