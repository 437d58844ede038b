"""Image folders: one folder of images for each class below ``train/`` and ``test/`` or ``val/``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from tdcompile.data.images import Shape
from tdcompile.data.network_input import NetworkInput
from tdcompile.data.samples import Split
from tdcompile.data.tables import HELD_OUT, read_image_files
from tdcompile.errors import InputError, nearest
from tdcompile.support.optional_import import import_optional


def read_image_folder(argument: str, wanted: NetworkInput, seed: int) -> tuple[Split, Split | None]:
    """Read ``train/CLASS/...`` and ``test/CLASS/...``: the first folder below the split names the class.

    Raises:
        InputError: there is no ``train/``, a class of test is unknown, or a class folder holds no images.
        UnavailableError: pillow or ``datasets`` is missing.
    """
    root = Path(argument).expanduser()
    if not (root / "train").is_dir():
        raise InputError(f"imagefolder: there is no folder '{root / 'train'}'")
    classes = {folder.name: label for label, folder in enumerate(_class_folders(root / "train"))}
    test = next((root / name for name in HELD_OUT if (root / name).is_dir()), None)
    return _folder(root / "train", classes, wanted.shape), _folder(test, classes, wanted.shape) if test else None


def _class_folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not _hidden(path, root))


def _hidden(path: Path, root: Path) -> bool:
    """Return whether a path is hidden, like ``.ipynb_checkpoints`` and ``._cat.png``."""
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
    # Shuffled with a fixed seed: in folder order, the first thousand images would belong to one class.
    mixed = [found[i] for i in torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()]
    files, labels = [path for path, _ in mixed], [classes[name] for _, name in mixed]
    return read_image_files(f"'{root}'", files, labels, shape)
