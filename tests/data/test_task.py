"""``Tensors``: samples in memory, of one input or several, and what it refuses."""

import re

import pytest
import torch
from torch import nn

import tdcompile
from tdcompile import Tensors
from tdcompile.data.metrics import accuracy
from tdcompile.errors import InputError


def test_several_inputs_are_read_by_place():
    x, y, labels = torch.randn(5, 3), torch.arange(5.0), torch.tensor([0, 2, 1, 0, 0])
    samples = Tensors((x, y), labels)
    assert (len(samples), samples.classes) == (5, 3)
    batch = samples.subset([4, 1, 2]).batch([2, 0])
    assert all(map(torch.equal, batch.inputs, (x[[2, 4]], y[[2, 4]])))
    assert batch.targets.tolist() == [1, 0]


def test_one_input_and_labels_are_optional_and_classes_may_be_more_than_seen():
    assert Tensors(torch.zeros(2, 3)).classes is None
    assert Tensors(torch.zeros(2, 3)).batch([1]).targets is None
    assert Tensors(torch.zeros(2, 3), torch.tensor([0, 1]), classes=10).classes == 10


@pytest.mark.parametrize(
    ("inputs", "labels", "classes", "told"),
    [
        ((torch.zeros(3, 2), torch.zeros(4, 2)), None, None, "need one count above 0; their counts are [3, 4]"),
        (torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64), None, "[2, 3]"),
        (torch.zeros(0, 2), None, None, "[0]"),
        (torch.zeros(2, 2), torch.tensor([0, 3]), 3, "go from 0 to 2; these go from 0 to 3"),
        (torch.zeros(2, 2), torch.tensor([-1, 0]), None, "these go from -1 to 0"),
        (torch.zeros(2, 2), torch.tensor([0.0, 1.0]), 2, "classes=2 needs class numbers, integers (N,), as targets"),
        (torch.zeros(2, 2), {"a": torch.zeros(3), "b": torch.zeros(2)}, None, "their counts are [2, 3]"),
    ],
)
def test_what_does_not_fit_is_refused(inputs, labels, classes, told):
    with pytest.raises(InputError, match=re.escape(told)):
        Tensors(inputs, labels, classes)


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_task_takes_samples_alone(part):
    x, y = torch.zeros(4, 2), torch.arange(4) % 2
    for wrong, called in (((x, y), "tuple"), (x, "Tensor"), ("digits", "str")):
        told = f"Task({part}=...) is a {called}; give Samples: Tensors(x, y) makes them from tensors"
        with pytest.raises(InputError, match=re.escape(told)):
            tdcompile.Task(**{part: wrong})
    assert len(getattr(tdcompile.Task(**{part: Tensors(x, y)}), part)) == 4


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


class Recording(Tensors):
    """Samples that remember which of them were read."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.read = []

    def batch(self, indices):
        self.read += list(indices)
        return super().batch(indices)


def recording(count=600):
    """Scores as samples: the first ten are of the class they name, and no others."""
    labels = torch.arange(count) % 3
    right = (torch.arange(count) < 10).long()
    return Recording(nn.functional.one_hot((labels + 1 - right) % 3, 3).float(), labels)


def test_accuracy_reads_as_many_samples_as_it_is_allowed_and_all_without_a_limit():
    samples = recording()
    assert accuracy(nn.Identity(), samples, limit=10) == 1.0
    assert samples.read == list(range(10))
    samples.read.clear()
    assert accuracy(nn.Identity(), samples, limit=400) == 10 / 400  # more than a batch
    assert samples.read == list(range(400))
    samples.read.clear()
    assert accuracy(nn.Identity(), samples) == accuracy(nn.Identity(), samples, limit=1000) == 10 / 600
    assert samples.read == 2 * list(range(600))


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
    compiled = tdcompile.compile(
        Gated().eval(), (x[:1], gate[:1]), data=(samples, samples), budget={"macs": 0.6}, decompose=("svd", "channel")
    )
    assert compiled.report.compiled.score is not None
    assert compiled.report.ratio.macs >= 1 / 0.6


def test_the_accuracy_of_a_compilation_is_of_as_many_test_samples_as_were_asked_for():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    x = torch.randn(60, 6)
    labels = network(x).argmax(1)
    labels[11:] = (labels[11:] + 1) % 3
    steps = "propose{decompose=svd},score{by=none},choose,factorize"
    compiled = tdcompile.compile(
        network, (x[:1],), data=(Tensors(x), Tensors(x, labels)), budget={"macs": 0.9}, pipeline=steps, eval=12
    )
    assert compiled.report.dense.score == pytest.approx(11 / 12)
