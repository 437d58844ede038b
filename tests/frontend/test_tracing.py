"""Tracing: leaves, functional layers, shared and tied weights, in-place operations, and inputs that cannot be used."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tdcompile
from tdcompile.core.decomposition import Decomposition
from tdcompile.core.plan import Candidate, RankPlan
from tdcompile.core.registry import make
from tdcompile.errors import InputError
from tdcompile.frontend.torch_export import _integer_buffers_as_constants
from tdcompile.ir.diagnostics import Diagnostic
from tdcompile.ir.modules import outputs_of
from tdcompile.ir.target import Cost


def plan_of(program, form="channel"):
    """A plan that takes every layer apart exactly: the function stays the same."""
    choices, taking = {}, make(Decomposition, form)
    for name, site in tdcompile.sites(program).items():
        fits = taking.refuse(site.layer) is None
        ranks = taking.exact_ranks(site.layer) if fits else ()
        choices[name] = Candidate(taking, ranks) if fits else Candidate.dense(Cost())
    return RankPlan(choices, Cost(), Cost())


def rewritten(program, form="channel"):
    ready = program.with_(facts=program.facts.having(plan_of(program, form)))
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


@pytest.mark.parametrize("frontend", ["auto", "fx"])
def test_what_cannot_be_traced_is_a_leaf_whose_layers_are_found_and_rewritten(frontend):
    module, x = Holder().eval(), torch.randn(2, 3, 8, 8)
    program = tdcompile.trace(module, (x,), frontend=frontend)
    assert program.frontend == "fx"  # torch.export cannot branch on a value either
    found = tdcompile.sites(program)
    assert list(found) == ["first", "odd.conv", "last"]
    assert found["odd.conv"].inner == "odd"
    assert found["first"].inner is None
    assert [(r.layer, r.code) for r in program.history if isinstance(r, Diagnostic)] == [("odd", "not_traced")]
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
    from tdcompile.core.plan import Candidates

    facts = tdcompile.Pipeline.parse("propose").run(program).facts
    assert [(name, r.code) for name, r in facts[Candidates].reasons.items()] == [("head", "tied_parameter")]


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


class Shaped(nn.Module):
    """Python on shapes, which proxies cannot answer and torch.export can; a functional and a shared layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.drop = nn.Dropout(0.5)
        self.matrix = nn.Parameter(torch.randn(5, 8))

    def forward(self, x):
        if x.shape[1] != 3:
            raise ValueError("three channels are expected")
        x = self.drop(F.relu(self.norm(self.conv(x))))
        x = self.up(self.twice(F.relu(self.twice(x))))
        return F.linear(x.mean((2, 3)), self.matrix)


class Plain(Shaped):
    """The same without the question that proxies cannot answer."""

    def forward(self, x):
        x = self.drop(F.relu(self.norm(self.conv(x))))
        x = self.up(self.twice(F.relu(self.twice(x))))
        return F.linear(x.mean((2, 3)), self.matrix)


def test_python_on_shapes_is_traced_by_export_and_both_front_ends_find_the_same_layers():
    torch.manual_seed(0)
    shaped, x = Shaped().eval(), torch.randn(2, 3, 8, 8)
    plain = Plain().eval()
    plain.load_state_dict(shaped.state_dict())
    program = tdcompile.trace(shaped, x)
    assert program.frontend == "export"
    assert tdcompile.trace(plain, x).frontend == "fx"
    assert tdcompile.trace(plain, x, frontend="export").frontend == "export"
    found, other = tdcompile.sites(program), tdcompile.sites(tdcompile.trace(plain, x))
    assert list(found) == ["conv", "twice", "up", "matrix_layer"]
    assert {name: site.calls for name, site in found.items()} == {name: site.calls for name, site in other.items()}
    assert found["conv"].module.weight is shaped.conv.weight
    assert_same(shaped, program, torch.randn(5, 3, 8, 8))
    assert_same(shaped, rewritten(program), torch.randn(5, 3, 8, 8))


class Gridded(nn.Module):
    """Keeps a grid for the size of its last call, as the heads of detectors do."""

    seen, grid = None, torch.empty(0)

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)

    def forward(self, x):
        x = self.conv(x)
        if self.seen != x.shape:
            self.grid, self.seen = torch.arange(x.shape[3]) + 0.5, x.shape
        return x.view(x.shape[0], 16, -1).sum(1) * self.grid.repeat(x.shape[2])


