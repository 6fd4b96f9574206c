"""Plans the vocabulary of an output: its tokens and files, and where each model's rows come from."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from alnico.checkpoint.json_files import read_json
from alnico.checkpoint.source import Source
from alnico.errors import MismatchError, RecipeError
from alnico.numerics.sizes import count_of
from alnico.recipe.schema import TokenizerSetting, TokenSource
from alnico.vocabulary.config_ids import (
    changed_ids,
    rows_in,
    stated_roles,
    with_new_ids,
    with_roles,
    with_rows,
)
from alnico.vocabulary.irregular_tables import (
    PER_LAYER_EMBEDDING,
    refuse_other_meanings,
    refuse_unclear,
    resolve_unclear,
    separate_maps,
)
from alnico.vocabulary.output_tokenizer import combine_tokens, union_entries
from alnico.vocabulary.row_map import (
    MEAN,
    ZEROS,
    RowMap,
    RowRequest,
    make_approximated_maps,
    make_row_maps,
)
from alnico.vocabulary.tables import Tables, find_tables
from alnico.vocabulary.tokenizer import FILES, Tokenizer, as_json, plain_entry, read_tokenizer

if TYPE_CHECKING:
    from alnico.vocabulary.approximation import Approximation

GENERATION = "generation_config.json"
SHOWN = 3


@dataclass(frozen=True)
class DroppedTokens:
    """How much of a model's vocabulary the output lacks: ``tokens`` with a row, ``rows`` without a token."""

    tokens: int
    rows: int


@dataclass(frozen=True)
class VocabularyPlan:
    """The output's vocabulary, of ``size`` rows.

    ``rows`` holds a map for each source; ``separate`` those of tensors whose rows differ from the
    vocabulary's, by name. ``files`` are to be written, by name; ``excluded`` are names of the donor's files
    that are not copied; ``config`` are the keys of ``config.json`` with new values. ``dropped`` says for each
    source what the output lacks. ``tables`` are the tables of each source. ``approximation`` says how models make the rows of tokens that
    they lack, if the recipe asks for it.
    """

    size: int
    rows: tuple[RowMap, ...]
    files: Mapping[str, bytes]
    excluded: frozenset[str]
    config: Mapping[str, Any]
    dropped: tuple[DroppedTokens, ...]
    notes: tuple[str, ...]
    tables: tuple[Tables, ...] = ()
    separate: Mapping[str, tuple[RowMap, ...]] = field(default_factory=lambda: MappingProxyType({}))
    approximation: Approximation | None = None


