"""Configurations that no other test reads: the workflow, issue templates, hooks, and the Dockerfile."""

import json
import re
import tomllib
from pathlib import Path

import command_pages
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())


def targets():
    return set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_the_workflow_tests_every_python_that_the_project_names():
    matrix = WORKFLOW["jobs"]["test"]["strategy"]["matrix"]
    named = re.findall(r"Python :: (3\.\d+)", " ".join(PROJECT["project"]["classifiers"]))
    assert matrix["python"] == named
    assert {system.partition("-")[0] for system in matrix["os"]} == {"ubuntu", "macos", "windows"}


def test_the_workflow_runs_lint_docs_coverage_and_the_container():
    steps = [step.get("run", "") for job in WORKFLOW["jobs"].values() for step in job["steps"]]
    made = {step.removeprefix("make ") for step in steps if step.startswith("make ")}
    assert made == {"lint", "docs", "coverage"}
    assert made <= targets()
    assert [step for step in steps if step.startswith("docker run")]


def test_actions_are_pinned_to_a_major_version():
    used = [step["uses"] for job in WORKFLOW["jobs"].values() for step in job["steps"] if "uses" in step]
    assert used
    assert all(re.fullmatch(r"[\w/-]+@v\d+", action) for action in used)


def test_ci_lints_before_it_tests_and_builds_the_docs():
    lines = re.findall(r"^make (\S+)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert lines == ["lint", "test", "docs"]


def test_make_targets_that_pages_name_exist():
    pages = [(ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md", "docs/index.md")]
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", "\n".join(pages), re.MULTILINE))
    assert {"quickstart", "test", "docs"} <= named <= targets()


@pytest.mark.parametrize("file", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")), ids=lambda file: file.stem)
def test_an_issue_template_has_what_its_form_needs(file):
    form = yaml.safe_load(file.read_text())
    if file.stem == "config":
        assert form == {"blank_issues_enabled": False}
        return
    assert {"name", "description", "body"} <= form.keys()
    assert len({field["id"] for field in form["body"]}) == len(form["body"])


def test_the_container_runs_the_quick_start_of_the_makefile():
    text = (ROOT / "Dockerfile").read_text()
    entry, arguments = (
        json.loads(re.search(rf"^{word} (\[.*\])$", text, re.MULTILINE)[1]) for word in ("ENTRYPOINT", "CMD")
    )
    assert entry == ["tdcompile"]
    context = command_pages.root().commands[arguments[0]].make_context(arguments[0], arguments[1:])
    assert context.params["out"] == Path("out/quickstart")
    assert "tdcompile demo -o out/quickstart" in (ROOT / "Makefile").read_text()


def test_hooks_call_tools_that_the_project_installs():
    hooks = [
        hook
        for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
        for hook in repo["hooks"]
    ]
    tools = {hook["entry"].split()[0] for hook in hooks}
    assert tools == {".venv/bin/ruff", "make"}
    assert any(requirement.startswith("ruff") for requirement in PROJECT["project"]["optional-dependencies"]["dev"])
