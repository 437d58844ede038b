"""Weights that are computed on every call: found as layers, in a copy that leaves the network as it is."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

import tdcompile
from tdcompile.frontend.parametrizations import without_parametrizations

FORMS = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "weight norm, the older": weight_norm,
    "spectral norm, the older": spectral_norm,
}


def network(form):
    torch.manual_seed(0)
    with pytest.warns(FutureWarning) if "older" in form and "weight" in form else torch.no_grad():
        return nn.Sequential(FORMS[form](nn.Linear(6, 6)), nn.ReLU(), nn.Linear(6, 4)).eval()


@pytest.mark.parametrize("form", FORMS)
def test_the_copy_computes_the_same_and_the_network_is_as_it_was(form):
    module, x = network(form), torch.randn(5, 6)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    expected = module(x)
    plain = without_parametrizations(module)
    assert plain is not module
    assert type(plain[0]) is nn.Linear
    assert isinstance(plain[0].weight, nn.Parameter)
    assert plain[2].weight is module[2].weight
    torch.testing.assert_close(plain(x), expected)
    torch.testing.assert_close(module(x), expected)
    after = module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_network_without_any_is_itself():
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    assert without_parametrizations(module) is module


@pytest.mark.parametrize("frontend", ["fx", "export"])
@pytest.mark.parametrize("form", FORMS)
def test_both_front_ends_find_the_layer(form, frontend):
    program = tdcompile.trace(network(form), torch.randn(2, 6), frontend=frontend)
    assert list(tdcompile.sites(program)) == ["0", "2"]
