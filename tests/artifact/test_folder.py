"""Output folders are written whole or not at all, never over what is not ours, and load back bit by bit."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, fx, nn

from tdcompile.artifact.folder import check_out, load, load_graph, read_manifest, save_weights, verify, write_folder
from tdcompile.errors import InputError
from tdcompile.support.user_code import load_callable


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(8)
        )
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 8, bias=False)
        self.b.weight = self.a.weight
        self.register_buffer("view", self.a.bias.detach()[2:6])

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).mean((2, 3))
        return self.b(self.a(y)) + self.view.sum()


class Own(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class OwnAsLeaf(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m).__name__ in ("Own", "Hidden") or super().is_leaf_module(m, module_qualified_name)


def traced(module: nn.Module) -> fx.GraphModule:
    graph = fx.GraphModule(module, OwnAsLeaf().trace(module))
    graph.eval()
    return graph


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def folder_of(graph: fx.GraphModule, tmp_path: Path) -> Path:
    save_weights(graph, tmp_path / "w", {})
    return write_folder(tmp_path / "out", {"weights.safetensors": tmp_path / "w"}, info={})


def test_a_folder_holds_its_files_and_a_manifest_of_their_hashes(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"model")
    (tmp_path / "m.onnx.data").write_bytes(b"weights")
    (tmp_path / "m.onnx2").write_bytes(b"another")
    files = {"m.onnx": tmp_path / "m.onnx", "report.json": '{"µ": 1}', "raw": b"\0\1"}
    out = write_folder(tmp_path / "deep" / "out", files, info={"seed": 3, "command": ["compile", "x"]})
    assert names(out) == {"m.onnx", "m.onnx.data", "report.json", "raw", "manifest.json"}
    assert (out / "report.json").read_text(encoding="utf-8") == '{"µ": 1}'
    manifest = read_manifest(out)
    assert (manifest["tool"], manifest["seed"], manifest["command"]) == ("tdcompile", 3, ["compile", "x"])
    assert manifest["files"]["raw"] == {"sha256": hashlib.sha256(b"\0\1").hexdigest(), "bytes": 2}
    assert set(manifest["files"]) == names(out) - {"manifest.json"}
    assert names(out.parent) == {"out"}  # no draft is left
    verify(out)


def test_our_own_folder_and_an_empty_one_are_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write_folder(out, {"a": "1", "b": "2"}, info={})
    write_folder(out, {"a": "3"}, info={})
    assert names(out) == {"a", "manifest.json"}
    assert (out / "a").read_text() == "3"
    assert names(tmp_path) == {"out"}


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    write_folder(tmp_path / "real", {"a": "1"}, info={})
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_folder(tmp_path / "link", {"a": "2"}, info={})
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "a").read_text() == "2"


@pytest.mark.parametrize("manifest", [None, "not json", "[]", '{"tool": "other", "format": 1, "files": {}}'])
def test_a_folder_that_is_not_ours_is_not_touched(tmp_path: Path, manifest: str | None) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    if manifest is not None:
        (out / "manifest.json").write_text(manifest)
    for act in (check_out, lambda place: write_folder(place, {"a": "1"}, info={})):
        with pytest.raises(InputError, match="is not a tdcompile output folder; give another -o"):
            act(out)
    assert (out / "thesis.tex").read_text() == "years of work"


def test_what_was_put_into_our_folder_is_not_deleted(tmp_path: Path) -> None:
    out = write_folder(tmp_path / "out", {"a": "1"}, info={})
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds notes\.txt, which tdcompile did not write"):
        write_folder(out, {"a": "2"}, info={})


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        check_out(tmp_path / "out")
    with pytest.raises(InputError, match="cannot write into"):
        check_out(tmp_path / "out" / "below")


def test_a_place_that_may_not_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere, and tests may run as root
    with pytest.raises(InputError, match="cannot write into"):
        check_out(tmp_path / "a" / "b")


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = write_folder(tmp_path / "out", {"a": "1"}, info={})
    (tmp_path / "m.onnx").write_bytes(b"model")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(InputError, match="No space left on device; nothing was written"):
        write_folder(out, {"a": "2", "m.onnx": tmp_path / "m.onnx"}, info={})
    verify(out)
    assert (out / "a").read_text() == "1"
    assert names(tmp_path) == {"out", "m.onnx"}


@pytest.mark.parametrize("error", [OSError(errno.EIO, "I/O error"), KeyboardInterrupt()])
def test_a_rename_that_fails_puts_the_former_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    out = write_folder(tmp_path / "out", {"a": "1"}, info={})
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".new"):
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(InputError if isinstance(error, OSError) else KeyboardInterrupt):
        write_folder(out, {"a": "2"}, info={})
    assert (out / "a").read_text() == "1"
    assert names(tmp_path) == {"out"}


def test_a_changed_or_missing_file_is_named(tmp_path: Path) -> None:
    out = write_folder(tmp_path / "out", {"a": "1", "b": "2"}, info={})
    (out / "b").write_text("3")
    with pytest.raises(InputError, match="b has changed"):
        verify(out)
    (out / "b").unlink()
    with pytest.raises(InputError, match="lacks b"):
        verify(out)


def test_a_network_loads_back_with_the_same_bits_and_computes_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    graph = traced(Tied().to(memory_format=torch.channels_last))
    out = folder_of(graph, tmp_path)
    back = load(out)
    x = torch.randn(2, 3, 6, 6)
    assert all(torch.equal(value, graph.state_dict()[name]) for name, value in back.state_dict().items())
    torch.testing.assert_close(graph(x), back(x))  # another memory layout may round differently
    assert not back.training
    assert list(back.state_dict()) == list(graph.state_dict())
    stored = load_file(out / "weights.safetensors")
    assert set(stored) == set(graph.state_dict()) - {"b.weight"}  # a shared one is stored once
    assert back.get_parameter("b.weight") is back.get_parameter("a.weight")


def test_equal_graphs_give_equal_files_in_every_process(tmp_path: Path) -> None:
    code = (
        "import sys, torch; from pathlib import Path; from torch import fx, nn\n"
        "from tdcompile.artifact.folder import save_weights\n"
        "torch.manual_seed(0); graph = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))\n"
        "save_weights(graph, Path(sys.argv[1]), {c: 'é\"\\n' for c in 'zyxwvu'})\n"
    )
    for name in ("a", "b"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=True)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert set(load_file(tmp_path / "a")) == {"0.weight", "0.bias"}


def test_a_class_of_ones_own_needs_trust(tmp_path: Path) -> None:
    graph = traced(nn.Sequential(nn.Linear(4, 4), Own()))
    out = folder_of(graph, tmp_path)
    with pytest.raises(InputError, match=r"Own, which is not part of torch\.nn.*trusted=\("):
        load(out)
    x = -torch.ones(1, 4)
    assert torch.equal(load(out, trusted=(Own.__module__,))(x), graph(x))


def test_a_class_of_ones_own_file_is_loaded_by_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("from torch import nn\nclass Own(nn.Module):\n    def forward(self, x): return 2 * x\n")
    graph = traced(nn.Sequential(nn.Linear(4, 4), load_callable(f"{file}:Own")()))
    out = folder_of(graph, tmp_path)
    with pytest.raises(InputError, match=r"needs mine.Own.*trusted=\('path/to/mine.py',\)"):
        load(out)
    code = (
        "import sys, tdcompile, torch; out, file = sys.argv[1:]\n"
        "print(tdcompile.load(out, trusted=(file,))(torch.ones(1, 4)).tolist())"
    )
    command = [sys.executable, "-c", code, str(out), str(file)]
    ran = subprocess.run(command, check=True, capture_output=True, text=True)
    assert json.loads(ran.stdout) == graph(torch.ones(1, 4)).tolist()


def test_a_network_without_a_text_form_is_saved_and_says_why_it_cannot_load(tmp_path: Path) -> None:
    class Hidden(Own):
        pass

    out = folder_of(traced(nn.Sequential(nn.Linear(4, 4), Hidden())), tmp_path)
    assert set(load_file(out / "weights.safetensors")) == {"0.weight", "0.bias"}
    with pytest.raises(InputError, match=r"without the network they belong to: .*Hidden"):
        load(out)


def test_what_is_no_output_folder_does_not_load(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a tdcompile output folder"):
        load(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="cannot read"):
        load_graph(tmp_path / "nothing.safetensors")
    (tmp_path / "w").write_bytes(b"no safetensors")
    with pytest.raises(InputError, match="cannot read"):
        load_graph(tmp_path / "w")


def test_a_manifest_of_another_format_is_refused(tmp_path: Path) -> None:
    out = write_folder(tmp_path / "out", {"a": "1"}, info={})
    (out / "manifest.json").write_text(json.dumps(read_manifest(out) | {"format": 99}))
    with pytest.raises(InputError, match="format 1"):
        verify(out)


def test_weights_that_cannot_be_written_say_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot write"):
        save_weights(traced(nn.Sequential(nn.Linear(2, 2))), tmp_path / "no" / "folder", {})
