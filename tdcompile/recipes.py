"""``Recipe``: everything that decides a compilation, from defaults, a shipped or own TOML file, and flags."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from tdcompile.errors import InputError, nearest
from tdcompile.kinds import Pass
from tdcompile.pipeline import Pipeline
from tdcompile.ranks import RankPlan, RankSelector
from tdcompile.registry import get
from tdcompile.spec import Spec, parse_options, parse_spec, parse_specs
from tdcompile.target import Budget, Target

SHIPPED = "recipes.toml"
_OF_PIPELINE = ("decompose", "ranks", "importance", "tune", "plan", "grain")  # what a pipeline is made of


class Recipe(BaseModel):
    """All options of a compilation; the names are those of the command's flags.

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
    calibrate: int = 1024
    eval: int | None = None
    target: Literal["cpu", "cuda"] = "cpu"
    threads: int = 1
    grain: int | None = None
    budget: Mapping[str, float] = {"latency": 0.5}
    decompose: tuple[str, ...] = ("auto",)
    ranks: str = "knapsack"
    importance: str = "auto"
    plan: str | None = None
    tune: str | None = None
    keep_dense: tuple[str, ...] = ()
    max_drop: float | None = None
    min_speedup: float | None = None
    pipeline: str | None = None
    jobs: int = 1
    seed: int = 0

    def shares(self) -> Budget:
        """The budget, checked.

        Raises:
            InputError: it limits nothing, or a share is outside (0, 1].
        """
        if self.plan is not None and not self.budget:
            return Budget()
        return Budget.parse([f"{name}={share}" for name, share in self.budget.items()])

    def device(self) -> Target:
        """The target.

        Raises:
            InputError: threads, grain or jobs below 1.
        """
        for name, value in (("threads", self.threads), ("grain", self.grain), ("jobs", self.jobs)):
            if value is not None and value < 1:
                raise InputError(f"{name}={value} is below 1")
        return Target(device=self.target, threads=self.threads, grain=self.grain)

    def steps(self) -> Pipeline:
        """The pipeline that the options describe.

        Raises:
            InputError: an unknown pass, plug-in or option.
        """
        if self.pipeline is not None:
            return Pipeline.of(self._own(parse_specs(self.pipeline)))
        latency = "latency" in self.budget
        parts = ["baseline"] if latency else []
        if self.plan is None:
            chosen = "" if "auto" in self.decompose else "+".join(self.decompose)
            options = {"decompose": chosen} if chosen else {}
            options |= {"spectra": "true"} if get(RankSelector, parse_spec(self.ranks).name).needs_spectra else {}
            options |= {"grain": str(self.grain)} if self.grain else {}
            options |= {"jobs": str(self.jobs)} if self.jobs > 1 else {}
            written = ",".join(f"{key}={value}" for key, value in options.items())
            parts += [
                "calibrate",
                f"score{{by={self.importance}}}",
                f"propose{{{written}}}" if written else "propose",
                f"choose{{by={self.ranks}}}",
            ]
            parts += ["rehearse"] if latency else []
        else:
            parts += ["calibrate"]
        parts += [f"factorize{{jobs={self.jobs}}}" if self.jobs > 1 else "factorize", "recalibrate", "refit"]
        if self.tune not in (None, "none"):
            parse_options(self.tune)
            parts += [f"finetune{{{self.tune}}}"]
        parts += ["fold-batchnorm", "drop-dead"]
        return Pipeline.parse(",".join(parts))

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
            if getattr(self, name) != Recipe.model_fields[name].default:
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
        trainers = [step for step in steps if getattr(kinds[step.name], "trains", False)]
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
    options = {**known_beside(_read(name) if name else {}, overrides), **overrides}
    options.pop("description", None)
    if options.get("plan") is not None:
        options.setdefault("budget", {})
    for key in options:
        if key not in Recipe.model_fields:
            raise InputError(f"a recipe has no option '{key}': {nearest(key, Recipe.model_fields)}")
    try:
        return Recipe(**options)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"the option '{where}' cannot be {first.get('input')!r}: {first['msg']}") from error


def known_beside(known: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe says beside overrides: a pipeline takes the place of all that the recipe would make one of."""
    return {key: value for key, value in known.items() if not (overrides.get("pipeline") and key in _OF_PIPELINE)}


def _read(name: str) -> dict[str, Any]:
    if not name.endswith(".toml"):
        shipped = recipes()
        if name not in shipped:
            raise InputError(f"there is no recipe '{name}': {nearest(name, shipped)}; a file ends in .toml")
        return dict(shipped[name])
    try:
        document = tomllib.loads(Path(name).read_text())
    except OSError as error:
        raise InputError(f"the recipe {name} cannot be read: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"the recipe {name} is not TOML: {error}") from error
    return {key.replace("-", "_"): value for key, value in document.items()}
