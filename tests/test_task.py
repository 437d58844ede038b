"""``Tensors``: samples in memory, of one input or several, and what it refuses."""

import re

import pytest
import torch
from torch import nn

import tdcompile
from tdcompile import Tensors
from tdcompile.errors import InputError


def test_several_inputs_are_read_by_place():
    x, y, labels = torch.randn(5, 3), torch.arange(5.0), torch.tensor([0, 2, 1, 0, 0])
    samples = Tensors((x, y), labels)
    assert (len(samples), samples.classes) == (5, 3)
    batch = samples.subset([4, 1, 2]).batch([2, 0])
    assert all(map(torch.equal, batch.inputs, (x[[2, 4]], y[[2, 4]])))
    assert batch.labels.tolist() == [1, 0]


def test_one_input_and_labels_are_optional_and_classes_may_be_more_than_seen():
    assert Tensors(torch.zeros(2, 3)).classes is None
    assert Tensors(torch.zeros(2, 3)).batch([1]).labels is None
    assert Tensors(torch.zeros(2, 3), torch.tensor([0, 1]), classes=10).classes == 10


@pytest.mark.parametrize(
    ("inputs", "labels", "classes", "told"),
    [
        ((torch.zeros(3, 2), torch.zeros(4, 2)), None, None, "of one count above 0, and are of [3, 4]"),
        (torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64), None, "[2, 3]"),
        (torch.zeros(0, 2), None, None, "[0]"),
        (torch.zeros(2, 2), torch.tensor([0, 3]), 3, "from 0 to 2; these are torch.int64 of shape (2,) from 0 to 3"),
        (torch.zeros(2, 2), torch.tensor([-1, 0]), None, "from -1 to 0"),
        (torch.zeros(2, 2), torch.tensor([0.0, 1.0]), None, "torch.float32"),
        (torch.zeros(2, 2), torch.tensor([[0], [1]]), None, "(2, 1)"),
    ],
)
def test_what_does_not_fit_is_refused(inputs, labels, classes, told):
    with pytest.raises(InputError, match=re.escape(told)):
        Tensors(inputs, labels, classes)


class Drawn(Tensors):
    """Samples that differ from one reading to the next, as augmented ones do."""

    def batch(self, indices):
        found = super().batch(indices)
        return found._replace(inputs=tuple(x + torch.randn_like(x) for x in found.inputs))


def test_a_fingerprint_tells_samples_apart_but_not_two_readings():
    x, y = torch.randn(9, 2), torch.zeros(9, dtype=torch.int64)
    assert Tensors(x, y).fingerprint() == Tensors(x.clone(), y).fingerprint()
    others = [Tensors(x[:8], y[:8]), Tensors(x + 1, y), Tensors(x), Tensors(x, y + 1), Tensors(x.double(), y)]
    assert len({samples.fingerprint() for samples in (Tensors(x, y), *others)}) == 6
    assert Drawn(x).fingerprint() == (9, "")


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(12, 24), nn.Linear(6, 24)
        self.head = nn.Linear(24, 3)

    def forward(self, x, gate):
        return self.head(self.left(x).relu() * self.right(gate).sigmoid())


def test_a_network_of_two_inputs_is_compiled_with_them():
    torch.manual_seed(0)
    x, gate = torch.randn(64, 12), torch.randn(64, 6)
    samples = Tensors((x, gate), torch.arange(64) % 3)
    compiled = tdcompile.compile(Gated().eval(), (x[:1], gate[:1]), data=(samples, samples), budget={"macs": 0.6})
    assert compiled.report.compiled.accuracy is not None
    assert compiled.report.ratio.macs >= 1 / 0.6
