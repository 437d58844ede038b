"""Text becomes windows of tokens, and a language network compiles from it by the command."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import models, pre_tokenizers

from tdcompile.cli.main import main
from tdcompile.data.loading import load_data
from tdcompile.data.network_input import SampleFields
from tdcompile.errors import InputError

WORDS = ["a", "cat", "sat", "on", "the", "mat", "and", "the", "dog", "sat", "on", "the", "log"]
IDS = torch.zeros(1, 5, dtype=torch.int64)
FIELDS = {"names": ("input_ids", "attention_mask"), "tensors": (IDS, IDS)}


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A text of 13 · 40 words, and its tokenizer: a word is the place of its first appearance."""
    known = {word: place for place, word in enumerate(dict.fromkeys(WORDS))}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(known, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text(" ".join(WORDS * 40))
    return tmp_path / "text.txt", tmp_path / "tokenizer.json"


def test_text_is_cut_into_windows_and_the_last_tenth_judges(files: tuple[Path, Path]) -> None:
    text, tokenizer = files
    fields = SampleFields.of((IDS, IDS), ("input_ids", "attention_mask"), tokenizer=str(tokenizer))
    train, test = load_data(f"text:{text}", (5,), dtype=torch.int64, fields=fields)
    assert test is not None
    assert (len(train), len(test)) == (94, 10)
    known = {word: place for place, word in enumerate(dict.fromkeys(WORDS))}
    wanted = torch.tensor([known[word] for word in WORDS * 40]).view(104, 5)
    inputs = [torch.cat([part.batch(range(len(part))).inputs[at] for part in (train, test)]) for at in (0, 1)]
    assert torch.equal(inputs[0], wanted)
    assert bool((inputs[1] == 1).all())
    assert "94 training windows of 5 tokens" in train.notes[0].text


@pytest.mark.parametrize(
    ("spec", "tokenizer", "shape", "says"),
    [
        ("text:{text}", None, (5,), "give --tokenizer FILE"),
        ("text:{text}", "nowhere.json", (5,), "--tokenizer: there is no file 'nowhere.json'"),
        ("text:{text}", "{text}", (5,), "is no file of the package tokenizers"),
        ("text:nowhere.txt", "{tokenizer}", (5,), "there is no file 'nowhere.txt'"),
        ("text:{text}", "{tokenizer}", (300,), "has 520 tokens, and a window of the network's input has 300"),
    ],
)
def test_text_that_cannot_be_read_is_refused(
    files: tuple[Path, Path], spec: str, tokenizer: str | None, shape: tuple[int], says: str
) -> None:
    places = {"text": str(files[0]), "tokenizer": str(files[1])}
    chosen = None if tokenizer is None else tokenizer.format(**places)
    fields = SampleFields.of((torch.zeros(1, *shape, dtype=torch.int64),), ("ids",), tokenizer=chosen)
    with pytest.raises(InputError, match=says):
        load_data(spec.format(**places), shape, dtype=torch.int64, fields=fields)


def test_a_network_of_images_takes_no_text(files: tuple[Path, Path]) -> None:
    with pytest.raises(InputError, match=r"and no integers .N, L., tokens"):
        load_data(f"text:{files[0]}", (3, 8, 8))


@pytest.mark.usefixtures("brief_timing")
def test_the_command_measures_perplexity(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text, tokenizer = files
    monkeypatch.chdir(text.parent)
    Path("net.py").write_text(
        "import torch\nfrom torch import nn\n\n\n"
        "class Language(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n"
        "        self.embedding, self.out = nn.Embedding(16, 64), nn.Linear(128, 16)\n"
        "        self.mix = nn.Linear(64, 128)\n\n"
        "    def forward(self, input_ids):\n"
        "        return self.out(self.mix(self.embedding(input_ids)).relu())\n\n\n"
        "def build():\n    torch.manual_seed(0)\n    return Language().eval()\n"
    )
    done = main(
        f"compile net.py:build --input input_ids=1x5:int64 --data text:{text} --tokenizer {tokenizer} "
        "--budget params=0.8 --max-drop 90% -o out --quiet".split()
    )
    shown = capsys.readouterr()
    assert done == 0, shown.err
    assert "perplexity" in shown.out
    assert "task guessed from the targets: language (the next token for each place)" in " ".join(shown.out.split())
