"""``--input`` with ranges, and ``--example`` files: read without code, and in agreement with ``--input``."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tdcompile.cli.example_file import check_agreement, read_example
from tdcompile.cli.example_inputs import check_data_ranges, parse_example
from tdcompile.cli.load_job import load_job
from tdcompile.cli.main import main
from tdcompile.errors import InputError
from tdcompile.recipes import Recipe

X, LENGTHS = torch.randn(2, 9, 6), torch.tensor([9, 4])
NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.out = nn.Linear(6, 64), nn.Linear(64, 64)

    def forward(self, x, lengths):
        kept = torch.arange(x.shape[1]) < lengths[:, None]
        if not torch.jit.is_tracing() and not torch.compiler.is_compiling() and int(lengths.min()) < 1:
            raise ValueError("a length of 0")
        return self.out(self.inp(x).relu()) * kept[..., None]
"""


class Net(nn.Module):
    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return x * lengths[:, None, None]


@pytest.mark.parametrize(
    ("text", "limits"),
    [("ids=1x64:int64[0,30522)", (0, 30522)), ("4x8:int32[-3, 5)", (-3, 5)), ("1x2:uint8[0,256)", (0, 256))],
)
def test_integers_are_drawn_in_their_range_with_both_ends(text, limits):
    example = parse_example(text)
    assert example.range == limits
    drawn = example.draw(torch.Generator().manual_seed(0))
    assert (int(drawn.min()), int(drawn.max()) + 1) == limits
    assert (tuple(drawn.shape), drawn.dtype) == (example.shape, example.dtype)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("1x4:int64[5,5)", "is empty"),
        ("1x4:int64[5,2)", "is empty"),
        ("1x4:float32[0,2)", "no integer"),
        ("1x4:bool[0,2)", "no integer"),
        ("1x4:uint8[0,300)", "holds 0 to 255"),
        ("1x4:int64[0,9223372036854775808)", "exceeds its type"),
        ("1x4[0,5)", "must have the form"),
        ("1x4:int64[0,5]", "must have the form"),
    ],
)
def test_a_range_that_cannot_be_is_refused(text, told):
    with pytest.raises(InputError, match=told):
        parse_example(text)


def test_data_out_of_a_range_are_refused():
    texts, names = ["b.ids=1x4:int64[0,5)", "x=1x2"], ["x", "b_ids"]
    inputs = (torch.randn(3, 2), torch.tensor([[0, 4, 5, 1]]))
    with pytest.raises(InputError, match=r"the data: the input 'b.ids' has the value 5, out of its range \[0,5\)"):
        check_data_ranges(texts, names, inputs)
    check_data_ranges(texts, names, (inputs[0], inputs[1].clamp(max=4)))
    check_data_ranges(["1x4:int64[0,6)"], ["ids"], inputs[1:])


@pytest.mark.parametrize(
    ("saved", "held"),
    [
        (X, (X,)),
        ((X, LENGTHS), (X, LENGTHS)),
        ([X, [LENGTHS]], (X, [LENGTHS])),
        ({"x": X, "lengths": LENGTHS}, {"x": X, "lengths": LENGTHS}),
        (OrderedDict(x=X), {"x": X}),
    ],
)
def test_a_file_of_torch_holds_arguments_in_order_or_by_name(tmp_path, saved, held):
    torch.save(saved, tmp_path / "e.pt")
    found = read_example(tmp_path / "e.pt")
    assert type(found) is type(held)
    torch.testing.assert_close(found, held)


def test_a_file_of_numpy_holds_arguments_by_name_or_in_order(tmp_path):
    np.savez(tmp_path / "named.npz", lengths=LENGTHS.numpy(), x=X.numpy())
    named = read_example(tmp_path / "named.npz")
    torch.testing.assert_close(named, {"lengths": LENGTHS, "x": X})
    np.savez(tmp_path / "plain.npz", X.numpy(), LENGTHS.numpy())
    torch.testing.assert_close(read_example(tmp_path / "plain.npz"), (X, LENGTHS))


class Code:
    """A class that only code could make again."""


@pytest.mark.parametrize(
    ("write", "told"),
    [
        (lambda path: None, "there is no example file"),
        (lambda path: path.write_bytes(b"no tensors"), "cannot be read"),
        (lambda path: torch.save(Code(), path), "Code.*refused"),
        (lambda path: torch.save({"x": 3}, path), "holds no tensor"),
        (lambda path: torch.save({3: X}, path), "has the key 3"),
    ],
)
@pytest.mark.parametrize("name", ["e.pt"])
def test_a_file_that_holds_no_inputs_is_refused(tmp_path, name, write, told):
    write(tmp_path / name)
    with pytest.raises(InputError, match=told) as caught:
        read_example(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arrays", "told"), [({"x": np.array(["text"])}, "no type of a tensor"), ({"x": np.array([{}])}, "cannot be read")]
)
def test_arrays_that_are_no_tensors_are_refused(tmp_path, arrays, told):
    np.savez(tmp_path / "e.npz", **arrays)
    with pytest.raises(InputError, match=told):
        read_example(tmp_path / "e.npz")


@pytest.mark.parametrize("held", [(X, LENGTHS), {"lengths": LENGTHS, "x": X}])
@pytest.mark.parametrize(
    ("texts", "told"),
    [
        (["x=2x9x6"], None),
        (["lengths=2:int64[1,10)", "x=2x9x6"], None),
        (["x=2x9x5"], "is 2x9x6:float32 in the example"),
        (["lengths=2:int32"], "is 2:int64 in the example"),
        (["lengths=2:int64[1,9)"], r"has the value 9, out of its range \[1,9\)"),
        (["mask=2x9:bool"], "is not in the example"),
        (["x.deep=2x9x6"], "is not in the example"),
    ],
)
def test_inputs_beside_a_file_agree_with_it(held, texts, told):
    if told is None:
        check_agreement(texts, held, Net(), Path("e.pt"))
        return
    with pytest.raises(InputError, match=told):
        check_agreement(texts, held, Net(), Path("e.pt"))


def test_inputs_without_names_agree_by_position():
    check_agreement(["2x9x6", "2:int64"], (X, LENGTHS), Net(), Path("e.pt"))
    with pytest.raises(InputError, match="holds 2 inputs by position"):
        check_agreement(["2x9x6", "2:int64", "3"], (X, LENGTHS), Net(), Path("e.pt"))


def test_the_example_file_gives_the_inputs_of_a_job(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    torch.save({"x": X, "lengths": LENGTHS}, tmp_path / "e.pt")
    job = load_job(Recipe(source=f"{tmp_path}/net.py:Net", example=str(tmp_path / "e.pt")))
    torch.testing.assert_close(job.inputs, {"x": X, "lengths": LENGTHS})
    with pytest.raises(InputError, match=r"give --input.*or --example FILE"):
        load_job(Recipe(source=f"{tmp_path}/net.py:Net"))


def test_a_command_with_an_example_that_disagrees_ends_in_a_sentence(tmp_path, capfd):
    (tmp_path / "net.py").write_text(NET)
    torch.save((X, LENGTHS), tmp_path / "e.pt")
    arguments = [f"{tmp_path}/net.py:Net", "--example", str(tmp_path / "e.pt"), "--input", "x=1x9x6"]
    assert main(["compile", *arguments, "--budget", "macs=0.6", "-o", str(tmp_path / "out")]) == 2
    assert "leave one of them out" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
