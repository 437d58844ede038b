"""What every registered pass promises."""

import pytest

from tdcompile.core.passes import AnalysisPass, Pass, RewritePass, TunePass
from tdcompile.core.pipeline import Pipeline
from tdcompile.core.registry import find
from tdcompile.ir.facts import Aspect, Fact

PASSES = find(Pass)


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_is_of_one_kind_and_declares_what_it_does(name):
    step = PASSES[name]
    assert sum(issubclass(step, kind) for kind in (AnalysisPass, RewritePass, TunePass)) == 1
    assert all(issubclass(fact, Fact) for fact in (*step.needs, *step.gives))
    assert all(isinstance(aspect, Aspect) for aspect in step.touches)
    assert bool(step.gives) or not issubclass(step, AnalysisPass), "an analysis pass that learns nothing"
    assert not step.touches or not issubclass(step, AnalysisPass), "an analysis pass touches nothing"
    assert Aspect.TOPOLOGY not in step.touches or not issubclass(step, TunePass)
    assert step.summary().endswith(".")


@pytest.mark.parametrize("name", PASSES)
def test_the_text_form_reads_back(name):
    pipeline = Pipeline([PASSES[name]()])
    assert Pipeline.parse(str(pipeline)) == pipeline


def test_an_unmet_need_is_found_before_any_work():
    from tdcompile.errors import InputError

    with pytest.raises(InputError, match="needs Candidates"):
        Pipeline.parse("score,choose").check()
    with pytest.raises(InputError, match="did you mean 'factorize'"):
        Pipeline.parse("factorise")
    with pytest.raises(InputError, match="'choose' needs Importances"):
        Pipeline.parse("score,drop-dead,propose,choose").check()  # what a rewrite touches is no longer known
