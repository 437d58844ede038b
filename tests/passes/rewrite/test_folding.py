"""``fold-batchnorm`` and ``drop-dead``: the function stays, what must not be folded is not."""

import pytest
import torch
from torch import nn

import tdcompile
from tdcompile.ir.modules import outputs_of


def trained(*modules):
    """A network whose batch norms have statistics and weights of their own."""
    network = nn.Sequential(*modules)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return network.eval()


def folded(network, x):
    program = tdcompile.trace(network, (x,))
    after = tdcompile.Pipeline.parse("fold-batchnorm,drop-dead").run(program)
    torch.testing.assert_close(outputs_of(after.graph, (x,)), outputs_of(network, (x,)), rtol=1e-4, atol=1e-5)
    return after, sum(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in after.graph.modules())


@pytest.mark.parametrize(
    ("modules", "shape"),
    [
        ((nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU()), (2, 3, 6, 6)),
        ((nn.Conv2d(4, 8, 3, groups=2, padding=1), nn.BatchNorm2d(8)), (2, 4, 6, 6)),
        ((nn.Conv1d(3, 5, 3), nn.BatchNorm1d(5)), (2, 3, 9)),
        ((nn.Linear(6, 4), nn.BatchNorm1d(4)), (3, 6)),
        ((nn.Linear(6, 4), nn.BatchNorm1d(4, affine=False)), (3, 6)),
        ((nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5, affine=False)), (2, 3, 6, 6)),
    ],
)
def test_batch_norm_goes_into_the_layer_before_it(modules, shape):
    after, left = folded(trained(*modules), torch.randn(shape))
    assert left == 0
    assert any("took in" in change.what for change in after.history)


class Squared(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) ** 2 if x.sum() > -1e9 else x


def test_a_layer_that_only_derives_from_a_convolution_takes_in_nothing():
    x = torch.randn(2, 3, 6, 6)
    network = trained(Squared(3, 4, 3), nn.BatchNorm2d(4))
    program = tdcompile.trace(network, (x,), frontend="fx")
    assert type(program.graph.get_submodule("0")) is Squared
    after = tdcompile.Pipeline.parse("fold-batchnorm,drop-dead").run(program)
    torch.testing.assert_close(after.graph(x), network(x))
    assert isinstance(after.graph.get_submodule("1"), nn.BatchNorm2d)


@pytest.mark.parametrize(
    ("modules", "shape"),
    [
        ((nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)), (2, 3, 6, 6)),  # before the layer
        ((nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)), (2, 3, 6, 6)),  # something in between
        ((nn.Linear(6, 6), nn.BatchNorm1d(5)), (2, 5, 6)),  # over tokens: axis 1 is not the features
    ],
)
def test_batch_norm_stays_where_it_is_not_the_layers_own(modules, shape):
    _, left = folded(trained(*modules), torch.randn(shape))
    assert left == 1


@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_a_hook_changes_is_neither_folded_nor_dropped(place):
    network = trained(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout())
    network[place].register_forward_hook(lambda module, inputs, output: 2 * output + 1)
    after, left = folded(network, torch.randn(2, 3, 6, 6))
    assert left == (place < 2)
    assert any(isinstance(m, nn.Dropout) for m in after.graph.modules()) == (place == 2)


class Read(nn.Module):
    def __init__(self, shared):
        super().__init__()
        self.conv, self.norm, self.shared = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), shared

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + (self.conv(y) if self.shared else y)


@pytest.mark.parametrize("shared", [False, True])
def test_a_layer_that_is_read_or_called_elsewhere_is_not_folded(shared):
    network = Read(shared)
    nn.init.uniform_(network.norm.running_var, 0.5, 2.0)
    _, left = folded(network.eval(), torch.randn(2, 4, 6, 6))
    assert left == 1


def test_dropout_and_identities_go_and_the_given_program_stays():
    network = trained(nn.Dropout(0.5), nn.Conv2d(3, 4, 3), nn.Identity(), nn.BatchNorm2d(4), nn.Dropout2d(0.1))
    program = tdcompile.trace(network, (torch.randn(2, 3, 6, 6),))
    before = program.graph.code
    after = tdcompile.Pipeline.parse("drop-dead,fold-batchnorm").run(program)
    assert [n.target for n in after.graph.graph.nodes if n.op == "call_module"] == ["1"]
    assert program.graph.code == before
    assert set(dict(after.graph.named_parameters())) == {"1.weight", "1.bias"}
