"""Compares the vocabularies of two models: does each token have the same row in both?"""

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
    read_lines,
    read_model_vocabulary,
    read_sentencepiece,
    read_tokenizer_file,
)

READABLE = (JSON, "vocab.json", "vocab.txt", *PIECES)
FILES = (*READABLE, "tekken.json")


@dataclass(frozen=True)
class Vocabulary:
    """Tokens and their rows. ``added`` holds special and added tokens, which fine-tunes often rename."""

    tokens: Mapping[str, int]
    added: Mapping[str, int]

    @property
    def size(self) -> int:
        """The number of rows that the tokens need."""
        return 1 + max((*self.tokens.values(), *self.added.values()), default=-1)


def read_vocabulary(directory: Path | None) -> Vocabulary | None:
    """Read the vocabulary of a model directory; None if it has no tokenizer file that can be read.

    Errors: ModelError for a tokenizer file with wrong contents.
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
    """Are the tokenizer files of two directories byte for byte equal? Then no vocabulary needs to be read."""
    if a is None or b is None:
        return False
    for name in FILES:
        first, second = a / name, b / name
        if first.exists() and second.exists():
            return read_tokenizer_file(first) == read_tokenizer_file(second)
    return False


def unread_file(directory: Path | None) -> str | None:
    """Return the name of an unreadable tokenizer file, if :func:`read_vocabulary` can read none."""
    names = [n for n in FILES if directory is not None and (directory / n).exists()]
    return names[0] if names and names[0] not in READABLE else None


def difference(a: Vocabulary, b: Vocabulary) -> str | None:
    """Say how the vocabularies of two models differ, ignoring added tokens; None if they agree.

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
    """Return the number of added tokens of ``a`` that have a different row in ``b``, or none."""
    return sum(1 for token, row in a.added.items() if b.added.get(token, b.tokens.get(token)) != row)


def vocabularies_differ_message(first: str, second: str, details: str) -> str:
    """Return the message for two models whose tokens have different rows.

    ``details`` come from :func:`difference`.
    """
    return (
        f"{first} and {second} have different vocabularies: {details}; expected one. "
        f"Write tokenizer_source: base for the vocabulary of {first}, "
        "tokenizer_source: union for the tokens of all models, or use models with the same tokenizer."
    )


def rows_differ_message(
    tensor: str, first: str, rows: int, second: str, second_rows: int, size: int | None
) -> str:
    """Return the message for two matrices with different numbers of rows.

    ``size`` is the number of rows that the tokens of both need if their vocabularies are the same. All other
    rows are then padding, and the recommended setting keeps the first model's number of rows.
    """
    problem = f"{tensor}: {first} has {rows} rows, {second} has {second_rows}"
    if size is None:
        return (
            f"{problem}; the models have different vocabularies, expected one. "
            f"Write tokenizer_source: base for the vocabulary of {first}, "
            "tokenizer_source: union for the tokens of all models, or use models with the same tokenizer."
        )
    if rows == size:
        setting = "{source: base}"
    else:
        multiple = next(m for m in range(rows - size + 1, rows + 1) if rows % m == 0)
        setting = f"{{source: base, pad_to_multiple_of: {multiple}}}, which pads to {rows} again"
    return (
        f"{problem} for the same {size} tokens; the other rows are padding, expected one number of rows. "
        f"Write tokenizer: {setting}, or use models of one size."
    )