def plan_vocabulary(
    setting: TokenizerSetting,
    sources: Sequence[Source],
    references: Sequence[str],
    donor: int,
    models: Sequence[int],
    *,
    has_base: bool = True,
) -> VocabularyPlan:
    """Plan the output's vocabulary and where its rows come from, from tokenizer files and headers.

    The output has the tokenizer of the donor (``union``, ``base``) or of another model. ``union`` adds the
    tokens of all ``models`` that it lacks, in recipe order and within a model by id: plain ones as added
    tokens (their merges are not added), then each model's added tokens. If two models describe one token, the
    first description counts. Tokens of the recipe's ``tokens`` that are still missing follow. For where rows
    come from see :func:`~alnico.vocabulary.row_map.make_row_maps`; the donor votes with the models, and its row
    takes precedence if ``has_base``. The recipe's ``tables`` or :func:`~alnico.vocabulary.tables.find_tables`
    say which tensors have a row for each token; if there are none, the number of rows is the config's.
    With ``approximate`` every model makes the rows of tokens that it lacks of its own rows
    (:mod:`alnico.vocabulary.approximation`), tokens are compared by the text that they stand for, and the output has at
    least as many rows as the model whose tokenizer it has.

    Edge cases: a token whose id is beyond its model's rows counts as missing from that model; in the template
    it is removed, unless it has a role. Ids without a token are padding, and so are the rows up to
    ``pad_to_multiple_of``. Errors: RecipeError for rows requested from a model that lacks them; ModelError
    for a tokenizer that cannot be read; MismatchError for a model without a tokenizer whose number of rows is
    not the donor's, for rows that move while it is unclear which tensors have them, and for ids that have a
    meaning beyond the tokenizer. Differs from mergekit 0.1.5: the output has a row for each id up to the
    highest, not one per token; ids beyond a model's rows, and gaps, are not an error; the padding is the mean
    of the rows that have a token; ids come in recipe order; token ids of the configs follow their tokens.
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
    present = {
        *(e["content"] for e in entries),
        *(t for t, i in tokenizers[template].tokens.items() if i < counts[template]),
    }
    entries += [plain_entry(t) for t in setting.tokens if t not in present]
    result = combine_tokens(tokenizers[template], counts[template], entries)
    tokens = result.tokens

    count = 1 + max(tokens.values(), default=-1)
    size = max(count, counts[template]) if setting.approximate else count
    if setting.pad_to_multiple_of:
        size = -(-size // setting.pad_to_multiple_of) * setting.pad_to_multiple_of
    token_rows = np.full((len(sources), count), -2, np.int64)
    token_ids = np.fromiter(tokens.values(), np.int64, len(tokens))
    approximation = None
    if setting.approximate:
        from alnico.vocabulary.approximation import plan_approximation

        approximation = plan_approximation(setting, sources, tables, tokenizers, counts, template, tokens)
        shared = [known.rows for known in approximation.shared]
    else:
        shared = [tokenizer.tokens for tokenizer in tokenizers]
    for i, rows in enumerate(shared):
        ids = np.fromiter((rows.get(t, -1) for t in tokens), np.int64, len(tokens))
        token_rows[i, token_ids] = np.where(ids < counts[i], ids, -1)
    voters = list(dict.fromkeys([*models, donor]))
    requests = _row_requests(setting.tokens, tokens, references, labels, tokenizers, counts)
    base = donor if has_base else None

    def make_maps(rows: np.ndarray, size: int) -> tuple[RowMap, ...]:
        if approximation is not None:
            return make_approximated_maps(rows, size, requests)
        return make_row_maps(rows, size, voters, base, requests)

    maps = make_maps(token_rows, size)
    separate: dict[str, tuple[RowMap, ...]] = {}
    if any(not m.keeps(rows) for m, rows in zip(maps, counts, strict=True)):
        tables = resolve_unclear(tables, sources, setting.tables)
        # The folder of a tokenizer alone has no tables, and none is needed.
        checked = [i for i, source in enumerate(sources) if source.tensors or approximation is None]
        refuse_unclear(
            [tables[i] for i in checked],
            [sources[i] for i in checked],
            setting.source,
            bool(setting.tables),
        )
        refuse_other_meanings(sources, token_rows, tokens)
        separate = separate_maps(
            tables,
            sources,
            donor,
            token_rows,
            size,
            make_maps,
        )

    # Rows beyond the vocabulary's size belong to no token: those for sounds, for example. They do not move.
    moved = [min(rows, t.size or rows) for rows, t in zip(counts, tables, strict=True)]
    dropped = tuple(
        _dropped(tokenizer, rows, tokens) for tokenizer, rows in zip(tokenizers, moved, strict=True)
    )
    if approximation is not None:
        approximation = approximation.with_rows(token_rows, tables)
        notes += approximation.notes(labels, [i for i in voters if i != template], tokens, size)
    else:
        notes += _notes(
            setting, labels, template, tokens, result.added, result.removed, maps, dropped, voters
        )
    sizes = (
        size,
        tables[donor].size,
        next((m[donor].size for n, m in separate.items() if n.endswith(PER_LAYER_EMBEDDING)), None),
    )
    config, generation = _configs(
        sources[donor],
        tokenizers[donor],
        tokenizers[template],
        tokens,
        sizes,
        notes,
        sources[template] if approximation is not None and template != donor else None,
    )
    files = {**result.files, **({GENERATION: generation} if generation is not None else {})}
    excluded = frozenset(FILES) - set(files)
    return VocabularyPlan(
        size, maps, files, excluded, config, dropped, tuple(notes), tuple(tables), separate, approximation
    )


def _tokenizers(
    sources: Sequence[Source],
    references: Sequence[str],
    setting: TokenizerSetting,
    donor: int,
    notes: list[str],
) -> tuple[list[Tokenizer], list[Tables]]:
    """Return the tokenizers and tables of all sources.

    A model without a tokenizer gets the donor's if it has as many rows.
    """
    own = [read_tokenizer(s.directory) for s in sources]
    default = own[donor]
    tables = []
    for source, tokenizer in zip(sources, own, strict=True):
        tokens = 1 + max(tokenizer.tokens.values(), default=-1) if tokenizer is not None else 0
        tables.append(find_tables(source, tokens, setting.tables))
    tokenizers = []
    for i, (source, tokenizer) in enumerate(zip(sources, own, strict=True)):
        if tokenizer is None:
            if default is None:
                raise MismatchError(
                    f"{sources[donor].label}: has no readable tokenizer (tokenizer.json, vocab.json, "
                    f"vocab.txt or a sentencepiece model), but the recipe has tokenizer: {{source: "
                    f"{setting.source}}}. Put the tokenizer's files into the model's folder."
                )
            rows = [_rows(sources[m], tables[m], None) for m in (i, donor)]
            if rows[0] != rows[1] or setting.source == references[i]:
                raise MismatchError(
                    f"{source.label}: has no readable tokenizer, and {rows[0]} rows where "
                    f"{sources[donor].label} has {rows[1]}; its tokens must be known. Put the tokenizer's "
                    "files into the model's folder."
                )
            notes.append(
                f"{source.label} has no readable tokenizer; alnico assumes that of {sources[donor].label}."
            )
        tokenizers.append(tokenizer or default)
    return [t for t in tokenizers if t is not None], tables


def _rows(source: Source, tables: Tables, tokenizer: Tokenizer | None) -> int:
    """Return the rows of a model's vocabulary matrices, from its headers, its config or its tokenizer."""
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
        f"{where}: {reference!r} is not a model of the recipe; expected one of {', '.join(references)}.{hint}"
    )


