"""Ranks: candidates for every layer, the plan chosen from them, and the contract of rank selectors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import numpy as np

from tdcompile.errors import InputError, nearest
from tdcompile.ir.diagnostics import Reason
from tdcompile.ir.facts import Aspect, Fact
from tdcompile.ir.target import Cost, total

Ranks = tuple[int, ...]
DENSE = "dense"
FORMAT = 1  # of plan files
_KEYS = ("format", "selector", "gap", "dense", "predicted", "layers", "reasons")


@dataclass(frozen=True)
class Candidate:
    """One way to compute a layer.

    Attributes:
        decomposition: a decomposition's name, or ``dense``.
        ranks: its ranks; empty for ``dense``.
        error: relative error of the layer's output, ‖(W−W̃)S^½‖/‖W S^½‖ (S = identity without calibration data).
        cost: of all calls of the layer together.
        modes: what each rank truncates: ``out``, ``in`` or ``""`` (see ``Decomposition.modes``).
    """

    decomposition: str
    ranks: Ranks
    error: float
    cost: Cost
    modes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one unfolding of a weight, ``rows`` x ``columns``, largest first."""

    values: tuple[float, ...]
    rows: int
    columns: int


@dataclass(frozen=True)
class Candidates(Fact):
    """All candidates of all layers.

    Attributes:
        layers: for each layer its candidates, dense first.
        rest: what the network costs outside these layers.
        spectra: of each layer's weight, the unfoldings ``out`` (T x CK) and ``in`` (C x TK).
        reasons: why a layer has no candidate but dense, by the layer's name.
    """

    reads: ClassVar[frozenset[Aspect]] = frozenset({Aspect.TOPOLOGY, Aspect.WEIGHTS})
    layers: Mapping[str, tuple[Candidate, ...]]
    rest: Cost
    spectra: Mapping[str, Mapping[str, Spectrum]] = field(default_factory=dict)
    reasons: Mapping[str, Reason] = field(default_factory=dict)

    @property
    def dense(self) -> Cost:
        """What the dense network costs."""
        return self.rest + total([options[0].cost for options in self.layers.values()])

    def cost(self, choices: Mapping[str, Candidate]) -> Cost:
        """What the network costs with these choices, dense where there is none."""
        return self.rest + total([choices.get(name, options[0]).cost for name, options in self.layers.items()])


@dataclass(frozen=True)
class Importances(Fact):
    """How much the network suffers from an error in each layer, relative to the others; 1.0 where nothing is known."""

    reads: ClassVar[frozenset[Aspect]] = frozenset({Aspect.TOPOLOGY, Aspect.WEIGHTS})
    scores: Mapping[str, float]
    score: str = "none"


@dataclass(frozen=True)
class RankPlan(Fact):
    """What becomes of every layer.

    Attributes:
        choices: a candidate for each layer, dense ones among them.
        predicted: what the whole network will cost.
        dense: what the dense network costs.
        selector: the text form of what chose.
        gap: relative optimality gap that the solver proved; None where none was computed.
        reasons: why a layer stays dense, by the layer's name.
    """

    choices: Mapping[str, Candidate]
    predicted: Cost
    dense: Cost
    selector: str = ""
    gap: float | None = None
    reasons: Mapping[str, Reason] = field(default_factory=dict)

    def to_json(self) -> str:
        """Text that ``from_json`` reads and a person can edit: change ``decomposition`` or ``ranks`` of a layer."""
        document = {
            "format": FORMAT,
            "selector": self.selector,
            "gap": self.gap,
            "dense": asdict(self.dense),
            "predicted": asdict(self.predicted),
            "layers": {name: asdict(choice) for name, choice in self.choices.items()},
            "reasons": {name: _written(name, reason) for name, reason in self.reasons.items()},
        }
        return json.dumps(document, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "the plan") -> RankPlan:
        """Read a plan; only ``decomposition`` and ``ranks`` of each layer are needed.

        Raises:
            InputError: it is not JSON, is of another format, or has a key that no plan has.
        """
        try:
            document = json.loads(text)
            _check_keys(document, _KEYS, source)
            if (written := document.get("format", FORMAT)) != FORMAT:
                raise InputError(f"{source} is a plan of format {written!r}: this version reads {FORMAT}")
            for name, entry in document["layers"].items():
                _check_keys(entry, Candidate.__dataclass_fields__, f"{source}, layer '{name}',")
            choices = {name: _candidate(entry) for name, entry in document["layers"].items()}
            return cls(
                choices,
                predicted=Cost(**document.get("predicted", {})),
                dense=Cost(**document.get("dense", {})),
                selector=str(document.get("selector", "")),
                gap=document.get("gap"),
                reasons={name: _reason(**entry) for name, entry in document.get("reasons", {}).items()},
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(
                f'{source} is not a plan: {error!r}; expected {{"layers": {{NAME: {{"decomposition": "tucker2", '
                '"ranks": [32, 16]}}}}'
            ) from error


def _written(layer: str, reason: Reason) -> dict[str, str]:
    return {"layer": layer, "code": reason.code, "reason": reason.text}


def _reason(layer: str, code: str, reason: str) -> Reason:
    """Read an entry of ``reasons``; a wrong or missing key is a TypeError."""
    return Reason(code, reason)


def _check_keys(entry: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    for key in sorted(entry.keys() - set(known)):
        raise InputError(f"{where} has a key '{key}' that no plan has: {nearest(key, known)}")


def _ranks(value: Any) -> Ranks:
    if not isinstance(value, list | tuple) or not all(type(rank) is int for rank in value):
        raise TypeError(f"'ranks' is a list of whole numbers, not {value!r}")
    return tuple(value)


def _candidate(entry: Mapping[str, Any]) -> Candidate:
    return Candidate(
        decomposition=str(entry["decomposition"]),
        ranks=_ranks(entry.get("ranks", ())),
        error=float(entry.get("error", 0.0)),
        cost=Cost(**entry.get("cost", {})),
        modes=tuple(entry.get("modes", ())),
    )


def within(cost: Cost, limits: Mapping[str, float]) -> bool:
    """Whether a cost keeps to limits by field name, with room for rounding."""
    return all(getattr(cost, name) <= limit * (1 + 1e-9) for name, limit in limits.items())


def pareto(options: Sequence[Candidate], fields: Sequence[str]) -> list[Candidate]:
    """The candidates that no other one beats in error and in every named field of cost; the dense one is kept.

    Args:
        options: the candidates of one layer, dense first; the order of the others does not matter.
        fields: names of ``Cost`` fields.
    """

    def figures(candidate: Candidate) -> tuple[float, ...]:
        return (candidate.error, *(getattr(candidate.cost, name) for name in fields))

    rest = sorted(options[1:], key=lambda option: (figures(option), option.decomposition, option.ranks))
    kept = [options[0]]
    table = np.empty((len(options), 1 + len(fields)))  # one comparison with all kept: a layer has hundreds of options
    table[0] = figures(options[0])
    for option in rest:
        table[len(kept)] = figures(option)
        if not (table[: len(kept)] <= table[len(kept)]).all(axis=1).any():
            kept.append(option)
    return kept