@pytest.mark.parametrize("frontend", ["auto", "export"])
@pytest.mark.parametrize("dynamic", [(), ("x:2", "x:3")], ids=["fixed", "open"])
def test_what_a_network_remembers_of_the_last_size_is_no_constant(frontend, dynamic):
    torch.manual_seed(0)
    module = Gridded().eval()
    program = tdcompile.trace(module, torch.randn(1, 3, 8, 8), frontend=frontend, dynamic=dynamic)
    for shape in [(1, 3, 8, 8), (5, 3, 8, 8), *([(2, 3, 6, 10)] if dynamic else [])]:
        assert_same(module, program, torch.randn(shape))


def test_a_network_that_proxies_do_not_see_into_is_exported_once(monkeypatch):
    calls, export = [], torch.export.export
    monkeypatch.setattr(torch.export, "export", lambda *args, **given: calls.append(args[0]) or export(*args, **given))
    torch.manual_seed(0)
    assert tdcompile.trace(Shaped().eval(), torch.randn(2, 3, 8, 8)).frontend == "export"
    assert len(calls) == 1


def test_what_export_traced_trains_like_the_network():
    """Batch norm and dropout are modules again, which know training mode; in eval mode they are as they were."""
    program = tdcompile.trace(Shaped().eval(), torch.randn(2, 3, 8, 8))
    kinds = [type(part) for part in program.graph.modules()]
    assert nn.BatchNorm2d in kinds
    assert nn.Dropout in kinds
    graph, x = program.graph.train(), torch.randn(4, 3, 8, 8)
    before = graph.get_submodule("norm").running_mean.clone()
    assert not torch.equal(graph(x), graph(x))
    assert not torch.equal(graph.get_submodule("norm").running_mean, before)


@pytest.mark.parametrize("frontend", ["fx", "export"])
def test_the_forced_front_end_says_what_it_cannot(frontend):
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    assert tdcompile.trace(module, torch.randn(2, 4), frontend=frontend).frontend == frontend
    if frontend == "export":
        with pytest.raises(InputError, match="data-dependent"):
            tdcompile.trace(Branching(), torch.randn(2, 8, 6, 6), frontend=frontend)


class Counted(nn.Module):
    """Sizes computed from integers in buffers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 3)
        self.register_buffer("stride", torch.tensor(4))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x):
        extra = (-x.shape[-1]) % self.stride
        if extra > 2:
            x = F.pad(x, (0, extra))
        return self.conv(x)


def test_integers_in_buffers_are_known_sizes_to_export():
    module, x = Counted().eval(), torch.randn(2, 4, 9)
    program = tdcompile.trace(module, x, frontend="export")
    assert type(module) is Counted
    assert module.stride is module._buffers["stride"]
    assert list(module.state_dict()) == ["stride", "scale", "conv.weight", "conv.bias"]
    assert_same(module, program, x)
    assert program.graph(x).shape == (2, 8, 10)


class Counting(Counted):
    """Changes such an integer as it runs, which a constant cannot."""

    def forward(self, x):
        self.stride = self.stride + 0
        return super().forward(x)


def test_what_export_said_first_is_what_is_said():
    module = Counting().eval()
    with pytest.raises(InputError, match="data-dependent"):
        tdcompile.trace(module, torch.randn(2, 4, 9), frontend="export")
    with _integer_buffers_as_constants(module), pytest.raises(AttributeError):
        module(torch.randn(2, 4, 9))
    assert list(module.state_dict()) == ["stride", "scale", "conv.weight", "conv.bias"]


class Wrapped(nn.Module):
    """A leaf that insists on its arguments' names."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def _plain(self, x, y):
            return self.fc(x) + y if float(x.detach().sum()) < 1e9 else y

        @functools.wraps(_plain)
        def forward(self, *args, **kwargs):
            if args:
                raise TypeError("call by keyword")
            return self._plain(**kwargs)

    def __init__(self):
        super().__init__()
        self.inner = self.Inner()

    def forward(self, x):
        return self.inner(x=x, y=x)


