"""``Stream``: values are those of a run from the start, whatever was asked for before and has changed since."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from tdcompile.backend.quantized_form import QuantizedForm
from tdcompile.passes.tune._node_values import Stream, follows, rounded


class Block(nn.Module):
    """Shortcuts, a branch, in-place activations and in-place addition."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        z = self.act(self.b(y))
        z += y
        w = torch.relu_(self.c(z))
        v = w + z
        u = v.mul_(2)
        return (u + v + z) * x.sum()  # v is read again after it was changed


def graph() -> fx.GraphModule:
    torch.manual_seed(0)
    return fx.symbolic_trace(Block().eval())


def from_the_start(module: fx.GraphModule, node: fx.Node, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    kept = {}

    class Keep(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            kept[n] = value.clone() if isinstance(value, torch.Tensor) else value
            return value

    with torch.no_grad():
        Keep(module).run(*inputs)
    return kept[node]


BATCHES = [(torch.randn(3, 4, generator=torch.Generator().manual_seed(i)),) for i in range(2)]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 12), st.sampled_from(["", "a", "b", "c"])), min_size=1, max_size=8))
def test_any_order_of_questions_and_changes_gives_what_a_whole_run_gives(steps: list[tuple[int, str]]) -> None:
    module = graph()
    nodes = [node for node in module.graph.nodes if node.op != "output"]
    stream = Stream(module, BATCHES)
    for place, changed in steps:
        if changed:
            with torch.no_grad():
                module.get_submodule(changed).weight.mul_(-1.5)
            stream.changed([node for node in nodes if node.target == changed])
        node = nodes[place % len(nodes)]
        for value, batch in zip(stream.values(node), BATCHES, strict=True):
            assert isinstance(value, torch.Tensor)
            torch.testing.assert_close(value, from_the_start(module, node, batch))


def test_without_being_told_of_a_change_values_are_the_old_ones() -> None:
    module = graph()
    stream = Stream(module, BATCHES)
    node = next(node for node in module.graph.nodes if node.target == "a")
    old = [value.clone() for value in stream.values(node)]
    with torch.no_grad():
        module.a.weight.zero_()
    assert all(torch.equal(*pair) for pair in zip(stream.values(node), old, strict=True))
    stream.changed([node])
    assert all(torch.equal(value, module.a.bias.expand(3, 4)) for value in stream.values(node))


class Viewed(nn.Module):
    """A value that is changed through a view of it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        z = y.view(-1).mul_(2)
        return y.sum(1) + z.sum()


def test_what_cannot_be_followed_is_known() -> None:
    assert follows(graph(), BATCHES[0])
    assert not follows(fx.symbolic_trace(Viewed()), BATCHES[0])


def test_what_nobody_reads_any_more_is_dropped() -> None:
    module = graph()
    stream = Stream(module, BATCHES)
    nodes = list(module.graph.nodes)
    stream.values(nodes[-2])
    held = set(stream._values)
    assert nodes[-2] in held
    assert not {node for node in held if node.op == "call_module" and node.target in ("a", "b", "c")}


class Masked(nn.Module):
    """A mask and indices as outputs, and a value that is changed through a view, or not."""

    def __init__(self, *, through_a_view: bool) -> None:
        super().__init__()
        self.a, self.through_a_view = nn.Linear(4, 4), through_a_view

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.a(x)
        if self.through_a_view:
            y[:, :2].mul_(-1)
        return y > 0, y.argmax(1)


def test_masks_and_indices_are_compared_too() -> None:
    torch.manual_seed(0)
    x = (torch.randn(8, 4),)
    assert follows(fx.symbolic_trace(Masked(through_a_view=False).eval()), x)
    assert not follows(fx.symbolic_trace(Masked(through_a_view=True).eval()), x)


def test_a_layer_reads_rounded_values_and_others_read_what_was_rounded() -> None:
    module = graph()
    readers = [node for node in module.graph.nodes if node.target in ("a", "c")]
    sources = {node.args[0] for node in readers}
    plain, stream = Stream(module, BATCHES), Stream(module, BATCHES, readers, QuantizedForm("x64"))
    assert (plain.rounds, stream.rounds) == (False, True)
    for source in sources:
        values = torch.cat(stream.values(source))
        assert torch.equal(values, torch.cat(rounded(stream.values(source), QuantizedForm("x64"))))  # once is enough
    x = next(node for node in module.graph.nodes if node.op == "placeholder")
    given = torch.cat([batch[0] for batch in BATCHES])
    step = float(given.max() - given.min()) / 255
    assert 0 < float((torch.cat(stream.values(x)) - given).abs().max()) <= 0.51 * step
    assert torch.equal(torch.cat(plain.values(x)), given)


@pytest.mark.parametrize("form", [QuantizedForm("x64"), QuantizedForm("arm64", symmetric=True)])
def test_rounding_has_the_steps_of_the_form_and_keeps_zero(form: QuantizedForm) -> None:
    values = [torch.tensor([-1.0, 0.0, 0.25]), torch.tensor([3.0])]
    steps = [v / form.step(-1.0, 3.0) for v in rounded(values, form)]
    assert float(steps[0][1]) == 0
    assert all(torch.allclose(v, v.round(), atol=1e-4) for v in steps)
    assert float((torch.cat(rounded(values, form)) - torch.cat(values)).abs().max()) <= 0.51 * form.step(-1.0, 3.0)


def test_values_that_are_no_floats_or_not_finite_are_not_rounded() -> None:
    whole, broken = [torch.tensor([1, 2])], [torch.tensor([1.3, float("nan")])]
    assert rounded(whole, QuantizedForm("x64"))[0] is whole[0]
    assert rounded(broken, QuantizedForm("x64"))[0] is broken[0]
