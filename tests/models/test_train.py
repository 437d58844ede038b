"""The training code on samples small enough to learn in seconds, and the checkpoint that it made."""

from __future__ import annotations

from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from tdcompile.data.loading import load_data
from tdcompile.data.metrics import accuracy
from tdcompile.data.task import Samples, Tensors
from tdcompile.errors import InputError, TdcompileError
from tdcompile.models.digits_net import DigitsNet
from tdcompile.models.lenet5 import LeNet5
from tdcompile.models.train import Schedule, app, fit, save


def stripes(count: int, classes: int = 4, labelled: bool = True) -> Tensors:
    """Grey images with one bright row, whose place is the label, under noise."""
    labels = torch.arange(count) % classes
    images = 0.3 * torch.randn(count, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    images[torch.arange(count), 0, 4 + 2 * labels] += 1.0
    return Tensors(images, labels if labelled else None, classes if labelled else None)


def trained(samples: Samples, schedule: Schedule) -> tuple[nn.Module, list[float]]:
    torch.manual_seed(0)
    module = LeNet5().build()
    return module, list(fit(module, samples, schedule, torch.Generator().manual_seed(1)))


QUICK = Schedule(epochs=6, lr=0.05, batch=16)


def test_training_lowers_the_loss_and_writes_a_loadable_file(tmp_path: Path) -> None:
    samples = stripes(200)
    module, losses = trained(samples, QUICK)
    assert len(losses) == QUICK.epochs
    assert losses[-1] < 0.8 * losses[0]
    assert not module.training
    known = accuracy(module, samples)
    assert known is not None
    assert known > 0.9
    save(module, tmp_path / "weights.safetensors")
    again = LeNet5().build()
    again.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    assert accuracy(again, samples) == known
    assert [path.name for path in tmp_path.iterdir()] == ["weights.safetensors"]


def test_bf16_trains_weights_that_stay_in_fp32() -> None:
    module, losses = trained(stripes(200), replace(QUICK, precision="bf16"))
    assert losses[-1] < 0.8 * losses[0]
    assert {p.dtype for p in module.parameters()} == {torch.float32}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU trains in fp16")
def test_fp16_on_a_cpu_is_refused() -> None:
    with pytest.raises(InputError, match="bf16"):
        trained(stripes(32), replace(QUICK, precision="fp16"))


def test_same_seed_same_weights() -> None:
    schedule = Schedule(epochs=1, batch=32, augment="shift-flip")
    first, again = (trained(stripes(70), schedule)[0].state_dict() for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_fewer_samples_than_a_batch_are_still_trained_on() -> None:
    assert len(trained(stripes(8), Schedule(epochs=2, batch=32))[1]) == 2


def test_refuses_samples_without_labels() -> None:
    with pytest.raises(InputError, match="no targets"):
        trained(stripes(8, labelled=False), QUICK)


def test_refuses_more_classes_than_the_network_has() -> None:
    with pytest.raises(InputError, match="num_classes=12"):
        trained(stripes(12, classes=12), QUICK)


def test_a_diverging_run_says_what_to_lower() -> None:
    with pytest.raises(TdcompileError, match="rate below"):
        trained(stripes(64), Schedule(epochs=3, lr=1e30, batch=32))


def test_the_command_trains_and_tells_the_accuracy(tmp_path: Path) -> None:
    data, output = stripes(60), tmp_path / "lenet5.safetensors"
    np.savez(tmp_path / "stripes.npz", x=data.inputs[0].numpy(), y=data.targets.numpy())
    arguments = ["lenet5", "--data", f"npz:{tmp_path / 'stripes.npz'}", "--epochs", "1", "-o", str(output)]
    ran = CliRunner().invoke(app, arguments)
    assert ran.exit_code == 0, ran.output
    assert "test accuracy" in ran.stdout
    assert "epoch 1/1" in ran.stderr
    LeNet5().build().load_state_dict(load_file(output))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--input", "3x"], "1x16x16"),
        (["--input", "1x4x4"], "does not run"),
        (["--data", "digitz"], "digits"),
        (["-o", "no/such/folder/x.safetensors"], "folder"),
    ],
)
def test_the_command_refuses_in_a_sentence(tmp_path: Path, changed: list[str], said: str) -> None:
    usual = ["lenet5", "--data", "digits", "--epochs", "1", "-o", str(tmp_path / "x.safetensors")]
    ran = CliRunner().invoke(app, usual + changed)
    assert ran.exit_code == 2
    assert said in ran.stderr
    assert "Traceback" not in ran.output
    assert not list(tmp_path.iterdir())


def test_the_shipped_checkpoint_fits_and_knows_the_digits() -> None:
    network = DigitsNet()
    assert network.checkpoint is not None
    assert network.data is not None
    with resources.as_file(resources.files("tdcompile.models") / network.checkpoint) as path:
        assert path.stat().st_size <= 4_000_000
        module = network.build()
        module.load_state_dict(load_file(path))
    right = accuracy(module, load_data(network.data, network.input_shapes[0])[1])
    assert right is not None
    assert right >= 0.985
