"""``--goal``: the smallest or fastest network whose loss of quality on samples set aside is within the limit."""

import pytest
import torch
from torch import nn

import tdcompile
from tdcompile.backend.evaluation import evaluate_graph
from tdcompile.core.hooks import Hook
from tdcompile.core.plan import Candidates, RankPlan
from tdcompile.data.task import Task, Tensors
from tdcompile.errors import BudgetError, InputError
from tdcompile.ir.measurements import GoalSearch
from tdcompile.ir.target import LEAST
from tdcompile.passes.tune.recalibrate import Recalibrate
from tdcompile.recipes import Recipe, load_recipe

X = torch.randn(1, 3, 8, 8)
FEW = ("svd", "channel")  # forms whose errors cost little


def network(classes=5):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, classes)).eval()


def samples(count, seed, *, labelled=True):
    """Images of random colours; a label is what the dense network answers."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 8, 8, generator=draw) + 2 * torch.randn(count, 3, 1, 1, generator=draw)
    with torch.no_grad():
        return Tensors(x, network()(x).argmax(1), 5) if labelled else Tensors(x)


class Last(Hook):
    """Keeps the program that each pass returned."""

    def __init__(self):
        self.programs = {}

    def finished(self, step, program, seconds):
        self.programs[step.name] = program


def found(**options):
    watch = Last()
    data = options.pop("data", (samples(600, 1), samples(300, 2)))
    options = {"goal": "smallest", "max_drop": 8, "decompose": FEW, **options}
    return tdcompile.compile(network(), X, data=data, watch=watch, **options), watch.programs


def searched(net=None, **options):
    """Search without an export; return what was found, and the program after the plan was built."""
    net, data = net or network(), options.pop("data", None) or Task(samples(600, 1), samples(300, 2))
    options = {"goal": "smallest", "max_drop": 8, **options}
    shares = {LEAST[options["goal"]]: 1.0, **options.pop("budget", {})}
    first = data.train.batch([0]).inputs
    program = tdcompile.trace(net, first).with_(budget=tdcompile.Budget(**shares))
    program = program.with_(task=data.selecting(torch.Generator().manual_seed(0)).holding_out(torch.Generator()))
    written = ",".join(f"{key}={value}" for key, value in options.items())
    text = "calibrate,score{by=none},propose{decompose=svd+channel},search{" + written + "},factorize,recalibrate,refit"
    program = tdcompile.Pipeline.parse(text).run(program)
    return program.facts[GoalSearch], program


def params(program):
    return sum(p.numel() for p in program.graph.parameters())


@pytest.fixture(scope="module")
def smallest():
    return found()


def test_the_result_is_the_smallest_plan_built_that_is_within_the_limit(smallest):
    compiled, programs = smallest
    goal = compiled.report.goal
    within = [plan.kept for plan in goal.plans if plan.within]
    assert len(goal.plans) <= 6
    assert min(within) < 0.9
    assert any(not plan.within for plan in goal.plans), "the limit was never met from beyond"
    share = compiled.plan.predicted.params / compiled.plan.dense.params
    assert share == pytest.approx(min(within))
    assert all(plan.within == (plan.drop <= 8) for plan in goal.plans)
    judged = evaluate_graph(programs["refit"], programs["refit"].task.selection)
    assert 100 * (judged.dense_score - judged.compiled_score) <= 8
    assert compiled.report.verdict.startswith("the smallest of ")
    assert any(note.startswith("search: ") for note in compiled.report.notes)
    assert {gate.name for gate in compiled.report.gates} == {"params", "max-drop"}


def test_plans_are_judged_on_training_samples_that_nothing_else_reads(smallest):
    task = smallest[1]["search"].task
    aside = {tuple(x.flatten()[:4].tolist()) for x in task.selection.batch(range(len(task.selection))).inputs[0]}
    rest = {tuple(x.flatten()[:4].tolist()) for x in task.train.batch(range(len(task.train))).inputs[0]}
    assert len(aside) == 75
    assert len(rest) == 525
    assert not aside & rest


def test_the_dense_network_is_pooled_once_for_all_plans(monkeypatch):
    networks, pooled = [], Recalibrate._pooled

    def counted(self, graphs, samples):
        networks.append(len(graphs))
        return pooled(self, graphs, samples)

    monkeypatch.setattr(Recalibrate, "_pooled", counted)
    net = nn.Sequential(network()[0], nn.BatchNorm2d(16), *network()[1:]).eval()
    goal, _ = searched(net)
    assert len(goal.probes) > 1
    assert networks == [2, *[1] * len(goal.probes)]  # the result is built again


def test_a_looser_limit_gives_no_larger_network():
    tight, loose = (params(searched(max_drop=limit, plans=4)[1]) for limit in (6, 40))
    assert loose < 0.7 * tight


def test_without_labels_the_agreement_is_the_limit():
    goal, program = searched(data=Task(samples(600, 1, labelled=False)), max_drop=8, plans=3)
    assert "top-1 agreement" in goal.told
    judged = evaluate_graph(program, program.task.selection)
    assert 100 * (1 - judged.outputs[0].agreement) <= 8
    assert len(program.task.heldout) == 65, "the final figure has samples of its own"


def test_labels_of_training_samples_say_nothing_without_labelled_test_samples():
    assert "top-1 agreement" in searched(data=Task(samples(600, 1)), plans=1)[0].told


class Fragile(nn.Module):
    """Its answers hang on signs of small numbers, so that any change of the weights changes some."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.wide, self.last = nn.Linear(48, 48), nn.Linear(48, 5)
        with torch.no_grad():
            self.wide.weight.copy_(torch.linalg.qr(torch.randn(48, 48))[0])

    def forward(self, x):
        return self.last(torch.sign(self.wide(x)))


