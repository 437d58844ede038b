"""Tables of images and labels, read by ``datasets``: parquet files, image folders, and data sets of the hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tdcompile.data.network_input import NetworkInput
from tdcompile.data.readers import EncodedReader
from tdcompile.data.samples import Split
from tdcompile.data.task import Note
from tdcompile.errors import InputError, UnavailableError, nearest
from tdcompile.support.optional_import import import_optional

HELD_OUT = ("test", "validation", "valid", "val")  # names of the test split, best first
# Rows that are copied at a time. The default, a file's row group, is 0 for an empty file, which ``datasets`` refuses.
_ROWS = 1000
# Columns are found by their type. These names decide between several columns of one type.
_IMAGES = ("image", "img", "picture", "pixels")
_LABELS = ("label", "labels", "fine_label", "target", "class", "y")


def read_parquet(folder: str, wanted: NetworkInput) -> tuple[Split, Split | None]:
    """Read ``train*.parquet`` and ``test*.parquet`` (or ``validation*``, ``val*``); several files are one table.

    Raises:
        InputError: there is no such folder or file, or the table has no column of images.
        UnavailableError: ``datasets`` is missing.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        hint = f"; write its folder, parquet:{root.parent}" if root.is_file() else ""
        raise InputError(f"parquet: '{root}' is not a folder{hint}")
    train = sorted(root.glob("train*.parquet"))
    if not train:
        held = ", ".join(sorted(path.name for path in root.iterdir())[:5]) or "nothing"
        raise InputError(f"parquet: there is no train*.parquet in '{root}', which holds {held}")
    test = next((files for name in HELD_OUT if (files := sorted(root.glob(f"{name}*.parquet")))), None)
    return _parquet(train, wanted), _parquet(test, wanted) if test else None


def read_hub(name: str, wanted: NetworkInput) -> tuple[Split, Split | None]:
    """Read a data set of the hub, ``NAME`` or ``NAME:CONFIGURATION``.

    Raises:
        InputError: there is no such data set, or it has no images or no train split.
        UnavailableError: ``datasets`` is missing, or the hub cannot be reached.
    """
    datasets = import_optional("datasets")
    datasets.config.HF_DATASETS_TRUST_REMOTE_CODE = False  # versions before 4 would run a data set's own script
    path, _, configuration = name.partition(":")
    try:
        splits = datasets.load_dataset(path, configuration or None)
    except (FileNotFoundError, ValueError) as error:
        raise InputError(f"hub: '{name}' cannot be loaded: {error}") from error
    except Exception as error:  # an offline client raises the errors of its HTTP library
        raise UnavailableError(f"hub: '{name}' cannot be fetched: {type(error).__name__}: {error}") from error
    if "train" not in splits:
        raise InputError(f"hub: '{name}' has no split 'train': {nearest('train', splits)}")
    held_out = [_split(splits[key], f"{key} of 'hub:{name}'", wanted) for key in HELD_OUT if _judges(splits.get(key))]
    return _split(splits["train"], f"train of 'hub:{name}'", wanted), next(iter(held_out), None)


def read_image_files(
    name: str,
    files: Sequence[Path],
    labels: Sequence[int] | None,
    wanted: NetworkInput,
    notes: tuple[Note, ...] = (),
) -> Split:
    """Read image files.

    Args:
        name: what messages call the split.
        labels: a class number for each file, or None.
        notes: messages for the report.
    """
    datasets = import_optional("datasets")
    columns: dict[str, Any] = {"image": [str(path) for path in files]}
    features = {"image": datasets.Image(decode=False)}
    if labels is not None:
        columns["label"], features["label"] = list(labels), datasets.Value("int64")
    split = _split(datasets.Dataset.from_dict(columns, features=datasets.Features(features)), name, wanted)
    return replace(split, notes=notes)


