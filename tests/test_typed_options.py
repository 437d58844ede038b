"""``compile`` is typed: its keyword options are those of ``Recipe``, and mypy rejects a wrong name or type."""

from __future__ import annotations

import re
import subprocess
import sys
import typing
from pathlib import Path

from pydantic import TypeAdapter

from tdcompile.recipes import CompileOptions, Recipe

ROOT = Path(__file__).resolve().parent.parent
CALLS = """
from torch import Tensor, nn
from tdcompile.compiler import compile

def build(net: nn.Module, x: Tensor) -> None:
    compile(net, x, budget={"macs": 0.5}, target="cpu", keep_dense=["fc*"], tune="epochs=5")
    compile(net, x, bugdet={"macs": 0.5})
    compile(net, x, threads="four")
    compile(net, x, target="tpu")
"""
ERRORS = {  # by line
    7: 'Unexpected keyword argument "bugdet"',
    8: 'Argument "threads" to "compile" has incompatible type "str"; expected "int"',
    9: 'Argument "target" to "compile" has incompatible type "Literal[\'tpu\']"',
}


def test_the_options_of_compile_are_the_fields_of_a_recipe_but_for_what_it_is_given_itself() -> None:
    hints = typing.get_type_hints(CompileOptions)
    assert hints.keys() == Recipe.model_fields.keys() - {"weights", "input", "example", "data"}
    for name, kind in hints.items():
        default = Recipe.model_fields[name].default
        if isinstance(default, str | int | None):
            TypeAdapter(kind, config=None if kind is bool else {"arbitrary_types_allowed": True}).validate_python(
                default, strict=True
            )


def test_mypy_takes_the_options_of_a_recipe_and_rejects_all_others(tmp_path: Path) -> None:
    file = tmp_path / "calls.py"
    file.write_text(CALLS)
    config = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
    ran = subprocess.run(
        [sys.executable, "-m", "mypy", *config, "--follow-imports=silent", str(file)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    found = dict(re.findall(r"calls\.py:(\d+): error: (.*)", ran.stdout))
    assert found.keys() == {str(line) for line in ERRORS}, ran.stdout + ran.stderr
    assert all(found[str(line)].startswith(error) for line, error in ERRORS.items())
