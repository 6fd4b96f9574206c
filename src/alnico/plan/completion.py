"""Completes an output by what its models lack and another has: tensors, keys of the config, side files."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from alnico.checkpoint.files import check_inside, read_small
from alnico.checkpoint.sidecars import READ_WHILE_PLANNING, check_carried, side_files
from alnico.checkpoint.source import Source
from alnico.checkpoint.tied_weights import tied_copies
from alnico.errors import MismatchError
from alnico.plan import families
from alnico.plan.compatibility import differing_kinds
from alnico.plan.job import Job

MAX_FILE_BYTES = 1 << 28
"""Most bytes of a side file that is added."""

TOKENIZER_FILE = re.compile(
    r"(tokenizer|vocab|merges|added_tokens|special_tokens|chat_template|additional_chat_templates"
    r"|sentencepiece|spiece|tekken|bpe).*|.*\.(model|spm|tiktoken|vocab|bpe)"
)
"""Matches the files of a tokenizer. They belong together, so a model that has some gets none of another model's."""

OF_TOWERS = (*families.TOWERS, "video")
"""Words that keys of the config about images and sound begin with."""


@dataclass(frozen=True)
class Completion:
    """What a model that completes an output adds to it: to the config, and side files."""

    config: Mapping[str, Any]
    files: Mapping[str, bytes]
    """Side files to write."""
    left: frozenset[str]
    """Side files of the donor that are not copied."""
    notes: tuple[str, ...]
    adds: bool
    """Is anything added at all?"""


def gives_config(models: Sequence[Source], completing: Source) -> bool:
    """Must the config come from the model that completes the others? It must if they are of another type, that of a part
    of it, such as the text decoder of a vision-language model."""
    return bool(models and differing_kinds([models[0], completing]))


def check_completion(models: Sequence[Source], completing: Source) -> None:
    """Check that every tensor of ``models`` is one of the model that completes them, with the same shape.

    A head of its own is allowed where the completing model ties it. Errors: MismatchError.
    """
    has = completing.tensors
    tied = tied_copies(completing.config, has)
    for model in models:
        named = [n for n in model.tensors if n.endswith(tuple(families.TIED))]
        heads = {*tied, *families.tied_heads(completing.config, has, named)}
        others = [name for name in model.tensors if name not in has and name not in heads]
        if others:
            shape = model.tensors[others[0]].shape
            alike = [n for n, tensor in has.items() if n not in model.tensors and tensor.shape == shape]
            near = difflib.get_close_matches(others[0], alike, 1, 0.6)
            hint = f" It has {near[0]!r}." if near else ""
            raise MismatchError(
                f"{others[0]}: {model.label} has it, {completing.label} lacks it ({len(others)} such tensors); expected "
                f"only tensors of {completing.label}, which completes the output.{hint} Use the model that "
                f"{model.label} was tuned from."
            )
        for name, tensor in model.tensors.items():
            if name in has and has[name].shape != tensor.shape:
                raise MismatchError(
                    f"{name}: {model.label} is {tensor.shape}, {completing.label}, which completes the output, is "
                    f"{has[name].shape}; expected one shape. Use the model that {model.label} was tuned from."
                )


def plan_completion(
    own: Source | None,
    completing: Source,
    jobs: Sequence[Job],
    position: int,
    config: Mapping[str, Any],
    *,
    is_donor: bool,
) -> Completion:
    """Return what a model, at ``position`` of the sources, adds to an output besides tensors.

    ``own`` is the model whose side files the output has, and whose config it has unless ``is_donor``: then that of the
    completing model is the output's. It is None if all these are the completing model's anyway. ``config`` is the
    output's so far.
    """
    added = [job for job in jobs if {tensor.model for tensor in job.inputs} == {position}]
    notes = (
        [f"{completing.label} completes the output: {counted_groups([job.name for job in added])}."]
        if added
        else []
    )
    if own is None:
        return Completion(config, {}, frozenset(), tuple(notes), adds=bool(added))
    changed = dict(config)
    if is_donor:
        kinds = differing_kinds([own, completing])
        notes.append(
            f"config.json is that of {completing.label} (model_type {kinds[1]}), since {own.label} is a part of it "
            f"(model_type {kinds[0]})."
        )
    else:
        changed, keys = _completed_config(config, completing.config, [job.name for job in added])
        notes += [f"config.json: {key} comes from {completing.label}." for key in keys]
    files, left = _completed_files(own.directory, completing.directory, is_donor=is_donor)
    if files and not is_donor:
        notes.append(f"{completing.label} completes the output: {', '.join(files)}.")
    return Completion(changed, files, left, tuple(notes), adds=bool(added or files or is_donor))


