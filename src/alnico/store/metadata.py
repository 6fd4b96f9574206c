"""Collects what a manifest says for people and machines: licences, tokens, chat template, identities of models."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from alnico.checkpoint.lineage import Lineage, licence_name, lineage_of
from alnico.checkpoint.source import Source, unwrap
from alnico.checkpoint.task_vectors.manifest import Evaluation, ModelIdentity, SafeScale, StoredFile
from alnico.store.weight_hashes import root_of
from alnico.vocabulary.chat_template import template_of
from alnico.vocabulary.compare import Vocabulary, read_vocabulary

TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True)
class Details:
    """What its author says of a task vector. ``licence`` is that of the fine-tune's card unless given; ``base_id`` names the base for
    others, where its files are a copy; ``scale`` is the suggested coefficient and the range that was tried."""

    description: str = ""
    tasks: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    licence: str | None = None
    training: str = ""
    evaluations: tuple[Evaluation, ...] = ()
    scale: SafeScale = field(default_factory=SafeScale)
    base_id: str | None = None


@dataclass(frozen=True)
class Texts:
    """What the tokenizers and templates of a fine-tune and its base say: added tokens, and a template that is new."""

    added_tokens: Mapping[str, int]
    chat_template: str | None
    own_vocabulary: str | None = None
    """The hash of the fine-tune's vocabulary, and that of the base's."""
    base_vocabulary: str | None = None


def texts_of(finetuned: Source, base: Source | None) -> Texts:
    """Compare the tokenizers and chat templates of two models. Errors: ModelError for files that cannot be read."""
    own = read_vocabulary(finetuned.directory)
    other = read_vocabulary(base.directory) if base is not None else None
    added: dict[str, int] = {}
    if own is not None and other is not None:
        known = {**other.tokens, **other.added}
        all_own = {**own.tokens, **own.added}
        new = {token: row for token, row in all_own.items() if known.get(token) != row}
        added = dict(sorted(new.items(), key=lambda item: (item[1], item[0])))
    template = template_of(finetuned.directory)
    if base is not None and template == template_of(base.directory):
        template = None
    return Texts(added, template, vocabulary_hash(own), vocabulary_hash(other))


def vocabulary_hash(vocabulary: Vocabulary | None) -> str | None:
    """Return the SHA-256 of the tokens with their ids: ``[[id,token],...]`` in order, as compact JSON in ASCII; None without a
    tokenizer."""
    if vocabulary is None:
        return None
    rows = sorted([row, token] for token, row in {**vocabulary.tokens, **vocabulary.added}.items())
    return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()


def identity_of(
    source: Source, files: Mapping[str, StoredFile], name: str | None, vocabulary: str | None = None
) -> ModelIdentity:
    """Say which model a source is. ``name`` is its id for others, if it is not a repository on the hub; ``vocabulary`` is its hash."""
    origin = unwrap(source).origin
    dtypes = Counter(t.nominal for t in source.tensors.values() if t.elements)
    return ModelIdentity(
        id=origin.name if origin is not None else name,
        revision=origin.commit if origin is not None else None,
        root=root_of(files),
        files=dict(files),
        dtype=min(dtypes, key=lambda d: (-dtypes[d], d)) if dtypes else None,
        vocabulary=vocabulary,
        licence=licence_name(lineage_of(source).licence),
    )


def base_name(base: Source, finetuned: Lineage, given: str | None) -> str | None:
    """Return the id of a base that is not on the hub: what the caller says, the fine-tune's card, or its folder's name.

    The card counts where it names one base with the folder's name.
    """
    if given is not None:
        return given
    folder = folder_name(base)
    stated = finetuned.bases[0] if len(finetuned.bases) == 1 else None
    if stated is not None and (folder is None or stated.rpartition("/")[2].lower() == folder.lower()):
        return stated
    return folder


def folder_name(source: Source) -> str | None:
    """Return the name of a model's folder or file, without what is above it; None for a model in memory."""
    location: Path | None = getattr(unwrap(source), "location", None)
    return location.absolute().resolve().name[:200] if location is not None else None
