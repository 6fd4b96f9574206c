"""Plans how models make the rows of tokens that they lack, where a recipe has ``approximate``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from alnico.checkpoint.source import Source
from alnico.errors import MismatchError
from alnico.numerics.dtypes import MERGEABLE
from alnico.numerics.sizes import count_of
from alnico.recipe.schema import Approximate, TokenizerSetting
from alnico.vocabulary.irregular_tables import PER_LAYER_EMBEDDING
from alnico.vocabulary.made_rows import MadeRows, MeanRows, PursuitRows, SubwordRows
from alnico.vocabulary.tables import Tables, is_input
from alnico.vocabulary.token_pieces import TokenPieces
from alnico.vocabulary.token_texts import SharedTokens, TokenTexts, shared_tokens
from alnico.vocabulary.tokenizer import Tokenizer

FEWEST_SHARED = 0.01
"""The share of the output's tokens that a model should know: below it, a note says that the result will be poor."""


@dataclass(frozen=True, eq=False)
class Approximation:
    """How the rows of tokens that a model lacks are made, with up to ``atoms`` shared rows each.

    ``template`` is the position of the model whose tokenizer the output has. For each source, ``shared`` are the output's tokens that it
    has a row for, ``texts`` the texts of its own tokens, and ``tables`` its tables. ``token_rows`` are as for
    :func:`~alnico.vocabulary.row_map.make_approximated_maps`.
    """

    way: Approximate
    atoms: int
    template: int
    tokens: Mapping[str, int]
    shared: tuple[SharedTokens, ...]
    texts: tuple[TokenTexts, ...]
    tables: tuple[Tables, ...]
    token_rows: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.int64))

    def with_rows(self, token_rows: np.ndarray, tables: Sequence[Tables]) -> Approximation:
        return replace(self, token_rows=token_rows, tables=tuple(tables))

    def notes(
        self, labels: Sequence[str], models: Sequence[int], tokens: Mapping[str, int], size: int
    ) -> list[str]:
        """Return notes for the user: how many tokens of each of ``models`` have its own row, and how the others are made."""
        name = labels[self.template]
        notes = [f"the output has {len(tokens):,} tokens in {size:,} rows: the tokenizer of {name}."]
        for i in models:
            known = int((self.token_rows[i] >= 0).sum())
            made = len(tokens) - known
            roles = len(self.shared[i].by_role)
            by_role = f", {roles} of them by their role" if roles else ""
            note = f"{labels[i]} knows {known:,} of the {len(tokens):,} tokens{by_role}"
            notes.append(f"{note}; {self._made_text(made, known)}." if made else f"{note}.")
            if known < FEWEST_SHARED * len(tokens):
                notes.append(
                    f"{labels[i]} and {name} share hardly any token, so the output will not work as {labels[i]} does."
                )
        if size > len(tokens):
            notes.append(f"{count_of(size - len(tokens), 'row')} of no token are the mean of all rows.")
        return notes

    def _made_text(self, made: int, known: int) -> str:
        rows = f"{made:,} rows are" if made > 1 else "1 row is"
        if self.way == "omp":
            return f"{rows} made of up to {min(self.atoms, known)} of its rows by orthogonal matching pursuit"
        if self.way == "subword":
            return f"{rows} the mean of the rows of sub-words"
        return f"{rows} the mean of all rows"

    def made_rows(
        self, sources: Sequence[Source], model: int, budget_bytes: int, threads: int
    ) -> Mapping[str, MadeRows]:
        """Return what makes the rows of each table of a model; none if it makes none.

        ``sources`` are all models, with their own rows. Errors: MismatchError.
        """
        own = self.token_rows[model]
        rows = self.tables[model].rows
        if not (own == -1).any() or not rows:
            return {}
        made: dict[tuple[str, int], MadeRows] = {}
        by_table: dict[str, MadeRows] = {}
        for name, limit in rows.items():
            donor_name = self._donor_table(sources, name) if self.way == "omp" else ""
            key = donor_name, limit
            if key not in made:
                own_rows = np.where(own < limit, own, -1)
                made[key] = self._way(sources, model, donor_name, own_rows, limit, budget_bytes, threads)
            by_table[name] = made[key]
        return by_table

    def _way(
        self,
        sources: Sequence[Source],
        model: int,
        donor_name: str,
        own_rows: np.ndarray,
        limit: int,
        budget_bytes: int,
        threads: int,
    ) -> MadeRows:
        if self.way == "mean":
            return MeanRows()
        if self.way == "subword":
            template = self.texts[self.template]
            texts = {row: template.text(token) for token, row in self.tokens.items()}
            # A byte token next to a piece of its text would get the row of the piece, and half of its probability.
            texts |= {
                row: b""
                for token, row in self.tokens.items()
                if template.is_byte(token) and template.by_text.get(texts[row], row) != row
            }
            return SubwordRows(TokenPieces(self.texts[model]), texts, limit)
        donor = sources[self.template]
        known = self.token_rows[self.template]
        donor_rows = np.where(known < self.tables[self.template].rows[donor_name], known, -1)
        return PursuitRows(donor, donor_name, donor_rows, own_rows, self.atoms, budget_bytes, threads)

    def _donor_table(self, sources: Sequence[Source], name: str) -> str:
        """Return the donor's table in which combinations are found for a model's table: its embedding for an embedding, its head for a
        head, if it stores one."""
        matrices = embeddings_of(sources[self.template], self.tables[self.template])
        inputs = [n for n in matrices if is_input(n)] or matrices
        heads = [n for n in matrices if not is_input(n)] or inputs
        return (inputs if is_input(name) else heads)[0]


def embeddings_of(source: Source, tables: Tables) -> list[str]:
    """Return the names of the tables of a model that are matrices with a row for each token, and can be computed with."""
    return [
        name
        for name in tables.rows
        if len(source.tensors[name].shape) == 2
        and source.tensors[name].dtype in MERGEABLE
        and name not in tables.turned
        and not name.endswith(PER_LAYER_EMBEDDING)
    ]


def plan_approximation(
    setting: TokenizerSetting,
    sources: Sequence[Source],
    tables: Sequence[Tables],
    tokenizers: Sequence[Tokenizer],
    counts: Sequence[int],
    template: int,
    tokens: Mapping[str, int],
) -> Approximation:
    """Find what tokens of the output each model knows. ``counts`` are the rows of each, ``tokens`` the output's.

    Errors: MismatchError for ``omp`` with the tokenizer of a model that has no embeddings.
    """
    assert setting.approximate is not None
    if setting.approximate == "omp" and not embeddings_of(sources[template], tables[template]):
        raise MismatchError(
            f"{sources[template].label}: has a tokenizer and no embeddings (no matrix with a row for each token); expected some, since omp "
            "finds there how rows are made. Give a model with its weights, or choose approximate: subword or mean."
        )
    texts = tuple(TokenTexts(t, rows) for t, rows in zip(tokenizers, counts, strict=True))
    named = texts[template].tokenizer.tokens
    shared = []
    for own in texts:
        if own.tokenizer is tokenizers[template]:
            shared.append(SharedTokens(own.tokenizer.tokens, frozenset()))
            continue
        found = shared_tokens(texts[template], own)
        others = {t: own.tokenizer.tokens[t] for t in tokens if t not in named and t in own.tokenizer.tokens}
        shared.append(SharedTokens({**found.rows, **others}, found.by_role) if others else found)
    return Approximation(
        setting.approximate, setting.atoms, template, tokens, tuple(shared), texts, tuple(tables)
    )
