"""``calibrate``: the second moments are those of the im2col patches, whatever the layer's geometry."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tdcompile
from tdcompile.data.task import Tensors
from tdcompile.errors import InputError
from tdcompile.ir.measurements import Calibration
from tdcompile.numerics.covariance import Full
from tdcompile.passes.analyze import calibrate
from tdcompile.passes.analyze.calibrate import Calibrate


def drawn(*shape):
    return Tensors(torch.randn(*shape, generator=torch.Generator().manual_seed(1)))


def moments(module, samples, **options):
    program = tdcompile.trace(nn.Sequential(module).eval(), samples.batch([0, 1]).inputs)
    program = program.with_(task=tdcompile.Task(samples))
    return Calibrate(**options).run(program).facts[Calibration]


@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1},
        {"stride": (1, 2), "padding": (0, 2)},
        {"dilation": 2, "padding": 2},
        {"padding": "same", "padding_mode": "reflect"},
    ],
)
def test_moments_are_those_of_unfolded_patches(options):
    conv, samples = nn.Conv2d(4, 6, 3, **options), drawn(7, 4, 9, 8)
    found = moments(conv, samples, batch=3, patches=100).covariances["0"]
    mode = options.get("padding_mode", "constant")
    before = conv._reversed_padding_repeated_twice if mode == "reflect" else (0,) * 4
    x = F.pad(samples.inputs[0], before, mode=mode)
    pad = 0 if mode == "reflect" else conv.padding
    patches = F.unfold(x, 3, dilation=conv.dilation, padding=pad, stride=conv.stride)
    rows = patches.transpose(1, 2).reshape(-1, 36).double()
    assert found.samples == len(rows)
    torch.testing.assert_close(found.dense(), rows.T @ rows / len(rows), rtol=1e-4, atol=1e-6)


def test_a_batch_is_as_small_as_its_largest_values_ask(monkeypatch):
    conv, samples, sizes = nn.Conv2d(4, 6, 3, padding=1), drawn(10, 4, 9, 8), []
    read = Tensors.batch
    monkeypatch.setattr(Tensors, "batch", lambda self, places: sizes.append(len(places)) or read(self, places))
    monkeypatch.setattr(calibrate, "_LARGEST_VALUES", 3 * 4 * (4 + 6) * 9 * 8)  # bytes of three samples
    found = moments(conv, samples, patches=10**9)
    assert sizes[-4:] == [3, 3, 3, 1]
    monkeypatch.setattr(calibrate, "_LARGEST_VALUES", 2**29)
    whole = moments(conv, samples, patches=10**9)
    assert sizes[-1] == 10
    torch.testing.assert_close(found.covariances["0"].dense(), whole.covariances["0"].dense(), rtol=1e-4, atol=1e-6)


def test_a_linear_layer_over_tokens():
    samples = drawn(5, 7, 6)
    rows = samples.inputs[0].reshape(-1, 6).double()
    found = moments(nn.Linear(6, 3), samples).covariances["0"]
    torch.testing.assert_close(found.dense(), rows.T @ rows / 35, rtol=1e-4, atol=1e-6)


def test_ten_patches_for_each_input_are_read_and_they_are_near_the_whole():
    conv, samples = nn.Conv2d(3, 4, 3, padding=1), drawn(64, 3, 16, 16)
    some, whole = (moments(conv, samples, patches=n).covariances["0"] for n in (10, 10**9))
    assert some.samples in range(270, 270 + 5)  # the last patch of each batch is rounded up
    assert whole.samples == 64 * 16 * 16
    assert float((some.dense() - whole.dense()).norm() / whole.dense().norm()) < 0.4


@pytest.mark.parametrize(("patches", "each"), [(1, 1), (3, 3), (1000, 16)])
def test_every_sample_gives_equally_many_patches(patches, each):
    """The inputs are one-hot in the number of the sample, so the diagonal counts its patches."""
    x = torch.eye(8)[:, :, None, None].expand(8, 8, 4, 4).contiguous()
    found = moments(nn.Conv2d(8, 3, 1), Tensors(x), batch=3, patches=patches).covariances["0"]
    assert (found.dense().diagonal() * found.samples).round().tolist() == [each] * 8


def test_a_layer_of_few_inputs_reads_a_patch_of_every_sample():
    assert moments(nn.Conv2d(1, 3, 1), drawn(16, 1, 4, 4), patches=1).covariances["0"].samples == 16


def test_nan_is_found_where_no_patch_is_read():
    samples = drawn(8, 1, 64, 64)
    samples.inputs[0][3, 0, 63, 63] = torch.nan
    with pytest.raises(InputError, match="NaN or Inf reaches the layer '0'"):
        moments(nn.Conv2d(1, 3, 1), samples, patches=1)


class Branches(nn.Module):
    """Layers that read one value, and layers that do not: another geometry, or the value after a change in place."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.a, self.b = nn.Conv2d(4, 5, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1, bias=False)
        self.strided = nn.Conv2d(4, 5, 3, padding=1, stride=2)
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.changed = nn.Conv2d(4, 5, 3, padding=1)

    def forward(self, x):
        x = self.first(x)
        y = self.a(x).mean((2, 3)) + self.b(x).mean((2, 3))[:, :5] + self.strided(x).mean((2, 3))
        y = y + self.twice(self.twice(x)).mean((1, 2, 3))[:, None]
        return y + self.changed(x.relu_()).mean((2, 3))


