"""Do two models mean the same token by the same row?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from alnico.checkpoint.model import read_json
from alnico.errors import ModelError

READABLE = ("tokenizer.json", "vocab.json", "vocab.txt")
FILES = (*READABLE, "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
MAX_TEXT_BYTES = 200_000_000


@dataclass(frozen=True)
class Vocabulary:
    """Tokens and their rows. ``added`` are special and added tokens, which fine-tunes often rename."""

    tokens: Mapping[str, int]
    added: Mapping[str, int]

    @property
    def size(self) -> int:
        """Number of rows that the tokens need."""
        return 1 + max((*self.tokens.values(), *self.added.values()), default=-1)


def read_vocabulary(directory: Path | None) -> Vocabulary | None:
    """Read the vocabulary of a model directory; None if it has no file that can be read as one.

    Errors: ModelError for a tokenizer file that is not what its name says.
    """
    if directory is None:
        return None
    if (directory / "tokenizer.json").exists():
        return _from_tokenizer_json(directory / "tokenizer.json")
    if (directory / "vocab.json").exists():
        return Vocabulary(_rows(read_json(directory / "vocab.json"), directory / "vocab.json"), {})
    if (directory / "vocab.txt").exists():
        lines = _bytes(directory / "vocab.txt").decode("utf-8", "replace").split("\n")
        return Vocabulary({token: row for row, line in enumerate(lines) if (token := line.rstrip("\r"))}, {})
    return None


def same_files(a: Path | None, b: Path | None) -> bool:
    """Are the tokenizer files of two directories the same bytes? Then nothing needs to be read as a vocabulary."""
    if a is None or b is None:
        return False
    for name in FILES:
        first, second = a / name, b / name
        if first.exists() and second.exists():
            return _bytes(first) == _bytes(second)
    return False


def unread_file(directory: Path | None) -> str | None:
    """Name a tokenizer file that :func:`read_vocabulary` cannot read, in a directory without one that it can."""
    names = [n for n in FILES if directory is not None and (directory / n).exists()]
    return names[0] if names and names[0] not in READABLE else None


def difference(a: Vocabulary, b: Vocabulary) -> str | None:
    """Say how the vocabularies of two models differ, added tokens left out; None if they agree.

    >>> difference(Vocabulary({"a": 0, "b": 1}, {}), Vocabulary({"a": 0, "c": 1}, {}))
    "1 of 2 tokens differ, such as 'b' at row 1"
    """
    differing = [(row, token) for token, row in a.tokens.items() if b.tokens.get(token, b.added.get(token)) != row]
    differing += [(row, token) for token, row in b.tokens.items() if token not in a.tokens and token not in a.added]
    if not differing:
        return None
    row, token = min(differing)
    return f"{len({r for r, _ in differing})} of {max(len(a.tokens), len(b.tokens))} tokens differ, such as {token!r} at row {row}"


def renamed(a: Vocabulary, b: Vocabulary) -> int:
    """Number of added tokens that have another row, or none, in ``b``."""
    return sum(1 for token, row in a.added.items() if b.added.get(token, b.tokens.get(token)) != row)


def _bytes(path: Path) -> bytes:
    """Read a tokenizer file. Errors: ModelError naming it."""
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise ModelError(f"{path}: is larger than {MAX_TEXT_BYTES} bytes; expected a tokenizer. Check the model.")
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}). Check the path and its permissions.") from None


def _from_tokenizer_json(path: Path) -> Vocabulary | None:
    loaded = read_json(path)
    model = loaded.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):  # Unigram: [[token, score], ...] in row order
        try:
            tokens = {str(entry[0]): row for row, entry in enumerate(vocabulary)}
        except (TypeError, LookupError):
            raise ModelError(f"{path}: model.vocab holds entries that are no [token, score]. Get the file again.") from None
    elif isinstance(vocabulary, dict):
        tokens = _rows(vocabulary, path)
    else:
        return None
    added = loaded.get("added_tokens") or []
    try:
        special = {str(t["content"]): int(t["id"]) for t in added}
    except (TypeError, KeyError, ValueError, OverflowError):
        raise ModelError(f"{path}: added_tokens holds entries without content and id. Get the file again.") from None
    return Vocabulary({t: r for t, r in tokens.items() if t not in special}, special)


def _rows(vocabulary: Mapping[str, object], path: Path) -> dict[str, int]:
    rows = {token: row for token, row in vocabulary.items() if isinstance(row, int) and row is not True and row is not False}
    if len(rows) != len(vocabulary):
        raise ModelError(f"{path}: its vocabulary maps tokens to things that are no row numbers. Get the file again.")
    return rows
