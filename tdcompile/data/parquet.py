"""Tables of images and labels in the Hugging Face schema: parquet files, and data sets of the hub."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tdcompile.data.images import Shape
from tdcompile.data.readers import EncodedReader
from tdcompile.data.samples import Split
from tdcompile.errors import InputError, UnavailableError, nearest
from tdcompile.support.optional_import import import_optional

HELD_OUT = ("test", "validation", "valid", "val")  # where the test samples are, best first
# Columns are found by their type; these names decide only between several of it.
_IMAGES = ("image", "img", "picture", "pixels")
_LABELS = ("label", "labels", "fine_label", "target", "class", "y")


def read_parquet(folder: str, shape: Shape, seed: int) -> tuple[Split, Split | None]:
    """``train*.parquet`` and ``test*.parquet`` (or ``validation*``, ``val*``) of a folder; several are one table.

    Raises:
        InputError: there is no such folder or file, or the table has no column of images.
        UnavailableError: pyarrow is missing.
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


def read_hub(name: str, shape: Shape, seed: int) -> tuple[Split, Split | None]:
    """A data set of the hub, ``NAME`` or ``NAME:CONFIGURATION``, through ``datasets``.

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
    except Exception as error:  # a client that is offline raises what its HTTP library happens to
        raise UnavailableError(f"hub: '{name}' cannot be fetched: {type(error).__name__}: {error}") from error
    if "train" not in splits:
        raise InputError(f"hub: '{name}' has no split 'train': {nearest('train', splits)}")
    held_out = [_hub(splits[key], f"{key} of 'hub:{name}'", datasets) for key in HELD_OUT if key in splits]
    # Sets whose test labels are kept secret carry -1 there, and are judged on validation.
    judged = next((table for table in held_out if table.labels is None or max(table.labels) >= 0), None)
    return _hub(splits["train"], f"train of 'hub:{name}'", datasets).split(shape), judged.split(
        shape
    ) if judged else None


class _Table:
    def __init__(self, name: str, count: int, row: Callable[[int], Any], labels: Any, folder: Path) -> None:
        self.name, self.count, self.row, self.labels, self.folder = name, count, row, labels, folder

    def split(self, shape: Shape) -> Split:
        return Split.checked(self.name, EncodedReader(self.count, self._fetch, shape), self.labels)

    def _fetch(self, index: int) -> bytes | Path:
        """The bytes of an image, which stand alone, or beside the path they came from, or in the file it names."""
        held = self.row(index)
        image, path = (held.get("bytes"), held.get("path")) if isinstance(held, dict) else (held, None)
        if image is not None:
            return bytes(image)
        if path is None:
            raise InputError(f"sample {index} has no image")
        return self.folder / str(path)


def _parquet(files: Sequence[Path], shape: Shape) -> Split:
    arrow, parquet = import_optional("pyarrow"), import_optional("pyarrow.parquet")
    name = f"'{files[0]}'" + (f" and {len(files) - 1} more" if len(files) > 1 else "")
    try:
        schema = parquet.read_schema(files[0])
        image = _pick({f.name for f in schema if _is_image(f.type, arrow)}, _IMAGES, "images", name)
        label = _pick({f.name for f in schema if arrow.types.is_integer(f.type)}, _LABELS, "labels", name)
        if image is None:
            types = ", ".join(f"{field.name}: {field.type}" for field in schema)
            raise InputError(f"{name} has no column of images ({{bytes, path}} or binary), only {types}")
        columns = [image] if label is None else [image, label]
        # Half the memory of ``read_table``, which goes through pyarrow's data set engine.
        table = arrow.concat_tables([parquet.ParquetFile(file).read(columns=columns) for file in files])
        arrow.default_memory_pool().release_unused()
    except (arrow.ArrowException, OSError) as error:
        raise InputError(f"{name} cannot be read as parquet: {error}") from error
    labels = None
    if label is not None:
        if table[label].null_count:
            raise InputError(f"{name}: {table[label].null_count} values of the column '{label}' are missing")
        labels = table[label].to_numpy()
    rows = table[image]
    return _Table(name, len(table), lambda index: rows[index].as_py(), labels, files[0].parent).split(shape)


def _is_image(kind: Any, arrow: Any) -> bool:
    if arrow.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _is_image(kind.field(index).type, arrow)
    return bool(arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind))


def _hub(table: Any, name: str, datasets: Any) -> _Table:
    features = table.features
    image = _pick({key for key, kind in features.items() if isinstance(kind, datasets.Image)}, _IMAGES, "images", name)
    if image is None:
        raise InputError(f"{name} has no column of images, only {', '.join(features)}")
    named = {key for key, kind in features.items() if isinstance(kind, datasets.ClassLabel)}
    whole = {key for key, kind in features.items() if str(getattr(kind, "dtype", "")).startswith(("int", "uint"))}
    label = _pick(named or whole, _LABELS, "labels", name)
    labels = None if label is None else np.asarray(table[label][:])
    encoded = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    return _Table(name, len(table), lambda index: encoded[index][image], labels, Path())


def _pick(found: set[str], names: Sequence[str], what: str, where: str) -> str | None:
    if len(found) < 2:
        return next(iter(found), None)
    named = next((name for name in names if name in found), None)
    if named is None:
        raise InputError(f"{where} has several columns of {what} ({', '.join(sorted(found))}); keep one of them")
    return named
