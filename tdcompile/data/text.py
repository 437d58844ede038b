"""Text in windows of tokens, for language networks: ``text:FILE`` with a tokenizer file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tdcompile.data.images import takes_integers
from tdcompile.data.network_input import NetworkInput, SampleFields
from tdcompile.data.task import Note, Samples, Tensors
from tdcompile.errors import InputError, nearest
from tdcompile.support.optional_import import import_optional

_TENTH = 10  # one window in ten, the last ones, is a test sample
_FEWEST = 2
# Parts of the names of inputs beside the tokens, and what they are filled with.
_MASK, _POSITION, _TYPE = "mask", "position", "type"
_PIECE = 2**20  # characters that are encoded at a time: a tokenizer takes much memory for a long text


class TextSamples(Tensors):
    """Windows of a text, with what the report says about them."""

    def __init__(self, inputs: tuple[Tensor, ...], told: Note) -> None:
        super().__init__(inputs)
        self._told = told

    @property
    def notes(self) -> tuple[Note, ...]:
        """How many tokens and windows there are."""
        return (self._told,)


def read_text(argument: str, wanted: NetworkInput, seed: int) -> tuple[Samples, Samples | None]:
    """Read a text file, or all ``.txt`` files of a folder, in windows of the input's length without overlap.

    The last tenth of the windows are test samples: neighbours are alike, so that a random part would be known.
    Masks are filled with ones, token types with zeros, and positions with 0, 1, 2, ...

    Raises:
        InputError: there is no such file or tokenizer, the network takes no tokens, or the text is too short.
        UnavailableError: ``tokenizers`` is missing.
    """
    fields = wanted.members
    place = _tokens_of(fields)
    length = fields.inputs[place].shape[0]
    ids = _encoded(Path(argument).expanduser(), fields.tokenizer)
    count = len(ids) // length
    if count < _FEWEST:
        raise InputError(
            f"text: '{argument}' has {len(ids)} tokens, and a window of the network's input has {length}: at least "
            f"{_FEWEST} windows are needed"
        )
    windows = ids[: count * length].view(count, length)
    inputs = tuple(
        windows.to(known.dtype or torch.int64) if at == place else _filled(name, known, count)
        for at, (name, known) in enumerate(zip(fields.names, fields.inputs, strict=True))
    )
    tested = max(1, count // _TENTH)
    parts = []
    for chosen, what in ((slice(count - tested), "training"), (slice(count - tested, None), "test")):
        rows = tuple(x[chosen] for x in inputs)
        told = f"text: '{argument}' gives {len(rows[0])} {what} windows of {length} tokens"
        parts.append(TextSamples(rows, Note(told)))
    return parts[0], parts[1]


def _tokens_of(fields: SampleFields) -> int:
    """Return the index of the input of tokens.

    Raises:
        InputError: there is none.
    """
    others = (_MASK, _POSITION, _TYPE)
    for place, (name, known) in enumerate(zip(fields.names, fields.inputs, strict=True)):
        if len(known.shape) == 1 and takes_integers(known.dtype) and not any(part in name for part in others):
            return place
    held = ", ".join(
        f"{name} {known.shape} {known.dtype}" for name, known in zip(fields.names, fields.inputs, strict=True)
    )
    raise InputError(
        f"text: the network takes {held}, and no integers (N, L), tokens: give --input ids=1xL:int64, or other data"
    )


def _filled(name: str, known: NetworkInput, count: int) -> Tensor:
    dtype = known.dtype or torch.int64
    if _MASK in name:
        return torch.ones(count, *known.shape, dtype=dtype)
    if _TYPE in name:
        return torch.zeros(count, *known.shape, dtype=dtype)
    if _POSITION in name and len(known.shape) == 1:
        return torch.arange(known.shape[0], dtype=dtype).expand(count, -1)
    raise InputError(f"text: it is not known what the network's input '{name}' is: give data of your own")


def _encoded(path: Path, tokenizer: str | None) -> Tensor:
    if tokenizer is None:
        raise InputError("text: give --tokenizer FILE, the tokenizer.json of the network")
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise InputError(f"text: there is no file '{path}'" + (" with the ending .txt in it" if path.is_dir() else ""))
    encode = _tokenizer(Path(tokenizer).expanduser())
    ids: list[int] = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"text: '{file}' is not UTF-8: {error.reason} at byte {error.start}") from error
        for start in range(0, len(text), _PIECE):
            ids += encode.encode(text[start : start + _PIECE], add_special_tokens=False).ids
    return torch.tensor(ids, dtype=torch.int64)


def _tokenizer(path: Path) -> Any:
    tokenizers = import_optional("tokenizers")
    if not path.is_file():
        near = [file.name for file in path.parent.glob("*.json")] if path.parent.is_dir() else []
        raise InputError(f"--tokenizer: there is no file '{path}': {nearest(path.name, near)}")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # its own exceptions have no common class
        raise InputError(f"--tokenizer: '{path}' is no file of the package tokenizers: {error}") from error