def _parquet(files: Sequence[Path], wanted: NetworkInput) -> Split:
    datasets = import_optional("datasets")
    name = f"'{files[0]}'" + (f" and {len(files) - 1} more" if len(files) > 1 else "")
    try:
        with _quiet(datasets):
            table = datasets.Dataset.from_parquet([str(file) for file in files], batch_size=_ROWS)
    except Exception as error:  # ``datasets`` wraps pyarrow's errors in several of its own
        if "corresponds to no data" in str(error):
            raise InputError(f"{name} holds no samples") from error
        cause = error.__cause__ or error
        raise InputError(f"{name} cannot be read as parquet: {cause}") from error
    return _split(table, name, wanted, files[0].parent)


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Hide progress bars and log lines of ``datasets``: our own messages report errors."""
    shown, verbosity = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if shown:
            datasets.enable_progress_bars()


def _judges(table: Any) -> bool:
    """Return whether a split can be the test split: some sets keep test labels secret and write -1 there."""
    if table is None:
        return False
    label = _label_column(table, "the test split")[0]
    values = [] if label is None else table[label][:]
    return not any(isinstance(value, int) for value in values) or max(values) >= 0


def _split(table: Any, name: str, wanted: NetworkInput, folder: Path = Path()) -> Split:
    """Make a split of a ``datasets.Dataset``.

    Args:
        folder: where relative paths in the image column start.
    """
    datasets = import_optional("datasets")
    image = _pick({key for key, kind in table.features.items() if _is_image(kind, datasets)}, _IMAGES, "images", name)
    if image is None:
        kinds = ", ".join(f"{key}: {getattr(kind, 'dtype', kind)}" for key, kind in table.features.items())
        raise InputError(f"{name} has no column of images ({{bytes, path}} or binary), only {kinds}")
    (label, notes), labels = _label_column(table, name), None
    if label is not None:
        if missing := table.data.column(label).null_count:
            raise InputError(f"{name}: {missing} values of the column '{label}' are missing")
        labels = np.asarray(table[label][:], dtype=object if _is_text(table.features[label]) else np.int64)
    encoded = table.select_columns([image])
    if isinstance(table.features[image], datasets.Image):
        encoded = encoded.cast_column(image, datasets.Image(decode=False))

    def fetch(index: int) -> bytes | Path:
        return _encoded(encoded[index][image], index, folder)

    return Split.checked(name, EncodedReader(len(table), fetch, wanted), labels, notes)


def _encoded(value: Any, index: int, folder: Path) -> bytes | Path:
    """Return the bytes of an image, or the path of its file: a column holds one of them or both."""
    image, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if image is not None:
        return bytes(image)
    if path is None:
        raise InputError(f"sample {index} has no image")
    return folder / str(path)


def _is_image(kind: Any, datasets: Any) -> bool:
    if isinstance(kind, Mapping):
        return "bytes" in kind and _is_image(kind["bytes"], datasets)
    return isinstance(kind, datasets.Image) or getattr(kind, "dtype", None) in ("binary", "large_binary")


def _label_column(table: Any, name: str) -> tuple[str | None, tuple[Note, ...]]:
    """Return the column of labels, and what a user may not expect of the choice.

    It is a ``ClassLabel`` if there is one, else a column of integers or text with a usual name, else one of integers.

    Raises:
        InputError: several columns may be meant, or a column with a usual name holds neither integers nor text.
    """
    datasets = import_optional("datasets")
    kinds = {key: kind for key, kind in table.features.items() if not _is_image(kind, datasets)}
    known = {key for key, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)}
    if known:
        return _pick(known, _LABELS, "labels", name), ()
    whole = {key for key, kind in kinds.items() if str(getattr(kind, "dtype", "")).startswith(("int", "uint"))}
    named = [key for key in _LABELS if key in kinds]
    usable = [key for key in named if key in whole or _is_text(kinds[key])]
    if usable:
        return usable[0], ()
    if named:
        kind = getattr(kinds[named[0]], "dtype", kinds[named[0]])
        raise InputError(
            f"{name}: the column '{named[0]}' holds {kind}, and labels are integers from 0 or text: convert the "
            "column, or remove it to go on without labels"
        )
    label, others = _pick(whole, _LABELS, "labels", name), ", ".join(kinds)
    if label is not None:
        return label, (Note(f"{name}: the labels are read from the column '{label}'"),)
    none = f"{name}: there are no labels, because none of the columns {others} is named {_LABELS[0]} or holds integers"
    return None, (Note(none, warning=True),) if kinds else ()


def _is_text(kind: Any) -> bool:
    return getattr(kind, "dtype", None) in ("string", "large_string")


def _pick(found: set[str], names: Sequence[str], what: str, where: str) -> str | None:
    if len(found) < 2:
        return next(iter(found), None)
    named = next((name for name in names if name in found), None)
    if named is None:
        raise InputError(f"{where} has several columns of {what} ({', '.join(sorted(found))}); keep one of them")
    return named
