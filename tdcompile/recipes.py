"""``Recipe``: the options of a compilation, read from defaults, then a TOML file, then flags."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, TypedDict

from pydantic import ValidationError
from torch import Tensor

from tdcompile.core.passes import Pass
from tdcompile.core.pipeline import Pipeline
from tdcompile.core.plan import RankPlan
from tdcompile.core.rank_selector import RankSelector
from tdcompile.core.registry import find, get, only
from tdcompile.data.class_names import read_class_names
from tdcompile.data.loading import Given, given, load_data
from tdcompile.data.network_input import SampleFields
from tdcompile.data.synthetic import NAME as SYNTHETIC
from tdcompile.data.synthetic import split_synthetic
from tdcompile.data.task import Task
from tdcompile.errors import InputError, nearest
from tdcompile.ir.onnx_format import OnnxFormat
from tdcompile.ir.target import LEAST, UNLIMITED, AskedPrecision, Budget, Device, Goal, Precision, Target
from tdcompile.planning.plan_file import read_plan
from tdcompile.recipe_options import Frontend, RecipeOptions, budget_of
from tdcompile.support.allowed_drop import AllowedDrop
from tdcompile.support.spec import Spec, parse_options, parse_spec, parse_specs

SHIPPED = "recipes.toml"
_TRAINED_STREAM = 20_000  # samples that are read of a stream if a pass trains
_PLANNING = ("decompose", "ranks", "importance", "grain", "goal")  # the options that decide a plan
_PIPELINE = (*_PLANNING, "tune", "plan")  # the options that decide a pipeline
_OF_STEPS = ("decompose", "importance", "ranks", "goal")  # the options that a pipeline in text form states itself
_PASSED_ON = ("grain", "jobs")  # the options that are passed on to every pass that has them
# Options that change no result of a pass, or that the program itself holds: the network, its inputs, a given plan.
_WITHOUT_EFFECT = {
    *("source", "weights", "input", "example", "plan"),
    *("max_drop", "min_speedup", "eval", "jobs", "metadata", "labels"),
}


# Epochs of tuning that run through the rounding of int8: a fifth, at most one. LSQ (Esser et al. 2020, section 3.1)
# trains 8-bit networks for one epoch and finds that more do not help.
_INT8_EPOCHS, _INT8_SHARE = 1.0, 0.2


# pydantic's words for values, and the words of a recipe.
_WORDS = {"a valid tuple": "a list", "a valid dictionary": "a table"}


class CompileOptions(TypedDict, total=False):
    """The keyword options of ``tdcompile.compile``, as fields of ``Recipe``; objects may replace their text forms."""

    source: str | None
    dynamic_batch: bool
    batch_axis: str | Sequence[str]
    dynamic: str | Sequence[str]
    opset: int | None
    ir: int | None
    output_names: str | Sequence[str]
    metadata: Mapping[str, str]
    labels: str | Path | Sequence[str] | None
    frontend: Frontend
    normalize: str
    calibrate: int
    eval: int | None
    target: Device
    precision: AskedPrecision
    threads: int
    grain: int | None
    budget: str | Mapping[str, float] | Budget
    goal: Goal | None
    decompose: str | Sequence[str]
    ranks: str
    importance: str
    plan: str | Path | RankPlan | None
    tune: str | None
    keep_dense: str | Sequence[str]
    keep_fp32: str | Sequence[str]
    max_drop: float | str | None
    task: str | None
    loss: str | Callable[..., Any] | None
    metric: Any
    output: str | int | None
    targets: str | None
    tokenizer: str | None
    min_speedup: float | None
    pipeline: str | Pipeline | None
    jobs: int
    seed: int


class Recipe(RecipeOptions):
    """All options of a compilation, and the budget, target, data and pipeline that they describe."""

    def shares(self) -> Budget:
        """Return the budget; that of a goal lets what it makes least be as large as in the dense network.

        Raises:
            InputError: the budget limits nothing, and the pipeline makes a plan.
        """
        limited = self._limited()
        if not limited and any(RankPlan in step.gives for step in self.steps().steps):
            raise InputError(UNLIMITED)
        return budget_of(limited)

    def _limited(self) -> Mapping[str, float]:
        return self.budget if self.goal is None else {LEAST[self.goal]: 1.0, **self.budget}

    def deciding(self) -> dict[str, Any]:
        """Return the options that decide the results of the passes, by name, as JSON values."""
        return self.model_dump(mode="json", exclude=_WITHOUT_EFFECT - ({"max_drop"} if self.goal else set()))

    def device(self) -> Target:
        """Return the target; the precision ``auto`` stands for int8, beside which fp32 is considered."""
        precision: Precision = "int8" if self.precision == "auto" else self.precision
        return Target(device=self.target, threads=self.threads, grain=self.grain, precision=precision)

    def onnx(self) -> OnnxFormat:
        """Return the versions and output names of the ONNX models.

        Raises:
            InputError: an output name is empty or given twice.
        """
        return OnnxFormat(self.opset, self.ir, self.output_names)

    def class_names(self) -> tuple[str, ...]:
        """Return the class names, read from their file if ``labels`` names one.

        Raises:
            InputError: the file cannot be used.
        """
        return read_class_names(Path(self.labels)) if isinstance(self.labels, str) else self.labels or ()

    def make_task(self, data: Task | Given, inputs: Sequence[Tensor], names: Sequence[str]) -> Task:
        """Make a task of data, for a network with these example inputs and their names; keep that of a ``Task``.

        Raises:
            InputError: the data cannot be read, or do not fit the input (``data.given``); or ``normalize`` has no
                effect.
            UnavailableError: a package that reads the data is missing.
        """
        asked = {"kind": self.task, "loss": self.loss, "metric": self.metric, "output": self.output}
        chosen = {name: value for name, value in asked.items() if value is not None}
        if isinstance(data, Task):
            return replace(data, **chosen)
        fields = self._fields(inputs, names)
        synthetic, test = split_synthetic(data)
        if synthetic:
            return replace(self._synthetic(synthetic, test, fields), **chosen)
        first = inputs[0]
        train, test = given(data, tuple(first.shape[1:]), self.normalize, self.seed, first.dtype, fields)
        source = data if isinstance(data, str) else "none" if train is None else "given"
        return Task(train, test, self.calibrate, self.eval, source, **chosen)

    def _fields(self, inputs: Sequence[Tensor], names: Sequence[str]) -> SampleFields:
        """Return how samples are told apart for example inputs with these names."""
        # Without training, a stream is read for calibration and for a part that is held out.
        needed = _TRAINED_STREAM if self.steps().trainer else self.calibrate + self.calibrate // 4
        limits = {"stream": needed, **({"stream_test": self.eval} if self.eval else {})}
        return SampleFields.of(tuple(inputs), tuple(names), targets=self.targets, tokenizer=self.tokenizer, **limits)

    def _synthetic(self, asked: str, test: Any, fields: SampleFields) -> Task:
        """Return a task whose training samples are still to be made, by the pass ``synthesize``."""
        step = parse_spec(asked.replace(SYNTHETIC, "synthesize", 1))
        get(Pass, step.name).from_options(step.options)
        if test is None and self.normalize != "none":
            raise InputError(
                f"'normalize' has no effect on the data '{asked}', which are made as the network takes them: leave out "
                f"'{self.normalize}'"
            )
        shape, dtype = fields.inputs[0].shape, fields.inputs[0].dtype
        if isinstance(test, str):
            _, judged = load_data(test, shape, self.normalize, self.seed, dtype, fields)
            if judged is None:
                raise InputError(f"the data '{test}' have no test samples to judge by beside '{asked}'")
        elif test is not None:
            _, judged = given((None, test), shape, self.normalize, self.seed, dtype, fields)
        else:
            judged = None
        return Task(None, judged, self.calibrate, self.eval, asked, synthetic=str(step))

    def steps(self) -> Pipeline:
        """Return the pipeline that the options describe.

        Raises:
            InputError: a pass, plug-in or option is unknown, or an option has no effect beside another.
        """
        if self.pipeline is not None:
            return Pipeline(map(self._passed_on, self._adapted(parse_specs(self.pipeline))))
        latency = "latency" in self._limited()
        parts = ["transpose-spatial", "baseline"] if latency else []
        if self.plan is None:
            chosen = "" if "auto" in self.decompose else "+".join(self.decompose)
            options = {"decompose": chosen} if chosen else {}
            parts += [f"reach{{decompose={chosen}}}" if chosen else "reach"]
            options |= {"spectra": "true"} if get(RankSelector, parse_spec(self.ranks).name).needs_spectra else {}
            options |= {"also_fp32": "true"} if self.precision == "auto" else {}
            written = ",".join(f"{key}={value}" for key, value in options.items())
            parts += [
                "calibrate",
                f"score{{by={self.importance}}}",
                f"propose{{{written}}}" if written else "propose",
            ]
            planning = [f"choose{{by={self.ranks}}}", *(["rehearse"] if latency else [])]
            parts += planning if self.goal is None else [self._search()]
        else:
            if idle := [name for name in _PLANNING if self._is_set(name)]:
                raise InputError(f"'{idle[0]}' has no effect beside a plan: leave it out")
            parts += ["calibrate"]
        parts += ["factorize", "recalibrate", "refit"]
        tuners: list[Spec] = []
        if self.tune is not None and self.tune != "none":
            tuner = Spec(only(Pass, "fine_tunes").name, parse_options(self.tune))
            tuners = [*_with_int8(tuner)] if self._may_be_int8() else [tuner]
        steps = [*parse_specs(",".join(parts)), *tuners[:1], *parse_specs("fold-batchnorm,drop-dead"), *tuners[1:]]
        return Pipeline(map(self._passed_on, steps))

    def _may_be_int8(self) -> bool:
        """Return whether the compiled network may be in int8; a plan decides if no precision is asked for."""
        if self.plan is None or ("precision" in self.model_fields_set and self.precision != "auto"):
            return self.precision in ("int8", "auto")
        try:
            return read_plan(self.plan).precision == "int8"
        except InputError:  # raised again where the plan is used
            return False

    def _search(self) -> str:
        """Return the pass that searches for the goal.

        Raises:
            InputError: there is no limit on the loss of quality.
        """
        if self.max_drop is None:
            raise InputError(f"goal={self.goal} needs a limit on the loss of quality: give --max-drop, e.g. 1 point")
        return f"search{{goal={self.goal},max_drop={AllowedDrop.parse(self.max_drop)},by={self.ranks}}}"

    def _adapted(self, steps: list[Spec]) -> list[Spec]:
        """Apply ``tune`` to a pipeline that the user gave, and refuse the options that have no effect beside it.

        A plan has no effect if the pipeline makes one; a grain has none if the pipeline does not propose.

        Raises:
            InputError: the pipeline itself decides an option, or it has no pass that trains.
        """
        for name in _OF_STEPS:
            if self._is_set(name):
                step = " or ".join(f"{kind.name}{{{kind.takes[name]}=…}}" for kind in _taking(name))
                raise InputError(
                    f"'{name}' has no effect beside the pipeline '{self.pipeline}', which names its passes: "
                    f"leave it out, or write it into your own pipeline as {step}"
                )
        kinds = {step.name: get(Pass, step.name) for step in steps}
        if self.plan is not None and (made := [name for name, kind in kinds.items() if RankPlan in kind.gives]):
            raise InputError(f"'plan' has no effect beside the pipeline '{self.pipeline}', whose '{made[0]}' makes one")
        if self.grain is not None and not any("grain" in kind.takes for kind in kinds.values()):
            takers = " or ".join(f"'{kind.name}'" for kind in _taking("grain"))
            raise InputError(f"'grain' has no effect beside the pipeline '{self.pipeline}', which does not {takers}")
        if self.tune is None:
            return steps
        trainers = [step for step in steps if kinds[step.name].trains]
        if self.tune == "none":
            optional = [step for step in trainers if kinds[step.name].fine_tunes or kinds[step.name].fine_tunes_int8]
            if needed := [step.name for step in trainers if step not in optional]:
                raise InputError(
                    f"tune=none: the pipeline '{self.pipeline}' does not work without its training, '{needed[0]}'"
                )
            return [step for step in steps if step not in trainers]
        if not trainers:
            raise InputError(
                f"tune={self.tune}: the pipeline '{self.pipeline}' has no pass that trains: "
                f"add {only(Pass, 'fine_tunes').name}{{…}}"
            )
        options = parse_options(self.tune)
        tuned = [step for step in trainers if not kinds[step.name].fine_tunes_int8] or trainers
        return [replace(step, options={**step.options, **options}) if step in tuned else step for step in steps]

    def _passed_on(self, step: Spec) -> Spec:
        """Add the grain and the jobs to a step that has these options and does not set them itself."""
        taken = {field.name for field in fields(get(Pass, step.name))} - set(step.options)
        asked = {name: str(getattr(self, name)) for name in _PASSED_ON if self._is_set(name)}
        return replace(step, options={**step.options, **{key: asked[key] for key in asked if key in taken}})

    def _is_set(self, name: str) -> bool:
        return bool(getattr(self, name) != Recipe.model_fields[name].default)


def _with_int8(tuner: Spec) -> tuple[Spec, Spec]:
    """Split the epochs of tuning between the pass that fine-tunes and the one that does so through rounding.

    The second gets the options that both have, except its own rate.
    """
    options = {key.replace("-", "_"): value for key, value in tuner.options.items()}
    epochs = float(vars(get(Pass, tuner.name).from_options(options))["epochs"])
    rounded = min(_INT8_EPOCHS, _INT8_SHARE * epochs)
    kind = only(Pass, "fine_tunes_int8")
    shared = {field.name for field in fields(kind)} & options.keys() - {"lr"}
    common = {key: options[key] for key in options if key in shared}
    return (
        replace(tuner, options={**options, "epochs": str(epochs - rounded)}),
        Spec(kind.name, {**common, "epochs": str(rounded)}),
    )


def _taking(option: str) -> list[type[Pass]]:
    """Return the passes that apply an option of a recipe."""
    return [kind for kind in find(Pass).values() if option in kind.takes]


def recipes() -> dict[str, dict[str, Any]]:
    """Return the shipped recipes by name, each with a ``description`` and options."""
    return tomllib.loads(resources.files("tdcompile").joinpath(SHIPPED).read_text())


def load_recipe(name: str | None, overrides: Mapping[str, Any]) -> Recipe:
    """Make a recipe of the defaults, then the named recipe, then overrides.

    Args:
        name: the name of a shipped recipe, a TOML file, or None.
        overrides: options that were given explicitly.

    Raises:
        InputError: there is no such recipe, an option is unknown, or a value does not fit.
    """
    return _recipe({**not_replaced({} if name is None else _read(name), overrides), **overrides})


def _recipe(options: dict[str, Any]) -> Recipe:
    options = {key: value for key, value in options.items() if key != "description"}
    if options.get("plan") is not None or options.get("goal") is not None:
        options.setdefault("budget", {})
    for key in options:
        if key not in Recipe.model_fields:
            raise InputError(f"a recipe has no option '{key}': {nearest(key, Recipe.model_fields)}")
    try:
        return Recipe(**options)
    except ValidationError as error:
        first = error.errors()[0]
        where, why = ".".join(map(str, first["loc"])), first["msg"].replace("Input should be", "it should be")
        for found, plain in _WORDS.items():
            why = why.replace(found, plain)
        form = ", e.g. { macs = 0.5 }" if where == "budget" else ""
        raise InputError(f"the option '{where}' cannot be {first.get('input')!r}: {why}{form}") from error


def not_replaced(known: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a recipe that overrides leave in force: a pipeline or a plan replaces what decides it."""
    given = {name for name in ("pipeline", "plan") if overrides.get(name) is not None}
    replaced = (*(_PIPELINE if "pipeline" in given else ()), *(_PLANNING if "plan" in given else ()))
    return {key: value for key, value in known.items() if key not in replaced}


def _read(name: str) -> dict[str, Any]:
    if not name.endswith(".toml"):
        shipped = recipes()
        if name not in shipped:
            raise InputError(f"there is no recipe '{name}': {nearest(name, shipped)}; a file ends in .toml")
        return dict(shipped[name])
    try:
        document = tomllib.loads(Path(name).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"the recipe {name} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"the recipe {name} is not UTF-8: {error.reason} at byte {error.start}") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"the recipe {name} is not TOML: {error}") from error
    options = {key.replace("-", "_"): value for key, value in document.items()}
    try:
        _recipe(options).steps()
    except InputError as error:
        raise InputError(f"the recipe {name}: {error}") from error
    return options
