"""Candidates for every layer, importances, and the plan: a decomposition and its ranks for each layer.

The room is the core, not ``ir``: a plan holds decompositions, and the core defines their contract.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import BeforeValidator, Field, PlainSerializer, PlainValidator, StrictInt, ValidationError
from torch import Tensor

from tdcompile.core.decomposition import Decomposition
from tdcompile.core.registry import make
from tdcompile.core.serialization import fact_from_plain, fact_to_plain
from tdcompile.errors import InputError, first_line, nearest
from tdcompile.ir.diagnostics import Diagnostic, DiagnosticCode, Reason
from tdcompile.ir.facts import Aspect, Fact
from tdcompile.ir.layer import Layer, Ranks
from tdcompile.ir.target import Cost, Precision, total
from tdcompile.numerics.covariance import Covariance
from tdcompile.support.spec import Spec

FORMAT = 1  # the format of plan files
# The keys of a plan file, in order.
_KEYS = ("format", "precision", "selector", "gap", "rewrites", "dense", "predicted", "layers", "reasons")
_LEFT_OUT = {"rewrites": (), "precision": "fp32"}  # keys that a file has only if they differ from this


@dataclass(frozen=True)
class Dense(Decomposition):
    """The layer itself: no ranks, and nothing is lost.

    It has no registered name, so that no option can propose it: every layer has it as a candidate anyway.
    """

    def spec(self) -> Spec:
        """The text in files and messages: ``dense``."""
        return Spec("dense")

    def refuse(self, layer: Layer) -> None:
        """Accept every layer."""

    def exact_ranks(self, layer: Layer) -> Ranks:
        """Return no ranks."""
        return ()

    def rank_space(self, layer: Layer, grain: int) -> Sequence[Ranks]:
        """Return the one choice of no ranks."""
        return [()]

    def blueprint(self, layer: Layer, ranks: Ranks) -> tuple[Layer, ...]:
        """Return the layer."""
        return (layer,)

    def factorize(self, layer: Layer, weight: Tensor, ranks: Ranks, covariance: Covariance) -> tuple[Tensor, ...]:
        """Return the weight."""
        return (weight,)

    def reconstruct(self, layer: Layer, factors: Sequence[Tensor]) -> Tensor:
        """Return the weight."""
        return factors[0]


DENSE = Dense()


def _text(form: Decomposition) -> str:
    return str(form.spec())


def _form(value: object) -> Decomposition:
    """Read the text form of a decomposition.

    Raises:
        ValueError: it is not a text.
        InputError: there is no such decomposition.
    """
    if isinstance(value, Decomposition):
        return value
    if not isinstance(value, str):
        raise ValueError(f"a decomposition is a text, not {value!r}")
    return DENSE if value == _text(DENSE) else make(Decomposition, value)


def _reasons_to_plain(reasons: Mapping[str, Reason]) -> dict[str, dict[str, str]]:
    return {name: {"layer": name, "code": reason.code, "reason": reason.text} for name, reason in reasons.items()}


def _reasons_from_plain(value: object) -> object:
    """Read the entries of a file; reasons that are objects already stay.

    Raises:
        ValueError: an entry has other keys than ``layer``, ``code`` and ``reason``.
    """
    if not isinstance(value, Mapping):
        return value
    return {name: entry if isinstance(entry, Reason) else _reason(entry) for name, entry in value.items()}


def _reason(entry: Any) -> Reason:
    if not isinstance(entry, Mapping) or set(entry) != {"layer", "code", "reason"}:
        raise ValueError(f"a reason has the keys 'layer', 'code' and 'reason', not {entry!r}")
    return Reason(entry["code"], entry["reason"])


@dataclass(frozen=True)
class Candidate:
    """A choice for one layer.

    Attributes:
        decomposition: ``DENSE`` leaves the layer as it is. In files it is a text.
        ranks: the ranks of the decomposition; none for ``DENSE``.
        error: relative error of the layer's output, ‖(W−W̃)S^½‖/‖W S^½‖ (S = identity without calibration data).
        cost: the sum over all calls of the layer.
        modes: what each rank truncates: ``out``, ``in`` or ``""`` (see ``Decomposition.modes``).
    """

    decomposition: Annotated[Decomposition, PlainValidator(_form), PlainSerializer(_text, return_type=str)]
    ranks: tuple[StrictInt, ...] = ()
    error: float = 0.0
    cost: Cost = field(default_factory=Cost)
    modes: tuple[str, ...] = ()

    @classmethod
    def dense(cls, cost: Cost, error: float = 0.0) -> Candidate:
        """Return the candidate that leaves the layer dense."""
        return cls(DENSE, (), error, cost)

    @property
    def is_dense(self) -> bool:
        """Whether the layer stays dense."""
        return self.decomposition == DENSE

    @cached_property
    def form(self) -> str:
        """The text form of the decomposition; ``dense`` for ``DENSE``."""
        return _text(self.decomposition)


def dense_of(options: Iterable[Candidate]) -> Candidate:
    """Return the dense candidate of a layer."""
    return next(option for option in options if option.is_dense)


def decompositions_of(options: Iterable[Candidate]) -> list[Candidate]:
    """Return the candidates of a layer that replace it, in their order."""
    return [option for option in options if not option.is_dense]


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one unfolding of a weight, ``rows`` x ``columns``, largest first."""

    values: tuple[float, ...]
    rows: int
    columns: int


