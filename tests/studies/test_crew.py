"""Where cells are measured: Ray, played by a module that sends all through pickles, as its processes do."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import tdcompile
from tdcompile.data.task import Task, Tensors
from tdcompile.errors import InputError, TdcompileError
from tdcompile.ir.target import Target
from tdcompile.studies import crew
from tdcompile.studies.cell import Bench, Point, Subject
from tdcompile.studies.findings import Cell
from tdcompile.support.process_pool import LazyValues

GRID: dict[str, Any] = {"methods": ("tucker2", "tt"), "compressions": (0.5, 0.9), "layers": ("0", "2")}
POINTS = [Point(layer, "tt", share, 0) for layer in ("0", "2") for share in (0.5, 0.9)]


class RayError(Exception):
    pass


class RayTaskError(RayError):
    """What ``ray.get`` raises where a task has failed: of the cause's class too, and with the cause in it."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(f"in another process: {cause}")
        self.cause = cause


@dataclass(frozen=True)
class Reference:
    number: int


@dataclass
class Cluster:
    """Does the work of ``ray`` in this process, when it is asked for; the last task given is the first one ready."""

    running: bool = False
    told: list[dict[str, Any]] = field(default_factory=list)  # what ``init`` was told
    stops: int = 0
    fetched: list[int] = field(default_factory=list)  # numbers of what was put and then got
    put_there: dict[int, bytes] = field(default_factory=dict)
    tasks: dict[int, Callable[[], Any]] = field(default_factory=dict)
    cancelled: list[int] = field(default_factory=list)

    def module(self) -> ModuleType:
        made = ModuleType("ray")
        made.exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)  # type: ignore[attr-defined]
        for name in ("init", "is_initialized", "shutdown", "put", "remote", "wait", "get", "cancel"):
            setattr(made, name, getattr(self, name))
        return made

    def init(self, **options: Any) -> None:
        assert not self.running
        self.told.append(options)
        self.running = True

    def is_initialized(self) -> bool:
        return self.running

    def shutdown(self) -> None:
        self.running = False
        self.stops += 1

    def put(self, value: object) -> Reference:
        assert self.running
        self.put_there[len(self.put_there)] = pickle.dumps(value)
        return Reference(len(self.put_there) - 1)

    def remote(self, **options: Any) -> Callable[[Callable[..., Any]], Any]:
        assert options == {"num_cpus": 1}
        return lambda work: SimpleNamespace(remote=partial(self.start, work))

    def start(self, work: Callable[..., Any], *arguments: Any) -> Reference:
        assert self.running
        whole = [self.get(a) if isinstance(a, Reference) else a for a in arguments]  # but not what is in a list
        sent, number = pickle.dumps((work, whole)), 1000 + len(self.tasks)

        def run() -> Any:
            there, given = pickle.loads(sent)
            return pickle.loads(pickle.dumps(there(*given)))

        self.tasks[number] = run
        return Reference(number)

    def wait(self, references: Sequence[Reference]) -> tuple[list[Reference], list[Reference]]:
        *others, last = references
        return [last], others

    def cancel(self, reference: Reference, *, force: bool) -> None:
        assert self.running
        assert force  # or a cell that is being measured goes on
        self.cancelled.append(reference.number)

    def get(self, reference: Reference) -> Any:
        assert self.running
        if reference.number in self.put_there:
            self.fetched.append(reference.number)
            return pickle.loads(self.put_there[reference.number])
        try:
            return self.tasks[reference.number]()
        except MemoryError:
            raise RayError("the worker died") from None
        except Exception as error:  # noqa: BLE001  # Ray wraps whatever a task raises
            both = type(f"RayTaskError({type(error).__name__})", (RayTaskError, type(error)), {})
            raise both(error) from None


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A cluster that is not running, in Ray's place; what it changes in this process is put back."""
    cluster, threads = Cluster(), torch.get_num_threads()
    monkeypatch.setitem(sys.modules, "ray", cluster.module())
    monkeypatch.setattr(crew, "BENCHES", LazyValues())
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(os.getcwd())
    yield cluster
    torch.set_num_threads(threads)


