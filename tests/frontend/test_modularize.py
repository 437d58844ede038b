"""Functional layers as modules: which weights count as constant, which names the modules get, what is left alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tdcompile
from tdcompile.core.plan import Candidates
from tdcompile.ir.modules import outputs_of


class Kernels(nn.Module):
    """Every functional layer, on a weight of its own."""

    def __init__(self):
        super().__init__()
        for name, shape in (
            *(("line", (4, 3, 3)), ("plane", (4, 4, 3, 3)), ("space", (4, 4, 2, 2, 2))),
            *(("up1", (4, 2, 3)), ("up2", (4, 2, 3, 3)), ("up3", (4, 2, 2, 2, 2))),
            *(("matrix", (5, 4)), ("turned", (5, 6)), ("shift", (6,)), ("right", (6, 3))),
        ):
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def forward(self, x):
        x = F.conv1d(x, self.line, padding="same")
        x = F.conv_transpose1d(x, self.up1, stride=2, groups=2)
        x = F.conv2d(x[:, :, None, :], self.plane, None, 1, 1)
        x = F.conv_transpose2d(x, self.up2, None, (1, 2), groups=2)
        x = F.conv3d(x[:, :, None], self.space, padding=(1, 0, 1), dilation=1)
        x = F.conv_transpose3d(x, self.up3, groups=2)
        x = F.linear(x.mean((2, 3, 4)), self.matrix)
        return torch.addmm(self.shift, x, self.turned) @ self.right


@pytest.mark.parametrize("frontend", ["fx", "export"])
def test_every_functional_layer_is_found(frontend):
    torch.manual_seed(0)
    module, x = Kernels().eval(), torch.randn(2, 3, 9)
    program = tdcompile.trace(module, x, frontend=frontend)
    found = tdcompile.sites(program)
    names = ["line", "up1", "plane", "up2", "space", "up3", "matrix", "turned", "right"]
    assert list(found) == [f"{name}_layer" for name in names]
    assert [found[f"up{axes}_layer"].layer.transposed for axes in (1, 2, 3)] == [True] * 3
    torch.testing.assert_close(outputs_of(program.graph, (x,)), outputs_of(module, (x,)), rtol=1e-4, atol=1e-5)


class Custom(nn.Module):
    """A linear layer of one's own."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(6))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Conv1D(nn.Module):
    """A linear layer as GPT-2 has it: the weight the other way round."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(8))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


@pytest.mark.parametrize("frontend", ["fx", "export"])
def test_a_layer_of_ones_own_keeps_its_name(frontend):
    module = nn.Sequential(Custom(), nn.ReLU(), Conv1D()).eval()
    program = tdcompile.trace(module, torch.randn(2, 4), frontend=frontend)
    found = tdcompile.sites(program)
    assert list(found) == ["0", "2"]
    assert found["0"].module.weight is module[0].weight
    assert torch.equal(found["2"].weight, module[2].weight.T)


class Shared(nn.Module):
    """A weight that something else reads too: a copy of what is computed from it would come apart in tuning."""

    def __init__(self, parts):
        super().__init__()
        self.parts = parts
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        if self.parts:
            first, second = self.weight.chunk(2)
            return F.linear(x, first) + F.linear(x, second)
        return F.linear(x, self.weight.t()) + F.linear(x, self.weight)


@pytest.mark.parametrize("frontend", ["fx", "export"])
def test_disjoint_parts_of_a_weight_are_layers_and_overlapping_ones_stay_tied(frontend):
    x = torch.randn(2, 8)
    parts = tdcompile.trace(Shared(parts=True), x, frontend=frontend)
    assert [site.layer.out_channels for site in tdcompile.sites(parts).values()] == [4, 4]
    whole = tdcompile.trace(Shared(parts=False), x, frontend=frontend)
    (site,) = tdcompile.sites(whole).values()  # the one that reads the weight as it is
    assert site.module.weight is whole.graph.get_parameter("weight")


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 8), nn.Linear(8, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.embedding(ids))


@pytest.mark.parametrize("frontend", ["fx", "export"])
def test_a_weight_tied_to_an_embedding_stays_tied(frontend):
    module = Tied().eval()
    program = tdcompile.trace(module, torch.randint(0, 9, (2, 5)), frontend=frontend)
    (site,) = tdcompile.sites(program).values()
    assert site.module.weight is module.embedding.weight
    made = tdcompile.Pipeline.parse("score,propose").run(program.with_(budget=tdcompile.Budget(macs=0.9)))
    (reason,) = made.facts[Candidates].reasons.values()
    assert reason.code == "tied_parameter"


class Computed(nn.Module):
    """Weights that an input goes into, or that are no floats, are nobody's layer."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return F.linear(x, self.weight * x.mean())


