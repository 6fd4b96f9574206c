"""Searches the hub for task vectors, and for the PEFT adapters of a base, which are task vectors too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from alnico.checkpoint.hub import ListedModel, is_repository_id, latest_commit, list_models
from alnico.checkpoint.lineage import licence_name
from alnico.errors import HubError, ModelError, visible
from alnico.store.entry import Entry
from alnico.store.remotes.hub import vector_name
from alnico.store.vector_card import TAG

UNREAD = "0" * 64
"""The hash of a manifest that was not read."""

MAX_WORDS = 100
"""Most tags of a repository that are taken."""


@dataclass(frozen=True)
class FoundOnHub:
    """A task vector or an adapter on the hub. ``reference`` is what ``pull`` takes: ``owner/name@COMMIT``.

    ``entry`` has what the repository's card says; its hash is zeros, since the manifest was not read.
    """

    reference: str
    entry: Entry
    commit: str | None
    downloads: int
    likes: int

    @property
    def note(self) -> str:
        return f"{self.downloads:,} downloads, {self.likes:,} likes"


def search_hub(
    base: str | None = None,
    text: str = "",
    *,
    task: str | None = None,
    language: str | None = None,
    licence: str | None = None,
    limit: int = 50,
) -> list[FoundOnHub]:
    """Search the hub: first task vectors, then the PEFT adapters of ``base``, each most downloaded first.

    ``base`` is ``owner/name``; without it only task vectors are found. ``text`` is part of a repository's name; the others are
    tags that it must have. Errors: HubError; ModelError for a base that is not an id of the hub.
    """
    if base is not None and not is_repository_id(base):
        raise ModelError(
            f"{base}: is not the id of a model on the hub; expected owner/name. Give the id of the base that your copy is of."
        )
    name = base.partition("@")[0] if base is not None else None
    more = [task, language, f"license:{licence.lower()}" if licence is not None else None]
    tags = [tag for tag in more if tag is not None]
    vectors = list_models([TAG, *([f"base_model:{name}"] if name else []), *tags], search=text, limit=limit)
    found = {model.name: _found(model, name) for model in vectors}
    if name is not None and len(found) < limit:
        for model in list_models([f"base_model:adapter:{name}", *tags], search=text, limit=limit):
            found.setdefault(model.name, _found(model, name))
    return list(found.values())[:limit]


def base_news(base: str | None, revision: str | None) -> str | None:
    """Say that a base on the hub has another revision now than a task vector was made of; None if it has not.

    A base that is no repository of the hub, or without a revision, has no news; nor has any where HF_HUB_OFFLINE is set.
    """
    from huggingface_hub import constants

    if base is None or revision is None or base.count("/") != 1 or not is_repository_id(base):
        return None
    if constants.HF_HUB_OFFLINE:
        return None
    try:
        commit = latest_commit(base)
    except HubError:
        return f"{base}: {constants.ENDPOINT} did not say whether it has a new revision."
    if commit == revision:
        return None
    return (
        f"{base} is at revision {commit[:12]} now; the task vector was made of {revision[:12]}. It fits the new one only where the "
        f"tensors that it touches are unchanged. Use {base}@{revision[:12]}..., or check by `alnico store verify --base {base}`."
    )


def _found(model: ListedModel, base: str | None) -> FoundOnHub:
    bases = [
        tag.split(":") for tag in model.tags if tag.startswith("base_model:") and 2 <= tag.count(":") + 1 <= 3
    ]
    relations = {parts[1] for parts in bases if len(parts) == 3}
    stated = next((parts[-1] for parts in bases), None)
    is_vector = TAG in model.tags
    entry = Entry(
        name=vector_name(model.name),
        version=1,
        sha256=UNREAD,
        manifest_bytes=0,
        kind="difference" if is_vector and "adapter" not in relations else "adapter",
        tasks=_tasks(model) if is_vector else (),
        languages=_words(model.card.get("language")),
        licence=_licence_of(model.card),
        base=base if base is not None else stated,
    )
    commit = f"@{model.commit}" if model.commit is not None else ""
    return FoundOnHub(f"{model.name}{commit}", entry, model.commit, model.downloads, model.likes)


def _tasks(model: ListedModel) -> tuple[str, ...]:
    """The tags that its author wrote, except those that say what it is."""
    return tuple(word for word in _words(model.card.get("tags")) if word not in (TAG, "alnico"))


def _words(value: Any) -> tuple[str, ...]:
    listed = value if isinstance(value, list) else [value]
    return tuple(
        visible(word) for word in listed[:MAX_WORDS] if isinstance(word, str) and 0 < len(word) <= 200
    )


def _licence_of(card: Mapping[str, Any]) -> str | None:
    texts = {key: value for key, value in card.items() if isinstance(value, str)}
    name = licence_name({k: texts[k] for k in ("license", "license_name") if k in texts})
    return None if name is None else visible(name[:200])
