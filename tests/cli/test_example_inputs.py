"""``--input``: nested names become dicts and lists."""

import pytest
import torch
from torch import nn

from tdcompile.cli.example_inputs import draw_arguments
from tdcompile.errors import InputError


class Nested(nn.Module):
    def forward(self, batch):
        return batch


def shapes(value):
    if isinstance(value, dict):
        return {key: shapes(held) for key, held in value.items()}
    return [shapes(held) for held in value] if isinstance(value, list) else tuple(value.shape)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["batch.image=1x3x8x8", "batch.mask=1x8:bool"], {"image": (1, 3, 8, 8), "mask": (1, 8)}),
        (["batch.0=1x3", "batch.1=1x4"], [(1, 3), (1, 4)]),
        (["batch.views.1=1x4", "batch.views.0=1x3"], {"views": [(1, 3), (1, 4)]}),
        (["batch=1x3"], (1, 3)),
    ],
)
def test_a_dotted_name_is_an_entry_of_a_dict_or_list(texts, expected):
    assert shapes(draw_arguments(texts, Nested(), 0)["batch"]) == expected


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["image=1x3x8x8"], "takes no input 'image'.*e.g. batch.image"),
        (["batch.0=1x3", "batch.2=1x3"], "the items of 'batch' are 0, 2; expected 0, 1"),
        (["batch.0=1x3", "batch.mask=1x3"], "the items of 'batch'"),
        (["batch=1x3", "batch.mask=1x3"], "as a tensor, and 'batch.mask' as an entry"),
        (["batch.x=1x3", "batch.x=1x3"], "given twice"),
        (["batch.=1x3"], "must have the form"),
    ],
)
def test_names_that_do_not_fit_are_one_sentence(texts, said):
    with pytest.raises(InputError, match=said):
        draw_arguments(texts, Nested(), 0)


def test_a_wrapped_network_takes_the_inputs_of_the_one_inside():
    assert isinstance(draw_arguments(["batch=1x3"], nn.DataParallel(Nested()), 0)["batch"], torch.Tensor)
