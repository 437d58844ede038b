"""Label-free quality of trained networks at smaller and smaller budgets, beside a measure of what they are for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import real_networks as real
import torch
import typer
from common import publish, trained
from torch import Tensor, nn

import tdcompile
from tdcompile.backend.quality_drop import CHANGED_AGREEMENT, CHANGED_ERROR
from tdcompile.data.task import Batch, Samples, Tensors
from tdcompile.ir.target import Target

RESNET20 = "resnet20"


@dataclass(frozen=True)
class Case:
    """A trained network with its data and its budgets.

    Attributes:
        name: the network.
        module: the network.
        train: samples to calibrate with; no label is used.
        test: samples on which compiled and dense are compared.
        budgets: shares, such as ``macs=0.5``.
        judged_by: what ``judge`` measures.
        judge: measures a network.
        decompose: forms to choose from.
    """

    name: str
    module: nn.Module
    train: Samples
    test: Samples
    budgets: tuple[str, ...]
    judged_by: str
    judge: Callable[[nn.Module], float]
    decompose: str = "auto"


def main(
    data: Annotated[str, typer.Option(help="parquet:DIR with CIFAR-10")],
    weights: Annotated[Path, typer.Option(help="safetensors of ResNet-20")],
    networks: Annotated[str, typer.Option(help="comma-separated; smollm2 needs transformers and gguf")] = (
        "resnet20,crepe_tiny,efficientnet_lite0"
    ),
    seed: int = 0,
    json: Annotated[Path | None, typer.Option(help="also write the table here")] = None,
) -> None:
    """Compile without labels and without tuning; compare the outputs with the dense network's, then judge both."""
    cases: dict[str, Callable[[], Case]] = {
        RESNET20: lambda: _resnet20(data, weights, seed),
        "crepe_tiny": lambda: _crepe_tiny(seed),
        "efficientnet_lite0": lambda: _efficientnet_lite0(data, seed),
        "smollm2": _smollm2,
    }
    rows: list[dict[str, Any]] = []
    title = "Networks compiled without labels at smaller and smaller budgets"
    for name in networks.split(","):
        case = cases[name]()
        dense = case.judge(case.module)
        for budget in case.budgets:
            rows.append(_row(case, budget, dense, seed))
            print(rows[-1], flush=True)
        publish(title, rows, seed, Target(), json, _FORMATS)


_FORMATS = {
    "relative error %": ".1f",
    "top-1 agreement %": ".1f",
    "divergence": ".3g",
    "dense": ".4g",
    "compiled": ".4g",
}


def _row(case: Case, budget: str, dense: float, seed: int) -> dict[str, Any]:
    limited, share = budget.split("=")
    compiled = tdcompile.compile(
        case.module,
        case.test.batch([0]).inputs,
        data=(case.train, case.test),
        budget={limited: float(share)},
        decompose=(case.decompose,),
        max_drop=100.0,  # a network whose answers changed is exported all the same
        seed=seed,
    )
    quality = compiled.report.quality
    assert quality is not None  # there are samples
    (output,) = quality.outputs
    agreement, error = output.agreement, output.relative_error
    lost = None if agreement is None else 100 * (1 - agreement)
    return {
        "network": case.name,
        "budget": budget,
        "samples": quality.samples,
        "relative error %": None if error is None else 100 * error,
        "top-1 agreement %": None if lost is None else 100 - lost,
        "divergence": output.divergence,
        "answers changed": is_changed(error, agreement),
        "judged by": case.judged_by,
        "dense": dense,
        "compiled": case.judge(compiled.module),
    }


def is_changed(error: float | None, agreement: float | None) -> bool:
    """Return whether a default limit is exceeded, by agreement for class scores and by relative error otherwise.

    Args:
        error: relative error, 1.0 is 100 %; None if it is not finite.
        agreement: share of samples with the same class; None if the output is not class scores.
    """
    if error is not None and agreement is not None:
        return 100 * (1 - agreement) > CHANGED_AGREEMENT
    return error is None or 100 * error > CHANGED_ERROR


def _resnet20(data: str, weights: Path, seed: int) -> Case:
    module, train, test = trained(RESNET20, weights, data, seed)
    assert train is not None
    assert test is not None  # CIFAR-10 has a test set
    held = test.batch(range(2000))
    return Case(
        "ResNet-20",
        module.eval(),
        Tensors(train.batch(range(1024)).inputs),
        Tensors(held.inputs),
        ("macs=0.5", "macs=0.3", "macs=0.1"),
        "CIFAR-10 accuracy, %",
        lambda net: 100 * _right(net, held),
    )


def _crepe_tiny(seed: int) -> Case:
    frames, pitch = real.tones(2000, seed + 1)
    return Case(
        "CREPE tiny",
        real.crepe_tiny(),
        Tensors(real.tones(1024, seed)[0]),
        Tensors(frames),
        ("macs=0.5", "macs=0.3", "macs=0.15"),
        "raw pitch accuracy, %",
        lambda net: 100 * real.raw_pitch_accuracy(_outputs(net, frames), pitch),
    )


def _efficientnet_lite0(data: str, seed: int) -> Case:
    train, test = real.cifar_at_224(data, 192, seed)
    images, classes = real.labelled_imagenet()
    return Case(
        "EfficientNet-Lite0",
        real.efficientnet_lite0(),
        train,
        test.subset(range(200)),
        ("macs=0.8", "macs=0.6"),
        "right of 20 ImageNet images",
        lambda net: 20 * _right(net, Batch((images,), classes)),
    )


def _smollm2() -> Case:
    judged, module = real.windows(0, 32, 64), real.smollm2(6)
    next_tokens = _top_tokens(module, judged)
    return Case(
        "SmolLM2, first 6 layers",
        module,
        real.windows(20_000, 48, 64),
        judged,
        ("params=0.95", "params=0.88", "params=0.7"),
        "same next token as dense, %",
        lambda net: 100 * float((_top_tokens(net, judged) == next_tokens).float().mean()),
        decompose="svd",
    )


@torch.no_grad()
def _top_tokens(module: nn.Module, samples: Samples) -> Tensor:
    return torch.cat([module(*batch.inputs).argmax(-1) for batch in samples.batches(4)])


def _right(module: nn.Module, batch: Batch) -> float:
    assert batch.targets is not None
    return float((_outputs(module, batch.inputs[0]).argmax(1) == batch.targets).float().mean())


@torch.no_grad()
def _outputs(module: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([module(part) for part in torch.split(x, 250)])


if __name__ == "__main__":
    typer.run(main)