def test_the_networks_own_parts_are_called_as_it_calls_them():
    module, x = Wrapped().eval(), torch.randn(2, 8)
    program = tdcompile.trace(module, x)
    assert program.frontend == "fx"
    assert_same(module, program, x)


class Caching(nn.Module):
    """Keeps what it has computed, as LeViT does."""

    def __init__(self):
        super().__init__()
        self.conv, self.bias, self.kept = nn.Conv2d(3, 8, 3), nn.Parameter(torch.randn(8, 1, 1)), {}

    def forward(self, x):
        y = self.conv(x)
        if "bias" not in self.kept:
            self.kept["bias"] = self.bias * 2
            self.kept["first"] = y
        return y + self.kept["bias"]


@pytest.mark.parametrize("frontend", ["auto", "fx", "export"])
def test_what_a_network_keeps_while_it_is_traced_does_not_stay_in_it(frontend):
    module, x = Caching().eval(), torch.randn(2, 3, 6, 6)
    for _ in range(2):
        program = tdcompile.trace(module, x, frontend=frontend)
        assert program.graph.get_submodule("conv").weight is module.conv.weight
        assert_same(module, program, x)
    assert all(type(value) is torch.Tensor for value in module.kept.values())
    assert torch.equal(module(x), module(x))


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x) + torch.randn(4)


def test_a_network_that_draws_random_numbers_is_refused():
    with pytest.raises(InputError, match="different outputs for equal inputs"):
        tdcompile.trace(Noisy(), torch.randn(2, 4))


class Remembering(nn.Module):
    """Counts its calls, in Python or in a buffer, and answers by the count or not."""

    def __init__(self, where, answers):
        super().__init__()
        self.fc, self.where, self.answers, self.count = nn.Linear(4, 4), where, answers, 0
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        if self.where == "attribute":
            self.count += 1
            return self.fc(x) * 2 if self.answers and self.count % 2 else self.fc(x)
        self.calls += 1
        return self.fc(x) * self.calls if self.answers else self.fc(x)


@pytest.mark.parametrize("frontend", ["auto", "fx", "export"])
@pytest.mark.parametrize(("where", "name"), [("attribute", "count"), ("buffer", "calls")])
def test_what_a_network_keeps_from_call_to_call_is_refused_if_it_answers_by_it_and_told_if_not(where, name, frontend):
    x = torch.randn(2, 4)
    with pytest.raises(InputError, match=f"each call changes '{name}'"):
        tdcompile.trace(Remembering(where, answers=True).eval(), x, frontend=frontend)
    module = Remembering(where, answers=False).eval()
    program = tdcompile.trace(module, x, frontend=frontend)
    assert name in next(r.text for r in program.history if isinstance(r, Diagnostic) and r.code == "state")
    program.graph(x)
    assert module.count == 0
    assert module.calls == 0
    assert_same(module, program, x)


class FirstSeen(nn.Module):
    """Keeps something of what it is given first: in an attribute, a parameter or a list."""

    def __init__(self, where):
        super().__init__()
        self.where, self.fc, self.scale = where, nn.Linear(4, 4), nn.Parameter(torch.ones(4))
        self.cache, self.seen = None, []
        self.register_buffer("ready", torch.zeros((), dtype=torch.bool))

    def forward(self, x):
        if self.where == "cache":
            if self.cache is None:
                self.cache = x.abs().mean()
            return self.fc(x / self.cache)
        if self.where == "ready":
            if not self.ready:
                self.scale.data.copy_(1 / x.std(0))
                self.ready.fill_(True)
            return self.fc(x * self.scale)
        self.seen.append(1)
        return self.fc(x) + len(self.seen)


@pytest.mark.parametrize("where", ["cache", "ready", "seen"])
def test_what_a_network_keeps_of_its_first_inputs_is_found(where):
    module = FirstSeen(where).eval()
    with pytest.raises(InputError, match=f"each call changes '{where}'"):
        tdcompile.trace(module, torch.randn(4, 4))
    assert module.cache is None
    assert not module.seen
    assert not module.ready
    assert torch.equal(module.scale.data, torch.ones(4))


