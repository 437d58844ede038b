"""Image folders: one folder of images for each class below ``train/`` and ``test/`` or ``val/``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from tdcompile.data.network_input import NetworkInput
from tdcompile.data.samples import Split
from tdcompile.data.tables import HELD_OUT, read_image_files
from tdcompile.data.task import Note
from tdcompile.errors import InputError, nearest
from tdcompile.support.optional_import import import_optional

_Found = TypeVar("_Found")


def read_image_folder(argument: str, wanted: NetworkInput, seed: int) -> tuple[Split, Split | None]:
    """Read ``train/CLASS/...`` and ``test/CLASS/...``: the first folder below the split names the class.

    Images without class folders have no labels. Without ``train/``, the images of the folder itself are read.

    Raises:
        InputError: there are no images, a class of test is unknown, or a class folder holds no images.
        UnavailableError: pillow or ``datasets`` is missing.
    """
    root = Path(argument).expanduser()
    if not (root / "train").is_dir():
        if not root.is_dir() or not _images_in(root):
            held = ", ".join(folder.name for folder in _class_folders(root)[:5]) if root.is_dir() else ""
            more = f"; '{root}' holds the folders {held}" if held else ""
            raise InputError(f"imagefolder: there is no folder '{root / 'train'}'{more}")
        return _folder(root, {}, wanted), None
    classes = {folder.name: label for label, folder in enumerate(_class_folders(root / "train"))}
    test = next((root / name for name in HELD_OUT if (root / name).is_dir()), None)
    return _folder(root / "train", classes, wanted), _folder(test, classes, wanted) if test else None


def _class_folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not _hidden(path, root))


def _images_in(root: Path) -> list[Path]:
    """Return the images of a folder, without its subfolders."""
    suffixes = _suffixes()
    return sorted(p for p in root.iterdir() if p.is_file() and p.suffix.lower() in suffixes and not _hidden(p, root))


def _suffixes() -> set[str]:
    pillow = import_optional("PIL.Image")
    return {suffix for suffix, form in pillow.registered_extensions().items() if form in pillow.OPEN}


def _hidden(path: Path, root: Path) -> bool:
    """Return whether a path is hidden, like ``.ipynb_checkpoints`` and ``._cat.png``."""
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _folder(root: Path, classes: Mapping[str, int], wanted: NetworkInput) -> Split:
    loose, suffixes = _images_in(root), _suffixes()
    if not classes:
        if below := _class_folders(root):
            beside = f"'{root}' has folders, such as '{below[0].name}', beside images without a class folder"
            raise InputError(f"imagefolder: {beside}")
        text = f"'{root}' has no class folders: its {len(loose)} images have no labels, and accuracy is not measured"
        return read_image_files(
            f"'{root}'", _shuffled(loose), None, wanted, (Note(text, warning=True),) if loose else ()
        )
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
    mixed = _shuffled([(path, name) for name, images in held.items() for path in images])
    files, labels = [path for path, _ in mixed], [classes[name] for _, name in mixed]
    left = f"'{root}': {len(loose)} images outside the class folders are left out"
    return read_image_files(f"'{root}'", files, labels, wanted, (Note(left, warning=True),) if loose else ())


def _shuffled(found: Sequence[_Found]) -> list[_Found]:
    """Shuffle with a fixed seed: in folder order, the first thousand images would belong to one class."""
    return [found[i] for i in torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()]
