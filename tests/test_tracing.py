"""Tracing: leaves, functional layers, shared and tied weights, in-place operations, and inputs that cannot be used."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tdcompile
from tdcompile.errors import InputError
from tdcompile.layer import Refusal
from tdcompile.passes.decompose.channel import Channel
from tdcompile.ranks import Candidate, RankPlan
from tdcompile.surgery import outputs_of
from tdcompile.target import Cost


def plan_of(program, form="channel"):
    """A plan that takes every layer apart exactly: the function stays the same."""
    choices = {}
    for name, site in tdcompile.sites(program).items():
        fits = Channel().refuse(site.layer) is None
        ranks = Channel().exact_ranks(site.layer) if fits else ()
        choices[name] = Candidate(form if fits else "dense", ranks, 0.0, Cost())
    return RankPlan(choices, Cost(), Cost())


def rewritten(program):
    ready = program.with_(facts=program.facts.having(plan_of(program)))
    return tdcompile.Pipeline.parse("factorize,drop-dead").run(ready)


def assert_same(module, program, *inputs):
    for expected, got in zip(outputs_of(module, inputs), outputs_of(program.graph, inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


class Branching(nn.Module):
    """Control flow on values: symbolic tracing cannot pass."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return self.conv(x) if float(x.sum()) > -1e9 else x


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.odd = Branching()
        self.last = nn.Conv2d(8, 6, 3)

    def forward(self, x):
        return self.last(self.odd(self.first(x)))


def test_what_cannot_be_traced_is_a_leaf_whose_layers_are_found_and_rewritten():
    module, x = Holder().eval(), torch.randn(2, 3, 8, 8)
    program = tdcompile.trace(module, (x,))
    found = tdcompile.sites(program)
    assert list(found) == ["first", "odd.conv", "last"]
    assert found["odd.conv"].inner == "odd"
    assert found["first"].inner is None
    assert [(r.layer, r.code) for r in program.history if isinstance(r, Refusal)] == [("odd", "not_traced")]
    after = rewritten(program)
    assert "odd.conv.0" in tdcompile.sites(after)
    assert_same(module, after, torch.randn(3, 3, 8, 8))


def test_a_network_that_cannot_be_traced_at_all_still_has_its_layers_rewritten():
    module, x = Branching().eval(), torch.randn(2, 8, 6, 6)
    program = tdcompile.trace(module, (x,))
    assert list(tdcompile.sites(program)) == ["network.conv"]
    assert_same(module, rewritten(program), x)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 2, 3, 3))
        self.shift = nn.Parameter(torch.randn(8))
        self.matrix = nn.Parameter(torch.randn(5, 8))
        self.scale = nn.Parameter(torch.randn(()))

    def forward(self, x):
        x = F.conv2d(x, self.kernel, self.shift, 1, padding=1, groups=2)
        x = F.conv2d(x, self.kernel.repeat(1, 4, 1, 1) * self.scale)  # a computed weight is nobody's parameter
        return F.linear(x.mean((2, 3)), self.matrix)


def test_functional_layers_on_parameters_become_modules_over_the_same_parameters():
    module, x = Functional().eval(), torch.randn(2, 4, 8, 8)
    program = tdcompile.trace(module, (x,))
    found = tdcompile.sites(program)
    assert list(found) == ["kernel_layer", "matrix_layer"]
    assert found["kernel_layer"].module.weight is module.kernel
    assert found["kernel_layer"].layer.groups == 2
    assert found["kernel_layer"].layer.padding == ((1, 1), (1, 1))
    assert_same(module, program, x)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x):
        y = F.relu(self.conv(x))
        return self.conv(F.max_pool2d(y, 2))


def test_a_shared_module_is_one_layer_with_two_calls_and_is_rewritten_at_both():
    module, x = Twice().eval(), torch.randn(2, 6, 8, 8)
    program = tdcompile.trace(module, (x,))
    (site,) = tdcompile.sites(program).values()
    assert [call.extent for call in site.calls] == [(8, 8), (4, 4)]
    after = rewritten(program)
    assert [len(s.calls) for s in tdcompile.sites(after).values()] == [2, 2]
    assert_same(module, after, x)


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)
        self.relu, self.drop = nn.ReLU(inplace=True), nn.Dropout(0.5)

    def forward(self, x):
        left = self.relu(self.a(x))
        right = F.relu_(self.b(x))
        left += right
        return F.dropout(self.drop(left), 0.5, self.training) + right


def test_in_place_operations_and_dropout_compute_what_they_did():
    module, x = InPlace().eval(), torch.randn(2, 4, 8, 8)
    program = tdcompile.trace(module, (x,))
    assert_same(module, program, x)
    assert_same(module, rewritten(program), x)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.embed(tokens))


def test_a_tied_weight_is_left_alone_with_that_reason():
    program = tdcompile.trace(Tied().eval(), (torch.randint(0, 16, (2, 5)),))
    program = program.with_(budget=tdcompile.Budget(macs=1.0))
    from tdcompile.ranks import Candidates

    facts = tdcompile.Pipeline.parse("propose").run(program).facts
    assert [(r.layer, r.code) for r in facts[Candidates].refusals] == [("head", "tied_parameter")]


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(4, 8)

    def forward(self, image, extra):
        return {"map": self.conv(image), "vector": (self.fc(extra),)}


def test_several_inputs_and_nested_outputs():
    module, inputs = Several().eval(), (torch.randn(2, 3, 6, 6), torch.randn(2, 4))
    after = rewritten(tdcompile.trace(module, inputs))
    assert_same(module, after, *inputs)


def test_a_batch_of_one_is_doubled_and_the_module_is_left_as_it_was():
    module = Twice().train()
    program = tdcompile.trace(module, (torch.randn(1, 6, 8, 8),))
    assert program.inputs[0].shape[0] == 2
    assert module.training
    assert not program.graph.training


@pytest.mark.parametrize("x", [torch.randn(2, 5, 8, 8), torch.randn(2, 6), torch.zeros(2, 6, 8, 8, dtype=torch.int64)])
def test_inputs_that_do_not_fit_are_one_sentence(x):
    with pytest.raises(InputError, match="does not run on an input of"):
        tdcompile.trace(Twice(), (x,))


def test_damaged_weights_are_named():
    module = Twice()
    module.conv.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match=r"conv\.weight.*NaN"):
        tdcompile.trace(module, (torch.randn(2, 6, 8, 8),))
