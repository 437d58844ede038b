"""``finetune-int8``: tuning through rounding lowers the loss, ends in the file that was trained, or says why not."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import tdcompile
from tdcompile.backend import compiled_int8 as module
from tdcompile.backend.compiled_int8 import compiled_int8
from tdcompile.backend.deployment import Activations, sample_activations
from tdcompile.backend.fake_parity import check_fake_quantized
from tdcompile.backend.fake_quantization import fake_quantized
from tdcompile.backend.learned_quantization import LearnedScales
from tdcompile.backend.lowering import lower
from tdcompile.backend.quantize import Quantized
from tdcompile.backend.session import infer, open_session
from tdcompile.backend.verified_export import export_verified
from tdcompile.backend.weight_uses import UnmatchedError
from tdcompile.core.decomposition import Decomposition
from tdcompile.core.pipeline import Pipeline
from tdcompile.core.plan import Candidate, RankPlan
from tdcompile.core.registry import make
from tdcompile.data.task import Task, Tensors
from tdcompile.errors import InputError
from tdcompile.ir.diagnostics import Diagnostic, DiagnosticCode
from tdcompile.ir.program import Program
from tdcompile.ir.target import Target
from tdcompile.passes.tune import finetune_int8
from tdcompile.passes.tune.finetune_int8 import FinetuneInt8
from tdcompile.recipes import Recipe
from tdcompile.training.distillation import Distillation
from tdcompile.training.run_state import Int8Tuning, Tuning
from tdcompile.training.trainer import Trainer

FAST = FinetuneInt8(epochs=3, batch=32, holdout=0.1, lr=0.02)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    ).eval()  # fmt: skip


def samples(seed: int = 3) -> Tensors:
    return Tensors(torch.randn(320, 2, 8, 8, generator=torch.Generator().manual_seed(seed)))


def factorised(precision: str = "int8") -> Program:
    """Return a program whose second convolution is a chain, ready to be exported."""
    program = tdcompile.trace(network(), (torch.zeros(2, 2, 8, 8),)).with_(task=Task(samples(), calibrate=64))
    plan = RankPlan({"3": Candidate(make(Decomposition, "channel"), (12,))}, precision=precision)
    program = program.with_(facts=program.facts.having(plan))
    return Pipeline.parse("calibrate,factorize,fold-batchnorm,drop-dead").run(program)


@pytest.fixture(scope="module")
def narrow() -> Iterator[Program]:
    """A program whose samples give ranges five times too narrow, so that int8 clips most values."""

    def fifth(program: Program, model: Path) -> Activations:
        seen = sample_activations(program, model)
        return replace(seen, ranges={name: (low / 5, high / 5) for name, (low, high) in seen.ranges.items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "sample_activations", fifth)
        yield factorised()


@pytest.fixture(scope="module")
def tuned(narrow: Program) -> Program:
    return FAST.run(narrow)


def int8_loss(program: Program, folder: Path) -> tuple[float, Quantized]:
    """Write the network in int8; return the divergence of its answers to other samples from the dense network's."""
    lowered, source = lower(program, program.graph), folder / "model.onnx"
    export_verified(program, lowered, source)
    made = compiled_int8(program, lowered, source, folder / "int8.onnx", source)
    batch = samples(seed=4).batch(range(256))
    check_fake_quantized(fake_quantized(lowered, source, made, batch.inputs), made.path, batch.inputs)
    (answers,) = infer(open_session(made.path, Target(), optimised=False), batch.inputs)
    return float(Distillation(program.dense, 4.0, 0.0)(torch.from_numpy(answers), batch)), made


