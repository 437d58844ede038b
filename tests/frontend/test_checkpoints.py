"""Checkpoints as trainers leave them: keys, prefixes, averages, shards, folders."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import tdcompile
from tdcompile.cli.load_job import load_job, recipe_of
from tdcompile.errors import InputError
from tdcompile.frontend.load_network import load_weights

State = dict[str, Tensor]


def network() -> nn.Module:
    return nn.ModuleDict({"stem": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4), "head": nn.Linear(4, 2)})


def state(scale: float = 1.0) -> State:
    """Values that identify the state dict they come from."""
    return {
        name: torch.full_like(value, scale) if value.is_floating_point() else value
        for name, value in network().state_dict().items()
    }


def behind(prefix: str, weights: Mapping[str, Tensor]) -> State:
    return {prefix + name: value for name, value in weights.items()}


def save(folder: Path, held: Any, name: str = "w.pth") -> Path:
    torch.save(held, folder / name)
    return folder / name


def load(reference: str | Path) -> tuple[float, str]:
    """Return the value that all weights have after loading, and what was told."""
    module = network()
    told = "; ".join(note.text for note in load_weights(module, reference))
    values = {float(x) for value in module.parameters() for x in value.detach().unique()}
    assert len(values) == 1
    return values.pop(), told


def refusal(reference: str | Path) -> str:
    with pytest.raises(InputError) as caught:
        load_weights(network(), reference)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def lightning(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    extra = {"criterion.weight": torch.ones(2), "accuracy.total": torch.tensor(3)}
    return {"epoch": 3, "hyper_parameters": {"lr": 0.1}, "state_dict": {**behind("model.", weights), **extra}}


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (dict, ""),
        (lambda s: behind("module.", s), "are read without the prefix 'module.'"),
        (lambda s: behind("net.backbone.", s), "are read without the prefix 'net.backbone.'"),
        (lambda s: {"n_averaged": torch.tensor(5), **behind("module.", s)}, "which are left out: n_averaged"),
        (lightning, "are read under 'state_dict', without the prefix 'model.'"),
        (lightning, "which are left out: criterion.weight, accuracy.total"),
        (lambda s: {"model": behind("_orig_mod.", s)}, "are read under 'model', without the prefix '_orig_mod.'"),
        *(
            (
                lambda s, key=key: {key: s, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(4)}}}},
                f"'{key}'",
            )
            for key in ("net", "params", "weights", "ema", "state_dict_ema", "model_state_dict", "generator")
        ),
        (
            lambda s: {"model": {"ema": behind("module.", s)}},
            "are read under 'model.ema', without the prefix 'module.'",
        ),
        (lambda s: {k: v for k, v in s.items() if "num_batches" not in k}, ""),
        (lambda s: {"model": s, "args": argparse.Namespace(lr=0.1, out=Path("x")), "best": np.float64(0.5)}, "'model'"),
    ],
)
def test_a_checkpoint_is_loaded_and_told(tmp_path: Path, make: Callable[[State], Any], told: str) -> None:
    value, said = load(save(tmp_path, make(state(0.5))))
    assert value == 0.5
    assert told in said
    assert bool(said) == bool(told)


@pytest.mark.parametrize(
    ("make", "first", "second"),
    [
        (lambda a, b: {"model": a, "model_ema": b}, "model", "model_ema"),
        (lambda a, b: {"params": a, "params_ema": b}, "params", "params_ema"),
        (lambda a, b: {"model": a, "average": behind("module.", b)}, "model", "average.module"),
        (
            lambda a, b: {"state_dict": behind("net.", a) | behind("teacher.", b)},
            "state_dict.net",
            "state_dict.teacher",
        ),
        (lambda a, b: a | behind("ema.", b), "", "ema"),
    ],
)
def test_two_that_fit_are_asked_for_and_chosen(
    tmp_path: Path, make: Callable[[State, State], Any], first: str, second: str
) -> None:
    path = save(tmp_path, make(state(0.5), state(2.0)))
    said = refusal(path)
    assert f"{path}#{first} or --weights {path}#{second}" in said
    assert load(f"{path}#{first}")[0] == 0.5
    assert load(f"{path}#{second}")[0] == 2.0


def test_copies_of_equal_values_need_no_choice(tmp_path: Path) -> None:
    assert load(save(tmp_path, {"model": state(), "model_ema": state()}))[0] == 1.0


def test_a_key_above_a_prefix_is_enough(tmp_path: Path) -> None:
    path = save(tmp_path, {"model": behind("module.", state(0.5)), "ema": behind("module.", state(2.0))})
    assert load(f"{path}#ema")[0] == 2.0


def test_a_checkpoint_of_another_network_names_keys_and_differences(tmp_path: Path) -> None:
    path = save(tmp_path, {"epoch": 1, "weights": {name: v for name, v in state().items() if "head" not in name}})
    assert "as read under 'weights' does not fit the network: it lacks head.weight, head.bias" in refusal(path)
    assert "the file's keys are epoch, weights" in refusal(path)
    path = save(tmp_path, {"model": {**state(), "head.weight": torch.zeros(3, 4)}})
    assert "head.weight is (3, 4) in the file, (2, 4) in the network" in refusal(path)
    path = save(tmp_path, {"model": {**behind("model.", state()), "model.aux.weight": torch.zeros(1)}})
    assert "has in excess aux.weight" in refusal(path)
    path = save(tmp_path, {"epoch": 1, "history": [1.0], "arguments": {"lr": 0.1}})
    assert "holds no state dict" in refusal(path)
    assert "has the keys epoch, history, arguments" in refusal(path)


def test_a_key_that_is_not_there_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, {"model": state(), "model_ema": state(2.0)})
    said = refusal(f"{path}#model_emma")
    assert "holds no weights under 'model_emma': did you mean 'model_ema'? known: model, model_ema" in said
    assert "there is no weights file" in refusal(f"{path}.gone#model")
    path = save(tmp_path, state() | behind("part.", {"stem.weight": torch.zeros(4, 3, 3, 3)}))
    assert "without the prefix 'part.' does not fit the network: it lacks stem.bias" in refusal(f"{path}#part")


def test_a_file_name_may_have_the_sign(tmp_path: Path) -> None:
    assert load(save(tmp_path, state(0.5), "run#3.pth"))[0] == 0.5
    assert load(f"{save(tmp_path, {'a': state(), 'b': state(2.0)}, 'run#4.pth')}#b")[0] == 2.0


@pytest.mark.parametrize("prefix", ["", "module.", "model.module."])
def test_a_network_in_a_wrapper_is_filled(tmp_path: Path, prefix: str) -> None:
    module = nn.DataParallel(network())
    load_weights(module, save(tmp_path, behind(prefix, state(0.5))))
    assert module.module["stem"].weight.detach().unique().tolist() == [0.5]


def test_a_chance_likeness_is_no_prefix(tmp_path: Path) -> None:
    weights = {name.replace("stem", "first").replace("norm", "second"): value for name, value in state().items()}
    said = refusal(save(tmp_path, {**weights, "other.head.weight": torch.zeros(2, 4)}))
    assert "prefix" not in said
    assert "lacks stem.weight" in said


# Shards and folders


def shards(folder: Path, suffix: str, weights: State, stem: str = "model") -> Path:
    names = sorted(weights)
    parts = {f"{stem}-{i}-of-2{suffix}": names[i::2] for i in range(2)}
    for file, held in parts.items():
        tensors = {name: weights[name].contiguous() for name in held}
        if suffix == ".safetensors":
            safetensors.torch.save_file(tensors, folder / file)
        else:
            torch.save(tensors, folder / file)
    index = folder / f"{stem}{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {n: f for f, held in parts.items() for n in held}}))
    return index


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("whole", [True, False])
def test_shards_are_loaded_by_their_index_or_folder(tmp_path: Path, suffix: str, whole: bool) -> None:
    index = shards(tmp_path, suffix, behind("model.", state(0.5)))
    save(tmp_path, {"state": {}}, "optimizer.pt")
    value, told = load(tmp_path if whole else index)
    assert value == 0.5
    assert "'model.'" in told


def test_a_folder_with_one_file_is_that_file_and_others_are_refused(tmp_path: Path) -> None:
    assert "is a folder and holds no weights file" in refusal(tmp_path)
    save(tmp_path, state(0.5), "best.pt")
    assert load(tmp_path)[0] == 0.5
    save(tmp_path, state(2.0), "last.pt")
    assert "holds several weights files, best.pt, last.pt: name one" in refusal(tmp_path)
    safetensors.torch.save_file(state(3.0), tmp_path / "model.safetensors")
    assert load(tmp_path)[0] == 3.0


def test_an_index_that_cannot_be_followed_is_refused(tmp_path: Path) -> None:
    index = shards(tmp_path, ".safetensors", state())
    known = json.loads(index.read_text())
    for shard in ("../outside.safetensors", str(tmp_path / "model-0-of-2.safetensors"), "a/b.bin", 3):
        index.write_text(json.dumps({"weight_map": {**known["weight_map"], "stem.weight": shard}}))
        assert f"names the shard '{shard}', which is not a file beside it" in refusal(index)
    index.write_text(json.dumps({"weight_map": {**known["weight_map"], "stem.weight": "model-2-of-2.safetensors"}}))
    assert "'model-2-of-2.safetensors', which is missing" in refusal(index)
    index.write_text(json.dumps({"weight_map": {**known["weight_map"], "ghost": "model-0-of-2.safetensors"}}))
    assert "says that 'model-0-of-2.safetensors' holds ghost; it does not" in refusal(index)
    for content in ("{}", "[]", "not json", '{"weight_map": 3}'):
        index.write_text(content)
        assert "is no index of a sharded checkpoint" in refusal(index)


# Tied weights, weight norm


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.table.weight


@pytest.mark.parametrize("kept", ["table.weight", "head.weight"])
def test_a_tied_weight_that_is_stored_once_behind_a_prefix(tmp_path: Path, kept: str) -> None:
    weight = torch.randn(6, 4)
    safetensors.torch.save_file({f"model.{kept}": weight}, tmp_path / "w.safetensors")
    module = Tied()
    load_weights(module, tmp_path / "w.safetensors")
    assert module.head.weight is module.table.weight
    assert torch.equal(module.head.weight, weight)


def test_former_names_of_weight_norm_behind_a_prefix(tmp_path: Path) -> None:
    new = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    weights = {"0.weight_g": torch.full((2, 1), 3.0), "0.weight_v": torch.ones(2, 3), "0.bias": torch.zeros(2)}
    load_weights(new, save(tmp_path, {"generator": behind("module.", weights)}))
    torch.testing.assert_close(new[0].weight.norm(dim=1), torch.full((2,), 3.0))


# In a compilation


def test_the_report_says_where_the_weights_were(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 48)).eval()
    path = save(tmp_path, {"model": behind("module.", module.state_dict()), "ema": {"0.weight": torch.ones(2)}})
    notes = tdcompile.load_weights(module, f"{path}#model")
    compiled = tdcompile.compile(module, torch.randn(1, 48), budget={"macs": 0.6}, notes=notes)
    assert compiled.report.notes[0].endswith("are read under 'model', without the prefix 'module.'")


def test_the_command_and_a_recipe_take_a_key(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("from torch import nn\ndef build(): return nn.Linear(3, 2)\n")
    weights = [{"weight": torch.full((2, 3), float(i)), "bias": torch.zeros(2)} for i in range(2)]
    path = save(tmp_path, {"model": weights[0], "model_ema": weights[1]})
    (tmp_path / "recipe.toml").write_text(f'source = "{tmp_path}/net.py:build"\nweights = "{path}#model_ema"\n')
    for given in (
        {"recipe": str(tmp_path / "recipe.toml"), "input": ["1x3"]},
        {"source": f"{tmp_path}/net.py:build", "weights": f"{path}#model_ema", "input": ["1x3"]},
    ):
        job = load_job(recipe_of(given))
        assert torch.equal(job.module.weight, weights[1]["weight"])
        assert "'model_ema'" in job.notes[0].text
