"""Makes a stored task vector by options as callers and the command line give them, each on its own."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alnico.checkpoint.json_files import read_json
from alnico.checkpoint.shards import DEFAULT_MAX_SHARD_BYTES
from alnico.checkpoint.task_vectors.manifest import Evaluation, SafeScale, is_name
from alnico.errors import ModelError, RecipeError
from alnico.events import Watcher
from alnico.models.open_models import path_of
from alnico.numerics.numbers import finite_number
from alnico.numerics.sizes import bytes_of
from alnico.run_options import DEFAULT_BUDGET_BYTES, RunOptions, Size
from alnico.store.create import Created, create_vector
from alnico.store.metadata import Details
from alnico.store.target import Target

MOST_NAME = 96

Evaluations = str | os.PathLike[str] | Sequence[Evaluation | Mapping[str, Any]]
"""Scores: the path of a JSON file, or a list."""


def create_task_vector(
    finetuned: Any,
    base: Any,
    folder: str | os.PathLike[str],
    name: str | None = None,
    *,
    exact: bool = False,
    error: float | None = None,
    size: Size | None = None,
    tsv: float | None = None,
    encoding: str | None = None,
    description: str = "",
    tasks: str | Sequence[str] = (),
    languages: str | Sequence[str] = (),
    licence: str | None = None,
    training: str = "",
    evaluations: Evaluations = (),
    scale: float = 1.0,
    scale_range: Sequence[float] | None = None,
    base_id: str | None = None,
    dry_run: bool = False,
    max_shard_size: Size = DEFAULT_MAX_SHARD_BYTES,
    memory: Size = DEFAULT_BUDGET_BYTES,
    threads: int | None = None,
    offline: bool = False,
    watch: Watcher | None = None,
) -> Created:
    """Write the task vector of a fine-tune and its base into a new folder. The options are those of ``alnico store create``.

    Errors: RecipeError for options that do not go together; those of :func:`alnico.store.create.create_vector`.
    """
    target = Target(exact=exact, error=error, size=size, tsv=tsv, encoding=encoding)
    details = Details(
        description,
        _words(tasks, "tasks"),
        _words(languages, "languages"),
        licence,
        training,
        _evaluations(evaluations),
        _scale(scale, scale_range),
        base_id,
    )
    return create_vector(
        finetuned,
        base,
        Path(folder),
        name=vector_name(finetuned) if name is None else name,
        target=target,
        details=details,
        run=RunOptions.of(memory=memory, threads=threads, offline=offline, watch=watch),
        max_shard_bytes=bytes_of(max_shard_size),
        dry_run=dry_run,
    )


def vector_name(finetuned: Any) -> str:
    """Return a name for the task vector of a fine-tune: that of its folder, or of its repository.

    Errors: RecipeError for a model in memory.

    >>> vector_name("models/My Model/"), vector_name("owner/Sql-7b@main")
    ('My-Model', 'Sql-7b')
    """
    path = path_of(finetuned)
    last = "" if path is None else os.path.basename(os.path.normpath(path)) or ""
    if path is not None and not Path(os.path.expanduser(path)).exists():
        last = last.partition("@")[0]
    name = re.sub(r"\.{2,}", ".", re.sub(r"[^A-Za-z0-9._-]+", "-", last)).strip("-._")[:MOST_NAME]
    if not is_name(name):
        raise RecipeError(
            "name is missing; expected a name for the task vector, as the fine-tune has none. Give one, such as sql."
        )
    return name


def _words(words: str | Sequence[str], option: str) -> tuple[str, ...]:
    listed = [words] if isinstance(words, str) else list(words)
    if not all(isinstance(word, str) and word.strip() for word in listed):
        raise RecipeError(f"{option} is {words!r:.80}; expected words, such as math. Give each as text.")
    return tuple(dict.fromkeys(word.strip() for word in listed))


def _scale(suggested: float, tried: Sequence[float] | None) -> SafeScale:
    number = finite_number(suggested, "scale", error=RecipeError)
    if tried is None:
        return SafeScale(number)
    listed = [finite_number(x, "scale_range", error=RecipeError) for x in tried]
    if len(listed) != 2 or not listed[0] <= number <= listed[1]:
        raise RecipeError(
            f"scale_range is {list(tried)} and scale is {number:g}; expected the least and the most coefficient, with the suggested "
            "one between them. Give two numbers, such as 0.3 and 1.2."
        )
    return SafeScale(number, listed[0], listed[1])


def _evaluations(given: Evaluations) -> tuple[Evaluation, ...]:
    """Read scores from a list or a JSON file. Their values are checked with the manifest. Errors: ModelError, RecipeError."""
    if isinstance(given, (str, os.PathLike)):
        path = Path(given)
        found: Any = read_json(path).get("evaluations")
        where = f"{path}: evaluations"
        if not isinstance(found, list):
            raise ModelError(
                f"{where} is not a list; expected an object with a list of scores under this key. Write "
                '{"evaluations": [{"task": "gsm8k", "metric": "accuracy", "value": 0.61}]}.'
            )
    else:
        found, where = list(given), "evaluations"
    scores = []
    for i, one in enumerate(found):
        try:
            scores.append(one if isinstance(one, Evaluation) else Evaluation(**one))
        except TypeError as error:
            raise RecipeError(
                f"{where}[{i}] is not a score ({str(error)[:120]}); expected task, metric and value, and base, scale and examples if "
                "known. Correct it."
            ) from None
    return tuple(scores)
