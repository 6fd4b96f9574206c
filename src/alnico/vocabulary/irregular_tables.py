"""Handles tables with unusual row counts, and refuses unclear tables and ids with other meanings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from alnico.checkpoint.source import Source
from alnico.errors import MismatchError
from alnico.vocabulary.row_map import RowMap
from alnico.vocabulary.tables import Tables, rows_of

PER_LAYER_EMBEDDING = "per_layer.weight"
"""End of the name of an embedding whose number of rows has its own key in the config."""
HASH_KEYS = ("ngram_vocab_size_base", "encoder_hash_byte_group_vocab")
"""Keys of configs whose models look up rows by hashes of token ids."""
SHOWN = 3


def resolve_unclear(
    tables: Sequence[Tables], sources: Sequence[Source], named: Sequence[str]
) -> list[Tables]:
    """Return the tables, with unclear tensors decided as in another model where they are clear."""
    if named:
        return list(tables)
    clear_tables = {n for t in tables for n in t.rows}
    others = {
        n
        for t, s in zip(tables, sources, strict=True)
        if t.size is not None and not t.unclear
        for n, tensor in s.tensors.items()
        if n not in t.rows and tensor.shape and rows_of(tensor.shape) != t.size
    }
    resolved = []
    for table in tables:
        names = [n for n in table.unclear if n in clear_tables]
        unclear = tuple(n for n in table.unclear if n not in clear_tables and n not in others)
        rows = {**table.rows, **dict.fromkeys(names, table.size or 0)}
        resolved.append(replace(table, rows=rows, unclear=unclear))
    return resolved


def refuse_unclear(tables: Sequence[Tables], sources: Sequence[Source], source: str, is_named: bool) -> None:
    """Refuse moving rows while it is unclear which tensors have them. Errors: MismatchError."""
    for table, model in zip(tables, sources, strict=True):
        if table.unclear:
            name = table.unclear[0]
            more = f" (and {len(table.unclear) - 1} more)" if len(table.unclear) > 1 else ""
            names = ", ".join([*table.rows, name][:SHOWN])
            raise MismatchError(
                f"{model.label}: {name}{more} is {model.tensors[name].shape}, and {table.size} is the size "
                "of the vocabulary and also another size of the model, so it is unclear which tensors have "
                f"a row for each token. List them in the recipe: tokenizer: {{source: {source}, tables: "
                f"[{names}, ...]}}."
            )
        if not table.rows:
            problem = (
                "tokenizer.tables matches no tensor"
                if is_named
                else "no tensor has as many rows as its config or tokenizer has tokens"
            )
            raise MismatchError(
                f"{model.label}: {problem}; expected an embedding with a row for each token, since the "
                f"tokens have other rows in the output. Name it in the recipe: tokenizer: {{source: "
                f"{source}, tables: [NAME, ...]}}."
            )


def refuse_other_meanings(
    sources: Sequence[Source], token_rows: np.ndarray, tokens: Mapping[str, int]
) -> None:
    """Refuse to move tokens whose ids have a meaning for the config or the program. Errors: MismatchError.

    Gemma 3n uses ids from ``vocab_offset`` for images and sounds, Idefics stores the rows from ``vocab_size``
    separately, and models whose config mentions n-grams look up rows by hashes of ids.
    """
    ids = np.fromiter(tokens.values(), np.int64, len(tokens))
    for i, source in enumerate(sources):
        moves = token_rows[i, ids] != ids
        for key, value in _integer_keys(source.config):
            if key == "vocab_offset" or key.endswith("token_offset"):
                changes = bool((moves & ((ids >= value) | (token_rows[i, ids] >= value))).any())
                meaning = f"ids from {value} are for images and sounds, not the tokenizer's"
            elif key == "additional_vocab_size" and value and any("additional" in n for n in source.tensors):
                changes, meaning = True, "the rows of added tokens are in separate tensors"
            elif key in HASH_KEYS:
                changes, meaning = bool(moves.any()), "rows are chosen by hashes of token ids"
            else:
                continue
            if changes:
                raise MismatchError(
                    f"{source.label}: its config has {key}: {value}, so {meaning}; expected ids that can "
                    f"move with their tokens, and {int(moves.sum())} would move. Merge it with models that "
                    "have the same tokenizer, without the key tokenizer."
                )


def _integer_keys(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _integer_keys(value)
        elif type(value) is int:
            yield str(key), value


def separate_maps(
    tables: Sequence[Tables],
    sources: Sequence[Source],
    donor: int,
    token_rows: np.ndarray,
    size: int,
    make_maps: Callable[[np.ndarray, int], tuple[RowMap, ...]],
) -> dict[str, tuple[RowMap, ...]]:
    """Return, by name, the maps of tables whose number of rows is not that of their model's longest table.

    A table with more rows than the vocabulary keeps the same surplus. One with fewer (embeddings per layer)
    gets a row for every token: a token beyond its rows used the first row. If no token moves within its rows,
    it stays as it is. Errors: MismatchError for fewer rows that no key of the config states. ``make_maps`` is
    :func:`~alnico.vocabulary.row_map.make_row_maps` for token rows and a size.
    """
    longest = [max(t.rows.values(), default=0) for t in tables]
    maps_by_name: dict[str, tuple[RowMap, ...]] = {}
    cache: dict[tuple[tuple[int, ...], int], tuple[RowMap, ...]] = {}
    names = dict.fromkeys(n for t in tables for n in t.rows)
    has_surplus = any(t.size is not None and r > t.size for t, r in zip(tables, longest, strict=True))
    for name in names:
        rows = [t.rows.get(name, r) for t, r in zip(tables, longest, strict=True)]
        if rows == longest and not has_surplus:
            continue
        limits = np.array(rows)[:, None]
        surplus = max((r - (t.size or 0) for t, r in zip(tables, rows, strict=True)), default=0)
        if surplus < 0 and name.endswith(PER_LAYER_EMBEDDING):
            stays = _stays(token_rows, rows)
            inner = np.where(token_rows >= limits, 0, token_rows)
            maps_by_name[name] = (
                tuple(_unchanged(i, n) for i, n in enumerate(rows)) if stays else make_maps(inner, size)
            )
            continue
        if surplus < 0:
            raise MismatchError(
                f"{name}: {sources[donor].label} has {rows[donor]} rows of it and {longest[donor]} of other "
                "token tables; expected one number of rows, because tokens move. Use models with the same "
                "tokenizer."
            )
        key = tuple(rows), surplus
        if key not in cache:
            maps = make_maps(np.where(token_rows >= limits, -1, token_rows), size + surplus)
            cache[key] = tuple(
                _with_surplus(m, t, token_rows[i], size)
                for i, (m, t) in enumerate(zip(maps, tables, strict=True))
            )
        maps_by_name[name] = cache[key]
    return maps_by_name


def _stays(token_rows: np.ndarray, rows: Sequence[int]) -> bool:
    """Does every token within the rows of a table have the same id in all models?"""
    ids = np.arange(token_rows.shape[1])
    limit = min(rows)
    if len(set(rows)) > 1:
        return False
    inside = (ids < limit) | (token_rows < limit)
    return bool((token_rows == ids)[inside & (token_rows != -2)].all())


def _unchanged(own: int, rows: int) -> RowMap:
    return RowMap(own, np.full(rows, own, np.int32), np.arange(rows, dtype=np.int64))


def _with_surplus(row_map: RowMap, table: Tables, token_rows: np.ndarray, size: int) -> RowMap:
    """Return a map whose rows beyond the vocabulary are the model's own, where no token has them."""
    first = table.size or 0
    origin, row = row_map.origin.copy(), row_map.row.copy()
    for k in range(row_map.size - size):
        if first + k not in token_rows:
            origin[size + k], row[size + k] = row_map.own, first + k
    return RowMap(row_map.own, origin, row, row_map.means)