def test_layers_that_read_the_same_patches_share_one_covariance():
    torch.manual_seed(0)
    samples, module = drawn(12, 3, 8, 8), Branches().eval()
    program = tdcompile.trace(module, samples.batch([0, 1]).inputs).with_(task=tdcompile.Task(samples))
    found = Calibrate(batch=5).run(program).facts[Calibration].covariances
    assert found["a"] is found["b"]
    assert len({id(covariance) for covariance in found.values()}) == len(found) - 1
    assert found["a"].samples == pytest.approx(10 * 36, abs=3)  # each batch once
    assert float((found["changed"].dense() - found["a"].dense()).norm() / found["a"].dense().norm()) > 0.1


class Recording(Tensors):
    """Samples that remember which of them were read."""

    def __init__(self, inputs):
        super().__init__(inputs)
        self.read = []

    def batch(self, indices):
        self.read += list(indices)
        return super().batch(indices)


@pytest.mark.parametrize(("asked", "given", "read"), [(7, 20, 7), (30, 20, 20), (0, 20, 0)])
def test_as_many_samples_are_read_as_calibrate_says_and_the_fact_says_so(asked, given, read):
    samples = Recording(torch.randn(given, 6))
    program = tdcompile.trace(nn.Linear(6, 3).eval(), (torch.randn(2, 6),))
    program = program.with_(task=tdcompile.Task(samples, calibrate=asked))
    found = Calibrate(batch=4).run(program).facts[Calibration]
    assert len(samples.read) == len(set(samples.read)) == found.samples == read
    assert [moments.samples for moments in found.covariances.values()] == [read] * bool(read)


@pytest.mark.parametrize(
    "wide", [nn.Linear(40, 6), nn.Conv2d(40, 6, 1), nn.Conv2d(10, 6, 2)], ids=["linear", "1x1", "2x2"]
)
def test_a_wide_layer_gets_a_sketch(wide):
    samples = drawn(240, 40) if isinstance(wide, nn.Linear) else drawn(20, wide.in_channels, 5, 5)
    exact = moments(wide, samples, largest=40).covariances["0"]
    assert isinstance(exact, Full)
    for rank, near in ((40, 1e-5), (10, 0.6)):
        found = moments(wide, samples, largest=39, sketch=rank, batch=16).covariances["0"]
        assert (found.samples, found.factor.shape) == (exact.samples, (40, rank))
        whole = torch.eye(40, dtype=torch.float64) @ found
        torch.testing.assert_close(whole.diagonal(), exact.dense().diagonal(), rtol=1e-4, atol=1e-5)
        assert float((whole - exact.dense()).norm() / exact.dense().norm()) < near


def test_a_wide_layer_reads_fewer_patches_by_as_much_as_it_is_wider(monkeypatch):
    wide, samples = nn.Conv2d(10, 6, 2), drawn(20, 10, 5, 5)
    for limit, read in ((40, 160), (20, 40)):
        monkeypatch.setattr("tdcompile.passes.analyze.calibrate.WIDE", limit)
        for largest in (40, 20):  # as a matrix or as a sketch
            assert moments(wide, samples, patches=4, largest=largest).covariances["0"].samples == read


@pytest.mark.parametrize("option", ["patches", "largest", "sketch", "batch"])
def test_options_below_one_are_refused(option):
    with pytest.raises(InputError, match="at least 1"):
        Calibrate(**{option: 0})


