"""How a network is called: tensors out of any nesting and back, the batch axis, and other axes that stay open."""

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tdcompile.errors import InputError
from tdcompile.frontend.signature import Call
from tdcompile.ir.dynamic_shapes import Axis, batch_of, open_axes, read_batch_axes, resized, shares_batch


class Takes(nn.Module):
    def forward(self, x, mask=None, scale=2.0, *, extra=None, **rest):
        return x


X, MASK = torch.randn(2, 3), torch.ones(2, 5)


def test_a_tensor_a_sequence_and_a_mapping():
    for inputs in (X, (X,), [X], {"x": X}):
        call = Call.of(Takes(), inputs)
        assert call.names == ("x",)
        assert call.tensors[0] is X
        assert call.split(call.tensors) == ((X,), {})


def test_tensors_come_in_the_order_of_the_signature():
    call = Call.of(Takes(), {"extra": MASK, "x": X})
    assert call.names == ("x", "extra")
    args, kwargs = call.split(["a", "b"])
    assert (args, kwargs) == (("a",), {"extra": "b"})
    assert call.defaults() == {"mask": None, "scale": 2.0}


def test_tensors_that_no_argument_names_are_known():
    assert Call.of(Takes(), {"x": X, "other": MASK, "more": [X], "scale": 3.0}).tensors_in_kwargs == ["other", "more"]
    assert Call.of(Takes(), {"x": X, "extra": MASK, "word": 3}).tensors_in_kwargs == []


def test_nested_inputs_are_named_by_their_place():
    call = Call.of(Takes(), (X, {"a": MASK, "b": [X, 3]}))
    assert call.names == ("x", "mask_a", "mask_b_0")
    assert call.nested
    assert call.split([1, 2, 3])[0] == (1, {"a": 2, "b": [3, 3]})
    assert not Call.of(Takes(), (X, MASK)).nested


def test_what_takes_any_keyword_gets_it():
    call = Call.of(Takes(), {"x": X, "other": MASK})
    assert call.split(call.tensors)[1] == {"other": MASK}


class Strict(nn.Module):
    def forward(self, x, y):
        return x


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"x": X, "z": X}, "no input 'z': .*known: x, y"),
        ((X,), "missing a required argument: 'y'; it takes x, y"),
        ((X, X, X), "too many positional arguments"),
        ((1, 2), "no tensor"),
    ],
)
def test_what_does_not_fit_is_told(inputs, said):
    with pytest.raises(InputError, match=said):
        Call.of(Strict(), inputs)


def test_the_batch_is_that_of_the_first_input():
    table, index = torch.randn(7, 4), torch.tensor(1.0)
    assert shares_batch((X, table, MASK, index)) == [True, False, True, False]
    longer = batch_of((X, table, index), 5)
    assert [tuple(x.shape) for x in longer] == [(5, 3), (7, 4), ()]
    assert torch.equal(longer[0], torch.cat([X, X, X])[:5])


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 6))
def test_a_batch_of_any_size(sizes: list[int], size: int):
    made = batch_of(tuple(torch.zeros(sizes[0], n) for n in sizes), size)
    assert [tuple(x.shape) for x in made] == [(size, n) for n in sizes]


def test_axes_of_one_length_are_two_unless_they_have_one_label():
    inputs = (torch.zeros(2, 7), torch.zeros(2, 7), torch.zeros(2, 5))
    axes = open_axes(["ids:1", "mask:1", "other:1"], ("ids", "mask", "other"), inputs)
    assert axes == (Axis(0, 1, "ids_1"), Axis(1, 1, "mask_1"), Axis(2, 1, "other_1"))
    axes = open_axes(["ids:1=t", "mask:1=t", "other:1"], ("ids", "mask", "other"), inputs)
    assert axes == (Axis(0, 1, "t"), Axis(1, 1, "t"), Axis(2, 1, "other_1"))
    assert open_axes(["mask:1=time"], ("ids", "mask", "other"), inputs) == (Axis(1, 1, "time"),)
    assert [tuple(x.shape) for x in resized(inputs, axes, 3)] == [(2, 10), (2, 10), (2, 8)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ids", "not of the form NAME:AXIS"),
        ("idx:1", "names no input: did you mean 'ids'"),
        ("ids:2", "'ids' is \\(2, 7\\)"),
        ("ids:0", "the batch axis"),
        ("one:1", "1 long"),
        ("ids:1%4", "no multiple of 4"),
        ("ids:1%0", "not of the form"),
        ("ids:1=batch", "write --batch-axis"),
    ],
)
def test_an_axis_that_cannot_be_opened(text: str, said: str):
    with pytest.raises(InputError, match=said):
        open_axes([text], ("ids", "one"), (torch.zeros(2, 7), torch.zeros(2, 1)))


def test_axes_of_one_label_have_one_length_and_one_step():
    inputs = (torch.zeros(2, 6), torch.zeros(2, 8))
    with pytest.raises(InputError, match="6 in steps of 1, 8 in steps of 1"):
        open_axes(["a:1=t", "b:1=t"], ("a", "b"), inputs)
    with pytest.raises(InputError, match="opened twice"):
        open_axes(["a:1", "a:1=t"], ("a", "b"), inputs)


def test_an_axis_is_opened_by_the_dotted_name_of_a_nested_input():
    assert open_axes(["x.image:1"], ("x_image",), (torch.zeros(2, 7),)) == (Axis(0, 1, "x_image_1"),)


def test_batch_axes_are_read_by_input():
    names, inputs = ("x", "state", "table"), (torch.zeros(3, 7), torch.zeros(2, 3, 4), torch.zeros(5, 3))
    assert read_batch_axes(["state=1"], names, inputs) == (0, 1, None)
    assert read_batch_axes(["table=none"], names, inputs) == (0, None, None)
    assert read_batch_axes(["x=none", "table=1"], names, inputs) == (None, None, 1)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["state"], "not of the form NAME=AXIS"),
        (["stat=1"], "did you mean 'state'"),
        (["x=2"], "'x' is \\(3, 7\\)"),
        (["x=0", "x=1"], "given twice"),
        (["x=0", "state=0"], "'x' has 3, 'state' has 2"),
    ],
)
def test_batch_axes_that_do_not_fit(texts: list[str], said: str):
    with pytest.raises(InputError, match=said):
        read_batch_axes(texts, ("x", "state"), (torch.zeros(3, 7), torch.zeros(2, 3, 4)))


def test_a_mapping_may_be_of_any_kind():
    class Odd(Mapping[str, Tensor]):
        def __getitem__(self, key: str) -> Tensor:
            return {"x": X}[key]

        def __iter__(self):
            return iter(["x"])

        def __len__(self) -> int:
            return 1

    assert Call.of(Takes(), Odd()).tensors[0] is X