@pytest.mark.parametrize(
    ("before", "own", "used", "rate"),
    [
        (Tuning(1, rate=0.02, optimizer="adam"), None, "adam", 0.002),
        (Tuning(1, rate=0.02), "adam", "adam", 0.0003),  # a tenth of the highest rate: SGD's says nothing about Adam
        (Tuning(1, rate=0.02), None, "sgd", 0.002),
        (None, None, "sgd", 0.003),
    ],
)
def test_it_goes_on_with_the_optimizer_and_a_tenth_of_the_rate_of_finetune(narrow, before, own, used, rate) -> None:
    start = narrow if before is None else narrow.with_(facts=narrow.facts.having(before))
    figures = FinetuneInt8(epochs=0.1, optimizer=own).run(start).facts[Int8Tuning]
    assert (figures.optimizer, figures.rate) == (used, pytest.approx(rate))


def test_tuning_repairs_ranges_that_are_too_narrow(narrow: Program, tuned: Program, tmp_path: Path) -> None:
    before, first = int8_loss(narrow, tmp_path / "before")
    after, made = int8_loss(tuned, tmp_path / "after")
    assert after < 0.5 * before
    figures, learned = tuned.facts[Int8Tuning], tuned.facts[LearnedScales]
    assert (figures.epochs, figures.rate) == (3, 0.02)
    assert figures.best_epoch > 0
    assert dict(made.scales) == dict(learned.scales)
    assert max(scale / first.scales[name][0] for name, (scale, _) in learned.scales.items()) > 1.005
    assert Tuning not in tuned.facts


def test_a_start_that_no_epoch_improves_is_kept_as_it_would_be_without_them(
    narrow: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "_epoch", lambda *_: 1.0)
    monkeypatch.setattr(finetune_int8.Trainer, "_judge", lambda self: (None, next(losses)))
    losses = iter([0.1, 0.2, 0.3, 0.4])
    after = FAST.run(narrow)
    assert after.facts[Int8Tuning].best_epoch == 0
    assert after.facts[LearnedScales] == LearnedScales()
    assert all(torch.equal(a, b) for a, b in zip(narrow.graph.parameters(), after.graph.parameters(), strict=True))


def test_the_basis_between_factors_is_not_changed_again_at_export(tuned: Program) -> None:
    lowered = lower(tuned, tuned.graph)
    assert all(torch.equal(a, b) for a, b in zip(lowered.parameters(), tuned.graph.parameters(), strict=True))
    without = tuned.with_(facts=tuned.facts.having(LearnedScales()))
    gauged = lower(without, tuned.graph)
    assert not torch.equal(gauged.get_parameter("3.0.weight"), tuned.graph.get_parameter("3.0.weight"))


class StopError(Exception):
    pass


