"""The list of translations is read at the first export; a torch without that list is left alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.onnx._internal import _lazy_import

from tdcompile.backend import torchlib
from tdcompile.backend.export import export_onnx
from tdcompile.backend.torchlib import translations_read_once


def test_the_second_export_reads_nothing_and_writes_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, calls = _lazy_import.onnxscript_apis.get_torchlib_ops, []
    monkeypatch.setattr(
        _lazy_import.onnxscript_apis, "get_torchlib_ops", lambda: calls.append(1) or read(), raising=False
    )
    torchlib._kept.cache_clear()
    torch.manual_seed(0)
    module, x = nn.Linear(3, 2).eval(), torch.zeros(2, 3)
    files = [export_onnx(module, (x,), tmp_path / f"{i}.onnx").path for i in range(2)]
    assert len(calls) == 1
    assert files[0].read_bytes() == files[1].read_bytes()
    torchlib._kept.cache_clear()


def test_afterwards_torch_has_its_own_function_and_another_torch_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = _lazy_import.onnxscript_apis.get_torchlib_ops
    with translations_read_once():
        assert _lazy_import.onnxscript_apis.get_torchlib_ops is not own
    assert _lazy_import.onnxscript_apis.get_torchlib_ops is own
    monkeypatch.delattr(_lazy_import, "onnxscript_apis")
    with translations_read_once():
        assert not hasattr(_lazy_import, "onnxscript_apis")