def _row_requests(
    settings: Mapping[str, TokenSource],
    tokens: Mapping[str, int],
    references: Sequence[str],
    labels: Sequence[str],
    tokenizers: Sequence[Tokenizer],
    counts: Sequence[int],
) -> dict[int, RowRequest]:
    """Return the recipe's requests for rows, by token id in the output.

    Errors: RecipeError, one line per mistake.
    """
    requests = {}
    problems = []
    for token, setting in settings.items():
        try:
            requests[tokens[token]] = RowRequest(
                _requested_row(token, setting, references, labels, tokenizers, counts), setting.force
            )
        except RecipeError as error:
            problems.append(str(error))
    if problems:
        raise RecipeError(*problems)
    return requests


def _requested_row(
    token: str,
    setting: TokenSource,
    references: Sequence[str],
    labels: Sequence[str],
    tokenizers: Sequence[Tokenizer],
    counts: Sequence[int],
) -> tuple[int, int] | None:
    where = f"tokenizer.tokens[{token!r}].source"
    if setting.kind is None:
        return None
    if setting.kind == "zero":
        return ZEROS, 0
    model = _reference(setting.model, references, where)
    if setting.kind == "model_token" and setting.token_id is not None:
        if not 0 <= setting.token_id < counts[model]:
            raise RecipeError(
                f"{where}.token_id is {setting.token_id}; {labels[model]} has rows 0 to {counts[model] - 1}. "
                "Write one of these."
            )
        return model, setting.token_id
    name = token if setting.kind == "model" or setting.token is None else setting.token
    row = tokenizers[model].tokens.get(name)
    if row is None or row >= counts[model]:
        problem = "no such token" if row is None else f"it as token {row}, and {counts[model]} rows"
        near = difflib.get_close_matches(name, tokenizers[model].added, 1, 0.7)
        hint = f"Did you mean {near[0]!r}?" if near and near[0] != name else "Name another model or token."
        raise RecipeError(f"{where}: {labels[model]} has no row for {name!r} ({problem}). {hint}")
    return model, row


def _dropped(tokenizer: Tokenizer, rows: int, tokens: Mapping[str, int]) -> DroppedTokens:
    used = {i for i in tokenizer.tokens.values() if i < rows}
    return DroppedTokens(
        sum(1 for t, i in tokenizer.tokens.items() if i < rows and t not in tokens), rows - len(used)
    )


