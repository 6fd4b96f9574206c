"""Recipe and headers to a plan."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import yaml

from alnico.checkpoint.adapter import AdaptedModel
from alnico.checkpoint.model import Source, Tensor, is_path, open_model, split_adapter
from alnico.checkpoint.shards import DEFAULT_MAX_SHARD_BYTES, cut
from alnico.errors import ModelError
from alnico.methods import find
from alnico.methods.base import Merge, Method, combine
from alnico.numerics.dtypes import DTYPES, MERGEABLE, promote
from alnico.plan.align import Alignment, align
from alnico.plan.job import Dropped, Input, Job, Kind, Plan
from alnico.plan.memory import DEFAULT_BUDGET_BYTES, fit
from alnico.recipe.load import option_values, values_of
from alnico.recipe.schema import Recipe


def build_plan(
    recipe: Recipe,
    *,
    memory_bytes: int = DEFAULT_BUDGET_BYTES,
    threads: int | None = None,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    single_file: str | None = None,
    offline: bool = False,
    open_source: Callable[[str], Source] | None = None,
) -> Plan:
    """Open the models of a recipe (headers only), align them and lay out the output.

    ``single_file`` names the one output file of an OUT that ends in ``.safetensors``. Errors: ModelError, MismatchError,
    MethodError, ResourceError, HubError; see ``errors``. No tensor is read, and nothing is written but the hub's cache.
    """
    method = find(recipe.merge_method)
    references = list(recipe.references)
    opener = open_source or (lambda reference: open_model(located(reference, recipe.folder), offline=offline))
    sources: list[Source] = []
    try:
        for reference in references:
            sources.append(opener(reference))
        return _plan(recipe, method, references, sources, memory_bytes, threads, max_shard_bytes, single_file)
    except BaseException:
        for source in sources:
            source.close()
        raise


def located(reference: str, folder: str) -> str:
    """Return the path a reference means: from the working directory, else from the recipe's folder."""
    beside = Path(folder) / reference
    try:
        is_there, is_beside = Path(reference).expanduser().exists(), beside.exists()
    except (OSError, RuntimeError) as error:  # a name that is too long; ~ of a user that is not known
        why = error.strerror if isinstance(error, OSError) else str(error).rstrip(".")
        raise ModelError(f"model {reference!r}: is no path ({why}). Give the path of a model.") from None
    if not is_there and is_beside:
        return os.fspath(beside)
    parts = split_adapter(reference, lambda path: is_path(path) or (Path(folder) / path).exists())
    return "+".join(located(part, folder) for part in parts) if parts else reference


def pinned(recipe: Recipe, references: Mapping[str, str]) -> Recipe:
    """Put other references into the recipe's text, as it stands in outputs: a hub id with its commit, say.

    >>> pinned(Recipe("linear", (), text="models: [a/b, 'c']  # a/b"), {"a/b": "a/b@0123", "c": "d"}).text
    'models: [a/b@0123, d]  # a/b'
    """
    text = recipe.text or yaml.safe_dump(recipe.canonical(), sort_keys=False)
    words = [t for t in yaml.scan(text) if isinstance(t, yaml.ScalarToken) and t.value in references]
    for word in reversed(words):
        text = text[: word.start_mark.index] + _scalar(references[word.value]) + text[word.end_mark.index :]
    return dataclasses.replace(recipe, text=text, written_seed=recipe.written_seed if recipe.text else recipe.seed)


def _scalar(text: str) -> str:
    """Text as YAML, plain where that is safe in a list and a mapping."""
    is_plain = re.fullmatch(r"[A-Za-z_][\w./@+-]*", text, re.ASCII) and yaml.safe_load(text) == text
    return text if is_plain else json.dumps(text, ensure_ascii=False)


def _plan(
    recipe: Recipe,
    method: Method,
    references: list[str],
    sources: list[Source],
    memory_bytes: int,
    threads: int | None,
    max_shard_bytes: int,
    single_file: str | None,
) -> Plan:
    values = values_of(recipe, method)
    donor = references.index(recipe.base_model) if recipe.base_model else 0
    models = [references.index(e.reference) for e in values]
    base = references.index(recipe.base_model) if method.space == "delta" and recipe.base_model else None
    needed = list(dict.fromkeys([*([base] if base is not None else []), *models]))
    merge = method.bind(option_values(recipe, method, values), len(values))
    aligned = align(sources, needed, donor, recipe.missing)
    jobs = _jobs(recipe, sources, donor, models, base, merge, aligned)
    dropped = tuple(Dropped(m, n, sources[m].tensors[n].byte_size, why) for m, n, why in aligned.dropped)
    unused = [r for i, r in enumerate(references) if i not in needed]
    notes = [*recipe.notes, *(note for s in sources for note in getattr(s, "notes", ())), *aligned.notes]
    notes += [f"{r} is not merged by {method.name}; the output has its config, tokenizer and side files." for r in unused]
    notes += _same_places(sources)
    dtypes = {j.dtype for j in jobs if j.dtype in MERGEABLE}
    tensors = sum(len(s.tensors) for s in sources)
    commits = {r: commit for r, s in zip(references, sources, strict=True) if (commit := _commit(s)) is not None}
    return Plan(
        pinned(recipe, commits) if commits else recipe,
        tuple(sources),
        donor,
        tuple(jobs),
        dropped,
        tuple(notes),
        cut([(j.name, j.dtype, j.shape) for j in jobs], max_shard_bytes, single_file),
        dtypes.pop() if len(dtypes) == 1 else None,
        fit(jobs, memory_bytes, threads or os.cpu_count() or 1, tensors, sources),
    )