@dataclass(frozen=True)
class Candidates(Fact):
    """The candidates of all layers.

    Attributes:
        layers: the candidates of each layer; exactly one of them is dense.
        rest: cost of the network outside these layers.
        spectra: for each layer, the spectra of its weight's unfoldings ``out`` (T x CK) and ``in`` (C x TK).
        reasons: why a layer has no candidate but dense, by the layer's name.
        precision: number format that the costs are for.
        reference: cost of the dense network in fp32, of which budgets are shares; None if it is ``dense``.
    """

    reads: ClassVar[frozenset[Aspect]] = frozenset({Aspect.TOPOLOGY, Aspect.WEIGHTS})
    layers: Mapping[str, tuple[Candidate, ...]]
    rest: Cost
    spectra: Mapping[str, Mapping[str, Spectrum]] = field(default_factory=dict)
    reasons: Mapping[str, Reason] = field(default_factory=dict)
    precision: Precision = "fp32"
    reference: Cost | None = None

    @property
    def dense(self) -> Cost:
        """The cost of the dense network in the candidates' precision."""
        return self.cost({})

    @property
    def whole(self) -> Cost:
        """The cost of the dense network in fp32: budgets are shares of it."""
        return self.dense if self.reference is None else self.reference

    def cost(self, choices: Mapping[str, Candidate]) -> Cost:
        """Return the cost of the network with these choices; a layer without a choice is dense."""
        chosen = (choices.get(name) or dense_of(options) for name, options in self.layers.items())
        return self.rest + total([choice.cost for choice in chosen])


@dataclass(frozen=True)
class FloatCandidates(Fact):
    """The candidates in fp32 beside those of another precision, for ``choose`` to choose from.

    Attributes:
        candidates: None if they are not wanted, or if none of them meets the budget.
        none_meets: whether the cheapest exceed the budget.
    """

    reads: ClassVar[frozenset[Aspect]] = Candidates.reads
    candidates: Candidates | None = None
    none_meets: bool = False


@dataclass(frozen=True)
class PrecisionChoice(Fact):
    """Why ``choose`` took the candidates of one of two precisions; empty without a choice."""

    told: str = ""

    def diagnostics(self) -> Sequence[Diagnostic]:
        """Return the reason."""
        return [Diagnostic("info", DiagnosticCode.PRECISION, self.told)] if self.told else []


@dataclass(frozen=True)
class Importances(Fact):
    """The harm of an error in each layer to the network, relative to other layers; 1.0 if unknown."""

    reads: ClassVar[frozenset[Aspect]] = frozenset({Aspect.TOPOLOGY, Aspect.WEIGHTS})
    scores: Mapping[str, float]
    score: str = "none"


