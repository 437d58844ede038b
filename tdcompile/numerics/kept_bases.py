"""Bases of weights that have been computed for the errors of all ranks, kept for the factors of the chosen rank.

A basis is kept while there is room, and belongs to one weight and one covariance: it is forgotten if either is gone or
the weight has changed.
"""

from __future__ import annotations

import weakref

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from tdcompile.numerics.covariance import Covariance

# Bytes of all bases together. It holds those of a network of about 130 million parameters; larger ones keep a part.
ROOM = 2**28

_Key = tuple[int, int, tuple[int, ...]]


class _Kept:
    """A basis, and the weight and covariance that it belongs to, without keeping these alive."""

    def __init__(self, weight: Tensor, covariance: Covariance, basis: Tensor) -> None:
        self.basis = basis
        self._version = weight._version
        self._storage = StorageWeakRef(weight.untyped_storage())  # type: ignore[no-untyped-call]  # torch's own
        self._covariance = weakref.ref(covariance)

    @property
    def alive(self) -> bool:
        gone: bool = self._storage.expired()  # type: ignore[no-untyped-call]  # torch's own
        return not gone and self._covariance() is not None

    def fits(self, weight: Tensor, covariance: Covariance) -> bool:
        return self.alive and self._version == weight._version and self._covariance() is covariance


_kept: dict[_Key, _Kept] = {}


def keep(weight: Tensor, covariance: Covariance, basis: Tensor | None) -> None:
    """Keep a basis, unless there is no room for it.

    Args:
        weight: the layer's own weight; it is not copied, and a change of it makes the basis void.
        covariance: of the layer's input; known by identity, not by value.
        basis: of ``low_rank_spectrum``, with a column for each rank that may be asked for; None keeps nothing.
    """
    for key in [key for key, entry in _kept.items() if not entry.alive]:
        del _kept[key]
    if basis is None or weight.is_inference():
        return
    _kept.pop(_key(weight), None)
    if sum(entry.basis.nbytes for entry in _kept.values()) + basis.nbytes <= ROOM:
        _kept[_key(weight)] = _Kept(weight, covariance, basis)


def take(weight: Tensor, covariance: Covariance, rank: int) -> Tensor | None:
    """Return the basis that is kept for a weight and a covariance, and forget it; None if it is not there.

    A basis of fewer columns than ``rank`` is no basis for that rank.
    """
    if weight.is_inference():
        return None
    entry = _kept.pop(_key(weight), None)
    if entry is None or not entry.fits(weight, covariance) or entry.basis.shape[1] < rank:
        return None
    return entry.basis


def _key(weight: Tensor) -> _Key:
    return weight.untyped_storage()._cdata, int(weight.storage_offset()), tuple(weight.shape)