class Holding(nn.Module):
    """Its hook holds on to it, or it holds on to what it has computed."""

    def __init__(self, hooked):
        super().__init__()
        self.fc, self.hooked, self.features, self.calls = nn.Linear(4, 4), hooked, {}, 0
        if hooked:
            self.fc.register_forward_hook(lambda part, given, y: self.features.update(y=y))

    def forward(self, x):
        self.calls += 1
        y = self.last = self.fc(x)
        return y + self.features["y"] if self.hooked else y


def test_a_network_that_has_run_is_copied_and_its_hooks_write_to_the_copy():
    module, x = Holding(hooked=False).eval(), torch.randn(2, 4)
    last = module(x)
    program = tdcompile.trace(module, x)
    assert module.calls == 1
    assert module.last is last
    assert_same(module, program, x)
    hooked = Holding(hooked=True).eval()
    program = tdcompile.trace(hooked, x)
    assert hooked.features == {}
    assert program.frontend == "export"
    assert_same(hooked, program, torch.randn(5, 4))


class Stale(nn.Module):
    """It reads what a hook kept, before the hooked layer runs: from the call before."""

    def __init__(self):
        super().__init__()
        self.fc, self.kept = nn.Linear(4, 4), []
        self.fc.register_forward_hook(lambda part, given, y: self.kept.append(y))

    def forward(self, x):
        before = self.kept[-1] if self.kept else x
        return self.fc(x) + before


class LostCopy(nn.Module):
    """Its forward calls a module that a copy of it does not hold."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def __deepcopy__(self, memo):
        made = LostCopy()
        made.fc = None
        return made

    def forward(self, x):
        return self.fc(x)


@pytest.mark.parametrize("dynamic_batch", [True, False])
def test_features_of_an_earlier_call_are_never_taken_for_those_of_this_one(dynamic_batch):
    with pytest.raises(InputError, match=r"different outputs for equal inputs|not at a batch of 3"):
        tdcompile.trace(Stale().eval(), torch.randn(2, 4), dynamic_batch=dynamic_batch)


def test_a_network_that_runs_where_its_copy_does_not_is_told():
    with pytest.raises(InputError, match="the network runs and a copy of it does not"):
        tdcompile.trace(LostCopy().eval(), torch.randn(2, 4))


class Queries(nn.Module):
    """It counts its batch by ``len``, which Python makes a number."""

    def __init__(self):
        super().__init__()
        self.fc, self.query = nn.Linear(4, 4), nn.Parameter(torch.randn(1, 3, 4))

    def forward(self, x):
        return self.fc(x).unsqueeze(1) + self.query.repeat(len(x), 1, 1)


def test_a_batch_counted_by_len_stays_open():
    program = tdcompile.trace(Queries().eval(), torch.randn(2, 4))
    assert program.graph(torch.randn(7, 4)).shape == (7, 3, 4)
    assert len(torch.zeros(3)) == 3  # the builtin is back


class Unsteady(nn.Module):
    """Control flow on values, and a count in a buffer."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.fc(x * 2 if float(x.sum()) > 1e9 else x)


def test_the_buffers_of_a_network_that_is_one_leaf_stay_as_they_are():
    module, x = Unsteady().eval(), torch.randn(2, 4)
    program = tdcompile.trace(module, x)
    program.graph(x)
    assert module.calls == 0