def subject(seed: int = 0) -> tuple[nn.Sequential, torch.Tensor, Task]:
    """A network and its data, random both: what is looked at are equal figures, not good ones."""
    torch.manual_seed(seed)
    layers = (nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x, labels = torch.randn(60, 3, 6, 6), torch.arange(60) % 8
    task = Task(Tensors(x[:20], labels[:20]), Tensors(x[20:], labels[20:]), calibrate=16, source="random")
    return nn.Sequential(*layers).eval(), x[:2], task


def bench(seed: int = 0) -> Bench:
    module, inputs, task = subject(seed)
    return Bench(Subject(module, (inputs,), task), "none", Target())


def refused(self: Bench, point: Point, key: str) -> Cell:
    raise InputError("the samples of 'random' are gone")


def timeless(cells: Sequence[Any]) -> list[dict[str, Any]]:
    return [cell.model_dump(exclude={"seconds"}) for cell in cells]


def test_ray_finds_what_is_found_in_turn(ray: Cluster) -> None:
    alone = tdcompile.study(*subject(), **GRID)
    seen: list[Any] = []
    there = tdcompile.study(*subject(), jobs=3, ray=True, told=lambda done, of, cell: seen.append(cell), **GRID)
    assert len(alone.cells) == 8
    assert timeless(there.cells) == timeless(alone.cells)
    assert there.taus == alone.taus
    assert timeless(seen) == timeless(alone.cells)[::-1]  # told as they are finished, found in the grid's order
    assert ray.fetched == [0]  # the network is sent once, not for each cell
    assert len(ray.tasks) == 8
    assert (ray.running, ray.stops) == (False, 1)


def test_a_process_of_rays_that_has_worked_for_one_study_measures_the_next_ones_network(ray: Cluster) -> None:
    ray.running = True  # so that its processes stay
    work = [(point, "k") for point in POINTS]
    first, second = (list(crew.over_ray(partial(bench, seed), work, 1)) for seed in (0, 1))
    assert timeless(first[::-1]) == timeless(list(crew.in_turn(bench(0), work)))
    assert timeless(second[::-1]) == timeless(list(crew.in_turn(bench(1), work)))
    assert timeless(first) != timeless(second)
    assert ray.fetched == [0, 1]


@pytest.mark.parametrize("running", [False, True], ids=["ours", "another's"])
@pytest.mark.parametrize("end", ["whole", "left", "failed"])
def test_only_what_we_have_started_is_shut_down(
    ray: Cluster, monkeypatch: pytest.MonkeyPatch, running: bool, end: str
) -> None:
    ray.running = running
    if end == "failed":
        monkeypatch.setattr(Bench, "measure", refused)
    outcomes = crew.over_ray(bench, [(POINTS[0], "k"), (POINTS[1], "l")], 1)
    if end == "failed":
        with pytest.raises(InputError):
            next(outcomes)
    else:
        next(outcomes)
        assert ray.running
    if end == "left":
        outcomes.close()  # type: ignore[attr-defined]  # it is a generator
    assert len(list(outcomes)) == (end == "whole")
    assert (ray.running, ray.stops) == ((True, 0) if running else (False, 1))
    assert ray.cancelled == ([1000] if running and end != "whole" else [])  # what another's cluster would still do


def test_an_error_in_a_cell_is_raised_as_itself(ray: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bench, "measure", refused)
    with pytest.raises(InputError, match=r"^the samples of 'random' are gone$") as raised:
        list(crew.over_ray(bench, [(POINTS[0], "k")], 1))
    assert type(raised.value) is InputError
    assert isinstance(raised.value.__cause__, RayTaskError)  # where it happened is not lost


def test_a_process_that_died_is_told_in_a_sentence(ray: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(self: Bench, point: Point, key: str) -> Cell:
        raise MemoryError

    monkeypatch.setattr(Bench, "measure", dies)
    with pytest.raises(TdcompileError, match=r"a process of the study died.*--resume"):
        list(crew.over_ray(bench, [(POINTS[0], "k")], 1))
    assert ray.stops == 1


def test_a_cell_that_fails_costs_no_other(ray: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = Bench.measure

    def diverging(self: Bench, point: Point, key: str) -> Cell:
        if point == POINTS[1]:
            raise TdcompileError("finetune diverged")
        return measure(self, point, key)

    monkeypatch.setattr(Bench, "measure", diverging)
    outcomes = list(crew.over_ray(bench, [(point, "k") for point in POINTS], 1))
    assert [isinstance(one, Cell) for one in outcomes] == [True, True, False, True]
    assert outcomes[2].model_dump().items() >= {"reason": "finetune diverged", "compression": 0.9}.items()


@pytest.mark.parametrize("address", ["", "10.0.0.7:6379"])
def test_the_cluster_is_the_one_that_is_named_and_else_one_of_this_machine(
    ray: Cluster, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    list(crew.over_ray(bench, [(POINTS[0], "k")], 3))
    (told,) = ray.told
    assert {key: told[key] for key in ("address", "num_cpus") if key in told} == (
        {} if address else {"address": "local", "num_cpus": 3}
    )
