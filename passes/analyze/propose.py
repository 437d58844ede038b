"""``propose``: the candidates of each layer: decompositions and ranks, with their errors and costs."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from tdcompile.core.cost_model import CostModel
from tdcompile.core.decomposition import Decomposition, reading
from tdcompile.core.passes import AnalysisPass
from tdcompile.core.plan import (
    DENSE,
    Candidate,
    Candidates,
    FloatCandidates,
    Spectrum,
    decompositions_of,
    dense_of,
)
from tdcompile.core.registry import find, make, registered
from tdcompile.errors import TdcompileError, during
from tdcompile.ir.diagnostics import Reason, ReasonCode
from tdcompile.ir.facts import Fact
from tdcompile.ir.layer import Layer, Ranks
from tdcompile.ir.measurements import Baseline, input_covariance
from tdcompile.ir.program import Program, Site, kept_dense, parameters_of, sites
from tdcompile.ir.target import Cost, Precision, total
from tdcompile.numerics.covariance import Covariance
from tdcompile.numerics.low_rank import gram
from tdcompile.passes.analyze._layer_prices import Spaces, chain_of, cost_of, grain_of, prices_of, spaces_of
from tdcompile.planning.allocation import lowest_shares, out_of_reach
from tdcompile.planning.quantization_error import combined, quantization_error
from tdcompile.support.form_seconds import FormSeconds
from tdcompile.support.options import Count, Workers
from tdcompile.support.process_pool import parallel_map
from tdcompile.support.progress import report_progress

# Candidates may cost this share of dense: prices are measured, and a layer may cost less inside the graph.
_MARGIN = 1.1

# Codes of refusals that say that another form may fit the layer.
_FOR_ANOTHER = (
    ReasonCode.KIND,
    ReasonCode.KERNEL,
    ReasonCode.POINTWISE,
    ReasonCode.TRANSPOSED,
    ReasonCode.GROUPED,
    ReasonCode.UNGROUPED,
)

_Draft = tuple[Ranks, Cost]
_Known = dict[str, dict[Decomposition, dict[Ranks, float]]]  # errors of approximation by layer, form and ranks
_Work = tuple[Decomposition, Layer, Tensor, Sequence[Ranks], Covariance]

log = logging.getLogger("tdcompile")


@dataclass(frozen=True)
class _Search:
    """The ranks of one layer whose errors are wanted.

    Attributes:
        name: the layer.
        drafts: for each form, ranks and their costs.
        fields: the limited fields of ``Cost``.
        known: errors that are known already, by form and ranks.
    """

    name: str
    layer: Layer
    weight: Tensor
    covariance: Covariance
    drafts: Mapping[Decomposition, Sequence[_Draft]]
    fields: Sequence[str]
    known: Mapping[Decomposition, Mapping[Ranks, float]]


@dataclass(frozen=True)
class _Found:
    """Errors of one form in one layer.

    Attributes:
        errors: an error for each of the ranks, or its lower bound if the ranks were not searched.
        searched: number of ranks whose error is known.
        new: the errors that were computed, by ranks.
        seconds: processor seconds that it took.
    """

    errors: Sequence[float]
    searched: int
    new: Mapping[Ranks, float]
    seconds: float


@dataclass(frozen=True)
class Propose(AnalysisPass):
    """Propose candidates for all layers.

    Attributes:
        decompose: text forms of the decompositions to consider; all if empty.
        grain: ranks are multiples of it; none means the target's grain under a latency budget and 1 otherwise.
        cost: cost model for parameters and multiply-accumulates.
        timer: cost model for seconds; used under a latency budget only.
        jobs: number of processes that compute errors.
        spectra: whether to compute the singular values of every weight, for selectors that need them.
        also_fp32: whether to propose candidates in fp32 too, beside those of a target in another precision.
    """

    name: ClassVar[str] = "propose"
    takes: ClassVar[Mapping[str, str]] = {"decompose": "decompose", "grain": "grain"}
    gives: ClassVar[tuple[type[Fact], ...]] = (Candidates, FloatCandidates)
    decompose: tuple[Annotated[str, registered(Decomposition)], ...] = ()
    grain: Count | None = None
    cost: Annotated[str, registered(CostModel)] = "analytic"
    timer: Annotated[str, registered(CostModel)] = "measured"
    spectra: bool = False
    also_fp32: bool = False
    jobs: Workers = 1

    def analyze(self, program: Program) -> tuple[Candidates, FloatCandidates]:
        """Price all candidates, then compute the errors of those worth their price.

        Candidates in fp32 beside those of the target's precision have the same errors of approximation, which are
        computed once. There are none if the cheapest of them exceed the budget.

        Raises:
            TdcompileError: a decomposition returns a wrong number of errors, or one that is NaN or negative.
        """
        forms = [make(Decomposition, text) for text in self.decompose or find(Decomposition)]
        found, main = sites(program), program.target.precision
        kept = kept_dense(program, found)
        grain = grain_of(program, self.grain)
        spaces = {name: {} if name in kept else spaces_of(site, forms, grain, main) for name, site in found.items()}
        kept |= {name: _refused(found[name], forms) for name in found if not spaces[name] and name not in kept}
        spectra = {name: _spectra(found[name]) for name in found if self.spectra and name not in kept}
        known: _Known = {name: {} for name in found}
        made = self._priced(program, found, spaces, main)
        candidates = replace(self._with_errors(program, found, made, known), spectra=spectra, reasons=kept)
        if not self.also_fp32 or main == "fp32":
            return candidates, FloatCandidates(None)
        made = self._priced(program, found, spaces, "fp32")
        if out_of_reach(lowest_shares(made, program.budget), program.budget) is not None:
            return candidates, FloatCandidates(None, none_meets=True)
        floats = replace(self._with_errors(program, found, made, known), spectra=spectra, reasons=kept)
        return candidates, FloatCandidates(floats)

    def _priced(
        self, program: Program, found: Mapping[str, Site], spaces: Mapping[str, Spaces], precision: Precision
    ) -> Candidates:
        """Return the candidates in a precision, without their errors."""
        prices = prices_of(program, found, spaces, (self.cost, self.timer), precision)
        dense = {name: cost_of(site.calls, prices[name], site) for name, site in found.items()}
        options = {}
        for name, site in found.items():
            drafts = self._drafts(program, site, spaces[name], dense[name], prices[name])
            made = (Candidate(f, ranks, cost=c, modes=f.modes) for f, own in drafts.items() for ranks, c in own)
            options[name] = (Candidate.dense(dense[name]), *made)
        known = total(list(dense.values()))
        whole, baseline = self._whole(program, known), program.facts.get(Baseline)
        if precision == "fp32" or baseline is None:
            return Candidates(options, rest=whole - known, precision=precision)
        own = replace(whole, seconds=baseline.at(precision)[1])
        return Candidates(options, rest=own - known, precision=precision, reference=whole)

    def _with_errors(
        self, program: Program, found: Mapping[str, Site], priced: Candidates, known: _Known
    ) -> Candidates:
        """Return the candidates with their errors; int8 adds its own to that of the approximation.

        Args:
            program: gives the covariances.
            found: the layers by name.
            priced: the candidates.
            known: errors of approximation; those that are computed are added.
        """
        searches = parallel_map(_search, self._searches(program, found, priced, known), self.jobs)
        options: dict[str, tuple[Candidate, ...]] = {}
        spent, left = FormSeconds(self.name), Counter[str]()
        for done, (name, site) in enumerate(found.items(), start=1):
            report_progress(done, len(found), name)
            results, made = next(searches), list[Candidate]()
            rounded = priced.precision == "int8" and name not in program.keep_fp32
            noise = _Noise(program, site) if rounded else _no_noise
            for form, drafted in _by_form(priced.layers[name]).items():
                result = results[form]
                known[name].setdefault(form, {}).update(result.new)
                spent.add(form.name, result.seconds, len(result.new))
                left[form.name] += len(drafted) - result.searched
                made += [
                    replace(draft, error=combined(error, noise(form, draft.ranks)))
                    for draft, error in zip(drafted, result.errors, strict=True)
                ]
            spent.layer_done(name)
            options[name] = (replace(dense_of(priced.layers[name]), error=noise(DENSE, ())), *made)
        spent.all_done()
        for form_name, ranks_left in (+left).items():
            log.debug("propose: %d ranks of %s are not searched: other forms are surely better", ranks_left, form_name)
        return replace(priced, layers=options)

    def _drafts(
        self,
        program: Program,
        site: Site,
        spaces: Mapping[Decomposition, Sequence[Ranks]],
        dense: Cost,
        prices: Mapping[Layer, Cost],
    ) -> dict[Decomposition, list[_Draft]]:
        """Return the ranks and costs of every decomposition that may pay off, and its exact ranks.

        Selectors never choose a candidate that costs more than the dense layer, and errors are expensive. The exact
        ranks always stay: selectors read from them how far ranks go.
        """
        fields, made = list(program.budget.limits(dense)), {}
        for form, space in spaces.items():
            costs = [cost_of(chain_of(site, form, ranks), prices, site) for ranks in space]
            last = len(space) - 1
            made[form] = [
                (ranks, cost)
                for place, (ranks, cost) in enumerate(zip(space, costs, strict=True))
                if _worth(cost, dense, fields) or place == last
            ]
        return made

    def _searches(
        self, program: Program, found: Mapping[str, Site], priced: Candidates, known: _Known
    ) -> Iterator[_Search]:
        for name, site in found.items():
            covariance = input_covariance(program.facts, name, site.weight)
            options = priced.layers[name]
            fields = list(program.budget.limits(dense_of(options).cost))
            drafts = {form: [(c.ranks, c.cost) for c in own] for form, own in _by_form(options).items()}
            yield _Search(name, site.layer, site.weight, covariance, drafts, fields, known[name])

    def _whole(self, program: Program, dense: Cost) -> Cost:
        """Return the cost of the dense network: all its parameters, and its measured latency if known."""
        baseline = program.facts.get(Baseline)
        return Cost(
            params=parameters_of(program.graph),
            macs=dense.macs,
            bytes=dense.bytes,
            seconds=baseline.seconds if baseline else dense.seconds,
        )


@dataclass(frozen=True)
class _Noise:
    """What int8 adds to the error of a layer, by form and ranks; the number of parts decides."""

    program: Program
    site: Site

    def __call__(self, form: Decomposition, ranks: Ranks) -> float:
        return self._of(len(form.blueprint(self.site.layer, ranks)))

    @cached_property
    def _of(self) -> Callable[[int], float]:
        covariance = input_covariance(self.program.facts, self.site.name, self.site.weight)
        return cache(partial(quantization_error, self.site.weight, covariance))


def _no_noise(form: Decomposition, ranks: Ranks) -> float:
    return 0.0


def _by_form(options: Sequence[Candidate]) -> dict[Decomposition, list[Candidate]]:
    """Return the candidates that replace a layer, by form, in their order."""
    found: dict[Decomposition, list[Candidate]] = {}
    for option in decompositions_of(options):
        found.setdefault(option.decomposition, []).append(option)
    return found


def _search(search: _Search) -> dict[Decomposition, _Found]:
    """Return the errors of all forms; those of a form with bounds only where no other form is known to be better.

    A candidate that is not searched has its lower bound as error. Another candidate has no larger error at no higher
    cost, so that the choice of a plan does not miss it.
    """
    found: dict[Decomposition, _Found] = {}
    known: list[tuple[float, Cost]] = []
    bounded = [form for form in search.drafts if type(form).error_bounds is not Decomposition.error_bounds]
    for form in (*(form for form in search.drafts if form not in bounded), *bounded):
        drafts, begun = search.drafts[form], time.process_time()
        errors = _bounds(search, form) if form in bounded and drafts else [0.0] * len(drafts)
        places = [i for i, (_, cost) in enumerate(drafts) if not _beaten(errors[i], cost, known, search.fields)]
        earlier, new = search.known.get(form, {}), dict[Ranks, float]()
        wanted = [drafts[i] for i in places if drafts[i][0] not in earlier]
        if wanted:
            ranks = [ranks for ranks, _ in wanted]
            made = _errors((form, search.layer, search.weight, ranks, search.covariance))
            new = dict(zip(ranks, _checked(made, form, search.name, wanted), strict=True))
        held = {**earlier, **new}
        for place in places:
            errors[place] = held[drafts[place][0]]
        known += [(error, cost) for error, (_, cost) in zip(errors, drafts, strict=True)]
        found[form] = _Found(errors, len(places), new, time.process_time() - begun)
    return found


def _bounds(search: _Search, form: Decomposition) -> list[float]:
    drafts = search.drafts[form]
    told = f"in the decomposition {form.told()}, the error bounds of a layer {search.layer.weight_shape}"
    with during(told), reading(form, search.weight):
        made = form.error_bounds(search.layer, search.weight, [ranks for ranks, _ in drafts], search.covariance)
    return _checked(made, form, search.name, drafts)


def _beaten(bound: float, cost: Cost, known: Sequence[tuple[float, Cost]], fields: Sequence[str]) -> bool:
    """Return whether a known candidate of less error than the bound costs no more in any limited field."""
    return any(
        error < bound and all(getattr(other, field) <= getattr(cost, field) for field in fields)
        for error, other in known
    )


def _errors(work: _Work) -> Sequence[float]:
    form, layer, weight, space, covariance = work
    told = f"in the decomposition {form.told()}, the errors of a layer {layer.weight_shape}"
    with during(told), reading(form, weight):
        return form.errors(layer, weight, space, covariance)


def _checked(errors: Sequence[float], form: Decomposition, name: str, kept: Sequence[_Draft]) -> list[float]:
    """Return the errors of a layer as floats, one for each of the ranks; infinite ones rule the ranks out.

    Raises:
        TdcompileError: their number is wrong, or one is NaN or negative.
    """
    with during(f"in the decomposition {form.told()}, the errors of the layer '{name}'"):
        found = [float(error) for error in errors]
    if len(found) != len(kept):
        raise TdcompileError(
            f"the decomposition '{form.spec()}' gave {len(found)} errors for '{name}': expected {len(kept)}, one for "
            "each of the given ranks"
        )
    for (ranks, _), error in zip(kept, found, strict=True):
        if not error >= 0:
            raise TdcompileError(
                f"the decomposition '{form.spec()}' gave {error} for '{name}' at ranks {ranks}: expected an error >= 0"
            )
    return found


def _worth(cost: Cost, dense: Cost, fields: Sequence[str]) -> bool:
    """Return whether a cost is below the dense one, or near it, in any limited field."""
    return any(getattr(cost, field) < _MARGIN * getattr(dense, field) for field in fields)


def _refused(site: Site, forms: Sequence[Decomposition]) -> Reason:
    """Return one reason for a layer that every form refuses: the first of the commonest code.

    A reason of the kind "another form may fit" is used only if there is no other.
    """
    reasons = [refusal for form in forms if (refusal := form.refuse(site.layer)) is not None]
    if not reasons:
        return Reason(ReasonCode.NO_RANKS, "its ranks are below the grain: it is too small to be split")
    reasons = [refusal for refusal in reasons if refusal.code not in _FOR_ANOTHER] or reasons
    codes = [refusal.code for refusal in reasons]
    return max(reasons, key=lambda reason: codes.count(reason.code))


def _spectra(site: Site) -> dict[str, Spectrum]:
    """Return the singular values of the unfoldings ``out`` (T x CK) and ``in`` (C x TK) of a weight."""
    weight = site.weight if site.weight.dtype is torch.float64 else site.weight.float()
    out = _spectrum(weight.flatten(1))
    if site.layer.pointwise:  # the two unfoldings are one matrix and its transpose
        return {"out": out, "in": Spectrum(out.values, out.columns, out.rows)}
    return {"out": out, "in": _spectrum(weight.transpose(0, 1).flatten(1))}


def _spectrum(matrix: torch.Tensor) -> Spectrum:
    rows, columns = matrix.shape
    values = torch.linalg.eigvalsh(gram(matrix, columnwise=rows > columns)).flip(0).clamp(min=0).sqrt()
    return Spectrum(tuple(values.tolist()), rows, columns)
