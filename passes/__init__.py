"""The plug-ins that ship, one folder for each kind; the classes of all passes can be imported from here.

``from tdcompile.passes import Calibrate, Factorize`` gives the classes to put into a ``Pipeline`` as objects. They are
imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for editors and type checkers; at run time the registry finds the classes
    from tdcompile.passes.analyze.baseline import MeasureBaseline
    from tdcompile.passes.analyze.calibrate import Calibrate
    from tdcompile.passes.analyze.choose import Choose
    from tdcompile.passes.analyze.export_dense import ExportDense
    from tdcompile.passes.analyze.propose import Propose
    from tdcompile.passes.analyze.reach import Reach
    from tdcompile.passes.analyze.rehearse import Rehearse
    from tdcompile.passes.analyze.rene import Rene
    from tdcompile.passes.analyze.score import Score
    from tdcompile.passes.analyze.search import Search
    from tdcompile.passes.analyze.synthesize import Synthesize
    from tdcompile.passes.rewrite.attach_adapters import AttachAdapters
    from tdcompile.passes.rewrite.detach_dense import DetachDense
    from tdcompile.passes.rewrite.drop_dead import DropDead
    from tdcompile.passes.rewrite.factorize import Factorize
    from tdcompile.passes.rewrite.fold_batchnorm import FoldBatchnorm
    from tdcompile.passes.rewrite.gauge import Gauge
    from tdcompile.passes.rewrite.transpose_spatial import TransposeSpatial
    from tdcompile.passes.tune.anneal import Anneal
    from tdcompile.passes.tune.finetune import Finetune
    from tdcompile.passes.tune.finetune_int8 import FinetuneInt8
    from tdcompile.passes.tune.recalibrate import Recalibrate
    from tdcompile.passes.tune.refit import Refit

__all__ = [
    "Anneal",
    "AttachAdapters",
    "Calibrate",
    "Choose",
    "DetachDense",
    "DropDead",
    "ExportDense",
    "Factorize",
    "Finetune",
    "FinetuneInt8",
    "FoldBatchnorm",
    "Gauge",
    "MeasureBaseline",
    "Propose",
    "Reach",
    "Recalibrate",
    "Refit",
    "Rehearse",
    "Rene",
    "Score",
    "Search",
    "Synthesize",
    "TransposeSpatial",
]


def __getattr__(name: str) -> object:
    if name not in __all__:  # among others the folders, which Python asks for before it imports them
        raise AttributeError(f"module 'tdcompile.passes' has no attribute '{name}'")
    from tdcompile.core.passes import Pass
    from tdcompile.core.registry import find

    return next(kind for kind in find(Pass).values() if kind.__name__ == name and kind.__module__.startswith(__name__))


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
