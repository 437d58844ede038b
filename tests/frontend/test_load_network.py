from __future__ import annotations

import io
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from tdcompile.errors import BudgetError, InputError
from tdcompile.frontend.load_network import check_weights, load_callable, load_source, load_weights
from tdcompile.support.user_code import call_user_function, names_module

USER_FILE = """
from torch import nn
import beside_{stem}

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), nn.Dropout())

def build():
    from beside_{stem} import width
    return nn.Linear(width, 2)

ready = nn.Linear(1, 1)
number = 3
def text(): return "a network"
def fails(): raise RuntimeError("no such luck")
def leaves(): raise SystemExit(3)
def asks(size): return nn.Linear(size, 1)
"""


@pytest.fixture
def user_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / "net.py"
    path.write_text(USER_FILE.format(stem="net"))
    (tmp_path / "beside_net.py").write_text("width = 5\n")
    yield path
    for name in ("beside_net", "tdcompile_user_net"):
        sys.modules.pop(name, None)


def two() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def refusal(module: nn.Module, path: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_weights(module, path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def save(tmp_path: Path, held: Any) -> Path:
    path = tmp_path / "w.pt"
    torch.save(held, path)
    return path


def test_a_function_a_class_and_a_module_of_a_file_are_networks(user_file: Path) -> None:
    built, network = load_source(f"{user_file}:build")
    assert isinstance(built, nn.Linear)
    assert built.in_features == 5
    assert network is None
    made, _ = load_source(f"{user_file}:Net")
    assert not made.training
    assert isinstance(load_source(f"{user_file}:ready")[0], nn.Linear)


def test_a_module_of_the_current_folder_is_found(
    user_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tdcompile_test_pack").mkdir()
    (tmp_path / "tdcompile_test_pack" / "nets.py").write_text("from torch import nn\ndef f(): return nn.ReLU()\n")
    monkeypatch.chdir(tmp_path)
    assert names_module("tdcompile_test_pack.nets")
    assert not names_module("tdcompile_test_pack.other")
    assert isinstance(load_source("tdcompile_test_pack.nets:f")[0], nn.ReLU)
    assert isinstance(load_source("torch.nn:Identity")[0], nn.Identity)


def test_a_registered_name_brings_its_plug_in() -> None:
    module, network = load_source("lenet5")
    assert network is not None
    assert network.name == "lenet5"
    assert module(torch.zeros(2, *network.input_shapes[0])).shape[0] == 2


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("buidl", "did you mean 'build'"),
        ("number", "is a int; it must be a callable"),
        ("text", "returned a str; it must return an nn.Module"),
        ("fails", "failed: RuntimeError: no such luck"),
        ("leaves", "failed: SystemExit: 3"),
        ("asks", "failed: TypeError"),
        ("not a name", "is not of the form"),
    ],
)
def test_a_callable_that_gives_no_network_is_refused(user_file: Path, name: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        load_source(f"{user_file}:{name}")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("nowhere/net.py:build", "there is no file 'nowhere/net.py'"),
        ("net.py", "names no callable: write net.py:NAME"),
        ("models/net.int8.onnx", "is an ONNX model, and tdcompile compiles PyTorch networks: give the code"),
        ("tdcompile_no_such.module:build", "there is no module 'tdcompile_no_such.module'"),
        ("torch.nn:Lineer", "did you mean 'Linear'"),
        ("resnet02", "did you mean 'resnet"),
        (":build", "is not of the form"),
    ],
)
def test_a_source_that_is_not_there_is_refused(source: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        load_source(source)


def test_a_file_that_cannot_be_imported_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / "broken.py"
    for text, says in [
        ("def f(:", "SyntaxError"),
        ("import tdcompile_no_such", "ModuleNotFoundError: No module named 'tdcompile_no_such'"),
        ("raise SystemExit", "SystemExit"),
    ]:
        path.write_text(text + f"  # {len(says)}")
        with pytest.raises(InputError, match=f"importing '{path}' failed: {says}"):
            load_callable(f"{path}:f")
    (tmp_path / "notes.txt").write_text("f = 1")
    with pytest.raises(InputError, match="is not a Python file"):
        load_callable(f"{tmp_path}/notes.txt:f")
    with pytest.raises(InputError, match="there is no file"):
        load_callable(f"{tmp_path}/gone.py:f")
    assert "tdcompile_user_broken" not in sys.modules


def test_an_error_of_ours_passes_through_the_users_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / "own.py"
    path.write_text("from tdcompile.errors import BudgetError\ndef f(): raise BudgetError('said once')\n")
    with pytest.raises(BudgetError) as caught:
        call_user_function(f"{path}:f")
    assert str(caught.value) == "said once"


@pytest.mark.parametrize(
    "wrap", [dict, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": {"state_dict": s}}]
)
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."])
def test_wrappers_and_prefixes_are_unwrapped(tmp_path: Path, wrap: Any, prefix: str) -> None:
    given = two()
    path = save(tmp_path, wrap({prefix + name: value for name, value in given.state_dict().items()}))
    module = two()
    load_weights(module, path)
    assert torch.equal(module[0].weight, given[0].weight)


def test_a_networks_own_child_called_module_is_kept(tmp_path: Path) -> None:
    given = nn.ModuleDict({"module": nn.Linear(2, 2)})
    module = nn.ModuleDict({"module": nn.Linear(2, 2)})
    load_weights(module, save(tmp_path, given.state_dict()))
    assert torch.equal(module["module"].weight, given["module"].weight)


def test_safetensors_are_read_and_tied_weights_may_be_stored_once(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    given, module = Tied(), Tied()
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_model(given, str(path))
    load_weights(module, path)
    assert torch.equal(module.second.weight, given.first.weight)


def test_half_precision_is_brought_to_the_networks_own(tmp_path: Path) -> None:
    module = two()
    load_weights(module, save(tmp_path, two().half().state_dict()))
    assert module[0].weight.dtype is torch.float32


def test_a_mismatch_names_the_first_keys_and_shapes(tmp_path: Path) -> None:
    weights = two().state_dict()
    other = {name.replace("0.", "stem_").replace("1.", "norm_"): value for name, value in weights.items()}
    said = refusal(two(), save(tmp_path, other))
    assert "lacks 0.weight, 0.bias, 1.weight, 1.bias and 2 more" in said
    assert "has in excess stem_weight" in said
    weights["0.weight"] = torch.zeros(4, 3, 5, 5)
    assert "0.weight is (4, 3, 5, 5) in the file, (4, 3, 3, 3) in the network" in refusal(
        two(), save(tmp_path, weights)
    )


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "sprung"),)

    said = refusal(two(), save(tmp_path, {**two().state_dict(), "args": Trap()}))
    assert "needs code to load" in said
    assert "mkdir" in said
    assert not (tmp_path / "sprung").exists()
    assert "torch.nn.modules.linear.Linear" in refusal(two(), save(tmp_path, nn.Linear(2, 2)))


def test_a_file_without_weights_is_refused(tmp_path: Path) -> None:
    assert "there is no weights file" in refusal(two(), tmp_path / "gone.pt")
    assert "holds no state dict" in refusal(two(), save(tmp_path, [torch.ones(1)]))
    assert "holds no state dict" in refusal(two(), save(tmp_path, {"state_dict": {"epoch": 1}}))
    whole = save(tmp_path, two().state_dict()).read_bytes()
    archive = io.BytesIO()
    np.savez(archive, x=np.zeros(3))
    torn = "cannot be read as weights: it is no PyTorch or safetensors file, or cut off"
    for name, content, said in [
        ("a.pt", b"text", torn),
        ("b.pt", b"", torn),
        ("c.pt", whole[: len(whole) // 2], torn),
        ("d.pt", archive.getvalue(), torn),
        ("e.pt", bytes(range(255, 0, -1)), torn),
        ("f.pt", pickle.dumps({"0.weight": [1.0]}), "is a pickle that torch.save has not written"),
        ("g.safetensors", b"x", "it is no safetensors file, or cut off"),
    ]:
        (tmp_path / name).write_bytes(content)
        assert said in refusal(two(), tmp_path / name)
    assert "is a folder and holds several weights files, a.pt, b.pt, c.pt, d.pt and 4 more" in refusal(two(), tmp_path)


def test_a_safetensors_file_is_known_by_its_content(tmp_path: Path) -> None:
    given, module = two(), two()
    safetensors.torch.save_file(given.state_dict(), tmp_path / "w.pt")
    load_weights(module, tmp_path / "w.pt")
    assert torch.equal(module[0].weight, given[0].weight)
    content = (tmp_path / "w.pt").read_bytes()
    (tmp_path / "w.pt").write_bytes(content[:-4])
    assert "it is no safetensors file, or cut off" in refusal(two(), tmp_path / "w.pt")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, bad: float) -> None:
    for name in ("0.weight", "0.bias"):
        weights = two().state_dict()
        weights[name].view(-1)[1] = bad
        assert f"the tensor '{name}' holds 1 values that are NaN or Inf" in refusal(two(), save(tmp_path, weights))
    weights = two().state_dict()
    weights["1.running_var"][0] = abs(bad)
    assert "1.running_var" in refusal(two(), save(tmp_path, weights))


def test_an_attention_mask_may_hold_minus_infinity() -> None:
    module = nn.Linear(2, 2)
    module.register_buffer("mask", torch.full((2, 2), float("-inf")).triu(1))
    module.register_buffer("places", torch.arange(3))
    check_weights(module, "here")
    module.mask[0, 0] = float("nan")
    with pytest.raises(InputError, match="here: the tensor 'mask'"):
        check_weights(module, "here")


class Tie(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_weights_stay_tied_and_a_network_without_values_is_filled(tmp_path: Path, device: str) -> None:
    values = {name: torch.randn(value.shape) for name, value in Tie().state_dict().items() if name != "second.weight"}
    safetensors.torch.save_file(values, tmp_path / "w.safetensors")
    with torch.device(device):
        module = Tie()
    load_weights(module, tmp_path / "w.safetensors")
    assert module.second.weight is module.first.weight
    assert torch.equal(module.first.weight, values["first.weight"])
    assert module.first.weight.requires_grad


def test_a_network_that_keeps_no_values_for_some_of_its_weights_is_refused(tmp_path: Path) -> None:
    safetensors.torch.save_file({"first.weight": torch.randn(4, 4)}, tmp_path / "w.safetensors")
    with torch.device("meta"):
        module = Tie()
    with pytest.raises(InputError, match=r"lacks first\.bias"):
        load_weights(module, tmp_path / "w.safetensors")


def test_weights_keep_the_type_of_the_network(tmp_path: Path) -> None:
    safetensors.torch.save_file(
        {k: v.bfloat16() for k, v in nn.Linear(3, 2).state_dict().items()}, tmp_path / "w.safetensors"
    )
    module = nn.Linear(3, 2)
    load_weights(module, tmp_path / "w.safetensors")
    assert module.weight.dtype is torch.float32


def test_what_holds_a_weight_elsewhere_holds_the_loaded_one(tmp_path: Path) -> None:
    module = nn.Linear(3, 2)
    kept = [module.weight]
    safetensors.torch.save_file(nn.Linear(3, 2).state_dict(), tmp_path / "w.safetensors")
    load_weights(module, tmp_path / "w.safetensors")
    assert kept[0] is module.weight


def test_two_values_for_one_weight_are_refused(tmp_path: Path) -> None:
    values = {name: torch.randn(value.shape) for name, value in Tie().state_dict().items()}
    safetensors.torch.save_file(values, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="which are one weight"):
        load_weights(Tie(), tmp_path / "w.safetensors")
