"""Regions of ``torch.autocast`` are compiled in float32, and the report says so."""

import pytest
import torch
from torch import nn

import tdcompile
from tdcompile.errors import InputError


class Mixed(nn.Module):
    def __init__(self, branch=False, enabled=True):
        super().__init__()
        self.a, self.b, self.branch, self.enabled = nn.Linear(16, 16), nn.Linear(16, 4), branch, enabled

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.enabled):
            y = self.a(x)
            if self.branch and float(y.sum()) < -1e9:
                return y
            return self.b(y).float()


@pytest.mark.parametrize("frontend", ["auto", "fx", "export"])
def test_a_region_is_compiled_in_float32_and_told(frontend):
    module, x = Mixed().eval(), torch.randn(2, 16)
    program = tdcompile.trace(module, x, frontend=frontend)
    assert list(tdcompile.sites(program)) == ["a", "b"]
    assert [entry.code for entry in program.history] == ["half_precision"]
    with torch.no_grad():
        torch.testing.assert_close(program.graph(x), module.b(module.a(x)))
        assert not torch.equal(module(x), program.graph(x))  # the network itself keeps its region


def test_a_region_that_is_switched_off_is_not_told():
    assert not tdcompile.trace(Mixed(enabled=False).eval(), torch.randn(2, 16)).history


def test_a_region_that_tracing_cannot_pass_is_refused():
    with pytest.raises(InputError, match="autocast region"):
        tdcompile.trace(Mixed(branch=True).eval(), torch.randn(2, 16), frontend="fx")
