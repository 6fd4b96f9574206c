"""The vocabulary of an output: its tokens, its files, and where the rows of every model's matrices come from."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from alnico.checkpoint.json_files import read_json
from alnico.checkpoint.source import Source
from alnico.errors import MismatchError, RecipeError
from alnico.recipe.schema import TokenizerSetting, TokenSource
from alnico.vocabulary.config_ids import changed_ids, rows_in, with_new_ids, with_rows
from alnico.vocabulary.irregular_tables import (
    OF_LAYERS,
    refuse_other_meanings,
    refuse_unclear,
    resolve_unclear,
    separate_maps,
)
from alnico.vocabulary.output_tokenizer import combine_tokens, union_entries
from alnico.vocabulary.row_map import MEAN, ZEROS, RowMap, RowRequest, row_maps
from alnico.vocabulary.tables import Tables, find_tables
from alnico.vocabulary.tokenizer import FILES, Tokenizer, as_json, plain_entry, read_tokenizer

GENERATION = "generation_config.json"
SHOWN = 3


@dataclass(frozen=True)
class Dropped:
    """What of one model's vocabulary is not in the output: ``tokens`` with a row of their own, and ``rows`` without a token."""

    tokens: int
    rows: int


@dataclass(frozen=True)
class VocabularyPlan:
    """The output's vocabulary.

    ``size`` rows; a map of rows a source, and ``apart`` those of tensors with other rows than the vocabulary, by name; ``files`` to
    write by name, and ``without``, names of the donor's files that must not be carried; ``config``, the keys of ``config.json`` with
    new values; ``left`` says for each source what is not in the output. ``tables`` are each source's, as they were found.
    """

    size: int
    rows: tuple[RowMap, ...]
    files: Mapping[str, bytes]
    without: frozenset[str]
    config: Mapping[str, Any]
    left: tuple[Dropped, ...]
    notes: tuple[str, ...]
    tables: tuple[Tables, ...] = ()
    apart: Mapping[str, tuple[RowMap, ...]] = field(default_factory=lambda: MappingProxyType({}))