def test_depthwise_layers_are_left_out_with_a_reason():
    assert "depthwise" in moments(nn.Conv2d(4, 4, 3, groups=4), drawn(4, 4, 6, 6)).skipped["0"]


class Tied(nn.Module):
    """Ids to scores by an embedding that is also the head."""

    def __init__(self):
        super().__init__()
        self.words, self.middle, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.words.weight
        self.after = nn.Identity()

    def forward(self, ids):
        """Return scores."""
        return self.after(self.head(torch.relu(self.middle(self.words(ids)))))


def test_what_only_layers_that_stay_dense_need_is_not_run():
    torch.manual_seed(0)
    network, ids = Tied().eval(), torch.randint(9, (12, 5))
    calls = []
    program = tdcompile.trace(network, ids[:2])
    program = program.with_(task=tdcompile.Task(Tensors(ids)))
    program.graph.get_submodule("after").register_forward_hook(lambda *_: calls.append(1))
    assert set(tdcompile.sites(program)) == {"middle", "head"}  # finding them runs the network
    calls.clear()
    found = Calibrate(patches=100).run(program).facts[Calibration]
    assert set(found.covariances) == {"middle"}
    assert "stays dense" in found.skipped["head"]
    assert not calls
    rows = network.words(ids).detach().reshape(-1, 4).double()
    torch.testing.assert_close(found.covariances["middle"].dense(), rows.T @ rows / len(rows), rtol=1e-4, atol=1e-6)


def test_layers_inside_a_module_that_is_not_traced_are_reached():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.own = nn.Linear(4, 4)

        def forward(self, x):
            return self.own(x) if float(x.sum()) > -1e9 else x

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inner = nn.Linear(4, 4), Inner()

        def forward(self, x):
            return self.inner(self.first(x)).relu().sum(1)

    samples = drawn(9, 4)
    program = tdcompile.trace(Outer().eval(), samples.batch([0, 1]).inputs)
    found = Calibrate().run(program.with_(task=tdcompile.Task(samples))).facts[Calibration]
    assert set(found.covariances) == {"first", "inner.own"}


def test_the_moments_of_groups_together_take_no_more_memory_than_one_matrix_may():
    module, samples = nn.Conv2d(24, 24, 1, groups=4), drawn(4, 24, 6, 6)
    assert moments(module, samples, largest=12).covariances["0"].dense().shape == (4, 6, 6)
    for largest in (5, 11):  # below a group's own inputs, and above them
        found = moments(module, samples, largest=largest)
        assert "4 groups of 6 inputs" in found.skipped["0"]
        assert not found.covariances


def test_without_data_there_are_no_moments():
    program = tdcompile.trace(nn.Linear(3, 3).eval(), (torch.randn(2, 3),))
    assert Calibrate().run(program).facts[Calibration] == Calibration({}, {}, 0)


@pytest.mark.parametrize(("count", "few"), [(12, True), (120, False)])
def test_the_moment_of_few_rows_is_shrunk_and_the_history_says_so(count, few):
    samples = drawn(count, 20)
    program = tdcompile.trace(nn.Linear(20, 3).eval(), samples.batch([0, 1]).inputs)
    after = Calibrate().run(program.with_(task=tdcompile.Task(samples)))
    found, x = after.facts[Calibration], samples.inputs[0].double()
    (name,) = found.covariances
    sampled = x.T @ x / count
    share = found.shrunk.get(name, 0.0)
    assert (0.3 < share <= 1) if few else share == 0.0
    mixed = (1 - share) * sampled + share * sampled.trace() / 20 * torch.eye(20, dtype=torch.float64)
    torch.testing.assert_close(found.covariances[name].dense(), mixed, rtol=1e-4, atol=1e-5)
    told = [entry for entry in after.history if getattr(entry, "code", None) == "few_samples"]
    assert [entry.level for entry in told] == ["warning"] * few
    assert all("12 samples are few for 1 of 1 layers" in entry.text for entry in told)


@pytest.mark.parametrize("largest", [4, 2000], ids=["sketch", "full"])
def test_squares_that_overflow_name_the_layer(largest):
    samples = Tensors(1e25 * drawn(40, 8).inputs[0])
    with pytest.raises(InputError, match="the covariance of the input of the layer '0' overflows"):
        moments(nn.Linear(8, 8), samples, largest=largest)
    assert (
        moments(nn.Linear(8, 8), Tensors(1e10 * drawn(40, 8).inputs[0]), largest=largest).covariances["0"].is_finite()
    )