def _commit(source: Source) -> str | None:
    """How a recipe names a model of the hub at its commit; None for one that is not from there."""
    if isinstance(source, AdaptedModel):
        parts = [_commit(source.base), _commit(source.adapter)]
        return f"{parts[0] or source.base.label}+{parts[1] or source.adapter.label}" if any(parts) else None
    return f"{source.origin.name}@{source.origin.commit}" if source.origin is not None else None


def _same_places(sources: list[Source]) -> list[str]:
    """Notes on models that are one under two names: a recipe tells its base by its name."""
    seen: dict[str, str] = {}
    notes = []
    for source in sources:
        location = getattr(source, "location", None)
        if location is None:
            continue
        first = seen.setdefault(os.path.realpath(location), source.label)
        if first != source.label:
            notes.append(f"{first} and {source.label} are one model, taken as two. Write its path in one way if that is not meant.")
    return notes


def _jobs(
    recipe: Recipe, sources: list[Source], donor: int, models: list[int], base: int | None, merge: Merge, aligned: Alignment
) -> list[Job]:
    """The jobs in the order of the donor's tensors, then of the others'."""
    jobs: dict[str, Job] = {}
    for name in aligned.merged:
        jobs[name] = _merged(recipe, sources, models, base, merge, name)
    for name in aligned.buffers:
        needed = list(dict.fromkeys([*([base] if base is not None else []), *models]))
        inputs = tuple(_input(sources, m, name) for m in needed)
        kind: Kind = "equal" if len(inputs) > 1 else "copy"
        why = f"{inputs[0].dtype}, must be equal in all models" if kind == "equal" else ""
        jobs[name] = _job(kind, name, inputs[0].dtype, sources[needed[0]].tensors[name], inputs, why=why)
    for name, origin, why in aligned.from_one:
        jobs[name] = _copied(recipe, sources, origin, name, why)
    order = dict.fromkeys(n for s in (sources[donor], *sources) for n in s.tensors if n in jobs)
    return [jobs[name] for name in order]


def _merged(recipe: Recipe, sources: list[Source], models: list[int], base: int | None, merge: Merge, name: str) -> Job:
    if merge.copies is not None:
        origin = base if merge.copies == "base" else models[merge.copies]
        assert origin is not None
        return _copied(recipe, sources, origin, name, f"the recipe leaves {sources[origin].label} as it is")
    inputs = tuple(_input(sources, m, name) for m in models)
    of_base = _input(sources, base, name) if base is not None else None
    dtype = recipe.dtype or promote([sources[m].tensors[name].nominal for m in ([*models, base] if base is not None else models)])
    return _job("mix", name, dtype, sources[models[0]].tensors[name], inputs, of_base, merge)


def _copied(recipe: Recipe, sources: list[Source], origin: int, name: str, why: str) -> Job:
    tensor = sources[origin].tensors[name]
    source = _input(sources, origin, name)
    dtype = recipe.dtype or tensor.nominal
    if tensor.dtype in MERGEABLE and tensor.dtype != dtype:
        identity = combine((1.0,), fixes_equal_inputs=True)
        return _job("mix", name, dtype, tensor, (source,), None, identity, f"{why}, as {dtype}")
    return _job("copy", name, tensor.dtype, tensor, (source,), why=why)


def _job(
    kind: Kind,
    name: str,
    dtype: str,
    tensor: Tensor,
    inputs: tuple[Input, ...],
    base: Input | None = None,
    merge: Merge | None = None,
    why: str = "",
) -> Job:
    size = tensor.byte_size if kind != "mix" else tensor.elements * DTYPES[dtype].bytes
    return Job(kind, name, dtype, tensor.shape, tensor.elements, size, inputs, base, merge, why)


def _input(sources: list[Source], model: int, name: str) -> Input:
    tensor = sources[model].tensors[name]
    return Input(model, name, tensor.dtype, tensor.byte_size)
