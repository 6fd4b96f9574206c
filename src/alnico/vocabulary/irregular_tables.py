"""What of a vocabulary does not follow its rows alone: tables with other rows, tensors that cannot be told, ids with a meaning of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from alnico.checkpoint.source import Source
from alnico.errors import MismatchError
from alnico.vocabulary.row_map import RowMap
from alnico.vocabulary.tables import Tables, rows_of

OF_LAYERS = "per_layer.weight"
"""How the name of an embedding ends whose rows the config states by themselves."""
HASHED = ("ngram_vocab_size_base", "encoder_hash_byte_group_vocab")
"""Keys of configs whose models look up hashes of the ids of tokens."""
SHOWN = 3


def resolve_unclear(
    tables: Sequence[Tables], sources: Sequence[Source], named: Sequence[str]
) -> list[Tables]:
    """The tables, with what is unclear in one model and is a table, or is none, in another."""
    if named:
        return list(tables)
    known = {n for t in tables for n in t.rows}
    others = {
        n
        for t, s in zip(tables, sources, strict=True)
        if t.size is not None and not t.unclear
        for n, tensor in s.tensors.items()
        if n not in t.rows and tensor.shape and rows_of(tensor.shape) != t.size
    }
    found = []
    for table in tables:
        told = [n for n in table.unclear if n in known]
        rows = {**table.rows, **dict.fromkeys(told, table.size or 0)}
        found.append(
            replace(
                table,
                rows=rows,
                unclear=tuple(n for n in table.unclear if n not in known and n not in others),
            )
        )
    return found


def refuse_unclear(tables: Sequence[Tables], sources: Sequence[Source], source: str, is_named: bool) -> None:
    """Refuse rows that move in tensors that cannot be told. Errors: MismatchError."""
    for table, model in zip(tables, sources, strict=True):
        if table.unclear:
            name = table.unclear[0]
            more = f" (and {len(table.unclear) - 1} more)" if len(table.unclear) > 1 else ""
            names = ", ".join([*table.rows, name][:SHOWN])
            raise MismatchError(
                f"{model.label}: {name}{more} is {model.tensors[name].shape}, and {table.size} is the size of the vocabulary and another "
                "size of the model; expected to know which tensors have a row for each token. List them in the recipe: "
                f"tokenizer: {{source: {source}, tables: [{names}, ...]}}."
            )
        if not table.rows:
            where = (
                "tokenizer.tables names none"
                if is_named
                else "no tensor has as many rows as its config or tokenizer has tokens"
            )
            raise MismatchError(
                f"{model.label}: {where}; expected an embedding with a row for each token, as the tokens of the output have other rows. "
                f"Name it in the recipe: tokenizer: {{source: {source}, tables: [NAME, ...]}}."
            )


def refuse_other_meanings(sources: Sequence[Source], held: np.ndarray, tokens: Mapping[str, int]) -> None:
    """Refuse to move tokens whose ids a config or the program gives a meaning. Errors: MismatchError.

    Gemma 3n takes ids from ``vocab_offset`` on as those of images and sounds, Idefics keeps the rows from ``vocab_size`` on apart,
    and hashes of ids choose rows where a config speaks of n-grams.
    """
    at = np.fromiter(tokens.values(), np.int64, len(tokens))
    for i, source in enumerate(sources):
        moves = held[i, at] != at
        for key, value in _keys(source.config):
            if key == "vocab_offset" or key.endswith("token_offset"):
                changes = bool((moves & ((at >= value) | (held[i, at] >= value))).any())
                what = f"ids from {value} on are those of images and sounds, not the tokenizer's"
            elif key == "additional_vocab_size" and value and any("additional" in n for n in source.tensors):
                changes, what = True, "the rows of added tokens are kept in tensors of their own"
            elif key in HASHED:
                changes, what = bool(moves.any()), "rows are chosen by hashes of the ids of tokens"
            else:
                continue
            if changes:
                raise MismatchError(
                    f"{source.label}: its config says {key}: {value}: {what}; expected ids that can move with their tokens, "
                    f"{int(moves.sum())} of which would. Merge it with models that have the same tokenizer, without the key tokenizer."
                )


def _keys(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _keys(value)
        elif type(value) is int:
            yield str(key), value


def separate_maps(
    tables: Sequence[Tables],
    sources: Sequence[Source],
    donor: int,
    held: np.ndarray,
    size: int,
    made: Callable[[np.ndarray, int], tuple[RowMap, ...]],
) -> dict[str, tuple[RowMap, ...]]:
    """The maps of tables that have other rows than the longest of their model, by name.

    A table with more rows than the vocabulary keeps as many more, one with fewer (embeddings per layer) gets all: a token beyond its
    rows had the first. Where no token moves within its rows, it stays as it is. Errors: MismatchError for fewer rows that no key
    of the config states. ``made`` makes maps from held rows and a size; see :func:`~alnico.vocabulary.row_map.row_maps`.
    """
    reach = [max(t.rows.values(), default=0) for t in tables]
    found: dict[str, tuple[RowMap, ...]] = {}
    cache: dict[tuple[tuple[int, ...], int], tuple[RowMap, ...]] = {}
    names = dict.fromkeys(n for t in tables for n in t.rows)
    longer = any(t.size is not None and r > t.size for t, r in zip(tables, reach, strict=True))
    for name in names:
        rows = [t.rows.get(name, r) for t, r in zip(tables, reach, strict=True)]
        if rows == reach and not longer:
            continue
        mine = np.array(rows)[:, None]
        more = max((r - (t.size or 0) for t, r in zip(tables, rows, strict=True)), default=0)
        if more < 0 and name.endswith(OF_LAYERS):
            stays = _stays(held, rows)
            inner = np.where(held >= mine, 0, held)
            found[name] = tuple(_same(i, n) for i, n in enumerate(rows)) if stays else made(inner, size)
            continue
        if more < 0:
            raise MismatchError(
                f"{name}: {sources[donor].label} has {rows[donor]} rows of it and {reach[donor]} of other tables of tokens; expected one "
                "number of rows, as tokens move. Use models with the same tokenizer."
            )
        key = tuple(rows), more
        if key not in cache:
            maps = made(np.where(held >= mine, -1, held), size + more)
            cache[key] = tuple(
                _with_rest(m, t, held[i], size) for i, (m, t) in enumerate(zip(maps, tables, strict=True))
            )
        found[name] = cache[key]
    return found


def _stays(held: np.ndarray, rows: Sequence[int]) -> bool:
    """Does every token within the rows of a table have the same id in all models?"""
    ids = np.arange(held.shape[1])
    least = min(rows)
    if len(set(rows)) > 1:
        return False
    inside = (ids < least) | (held < least)
    return bool((held == ids)[inside & (held != -2)].all())


def _same(own: int, rows: int) -> RowMap:
    return RowMap(own, np.full(rows, own, np.int32), np.arange(rows, dtype=np.int64))


def _with_rest(made: RowMap, table: Tables, held: np.ndarray, size: int) -> RowMap:
    """A map whose rows beyond the vocabulary are the model's own, where no token has them."""
    first = table.size or 0
    origin, row = made.origin.copy(), made.row.copy()
    for k in range(made.size - size):
        if first + k not in held:
            origin[size + k], row[size + k] = made.own, first + k
    return RowMap(made.own, origin, row, made.means)