def test_a_run_does_not_resume_from_the_state_of_another_optimizer(
    narrow: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    form, epoch, seen = replace(FAST, lr=None), Trainer._epoch, []

    def stopping(self, number, curve):
        seen.append(number)
        if len(seen) == 2:
            raise StopError
        return epoch(self, number, curve)

    monkeypatch.setattr(Trainer, "_epoch", stopping)
    after_adam, after_sgd = (
        narrow.with_(workspace=tmp_path, facts=narrow.facts.having(Tuning(1, rate=0.02, optimizer=name)))
        for name in ("adam", "sgd")
    )
    with pytest.raises(StopError):
        form.run(after_adam)
    form.run(after_sgd)
    assert seen == [1, 2, 1, 2, 3]


def test_a_run_that_was_interrupted_ends_as_one_that_was_not(
    narrow: Program, tuned: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, epoch = narrow.with_(workspace=tmp_path), Trainer._epoch

    def stopping(self, number, curve):
        if number == 3:
            raise StopError
        return epoch(self, number, curve)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_epoch", stopping)
        with pytest.raises(StopError):
            FAST.run(workspace)
    numbers = []

    def counting(self, number, curve):
        numbers.append(number)
        return epoch(self, number, curve)

    monkeypatch.setattr(Trainer, "_epoch", counting)
    resumed = FAST.run(workspace)
    assert numbers == [3]
    assert resumed.facts[LearnedScales] == tuned.facts[LearnedScales]
    assert all(torch.equal(a, b) for a, b in zip(resumed.graph.parameters(), tuned.graph.parameters(), strict=True))


def told(program: Program) -> list[Diagnostic]:
    return [
        entry
        for entry in program.history
        if isinstance(entry, Diagnostic) and entry.code in (DiagnosticCode.NOT_TUNED_INT8, DiagnosticCode.NO_DATA)
    ]


def test_a_plan_in_fp32_is_left_alone() -> None:
    program = factorised(precision="fp32")
    after = FAST.run(program)
    assert all(torch.equal(a, b) for a, b in zip(program.graph.parameters(), after.graph.parameters(), strict=True))
    assert after.facts[LearnedScales] == LearnedScales()
    assert after.facts[Int8Tuning] == Int8Tuning()
    assert told(after) == []


def test_a_network_that_cannot_be_trained_so_is_told_and_kept(narrow: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    def unmatched(*_: object) -> None:
        raise UnmatchedError("the value of 'there' has no counterpart")

    monkeypatch.setattr(finetune_int8, "learned_quantization", unmatched)
    after = FAST.run(narrow)
    (entry,) = told(after)
    assert entry.text == (
        "finetune-int8: the network is not tuned through rounding: the value of 'there' has no counterpart"
    )
    assert all(torch.equal(a, b) for a, b in zip(narrow.graph.parameters(), after.graph.parameters(), strict=True))
    assert after.facts[LearnedScales] == LearnedScales()
    (entry,) = told(FAST.run(narrow.with_(task=Task())))
    assert "there are no training samples" in entry.text


def test_a_network_that_is_not_in_its_exported_form_is_refused() -> None:
    program = tdcompile.trace(network(), (torch.zeros(2, 2, 8, 8),)).with_(task=Task(samples()))
    program = program.with_(facts=program.facts.having(RankPlan({}, precision="int8")))
    with pytest.raises(InputError, match="put fold-batchnorm,drop-dead before it"):
        FAST.run(program)


@pytest.mark.parametrize(
    ("tune", "precision", "steps"),
    [
        ("epochs=5,lr=0.02,batch=64", "int8", ("finetune{epochs=4.0,lr=0.02,batch=64}", "finetune-int8{batch=64}")),
        ("epochs=30", "auto", ("finetune{epochs=29.0}", "finetune-int8")),
        ("epochs=1", "int8", ("finetune{epochs=0.8}", "finetune-int8{epochs=0.2}")),
        ("epochs=1", "fp32", ("finetune{epochs=1.0}",)),
        ("none", "int8", ()),
    ],
)  # fmt: skip
def test_an_int8_recipe_gives_the_last_fifth_or_epoch_of_tuning_to_rounding(tune, precision, steps) -> None:
    made = Recipe(tune=tune, precision=precision, budget={"macs": 0.5}).steps()
    assert tuple(str(step.spec()) for step in made.steps if step.trains) == steps
    assert (made.steps[-1].name == "finetune-int8") == (len(steps) == 2)


def test_a_plan_decides_whether_its_compilation_is_tuned_through_rounding(tmp_path: Path) -> None:
    for precision in ("int8", "fp32"):
        file = tmp_path / f"{precision}.json"
        file.write_text(RankPlan({}, precision=precision).to_json())
        names = [step.name for step in Recipe(plan=str(file), tune="epochs=2").steps().steps]
        assert ("finetune-int8" in names) == (precision == "int8")
        names = [step.name for step in Recipe(plan=str(file), tune="epochs=2", precision="fp32").steps().steps]
        assert "finetune-int8" not in names


def test_options_of_tuning_go_past_it_in_a_pipeline_of_ones_own_and_none_leaves_it_out() -> None:
    own = "rene,factorize,finetune,fold-batchnorm,drop-dead,finetune-int8{epochs=2}"
    steps = [str(step.spec()) for step in Recipe(pipeline=own, tune="epochs=7,trial=0").steps().steps]
    assert "finetune{epochs=7.0,trial=0}" in steps
    assert "finetune-int8{epochs=2.0}" in steps
    assert not any("finetune" in str(step) for step in Recipe(pipeline=own, tune="none").steps().steps)
