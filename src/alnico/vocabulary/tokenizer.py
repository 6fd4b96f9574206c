"""Reads the tokenizer of a model as data: its tokens, their rows and their descriptions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from alnico.checkpoint.file_kinds import SNIFFED_BYTES, kind_of
from alnico.checkpoint.files import read_small
from alnico.checkpoint.json_files import read_json
from alnico.errors import ModelError
from alnico.vocabulary.sentencepiece import read_pieces

JSON = "tokenizer.json"
CONFIG = "tokenizer_config.json"
ROLES = "special_tokens_map.json"
ADDED = "added_tokens.json"
PIECES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
PARTS = ("vocab.json", "merges.txt", "vocab.txt", *PIECES)
"""Files of the vocabulary without added tokens.

``tokenizer.json``, if there is one, contains all of it too.
"""
TEMPLATES = ("chat_template.jinja", "chat_template.json")
FILES = (JSON, CONFIG, ROLES, ADDED, *PARTS, *TEMPLATES, "tekken.json")
"""All files that belong to a tokenizer and must come from one model."""
MAX_BYTES = 200_000_000
MAX_ROW = (1 << 22) - 1
"""Highest row that a token may have: memory is needed for each row up to it.

The largest vocabularies have 1,000,000.
"""

ROLE_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
ROLE_LISTS = ("additional_special_tokens", "extra_special_tokens")
SHIFTED = ("XLMRoberta", "Camembert", "Barthez", "MBart", "Nllb", "XGLM", "Pegasus")
"""Starts of names of classes whose ids are not the positions of the pieces but in ``tokenizer.json``."""

TokenEntry = Mapping[str, Any]
"""An added token as in ``tokenizer.json``: content, id, special, normalized, single_word, lstrip, rstrip."""


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A model's tokenizer.

    ``parts`` are the tokens of its vocabulary, ``added`` the added tokens, in id order.
    ``document`` is ``tokenizer.json``, ``settings`` is ``tokenizer_config.json``, ``files`` are those of
    :data:`FILES` that exist.
    """

    directory: Path
    parts: Mapping[str, int]
    added: Mapping[str, TokenEntry]
    document: Mapping[str, Any] | None
    settings: Mapping[str, Any]
    roles: Mapping[str, Any]
    files: tuple[str, ...]

    @cached_property
    def tokens(self) -> Mapping[str, int]:
        """Every token with its id."""
        return {**self.parts, **{content: entry["id"] for content, entry in self.added.items()}}

    def special(self, role: str) -> str | None:
        """Return the token of a role such as ``bos``, ``eos`` or ``pad``."""
        value = self.settings.get(f"{role}_token", self.roles.get(f"{role}_token"))
        return value.get("content") if isinstance(value, dict) else value if isinstance(value, str) else None


def read_tokenizer(directory: Path | None) -> Tokenizer | None:
    """Read the tokenizer of a model directory; None if it has no readable one.

    Added tokens get the ids that the ``tokenizers`` library assigns, regardless of the ids in the files: see
    :func:`assign_added_ids`. Errors: ModelError for a file with wrong contents, or whose pieces have ids that
    are not their positions.
    """
    if directory is None:
        return None
    files = tuple(name for name in FILES if (directory / name).exists())
    settings = read_json(directory / CONFIG) if CONFIG in files else {}
    roles = read_json(directory / ROLES) if ROLES in files else {}
    stated = _stated_tokens(directory, settings, files)
    document = read_json(directory / JSON) if JSON in files else None
    if document is not None:
        parts = read_model_vocabulary(document, directory / JSON)
        if parts is None:
            return None
        entries = [*read_added(document, directory / JSON), *(stated[i] for i in sorted(stated))]
        entries += [_entry(content, special=True) for content in role_tokens(settings, roles)]
        added = assign_added_ids(parts, entries)
    else:
        parts = _parts(directory, settings, files)
        if parts is None:
            return None
        added = {
            str(e["content"]): {**e, "id": parts.get(str(e["content"]), i)} for i, e in sorted(stated.items())
        }
    return Tokenizer(directory, parts, added, document, settings, roles, files)


def assign_added_ids(parts: Mapping[str, int], entries: Iterable[TokenEntry]) -> dict[str, TokenEntry]:
    """Assign ids to added tokens as the ``tokenizers`` library does: by their order only.

    A token of the vocabulary keeps its id; the others are numbered from the vocabulary's length. So an id in
    a file that leaves a gap is not the id that a model receives.

    >>> {t: e["id"] for t, e in assign_added_ids({"a": 0, "b": 1}, [{"content": "<s>", "id": 9}, {"content": "b", "id": 9}]).items()}
    {'<s>': 2, 'b': 1}
    """
    assigned: dict[str, TokenEntry] = {}
    free = len(parts)
    for entry in entries:
        content = str(entry["content"])
        if not content or content in assigned:
            continue
        token_id = parts.get(content, free)
        free += content not in parts
        assigned[content] = {**entry, "id": token_id}
    return assigned


def plain_entry(content: str) -> TokenEntry:
    """Describe an added token that is known by its text only, as the ``tokenizers`` library does."""
    return _entry(content, special=False)


def role_tokens(settings: Mapping[str, Any], roles: Mapping[str, Any]) -> list[str]:
    """Return the tokens that have a role (bos, eos, pad, ...) or are listed as special, each once."""
    tokens: dict[str, None] = {}
    for source in (settings, roles):
        values: list[Any] = [source.get(name) for name in ROLE_NAMES]
        for name in ROLE_LISTS:
            listed = source.get(name)
            values += (
                listed.values() if isinstance(listed, dict) else listed if isinstance(listed, list) else []
            )
        for value in values:
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str):
                tokens.setdefault(content)
    return list(tokens)


