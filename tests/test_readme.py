"""README: its Python examples run, its links and folders exist."""

import re
from pathlib import Path

import pytest
import torch

import tdcompile
from tdcompile import registry
from tdcompile.decomposition import Decomposition, relative_error
from tdcompile.layer import Layer
from tdcompile.network import Network
from tdcompile.ranks import RankPlan

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def run(block):
    names = {"__name__": "readme_example"}
    exec(compile(block.replace("from __future__ import annotations\n", ""), "README.md", "exec"), names)
    return names


def test_there_is_an_example_of_compile_of_a_pass_and_of_a_decomposition():
    assert len(BLOCKS) == 3


def test_the_compile_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run(BLOCKS[0])
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(names["again"](x), names["compiled"].module(x))


def test_the_pass_example():
    history = run(BLOCKS[1])["result"].history
    assert next(change.layer for change in history) == "1"


def test_the_decomposition_example_is_exact_at_full_rank_and_is_found():
    form = run(BLOCKS[2])["Interpolative"]()
    try:
        registry.refresh()
        assert registry.find(Decomposition)["interpolative"] is type(form)
        layer, weight = Layer("linear", 12, 8, bias=False), torch.randn(8, 12)
        errors = form.errors(layer, weight, list(form.rank_space(layer, 2)), None)
        assert errors[-1] < 1e-5 < errors[0]
        x = torch.randn(2, 12)
        factors = form.factorize(layer, weight, (8,), None)
        assert relative_error(weight, form.reconstruct(layer, factors), None) < 1e-5
        torch.testing.assert_close(form.build(layer, (8,), factors, None)(x), x @ weight.T, rtol=1e-4, atol=1e-4)
        network = torch.nn.Sequential(torch.nn.Linear(12, 8)).eval()
        report = tdcompile.compile(network, x, budget={"macs": 0.9}, decompose=("interpolative",)).report
        assert report.layers[0].decomposition == "interpolative"
    finally:
        type(form).name = ""
        registry.refresh()


OWN = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "plugins.md").read_text(), re.DOTALL)


def test_the_plugins_of_the_docs_are_found_and_work_together():
    made = {}
    for block in OWN:
        made |= run(block)
    kinds = [made[n] for n in ("GradientFree", "LargestFirst", "Roofline", "Perceptron", "MeasureNorms")]
    try:
        network = registry.make(Network, "perceptron{width=96}").build()
        text = (
            "measure-norms,score{by=gradient-free{power=2}},propose{cost=roofline},choose{by=largest-first},factorize"
        )
        x = torch.randn(2, 1, 8, 8)
        report = tdcompile.compile(network, x, pipeline=text, budget={"params": 0.6}).report
        assert report.met
        program = tdcompile.trace(network, (x,)).with_(budget=tdcompile.Budget(params=0.6))
        after = tdcompile.Pipeline.parse(text).run(program)
        assert after.facts[RankPlan].selector == "largest-first"
        norms = tdcompile.Pipeline.parse("measure-norms").run(program).facts[made["Norms"]]
        assert norms.values.keys() == {"1", "3"}
        assert set(registry.foreign_packages()) == {kind.__module__ for kind in kinds}
    finally:
        for kind in kinds:
            kind.name = ""
        registry.refresh()


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_relative_links_resolve(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text()):
        assert ((ROOT / page).parent / target).exists(), target


def test_the_folders_of_the_map_exist():
    for folder in re.findall(r"^\| `(\w+)/` \|", TEXT, re.MULTILINE):
        assert (ROOT / folder).is_dir()


PAGES = sorted(page for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_are_there(page: Path) -> None:
    paths = r"(?<![\w/])((?:benchmarks|docs|tests|passes|models|tdcompile)/[\w/]+\.(?:py|md|toml|j2))\b"
    named = set(re.findall(paths, page.read_text()))
    assert {name for name in named if not (ROOT / name).is_file()} == set()
