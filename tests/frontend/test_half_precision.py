"""Half precision: the same values in single, the network itself untouched, ties kept."""

import pytest
import torch
from torch import nn

import tdcompile
from tdcompile.frontend.half_precision import to_single_precision
from tdcompile.ir.diagnostics import Diagnostic


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.dtype = torch.float32
        self.words, self.head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.words.weight
        self.mix = nn.Linear(6, 6)

    def forward(self, ids):
        return self.head(self.mix(self.words(ids)).to(self.dtype))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_values_stay_and_ties_too(kind):
    module = Tied().to(kind)
    module.dtype = kind
    single = to_single_precision(module)
    assert single is not module
    assert {p.dtype for p in module.parameters()} == {kind}
    assert {p.dtype for p in single.parameters()} == {torch.float32}
    assert single.head.weight is single.words.weight
    assert single.dtype is torch.float32
    assert torch.equal(single.mix.weight, module.mix.weight.float())


def test_single_precision_is_left_as_it_is():
    module = nn.Linear(3, 3)
    assert to_single_precision(module) is module


@pytest.mark.parametrize("frontend", ["fx", "export"])
def test_a_half_precision_network_is_compiled_in_single_with_a_note(frontend):
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).to(torch.bfloat16)
    program = tdcompile.trace(module, torch.randn(2, 3, 6, 6, dtype=torch.bfloat16), frontend=frontend)
    assert program.inputs[0].dtype is torch.float32
    codes = [entry.code for entry in program.history if isinstance(entry, Diagnostic)]
    assert codes == ["half_precision"]
