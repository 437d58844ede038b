"""``recalibrate``: the statistics are those of the data, whatever the batch, and nothing else changes."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from tdcompile.data.task import Batch, Samples, Task, Tensors
from tdcompile.errors import InputError
from tdcompile.ir.diagnostics import Diagnostic
from tdcompile.ir.facts import Aspect, Fact, Facts, Shared
from tdcompile.ir.graph_edits import copy_weights
from tdcompile.ir.program import Change, Program
from tdcompile.passes.tune.recalibrate import Recalibrate


def program(module: nn.Module, x: Tensor | None, seed: int = 0) -> Program:
    graph = fx.symbolic_trace(module.eval())
    task = Task(train=None if x is None else Tensors(x))
    return Program(graph, (torch.zeros(2, 3, 4, 4),), graph, task, seed=seed)


def drawn(count: int) -> Tensor:
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(5)) * torch.tensor([1.0, 2.0, 5.0]).view(
        3, 1, 1
    ) + torch.linspace(-3, 3, count).view(-1, 1, 1, 1)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.BatchNorm2d(3),
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(16, 2),
    )


@settings(max_examples=25, deadline=None)
@given(count=st.integers(2, 70), batch=st.integers(2, 80))
def test_statistics_are_those_pooled_over_all_samples(count: int, batch: int) -> None:
    x = drawn(count)
    layer = (
        Recalibrate(samples=count, batch=batch, relative=False, judge=False)
        .run(program(network(), x))
        .graph.get_submodule("0")
    )
    torch.testing.assert_close(layer.running_mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(layer.running_var, x.transpose(0, 1).flatten(1).var(1))


def test_a_layer_sees_its_input_as_the_corrected_layers_before_it_leave_it() -> None:
    x = drawn(32)
    graph = Recalibrate(samples=32, batch=32, relative=False, judge=False).run(program(network(), x)).graph
    seen = graph.get_submodule("1")(graph.get_submodule("0").train()(x)).transpose(0, 1).flatten(1)
    torch.testing.assert_close(graph.get_submodule("2").running_var, seen.var(1))


def test_the_dense_network_keeps_the_statistics_it_was_trained_with() -> None:
    before = program(network(), drawn(40))
    after = Recalibrate().run(before).graph
    for name, buffer in before.dense.named_buffers():
        if name.endswith("num_batches_tracked"):
            continue
        torch.testing.assert_close(after.get_buffer(name), buffer)


def test_what_changed_against_the_dense_network_is_added_to_its_statistics() -> None:
    x = drawn(48)
    dense = program(network(), x)
    dense.dense.get_submodule("2").running_mean.fill_(7.0)
    changed = copy_weights(dense.graph)
    changed.get_submodule("1").weight.data.mul_(2.0)
    changed.get_submodule("1").bias.data.zero_()
    dense.dense.get_submodule("1").bias.data.zero_()
    layer = Recalibrate(judge=False).run(dense.with_(graph=changed)).graph.get_submodule("2")
    pooled = Recalibrate(relative=False, judge=False).run(dense.with_(graph=changed)).graph.get_submodule("2")
    torch.testing.assert_close(layer.running_var, torch.full((4,), 4.0))  # twice the weights, from a variance of 1
    torch.testing.assert_close(layer.running_mean, 7.0 + pooled.running_mean / 2)


def test_weights_modes_and_the_given_program_stay_as_they_were() -> None:
    before = program(network(), drawn(40))
    kept = {name: tensor.clone() for name, tensor in before.graph.state_dict().items()}
    after = Recalibrate().run(before)
    for name, tensor in after.graph.named_parameters():
        assert torch.equal(tensor, kept[name])
    for name, tensor in before.graph.state_dict().items():
        assert torch.equal(tensor, kept[name])
    assert not any(module.training for module in after.graph.modules())
    assert after.graph.get_submodule("0").momentum == 0.1
    assert isinstance(after.history[-1], Change)


def test_only_so_many_samples_are_read_the_same_ones_for_a_seed() -> None:
    x = drawn(64)
    means = [
        Recalibrate(samples=16, relative=False, judge=False)
        .run(program(network(), x, seed))
        .graph.get_submodule("0")
        .running_mean
        for seed in (1, 1, 2)
    ]
    assert torch.equal(means[0], means[1])
    assert not torch.equal(means[0], means[2])


@pytest.mark.parametrize(
    ("calibrate", "samples", "read"), [(16, 2048, 16), (1024, 24, 24), (1024, 2048, 64), (1, 9, 2)]
)
def test_as_many_samples_are_read_as_calibration_reads(calibrate: int, samples: int, read: int) -> None:
    made = program(network(), drawn(64))
    made = made.with_(task=Task(made.task.train, calibrate=calibrate))
    told = Recalibrate(samples=samples, judge=False).run(made).history[-1]
    assert isinstance(told, Change)
    assert told.what == f"2 batch-norm layers on {read} samples"


def test_without_samples_to_calibrate_nothing_changes() -> None:
    made = program(network(), drawn(64))
    after = Recalibrate().run(made.with_(task=Task(made.task.train, calibrate=0)))
    assert isinstance(after.history[-1], Diagnostic)
    assert after.history[-1].code == "no_data"


@pytest.mark.parametrize(
    ("module", "x", "code"),
    [
        (network(), None, "no_data"),
        (network(), torch.zeros(1, 3, 4, 4), "no_data"),
        (nn.Sequential(nn.Conv2d(3, 2, 1)), torch.zeros(8, 3, 4, 4), "no_batchnorm"),
        (nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)), torch.zeros(8, 3, 4, 4), "no_batchnorm"),
    ],
)
def test_with_nothing_to_do_nothing_changes_and_history_says_why(
    module: nn.Module, x: Tensor | None, code: str
) -> None:
    before = program(module, x)
    after = Recalibrate().run(before)
    told = after.history[-1]
    assert isinstance(told, Diagnostic)
    assert (told.layer, told.code) == (None, code)
    for name, tensor in after.graph.state_dict().items():
        assert torch.equal(tensor, before.graph.state_dict()[name])


def test_data_that_is_not_finite_is_an_error_that_names_the_layer() -> None:
    x = drawn(8)
    x[3, 1, 2, 2] = torch.inf
    with pytest.raises(InputError, match="'0'"):
        Recalibrate().run(program(network(), x))


@pytest.mark.parametrize("options", [{"samples": "1"}, {"batch": "1"}, {"batch": "0"}])
def test_a_batch_without_a_variance_is_refused(options: dict[str, str]) -> None:
    with pytest.raises(InputError, match="at least 2"):
        Recalibrate.from_options(options)


def test_facts_read_from_statistics_are_dropped_and_others_are_not() -> None:
    class OfWeights(Fact):
        reads = frozenset({Aspect.WEIGHTS})

    class OfStatistics(Fact):
        reads = frozenset({Aspect.STATISTICS})

    before = program(network(), drawn(8)).with_(facts=Facts(OfWeights(), OfStatistics()))
    facts = Recalibrate().run(before).facts
    assert OfWeights in facts
    assert OfStatistics not in facts


def test_statistics_are_undone_where_they_bring_the_output_no_nearer_to_the_dense_network() -> None:
    """Pooled statistics of skewed samples replace those of a network whose weights did not change: all are worse."""
    before = program(network(), drawn(64))
    undone = Recalibrate(relative=False).run(before)
    for name in ("0", "2"):
        kept = undone.graph.get_submodule(name)
        torch.testing.assert_close(kept.running_mean, before.graph.get_submodule(name).running_mean)
    (told,) = [entry for entry in undone.history if isinstance(entry, Change)]
    assert told.what.endswith("2 undone, because held-out error did not fall: 0, 2")
    assert not torch.allclose(
        Recalibrate(relative=False, judge=False).run(before).graph.get_submodule("0").running_mean,
        before.graph.get_submodule("0").running_mean,
    )


def test_statistics_are_kept_where_the_factors_have_shifted_the_input() -> None:
    dense = program(network(), drawn(64))
    changed = copy_weights(dense.graph)
    conv = changed.get_submodule("1")
    with torch.no_grad():
        conv.weight.mul_(1.5)
    after = Recalibrate().run(dense.with_(graph=changed))
    assert not torch.allclose(
        after.graph.get_submodule("2").running_var, dense.graph.get_submodule("2").running_var, rtol=0.05
    )


def test_the_time_of_judging_grows_with_the_number_of_layers() -> None:
    """A value that is dropped and computed again at each layer would double the work with every block."""
    torch.manual_seed(0)
    x = torch.randn(40, 4, 4, 4)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(x + self.norm(self.conv(x)))

    calls = []
    made = program(nn.Sequential(*[Block() for _ in range(12)]), None)
    made = made.with_(inputs=(x[:2],), task=Task(Tensors(x)))
    graph = copy_weights(made.graph)
    for module in graph.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda *_: calls.append(1))
    Recalibrate(samples=16, batch=16).run(made.with_(graph=graph))
    assert len(calls) < 12 * 10


class Noisy(Tensors):
    """Samples that differ each time they are read."""

    def batch(self, indices: Sequence[int]) -> Batch:
        found = super().batch(indices)
        return found._replace(inputs=tuple(x + 0.1 * torch.randn(x.shape) for x in found.inputs))


def test_plans_share_what_was_pooled_in_the_dense_network(monkeypatch: pytest.MonkeyPatch) -> None:
    networks: list[int] = []
    pooled = Recalibrate._pooled

    def counted(self: Recalibrate, graphs: Sequence[fx.GraphModule], samples: Samples) -> list[Any]:
        networks.append(len(graphs))
        return pooled(self, graphs, samples)

    monkeypatch.setattr(Recalibrate, "_pooled", counted)
    before = program(network(), drawn(48))
    changed = copy_weights(before.graph)
    changed.get_submodule("1").weight.data.mul_(2.0)
    before.facts.derived(Shared, Shared)  # as a search does
    shared = before.facts.after(frozenset({Aspect.WEIGHTS}))
    plans = [before.with_(graph=graph, facts=shared) for graph in (before.graph, changed)]
    found = [Recalibrate().run(plan).graph.state_dict() for plan in plans]
    assert networks == [2, 1]
    alone = [Recalibrate().run(plan.with_(facts=Facts())).graph.state_dict() for plan in plans]
    assert networks == [2, 1, 2, 2]
    for one, other in zip(found, alone, strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    augmented = Task(Noisy(drawn(48)))
    for _ in range(2):  # both networks have to see the same noise
        Recalibrate().run(plans[1].with_(task=augmented, facts=plans[1].facts))
    assert networks[4:] == [2, 2]
    networks[4:] = []
    Recalibrate().run(plans[1].with_(seed=3))  # another seed draws other samples
    assert networks[4:] == [2]
