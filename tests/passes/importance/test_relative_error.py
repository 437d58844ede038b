import pytest
import torch

from tdcompile.data.task import Task
from tdcompile.errors import InputError
from tdcompile.passes.importance.relative_error import RelativeError


def test_a_layer_of_half_rank_is_worth_least_and_never_nothing(program):
    with torch.no_grad():
        weight = program.graph.stem.weight
        weight.copy_(torch.randn(8, 2) @ torch.randn(2, 27).reshape(2, -1) if weight.dim() == 2 else _rank(weight, 2))
    scores = RelativeError().score(program)
    assert min(scores, key=scores.get) == "stem"
    assert scores["stem"] > 0
    assert sum(scores.values()) / len(scores) == pytest.approx(1.0)


def _rank(weight, rank):
    flat = weight.flatten(1)
    return (torch.randn(flat.shape[0], rank) @ torch.randn(rank, flat.shape[1])).reshape(weight.shape)


def test_the_probe_is_the_error_of_the_best_half_rank_matrix(program):
    scores = RelativeError().score(program)

    def error(weight):
        values = torch.linalg.svdvals(weight.detach().double().flatten(1))
        return float((values[len(values) // 2 :].square().sum() / values.square().sum()).sqrt())

    graph = program.graph
    expected = error(graph.shared.weight) / error(graph.head.weight)  # a tall and a wide one: 8 x 72, 5 x 8
    assert scores["shared"] / scores["head"] == pytest.approx(expected, rel=1e-6)


def test_it_needs_no_data_and_touches_nothing(program):
    before = [p.clone() for p in program.graph.parameters()]
    RelativeError().score(program.with_(task=Task()))
    assert all(torch.equal(a, b) for a, b in zip(before, program.graph.parameters(), strict=True))


def test_scaling_a_weight_changes_nothing(program):
    before = RelativeError().score(program)
    with torch.no_grad():
        program.graph.shared.weight.mul_(1000)
    assert RelativeError().score(program) == pytest.approx(before, rel=1e-5)


def test_weights_of_zero_leave_all_scores_equal(program):
    with torch.no_grad():
        for site in ("stem", "shared", "dead", "head"):
            program.graph.get_submodule(site).weight.zero_()
    assert set(RelativeError().score(program).values()) == {1.0}


def test_a_nan_is_named(program):
    with torch.no_grad():
        program.graph.shared.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match="'shared'"):
        RelativeError().score(program)
