"""``synthesize``: samples reach the statistics of batch norm, for inputs of any shape and scale, in bounded time."""

import copy
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tdcompile
from tdcompile.core.hooks import Hook
from tdcompile.core.pipeline import Pipeline
from tdcompile.errors import InputError
from tdcompile.ir.measurements import SyntheticSamples
from tdcompile.passes import Synthesize

FEW = {"images": 8, "steps": 60}


def drawn(shape, seed=0, count=64):
    """Data with structure: smooth, of another mean and deviation in each channel."""
    x = torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)).cumsum(-1) / shape[-1] ** 0.5
    channels = (torch.arange(shape[0]) % 3).view(1, -1, *[1] * (len(shape) - 1))
    return x * (1 + 0.5 * channels) + channels


def trained(module, data):
    """Give the batch norm of a network the statistics of data."""
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.momentum = None
    module.train()
    with torch.no_grad():
        for _ in range(4):
            module(data)
    return module.eval()


def images(scale=1.0):
    torch.manual_seed(0)
    made = nn.Sequential(
        *(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(inplace=True)),
        *(nn.Conv2d(12, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)),
    )
    return trained(made, scale * drawn((3, 18, 20))), torch.randn(2, 3, 18, 20)


def sound():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv1d(2, 12, 5), nn.BatchNorm1d(12), nn.ReLU(), nn.Conv1d(12, 8, 3), nn.BatchNorm1d(8))
    return trained(made, drawn((2, 40))), torch.randn(2, 2, 40)


def volumes():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv3d(2, 8, 3), nn.BatchNorm3d(8), nn.ReLU(), nn.Conv3d(8, 8, 3), nn.BatchNorm3d(8))
    return trained(made, drawn((2, 6, 16, 9))), torch.randn(2, 2, 6, 16, 9)


def features():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(24, 16), nn.BatchNorm1d(16, affine=False), nn.ReLU(), nn.Linear(16, 3))
    return trained(made, drawn((24,))), torch.randn(2, 24)


def doubles():
    made, _ = features()
    return made.double(), torch.randn(2, 24, dtype=torch.float64)


def made(network, example, **options):
    """Return the fact of the pass and its samples."""
    fact = Synthesize(**FEW | options).run(tdcompile.trace(network, (example,))).facts[SyntheticSamples]
    return fact, load_file(fact.file)["x"]


def missed(network, x):
    """Return how far noise or samples are off at the batch norm, as the fact measures it: shift and spread."""
    found = []
    for norm in (part for part in network.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)):

        def look(module, arguments):
            values = arguments[0].transpose(0, 1).flatten(1).double()
            trained = (module.running_var.double() + module.eps).sqrt()
            off = (values.mean(1) - module.running_mean).abs() / trained
            found.append((off, (values.std(1, correction=0) / trained - 1).abs()))

        norm.register_forward_pre_hook(look)
    with torch.no_grad():
        network(x.clone())
    return [float(torch.cat(part).quantile(0.5)) for part in zip(*found, strict=True)]


@pytest.mark.parametrize("kind", [images, sound, volumes, features, doubles])
def test_the_statistics_come_near_those_of_training(kind):
    network, example = kind()
    fact, x = made(network, example)
    assert x.shape == (8, *example.shape[1:])
    assert x.dtype == example.dtype
    noise = missed(copy.deepcopy(network), torch.randn(8, *example.shape[1:], dtype=example.dtype))
    found = missed(copy.deepcopy(network), x)
    assert max(found) < 0.15
    assert sum(found) < sum(noise) / 3
    assert found == pytest.approx([fact.shift, fact.spread], abs=0.02)  # median of an even number: either middle


@pytest.mark.parametrize("scale", [1 / 60, 255.0])
def test_a_network_may_take_values_of_any_scale(scale):
    network, example = images(scale)
    fact, x = made(network, example)
    assert max(fact.shift, fact.spread) < 0.2
    assert 0.2 < float(x.std()) / scale < 5


def test_a_seed_gives_the_same_samples_and_another_seed_others():
    network, example = images()
    program = tdcompile.trace(network, (example,))
    runs = [Synthesize(images=4, steps=3).run(program.with_(seed=seed)) for seed in (0, 0, 1)]
    one, again, other = (load_file(run.facts[SyntheticSamples].file)["x"] for run in runs)
    assert torch.equal(one, again)
    assert not torch.allclose(one, other, atol=0.1)
    assert not torch.allclose(one[0], one[1], atol=0.1)


def test_the_network_stays_as_it_was():
    network, example = images()
    before = copy.deepcopy(network.state_dict())
    made(network, example, steps=2)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(part._forward_pre_hooks for part in network.modules())
    assert all(parameter.grad is None for parameter in network.parameters())


class Steps(Hook):
    """Records the progress of a pass."""

    def __init__(self):
        self.told = []

    def advanced(self, step, done, of, note):
        self.told.append((done, of, note))


STEP = 3 * 4 * 4 * 8  # multiply-accumulates of one step of a sample: 16 places of 8, forward and backward


@pytest.mark.parametrize(
    ("options", "count", "steps"),
    [
        ({}, 64, 150),
        ({"work": STEP * 40 * 150.0}, 40, 150),
        ({"work": STEP * 16 * 80.0}, 16, 80),
        ({"work": 1.0}, 16, 50),  # a network for which no work suffices
        ({"images": 2, "steps": 3, "work": math.inf}, 2, 3),
    ],
)
def test_the_work_is_bounded_and_its_progress_told(options, count, steps):
    torch.manual_seed(0)
    network = trained(nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4)), drawn((2, 4, 4)))
    told = Steps()
    program = Pipeline([Synthesize(**options)]).run(tdcompile.trace(network, (torch.randn(2, 2, 4, 4),)), [told])
    assert program.facts[SyntheticSamples].count == count
    assert told.told[-1] == (steps, steps, "steps")


def test_a_fixed_batch_is_filled_and_large_values_make_groups(monkeypatch):
    network, example = images()
    program = tdcompile.trace(network, (example[:1].repeat(3, 1, 1, 1),), dynamic_batch=False)
    assert Synthesize(images=4, steps=1).run(program).facts[SyntheticSamples].count == 6
    monkeypatch.setattr("tdcompile.passes.analyze.synthesize._MEMORY", 1)
    told = Steps()
    program = Pipeline([Synthesize(images=7, steps=2)]).run(tdcompile.trace(network, (example,)), [told])
    assert program.facts[SyntheticSamples].count == 7
    assert told.told[-1][0] == 3 * 2  # two or three samples in a group: one has no deviation


def test_statistics_out_of_reach_are_a_warning():
    network, example = images()
    network[4].running_mean += 100 * network[4].running_var.sqrt()
    program = Synthesize(images=4, steps=5).run(tdcompile.trace(network, (example,)))
    (told,) = [entry for entry in program.history if "synthetic" in entry.text]
    assert told.level == "warning"
    assert "no better than without data" in told.text


class Blocked(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x.detach())


def test_a_network_that_blocks_gradients_is_refused_in_a_sentence():
    network, example = images()
    with pytest.raises(InputError, match="no gradient of the batch-norm statistics reaches the network's input"):
        made(Blocked(network).eval(), example)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    network, example = images()
    (tmp_path / "file").write_text("")
    program = tdcompile.trace(network, (example,)).with_(workspace=Path(tmp_path / "file"))
    with pytest.raises(tdcompile.TdcompileError, match=r"cannot be written to .*synthetic\.safetensors"):
        Synthesize(images=2, steps=1).run(program)
