"""The data ``synthetic``: better than none as real test samples judge, never silent, refused where it cannot be."""

import json

import pytest
import torch
from torch import nn

import tdcompile
from tdcompile.artifact.report import render_html
from tdcompile.cli.main import main
from tdcompile.compiler import prepare
from tdcompile.core.hooks import Hook
from tdcompile.core.pipeline import Pipeline
from tdcompile.data.loading import kinds, load_data
from tdcompile.errors import InputError
from tdcompile.ir.modules import outputs_of
from tdcompile.passes import Synthesize
from tdcompile.planning.synthetic_data import BringSamples, makers
from tdcompile.recipes import load_recipe

X = torch.randn(1, 1, 16, 16)
FEW = "synthetic{images=16,steps=60}"
PIPELINE = "calibrate,score{by=none},propose{decompose=channel},choose,factorize,recalibrate,refit,fold-batchnorm"


def layers(norm):
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1, bias=False), norm(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), norm(32), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, padding=1, bias=False), norm(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    )


@pytest.fixture(scope="module")
def digits():
    """Return a small network that knows scikit-learn's digits, and their training and test samples."""
    train, test = load_data("digits", (1, 16, 16))
    torch.manual_seed(0)
    network = layers(nn.BatchNorm2d)
    adam = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(8):
        for batch in train.shuffled(torch.Generator().manual_seed(0)).batches(64):
            adam.zero_grad()
            nn.functional.cross_entropy(network(batch.inputs[0]), batch.targets).backward()
            adam.step()
    return network.eval(), train, test


def compiled(network, data, **options):
    return tdcompile.compile(network, X, data=data, **{"pipeline": PIPELINE, "budget": {"macs": 0.4}, **options})


def correct(network, test):
    """Return the share of test samples that a network classifies as their labels say."""
    batch = test.batch(range(len(test)))
    return float((outputs_of(network, batch.inputs)[0].argmax(1) == batch.targets).float().mean())


def test_synthetic_samples_are_better_than_none_on_real_test_samples(digits):
    network, _, test = digits
    recipe, accuracy = load_recipe(None, {"budget": {"macs": 0.35}}), {}
    for data in (None, FEW):
        program = prepare(network, X, data, recipe)
        steps = (*makers(program.task), *Pipeline.parse(PIPELINE).steps)
        accuracy[data] = correct(Pipeline(steps).run(program, [BringSamples()]).graph, test)
    assert correct(network, test) > 0.9
    assert accuracy[FEW] > accuracy[None] + 0.1


def test_the_report_says_synthetic_and_claims_no_quality(digits):
    report = compiled(digits[0], "synthetic{images=64,steps=2}").report
    assert report.dense.score is report.compiled.score is report.quality is None
    assert "quality not measured, because the samples are synthetic" in report.verdict
    assert "calibrated on synthetic samples" in report.verdict
    assert [note for note in report.notes if note.startswith("the 64 training samples are synthetic: made from the")]
    assert not [note for note in report.notes if "trains on" in note]
    assert "answers" not in {gate.name for gate in report.gates}
    assert report.synthetic.norms == 3
    assert report.seconds["synthesize"] > 0
    assert "The synthetic samples tell nothing about it" in render_html(report)


def test_without_data_the_report_offers_synthetic_samples_where_they_can_be_made(digits):
    def offers(network, data=None):
        history = prepare(network, X, data, load_recipe(None, {})).history
        return len([entry for entry in history if "--data synthetic makes samples" in entry.text])

    assert offers(digits[0]) == 1
    assert offers(layers(nn.BatchNorm2d).eval()) == 0  # never trained
    assert offers(layers(nn.Identity).eval()) == 0
    assert offers(digits[0], digits[1]) == offers(digits[0], "synthetic") == 0


class Two(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, y):
        return self.network(x + y)


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.norm, self.fc = nn.Embedding(9, 8), nn.BatchNorm1d(8), nn.Linear(8, 9)

    def forward(self, ids):
        return self.fc(self.norm(self.embedding(ids).transpose(1, 2)).transpose(1, 2))


def layer_norms():
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(2), nn.LayerNorm(196), nn.Linear(196, 4)).eval()


@pytest.mark.parametrize(
    ("change", "example", "said"),
    [
        (lambda net: layer_norms(), X, r"the network has none \(its LayerNorm stores no statistics of the data\)"),
        (lambda net: nn.Sequential(nn.Flatten(), nn.Linear(256, 9)).eval(), X, r"has none \(it never had any, or it"),
        (lambda net: layers(nn.BatchNorm2d).eval(), X, "has never been trained; give trained weights, or real samples"),
        (lambda net: Two(net).eval(), (X, X), "takes 2 inputs, and samples are made for one; give real samples"),
        (
            lambda net: Words().eval(),
            torch.ones(1, 5, dtype=torch.long),
            "input is int64, and samples are made by grad",
        ),
    ],
)
def test_a_network_without_statistics_is_refused_before_any_work(digits, change, example, said, monkeypatch):
    monkeypatch.setattr(Synthesize, "run", lambda self, program: pytest.fail("it began"))
    with pytest.raises(InputError, match=rf"^data=synthetic: .*{said}"):
        tdcompile.compile(change(digits[0]), example, data="synthetic", budget={"params": 0.5})