def test_a_limit_that_no_plan_meets_leaves_the_dense_network_and_says_so():
    x = torch.randn(1200, 48, generator=torch.Generator().manual_seed(0))
    goal, program = searched(Fragile().eval(), data=Task(Tensors(x[:800]), Tensors(x[800:])), max_drop=0)
    assert goal.head == "nothing smaller than the dense network is within a drop of 0"
    assert goal.probes
    assert not any(one.within for one in goal.probes)
    assert "the mildest plan built keeps" in goal.told
    assert all(choice.is_dense for choice in program.facts[RankPlan].choices.values())


def test_a_budget_limits_every_plan_and_one_that_loses_too_much_is_told():
    _, program = searched(budget={"macs": 0.6}, max_drop=20, plans=1)
    plan = program.facts[RankPlan]
    assert plan.predicted.macs <= 0.6 * plan.dense.macs
    goal, program = searched(budget={"params": 0.1}, max_drop=0.5)
    plan = program.facts[RankPlan]
    assert plan.predicted.params <= 0.1 * plan.dense.params
    assert goal.head == "nothing is within a drop of 0.5: the mildest plan within params=0.1 is kept"
    with pytest.raises(BudgetError, match="no plan is within the budget"):
        searched(budget={"params": 0.001})


def test_too_few_samples_for_the_limit_are_told():
    few, enough = (searched(max_drop=limit, plans=1)[1].history for limit in (0.5, 8))
    told = "75 training samples judge the plans, and one of them is 1.3 points: a limit of 0.5 needs more"
    assert [any(told in getattr(entry, "text", "") for entry in history) for history in (few, enough)] == [True, False]


def test_the_fastest_plan_is_rehearsed_and_never_slower_than_dense():
    compiled, programs = found(goal="fastest", max_drop=20)
    plan = programs["search"].facts[RankPlan]
    assert programs["search"].facts[Candidates].layers.keys() == plan.choices.keys()
    assert plan.predicted.seconds <= plan.dense.seconds * 1.05
    assert compiled.report.goal.name == "fastest"
    assert any(gate.name == "latency" for gate in compiled.report.gates)


def test_int8_is_judged_as_an_onnx_model_and_fp32_beside_it_only_where_it_may_win():
    compiled, programs = found(precision="auto", max_drop=5)
    goal = programs["search"].facts[GoalSearch]
    assert goal.probes[0].precision == "int8"
    assert goal.probes[0].kept == pytest.approx(0.25, rel=1e-3)  # the dense network's weights in bytes
    assert compiled.report.precision == "int8"
    assert all(one.kept < 1 for one in goal.probes)
    best = min(one.kept for one in goal.probes if one.within)
    assert compiled.plan.predicted.params / compiled.plan.dense.params / 4 == pytest.approx(best)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_drop": None}, "goal=smallest needs a limit on the loss of quality: give --max-drop"),
        ({"data": samples(40, 1)}, "sets training samples aside to judge plans by, and 40 are too few"),
        ({"data": None}, "sets training samples aside to judge plans by, and there are none"),
        ({"goal": "quickest"}, "the option 'goal' cannot be 'quickest'"),
        ({"pipeline": "score,propose,choose,factorize", "decompose": ("auto",)}, "search{goal=…}"),
    ],
)
def test_a_goal_that_cannot_be_searched_is_refused_in_one_sentence(options, message):
    with pytest.raises(InputError, match=r"\w") as refusal:
        found(**options)
    assert message in str(refusal.value)


def test_a_goal_beside_a_plan_has_no_effect(smallest):
    with pytest.raises(InputError, match="'goal' has no effect beside a plan"):
        tdcompile.compile(network(), X, recipe=Recipe(goal="smallest", max_drop=1, plan=smallest[0].plan.to_json()))


def test_a_goal_has_no_default_budget_and_reads_back_as_a_pipeline():
    recipe = load_recipe(None, {"goal": "fastest", "max_drop": 1})
    assert recipe.shares().shares == {"latency": 1.0}
    assert "propose,search,factorize" in str(recipe.steps())
    other = load_recipe(None, {"goal": "smallest", "max_drop": 2, "ranks": "greedy", "jobs": 2})
    assert "search{goal=smallest,max_drop=2,by=greedy,jobs=2}" in str(other.steps())
    assert load_recipe(None, {"goal": "fastest", "max_drop": 1, "budget": {"params": 0.5}}).shares().shares == {
        "latency": 1.0,
        "params": 0.5,
    }
    limits = [load_recipe(None, {"goal": "fastest", "max_drop": drop}).deciding() for drop in (1, 2)]
    assert limits[0] != limits[1], "another limit is another search, which --resume must not continue"


def test_a_task_sets_aside_once():
    task = Task(samples(600, 1)).selecting(torch.Generator())
    assert task.selecting(torch.Generator()) is task


@pytest.mark.parametrize(("count", "aside"), [(64, 16), (128, 32), (200, 32), (400, 50), (20_000, 2048)])
def test_few_samples_give_up_to_a_quarter_to_judge_plans_by(count, aside):
    task = Task(Tensors(torch.zeros(count, 1))).selecting(torch.Generator().manual_seed(0))
    assert (len(task.selection), len(task.train)) == (aside, count - aside)


@pytest.mark.parametrize(("judges", "warned"), [(31, True), (32, False)])
def test_a_goal_warns_if_few_samples_judge(judges, warned):
    found = GoalSearch("fastest", "2%", 0.02, judges, 0.0, (), "", "search: done")
    warnings = [one.text for one in found.diagnostics() if one.level == "warning"]
    assert warnings == [text for text in warnings if "31 training samples judge the plans" in text]
    assert bool(warnings) == warned