@pytest.mark.parametrize("frontend", ["fx", "export"])
def test_a_weight_that_depends_on_the_input_is_left_alone(frontend):
    program = tdcompile.trace(Computed(), torch.randn(2, 4), frontend=frontend)
    assert not tdcompile.sites(program)


class Adapted(nn.Module):
    """A weight with a low-rank correction, as adapters leave it."""

    def __init__(self):
        super().__init__()
        self.base = nn.Parameter(torch.randn(8, 8))
        self.down, self.up = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(8, 2))

    def forward(self, x):
        return F.linear(x, self.base + self.up @ self.down)


class Turned(nn.Module):
    """An autoencoder of one matrix: in another order it would come apart in tuning."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(8, 4))

    def forward(self, x):
        return torch.relu(x @ self.matrix) @ self.matrix.t()


class Normed(nn.Module):
    """A weight that is read beside its layer too."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(x) * self.fc.weight.norm(dim=1)


@pytest.mark.parametrize("frontend", ["fx", "export"])
@pytest.mark.parametrize(
    ("kind", "layers", "tied"), [(Adapted, ["base_layer"], []), (Turned, [], []), (Normed, ["fc"], ["fc"])]
)
def test_computed_and_shared_weights(kind, layers, tied, frontend):
    torch.manual_seed(0)
    module, x = kind().eval(), torch.randn(2, 8)
    before = list(module.state_dict())
    program = tdcompile.trace(module, x, frontend=frontend)
    assert list(tdcompile.sites(program)) == layers
    assert list(module.state_dict()) == before
    made = tdcompile.Pipeline.parse("score,propose").run(program.with_(budget=tdcompile.Budget(macs=0.9)))
    refused = [name for name, r in made.facts[Candidates].reasons.items() if r.code == "tied_parameter"]
    assert refused == tied
    torch.testing.assert_close(outputs_of(program.graph, (x,)), outputs_of(module, (x,)), rtol=1e-4, atol=1e-5)


def test_what_is_computed_once_is_counted_once():
    module = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    program = tdcompile.trace(module, {"query": x, "key": x.flip(1), "value": x.flip(1)})
    assert sum(p.numel() for p in program.graph.parameters()) == sum(p.numel() for p in module.parameters())


class Head(nn.Module):
    """A tied head with a bias of its own, and two layers of one weight."""

    def __init__(self):
        super().__init__()
        self.words, self.first, self.second = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.shift = nn.Parameter(torch.randn(9))

    def forward(self, ids):
        return F.linear(self.second(self.first(self.words(ids))), self.words.weight, self.shift)


@pytest.mark.parametrize("frontend", ["fx", "export"])
def test_tied_layers_keep_the_network_as_it_is(frontend):
    module, ids = Head().eval(), torch.randint(0, 9, (2, 5))
    before = list(module.state_dict())
    program = tdcompile.trace(module, ids, frontend=frontend)
    assert list(module.state_dict()) == before
    made = tdcompile.Pipeline.parse("score,propose").run(program.with_(budget=tdcompile.Budget(macs=0.9)))
    assert {r.code for r in made.facts[Candidates].reasons.values()} == {"tied_parameter"}
    torch.testing.assert_close(outputs_of(program.graph, (ids,)), outputs_of(module, (ids,)), rtol=1e-4, atol=1e-5)


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.line, self.plane, self.cube = nn.Conv1d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Conv3d(3, 8, 3)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        line = F.dropout1d(self.line(x.mean((2, 3))), 0.1, training=self.training).mean(2)
        plane = F.dropout2d(self.plane(x.mean(2)), 0.2, training=self.training).mean((2, 3))
        cube = F.dropout3d(self.cube(x), 0.3, training=self.training).mean((2, 3, 4))
        plane = F.alpha_dropout(plane, p=0.4, training=self.training)
        line = F.dropout(line + 0.0, 0.5, self.training, inplace=True)
        return self.fc(torch.dropout(line + plane + cube, 0.6, self.training))


@pytest.mark.parametrize("frontend", ["fx", "export"])
def test_functional_dropout_comes_back_with_training(frontend):
    torch.manual_seed(0)
    module, x = Dropping().eval(), torch.randn(4, 3, 6, 6, 6)
    graph = tdcompile.trace(module, x, frontend=frontend).graph
    drops = {(type(part), part.p) for part in graph.modules() if isinstance(part, nn.modules.dropout._DropoutNd)}
    kinds = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.Dropout, nn.Dropout)
    assert drops == set(zip(kinds, (0.1, 0.2, 0.3, 0.4, 0.5, 0.6), strict=True))
    assert torch.equal(graph(x), module(x))
    assert not torch.equal(graph.train()(x), graph(x))
