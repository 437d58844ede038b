"""A model that onnxsim gets wrong is replaced by the unsimplified one; a model that is wrong without it is an error."""

from __future__ import annotations

import onnx
import onnxsim
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import tdcompile
from tdcompile.backend import verified_export
from tdcompile.backend.lowering import export_graph
from tdcompile.backend.verified_export import export_verified
from tdcompile.errors import ParityError
from tdcompile.ir.diagnostics import DiagnosticCode

simplify = onnxsim.simplify


@pytest.fixture
def program() -> tdcompile.Program:
    torch.manual_seed(0)
    return tdcompile.trace(nn.Sequential(nn.Linear(6, 4), nn.ReLU()).eval(), torch.randn(2, 6))


def _wrong(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, bool]:
    simple, right = simplify(proto)
    for weight in simple.graph.initializer:
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) + 1, weight.name))
    return simple, right


def _refused(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, bool]:
    """Return a model that the checker takes and onnxruntime does not: its operator is of an unknown domain."""
    simple, right = simplify(proto)
    simple.graph.node[-1].domain = "unknown.domain"
    simple.opset_import.append(onnx.helper.make_opsetid("unknown.domain", 1))
    return simple, right


@pytest.mark.parametrize(("broken", "says"), [(_wrong, "differ"), (_refused, "cannot load")])
def test_a_wrong_simplified_model_is_replaced_by_the_unsimplified_one(program, tmp_path, monkeypatch, broken, says):
    monkeypatch.setattr(onnxsim, "simplify", broken)
    exported, parity = export_verified(program, program.dense, tmp_path / "m.onnx", {"a": "1"})
    assert not exported.simplified
    assert [note.code for note in exported.notes] == [DiagnosticCode.NOT_SIMPLIFIED]
    assert says in exported.notes[0].text
    assert parity.max_rel < 1e-5
    assert [entry.key for entry in onnx.load(exported.path).metadata_props] == ["a"]


def test_a_right_simplified_model_is_used_without_a_note(program, tmp_path):
    exported, _ = export_verified(program, program.dense, tmp_path / "m.onnx")
    assert exported.simplified
    assert exported.notes == ()


def test_a_model_that_is_wrong_without_onnxsim_too_is_an_error(program, tmp_path, monkeypatch):
    other = tdcompile.trace(nn.Sequential(nn.Linear(6, 4), nn.ReLU()).eval(), torch.randn(2, 6)).dense

    def of_another(program, graph, path, **named):
        return export_graph(program, other, path, **named)

    monkeypatch.setattr(verified_export, "export_graph", of_another)
    with pytest.raises(ParityError, match="differ"):
        export_verified(program, program.dense, tmp_path / "m.onnx")


def test_the_report_says_that_a_model_is_not_simplified(monkeypatch):
    monkeypatch.setattr(onnxsim, "simplify", _wrong)
    compiled = tdcompile.compile(nn.Sequential(nn.Linear(16, 16)).eval(), torch.randn(2, 16), budget={"macs": 0.6})
    told = [note for note in compiled.report.notes if "the simplified model is wrong" in note]
    assert [note.partition(" model: ")[0] for note in told] == ["dense", "compiled"]
