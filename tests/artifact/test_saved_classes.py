"""Saved folders name the project's own classes by stable tags, and folders of earlier versions still load."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

import tdcompile
from tdcompile.backend.session import infer, open_session
from tdcompile.ir.saved_classes import class_of, saved_as, tag_of
from tdcompile.ir.target import Target

EARLIER = Path(__file__).with_name("saved_by_0_1")


def test_a_folder_of_the_version_before_tags_loads_and_computes_what_its_model_computes():
    with safe_open(EARLIER / "weights.safetensors", "pt") as file:
        assert '"tdcompile.layer:TransposedConv"' in file.metadata()["architecture"]  # a module path, not a tag
    network = tdcompile.load(EARLIER)
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    [expected] = infer(open_session(EARLIER / "model.onnx", Target()), [x])
    torch.testing.assert_close(network(x).detach(), torch.from_numpy(expected), rtol=1e-4, atol=1e-5)


def test_own_classes_are_saved_by_tag_and_not_by_module_path(tmp_path):
    network = nn.Sequential(nn.ConvTranspose2d(8, 32, 2), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1)).eval()
    compiled = tdcompile.compile(network, torch.randn(2, 8, 6, 6), budget={"macs": 0.6}, decompose=("svd", "channel"))
    compiled.save(tmp_path / "out")
    with safe_open(tmp_path / "out" / "weights.safetensors", "pt") as file:
        text = file.metadata()["architecture"]
    assert '"tdcompile:transposed-conv"' in text
    assert "tdcompile." not in text


def test_a_tag_belongs_to_one_class():
    @saved_as("tests/first")
    class First(nn.Module):
        pass

    assert tag_of(First) == "tdcompile:tests/first"
    assert class_of("tdcompile:tests/first") is First
    assert tag_of(nn.Linear) is None
    assert class_of("tdcompile:tests/unknown") is None
    with pytest.raises(ValueError, match="tests/first"):

        @saved_as("tests/first")
        class Second(nn.Module):
            pass
