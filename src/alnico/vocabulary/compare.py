"""Do two models mean the same token by the same row?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from alnico.checkpoint.json_files import read_json
from alnico.vocabulary.tokenizer import (
    JSON,
    PIECES,
    assign_added_ids,
    check_rows,
    read_added,
    read_bytes,
    read_lines,
    read_model_vocabulary,
    read_sentencepiece,
)

READABLE = (JSON, "vocab.json", "vocab.txt", *PIECES)
FILES = (*READABLE, "tekken.json")


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
    if (directory / JSON).exists():
        document = read_json(directory / JSON)
        tokens = read_model_vocabulary(document, directory / JSON)
        if tokens is None:
            return None
        added = {
            t: int(e["id"])
            for t, e in assign_added_ids(tokens, read_added(document, directory / JSON)).items()
        }
        return Vocabulary({t: r for t, r in tokens.items() if t not in added}, added)
    if (directory / "vocab.json").exists():
        return Vocabulary(check_rows(read_json(directory / "vocab.json"), directory / "vocab.json"), {})
    if (directory / "vocab.txt").exists():
        return Vocabulary(read_lines(directory / "vocab.txt"), {})
    for name in PIECES:
        if (directory / name).exists():
            return Vocabulary(read_sentencepiece(directory / name), {})
    return None


def same_files(a: Path | None, b: Path | None) -> bool:
    """Are the tokenizer files of two directories the same bytes? Then nothing needs to be read as a vocabulary."""
    if a is None or b is None:
        return False
    for name in FILES:
        first, second = a / name, b / name
        if first.exists() and second.exists():
            return read_bytes(first) == read_bytes(second)
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
    differing = [
        (row, token) for token, row in a.tokens.items() if b.tokens.get(token, b.added.get(token)) != row
    ]
    differing += [
        (row, token) for token, row in b.tokens.items() if token not in a.tokens and token not in a.added
    ]
    if not differing:
        return None
    row, token = min(differing)
    return f"{len({r for r, _ in differing})} of {max(len(a.tokens), len(b.tokens))} tokens differ, such as {token!r} at row {row}"


def count_renamed(a: Vocabulary, b: Vocabulary) -> int:
    """Number of added tokens that have another row, or none, in ``b``."""
    return sum(1 for token, row in a.added.items() if b.added.get(token, b.tokens.get(token)) != row)


def vocabularies_differ_message(one: str, other: str, found: str) -> str:
    """The message for two models whose tokens have different rows, with what to write. ``found`` is :func:`difference`'s."""
    return (
        f"{one} and {other} have different vocabularies: {found}; expected one. Write tokenizer_source: base for the vocabulary of "
        f"{one}, tokenizer_source: union for the tokens of all models, or use models with the same tokenizer."
    )


def rows_differ_message(
    tensor: str, one: str, rows: int, other: str, other_rows: int, size: int | None
) -> str:
    """The message for two matrices of different numbers of rows, with what to write.

    ``size`` is the number of rows that the tokens of both need, where their vocabularies are the same: then the others are
    padding, and what is written keeps the first model's number of rows.
    """
    held = f"{tensor}: {one} has {rows} rows, {other} has {other_rows}"
    if size is None:
        return (
            f"{held}; the models have different vocabularies, expected one. Write tokenizer_source: base for the vocabulary of {one}, "
            "tokenizer_source: union for the tokens of all models, or use models with the same tokenizer."
        )
    if rows == size:
        keeps = "{source: base}"
    else:
        multiple = next(m for m in range(rows - size + 1, rows + 1) if rows % m == 0)
        keeps = f"{{source: base, pad_to_multiple_of: {multiple}}}, which pads to {rows} again"
    return (
        f"{held} for the same {size} tokens; the rest is padding, expected one number of rows. "
        f"Write tokenizer: {keeps}, or use models of one size."
    )
