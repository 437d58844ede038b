"""Wrappers are seen through: parallel training, ``torch.compile``, averaged weights."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import tdcompile
from tdcompile.frontend.wrappers import unwrapped


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, pixels):
        return self.b(self.a(pixels).relu().mean((2, 3)))


class Average(nn.Module):
    """An average of weights that has no ``forward``, as timm has."""

    def __init__(self, module):
        super().__init__()
        self.module = copy.deepcopy(module)


class Scaled(nn.Module):
    """Not a wrapper: it computes something of its own."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args):
        return 2 * self.module(*args)


def compiled_in_place(module):
    module.compile()
    return module


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, torch.compile, AveragedModel, Average, lambda m: torch.compile(nn.DataParallel(m))]
)
def test_a_wrapper_is_seen_through_with_the_names_inside_and_told(wrap):
    program = tdcompile.trace(wrap(Net()).eval(), {"pixels": torch.randn(2, 3, 6, 6)})
    assert list(tdcompile.sites(program)) == ["a", "b"]
    assert [entry.code for entry in program.history] == ["wrapped"]


def test_a_network_compiled_in_place_keeps_its_names():
    program = tdcompile.trace(compiled_in_place(Net()).eval(), torch.randn(2, 3, 6, 6))
    assert list(tdcompile.sites(program)) == ["a", "b"]
    assert not program.history


def test_a_compiled_part_is_seen_through():
    program = tdcompile.trace(nn.Sequential(torch.compile(Net()), nn.ReLU()).eval(), torch.randn(2, 3, 6, 6))
    assert list(tdcompile.sites(program)) == ["0.a", "0.b"]


def test_a_module_that_computes_something_is_no_wrapper():
    module = Scaled(Net()).eval()
    assert unwrapped(module) is module
    x = torch.randn(2, 3, 6, 6)
    program = tdcompile.trace(module, x)
    torch.testing.assert_close(program.graph(x), module(x))
