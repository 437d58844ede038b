"""Tables of images and labels, read by ``datasets``: parquet files, image folders, and data sets of the hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tdcompile.data.images import Shape
from tdcompile.data.readers import EncodedReader
from tdcompile.data.samples import Split
from tdcompile.errors import InputError, UnavailableError, nearest
from tdcompile.support.optional_import import import_optional

HELD_OUT = ("test", "validation", "valid", "val")  # names of the test split, best first
# Rows that are copied at a time. The default, a file's row group, is 0 for an empty file, which ``datasets`` refuses.
_ROWS = 1000
# Columns are found by their type. These names decide between several columns of one type.
_IMAGES = ("image", "img", "picture", "pixels")
_LABELS = ("label", "labels", "fine_label", "target", "class", "y")


def read_parquet(folder: str, shape: Shape) -> tuple[Split, Split | None]:
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
    return _parquet(train, shape), _parquet(test, shape) if test else None


def read_hub(name: str, shape: Shape) -> tuple[Split, Split | None]:
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
    held_out = [_split(splits[key], f"{key} of 'hub:{name}'", shape) for key in HELD_OUT if _judges(splits.get(key))]
    return _split(splits["train"], f"train of 'hub:{name}'", shape), next(iter(held_out), None)


def read_image_files(name: str, files: Sequence[Path], labels: Sequence[int], shape: Shape) -> Split:
    """Read image files with a class number each.

    Args:
        name: what messages call the split.
    """
    datasets = import_optional("datasets")
    columns = {"image": [str(path) for path in files], "label": list(labels)}
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("int64")})
    return _split(datasets.Dataset.from_dict(columns, features=features), name, shape)


def _parquet(files: Sequence[Path], shape: Shape) -> Split:
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
    return _split(table, name, shape, files[0].parent)


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
    label = _label_column(table, "the test split")
    return label is None or len(table) == 0 or max(table[label][:]) >= 0


def _split(table: Any, name: str, shape: Shape, folder: Path = Path()) -> Split:
    """Make a split of a ``datasets.Dataset``.

    Args:
        folder: where relative paths in the image column start.
    """
    datasets = import_optional("datasets")
    image = _pick({key for key, kind in table.features.items() if _is_image(kind, datasets)}, _IMAGES, "images", name)
    if image is None:
        kinds = ", ".join(f"{key}: {getattr(kind, 'dtype', kind)}" for key, kind in table.features.items())
        raise InputError(f"{name} has no column of images ({{bytes, path}} or binary), only {kinds}")
    label, labels = _label_column(table, name), None
    if label is not None:
        if missing := table.data.column(label).null_count:
            raise InputError(f"{name}: {missing} values of the column '{label}' are missing")
        labels = np.asarray(table[label][:], dtype=np.int64)
    encoded = table.select_columns([image])
    if isinstance(table.features[image], datasets.Image):
        encoded = encoded.cast_column(image, datasets.Image(decode=False))

    def fetch(index: int) -> bytes | Path:
        return _encoded(encoded[index][image], index, folder)

    return Split.checked(name, EncodedReader(len(table), fetch, shape), labels)


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


def _label_column(table: Any, name: str) -> str | None:
    """Return the column of class numbers: a ``ClassLabel`` if there is one, else a column of integers."""
    datasets = import_optional("datasets")
    named = {key for key, kind in table.features.items() if isinstance(kind, datasets.ClassLabel)}
    whole = {key for key, kind in table.features.items() if str(getattr(kind, "dtype", "")).startswith(("int", "uint"))}
    return _pick(named or whole, _LABELS, "labels", name)


def _pick(found: set[str], names: Sequence[str], what: str, where: str) -> str | None:
    if len(found) < 2:
        return next(iter(found), None)
    named = next((name for name in names if name in found), None)
    if named is None:
        raise InputError(f"{where} has several columns of {what} ({', '.join(sorted(found))}); keep one of them")
    return named
