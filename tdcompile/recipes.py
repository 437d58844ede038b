"""``Recipe``: everything that decides a compilation, from defaults, a shipped or own TOML file, and flags."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import fields, replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from torch import Tensor

from tdcompile.core.passes import Pass
from tdcompile.core.pipeline import Pipeline
from tdcompile.core.rank_selector import RankSelector
from tdcompile.core.registry import get
from tdcompile.core.spec import Spec, parse_options, parse_spec, parse_specs, split
from tdcompile.data.loading import Given, given
from tdcompile.data.task import Task
from tdcompile.errors import InputError, nearest
from tdcompile.ir.plan import RankPlan
from tdcompile.ir.target import UNLIMITED, Budget, Target

SHIPPED = "recipes.toml"
_OF_PIPELINE = ("decompose", "ranks", "importance", "tune", "plan", "grain")  # what a pipeline is made of
_OF_MACHINE = ("grain", "jobs")  # what a pass is told of where it works, and what for
# What changes no pass's result, or what the program itself tells: the network, its inputs, a given plan.
_OF_NO_RESULT = {"source", "weights", "input", "plan", "max_drop", "min_speedup", "eval", "jobs"}
_OF_PLAN = ("decompose", "ranks", "importance", "grain")  # what a plan is made by

_Count = Annotated[int, Field(ge=1)]
_Bound = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]  # what torch takes


class Recipe(BaseModel):
    """All options of a compilation; the names are those of the command's flags.

    A budget and a list may also be texts, as the flags have them: ``macs=0.5``, ``svd,channel``.

    Attributes:
        budget: shares of the dense cost that may be kept, by name; beside a plan the default is none.
        decompose: decompositions to consider; ``("auto",)`` is all of them.
        plan: a file with a plan, or its text.
        tune: ``none``, or options of the pass ``finetune``, e.g. ``epochs=5,lr=0.02``; of a pipeline of one's own those
            of the passes that train. None leaves such a pipeline as it is, and is ``none`` without one.
        pipeline: a pipeline of one's own in text form, in place of the one made of the options above.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str | None = None
    weights: str | None = None
    input: tuple[str, ...] = ()
    dynamic_batch: bool = True
    dynamic: tuple[str, ...] = ()
    frontend: Literal["auto", "fx", "export"] = "auto"
    data: str | None = None
    normalize: str = "none"
    calibrate: _Count = 1024
    eval: _Count | None = None
    target: Literal["cpu", "cuda"] = "cpu"
    threads: _Count = 1
    grain: _Count | None = None
    budget: Mapping[str, float] = {"latency": 0.5}
    decompose: tuple[str, ...] = ("auto",)
    ranks: str = "knapsack"
    importance: str = "auto"
    plan: str | None = None
    tune: str | None = None
    keep_dense: tuple[str, ...] = ()
    max_drop: _Bound | None = None
    min_speedup: _Bound | None = None
    pipeline: str | None = None
    jobs: _Count = 1
    seed: _Seed = 0

    @field_validator("budget", mode="before")
    @classmethod
    def _shares(cls, value: Any) -> Any:
        return Budget.parse([value]).shares if isinstance(value, str) else value

    @field_validator("budget")
    @classmethod
    def _in_range(cls, value: Mapping[str, float]) -> Mapping[str, float]:
        _budget(value)
        return value

    @field_validator("decompose", "dynamic", "keep_dense", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return tuple(split(value)) if isinstance(value, str) else value

    def shares(self) -> Budget:
        """The budget.

        Raises:
            InputError: it limits nothing and a plan is to be made.
        """
        if not self.budget and any(RankPlan in step.gives for step in self.steps().steps):
            raise InputError(UNLIMITED)
        return _budget(self.budget)

    def deciding(self) -> dict[str, Any]:
        """The options that decide what the passes do, by name, as JSON has them."""
        return self.model_dump(mode="json", exclude=_OF_NO_RESULT)

    def device(self) -> Target:
        """The target."""
        return Target(device=self.target, threads=self.threads, grain=self.grain)

    def task(self, data: Task | Given, first: Tensor) -> Task:
        """The task that data make for a network whose first input is ``first``; a ``Task`` is taken as it is.

        Raises:
            InputError: they cannot be read, or do not fit the input (``data.given``).
            UnavailableError: a package that reads them is missing.
        """
        if isinstance(data, Task):
            return data
        train, test = given(data, tuple(first.shape[1:]), self.normalize, self.seed, first.dtype)
        source = data if isinstance(data, str) else "none" if train is None else "given"
        return Task(train, test, self.calibrate, self.eval, source)

    def steps(self) -> Pipeline:
        """The pipeline that the options describe.

        Raises:
            InputError: an unknown pass, plug-in or option, or one that has no say beside another.
        """
        if self.pipeline is not None:
            return Pipeline.of(map(self._here, self._own(parse_specs(self.pipeline))))
        latency = "latency" in self.budget
        parts = ["baseline"] if latency else []
        if self.plan is None:
            chosen = "" if "auto" in self.decompose else "+".join(self.decompose)
            options = {"decompose": chosen} if chosen else {}
            options |= {"spectra": "true"} if get(RankSelector, parse_spec(self.ranks).name).needs_spectra else {}
            written = ",".join(f"{key}={value}" for key, value in options.items())
            parts += [
                "calibrate",
                f"score{{by={self.importance}}}",
                f"propose{{{written}}}" if written else "propose",
                f"choose{{by={self.ranks}}}",
            ]
            parts += ["rehearse"] if latency else []
        else:
            if idle := [name for name in _OF_PLAN if self._asked(name)]:
                raise InputError(f"'{idle[0]}' has no say beside a plan, which is made already: leave it out")
            parts += ["calibrate"]
        parts += ["factorize", "recalibrate", "refit"]
        if self.tune not in (None, "none"):
            parse_options(self.tune)
            parts += [f"finetune{{{self.tune}}}"]
        parts += ["fold-batchnorm", "drop-dead"]
        return Pipeline.of(map(self._here, parse_specs(",".join(parts))))

    def _own(self, steps: list[Spec]) -> list[Spec]:
        """A pipeline of one's own with the options that have a say in it.

        A plan has none where the pipeline makes one, and a grain none where nothing is proposed.

        Raises:
            InputError: an option that is for the pipeline to name, or tuning that it has no pass for.
        """
        for name, step in (
            ("decompose", "propose{decompose=…}"),
            ("importance", "score{by=…}"),
            ("ranks", "choose{by=…}"),
        ):
            if self._asked(name):
                raise InputError(
                    f"'{name}' has no say beside the pipeline '{self.pipeline}', which names its passes: "
                    f"leave it out, or write it into a pipeline of your own as {step}"
                )
        kinds = {step.name: get(Pass, step.name) for step in steps}
        if self.plan is not None and (made := [name for name, kind in kinds.items() if RankPlan in kind.gives]):
            raise InputError(f"'plan' has no say beside the pipeline '{self.pipeline}', whose '{made[0]}' makes one")
        if self.grain is not None and "propose" not in kinds:
            raise InputError(f"'grain' has no say beside the pipeline '{self.pipeline}', which does not 'propose'")
        if self.tune is None:
            return steps
        trainers = [step for step in steps if kinds[step.name].trains]
        if self.tune == "none":
            if bound := [step.name for step in trainers if step.name != "finetune"]:
                raise InputError(
                    f"tune=none: the pipeline '{self.pipeline}' is nothing without its training, '{bound[0]}'"
                )
            return [step for step in steps if step not in trainers]
        if not trainers:
            raise InputError(
                f"tune={self.tune}: the pipeline '{self.pipeline}' has no pass that trains; add finetune{{…}}"
            )
        options = parse_options(self.tune)
        return [replace(step, options={**step.options, **options}) if step in trainers else step for step in steps]

    def _here(self, step: Spec) -> Spec:
        """The step with the grain and the jobs asked for, where it takes them and does not name its own."""
        taken = {field.name for field in fields(get(Pass, step.name))} - set(step.options)
        asked = {name: str(getattr(self, name)) for name in _OF_MACHINE if self._asked(name)}
        return replace(step, options={**step.options, **{key: asked[key] for key in asked if key in taken}})

    def _asked(self, name: str) -> bool:
        return bool(getattr(self, name) != Recipe.model_fields[name].default)


def recipes() -> dict[str, dict[str, Any]]:
    """The shipped recipes by name, each with a ``description`` and options."""
    return tomllib.loads(resources.files("tdcompile").joinpath(SHIPPED).read_text())


def load_recipe(name: str | None, overrides: Mapping[str, Any]) -> Recipe:
    """Defaults, then a recipe, then overrides.

    Args:
        name: a shipped recipe's name, a TOML file, or None.
        overrides: options that were given explicitly.

    Raises:
        InputError: no such recipe, an unknown option (the nearest is named), or a value of the wrong kind.
    """
    return _recipe({**known_beside(_read(name) if name else {}, overrides), **overrides})


def _recipe(options: dict[str, Any]) -> Recipe:
    options = {key: value for key, value in options.items() if key != "description"}
    if options.get("plan") is not None:
        options.setdefault("budget", {})
    for key in options:
        if key not in Recipe.model_fields:
            raise InputError(f"a recipe has no option '{key}': {nearest(key, Recipe.model_fields)}")
    try:
        return Recipe(**options)
    except ValidationError as error:
        first = error.errors()[0]
        where, why = ".".join(map(str, first["loc"])), first["msg"].replace("Input should be", "it should be")
        form = ", e.g. { macs = 0.5 }" if where == "budget" else ""
        raise InputError(f"the option '{where}' cannot be {first.get('input')!r}: {why}{form}") from error


def _budget(shares: Mapping[str, float]) -> Budget:
    return Budget.parse([f"{name}={share}" for name, share in shares.items()])


def known_beside(known: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe says beside overrides: a pipeline takes the place of all that the recipe would make one of."""
    replaced = (*(_OF_PIPELINE if overrides.get("pipeline") else ()), *(_OF_PLAN if overrides.get("plan") else ()))
    return {key: value for key, value in known.items() if key not in replaced}


def _read(name: str) -> dict[str, Any]:
    if not name.endswith(".toml"):
        shipped = recipes()
        if name not in shipped:
            raise InputError(f"there is no recipe '{name}': {nearest(name, shipped)}; a file ends in .toml")
        return dict(shipped[name])
    try:
        document = tomllib.loads(Path(name).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"the recipe {name} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"the recipe {name} is not UTF-8, as TOML is: {error.reason} at byte {error.start}") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"the recipe {name} is not TOML: {error}") from error
    options = {key.replace("-", "_"): value for key, value in document.items()}
    try:
        _recipe(options).steps()
    except InputError as error:
        raise InputError(f"the recipe {name}: {error}") from error
    return options
