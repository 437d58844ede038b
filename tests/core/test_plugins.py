"""The public imports of plug-in authors, and passes as objects in a pipeline."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import tdcompile
from tdcompile import passes, plugins
from tdcompile.core.pipeline import Pipeline
from tdcompile.core.plugin import Plugin
from tdcompile.core.registry import find
from tdcompile.errors import InputError
from tdcompile.passes import Calibrate, Choose, Factorize, Propose, Score
from tdcompile.support.options import describe, types_of
from tdcompile.support.spec import parse_spec


def test_every_name_of_the_page_of_imports_is_there_and_listed_once_in_order() -> None:
    assert all(hasattr(plugins, name) for name in plugins.__all__)
    assert list(plugins.__all__) == sorted(set(plugins.__all__))
    public = {name for name in vars(plugins) if not name.startswith("_")} - {"annotations"}
    assert public == set(plugins.__all__)


def test_the_passes_that_can_be_imported_are_those_that_ship() -> None:
    shipped = {
        kind.__name__: kind for kind in find(plugins.Pass).values() if kind.__module__.startswith("tdcompile.passes.")
    }
    assert list(passes.__all__) == sorted(shipped)
    assert {name: getattr(passes, name) for name in passes.__all__} == shipped
    assert set(passes.__all__) <= set(dir(passes))
    with pytest.raises(ImportError, match="Calibrat"):
        exec("from tdcompile.passes import Calibrat")


def test_importing_the_folder_of_passes_imports_none_of_them() -> None:
    code = "import sys, tdcompile.passes; sys.exit('torch' in sys.modules or 'tdcompile.passes.rewrite' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_number_among_the_options_that_ship_declares_its_range() -> None:
    families: list[type[Plugin]] = [plugins.Pass, plugins.Decomposition, plugins.RankSelector, plugins.Importance]
    families += [plugins.CostModel, plugins.Network]
    found = [kind for family in families for kind in find(family).values()]
    shipped = [kind for kind in found if kind.__module__.startswith("tdcompile.")]
    described = {(kind.name, option): describe(type_) for kind in shipped for option, type_ in types_of(kind).items()}
    assert described["rehearse", "rounds"] == "a whole number of at least 1"
    assert described["finetune", "lr"] == "a finite number above 0 or none"
    unlimited = {"a number", "a whole number", "a number or none", "a whole number or none"}
    assert not [option for option, words in described.items() if words in unlimited]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rehearse{rounds=0}", "rounds=0 must be a whole number of at least 1"),
        ("rehearse{aim=1.5}", r"aim=1.5 must be a share in \(0, 1\]"),
        ("baseline{seconds=inf}", "seconds=inf must be a finite number of at least 0"),
        ("rene{reach=nan}", "reach=nan must be a finite number above 0"),
        ("finetune{epochs=inf}", "epochs=inf must be a finite number above 0"),
        ("propose{decompose=tucker2{sweeps=-1}}", "sweeps=-1 must be a whole number of at least 0"),
    ],
)
def test_a_number_out_of_its_range_is_refused_before_any_work(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Pipeline.parse(text)
    assert Pipeline.parse("finetune{clip=inf},choose{by=knapsack{time_limit=inf}}").steps


def test_a_pipeline_of_objects_is_that_of_its_text_and_runs() -> None:
    pipeline = Pipeline([Calibrate(), Score(by="none"), Propose(), Choose(by="knapsack"), parse_spec("factorize")])
    assert pipeline == Pipeline.parse(str(pipeline))
    assert pipeline.steps[-1] == Factorize()
    network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)).eval()
    program = tdcompile.trace(network, (torch.randn(2, 3, 8, 8),)).with_(budget=tdcompile.Budget(macs=0.6))
    after = pipeline.run(program)
    assert plugins.RankPlan in after.facts


@pytest.mark.parametrize(
    ("steps", "said"),
    [([Calibrate], r"put the object Calibrate\(\)"), ("calibrate,score", r"Pipeline\.parse"), ([3], "not 3")],
)
def test_a_step_that_is_no_pass_is_refused(steps: list[object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Pipeline(steps)  # type: ignore[arg-type]
