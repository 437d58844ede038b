"""``--data``: each kind of data, from its text to train and test samples of the network's input."""

from __future__ import annotations

import pickle
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tdcompile.data.images import Normalisation, Shape, to_tensor
from tdcompile.data.readers import ArrayReader, DatasetReader
from tdcompile.data.samples import Loaded, Split
from tdcompile.data.tables import HELD_OUT, read_hub, read_image_files, read_parquet
from tdcompile.data.task import Samples
from tdcompile.errors import InputError, nearest
from tdcompile.support.optional_import import import_optional
from tdcompile.support.user_code import call_user_function, names_file, names_module

Part = Split | Samples
# What a caller may hand over for samples; see ``given``.
Given = str | Dataset[Any] | DataLoader[Any] | Tensor | NDArray[Any] | Sequence[Any] | None
_TENTH = 10
_NPY = b"\x93NUMPY"  # how a .npy begins


@dataclass(frozen=True)
class _Input:
    """The network's: its shape without the batch, and its type where it is known."""

    shape: Shape
    dtype: torch.dtype | None = None


_Read = Callable[[str, _Input, int], tuple[Part, Part | None]]


@dataclass(frozen=True)
class _Kind:
    form: str
    about: str
    read: _Read


def load_data(
    spec: str,
    input_shape: tuple[int, ...],
    normalize: str = "none",
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> tuple[Samples, Samples | None]:
    """Train and test samples; test is None where the data has none.

    Args:
        spec: one of ``kinds()``.
        input_shape: of the network's input, without the batch.
        normalize: ``none``, ``imagenet`` or ``m,m,m/s,s,s``.
        seed: of what is held out where the data brings no test samples.
        dtype: of the network's input: integers become numbers for one of floats; none leaves them what they are.

    Raises:
        InputError: there are no such data, or they do not fit the input; the first of each part is read to see.
        UnavailableError: a package or the hub is missing.
    """
    shape = tuple(input_shape)
    normalisation = Normalisation.parse(normalize, shape)
    read, argument = _resolve(spec)
    train, test = read(argument, _Input(shape, dtype), seed)
    classes = max(part.classes or 0 for part in (train, test) if part is not None)
    made = _finish(train, classes, normalisation, shape)
    return made, None if test is None else _finish(test, classes, normalisation, shape)


def given(
    data: Given,
    input_shape: tuple[int, ...],
    normalize: str = "none",
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> tuple[Samples | None, Samples | None]:
    """Train and test samples of what a caller hands over; each is None where there is none.

    Args:
        data: a text for ``load_data``; training samples, as ``Samples``, a map-style torch ``Dataset``, a
            ``DataLoader`` (of which the data set is read, in batches and an order of our own), an array ``x``
            ``(N, ...)`` or arrays ``(x, y)`` with class numbers ``y`` ``(N,)``; or a pair (training, test) of such.
        input_shape: of the network's input, without the batch.
        normalize: ``none``, ``imagenet`` or ``m,m,m/s,s,s``; of ``Samples`` ``none`` alone.
        seed: of what is held out where a text's data bring no test samples.
        dtype: of the network's input: integers become numbers for one of floats; none leaves them what they are.

    Raises:
        InputError: it is none of these, does not fit the input, or is not there to normalise; the first sample of each
            part is read to see, but of ``Samples``, which may be of several inputs and other lengths.
    """
    if data is None:
        if normalize != "none":
            raise InputError(f"there are no data to normalise by '{normalize}': give --data (from Python data=) too")
        return None, None
    if isinstance(data, str):
        return load_data(data, input_shape, normalize, seed, dtype)
    shape = tuple(input_shape)
    named = zip(_halves(data), ("the data", "the test data"), strict=True)
    parts = [None if part is None else _part(part, what, _Input(shape, dtype)) for part, what in named]
    if not any(isinstance(part, Split) for part in parts) and normalize == "none":
        return parts[0], parts[1]  # type: ignore[return-value]  # Samples
    classes = max((part.classes or 0 for part in parts if part is not None), default=0)
    normalisation = Normalisation.parse(normalize, shape)
    made = [None if part is None else _finish(part, classes, normalisation, shape) for part in parts]
    return made[0], made[1]


def kinds() -> dict[str, str]:
    """Each form that a spec may have, and what it reads."""
    return {kind.form: kind.about for kind in (*_KINDS.values(), _CALLABLE)}


def _resolve(spec: str) -> tuple[_Read, str]:
    name, colon, argument = spec.partition(":")
    kind = _KINDS.get(name)
    if kind is not None:
        if (":" in kind.form) != bool(argument) or (colon and not argument):
            raise InputError(f"the data '{spec}' is not of the form {kind.form}")
        return kind.read, argument
    place = spec.rpartition(":")[0]
    if place and (names_file(place) or "." in place or names_module(place)):
        return _CALLABLE.read, spec
    raise InputError(f"unknown kind of data '{name}': {nearest(name, _KINDS)}, or {_CALLABLE.form}")


def _finish(part: Part, classes: int, normalisation: Normalisation, shape: Shape) -> Samples:
    if isinstance(part, Split):
        made: Samples = Loaded(part, classes, normalisation)
        made.batch([0])
        return made
    if normalisation.mean:
        raise InputError("--normalize cannot be given with data that are Samples already: they normalise themselves")
    if len(part) == 0:
        raise InputError("the Samples given hold no samples")
    found = part.batch([0]).inputs
    if len(found) == 1 and tuple(found[0].shape[1:]) != shape:
        raise InputError(f"the Samples given have the shape {tuple(found[0].shape[1:])}, the input is {shape}")
    return part


def _digits(argument: str, wanted: _Input, seed: int) -> tuple[Split, Split | None]:
    """Always the same fifth of each class is test, whatever the seed: figures stay comparable, sets never mix."""
    bunch = import_optional("sklearn.datasets").load_digits()
    x, y = to_tensor(bunch.images, "digits") / 16, to_tensor(bunch.target, "digits")  # the set counts from 0 to 16
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    rank = torch.zeros_like(y)  # of each sample within its class, in that order
    for label in range(int(y.max()) + 1):
        members = order[y[order] == label]
        rank[members] = torch.arange(len(members))
    test = rank[order] % 5 == 4

    def part(name: str, chosen: Tensor) -> Split:  # the one set of arrays that is brought to any size
        return Split.checked(f"{name} of 'digits'", ArrayReader(x[chosen], wanted.shape, stretch=True), y[chosen])

    return part("train", order[~test]), part("test", order[test])


def _npz(argument: str, wanted: _Input, seed: int) -> tuple[Split, Split | None]:
    path = Path(argument).expanduser()
    if not path.is_file():
        raise InputError(f"npz: there is no file '{path}'")
    held = _archive(path)
    if "x" not in held:
        raise InputError(f"npz: '{path}' has no array 'x': {nearest('x', held)}")
    train, test = f"train of 'npz:{path}'", f"test of 'npz:{path}'"
    x, y = held["x"], held.get("y")
    if "x_test" in held:
        return _arrays(train, x, y, wanted), _arrays(test, held["x_test"], held.get("y_test"), wanted)
    if x.ndim == 0:
        raise InputError(f"npz: 'x' in '{path}' is a single number, not an array of samples")
    if len(x) < 2:
        count = "1 sample" if len(x) else "0 samples"
        raise InputError(f"npz: '{path}' holds {count}; two at least are needed to hold one out")
    if y is not None and len(y) != len(x):
        raise InputError(f"npz: '{path}' has {len(x)} samples but {len(y)} labels")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    held_out = max(1, len(x) // _TENTH)
    return _arrays(train, x, y, wanted, order[held_out:]), _arrays(test, x, y, wanted, order[:held_out])


def _archive(path: Path) -> dict[str, Tensor]:
    try:
        with path.open("rb") as file:
            if file.read(len(_NPY)) == _NPY:
                raise InputError(f"npz: '{path}' is a .npy of one array: save x and y in an .npz")
            if not zipfile.is_zipfile(file):
                raise InputError(f"npz: '{path}' is cut off or no npz")
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                return {key: to_tensor(archive[key], f"npz: '{key}' in '{path}'") for key in archive.files}
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"npz: '{path}' cannot be read: {error or type(error).__name__}") from error
    except (ValueError, AttributeError, TypeError, pickle.PickleError) as error:
        raise InputError(f"npz: '{path}' is not an archive of plain arrays (pickled objects are refused)") from error


def _parquet(argument: str, wanted: _Input, seed: int) -> tuple[Split, Split | None]:
    return read_parquet(argument, wanted.shape)


def _hub(argument: str, wanted: _Input, seed: int) -> tuple[Split, Split | None]:
    return read_hub(argument, wanted.shape)


def _arrays(name: str, x: Tensor, y: Tensor | None, wanted: _Input, chosen: Tensor | None = None) -> Split:
    if chosen is not None:
        x, y = x[chosen], None if y is None else y[chosen]
    if x.ndim == 0:
        raise InputError(f"{name} is a single number, not an array of samples")
    return Split.checked(name, ArrayReader(x, wanted.shape, dtype=wanted.dtype), y)


def _imagefolder(argument: str, wanted: _Input, seed: int) -> tuple[Split, Split | None]:
    root = Path(argument).expanduser()
    if not (root / "train").is_dir():
        raise InputError(f"imagefolder: there is no folder '{root / 'train'}'")
    classes = {folder.name: label for label, folder in enumerate(_class_folders(root / "train"))}
    test = next((root / name for name in HELD_OUT if (root / name).is_dir()), None)
    return _folder(root / "train", classes, wanted.shape), _folder(test, classes, wanted.shape) if test else None


def _class_folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not _hidden(path, root))


def _hidden(path: Path, root: Path) -> bool:
    """As notebooks and file managers leave behind: ``.ipynb_checkpoints``, ``._cat.png``."""
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _folder(root: Path, classes: Mapping[str, int], shape: Shape) -> Split:
    pillow = import_optional("PIL.Image")
    suffixes = {suffix for suffix, form in pillow.registered_extensions().items() if form in pillow.OPEN}
    held = {
        folder.name: [
            path for path in sorted(folder.rglob("*")) if path.suffix.lower() in suffixes and not _hidden(path, folder)
        ]
        for folder in _class_folders(root)
    }
    for name, images in held.items():
        if name not in classes:
            raise InputError(f"imagefolder: '{root / name}' is no class of train: {nearest(name, classes)}")
        if not images:
            raise InputError(f"imagefolder: the class folder '{root / name}' holds no images; fill or remove it")
    found = [(path, name) for name, images in held.items() for path in images]
    # By class, the first thousand would be of one class alone; the order is mixed once and for all.
    mixed = [found[i] for i in torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()]
    files, labels = [path for path, _ in mixed], [classes[name] for _, name in mixed]
    return read_image_files(f"'{root}'", files, labels, shape)


def _callable(spec: str, wanted: _Input, seed: int) -> tuple[Part, Part | None]:
    made = call_user_function(spec)
    paired = isinstance(made, tuple | list) and len(made) == 2
    if not paired and not isinstance(made, Dataset | DataLoader | Tensor | np.ndarray):
        raise InputError(
            f"'{spec}' returned a {type(made).__name__}; a pair (train, test) is needed, test may be None, "
            "or arrays (x, y)"
        )
    train, test = _halves(made)
    return _part(train, f"train of '{spec}'", wanted), None if test is None else _part(
        test, f"test of '{spec}'", wanted
    )


def _halves(made: Any) -> tuple[Any, Any]:
    """Training and test samples where these are a pair; all else, arrays ``(x, y)`` too, are training samples alone."""
    if isinstance(made, tuple | list) and len(made) == 2 and not isinstance(made[0], Tensor | np.ndarray):
        return made[0], made[1]
    return made, None


def _part(made: object, name: str, wanted: _Input) -> Part:
    if isinstance(made, Samples):
        return made
    if isinstance(made, DataLoader):
        return _part(made.dataset, name, wanted)
    if isinstance(made, Dataset):
        try:
            reader = DatasetReader(made, wanted.shape, wanted.dtype)
            labels = reader.labels()
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        return Split.checked(name, reader, labels)
    if isinstance(made, Tensor | np.ndarray):
        made = (made,)
    if isinstance(made, tuple | list) and len(made) in (1, 2):
        x, y = (*made, None)[:2]
        return _arrays(name, to_tensor(x, name), None if y is None else to_tensor(y, f"the labels of {name}"), wanted)
    raise InputError(
        f"{name} is a {type(made).__name__}; Samples, a torch Dataset or DataLoader, or a pair of arrays (x, y) is "
        "needed"
    )


_KINDS = {
    "digits": _Kind("digits", "8x8 digits that scikit-learn brings along; no download", _digits),
    "parquet": _Kind("parquet:DIR", "train*.parquet and test*.parquet, in the Hugging Face image schema", _parquet),
    "imagefolder": _Kind(
        "imagefolder:DIR", "train/ and test/ or val/, a folder of images for each class", _imagefolder
    ),
    "npz": _Kind("npz:FILE", "arrays x, y and x_test, y_test; without the latter a tenth is held out", _npz),
    "hub": _Kind("hub:NAME", "a data set of the Hugging Face hub, NAME or NAME:CONFIGURATION", _hub),
}
_CALLABLE = _Kind(
    "file.py:callable", "your own, also package.module:callable; returns (train, test) or (x, y)", _callable
)
