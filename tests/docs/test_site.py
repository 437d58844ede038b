"""The generated parts of the site: every command, option and plug-in is there, and a wrong directive fails."""

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import command_pages
import drawings
import generate
import plugin_pages
import pytest
from mkdocs.exceptions import PluginError

import tdcompile
from tdcompile.core.decomposition import Decomposition
from tdcompile.core.registry import find
from tdcompile.ir.diagnostics import DiagnosticCode, ReasonCode
from tdcompile.ir.layer import Layer
from tdcompile.recipes import Recipe

ROOT = Path(__file__).resolve().parent.parent.parent


def filled(markdown):
    page = SimpleNamespace(file=SimpleNamespace(src_uri="page.md"))
    return generate.on_page_markdown(markdown, page, None, None)


def test_the_command_reference_has_every_command_and_every_option():
    text = command_pages.command_reference()
    for name, command in command_pages.root().commands.items():
        section = re.search(rf"^## `{name}`\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)[1]
        for parameter in command.params:
            for option in parameter.opts if parameter.param_type_name == "option" else ():
                assert f"`{option}`" in section


def test_the_plugin_reference_has_every_plugin_and_option_of_every_kind():
    for kind, contract in plugin_pages.KINDS.items():
        text = plugin_pages.plugin_reference(kind)
        for name, plugin in find(contract).items():
            section = re.search(rf"^### `{name}`\n(.*?)(?=^### |\Z)", text, re.MULTILINE | re.DOTALL)[1]
            for option in dataclasses.fields(plugin):
                assert f"| `{option.name}` |" in section


def test_an_option_shows_the_values_that_it_takes():
    text = plugin_pages.plugin_reference("passes")
    finetune = re.search(r"^### `finetune`\n(.*?)(?=^### )", text, re.MULTILINE | re.DOTALL)[1]
    assert re.search(r"^\| `labels` \| `0\.1` \| a number in \[0, 1\] \| ", finetune, re.MULTILINE)
    assert re.search(r"^\| `bn` \| `train` \| one of train, frozen \| ", finetune, re.MULTILINE)


def test_the_option_table_has_every_option_of_a_recipe_with_its_default():
    text = plugin_pages.option_table()
    for name in Recipe.model_fields:
        assert f"| `{name}` |" in text
    assert "| `threads` | `1` | Threads of onnxruntime |" in text


def test_every_decomposition_is_drawn_as_the_chain_of_its_blueprint():
    text = drawings.draw_decompositions()
    for name in find(Decomposition):
        section = re.search(rf"^### `{name}`\n(.*?)(?=^### |\Z)", text, re.MULTILINE | re.DOTALL)[1]
        assert section.count("<rect") >= 2
    channel = re.search(r"### `channel`\n(.*?)###", text, re.DOTALL)[1]
    assert re.findall(r"(\d+) → (\d+)<", channel) == [("64", "40"), ("40", "128")]


def test_a_box_names_what_a_layer_is():
    depthwise = Layer("conv", 8, 8, (4, 4), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), groups=8)
    assert drawings._layer(depthwise).title == "depthwise 3×3"
    assert drawings._layer(Layer("linear", 8, 4)).lines[0] == "8 → 4"


def test_the_pipeline_drawing_has_the_steps_in_order_and_marks_optional_ones():
    text = drawings.draw_pipeline()
    titles = re.findall(r'class="title"[^>]*>([^<]+)<', text)
    assert titles[0] == "trace"
    assert titles.index("propose") < titles.index("choose") < titles.index("factorize") < titles.index("export")
    assert text.count(" optional") == 4  # transpose-spatial, baseline, rehearse, finetune


def test_a_directive_becomes_its_part_and_other_comments_stay():
    assert "::: tdcompile.compile" in filled("<!-- generated: api tdcompile -->")
    assert filled("<!-- a note -->") == "<!-- a note -->"
    assert len(re.findall("^::: ", filled("<!-- generated: api tdcompile -->"), re.MULTILINE)) == len(tdcompile.__all__)


def test_every_code_of_a_reason_or_a_diagnostic_has_its_meaning_on_the_page():
    text = filled((ROOT / "docs/concepts/choice.md").read_text())
    for code in (*ReasonCode, *DiagnosticCode):
        assert f"| `{code.value}` | {code.meaning} |" in text


def test_a_directive_for_an_unknown_part_stops_the_build():
    with pytest.raises(PluginError, match=r"page\.md: no part 'comands'; known: .*commands"):
        filled("<!-- generated: comands -->")


def test_patterns_of_the_navigation_take_the_index_first(tmp_path):
    (tmp_path / "results").mkdir()
    for name in ("accuracy", "index", "zoo"):
        (tmp_path / "results" / f"{name}.md").touch()
    nav = [{"Home": "index.md"}, {"Results": ["results/*.md", "none*.md"]}]
    pages = ["results/index.md", "results/accuracy.md", "results/zoo.md"]
    assert generate.expand(nav, tmp_path) == [{"Home": "index.md"}, {"Results": pages}]


def test_links_of_files_of_the_root_are_moved():
    assert "](docs/" not in generate.project_file("CONTRIBUTING.md")


def test_nothing_of_the_site_is_fetched_from_elsewhere():
    text = (ROOT / "mkdocs.yml").read_text() + (ROOT / "docs" / "assets" / "site.css").read_text()
    assert "http" not in text
    assert "font: false" in text
