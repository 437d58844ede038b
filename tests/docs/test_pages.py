"""README and the pages of the site: their Python blocks run, their commands parse, their links and files exist."""

import contextlib
import doctest
import functools
import importlib
import io
import re
import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import command_pages
import pytest
import torch
import yaml

import tdcompile
from tdcompile.core import registry
from tdcompile.core.decomposition import Decomposition, relative_error
from tdcompile.core.network import Network
from tdcompile.core.plan import RankPlan
from tdcompile.core.plugin import Plugin
from tdcompile.ir.layer import Layer
from tdcompile.numerics.covariance import Identity
from tdcompile.recipes import Recipe, load_recipe

ROOT = Path(__file__).resolve().parent.parent.parent

# Python blocks that are not run, by page: each has ``<!-- not run: REASON -->`` on the line before its fence.
NOT_RUN: dict[str, int] = {}

FENCE = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+) -->\n)?^```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block; ``reason`` says why it is not run."""

    language: str
    text: str
    line: int
    reason: str | None


def blocks_of(text, *languages):
    return [
        Block(m["language"], m["text"], text[: m.start("text")].count("\n") + 1, m["reason"])
        for m in FENCE.finditer(text)
        if m["language"] in languages
    ]


def page(name):
    return (ROOT / name).read_text(encoding="utf-8")


PAGES = [
    path.relative_to(ROOT).as_posix()
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])
]
PYTHON_PAGES = [name for name in PAGES if blocks_of(page(name), "python", "pycon")]


@dataclass(frozen=True)
class Outcome:
    """What a page's Python blocks defined and printed."""

    names: dict[str, Any]
    printed: str


@functools.cache
def run(name):
    """Run the Python blocks of a page in order, in one namespace, as a reader would in a notebook; once a session."""
    names: dict[str, Any] = {"__name__": "docs_example"}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for block in blocks_of(page(name), "python"):
            if block.reason is None:
                exec(compile("\n" * (block.line - 1) + block.text, name, "exec"), names)  # with the page's line numbers
    return Outcome(names, printed.getvalue())


@pytest.fixture(autouse=True, scope="module")
def _own_plugins(tmp_path_factory):
    """Run in a folder of the tests' own, and unregister the plug-ins that the examples define."""
    try:
        with contextlib.chdir(tmp_path_factory.mktemp("pages")):
            yield
    finally:
        run.cache_clear()
        for plugin in _subclasses(Plugin):
            if plugin.__module__ == "docs_example":
                plugin.name = ""
        registry.refresh()


def _subclasses(kind):
    return [found for child in kind.__subclasses__() for found in (child, *_subclasses(child))]


@pytest.mark.parametrize("name", PYTHON_PAGES)
def test_the_python_blocks_of_a_page_run(name):
    run(name)
    for block in blocks_of(page(name), "pycon"):
        test = doctest.DocTestParser().get_doctest(block.text, {}, name, name, block.line)
        assert doctest.DocTestRunner().run(test).failed == 0


def test_blocks_that_are_not_run_are_marked_counted_and_import_what_exists():
    marked = {name: [b for b in blocks_of(page(name), "python") if b.reason] for name in PAGES}
    assert {name: len(blocks) for name, blocks in marked.items() if blocks} == NOT_RUN
    for blocks in marked.values():
        for block in blocks:
            compile(block.text, "marked", "exec")
            for line in re.findall(r"^(?:from|import) .*$", block.text, re.MULTILINE):
                exec(line, {})


def test_a_mark_takes_effect_on_the_next_block_only():
    text = "<!-- not run: needs data -->\n```python\n1 / 0\n```\n\n```python\nx = 1\n```\n"
    assert [block.reason for block in blocks_of(text, "python")] == ["needs data", None]


def test_every_python_block_has_a_language_that_the_tests_know():
    fences = {m[1] for name in PAGES for m in re.finditer(r"^ *```(\w+)", page(name), re.MULTILINE)}
    assert fences <= {"python", "pycon", "toml", "yaml", "console", "text"}


COMMANDS = [
    (name, found[1])
    for name in PAGES
    for block in blocks_of(page(name), "", "console", "yaml")
    for found in re.finditer(r"(?:^|\$ |run: |-m )tdcompile (.+)$", block.text.replace("\\\n", ""), re.MULTILINE)
]


@pytest.mark.parametrize(("name", "line"), COMMANDS, ids=lambda value: value[:40])
def test_a_command_of_a_page_is_one_that_the_command_line_takes(name, line):
    words = shlex.split(line)
    words = words[: words.index(">")] if ">" in words else words
    verb, *arguments = words
    command = command_pages.root().commands[verb]
    command.make_context(verb, arguments)


def test_a_command_with_an_unknown_option_would_be_found():
    with pytest.raises(Exception, match="--bugdet"):
        command_pages.root().commands["compile"].make_context("compile", ["net.py:build", "--bugdet", "macs=0.5"])


RECIPES = [(name, b.text) for name in PAGES for b in blocks_of(page(name), "toml") if "source =" in b.text]


