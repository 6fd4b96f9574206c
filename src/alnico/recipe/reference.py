"""Resolves the model references of a recipe, and replaces them in its text."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import yaml

from alnico.checkpoint.reference import (
    is_inside_path,
    is_path,
    is_store_reference,
    refuse_misspelt,
    split_adapter,
    split_weight,
)
from alnico.errors import ModelError
from alnico.recipe.schema import Recipe


def resolve_reference(reference: str, folder: str) -> str:
    """Return the path of a reference: relative to the working directory, or else to the recipe's folder."""
    in_folder = Path(folder) / reference
    try:
        exists = Path(reference).expanduser().exists() or is_inside_path(reference)
        exists_in_folder = in_folder.exists() or is_inside_path(os.fspath(in_folder))
    except (OSError, RuntimeError) as error:  # a name that is too long; ~ of an unknown user
        why = error.strerror if isinstance(error, OSError) else str(error).rstrip(".")
        raise ModelError(f"model {reference!r}: is not a path ({why}). Use the path of a model.") from None
    if is_store_reference(reference) and not exists:
        return reference
    if not exists and exists_in_folder:
        return os.fspath(in_folder)
    parts = split_adapter(reference, lambda path: is_path(path) or is_path(os.fspath(Path(folder) / path)))
    if parts is None and not exists and folder != ".":
        for part in reference.split("+"):
            if not is_store_reference(split_weight(part)[1]):
                refuse_misspelt(split_weight(part)[1], folder)
    return _each_part(parts, lambda part: resolve_reference(part, folder)) if parts else reference


def _each_part(parts: tuple[str, str], change: Callable[[str], str]) -> str:
    """Apply ``change`` to the paths of a base and its adapter; keep the adapter's weight."""
    _, adapter = split_weight(parts[1])
    text = parts[1][: len(parts[1]) - len(adapter)]
    return f"{change(parts[0])}+{text}{change(adapter)}"


def relative_reference(reference: str, folder: str | os.PathLike[str]) -> str:
    """Return the reference to use in a recipe in ``folder``: the inverse of :func:`resolve_reference`.

    Paths that start at the root or at home and ids of the hub stay as they are.

    >>> relative_reference("openai-community/gpt2", "recipes")
    'openai-community/gpt2'
    """
    parts = split_adapter(reference, is_path)
    if parts is not None:
        return _each_part(parts, lambda part: relative_reference(part, folder))
    return (
        os.path.relpath(reference, folder) if is_path(reference) and reference[:1] not in "/~" else reference
    )


def replace_references(recipe: Recipe, references: Mapping[str, str]) -> Recipe:
    """Replace references in the recipe's text, for instance a hub id by the id with its commit.

    >>> replace_references(Recipe("linear", (), text="models: [a/b, 'c']  # a/b"), {"a/b": "a/b@0123", "c": "d"}).text
    'models: [a/b@0123, d]  # a/b'
    """
    text = recipe.text or yaml.safe_dump(recipe.canonical(), sort_keys=False)
    words = [t for t in yaml.scan(text) if isinstance(t, yaml.ScalarToken) and t.value in references]
    for word in reversed(words):
        text = text[: word.start_mark.index] + _scalar(references[word.value]) + text[word.end_mark.index :]
    return dataclasses.replace(
        recipe, text=text, written_seed=recipe.written_seed if recipe.text else recipe.seed
    )


def _scalar(text: str) -> str:
    """Write text as YAML, without quotes if that is safe in a list and a mapping."""
    is_plain = re.fullmatch(r"[A-Za-z_][\w./@+-]*", text, re.ASCII) and yaml.safe_load(text) == text
    return text if is_plain else json.dumps(text, ensure_ascii=False)