def read_model_vocabulary(document: Mapping[str, Any], path: Path) -> dict[str, int] | None:
    """Return the tokens of ``tokenizer.json`` without added ones; None if its model has no vocabulary.

    Errors: ModelError.
    """
    model = document.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):  # Unigram: [[token, score], ...] in row order
        if not all(isinstance(entry, list) and entry and isinstance(entry[0], str) for entry in vocabulary):
            raise ModelError(
                f"{path}: model.vocab has entries that are not [token, score]. Download the file again."
            )
        return {entry[0]: row for row, entry in enumerate(vocabulary)}
    return check_rows(vocabulary, path) if isinstance(vocabulary, dict) else None


def read_added(document: Mapping[str, Any], path: Path) -> list[TokenEntry]:
    """Return the added tokens of ``tokenizer.json``, in its order. Errors: ModelError."""
    try:
        return [
            {**t, "content": str(t["content"]), "id": _row(t["id"])}
            for t in document.get("added_tokens") or []
        ]
    except (TypeError, KeyError, ValueError, OverflowError):
        raise ModelError(
            f"{path}: added_tokens has entries without content or without an id up to {MAX_ROW}. "
            "Download the file again."
        ) from None


def check_rows(vocabulary: Mapping[str, object], path: Path) -> dict[str, int]:
    """Check that a vocabulary maps tokens to row numbers, and return it. Errors: ModelError."""
    rows = {token: row for token, row in vocabulary.items() if type(row) is int and row >= 0}
    if len(rows) != len(vocabulary):
        raise ModelError(
            f"{path}: its vocabulary maps tokens to values that are not row numbers. Download the file again."
        )
    highest = max(rows.values(), default=0)
    if highest > MAX_ROW:
        raise ModelError(
            f"{path}: its vocabulary has row {str(highest)[:40]}; expected at most {MAX_ROW}. Download the "
            "file again."
        )
    return rows


def _row(value: Any) -> int:
    """Return the id of an added token. Errors: ValueError for an id outside the allowed range."""
    row = int(value)
    if not 0 <= row <= MAX_ROW:
        raise ValueError(f"an id outside 0 to {MAX_ROW}")
    return row


def read_sentencepiece(path: Path) -> dict[str, int]:
    """Return the pieces of a sentencepiece model with their positions. Errors: ModelError."""
    try:
        return {piece: row for row, piece in enumerate(read_pieces(read_tokenizer_file(path)))}
    except ValueError as error:
        reason = "a piece is not UTF-8" if isinstance(error, UnicodeDecodeError) else error
        raise ModelError(
            f"{path}: is not a sentencepiece model ({reason}). Download the file again."
        ) from None


def read_lines(path: Path) -> dict[str, int]:
    """Return the tokens of a ``vocab.txt``, one per line."""
    lines = read_tokenizer_file(path).decode("utf-8", "replace").split("\n")
    return {token: row for row, line in enumerate(lines) if (token := line.rstrip("\r"))}


def read_tokenizer_file(path: Path) -> bytes:
    """Read a tokenizer file. Errors: ModelError naming it."""
    data = read_small(path, MAX_BYTES, "a tokenizer")
    kind = kind_of(data[:SNIFFED_BYTES])
    if kind is not None and kind.is_stand_in:
        raise ModelError(f"{path}: is {kind.name}; expected a part of a tokenizer. {kind.advice}")
    return data


def _parts(directory: Path, settings: Mapping[str, Any], files: Sequence[str]) -> dict[str, int] | None:
    if "vocab.json" in files:
        return check_rows(read_json(directory / "vocab.json"), directory / "vocab.json")
    if "vocab.txt" in files:
        return read_lines(directory / "vocab.txt")
    for name in PIECES:
        if name in files:
            kind = str(settings.get("tokenizer_class", ""))
            if kind.startswith(SHIFTED):
                raise ModelError(
                    f"{directory / name}: the ids of a {kind} are not the positions of its pieces; expected "
                    f"{JSON} next to it. Save the tokenizer with a version of transformers that writes it."
                )
            return read_sentencepiece(directory / name)
    return None


def _stated_tokens(
    directory: Path, settings: Mapping[str, Any], files: Sequence[str]
) -> dict[int, TokenEntry]:
    """Return the added tokens that files other than ``tokenizer.json`` list, by their stated ids."""
    tokens: dict[int, TokenEntry] = {}
    try:
        if ADDED in files:
            for content, row in read_json(directory / ADDED).items():
                tokens[_row(row)] = _entry(content, special=False)
        for row, entry in (settings.get("added_tokens_decoder") or {}).items():
            fields = {k: v for k, v in entry.items() if k not in ("__type", "content", "id")}
            tokens[_row(row)] = {
                **_entry(str(entry["content"]), special=bool(entry.get("special"))),
                **fields,
            }
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        raise ModelError(
            f"{directory}: {ADDED} or {CONFIG} has added tokens without content or without an id up to "
            f"{MAX_ROW}. Download them again."
        ) from None
    return tokens


def _entry(content: str, *, special: bool) -> TokenEntry:
    return {
        "id": -1,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": not special,
        "special": special,
    }


def as_json(value: object) -> bytes:
    """Write JSON in the format of tokenizer files; small files are indented for readers."""
    text = json.dumps(value, ensure_ascii=False)
    return (
        (text if len(text) > 1_000_000 else json.dumps(value, ensure_ascii=False, indent=2)) + "\n"
    ).encode("utf-8")
