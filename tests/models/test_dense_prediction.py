"""Networks with an output for each place, the scenes to segment, and their training."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tdcompile.data.loading import load_data
from tdcompile.data.task import Tensors
from tdcompile.errors import InputError
from tdcompile.frontend.load_network import load_weights
from tdcompile.ir.scoring import score_of
from tdcompile.models.espcn import Espcn
from tdcompile.models.train import Schedule, _objective, fit
from tdcompile.models.unet import UNet


@pytest.mark.parametrize(
    ("network", "shape", "wanted"),
    [
        (UNet(8), (2, 3, 48, 48), (2, 11, 48, 48)),
        (UNet(8, 5), (1, 3, 32, 64), (1, 5, 32, 64)),
        (Espcn(16), (2, 3, 16, 16), (2, 3, 32, 32)),
        (Espcn(16, 3), (1, 3, 8, 12), (1, 3, 24, 36)),
    ],
)
def test_an_output_has_a_place_for_each_of_the_input(
    network: UNet | Espcn, shape: tuple[int, ...], wanted: tuple[int, ...]
) -> None:
    module = network.build()
    assert not module.training
    assert module(torch.zeros(shape)).shape == wanted


def test_scenes_have_a_class_for_every_pixel_and_are_always_equal() -> None:
    train, test = load_data("scenes", (3, 48, 48))
    again, _ = load_data("scenes", (3, 48, 48), seed=5)
    assert test is not None
    assert (len(train), len(test)) == (1000, 200)
    batch, other = train.batch(range(40)), again.batch(range(40))
    assert torch.equal(batch.inputs[0], other.inputs[0])
    assert torch.equal(batch.targets, other.targets)
    assert batch.targets.shape == (40, 48, 48)
    assert set(batch.targets.unique().tolist()) == set(range(11))
    assert 0 <= float(batch.inputs[0].min()) < float(batch.inputs[0].max()) <= 1
    assert not torch.equal(batch.inputs[0], test.batch(range(40)).inputs[0])
    with pytest.raises(InputError, match="the images are 3x48x48"):
        load_data("scenes", (3, 32, 32))


def test_the_training_code_takes_the_loss_and_the_metric_from_the_targets() -> None:
    torch.manual_seed(0)
    x = torch.rand(64, 3, 16, 16)
    samples = Tensors(x, (x[:, 0] > 0.5).long())
    module = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    objective = _objective(module, samples)
    before = score_of(objective, module, samples.batches())
    losses = list(fit(module, samples, Schedule(30, 0.1, 16), torch.Generator().manual_seed(0)))
    assert losses[-1] < 0.8 * losses[0]
    assert objective.metric.name == "mIoU"
    assert score_of(objective, module, samples.batches()) > max(0.6, before)
    assert np.isfinite(losses).all()


def test_the_weights_that_ship_segment_scenes() -> None:
    module = UNet().build()
    load_weights(module, Path(str(resources.files("tdcompile.models").joinpath("unet.safetensors"))))
    _, test = load_data("scenes", (3, 48, 48))
    assert test is not None
    assert score_of(_objective(module, test), module, test.batches(limit=60)) == pytest.approx(0.4356, abs=0.06)
