"""Samples from the text of ``--data``, or from the objects that a caller hands over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tdcompile.data import synthetic
from tdcompile.data.arrays import array_split, read_digits, read_npz
from tdcompile.data.image_folders import read_image_folder
from tdcompile.data.images import Normalisation, Shape, to_tensor
from tdcompile.data.labels import described, renumbered
from tdcompile.data.loaders import read_loader
from tdcompile.data.members import no_keys
from tdcompile.data.network_input import NetworkInput, SampleFields
from tdcompile.data.readers import DatasetReader
from tdcompile.data.samples import Loaded, Split
from tdcompile.data.scenes import read_scenes
from tdcompile.data.structured import (
    StreamSamples,
    StructuredSamples,
    are_labels,
    array_samples,
    is_stream,
    read_stream,
    read_structured,
)
from tdcompile.data.tables import read_hub, read_parquet
from tdcompile.data.task import Note, Samples
from tdcompile.data.text import read_text
from tdcompile.errors import InputError, nearest
from tdcompile.support.user_code import call_user_function, names_file, names_module

Part = Split | Samples
# The types that a caller may hand over as data; see ``given``.
Given = str | Dataset[Any] | DataLoader[Any] | Tensor | NDArray[Any] | Sequence[Any] | Mapping[str, Any] | None

_Read = Callable[[str, NetworkInput, int], tuple[Part, Part | None]]


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
    fields: SampleFields | None = None,
) -> tuple[Samples, Samples | None]:
    """Return train and test samples; test is None if the data has none.

    Args:
        spec: one of ``kinds()``.
        input_shape: shape of the network's input, without the batch.
        normalize: ``none``, ``imagenet`` or ``m,m,m/s,s,s``.
        seed: seeds the hold-out split if the data has no test set.
        dtype: target input dtype; integer data is cast if it is floating. None leaves integers as they are.
        fields: all inputs of the network by name, and how targets are told from them.

    Raises:
        InputError: there is no such data, or the first sample of a part does not fit the input.
        UnavailableError: a package or the hub is missing.
    """
    shape = tuple(input_shape)
    normalisation = Normalisation.parse(normalize, shape, dtype)
    read, argument = _resolve(spec)
    if fields is not None and fields.targets is not None and read not in (read_npz, _CALLABLE.read):
        raise InputError(f"--targets '{fields.targets}' has no effect on the data '{spec}', which have no keys")
    if fields is not None and fields.tokenizer is not None and read is not read_text:
        raise InputError(f"--tokenizer has no effect on the data '{spec}': it reads text:FILE")
    train, test = read(argument, NetworkInput(shape, dtype, fields), seed)
    made = _finished((train, test), normalisation, shape)
    assert made[0] is not None  # readers return training samples
    return made[0], made[1]


def given(
    data: Given,
    input_shape: tuple[int, ...],
    normalize: str = "none",
    seed: int = 0,
    dtype: torch.dtype | None = None,
    fields: SampleFields | None = None,
) -> tuple[Samples | None, Samples | None]:
    """Return train and test samples of data that a caller hands over; a missing part is None.

    Args:
        data: a text for ``load_data``, training samples, or a pair (training, test). Samples are ``Samples``, a
            torch ``Dataset``, a ``DataLoader`` (read by index, with its ``collate_fn`` and sampler), an array
            ``x`` ``(N, ...)``, arrays ``(x, y)``, a mapping of arrays by the names of inputs, or a list of more than
            two samples that are tuples or mappings. Targets ``y`` have any shape ``(N, ...)``. Streams
            (``IterableDataset``) are read from their beginning.
        input_shape: shape of the network's input, without the batch.
        normalize: ``none``, ``imagenet`` or ``m,m,m/s,s,s``; ``Samples`` allow only ``none``.
        seed: seeds the hold-out split if the data of a text has no test set, and the draw of a loader's sampler.
        dtype: target input dtype; integer data is cast if it is floating. None leaves integers as they are.
        fields: all inputs of the network by name, and how targets are told from them.

    Raises:
        InputError: the data is none of these, its first sample does not fit the input, or ``normalize`` is given
            without data. ``Samples`` are not read: they may have several inputs and other lengths.
    """
    if data is None:
        if normalize != "none":
            raise InputError(f"there are no data to normalise by '{normalize}': give --data (from Python data=) too")
        for option, value in (("targets", fields and fields.targets), ("tokenizer", fields and fields.tokenizer)):
            if value is not None:
                raise InputError(f"--{option} has no effect without data: give --data (from Python data=) too")
        return None, None
    if isinstance(data, str):
        return load_data(data, input_shape, normalize, seed, dtype, fields)
    if fields is not None and fields.tokenizer is not None:
        raise InputError("--tokenizer has no effect on data that are no text: it reads text:FILE")
    shape = tuple(input_shape)
    named = zip(_halves(data), ("the data", "the test data"), strict=True)
    wanted = NetworkInput(shape, dtype, fields)
    parts = [None if part is None else _part(part, what, wanted, seed) for part, what in named]
    ours = (Split, StructuredSamples, StreamSamples)
    if not any(isinstance(part, ours) for part in parts) and normalize == "none":
        return parts[0], parts[1]  # type: ignore[return-value]  # Samples
    return _finished((parts[0], parts[1]), Normalisation.parse(normalize, shape, dtype), shape)


def kinds() -> dict[str, str]:
    """Return every form of a data text, with a line that explains it."""
    return {kind.form: kind.about for kind in (*_KINDS.values(), _CALLABLE)} | {synthetic.NAME: synthetic.ABOUT}


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
    if synthetic.is_synthetic(spec):
        raise InputError(f"the data '{spec}' have neither labels nor test samples: real data are needed here")
    raise InputError(f"unknown kind of data '{name}': {nearest(name, (*_KINDS, synthetic.NAME))}, or {_CALLABLE.form}")


def _numbered_alike(train: Part | None, test: Part | None) -> tuple[Part | None, Part | None]:
    """Return both with the class numbers of the training samples if their labels are text, and tell the classes.

    Raises:
        InputError: a label is no class of the training samples, or only one of the two has text.
    """
    if not isinstance(train, Split) or train.labels is None:
        return train, _classes_told(test)
    if not isinstance(test, Split) or test.labels is None:
        return _classes_told(train), test
    if bool(train.names) != bool(test.names):
        text, number = (train, test) if train.names else (test, train)
        raise InputError(f"the labels of {text.name} are text, and those of {number.name} are numbers")
    if train.names != test.names:
        numbers = renumbered(test.labels, test.names, train.names, test.name)
        test = replace(test, labels=numbers, names=train.names)
    return _classes_told(train), test


def _classes_told(part: Part | None) -> Part | None:
    if not isinstance(part, Split) or not part.names:
        return part
    text = f"the labels of {part.name} are text; their sorted values are the classes: {described(part.names)}"
    return replace(part, notes=(*part.notes, Note(text)))


def _finished(
    parts: tuple[Part | None, Part | None], normalisation: Normalisation, shape: Shape
) -> tuple[Samples | None, Samples | None]:
    train, test = _numbered_alike(*parts)
    classes = max((part.classes or 0 for part in (train, test) if part is not None), default=0)
    made = [None if part is None else _finish(part, classes, normalisation, shape) for part in (train, test)]
    return made[0], made[1]


def _finish(part: Part, classes: int, normalisation: Normalisation, shape: Shape) -> Samples:
    if isinstance(part, Split):
        made: Samples = Loaded(part, classes, normalisation)
        made.batch([0])
        return made
    if isinstance(part, StructuredSamples | StreamSamples):
        part.normalised(normalisation).batch([0])
        return part
    if normalisation.mean:
        raise InputError("--normalize cannot be given with data that are Samples already: they normalise themselves")
    if len(part) == 0:
        raise InputError("the Samples given hold no samples")
    found = part.batch([0]).inputs
    if len(found) == 1 and tuple(found[0].shape[1:]) != shape:
        raise InputError(f"the Samples given have the shape {tuple(found[0].shape[1:])}, the input is {shape}")
    return part


def _parquet(argument: str, wanted: NetworkInput, seed: int) -> tuple[Split, Split | None]:
    return read_parquet(argument, wanted)


def _hub(argument: str, wanted: NetworkInput, seed: int) -> tuple[Split, Split | None]:
    return read_hub(argument, wanted)


def _callable(spec: str, wanted: NetworkInput, seed: int) -> tuple[Part, Part | None]:
    made = call_user_function(spec)
    paired = isinstance(made, tuple | list) and len(made) == 2
    arrays = isinstance(made, Mapping) or (isinstance(made, tuple | list) and len(made) > 2)
    if not paired and not arrays and not isinstance(made, Dataset | DataLoader | Tensor | np.ndarray):
        raise InputError(
            f"'{spec}' returned a {type(made).__name__}; a pair (train, test) is needed, test may be None, "
            "or arrays (x, y)"
        )
    train, test = _halves(made)
    samples = _part(train, f"train of '{spec}'", wanted, seed)
    return samples, None if test is None else _part(test, f"test of '{spec}'", wanted, seed)


def _halves(made: Any) -> tuple[Any, Any]:
    """Return a pair (training, test); anything else, arrays ``(x, y)`` too, is training data alone."""
    if isinstance(made, tuple | list) and len(made) == 2 and not isinstance(made[0], Tensor | np.ndarray):
        return made[0], made[1]
    return made, None


class _Items(Dataset[Any]):
    """A list of samples as a map-style data set."""

    def __init__(self, items: Sequence[Any]) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, place: int) -> Any:
        return self._items[place]


def _listed(made: object) -> bool:
    """Return whether it is a list of samples, each a tuple or a mapping, and not a list of arrays."""
    return isinstance(made, list) and bool(made) and all(isinstance(item, tuple | Mapping) for item in made)


def _part(made: object, name: str, wanted: NetworkInput, seed: int) -> Part:
    if isinstance(made, Samples):
        return made
    if _listed(made):
        made = _Items(cast("list[Any]", made))
    if isinstance(made, DataLoader | Dataset):
        try:
            if is_stream(made):
                fields = wanted.members
                return read_stream(made, name, wanted, fields.stream_test if "test" in name else fields.stream)
            if isinstance(made, DataLoader):
                return read_loader(made, name, wanted, seed)
            structured = read_structured(made, name, wanted)
            if structured is not None:
                return structured
            if wanted.members.targets is not None:
                raise no_keys(wanted.members.targets, name)
            reader = DatasetReader(made, wanted)
            labels = reader.labels()
        except InputError as error:
            raise InputError(str(error) if name in str(error) else f"{name}: {error}") from error
        return Split.checked(name, reader, labels)
    if isinstance(made, Tensor | np.ndarray):
        made = (made,)
    if isinstance(made, Mapping):
        return array_samples(name, made, wanted)
    if isinstance(made, tuple | list) and any(isinstance(part, Dataset | DataLoader | Samples) for part in made):
        raise InputError(f"{name} holds {len(made)} data sets; a pair (train, test) is needed, and test may be None")
    if isinstance(made, tuple | list) and made:
        if wanted.members.targets is not None:
            raise no_keys(wanted.members.targets, name)
        if len(made) in (1, 2) and len(wanted.members.names) == 1 and (len(made) == 1 or are_labels(made[1])):
            x, y = (*made, None)[:2]
            return array_split(name, to_tensor(x, name), y, wanted)
        return array_samples(name, tuple(made), wanted)
    raise InputError(
        f"{name} is a {type(made).__name__}; Samples, a torch Dataset or DataLoader, or arrays (x, y) or by name "
        "are needed"
    )


_KINDS = {
    "digits": _Kind("digits", "8x8 digits that scikit-learn brings along; no download", read_digits),
    "scenes": _Kind("scenes", "digits in front of photographs, with a class for each pixel; no download", read_scenes),
    "parquet": _Kind("parquet:DIR", "train*.parquet and test*.parquet, in the Hugging Face image schema", _parquet),
    "imagefolder": _Kind(
        "imagefolder:DIR", "train/ and test/ or val/, a folder of images for each class", read_image_folder
    ),
    "npz": _Kind("npz:FILE", "arrays x, y and x_test, y_test; without the latter a tenth is held out", read_npz),
    "text": _Kind("text:FILE", "text for a language network, in windows of its input; with --tokenizer", read_text),
    "hub": _Kind("hub:NAME", "a data set of the Hugging Face hub, NAME or NAME:CONFIGURATION", _hub),
}
_CALLABLE = _Kind(
    "file.py:callable", "your own, also package.module:callable; returns (train, test) or (x, y)", _callable
)
