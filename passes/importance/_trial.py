"""``Trial``: what a layer's weight becomes when a plain form of it keeps a share of its weights, to score layers by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tdcompile.core.decomposition import Decomposition, relative_error
from tdcompile.core.registry import make
from tdcompile.errors import InputError
from tdcompile.ir.measurements import input_covariance
from tdcompile.ir.program import Program, Site, sites
from tdcompile.numerics.covariance import Covariance
from tdcompile.planning.rank_grid import ranks_for

FORMS = ("tucker2", "svd", "grouped")  # convolutions, layers of one tap, and those in groups
_TOLD = 1e-4  # a smaller error is rounding, and nothing can be told from it


@dataclass(frozen=True)
class Trial:
    """One layer, approximated.

    Attributes:
        weight: W̃, of the shape of its weight.
        error: relative, of the layer's output if there is calibration data, else of its weight.
    """

    site: Site
    weight: Tensor
    error: float

    @contextmanager
    def applied(self) -> Iterator[None]:
        """While it lasts, the layer has that weight."""
        own = self.site.module.weight
        self.site.module.weight = nn.Parameter(self.weight.to(self.site.weight), requires_grad=False)
        try:
            yield
        finally:
            self.site.module.weight = own


@torch.no_grad()
def trials(
    program: Program, share: float, forms: tuple[str, ...] = FORMS, largest: int | None = None
) -> Mapping[str, Trial]:
    """A trial for each layer that one of the forms applies to, the first that does.

    Args:
        share: of the layer's weights that is kept; of a layer that loses nothing by it half as much, and again.
        forms: decompositions in their text form.
        largest: layers whose weight (T x CK) has more rows and columns than that are left out.

    Raises:
        InputError: the share is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise InputError(f"share={share:g} is not in (0, 1]: 0.5 keeps half of a layer's weights")
    known = [make(Decomposition, form) for form in forms]
    made = {}
    for name, site in sites(program).items():
        form = next((form for form in known if form.refuse(site.layer) is None), None)
        if form is None or (largest is not None and min(site.weight.flatten(1).shape) > largest):
            continue
        made[name] = _trial(site, form, share, input_covariance(program.facts, name, site.weight))
    return made


def _trial(site: Site, form: Decomposition, share: float, covariance: Covariance) -> Trial:
    ranks = ranks_for(form, site.layer, share)
    factors = form.factorize(site.layer, site.weight, ranks, covariance)
    weight = form.reconstruct(site.layer, factors)
    error = relative_error(site.weight, weight, covariance)
    if error < _TOLD and max(ranks) > 1:
        return _trial(site, form, share / 2, covariance)
    return Trial(site, weight, error)