def plan_vocabulary(
    setting: TokenizerSetting,
    sources: Sequence[Source],
    references: Sequence[str],
    donor: int,
    models: Sequence[int],
    *,
    has_base: bool = True,
) -> VocabularyPlan:
    """Say what the output's vocabulary is and where its rows come from, from tokenizer files and headers.

    The output has the tokenizer of the donor (``union``, ``base``) or of another model. ``union`` adds to it the tokens of all
    ``models`` that it lacks, in recipe order, in each model by id: plain ones as added tokens (merges are not merged), then
    each model's added tokens; of two descriptions of one token the first counts. Tokens of the recipe's ``tokens`` that are
    not there are added after them. How rows are found is told at :func:`~alnico.vocabulary.row_map.row_maps`; the donor votes
    with the models, and its row goes before others' if ``has_base``. Which tensors have a row for each token is told at
    :func:`~alnico.vocabulary.tables.find_tables`, or by the recipe's ``tables``; without any, the rows are the config's.

    Edge cases: a token whose id is beyond its model's rows is one that the model lacks, in the template one that is taken
    out, unless it has a role. Ids that no token has are padding, as are the rows up to ``pad_to_multiple_of``.
    Errors: RecipeError for tokens asked from where they are not; ModelError for a tokenizer that cannot be read;
    MismatchError for a model that has none, and other rows than the donor; for rows that move where it cannot be told which
    tensors have them; for ids that mean more than the tokenizer says.
    Differs from mergekit 0.1.5: the output has a row for each id up to the highest, not one a token; ids beyond a model's
    rows, and gaps, are no error; the padding is the mean of the rows that mean a token; ids come in recipe order; token ids
    of the configs follow their tokens.
    """
    labels = [s.label for s in sources]
    notes: list[str] = []
    tokenizers, tables = _tokenizers(sources, references, setting, donor, notes)
    counts = [_rows(s, tables[i], tokenizers[i]) for i, s in enumerate(sources)]
    template = (
        donor
        if setting.source in ("union", "base")
        else _reference(setting.source, references, "tokenizer.source")
    )
    order = list(dict.fromkeys([donor, *models]))
    entries = union_entries([(tokenizers[m], counts[m]) for m in order]) if setting.source == "union" else []
    here = {
        *(e["content"] for e in entries),
        *(t for t, i in tokenizers[template].tokens.items() if i < counts[template]),
    }
    entries += [plain_entry(t) for t in setting.tokens if t not in here]
    result = combine_tokens(tokenizers[template], counts[template], entries)
    tokens = result.tokens

    count = 1 + max(tokens.values(), default=-1)
    size = (
        -(-count // setting.pad_to_multiple_of) * setting.pad_to_multiple_of
        if setting.pad_to_multiple_of
        else count
    )
    held = np.full((len(sources), count), -2, np.int64)
    at = np.fromiter(tokens.values(), np.int64, len(tokens))
    for i, tokenizer in enumerate(tokenizers):
        found = np.fromiter((tokenizer.tokens.get(t, -1) for t in tokens), np.int64, len(tokens))
        held[i, at] = np.where(found < counts[i], found, -1)
    voters = list(dict.fromkeys([*models, donor]))
    asked = _asked(setting.tokens, tokens, references, labels, tokenizers, counts)
    maps = row_maps(held, size, voters, donor if has_base else None, asked)
    base = donor if has_base else None
    apart: dict[str, tuple[RowMap, ...]] = {}
    if any(not m.keeps(rows) for m, rows in zip(maps, counts, strict=True)):
        tables = resolve_unclear(tables, sources, setting.tables)
        refuse_unclear(tables, sources, setting.source, bool(setting.tables))
        refuse_other_meanings(sources, held, tokens)
        apart = separate_maps(
            tables,
            sources,
            donor,
            held,
            size,
            lambda rows_held, rows: row_maps(rows_held, rows, voters, base, asked),
        )

    # Rows beyond the vocabulary's size are no token's, and are kept: of a table of texts and sounds, say.
    moved = [min(rows, t.size or rows) for rows, t in zip(counts, tables, strict=True)]
    left = tuple(_left(tokenizer, rows, tokens) for tokenizer, rows in zip(tokenizers, moved, strict=True))
    notes += _told(setting, labels, template, tokens, result.added, result.removed, maps, left, voters)
    sizes = (
        size,
        tables[donor].size,
        next((m[donor].size for n, m in apart.items() if n.endswith(OF_LAYERS)), None),
    )
    config, generation = _configs(
        sources[donor], tokenizers[donor], tokenizers[template], tokens, sizes, notes
    )
    files = {**result.files, **({GENERATION: generation} if generation is not None else {})}
    without = frozenset(FILES) - set(files)
    return VocabularyPlan(size, maps, files, without, config, left, tuple(notes), tuple(tables), apart)


def _tokenizers(
    sources: Sequence[Source],
    references: Sequence[str],
    setting: TokenizerSetting,
    donor: int,
    notes: list[str],
) -> tuple[list[Tokenizer], list[Tables]]:
    """The tokenizers and tables of all sources; the donor's tokenizer for a model that has none and as many rows."""
    read = [read_tokenizer(s.directory) for s in sources]
    stand_in = read[donor]
    tables = []
    for source, tokenizer in zip(sources, read, strict=True):
        needed = 1 + max(tokenizer.tokens.values(), default=-1) if tokenizer is not None else 0
        tables.append(find_tables(source, needed, setting.tables))
    found = []
    for i, (source, tokenizer) in enumerate(zip(sources, read, strict=True)):
        if tokenizer is None:
            if stand_in is None:
                raise MismatchError(
                    f"{sources[donor].label}: has no tokenizer that can be read (tokenizer.json, vocab.json, vocab.txt or a "
                    f"sentencepiece model), and the recipe asks for tokenizer: {{source: {setting.source}}}. "
                    "Put the tokenizer's files into the model's folder."
                )
            rows = [_rows(sources[m], tables[m], None) for m in (i, donor)]
            if rows[0] != rows[1] or setting.source == references[i]:
                raise MismatchError(
                    f"{source.label}: has no tokenizer that can be read, and {rows[0]} rows where {sources[donor].label} has "
                    f"{rows[1]}; expected to know its tokens. Put the tokenizer's files into the model's folder."
                )
            notes.append(
                f"{source.label} has no tokenizer that can be read; it is taken to have that of {sources[donor].label}."
            )
        found.append(tokenizer or stand_in)
    return [t for t in found if t is not None], tables


def _rows(source: Source, tables: Tables, tokenizer: Tokenizer | None) -> int:
    """The rows of a model's vocabulary matrices: as its headers say, else its config, else its tokenizer."""
    stated = max(tables.rows.values()) if tables.rows else rows_in(source.config)
    if stated is not None:
        return stated
    return 1 + max(tokenizer.tokens.values(), default=-1) if tokenizer is not None else 0


def _reference(reference: str, references: Sequence[str], where: str) -> int:
    if reference in references:
        return list(references).index(reference)
    near = difflib.get_close_matches(reference, references, 1, 0.6)
    hint = f" Did you mean {near[0]!r}?" if near else " Write it as under models."
    raise RecipeError(
        f"{where}: {reference!r} is no model of the recipe; expected one of {', '.join(references)}.{hint}"
    )


def _asked(
    wishes: Mapping[str, TokenSource],
    tokens: Mapping[str, int],
    references: Sequence[str],
    labels: Sequence[str],
    tokenizers: Sequence[Tokenizer],
    counts: Sequence[int],
) -> dict[int, RowRequest]:
    """What the recipe says of tokens, by their ids in the output. Errors: RecipeError with a line for each mistake."""
    asked = {}
    problems = []
    for token, wish in wishes.items():
        try:
            asked[tokens[token]] = RowRequest(
                _place(token, wish, references, labels, tokenizers, counts), wish.force
            )
        except RecipeError as error:
            problems.append(str(error))
    if problems:
        raise RecipeError(*problems)
    return asked


def _place(
    token: str,
    wish: TokenSource,
    references: Sequence[str],
    labels: Sequence[str],
    tokenizers: Sequence[Tokenizer],
    counts: Sequence[int],
) -> tuple[int, int] | None:
    where = f"tokenizer.tokens[{token!r}].source"
    if wish.kind is None:
        return None
    if wish.kind == "zero":
        return ZEROS, 0
    model = _reference(wish.model, references, where)
    if wish.kind == "model_token" and wish.token_id is not None:
        if not 0 <= wish.token_id < counts[model]:
            raise RecipeError(
                f"{where}.token_id is {wish.token_id}; {labels[model]} has the rows 0 to {counts[model] - 1}. Write one of them."
            )
        return model, wish.token_id
    name = token if wish.kind == "model" or wish.token is None else wish.token
    row = tokenizers[model].tokens.get(name)
    if row is None or row >= counts[model]:
        what = "no such token" if row is None else f"it as token {row}, and {counts[model]} rows"
        near = difflib.get_close_matches(name, tokenizers[model].added, 1, 0.7)
        hint = f"Did you mean {near[0]!r}?" if near and near[0] != name else "Name another model or token."
        raise RecipeError(f"{where}: {labels[model]} has no row for {name!r} ({what}). {hint}")
    return model, row


def _left(tokenizer: Tokenizer, rows: int, tokens: Mapping[str, int]) -> Dropped:
    here = {i for i in tokenizer.tokens.values() if i < rows}
    return Dropped(
        sum(1 for t, i in tokenizer.tokens.items() if i < rows and t not in tokens), rows - len(here)
    )


def _told(
    setting: TokenizerSetting,
    labels: Sequence[str],
    template: int,
    tokens: Mapping[str, int],
    added: int,
    removed: int,
    maps: Sequence[RowMap],
    left: Sequence[Dropped],
    voters: Sequence[int],
) -> list[str]:
    """What people should know of the vocabulary."""
    told = [
        f"the output has {len(tokens)} tokens in {maps[0].size} rows: the tokenizer of {labels[template]}"
    ]
    told[0] += f" with {added} added tokens." if added else "."
    if setting.source == "union" and added:
        told.append(
            "tokens of other models are matched whole before words are split, as added tokens; their merges are not taken over."
        )
    if removed:
        told.append(
            f"{removed} tokens of the tokenizer of {labels[template]} have no row in it; they are taken out."
        )
    for label, what in zip(labels, left, strict=True):
        if what.tokens:
            told.append(f"{what.tokens} tokens of {label} are not in the output.")
        if what.rows:
            told.append(f"{what.rows} rows of {label} mean no token; they are not in the output.")
    for i in voters:
        others = int(((maps[i].origin >= 0) & (maps[i].origin != i)).sum() + (maps[i].origin == MEAN).sum())
        if others:
            told.append(f"{others} rows of {labels[i]} are taken from other tokens or models.")
    names = {row: token for token, row in tokens.items()}
    zeros = [names[int(r)] for r in np.flatnonzero(maps[voters[0]].origin == ZEROS) if int(r) in names]
    silent = [t for t in zeros if t not in setting.tokens or setting.tokens[t].kind is None]
    if silent:
        shown = ", ".join(repr(t) for t in silent[:SHOWN]) + (", ..." if len(silent) > SHOWN else "")
        told.append(f"{len(silent)} tokens have a row in no model and begin as zeros: {shown}.")
    return told


def _configs(
    donor: Source,
    of_donor: Tokenizer,
    template: Tokenizer,
    tokens: Mapping[str, int],
    sizes: tuple[int, int | None, int | None],
    notes: list[str],
) -> tuple[dict[str, Any], bytes | None]:
    """Changes of ``config.json``, and ``generation_config.json`` where it changes. Token ids follow their tokens.

    ``sizes`` are the rows of the output, those that the donor has, and new rows of embeddings per layer.
    """
    meanings: dict[int, list[str]] = {}
    for token, row in of_donor.tokens.items():
        meanings.setdefault(row, []).append(token)
    lost: dict[str, None] = {}
    own = {} if template is of_donor else _own_ids(template)

    def remap(key: str, row: int) -> int | None:
        here = meanings.get(row, [])
        kept = [tokens[t] for t in here if t in tokens]
        if kept:
            return row if row in kept else kept[0]
        if not here:
            lost[f"{key}: {row} is no token of {donor.label}; it is left as it is."] = None
            return row
        stand_in = template.special(
            key.removesuffix("s").removesuffix("_token_id").removesuffix("_index")
        ) or own.get(key)
        new = tokens.get(stand_in) if stand_in else None
        lost[
            f"{key}: {here[0]!r} is not in the output; "
            + (f"{stand_in!r} takes its place." if new is not None else "left out.")
        ] = None
        return new

    config = dict(donor.config)
    changed = with_rows(with_new_ids(config, remap), *sizes) if config else {}
    changes = {key: value for key, value in changed.items() if key not in config or config[key] != value}
    path = donor.directory / GENERATION if donor.directory is not None else None
    generation = read_json(path) if path is not None and path.exists() else {}
    new = changed_ids(generation, remap)
    notes += lost
    return changes, as_json({**generation, **new}) if new else None


def _own_ids(tokenizer: Tokenizer) -> dict[str, str]:
    """The tokens that the config beside a tokenizer names by single ids, such as ``decoder_start_token_id``, which tokenizers do not say."""
    path = tokenizer.directory / "config.json"
    names = {row: token for token, row in tokenizer.tokens.items()}
    found: dict[str, str] = {}

    def note(key: str, row: int) -> int:
        if row in names:
            found.setdefault(key, names[row])
        return row

    with_new_ids(read_json(path) if path.exists() else {}, note)
    return found