@dataclass(frozen=True)
class RankPlan(Fact):
    """A choice for every layer.

    Attributes:
        choices: the chosen candidate of each layer, dense ones included.
        predicted: predicted cost of the compressed network.
        dense: cost of the dense network in fp32.
        selector: text form of the selector that chose.
        gap: relative optimality gap that the solver proved; None if none was computed.
        reasons: why a layer stays dense, by the layer's name.
        rewrites: text forms of the exact passes that rewrote the network before the choice; a network that takes the
            plan is rewritten by them too.
        precision: number format of the compiled model.
    """

    choices: Annotated[Mapping[str, Candidate], Field(alias="layers")]
    predicted: Cost = field(default_factory=Cost)
    dense: Cost = field(default_factory=Cost)
    selector: str = ""
    gap: float | None = None
    reasons: Annotated[
        Mapping[str, Reason], BeforeValidator(_reasons_from_plain), PlainSerializer(_reasons_to_plain)
    ] = field(default_factory=dict)
    rewrites: tuple[str, ...] = ()
    precision: Precision = "fp32"

    def to_json(self) -> str:
        """Return text for ``from_json``. A person can edit it: change ``decomposition`` or ``ranks`` of a layer."""
        document = {"format": FORMAT, **fact_to_plain(self)}
        keys = [key for key in _KEYS if key not in _LEFT_OUT or getattr(self, key) != _LEFT_OUT[key]]
        return json.dumps({key: document[key] for key in keys}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "the plan") -> RankPlan:
        """Read a plan. Each layer needs ``decomposition`` and its ``ranks``; everything else is optional.

        Args:
            text: JSON, see ``to_json``.
            source: the origin of the text, for messages.

        Raises:
            InputError: the text is not JSON, has another format or an unknown key, or names an unknown decomposition.
        """
        try:
            document = json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
            if not isinstance(document, dict) or not isinstance(document.get("layers"), dict):
                raise InputError(_no_plan(source, "it has no table 'layers'"))
            _check_keys(document, _KEYS, source)
            if (written := document.pop("format", FORMAT)) != FORMAT:
                raise InputError(f"{source} is a plan of format {written!r}: this version reads {FORMAT}")
            for name, entry in document["layers"].items():
                if not isinstance(entry, Mapping):
                    raise InputError(_no_plan(source, f"the layer '{name}' is no table: {entry!r}"))
                _check_keys(entry, Candidate.__dataclass_fields__, f"{source}, layer '{name}',")
            return fact_from_plain(cls, document)
        except ValidationError as error:
            first = error.errors()[0]
            raise InputError(_no_plan(source, f"{'.'.join(map(str, first['loc']))}: {first['msg']}")) from error
        except json.JSONDecodeError as error:
            raise InputError(_no_plan(source, f"it is not JSON: {error}")) from error
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise InputError(_no_plan(source, first_line(error))) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of JSON.

    Raises:
        ValueError: a key is given twice; Python would keep the last one.
    """
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"'{next(key for key in keys if keys.count(key) > 1)}' is given twice")
    return made


def _constant(text: str) -> float:
    """Read ``Infinity``, which a solver without a bound leaves as its gap.

    Raises:
        ValueError: it is ``NaN``.
    """
    if text == "NaN":
        raise ValueError("NaN is no figure of a plan")
    return float(text)


def _no_plan(source: str, why: str) -> str:
    example = '{"layers": {NAME: {"decomposition": "tucker2", "ranks": [32, 16]}}}'
    return f"{source} is not a plan: {why}; expected {example}"


def _check_keys(entry: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    for key in sorted(entry.keys() - set(known)):
        raise InputError(f"{where} has a key '{key}' that no plan has: {nearest(key, known)}")


def within(cost: Cost, limits: Mapping[str, float]) -> bool:
    """Return whether a cost is within limits by field name, up to rounding."""
    return all(getattr(cost, name) <= limit * (1 + 1e-9) for name, limit in limits.items())


def pareto(options: Sequence[Candidate], fields: Sequence[str]) -> list[Candidate]:
    """Return the dense candidate and all that no other candidate beats in error and in every named field of cost.

    Args:
        options: the candidates of one layer; the order of those that are not dense does not matter.
        fields: names of ``Cost`` fields.
    """

    def figures(candidate: Candidate) -> tuple[float, ...]:
        return (candidate.error, *(getattr(candidate.cost, name) for name in fields))

    rest = sorted(decompositions_of(options), key=lambda option: (figures(option), option.form, option.ranks))
    kept = [dense_of(options)]
    table = np.empty((len(options), 1 + len(fields)))  # one comparison with all kept: a layer has hundreds of options
    table[0] = figures(kept[0])
    for option in rest:
        table[len(kept)] = figures(option)
        if not (table[: len(kept)] <= table[len(kept)]).all(axis=1).any():
            kept.append(option)
    return kept
