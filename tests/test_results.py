"""The pages of results show their measurements, and the generator says what is wrong where they do not."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.benchmark_modules import load

ROOT = Path(__file__).resolve().parent.parent


results = load("results")
PAGES = results.Results().pages
FILES = sorted((ROOT / "docs" / "measurements").glob("*.json"))
FIELDS = {"title", "command", "data", "seed", "machine", "date", "commit", "columns", "rows"}


@pytest.fixture
def docs(tmp_path):
    """A documentation folder with one measurement, one page, and no goals."""
    (tmp_path / "results").mkdir()
    table = results.Table.of_records(
        [
            {"network": "a", "share": 0.50471, "accuracy %": 87.6, "spread": [0.5, 0.61], "samples": 1030},
            {"network": "b", "share": None, "accuracy %": -0.1, "spread": None, "samples": 4},
        ],
        {"spread": ".2f"},
        title="shares",
        command="python x.py",
        data=None,
        seed=0,
        machine="m",
        date=None,
        commit=None,
    )
    table.model_copy(update={"notes": ["A note."]}).write(tmp_path / "measurements" / "shares.json")
    (tmp_path / "results" / "index.md").write_text(
        "# R\n\n<!-- table: shares -->\nstale\n<!-- end -->\n\nText.\n", encoding="utf-8"
    )
    return tmp_path


def page(docs, text):
    (docs / "results" / "index.md").write_text(text, encoding="utf-8")
    return results.Results(docs).rendered(docs / "results" / "index.md")


def test_there_are_pages_and_measurements():
    assert {"index", "latency", "networks"} <= {page.stem for page in PAGES}
    assert len(FILES) > 40


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_shows_what_its_measurements_say(page):
    assert results.Results().rendered(page) == page.read_text(encoding="utf-8"), "run `make results`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_has_one_heading_links_that_resolve_and_is_linked_from_the_headline_page(page):
    text = page.read_text(encoding="utf-8")
    assert len(re.findall(r"^# ", text, re.MULTILINE)) == 1
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", text):
        other = page.parent / target if target else page
        assert other.is_file(), target
        heads = re.findall(r"^#+ (.*)$", other.read_text(encoding="utf-8"), re.MULTILINE)
        assert not anchor or anchor in {re.sub(r"[^\w]+", "-", head.lower()).strip("-") for head in heads}, anchor
    index = (page.parent / "index.md").read_text(encoding="utf-8")
    assert page.stem == "index" or f"]({page.name})" in index


def test_every_measurement_is_on_a_page():
    all_results = results.Results()
    assert not list(results.differences(all_results))
    assert all_results.used == all_results.names


@pytest.mark.parametrize("file", [f for f in FILES if f.stem != "goals"], ids=lambda file: file.stem)
def test_a_measurement_has_every_field_and_reads_as_it_was_written(file, tmp_path):
    assert set(json.loads(file.read_text(encoding="utf-8"))) >= FIELDS
    table = results.Table.read(file)
    assert table.rows
    table.write(tmp_path / file.name)
    assert (tmp_path / file.name).read_text(encoding="utf-8") == file.read_text(encoding="utf-8")


@pytest.mark.parametrize("file", [f for f in FILES if f.stem != "goals"], ids=lambda file: file.stem)
def test_a_command_names_a_benchmark_and_options_that_exist(file):
    command = results.Table.read(file).command or ""
    for script in re.findall(r"benchmarks/\w+\.py", command):
        text = (ROOT / script).read_text(encoding="utf-8")
        for option in re.findall(r" --(?:no-)?([a-z]+)", command):
            assert re.search(rf"^    {option}:? ", text, re.MULTILINE), f"{script} has no --{option}"


def test_a_stale_table_is_found_and_rewritten(docs, capsys):
    with pytest.raises(SystemExit, match="make results"):
        results.main(check=True, docs=docs)
    assert "stale" in (docs / "results" / "index.md").read_text(encoding="utf-8")
    results.main(check=False, docs=docs)
    results.main(check=True, docs=docs)
    assert (docs / "results" / "index.md").read_text(encoding="utf-8") == (
        "# R\n\n<!-- table: shares -->\n\n"
        "| network | share | accuracy % | spread | samples |\n"
        "|---|---:|---:|---|---:|\n"
        "| a | 0.5047 | 87.60 | 0.50 – 0.61 | 1,030 |\n"
        "| b | – | −0.10 | – | 4 |\n\n"
        "Command: `python x.py`. Seed: 0. Machine: m.\n\n"
        "- A note.\n\n"
        "<!-- end -->\n\nText.\n"
    )


def test_a_changed_number_makes_the_check_fail(docs):
    results.main(check=False, docs=docs)
    file = docs / "measurements" / "shares.json"
    file.write_text(file.read_text(encoding="utf-8").replace("0.50471", "0.51"), encoding="utf-8")
    with pytest.raises(SystemExit, match="make results"):
        results.main(check=True, docs=docs)


def test_a_measurement_on_no_page_makes_the_check_fail(docs):
    results.main(check=False, docs=docs)
    shutil.copy(docs / "measurements" / "shares.json", docs / "measurements" / "other.json")
    with pytest.raises(SystemExit, match="on a page"):
        results.main(check=True, docs=docs)


def test_a_selection_has_its_columns_and_rows_and_no_notes(docs):
    marker = "<!-- table: shares\ncolumns: samples | network\nrows: samples = 1,030\n{}-->\n<!-- end -->\n"
    text = page(docs, marker.format(""))
    assert "| samples | network |\n|---:|---|\n| 1,030 | a |\n\nCommand" in text
    assert "A note." not in text
    assert "A note." in page(docs, marker.format("notes: yes\n"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("table: absent", "absent.json does not exist"),
        ("table: shares\ncolumns: size", "no column 'size'; its columns are network"),
        ("table: shares\nrows: network = c", r"no row with 'network' = \['c'\]; it has \['a', 'b'\]"),
        ("table: shares\nsort: network", "'sort' is no option of a table"),
    ],
)
def test_a_selection_that_a_file_does_not_have_is_refused(docs, options, message):
    with pytest.raises(results.ResultsError, match=message):
        page(docs, f"<!-- {options}\n-->\n<!-- end -->\n")


def test_a_block_without_an_end_is_refused(docs):
    with pytest.raises(results.ResultsError, match="<!-- end -->"):
        page(docs, "<!-- table: shares -->\n")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"b", null', '"b"', "row 1 has 4 cells for 5 columns"),
        ('"network"', '"share"', "two columns have one name"),
        ('"seed": 0', '"sede": 0', "sede"),
        ('"seed": 0,\n', "", "seed"),
    ],
)
def test_a_file_that_breaks_the_schema_is_refused(docs, old, new, message):
    file = docs / "measurements" / "shares.json"
    file.write_text(file.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    with pytest.raises(results.ResultsError, match=message):
        results.Table.read(file)


@pytest.mark.parametrize(
    ("bounds", "reached", "met"),
    [
        ({"at_most": 90, "at_least": -1}, "−0.10 – 87.60 %", "yes"),
        ({"at_least": 1}, "−0.10 – 87.60 %", "1 of 2"),
        ({"at_most": -1}, "−0.10 – 87.60 %", "no"),
        ({}, "−0.10 – 87.60 %", "–"),
        ({"rows": {"network": ["a"]}, "at_least": 87.6}, "87.60 %", "yes"),
    ],
)
def test_a_goal_is_met_by_the_cells_that_it_names(docs, bounds, reached, met):
    goal = results.Goal(goal="g", page="x.md", tables=["shares"], column="accuracy %", unit=" %", **bounds)
    assert goal.row(results.Results(docs).table)[2:4] == [reached, met]


def test_a_goal_that_names_no_number_is_refused(docs):
    goal = results.Goal(goal="g", page=None, tables=["shares"], column="network")
    with pytest.raises(results.ResultsError, match="is no number"):
        goal.row(results.Results(docs).table)


def test_a_goal_leaves_out_what_was_not_measured(docs):
    goal = results.Goal(goal="g", page=None, tables=["shares"], column="share", at_least=0.6)
    assert goal.row(results.Results(docs).table)[2:4] == ["0.5047", "no"]
    goal = goal.model_copy(update={"rows": {"network": ["b"]}})
    assert goal.row(results.Results(docs).table)[2:4] == ["not run", "–"]


def test_a_goal_without_a_measurement_was_not_run(docs):
    assert results.Goal(goal="g", page=None).row(results.Results(docs).table) == ["g", "–", "not run", "–", "–"]


def test_a_benchmark_writes_the_schema_without_folders_of_this_machine(tmp_path, monkeypatch, capsys):
    common = load("common")
    home = tmp_path.resolve()
    argv = ["benchmarks/cifar.py", "--data", f"parquet:{home}/cifar10", "--weights", f"{home}/net.safetensors"]
    monkeypatch.setattr(sys, "argv", argv)
    rows = [{"network": "a", "accuracy %": common.percent(0.876), "share": 0.5}]
    common.publish("title", rows, 3, common.Target(), tmp_path / "a.json", {"share": ".3f"})
    assert "| a | 87.60 | 0.500 |" in capsys.readouterr().out
    table = results.Table.read(tmp_path / "a.json")
    assert table.command == "python benchmarks/cifar.py --data parquet:cifar10 --weights net.safetensors"
    assert (table.data, table.seed, table.rows) == ("parquet:cifar10", 3, [["a", 87.6, 0.5]])
    assert table.date
    assert "thread(s)" in table.machine
