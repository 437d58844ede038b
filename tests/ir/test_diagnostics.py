"""Reasons and diagnostics: every code has a meaning and a use, and is text to whatever reads it."""

import copy
import json
import pickle
import re
from pathlib import Path

import pytest
from pydantic import TypeAdapter

import tdcompile
from tdcompile.artifact.report import Reason as ReportedReason
from tdcompile.ir.diagnostics import Diagnostic, DiagnosticCode, Reason, ReasonCode

CODES = [*ReasonCode, *DiagnosticCode]


@pytest.fixture(scope="module")
def source() -> str:
    """The code of the package and of its plug-ins, without the codes themselves."""
    package = Path(tdcompile.__file__).parent
    root = package.parent
    files = {*package.rglob("*.py"), *(root / "passes").rglob("*.py")}
    return "\n".join(path.read_text() for path in sorted(files) if path.name != "diagnostics.py")


def test_no_code_is_written_as_text_and_every_code_is_used(source: str) -> None:
    assert not re.findall(r"Reason\(\s*(?:code=)?\"\w+\"", source)
    assert not re.findall(r"Diagnostic\(\s*\"\w+\",\s*\"\w+\"", source)
    used = set(re.findall(r"(?:Reason|Diagnostic)Code\.\w+", source))
    assert used == {f"{type(code).__name__}.{code.name}" for code in CODES}


def test_codes_are_distinct_and_have_meanings() -> None:
    assert len({str(code) for code in CODES}) == len(CODES)
    assert all(code == code.name.lower() and len(code.meaning) > 10 for code in CODES)


@pytest.mark.parametrize("code", CODES)
def test_a_code_is_text_in_files_and_survives_a_copy(code: ReasonCode | DiagnosticCode) -> None:
    assert json.dumps([code]) == f'["{code.value}"]'
    assert pickle.loads(pickle.dumps(code)) is code
    assert copy.deepcopy(code) is code
    history = TypeAdapter(tuple[Diagnostic, ...])
    told = Reason(code, "why").about("conv", "warning")
    assert history.validate_python(tuple(history.dump_python((told,), mode="json"))) == (told,)
    assert ReportedReason(code=code, reason="why").model_dump_json() == f'{{"code":"{code.value}","reason":"why"}}'


def test_a_reason_becomes_a_message_about_its_layer() -> None:
    assert Reason("mine", "why").about("conv") == Diagnostic("info", "mine", "why", "conv")