def _notes(
    setting: TokenizerSetting,
    labels: Sequence[str],
    template: int,
    tokens: Mapping[str, int],
    added: int,
    removed: int,
    maps: Sequence[RowMap],
    dropped: Sequence[DroppedTokens],
    voters: Sequence[int],
) -> list[str]:
    """Return the notes on the vocabulary for the user."""
    notes = [
        f"the output has {len(tokens)} tokens in {maps[0].size} rows: the tokenizer of {labels[template]}"
    ]
    notes[0] += f" with {added} added tokens." if added else "."
    if setting.source == "union" and added:
        notes.append(
            "tokens of other models become added tokens, which are matched whole before words are split; "
            "their merges are not added."
        )
    if removed:
        notes.append(
            f"the tokenizer of {labels[template]} loses {count_of(removed, 'token')} without a row in the model."
        )
    for label, missing in zip(labels, dropped, strict=True):
        if missing.tokens:
            notes.append(f"the output lacks {count_of(missing.tokens, 'token')} of {label}.")
        if missing.rows:
            notes.append(f"the output lacks {count_of(missing.rows, 'row')} of {label} that no token has.")
    for i in voters:
        others = int(((maps[i].origin >= 0) & (maps[i].origin != i)).sum() + (maps[i].origin == MEAN).sum())
        if others:
            notes.append(f"{labels[i]} takes {count_of(others, 'row')} from other tokens or models.")
    names = {row: token for token, row in tokens.items()}
    zeros = [names[int(r)] for r in np.flatnonzero(maps[voters[0]].origin == ZEROS) if int(r) in names]
    unrequested = [t for t in zeros if t not in setting.tokens or setting.tokens[t].kind is None]
    if unrequested:
        shown = ", ".join(repr(t) for t in unrequested[:SHOWN])
        shown += ", ..." if len(unrequested) > SHOWN else ""
        notes.append(f"{len(unrequested)} tokens have no row in any model and start as zeros: {shown}.")
    return notes


def _configs(
    donor: Source,
    donor_tokenizer: Tokenizer,
    template: Tokenizer,
    tokens: Mapping[str, int],
    sizes: tuple[int, int | None, int | None],
    notes: list[str],
    stated: Source | None = None,
) -> tuple[dict[str, Any], bytes | None]:
    """Return the changes of ``config.json``, and ``generation_config.json`` if it changes.

    ``sizes`` are the rows of the output, those of the donor, and the new rows of embeddings per layer. The ids of marks are those that
    the config of ``stated`` has, the model of the tokenizer, if it is given.
    """
    tokens_of: dict[int, list[str]] = {}
    for token, row in donor_tokenizer.tokens.items():
        tokens_of.setdefault(row, []).append(token)
    remarks: dict[str, None] = {}
    config_tokens = {} if template is donor_tokenizer else _config_tokens(template)

    def remap(key: str, row: int) -> int | None:
        donor_tokens = tokens_of.get(row, [])
        ids = [tokens[t] for t in donor_tokens if t in tokens]
        if ids:
            return row if row in ids else ids[0]
        if not donor_tokens:
            remarks[f"{key}: {row} is not a token of {donor.label}; it stays as it is."] = None
            return row
        role = key.removesuffix("s").removesuffix("_token_id").removesuffix("_index")
        substitute = template.special(role) or config_tokens.get(key)
        new = tokens.get(substitute) if substitute else None
        outcome = f"{substitute!r} replaces it." if new is not None else "it is removed."
        remarks[f"{key}: {donor_tokens[0]!r} is not in the output; {outcome}"] = None
        return new

    config = dict(donor.config)
    changed = with_rows(with_new_ids(config, remap), *sizes) if config else {}
    roles = stated_roles(stated.config) if stated is not None else {}
    if changed and roles:
        changed = with_roles(changed, roles)
    changes = {key: value for key, value in changed.items() if key not in config or config[key] != value}
    path = donor.directory / GENERATION if donor.directory is not None else None
    generation = read_json(path) if path is not None and path.exists() else {}
    new = changed_ids(generation, remap)
    if stated is not None and generation:
        path = stated.directory / GENERATION if stated.directory is not None else None
        own = read_json(path) if path is not None and path.exists() else {}
        roles |= stated_roles(own)
        new |= {key: ids for key, ids in roles.items() if generation.get(key) != ids}
    notes += [remark for remark in remarks if remark.partition(":")[0] not in roles]
    return changes, as_json({**generation, **new}) if new else None


def _config_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """Return tokens by keys such as ``decoder_start_token_id`` of the config next to a tokenizer."""
    path = tokenizer.directory / "config.json"
    names = {row: token for token, row in tokenizer.tokens.items()}
    by_key: dict[str, str] = {}

    def note(key: str, row: int) -> int:
        if row in names:
            by_key.setdefault(key, names[row])
        return row

    with_new_ids(read_json(path) if path.exists() else {}, note)
    return by_key