@pytest.mark.parametrize(
    ("data", "options", "said"),
    [
        (
            "synthetic",
            {"max_drop": 1},
            r"max_drop=1.* bounds .* which synthetic samples do not tell: give real samples",
        ),
        ("synthetic", {"normalize": "0.5/0.5"}, "'normalize' has no effect on the data 'synthetic'"),
        ("synthetic{imges=3}", {}, "'synthesize' has no option 'imges': did you mean 'images'"),
        ("synthetic:3", {}, "unknown kind of data 'synthetic'"),
        ("synthetik", {}, "did you mean 'synthetic'"),
        (("synthetic", "npz:there-is-none.npz"), {}, "there-is-none.npz"),
        (("synthetic", torch.zeros(3, 2, 5, 5)), {}, "the test data: samples of shape"),
    ],
)
def test_what_synthetic_samples_cannot_do_is_refused_in_a_sentence(digits, data, options, said):
    with pytest.raises(InputError, match=said):
        compiled(digits[0], data, **options)


def test_a_command_that_needs_labels_refuses_them():
    assert "synthetic" in kinds()
    with pytest.raises(InputError, match="the data 'synthetic' have neither labels nor test samples"):
        load_data("synthetic", (1, 16, 16))


def test_real_test_samples_beside_synthetic_ones_bound_the_drop(digits):
    few = "synthetic{images=4,steps=2}"
    report = compiled(digits[0], (few, "digits"), max_drop=100, eval=50).report
    assert [gate.passed for gate in report.gates if gate.name == "max-drop"] == [True]
    assert report.quality.samples == 50
    assert report.quality.source == "test"
    assert report.synthetic.samples == 4
    assert "calibrated on synthetic samples" in report.verdict


def test_int8_and_tuning_take_synthetic_samples(digits):
    network, _, test = digits
    made = compiled(
        network,
        (FEW, test),
        precision="int8",
        budget={"macs": 0.9},
        pipeline=None,
        tune="epochs=1,lr=0.001",
        decompose="channel",
    )
    report = made.report
    assert {one.precision for one in report.variants} == {"fp32", "int8"}
    assert report.tuning.epochs == 1
    assert [note for note in report.notes if note.startswith("'finetune' trains on synthetic samples: that can lose")]
    assert min(one.score for one in report.variants) > report.dense.score - 0.1


class Stop(Hook):
    """Interrupts before a step."""

    def __init__(self, step):
        self.step, self.names = step, []

    def started(self, step, position, of):
        self.names.append(step.name)
        if step.name == self.step:
            raise KeyboardInterrupt


def test_an_interrupted_run_goes_on_with_the_samples_that_it_made(digits, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        compiled(digits[0], FEW, workspace=tmp_path, watch=Stop("factorize"))
    file = tmp_path / "synthetic.safetensors"
    samples = file.read_bytes()
    file.unlink()
    with pytest.raises(InputError, match=r"the synthetic samples of the earlier run cannot be read .* leave out --res"):
        compiled(digits[0], FEW, workspace=tmp_path, resume=True)
    file.write_bytes(samples)
    steps = Stop(None)
    resumed = compiled(digits[0], FEW, workspace=tmp_path, resume=True, watch=steps)
    assert steps.names == ["factorize", "recalibrate", "refit", "fold-batchnorm"]
    refitted = [note for note in resumed.report.notes if note.startswith("refit: there are no")]
    assert not refitted
    assert resumed.report.synthetic.samples == 16


NET = """
from torch import nn

def build():
    net = nn.Sequential(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16))
    net[1].running_mean.fill_(0.1)
    net[4].running_var.fill_(0.4)
    return net.eval()
"""


def test_the_commands_take_the_same_text(tmp_path, monkeypatch, capfd):
    (tmp_path / "net.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    network = ["net.py:build", "--input", "1x1x12x12", "--data", "synthetic{images=4,steps=3}"]
    small = ["--budget", "macs=0.7", "--decompose", "channel"]
    assert main(["plan", *network, *small, "-o", "plan.json"]) == 0
    assert main(["compile", *network, *small, "-o", "made"]) == 0
    out, err = capfd.readouterr()
    assert "the 4 training samples are synthetic: made from the statistics of 2 batch-norm layers" in out
    assert err.count("synthesize: ") == 2
    assert json.loads((tmp_path / "made/report.json").read_text())["synthetic"]["samples"] == 4
    assert main(["compile", *network, *small, "--max-drop", "1", "-o", "other"]) == 2
    assert main(["study", *network]) == 2
    assert "a study measures a metric" in capfd.readouterr().err
    assert not (tmp_path / "other").exists()
