"""Samples in arrays: ``.npz`` files and scikit-learn's digits."""

from __future__ import annotations

import pickle
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tdcompile.data.images import to_tensor
from tdcompile.data.labels import Labels
from tdcompile.data.network_input import NetworkInput
from tdcompile.data.readers import ArrayReader
from tdcompile.data.samples import Split
from tdcompile.data.structured import are_labels, array_samples
from tdcompile.data.task import Samples
from tdcompile.errors import InputError, nearest
from tdcompile.support.optional_import import import_optional

_TENTH = 10  # an archive without test samples holds one in ten out
_NPY = b"\x93NUMPY"  # the first bytes of a .npy file


def read_digits(argument: str, wanted: NetworkInput, seed: int) -> tuple[Split, Split | None]:
    """Read scikit-learn's digits.

    The test split is a fixed fifth of each class, equal for every seed: figures stay comparable and splits never mix.
    """
    bunch = import_optional("sklearn.datasets").load_digits()
    x, y = to_tensor(bunch.images, "digits") / 16, to_tensor(bunch.target, "digits")  # pixels are 0 to 16
    if wanted.integer:
        x = (x * 255).round().to(torch.uint8)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    rank = torch.zeros_like(y)  # the place of each sample within its class
    for label in range(int(y.max()) + 1):
        members = order[y[order] == label]
        rank[members] = torch.arange(len(members))
    test = rank[order] % 5 == 4

    def part(name: str, chosen: Tensor) -> Split:  # no other arrays are resized
        return Split.checked(f"{name} of 'digits'", ArrayReader(x[chosen], wanted, stretch=True), y[chosen])

    return part("train", order[~test]), part("test", order[test])


def read_npz(argument: str, wanted: NetworkInput, seed: int) -> tuple[Split | Samples, Split | Samples | None]:
    """Read ``x``, ``y``, ``x_test``, ``y_test`` of an ``.npz`` file, or arrays named like the network's inputs.

    Without test samples, a tenth is held out. Targets ``y`` have any shape ``(N, ...)``.

    Raises:
        InputError: there is no such file, it is damaged, or its arrays do not fit.
    """
    path = Path(argument).expanduser()
    if not path.is_file():
        raise InputError(f"npz: there is no file '{path}'")
    held = _archive(path)
    train, test = f"train of 'npz:{path}'", f"test of 'npz:{path}'"
    names = wanted.members.names
    if names != ("x",) and "x" not in held and all(name in held for name in names if "mask" not in name):
        return _by_name(held, (train, test), wanted, seed)
    x, key = _inputs(held, path, wanted)
    y = held.get(key)
    if "x_test" in held:
        x_test = to_tensor(held["x_test"], f"npz: 'x_test' in '{path}'")
        return _split(train, x, y, wanted), _split(test, x_test, held.get(f"{key}_test"), wanted)
    if f"{key}_test" in held:
        raise InputError(f"npz: '{path}' has '{key}_test' and no 'x_test': add the inputs, or remove the targets")
    if len(x) < 2:
        count = "1 sample" if len(x) else "0 samples"
        raise InputError(f"npz: '{path}' holds {count}; two at least are needed to hold one out")
    kept, out = _held_out(len(x), seed)
    if y is None or are_labels(y):
        labels = None if y is None else Labels.of(y, f"'npz:{path}'")
        if labels is not None:
            _require_targets_of_all(len(labels) == len(x), f"{len(labels)} labels", x, path)
        return array_split(train, x, labels, wanted, kept), array_split(test, x, labels, wanted, out)
    targets = to_tensor(y, f"npz: '{key}' in '{path}'")
    shape = tuple(targets.shape)
    _require_targets_of_all(shape[:1] == (len(x),), f"targets of shape {shape}", x, path)
    return array_samples(train, (x[kept], targets[kept]), wanted), array_samples(test, (x[out], targets[out]), wanted)


def _inputs(held: Mapping[str, NDArray[Any]], path: Path, wanted: NetworkInput) -> tuple[Tensor, str]:
    """Return the samples ``x`` of an archive, and the key of their targets."""
    if "x" not in held:
        raise InputError(f"npz: '{path}' has no array 'x': {nearest('x', held)}")
    key = wanted.members.targets or "y"
    if wanted.members.targets is not None and key not in held:
        raise InputError(f"--targets: '{path}' has no array '{key}': {nearest(key, held)}")
    x = to_tensor(held["x"], f"npz: 'x' in '{path}'")
    if x.ndim == 0:
        raise InputError(f"npz: 'x' in '{path}' is a single number, not an array of samples")
    return x, key


def _require_targets_of_all(found: bool, what: str, x: Tensor, path: Path) -> None:
    """Require a target of every sample.

    Raises:
        InputError: they are fewer or more.
    """
    if not found:
        raise InputError(f"npz: '{path}' has {len(x)} samples but {what}")


def _held_out(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the indices of the samples that are kept, and of a tenth that is held out."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held_out = max(1, count // _TENTH)
    return order[held_out:], order[:held_out]


def _split(name: str, x: Tensor, y: object | None, wanted: NetworkInput) -> Split | Samples:
    if y is None or are_labels(y):
        return array_split(name, x, y, wanted)
    return array_samples(name, (x, y), wanted)


def _by_name(
    held: dict[str, NDArray[Any]], names: tuple[str, str], wanted: NetworkInput, seed: int
) -> tuple[Samples, Samples]:
    """Return samples of arrays that are named like the network's inputs; those of the test end in ``_test``."""
    tested = {key.removesuffix("_test"): value for key, value in held.items() if key.endswith("_test")}
    trained = {key: value for key, value in held.items() if not key.endswith("_test")}
    if tested:
        return array_samples(names[0], trained, wanted), array_samples(names[1], tested, wanted)
    counts = {len(value) if value.ndim else 0 for value in trained.values()}
    if len(counts) != 1 or min(counts) < 2:
        raise InputError(f"{names[0]}: its arrays need one count of at least 2; their counts are {sorted(counts)}")
    kept, out = _held_out(counts.pop(), seed)
    parts = [{key: value[chosen.numpy()] for key, value in trained.items()} for chosen in (kept, out)]
    return array_samples(names[0], parts[0], wanted), array_samples(names[1], parts[1], wanted)


def array_split(name: str, x: Tensor, y: object | None, wanted: NetworkInput, chosen: Tensor | None = None) -> Split:
    """Make a split of arrays.

    Args:
        name: what messages call the split.
        x: samples ``(N, ...)``.
        y: class numbers or texts ``(N,)``, ``Labels``, or None.
        chosen: indices of the samples to keep; None keeps all. ``y`` are then ``Labels`` or None.

    Raises:
        InputError: the arrays do not fit the input or each other.
    """
    if chosen is not None:
        x, y = x[chosen], y[chosen] if isinstance(y, Labels) else None
    if x.ndim == 0:
        raise InputError(f"{name} is a single number, not an array of samples")
    return Split.checked(name, ArrayReader(x, wanted), y)


def _archive(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with path.open("rb") as file:
            if file.read(len(_NPY)) == _NPY:
                raise InputError(f"npz: '{path}' is a .npy of one array: save x and y in an .npz")
            if not zipfile.is_zipfile(file):
                raise InputError(f"npz: '{path}' is cut off or no npz")
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                return {key: archive[key] for key in archive.files}
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"npz: '{path}' cannot be read: {error or type(error).__name__}") from error
    except (ValueError, AttributeError, TypeError, pickle.PickleError) as error:
        raise InputError(f"npz: '{path}' is not an archive of plain arrays (pickled objects are refused)") from error