class Assorted(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.lstm = nn.Embedding(9, 4), nn.LSTM(4, 6, batch_first=True)
        self.table, self.fc = nn.Parameter(torch.randn(5, 6)), nn.Linear(6, 3)

    def forward(self, ids):
        return self.fc(self.lstm(self.words(ids))[0] + self.table)


@pytest.mark.parametrize("frontend", ["fx", "export"])
def test_weights_of_no_layer_are_left_with_a_reason(frontend):
    program = tdcompile.trace(Assorted(), torch.randint(0, 9, (2, 5)), frontend=frontend)
    assert list(tdcompile.sites(program)) == ["fc"]
    said = [entry.text for entry in program.history if entry.code == "no_layer"]
    assert len(said) == 3
    for name, why in (("words.weight", "lookup"), ("lstm.weight_ih_l0", "recurrent"), ("table", "neither")):
        assert sum(name in reason and why in reason for reason in said) == 1


class Constant(nn.Module):
    """A batch of two, and no other."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x).reshape(2, 4)


def test_a_network_that_fixes_its_batch_is_refused_or_traced_at_that_batch():
    with pytest.raises(InputError, match="--no-dynamic-batch"):
        tdcompile.trace(Constant(), torch.randn(2, 4))
    module = Constant().eval()
    program = tdcompile.trace(module, torch.randn(2, 4), dynamic_batch=False)
    assert not program.dynamic_batch
    assert_same(module, program, torch.randn(2, 4))


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True, **options)

    def forward(self, x, memory=None):
        return self.attention(x, x if memory is None else memory, x if memory is None else memory)[0]


@pytest.mark.parametrize(
    ("options", "memory", "layers"),
    [
        ({}, False, ["attention.in_proj_weight_layer", "attention.out_proj"]),
        ({}, True, ["attention.in_proj_weight_layer", "attention.in_proj_weight_layer1", "attention.out_proj"]),
        (
            {"kdim": 8, "vdim": 8},
            True,
            [*(f"attention.{part}_proj_weight_layer" for part in "qkv"), "attention.out_proj"],
        ),
    ],
)
def test_the_projections_of_attention_are_layers(options, memory, layers):
    torch.manual_seed(0)
    module, x = Attention(**options).eval(), torch.randn(2, 5, 16)
    inputs = {"x": x, "memory": torch.randn(2, 7, options.get("kdim", 16))} if memory else {"x": x}
    program = tdcompile.trace(module, inputs)
    assert program.frontend == "export"
    assert list(tdcompile.sites(program)) == layers
    assert_same(module, program, *inputs.values())


def test_a_transformer_of_torch_is_seen_through_in_spite_of_its_fused_kernels():
    torch.manual_seed(0)
    module = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    program = tdcompile.trace(module, torch.randn(2, 5, 16))
    assert len(tdcompile.sites(program)) == 8
    assert torch.backends.mha.get_fastpath_enabled()
    assert_same(module, program, torch.randn(3, 5, 16))


class Decoding(nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 32, batch_first=True), 1)

    def forward(self, x, memory, mask=None):
        if mask is None:
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.decoder(x, memory, tgt_mask=mask)


@pytest.mark.parametrize("given", [False, True])
def test_a_decoder_of_torch_is_seen_through_and_takes_any_mask(given):
    torch.manual_seed(0)
    module, x, memory = Decoding().eval(), torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    program = tdcompile.trace(module, (x, memory, causal) if given else (x, memory))
    assert program.frontend == "export"
    assert len(tdcompile.sites(program)) == 7
    other = torch.zeros(5, 5)
    other[:, 2] = float("-inf")
    for mask in (causal, other) if given else ():
        assert_same(module, program, x, memory, mask)
    if not given:
        assert_same(module, program, x, memory)


@pytest.mark.parametrize("frontend", ["fx", "export"])
def test_a_transformer_whose_layers_are_rewritten_runs_with_the_fused_kernels_on(frontend):
    torch.manual_seed(0)
    module = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1).eval()
    x = torch.randn(2, 5, 16)
    program = rewritten(tdcompile.trace(module, x, frontend=frontend), "svd")
    assert any(isinstance(part, nn.Sequential) for part in program.graph.modules())
    with torch.no_grad():
        torch.testing.assert_close(program.graph(x), module(x), rtol=1e-4, atol=1e-5)
    assert module.use_nested_tensor


class Kinds(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.b(self.a(x.to(self.a.weight.dtype)).to(dtype=self.b.weight.dtype))


def test_a_layer_whose_kind_of_number_is_read_is_a_layer_still():
    module, x = Kinds().eval(), torch.randn(2, 8)
    program = tdcompile.trace(module, x, frontend="fx")
    assert not any(node.op == "get_attr" for node in program.graph.graph.nodes)
    done = rewritten(program, "svd")
    assert all(isinstance(done.graph.get_submodule(name), nn.Sequential) for name in "ab")
    assert_same(module, done, x)


class CastToHalf(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4).bfloat16()

    def forward(self, x):
        return self.fc(x.to(torch.bfloat16)).float()


def test_half_precision_that_the_networks_own_code_insists_on_is_told():
    with pytest.raises(InputError, match=r"bfloat16.*build it in float32"):
        tdcompile.trace(CastToHalf().eval(), torch.randn(2, 4))


def test_positions_that_fused_kernels_set_to_zero_are_told():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    module, x = nn.TransformerEncoder(layer, 1).eval(), torch.randn(2, 5, 16)
    for mask, told in [(torch.zeros(2, 5, dtype=torch.bool), False), (torch.arange(5).expand(2, 5) > 2, True)]:
        program = tdcompile.trace(module, {"src": x, "src_key_padding_mask": mask})
        assert told == any(isinstance(r, Diagnostic) and r.code == "padding" for r in program.history)
        assert torch.backends.mha.get_fastpath_enabled()
        with torch.no_grad():
            expected = module(x, src_key_padding_mask=mask)
            torch.testing.assert_close(program.graph(x, mask)[~mask], expected[~mask], rtol=1e-4, atol=1e-5)


class Folded(nn.Module):
    """Tokens and frames folded into the batch."""

    def __init__(self):
        super().__init__()
        self.frame, self.token = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 6)

    def forward(self, x):
        batch, frames = x.shape[:2]
        x = self.frame(x.flatten(0, 1)).flatten(2).transpose(1, 2)  # (N·frames, tokens, 4)
        return self.token(x.reshape(-1, 4)).reshape(batch, frames, -1, 6)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_macs_are_those_of_a_sample_whatever_is_folded_into_the_batch(size):
    found = tdcompile.sites(tdcompile.trace(Folded(), torch.randn(size, 5, 3, 4, 4)))
    assert sum(call.macs for call in found["frame"].calls) == 5 * 16 * 3 * 4 * 9
    assert [call.macs for call in found["token"].calls] == [5 * 16 * 4 * 6]


class SequenceFirst(nn.Module):
    """Attention as torch computes it by default: the tokens before the batch."""

    def __init__(self):
        super().__init__()
        self.into, self.attention = nn.Linear(6, 8), nn.MultiheadAttention(8, 2)

    def forward(self, x):
        x = self.into(x.transpose(0, 1))
        return self.attention(x, x, x, need_weights=False)[0].transpose(0, 1)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_macs_are_those_of_a_sample_where_the_batch_is_not_the_first_axis(size):
    found = tdcompile.sites(tdcompile.trace(SequenceFirst().eval(), torch.randn(size, 7, 6)))
    shapes = [(6, 8), (8, 8), (8, 8), (8, 8), (8, 8)]
    assert sum(call.macs for site in found.values() for call in site.calls) == 7 * sum(a * b for a, b in shapes)


class Lost(nn.Module):
    """Works in place on what it is given, and on a value whose result it does not take."""

    def __init__(self):
        super().__init__()
        self.conv, self.cut = nn.Conv2d(3, 4, 3), nn.ReLU6(inplace=True)

    def forward(self, x):
        x -= 0.5
        y = 1000 * self.conv(x)
        self.cut(y)
        y.clamp_(min=1.0)
        return y


@pytest.mark.parametrize("frontend", ["auto", "export"])
def test_work_in_place_is_not_lost_and_leaves_the_example_alone(frontend):
    module, x = Lost().eval(), torch.randn(2, 3, 6, 6)
    before = x.clone()
    program = tdcompile.trace(module, x, frontend=frontend)
    assert program.frontend == "export"
    assert torch.equal(x, before)
    assert list(tdcompile.sites(program)) == ["conv"]
    y = torch.randn(3, 3, 6, 6)
    torch.testing.assert_close(program.graph(y.clone()), module(y.clone()))


def test_a_network_may_call_its_layers_by_keyword_and_without_a_batch():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(6, 5)

        def forward(self, x):
            return self.fc(input=self.first(x[0]).mean(1)[None])

    program = tdcompile.trace(Odd(), torch.randn(2, 3, 8, 8), dynamic_batch=False)
    assert list(tdcompile.sites(program)) == ["fc"]


def test_infinity_is_refused_in_weights_and_allowed_in_masks():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))

        def forward(self, x):
            return (self.fc(x).unsqueeze(1) + self.mask).softmax(-1)

    module = Masked()
    assert list(tdcompile.sites(tdcompile.trace(module, torch.randn(2, 4)))) == ["fc"]
    module.fc.bias.data[0] = -torch.inf
    with pytest.raises(InputError, match=r"fc\.bias"):
        tdcompile.trace(module, torch.randn(2, 4))
