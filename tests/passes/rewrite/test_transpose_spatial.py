"""``transpose-spatial``: k x 1 becomes 1 x k, the function stays, and what reads an axis of its own is outside."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tdcompile
from tdcompile.compiler import prepare, resolve, rewrites_of
from tdcompile.core.passes import RewritePass, Rewritten
from tdcompile.core.plan import RankPlan
from tdcompile.errors import InputError
from tdcompile.ir.conv_modules import TransposedConv
from tdcompile.ir.modules import outputs_of
from tdcompile.ir.program import Change

STEPS = "transpose-spatial,calibrate,score,propose,choose,factorize,fold-batchnorm,drop-dead"


def trained(network):
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.weight)
    return network.eval()


def transposed(network, x, frontend="auto", **options):
    """Return the program after the pass; the outputs must be those of the network."""
    program = tdcompile.trace(trained(network), (x,), frontend=frontend, **options)
    after = tdcompile.Pipeline.parse("transpose-spatial").run(program)
    torch.testing.assert_close(outputs_of(after.graph, (x,)), outputs_of(network, (x,)), rtol=1e-4, atol=1e-5)
    return after


def kernels(program):
    kinds = (nn.Conv2d, TransposedConv)
    return [tuple(module.kernel_size) for module in program.graph.modules() if isinstance(module, kinds)]


def borders(program):
    return sum(node.target is torch.transpose for node in program.graph.graph.nodes)


def notes(program):
    return [entry.text for entry in program.history if not isinstance(entry, Change)]


class Random(nn.Module):
    """A random network over maps of width 1, which ends by reading absolute axes."""

    def __init__(self, draw):
        super().__init__()
        self.draw = [draw.choice(["pad", "pool", "avg", "add", "cat", "scale", "none"]) for _ in range(4)]
        self.convs, channels = nn.ModuleList(), 4
        for what in self.draw:
            taps, dilation = draw.choice([1, 2, 3, 5]), draw.choice([1, 2])
            padding = draw.choice(["same", (draw.randint(0, 3), 0), "valid"])
            stride = 1 if padding == "same" else draw.choice([1, 2])
            groups = draw.choice([1, 2, 4])
            mode = draw.choice(["zeros", "replicate"]) if isinstance(padding, tuple) else "zeros"
            conv = nn.Conv2d(
                *(channels, 8, (taps, 1), (stride, 1), padding, (dilation, 1), groups),
                bias=draw.random() < 0.5,
                padding_mode=mode,
            )
            self.convs.append(nn.Sequential(conv, nn.BatchNorm2d(8), draw.choice([nn.ReLU(), nn.PReLU(8), nn.GELU()])))
            channels = 16 if what == "cat" else 8
        self.last = nn.Conv2d(channels, 4, (3, 1))
        self.head = nn.LazyLinear(3)

    def forward(self, x):
        for what, conv in zip(self.draw, self.convs, strict=True):
            x = conv(x)
            if what == "pad":
                x = F.pad(x, (0, 0, 1, 2))
            elif what == "pool":
                x = F.max_pool2d(x, (2, 1), (2, 1), ceil_mode=True)
            elif what == "avg":
                x = F.avg_pool2d(x, kernel_size=(3, 1), stride=1, padding=(1, 0))
            elif what == "add":
                x = x + 0.5 * torch.sigmoid(x)
            elif what == "cat":
                x = torch.cat([x, x.relu()], 1)
            elif what == "scale":
                x = x * x.mean((2, 3), keepdim=True)
        return self.head(self.last(x).permute(0, 2, 1, 3).flatten(1))


@pytest.mark.parametrize("seed", range(12))
def test_random_networks_keep_their_outputs(seed):
    torch.manual_seed(seed)
    network, x = Random(random.Random(seed)).eval(), torch.randn(2, 4, 96, 1)
    network(x)  # the lazy layer learns its size
    after = transposed(network, x)
    assert all(height == 1 for height, _ in kernels(after))
    assert any(width > 1 for _, width in kernels(after))
    assert after.dense is after.graph


def narrow(*modules):
    return nn.Sequential(*modules, nn.Flatten(), nn.LazyLinear(3))


@pytest.mark.parametrize(
    ("modules", "count"),
    [
        ((nn.Conv2d(4, 6, (5, 1), (2, 1), (2, 0)), nn.ReLU(inplace=True), nn.MaxPool2d((2, 1))), 2),
        ((nn.ZeroPad2d((0, 0, 3, 1)), nn.Conv2d(4, 6, (5, 1)), nn.AdaptiveAvgPool2d((4, 1))), 2),
        ((nn.ReplicationPad2d((0, 0, 3, 1)), nn.Conv2d(4, 6, (4, 1), dilation=(3, 1)), nn.GroupNorm(2, 6)), 2),
        ((nn.Conv2d(4, 6, (3, 1)), nn.ConvTranspose2d(6, 5, (4, 1), (2, 1), (1, 0), (1, 0)), nn.Tanh()), 2),
        ((nn.Conv2d(4, 6, (3, 1), padding=(2, 0), padding_mode="reflect"), nn.AvgPool2d((3, 1), 1)), 2),
    ],
)
@pytest.mark.parametrize("frontend", ["fx", "export"])
def test_settings_of_every_kind_are_exchanged(modules, count, frontend):
    network, x = narrow(*modules), torch.randn(2, 4, 40, 1)
    network.eval()(x)
    after = transposed(network, x, frontend)
    assert all(height == 1 for height, _ in kernels(after))
    assert borders(after) == count


def test_a_region_ends_at_a_layer_that_reads_the_width():
    network = narrow(nn.Conv2d(4, 4, (3, 1)), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, (3, 1)))
    x = torch.randn(2, 4, 20, 1)
    network.eval()(x)
    after = transposed(network, x)
    assert kernels(after) == [(1, 3), (3, 3), (1, 3)]
    assert borders(after) == 4


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (nn.Sequential(nn.Conv2d(4, 4, (3, 1)), nn.ReLU()), (2, 4, 9, 9)),
        (nn.Sequential(nn.Conv2d(4, 4, (1, 3)), nn.ReLU()), (2, 4, 1, 9)),
        (nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.MaxPool2d((2, 1))), (2, 4, 9, 1)),
        (nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, (3, 1), padding=(1, 1))), (2, 4, 9, 1)),
    ],
)
def test_other_networks_stay_as_they_are(network, shape):
    program = tdcompile.trace(network.eval(), (torch.randn(shape),))
    after = tdcompile.Pipeline.parse("transpose-spatial").run(program)
    assert after.graph is program.graph
    assert not after.history


class Shared(nn.Module):
    """A layer and a pool with two calls; in ``wide`` the second call of the layer reads a wider map."""

    def __init__(self, wide):
        super().__init__()
        self.conv, self.other, self.pool, self.wide = (
            nn.Conv2d(4, 4, (3, 1)),
            nn.Conv2d(4, 4, (3, 1)),
            nn.MaxPool2d((2, 1)),
            wide,
        )

    def forward(self, x):
        y = self.pool(self.other(x))
        z = x.expand(-1, -1, -1, 5) if self.wide else x
        return y.sum((1, 2, 3)) + self.conv(x).sum((1, 2, 3)) + self.pool(self.conv(z)).sum((1, 2, 3))


def test_a_module_is_exchanged_for_all_its_calls_or_for_none():
    x = torch.randn(2, 4, 20, 1)
    assert kernels(transposed(Shared(False), x)) == [(1, 3), (1, 3)]
    after = transposed(Shared(True), x)
    assert (after.graph.conv.kernel_size, after.graph.other.kernel_size) == ((3, 1), (1, 3))
    assert after.graph.pool.kernel_size == (2, 1)
    assert "'conv' keeps its k x 1 kernel: another call of it reads a wider map" in notes(after)


def test_layers_that_hold_more_than_a_weight_stay_and_say_why():
    network = nn.Sequential(nn.Conv2d(4, 4, (3, 1)), nn.Conv2d(4, 4, (3, 1)), nn.Conv2d(4, 4, (3, 1), padding=(1, 0)))
    network[0].weight = network[1].weight
    after = transposed(network, torch.randn(2, 4, 20, 1))
    assert kernels(after) == [(3, 1), (3, 1), (1, 3)]
    assert "'0' keeps its k x 1 kernel: its weight also belongs to 1" in notes(after)


def test_values_that_leave_the_region_have_their_axes():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, (3, 1))

        def forward(self, x):
            y = self.conv(x).relu_()
            return y, y.view(len(x), 4, -1), y * y.shape[2], x

    after = transposed(Net(), torch.randn(2, 4, 20, 1))
    assert kernels(after) == [(1, 3)]


def test_only_the_dense_network_itself_is_rewritten_with_the_graph():
    network = nn.Sequential(nn.Conv2d(4, 8, (5, 1)), nn.BatchNorm2d(8), nn.ReLU())
    program = tdcompile.trace(trained(network), (torch.randn(2, 4, 20, 1),))
    after = tdcompile.Pipeline.parse("fold-batchnorm,transpose-spatial").run(program)
    assert after.dense is program.dense
    assert kernels(after) == [(1, 5)]


class Wrong(RewritePass):
    """Claims to be exact and is not; it has no name, so that it is not listed."""

    exact = True

    def rewrite(self, graph, program):
        graph.get_submodule("0").bias = nn.Parameter(torch.ones(4))
        return Rewritten(graph, [Change("0", "wrong", "other bias")])


def test_an_exact_pass_that_changes_the_function_is_not_used():
    program = tdcompile.trace(nn.Sequential(nn.Conv2d(4, 4, (3, 1))).eval(), (torch.randn(2, 4, 20, 1),))
    after = Wrong().run(program)
    assert (after.graph, after.dense) == (program.graph, program.dense)
    assert after.history[-1].code == "not_exact"
    assert "of the largest" in after.history[-1].text


def test_it_is_on_under_a_latency_budget_alone():
    network, x = nn.Sequential(nn.Conv2d(4, 8, (5, 1)), nn.Conv2d(8, 8, (5, 1))).eval(), torch.randn(1, 4, 40, 1)
    for budget, kernel in (({"latency": 0.5}, (1, 5)), ({"macs": 0.5}, (5, 1))):
        recipe = resolve(None, {"budget": budget})
        program = prepare(network, x, None, recipe)
        assert ("transpose-spatial" in str(recipe.steps())) == ("latency" in budget)
        assert kernels(program) == [kernel, kernel]
        assert program.dense is program.graph


def test_a_plan_rewrites_the_network_as_it_was_when_the_plan_was_made():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(4, 24, (9, 1)), nn.ReLU(), nn.Conv2d(24, 24, (9, 1)), nn.ReLU()).eval()
    x = torch.randn(1, 4, 40, 1)
    made = tdcompile.compile(network, x, pipeline=STEPS, budget={"macs": 0.5})
    assert made.plan.rewrites == ("transpose-spatial",)
    assert any("became 1 x k" in note for note in made.report.notes)
    assert RankPlan.from_json(made.plan.to_json()).rewrites == made.plan.rewrites
    program = prepare(network, x, None, resolve(None, {"plan": made.plan}))
    assert kernels(program) == [(1, 9), (1, 9)]
    assert rewrites_of(program) == made.plan.rewrites
    assert program.facts[RankPlan].selector == made.plan.selector  # nothing counts as edited


def test_a_plan_that_rewrites_by_a_pass_that_is_not_exact_is_refused():
    network, x = nn.Sequential(nn.Conv2d(4, 8, (5, 1))).eval(), torch.randn(1, 4, 40, 1)
    plan = '{"layers": {}, "rewrites": ["factorize"]}'
    with pytest.raises(InputError, match="rewrites the network by 'factorize', which does not keep its function"):
        prepare(network, x, None, resolve(None, {"plan": plan}))