@pytest.mark.parametrize(("name", "text"), RECIPES, ids=lambda value: value[:30])
def test_a_recipe_file_of_a_page_is_one(name, text, tmp_path):
    (tmp_path / "own.toml").write_text(text)
    recipe = load_recipe(str(tmp_path / "own.toml"), {})
    changed = [field for field in Recipe.model_fields if getattr(recipe, field) != getattr(Recipe(), field)]
    assert len(changed) == len([line for line in text.strip().splitlines() if not line.startswith("#")])
    recipe.steps().check(planned=True)


def test_there_are_recipes_and_configurations_and_they_parse():
    assert len(RECIPES) == 2
    for name in PAGES:
        for block in blocks_of(page(name), "toml"):
            tomllib.loads(block.text)
        for block in blocks_of(page(name), "yaml"):
            assert yaml.safe_load(block.text)


def test_readme_compiles_saves_and_loads():
    names = run("README.md").names
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(names["again"](x), names["compiled"].module(x))


def test_the_pass_of_the_docs_changes_the_layer_it_should():
    for name in ("README.md", "docs/guides/pass.md"):
        history = run(name).names["result"].history
        assert next(change.layer for change in history) == "1"


def test_the_fact_of_the_docs_holds_every_layer():
    names = run("docs/guides/pass.md").names
    assert names["facts"][names["Norms"]].values.keys() == {"0", "2"}


def test_the_decomposition_of_the_docs_is_exact_at_full_rank_and_is_found():
    page_names = run("docs/guides/decomposition.md").names
    form = page_names["Interpolative"]()
    registry.refresh()
    assert registry.find(Decomposition)["interpolative"] is type(form)
    layer, weight = Layer("linear", 12, 8, bias=False), torch.randn(8, 12)
    errors = form.errors(layer, weight, list(form.rank_space(layer, 2)), Identity.of(weight))
    assert errors[-1] < 1e-5 < errors[0]
    x = torch.randn(2, 12)
    factors = form.factorize(layer, weight, (8,), Identity.of(weight))
    assert relative_error(weight, form.reconstruct(layer, factors), Identity.of(weight)) < 1e-5
    torch.testing.assert_close(form.build(layer, (8,), factors, None)(x), x @ weight.T, rtol=1e-4, atol=1e-4)
    assert page_names["report"].layers[0].decomposition == "interpolative"


def test_the_plugins_of_the_docs_are_found_and_work_together():
    made = {}
    for guide in ("decomposition", "network", "pass", "plug-ins"):
        made |= run(f"docs/guides/{guide}.md").names
    kinds = [made[n] for n in ("GradientFree", "LargestFirst", "Roofline", "Perceptron", "MeasureNorms")]
    network = registry.make(Network, "perceptron{width=96}").build()
    text = "measure-norms,score{by=gradient-free{power=2}},propose{cost=roofline},choose{by=largest-first},factorize"
    x = torch.randn(2, 1, 8, 8)
    report = tdcompile.compile(network, x, pipeline=text, budget={"params": 0.6}).report
    assert report.met
    program = tdcompile.trace(network, (x,)).with_(budget=tdcompile.Budget(params=0.6))
    after = tdcompile.Pipeline.parse(text).run(program)
    assert after.facts[RankPlan].selector == "largest-first"
    norms = tdcompile.Pipeline.parse("measure-norms").run(program).facts[made["Norms"]]
    assert norms.values.keys() == {"1", "3"}
    assert set(registry.foreign_packages()) == {kind.__module__ for kind in kinds}


def test_the_two_scores_of_the_docs_differ_on_one_network():
    outcome = run("docs/guides/plug-ins.md")
    found = outcome.names["found"]
    assert found["fisher"].keys() == found["taylor"].keys() == {"0", "2"}
    assert found["fisher"] != found["taylor"]
    assert len(outcome.printed.splitlines()) == 2


@pytest.mark.parametrize("name", PAGES)
def test_relative_links_resolve(name):
    # CONTRIBUTING, CHANGELOG and SECURITY are shown on the site too: docs/hooks/generate.py moves their links.
    text = FENCE.sub("", page(name))
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert ((ROOT / name).parent / target).exists(), target


def test_the_folders_of_the_map_exist():
    folders = re.findall(r"^\| `([\w/]+)/` \|", page("README.md"), re.MULTILINE)
    assert folders
    for folder in folders:
        assert (ROOT / folder).is_dir()


@pytest.mark.parametrize("name", PAGES)
def test_files_that_a_page_names_are_there(name):
    paths = r"(?<![\w/])((?:benchmarks|docs|tests|passes|models|tdcompile)/[\w/-]+\.(?:py|md|toml|j2))\b"
    named = set(re.findall(paths, page(name)))
    assert {path for path in named if not (ROOT / path).is_file()} == set()


DOCSTRINGS = [
    ".".join(("tdcompile", *file.relative_to(ROOT).with_suffix("").parts)).replace("tdcompile.tdcompile", "tdcompile")
    for folder in ("tdcompile", "passes", "models")
    for file in sorted((ROOT / folder).rglob("*.py"))
    if ">>> " in file.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("module", DOCSTRINGS)
def test_the_examples_of_docstrings_run(module):
    outcome = doctest.testmod(importlib.import_module(module))
    assert outcome.attempted
    assert not outcome.failed
