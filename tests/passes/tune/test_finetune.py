"""``finetune``: it learns from the dense network, repeats itself, resumes where it stopped, and says when it fails."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import tdcompile
from tdcompile.core.pipeline import Pipeline
from tdcompile.data.metrics import accuracy
from tdcompile.data.objective import Objective
from tdcompile.data.task import Batch, Samples, Task, Tensors
from tdcompile.data.task_kinds import Classification
from tdcompile.errors import InputError, TdcompileError
from tdcompile.ir.diagnostics import Diagnostic
from tdcompile.ir.program import Change, Program
from tdcompile.ir.target import Budget, Target
from tdcompile.passes.tune import finetune
from tdcompile.passes.tune.finetune import Distillation, Finetune
from tdcompile.support.progress import progress
from tdcompile.training import distillation
from tdcompile.training.distillation import ScoredOutputs
from tdcompile.training.run_state import Epoch, Saved, Tuning
from tdcompile.training.trainer import Settings, Trainer, set_memory_format

FAST = Finetune(epochs=3, batch=32, holdout=0.1, trial=0)


CLASSES = ScoredOutputs(Objective(Classification(4), Classification(4).metric()))


def network(seed: int) -> fx.GraphModule:
    torch.manual_seed(seed)
    module = nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 4),
    )
    return fx.symbolic_trace(module.eval())


def data(count: int = 320, labelled: bool = True) -> Tensors:
    """Four classes, told apart by the quadrant that is brighter."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 4, (count,), generator=generator)
    x = torch.randn(count, 1, 8, 8, generator=generator)
    for row, label in enumerate(labels.tolist()):
        x[row, 0, 4 * (label // 2) : 4 * (label // 2) + 4, 4 * (label % 2) : 4 * (label % 2) + 4] += 1.5
    return Tensors(x, labels if labelled else None)


def program(train: Samples | None, graph: fx.GraphModule | None = None, **changes: object) -> Program:
    return Program(graph or network(1), (torch.zeros(2, 1, 8, 8),), network(0), Task(train=train)).with_(**changes)


@torch.no_grad()
def distance(program: Program) -> float:
    """KL from the dense network's answers to the graph's, on the training samples."""
    loss = Distillation(program.dense, 1.0, 0.0)
    batch = data().batch(range(320))
    return float(loss(program.graph(*batch.inputs), batch))


def same(a: Program, b: Program) -> bool:
    return all(
        torch.equal(x, y) for x, y in zip(a.graph.state_dict().values(), b.graph.state_dict().values(), strict=True)
    )


@pytest.fixture(scope="module")
def taught() -> Program:
    """A program whose dense network knows the classes."""
    start = program(data(), network(0))
    graph = replace(FAST, labels=1.0, lr=0.1, epochs=6).run(start).graph
    return program(data()).with_(dense=graph)


def test_it_learns_the_answers_of_the_dense_network_without_labels(taught: Program) -> None:
    before = taught.with_(task=Task(train=data(labelled=False)))
    after = FAST.run(before)
    assert distance(after) < 0.5 * distance(before)
    tuning = after.facts[Tuning]
    assert [entry.heldout_score for entry in tuning.curve] == [None] * 3
    assert tuning.start_score is None


def test_it_gives_the_curve_and_the_epoch_that_was_kept(taught: Program) -> None:
    after = FAST.run(taught)
    tuning = after.facts[Tuning]
    assert tuning.epochs == 3
    assert [entry.epoch for entry in tuning.curve] == [1, 2, 3]
    assert tuning.curve[2].train_loss < tuning.curve[0].train_loss
    accuracies = [tuning.start_score, *(entry.heldout_score for entry in tuning.curve)]
    assert accuracies[tuning.best_epoch] == max(accuracies)
    assert tuning.seconds > 0
    assert isinstance(after.history[-1], Change)
    assert f"epoch {tuning.best_epoch} kept" in after.history[-1].what
    learnt, untaught = accuracy(after.graph, data()), accuracy(taught.graph, data())
    assert learnt is not None
    assert untaught is not None
    assert learnt > untaught + 0.2


def test_the_given_program_and_the_dense_network_stay_as_they_were(taught: Program) -> None:
    kept = [t.clone() for module in (taught.graph, taught.dense) for t in module.state_dict().values()]
    after = FAST.run(taught)
    now = [t for module in (taught.graph, taught.dense) for t in module.state_dict().values()]
    assert all(torch.equal(x, y) for x, y in zip(kept, now, strict=True))
    assert not after.graph.training
    assert all(p.grad is None and p.requires_grad for p in after.graph.parameters())


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_state_alone(taught: Program) -> None:
    state = torch.random.get_rng_state()
    first = FAST.run(taught)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(7)
    assert same(first, FAST.run(taught))
    assert not same(first, FAST.run(taught.with_(seed=1)))


class InterruptionError(Exception):
    pass


def stopping_at(step: int) -> Callable[[int, int, str], None]:
    def watch(done: int, of: int, note: str) -> None:
        if done == step:
            raise InterruptionError

    return watch


def interrupted(tune: Finetune, program: Program, step: int) -> None:
    token = progress.set(stopping_at(step))
    try:
        with pytest.raises(InterruptionError):
            tune.run(program)
    finally:
        progress.reset(token)


def steps_of(tune: Finetune, program: Program) -> tuple[list[int], Program]:
    steps: list[int] = []
    token = progress.set(lambda done, of, note: steps.append(done))
    try:
        return steps, tune.run(program)
    finally:
        progress.reset(token)


def test_an_interrupted_run_goes_on_and_ends_as_one_that_was_not(taught: Program, tmp_path: Path) -> None:
    whole = FAST.run(taught)
    resumable = taught.with_(workspace=tmp_path)
    interrupted(FAST, resumable, step=23)  # nine steps an epoch: in the third
    assert (tmp_path / "finetune").is_dir()
    steps, resumed = steps_of(FAST, resumable)
    assert steps == list(range(19, 28))
    assert same(whole, resumed)
    assert resumed.facts[Tuning].curve == whole.facts[Tuning].curve
    assert resumed.facts[Tuning].best_epoch == whole.facts[Tuning].best_epoch


@pytest.mark.parametrize("patience", [0, 1])
def test_a_run_that_had_ended_is_taken_as_it_ended(taught: Program, tmp_path: Path, patience: int) -> None:
    tune = replace(FAST, epochs=4, lr=5.0, clip=1e9, patience=patience)  # no epoch is better: the first is the last
    whole = tune.run(taught.with_(workspace=tmp_path))
    steps, again = steps_of(tune, taught.with_(workspace=tmp_path))
    assert steps == []
    assert whole.facts[Tuning].epochs == (1 if patience else 4)
    assert same(whole, again)
    assert again.facts[Tuning] == whole.facts[Tuning]


def test_a_saved_state_is_read_to_where_the_network_is(tmp_path: Path) -> None:
    saved = Saved(tmp_path, "mine")
    saved.write({"weights": {"w": torch.ones(2)}, "curve": []})
    for place, kind in (("meta", "meta"), ("cpu:0", "cpu")):  # of several processes on CPUs each is on cpu:0
        state = saved.read(torch.device(place))
        assert state is not None
        assert state["weights"]["w"].device.type == kind


@pytest.mark.parametrize("changed", ["options", "seed", "weights", "teacher"])
def test_the_state_of_another_run_is_left_aside(taught: Program, tmp_path: Path, changed: str) -> None:
    before = taught.with_(workspace=tmp_path)
    interrupted(FAST, before, step=12)
    tune = replace(FAST, lr=0.01) if changed == "options" else FAST
    other = {"seed": {"seed": 9}, "weights": {"graph": network(2)}, "teacher": {"dense": network(2)}}.get(changed, {})
    steps, _ = steps_of(tune, before.with_(**other))
    assert steps[0] == 1


def test_a_state_that_cannot_be_read_is_left_aside_with_a_warning(
    taught: Program, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "finetune").mkdir()
    (tmp_path / "finetune" / "state.pt").write_bytes(b"half")
    assert same(FAST.run(taught.with_(workspace=tmp_path)), FAST.run(taught))
    assert "cannot be read" in caplog.text


def test_a_workspace_that_cannot_be_written_is_an_error(taught: Program, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        FAST.run(taught.with_(workspace=tmp_path / "file"))


def test_a_rate_that_diverges_is_an_error_that_says_to_lower_it(taught: Program) -> None:
    with pytest.raises(TdcompileError, match=r"diverged.*lower lr than 1e\+20"):
        replace(FAST, lr=1e20, bn="frozen", warmup=0.0).run(taught)


def test_a_first_loss_that_is_not_finite_is_the_datas_fault(taught: Program) -> None:
    bad = data()
    bad.inputs[0][:] = math.nan
    with pytest.raises(InputError, match="the data or the weights are not finite"):
        replace(FAST, holdout=0.0).run(taught.with_(task=Task(train=bad)))


def test_where_every_epoch_does_worse_the_start_is_kept(taught: Program) -> None:
    start = taught.with_(graph=taught.dense)
    after = replace(FAST, lr=5.0, clip=1e9, epochs=1).run(start)
    assert after.facts[Tuning].best_epoch == 0
    assert same(after, start)
    assert "every epoch did worse" in after.history[-1].what  # type: ignore[union-attr]  # asserted by the attribute


@pytest.mark.parametrize(
    ("judged", "kept"),
    [
        ([(0.900, 0.1), (0.893, 0.3), (0.892, 0.2)], 1),
        ([(0.900, 0.1), (0.893, 0.3), (0.893, 0.2)], 2),
        ([(0.900, 0.1), (0.890, 0.3), (0.880, 0.2)], 1),
        ([(0.900, 0.3), (0.889, 0.2), (0.888, 0.1)], 0),
        ([(0.008, 4.0), (0.000, 9.0), (0.000, 8.0)], 0),
        ([(0.105, 4.0), (0.100, math.nan), (0.100, math.inf)], 0),
        ([(None, 0.2), (None, 0.3), (None, 0.1)], 2),
        ([(None, 0.1), (None, 0.12), (None, 0.11)], 0),
    ],
    ids=str,
)
def test_the_start_has_to_be_better_by_a_hundredth_for_it_may_know_the_held_out_samples_by_heart(
    taught: Program, monkeypatch: pytest.MonkeyPatch, judged: list[tuple[float | None, float]], kept: int
) -> None:
    answers = iter(judged)
    monkeypatch.setattr(Trainer, "_judge", lambda self: next(answers))
    after = replace(FAST, epochs=2).run(taught)
    assert after.facts[Tuning].best_epoch == kept
    assert same(after, taught) == (kept == 0)


def test_without_holdout_the_last_epoch_is_kept(taught: Program) -> None:
    tuning = replace(FAST, holdout=0.0).run(taught).facts[Tuning]
    assert (tuning.best_epoch, tuning.curve[-1].heldout_loss) == (3, None)


def test_frozen_statistics_stay_and_trained_ones_move(taught: Program) -> None:
    kept = taught.graph.get_submodule("1").running_mean
    moved, frozen = (replace(FAST, bn=bn, epochs=1).run(taught).graph for bn in ("train", "frozen"))
    assert not torch.equal(moved.get_submodule("1").running_mean, kept)
    assert torch.equal(frozen.get_submodule("1").running_mean, kept)
    assert not torch.equal(frozen.get_submodule("0").weight, taught.graph.get_submodule("0").weight)


def test_a_fraction_of_an_epoch_is_so_many_steps(taught: Program) -> None:
    steps, after = steps_of(replace(FAST, epochs=1.5), taught)
    assert steps == list(range(1, 15))
    assert after.facts[Tuning].epochs == 2


def test_progress_notes_tell_loss_and_held_out_accuracy(taught: Program) -> None:
    notes: list[tuple[int, int, str]] = []
    token = progress.set(lambda done, of, note: notes.append((done, of, note)))
    try:
        FAST.run(taught)
    finally:
        progress.reset(token)
    assert [of for _, of, _ in notes] == [27] * 27
    assert notes[-1][2].startswith("epoch 3/3, loss ")
    assert "held-out accuracy" in notes[-1][2]


@pytest.mark.parametrize("train", [None, data(1)])
def test_without_data_nothing_changes_and_history_says_why(train: Samples | None) -> None:
    before = program(train)
    after = Finetune().run(before)
    told = after.history[-1]
    assert isinstance(told, Diagnostic)
    assert (told.layer, told.code) == (None, "no_data")
    assert after.facts[Tuning] == Tuning()
    assert same(before, after)


def test_fewer_samples_than_a_batch_are_one_batch() -> None:
    steps, _ = steps_of(Finetune(epochs=2, trial=0), program(data(20)))
    assert steps == [1, 2]


def test_convolutions_over_three_axes_learn_too() -> None:
    torch.manual_seed(5)
    teacher, student = (nn.Sequential(nn.Conv3d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4)) for _ in range(2))
    x = torch.randn(64, 1, 4, 4, 4)
    start = Program(
        fx.symbolic_trace(student.eval()),
        (x[:2],),
        fx.symbolic_trace(teacher.eval()),
        Task(train=Tensors(x, None)),
    )
    after = replace(FAST, lr=0.05, holdout=0.0).run(start)
    wanted = teacher(x)
    assert F.mse_loss(after.graph(x), wanted) < 0.9 * F.mse_loss(student(x), wanted)
    assert all(p.is_contiguous() for p in after.graph.parameters())


def test_weights_are_laid_out_as_new_ones_afterwards() -> None:
    module = nn.Sequential(nn.Conv2d(8, 6, 1), nn.Conv2d(6, 4, 3))
    for form in (torch.channels_last, torch.contiguous_format):
        set_memory_format(module, form)
        for part in module:
            assert part.weight.stride() == torch.empty_like(part.weight, memory_format=form).stride()
    assert module[0].weight.stride() == (8, 1, 1, 1)


def test_the_loss_is_hintons() -> None:
    teacher = network(0)
    batch = data().batch(range(8))
    scores = network(1)(*batch.inputs)
    p, q = (torch.softmax(x / 4, 1) for x in (teacher(*batch.inputs), scores))
    wanted = 0.75 * 16 * (p * (p.log() - q.log())).sum(1).mean() + 0.25 * F.cross_entropy(scores, batch.targets)
    torch.testing.assert_close(Distillation(teacher, 4.0, 0.25, scored=CLASSES)([scores], batch), wanted)
    unlabelled = Batch(batch.inputs, None)
    torch.testing.assert_close(
        Distillation(teacher, 4.0, 0.25, scored=CLASSES)([scores], unlabelled),
        Distillation(teacher, 4.0, 0.0)([scores], batch),
    )


def test_in_bf16_the_dense_network_computes_in_bf16_and_the_loss_in_fp32() -> None:
    teacher, seen = network(0), set()
    teacher.register_forward_hook(lambda module, arguments, output: seen.add(output.dtype))
    batch = data().batch(range(64))
    scores = network(1)(*batch.inputs)
    half = Distillation(teacher, 4.0, 0.1, precision="bf16", scored=CLASSES)([scores], batch)
    assert seen == {torch.bfloat16}
    assert half.dtype is torch.float32
    whole = Distillation(teacher, 4.0, 0.1, scored=CLASSES)([scores], batch)
    assert seen == {torch.bfloat16, torch.float32}
    torch.testing.assert_close(half, whole, rtol=0.02, atol=0.0)


@pytest.mark.parametrize(
    ("shape", "augmented"),
    [((2, 3, 16, 16), "shift-flip"), ((2, 1, 32, 32), "shift"), ((2, 3, 8, 8), "none"), ((2, 32), "none")],
)
def test_auto_augments_images_that_can_bear_it(shape: tuple[int, ...], augmented: str) -> None:
    start = program(None, inputs=(torch.zeros(shape),))
    assert Finetune()._settings(start).augment == augmented
    assert Finetune(augment="none")._settings(start).augment == "none"


def test_the_default_rate_is_in_proportion_to_the_batch() -> None:
    start = program(None)
    assert Finetune()._settings(start).lr == pytest.approx(0.03)
    assert Finetune(batch=32)._settings(start).lr == pytest.approx(0.0075)
    assert Finetune(batch=32, lr=0.2)._settings(start).lr == 0.2
    assert Finetune(optimizer="adam")._settings(start).lr == pytest.approx(0.003)
    assert Finetune(optimizer="adam", batch=32)._settings(start).lr == pytest.approx(0.0015)


def test_adam_learns_and_an_interrupted_run_goes_on_with_its_moments(taught: Program, tmp_path: Path) -> None:
    adam, start = replace(FAST, optimizer="adam"), program(data())
    whole = adam.run(start)
    assert distance(whole) < 0.8 * distance(start)
    assert not same(whole, FAST.run(start))
    resumable = start.with_(workspace=tmp_path)
    interrupted(adam, resumable, step=23)
    steps, resumed = steps_of(adam, resumable)
    assert len(steps) < 27
    assert same(whole, resumed)
    assert resumed.facts[Tuning].optimizer == "adam"


def test_an_unknown_optimizer_is_refused_by_the_names_of_the_known() -> None:
    with pytest.raises(InputError, match=r"optimizer=adamw must be one of sgd, adam"):
        Finetune.from_options({"optimizer": "adamw"})


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("epochs", "0"),
        ("lr", "-1"),
        ("batch", "0"),
        ("clip", "0"),
        ("temperature", "nan"),
        ("momentum", "1"),
        ("labels", "2"),
        ("holdout", "1"),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(option: str, text: str) -> None:
    with pytest.raises(InputError, match=option):
        Finetune.from_options({option: text})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_a_gpu_it_learns_and_hands_back_a_graph_on_the_cpu(taught: Program) -> None:
    before = taught.with_(target=Target("cuda"))
    after = FAST.run(before)
    assert distance(after) < 0.5 * distance(before)
    assert {tensor.device.type for tensor in after.graph.state_dict().values()} == {"cpu"}
    FAST.run(taught)  # and back: accelerate remembers the first device it was asked for


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_a_gpu_a_run_with_an_average_goes_on_from_its_state(taught: Program, tmp_path: Path) -> None:
    tune, there = replace(FAST, average=0.9), taught.with_(target=Target("cuda"), workspace=tmp_path)
    interrupted(tune, there, step=23)
    steps, resumed = steps_of(tune, there)
    assert steps == list(range(19, 28))
    assert distance(resumed) < distance(taught)


def test_the_average_of_the_weights_is_what_is_judged_and_kept() -> None:
    averaged = replace(FAST, average=0.9).run(program(data()))
    assert not same(averaged, FAST.run(program(data())))
    assert distance(averaged) < distance(program(data()))
    assert all(torch.isfinite(value).all() for value in averaged.graph.state_dict().values())


def test_an_average_without_memory_is_the_weights_themselves() -> None:
    assert same(replace(FAST, average=1e-12).run(program(data())), FAST.run(program(data())))


def test_an_interrupted_run_with_an_average_goes_on_and_ends_as_one_that_was_not(tmp_path: Path) -> None:
    form = replace(FAST, average=0.9)
    whole = form.run(program(data()))
    with pytest.raises(KeyboardInterrupt):
        stopped_after(form, program(data(), workspace=tmp_path), epoch=2)
    assert same(form.run(program(data(), workspace=tmp_path)), whole)


def stopped_after(form: Finetune, given: Program, epoch: int) -> None:
    """Run it, and interrupt it in its first step after an epoch."""

    def stop(done: int, of: int, note: str) -> None:
        if done > epoch * of // 3:
            raise KeyboardInterrupt

    token = progress.set(stop)
    try:
        form.run(given)
    finally:
        progress.reset(token)


def test_patience_ends_a_run_that_gets_no_better() -> None:
    settled = program(data(), graph=network(0))  # the dense network itself: nothing can be better
    tuned = Finetune(epochs=6, batch=32, holdout=0.1, lr=0.2, patience=2).run(settled)
    assert tuned.facts[Tuning].best_epoch + 2 >= tuned.facts[Tuning].epochs
    assert tuned.facts[Tuning].epochs < 6
    with pytest.raises(InputError, match="holdout above 0"):
        Finetune(patience=1, holdout=0.0)


def test_bf16_learns_and_leaves_weights_in_fp32() -> None:
    tuned = replace(FAST, precision="bf16").run(program(data()))
    assert distance(tuned) < distance(program(data()))
    assert {value.dtype for value in tuned.graph.parameters()} == {torch.float32}
    again = FAST.run(program(data()))  # and the next run is in full precision again
    assert same(again, FAST.run(program(data())))


def test_fp16_on_a_cpu_is_refused() -> None:
    if torch.cuda.is_available():
        tuned = replace(FAST, precision="fp16").run(program(data(), target=Target("cuda")))
        assert distance(tuned) < distance(program(data()))
    with pytest.raises(InputError, match="fp16 needs a CUDA device"):
        replace(FAST, precision="fp16").run(program(data()))


def _one_of_two(rank: int, port: int, out: str, tune: Finetune) -> None:
    """A process of a run over gloo."""
    import os

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    tuned = tune.run(sharable())
    kinds = [(type(part).__name__, "forward" in vars(part)) for part in tuned.graph.modules()]
    curve = [tuple(entry) for entry in tuned.facts[Tuning].curve]
    torch.save({"state": tuned.graph.state_dict(), "kinds": kinds, "curve": curve}, f"{out}/{rank}.pt")


SHARED = Finetune(epochs=2, batch=32, holdout=0.1, augment="shift-flip", trial=0)


def sharable() -> Program:
    """Without dropout: nothing else depends on which process sees which half of a batch."""
    graph = network(1)
    graph.get_submodule("3").p = 0.0
    return program(data(), graph=graph)


@pytest.mark.slow
@pytest.mark.parametrize("bn", ["train", "frozen"])
def test_two_processes_end_as_one_does(tmp_path: Path, free_port: int, bn: Literal["train", "frozen"]) -> None:
    tune = replace(SHARED, bn=bn)
    torch.multiprocessing.spawn(_one_of_two, (free_port, str(tmp_path), tune), nprocs=2)
    alone = tune.run(sharable())
    start, end = (given.graph.get_submodule("1").running_var for given in (sharable(), alone))
    assert torch.equal(start, end) == (bn == "frozen")
    for rank in range(2):
        made = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert made["state"].keys() == alone.graph.state_dict().keys()
        for name, value in alone.graph.state_dict().items():
            torch.testing.assert_close(made["state"][name], value, atol=1e-5, rtol=1e-4)
        assert [kind for kind, _ in made["kinds"]] == [type(part).__name__ for part in alone.graph.modules()]
        assert not any(changed for _, changed in made["kinds"][1:])  # a graph has a ``forward`` of its own
        heldout = [entry[2:] for entry in made["curve"]]
        assert heldout == [pytest.approx(tuple(entry)[2:], abs=1e-4) for entry in alone.facts[Tuning].curve]


class TwoHeaded(nn.Module):
    """Scores, where the brighter half is, and beside it a count that no gradient reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.scores = nn.Linear(64, 16), nn.Linear(16, 4)
        self.place, self.level = nn.Linear(16, 3), nn.Linear(16, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Scores ``(N, 4)``, places ``(N, 3)``, counts ``(N,)``."""
        h = self.body(x.flatten(1)).relu()
        return {"scores": self.scores(h), "place": self.place(h), "count": (self.level(h) > 0).sum(1)}


def two_headed() -> Program:
    graphs = []
    for seed in range(2):
        torch.manual_seed(seed)
        graphs.append(fx.symbolic_trace(TwoHeaded().eval()))
    return Program(graphs[0], (torch.zeros(2, 1, 8, 8),), graphs[1], Task(train=data(labelled=False)))


def _two_heads(rank: int, port: int, out: str) -> None:
    """A process of a run over gloo."""
    import os

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    torch.save(replace(FAST, augment="none").run(two_headed()).graph.state_dict(), f"{out}/{rank}.pt")


def test_every_output_learns_and_what_no_gradient_reaches_stays() -> None:
    start, x = two_headed(), data().batch(range(320)).inputs[0]
    alone = replace(FAST, augment="none").run(start)
    with torch.no_grad():
        wanted = start.dense(x)
        lost = [[F.mse_loss(p.graph(x)[key], wanted[key]) for p in (start, alone)] for key in ("scores", "place")]
    assert all(after < 0.8 * before for before, after in lost), lost
    for name in ("level.weight", "level.bias"):
        assert torch.equal(alone.graph.get_parameter(name), start.graph.get_parameter(name))


@pytest.mark.slow
def test_several_outputs_learn_in_two_processes_as_in_one(tmp_path: Path, free_port: int) -> None:
    alone = replace(FAST, augment="none").run(two_headed())
    torch.multiprocessing.spawn(_two_heads, (free_port, str(tmp_path)), nprocs=2)
    for rank in range(2):
        made = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in alone.graph.state_dict().items():
            torch.testing.assert_close(made[name], value, atol=1e-4, rtol=1e-3)


LAYERED = "score{by=none},propose{decompose=channel+svd},choose,factorize"


def _interrupted_in_two(rank: int, port: int, out: str) -> None:
    """A process of a run over gloo that is interrupted in its third epoch, and goes on."""
    import os

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    tune, before = replace(SHARED, epochs=3, outputs=1.0), layered().with_(workspace=Path(out))
    interrupted(tune, before, step=23)
    steps, tuned = steps_of(tune, before)
    torch.save((steps, tuned.graph.state_dict()), f"{out}/{rank}.pt")


def layered() -> Program:
    dense = sharable().graph
    return Pipeline.parse(LAYERED).run(sharable().with_(dense=dense, graph=dense, budget=Budget(macs=0.7)))


@pytest.mark.slow
def test_two_processes_with_the_losses_of_layers_go_on_from_their_state(tmp_path: Path, free_port: int) -> None:
    torch.multiprocessing.spawn(_interrupted_in_two, (free_port, str(tmp_path)), nprocs=2)
    alone = replace(SHARED, epochs=3, outputs=1.0).run(layered()).graph.state_dict()
    for rank in range(2):
        steps, made = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert steps == list(range(19, 28))
        for name, value in alone.items():
            torch.testing.assert_close(made[name], value, atol=1e-4, rtol=1e-3)


def _judged_alike(rank: int, port: int, out: str) -> None:
    """Like ``_one_of_two``, with dropout that each process draws for its own half, rates tried, and patience."""
    import os

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    tuned = Finetune(epochs=4, batch=32, holdout=0.2, trial=3, patience=1).run(program(data()))
    done = tuned.facts[Tuning]
    torch.save({"state": tuned.graph.state_dict(), "curve": [tuple(e) for e in done.curve]}, f"{out}/{rank}.pt")


@pytest.mark.slow
def test_two_processes_decide_alike_which_rate_which_epoch_and_when_to_stop(tmp_path: Path, free_port: int) -> None:
    torch.multiprocessing.spawn(_judged_alike, (free_port, str(tmp_path)), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert [entry[2:] for entry in one["curve"]] == [entry[2:] for entry in other["curve"]]
    for name, value in one["state"].items():
        torch.testing.assert_close(other["state"][name], value)


@pytest.mark.parametrize(("epochs", "rate"), [(0.5, "0.00075"), (1, "0.00075"), (4, "0.0015"), (16, "0.0025")])
def test_of_the_rates_tried_that_with_the_least_held_out_loss_is_taken_higher_for_longer_runs(
    monkeypatch: pytest.MonkeyPatch, epochs: float, rate: str
) -> None:
    tried, real = [], finetune.Trainer

    def trainer(graph: fx.GraphModule, *given: object) -> object:
        settings = next(value for value in given if isinstance(value, Settings))
        made = real(graph, *given)  # type: ignore[arg-type]
        if epochs > 1 and f"{Finetune.name}/trial" not in given:
            return made
        tried.append(settings.lr)
        if settings.lr > 0.005:
            monkeypatch.setattr(made, "run", lambda: (_ for _ in ()).throw(TdcompileError("it diverged")))
        else:
            loss = abs(settings.lr - 0.00075)
            done = Tuning(1, (Epoch(1, 0.0, None, loss),), rate=settings.lr)
            monkeypatch.setattr(made, "run", lambda: done)
        return made

    monkeypatch.setattr(finetune, "Trainer", trainer)
    tuned = Finetune(epochs=epochs, batch=32, holdout=0.2).run(program(data()))
    assert tried == pytest.approx([0.0075, 0.0025, 0.00075, 0.00025, 0.000075])
    assert tuned.history[-1].what.endswith(f"rate {rate}")  # type: ignore[union-attr]


def test_trials_leave_the_start_alone_and_repeat_themselves() -> None:
    form = Finetune(epochs=1, batch=32, holdout=0.2, trial=2)
    tuned = form.run(program(data()))
    assert same(tuned, form.run(program(data())))
    rate = tuned.history[-1].what.rpartition(" ")[2]  # type: ignore[union-attr]
    assert same(replace(form, lr=float(rate), trial=0).run(program(data())), tuned)


@pytest.mark.parametrize(
    ("changed", "runs"),
    [
        ({}, 5),  # the best of the five short runs is the tuning
        ({"trial": 2}, 6),  # they are shorter than it
        ({"average": 0.9}, 6),
        ({"epochs": 2}, 6),  # the rate of two epochs is higher than that of the trials
    ],
)
def test_a_tuning_as_short_as_its_trials_is_not_repeated(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, float], runs: int
) -> None:
    made, real = [], finetune.Trainer

    def trainer(*given: object) -> object:
        made.append(given)
        return real(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(finetune, "Trainer", trainer)
    form = replace(Finetune(epochs=1, batch=32, holdout=0.2), **changed)  # type: ignore[arg-type]
    tuned = form.run(program(data()))
    assert len(made) == runs
    rate = tuned.facts[Tuning].rate
    again = replace(form, lr=rate, trial=0).run(program(data()))
    assert same(again, tuned)
    assert again.facts[Tuning].curve == tuned.facts[Tuning].curve


def test_short_runs_ask_the_dense_network_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Counted(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            asked.append(len(x))
            return self.network(x)

    monkeypatch.setattr(finetune, "lower", lambda program, graph: Counted(graph))
    counts, tuned = [], []
    for room in (0, 2**28):
        monkeypatch.setattr(distillation, "_REMEMBERED_BYTES", room)
        tuned.append(Finetune(epochs=1, batch=32, holdout=0.25, trial=4).run(program(data())))
        counts.append(len(asked))
        asked.clear()
    assert same(*tuned)
    # Five short runs of 4 steps judge twice; then the tuning has 8 steps (7 are full) and judges twice.
    assert counts == [5 * (4 + 2) + 7 + 2, 4 + 2 + 7 + 2]


def test_short_runs_ask_a_dense_network_whose_layers_are_watched_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "RememberedAnswers", None)
    tuned = Finetune(epochs=1, batch=32, holdout=0.25, trial=4, outputs=1.0).run(layered())
    assert tuned.facts[Tuning].epochs == 1


def test_a_rate_that_is_given_is_taken_untried() -> None:
    tuned = Finetune(epochs=1, batch=32, holdout=0.2, lr=0.004).run(program(data()))
    assert tuned.history[-1].what.endswith("rate 0.004")  # type: ignore[union-attr]


class InPlace(nn.Module):
    """A network that normalises what it is given in place."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.sub_(0.5).div_(0.25).flatten(1))


@pytest.mark.parametrize("labelled", [True, False])
def test_the_dense_network_is_shown_what_the_compressed_one_saw(labelled: bool) -> None:
    torch.manual_seed(0)
    traced = tdcompile.trace(InPlace().eval(), (torch.zeros(2, 1, 8, 8),))
    start = traced.with_(task=Task(data(labelled=labelled)))
    after = replace(FAST, labels=0.0, lr=0.001, augment="none").run(start)
    assert abs(after.facts[Tuning].curve[-1].train_loss) < 1e-6  # it learns from itself: there is nothing to learn
    x = data().batch(range(8))
    torch.testing.assert_close(after.graph(*x.copies()), start.graph(*x.copies()), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(6, 3, 4, 4), (6, 5, 7), (6, 1), (6,)])
def test_answers_that_are_no_class_scores_are_brought_near_by_squares_over_their_energy(shape: tuple[int, ...]) -> None:
    wanted = torch.randn(shape)
    loss = Distillation(nn.Identity(), 4.0, 0.0)
    given = wanted + 100.0  # a softmax over any axis with the same everywhere would not see it
    expected = 1e4 / wanted.square().mean()
    torch.testing.assert_close(loss(given, Batch((wanted,), None)), expected)
    torch.testing.assert_close(loss(10 * given, Batch((10 * wanted,), None)), expected)