def refuse_complete(model: Source, completing: Source) -> NoReturn:
    """Refuse to complete a model that lacks nothing. Errors: MismatchError."""
    raise MismatchError(
        f"{model.label}: has all {len(completing.tensors)} tensors and the side files of {completing.label}, so nothing "
        "is missing; expected a model that lacks some. Use it as it is."
    )


def _grouped(names: Collection[str]) -> dict[str, list[str]]:
    """Group tensors by what they belong to: the first words of their names.

    >>> {k: len(v) for k, v in _grouped(["mtp.fc.weight", "mtp.norm.weight", "model.visual.blocks.0.w"]).items()}
    {'mtp.*': 2, 'model.visual.*': 1}
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        words = name.split(".")
        depth = 2 if words[0] in ("model", "thinker", "backbone") and len(words) > 2 else 1
        depth += words[depth : depth + 1] != [] and words[depth].isdigit()
        groups.setdefault(".".join([*words[:depth], "*"]) if len(words) > depth else name, []).append(name)
    return groups


def counted_groups(names: Collection[str]) -> str:
    """Count tensors by what they belong to, for people.

    >>> counted_groups(["mtp.fc.weight", "mtp.norm.weight", "lm_head.weight"])
    '2 tensors mtp.*, 1 tensor lm_head.weight'
    """
    groups = _grouped(names)
    return ", ".join(
        f"{len(group)} tensors {start}" if len(group) > 1 else f"1 tensor {group[0]}"
        for start, group in groups.items()
    )


def _completed_config(
    config: Mapping[str, Any], other: Mapping[str, Any], added: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """Return a config with the keys of another that describe tensors that were added, and these keys."""
    changed = dict(config)
    keys: list[str] = []
    if not config:
        return changed, keys
    has_predictors = any(map(families.is_predictor, added))
    has_towers = any(families.is_tower(name) or families.is_vision(name) for name in added)
    numbered = any(re.search(r"\.\d+\.(eh_proj|enorm|hnorm|shared_head)\.", name) for name in added)
    for key, value in other.items():
        is_count = key in families.FURTHER_LAYERS and (has_predictors or numbered)
        if (is_count and value and not config.get(key)) or (
            has_towers and key.startswith(OF_TOWERS) and key not in config
        ):
            changed[key] = value
            keys.append(key)
        elif key in families.TEXT_CONFIGS and isinstance(value, Mapping):
            own = config.get(key)
            if isinstance(own, Mapping):
                changed[key], inner = _completed_config(own, value, added)
                keys += [f"{key}.{name}" for name in inner]
    if has_towers and "architectures" in other and other["architectures"] != config.get("architectures"):
        changed["architectures"] = other["architectures"]
        keys.append("architectures")
    return changed, keys


def _completed_files(
    own: Path | None, completing: Path | None, *, is_donor: bool
) -> tuple[dict[str, bytes], frozenset[str]]:
    """Return the side files to write beside those that are copied from the donor, and the donor's that are left out.

    ``is_donor``: the completing model is the donor, and the model's own files replace its files of these names.
    """
    if own is None or completing is None:
        return {}, frozenset()
    ours, others = _small_files(own), _small_files(completing)
    has_tokenizer = any(map(TOKENIZER_FILE.fullmatch, ours))
    lacking = [n for n in others if n not in ours and not (has_tokenizer and TOKENIZER_FILE.fullmatch(n))]
    if not is_donor:
        return _read(completing, lacking), frozenset()
    left = [name for name in others if name not in ours and name not in lacking]
    return _read(own, ours), frozenset(left)


def _small_files(folder: Path) -> list[str]:
    """Return the files of a model that are copied to outputs and are there while a merge is planned."""
    names = [path.as_posix() for path in side_files(folder)[0]]
    return [name for name in names if name.endswith(READ_WHILE_PLANNING) and "/" not in name]


def _read(folder: Path, names: Sequence[str]) -> dict[str, bytes]:
    check_carried(folder, [p.as_posix() for p in side_files(folder)[0] if p.as_posix() not in names])
    for name in names:
        check_inside(folder / name, folder)
    return {name: read_small(folder / name, MAX_FILE_BYTES, "a side file of a model") for name in names}
