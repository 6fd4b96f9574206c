"""Writes recipe and inputs into the metadata of an output of one file, which has no lock beside it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from alnico.checkpoint.header import build
from alnico.checkpoint.lineage import lineage_of
from alnico.checkpoint.remote.open_folder import is_url
from alnico.checkpoint.source import Source, unwrap
from alnico.checkpoint.weight_files import is_gguf_file
from alnico.folders import Folder, open_to_write
from alnico.output.card import common_licence, public_names, public_recipe
from alnico.output.journal import Record
from alnico.plan.job import Plan

RECIPE_KEY = "alnico.recipe"
INPUTS_KEY = "alnico.inputs"
"""Keys of the recipe, as text, and of the models that were read: a JSON list of names and hashes."""

MODELSPEC = "modelspec."
"""The beginning of the keys of ModelSpec, by which programs for image models know architecture and resolution."""

LICENCE_KEYS = {
    "general.license": "license",
    "general.license.name": "license_name",
    "general.license.link": "license_link",
}
"""Keys of GGUF for a licence, and those of a model card."""

HUB = "https://huggingface.co"

OF_ONE_MODEL = frozenset(
    MODELSPEC + key for key in ("title", "date", "hash_sha256", "thumbnail", "description", "merged_from")
)
"""Keys of ModelSpec that are true of one file only."""


def with_metadata(plan: Plan, *, has_hashes: bool) -> Plan:
    """Give the only file of an output its metadata: the recipe, the models, and the keys of ModelSpec in which they agree; those of
    GGUF in a GGUF file.

    The hashes of the models are known when all tensors have been read; until then the file holds others of the same length. Without
    ``has_hashes`` the models are listed without them.
    """
    (shard,) = plan.shards
    models = {i: plan.sources[i] for i in _models(plan)}
    names = dict(zip(models, public_names(list(models.values())), strict=True))
    inputs = [
        {"model": name} | ({"hash": _placeholder(i, name)} if has_hashes else {}) for i, name in names.items()
    ]
    own = {INPUTS_KEY: json.dumps(inputs, ensure_ascii=False), RECIPE_KEY: public_recipe(plan)}
    if is_gguf_file(shard.name):
        from alnico.checkpoint.gguf.output_file import with_keys  # with the writer

        keys = {**_general(list(models.values()), list(names.values())), **own}
        return dataclasses.replace(plan, shards=(with_keys(shard, keys, own),))
    metadata = {
        **shard.header.metadata,
        **_modelspec(list(models.values()), list(names.values())),
        **own,
    }
    tensors = [(t.name, t.dtype, t.shape) for t in shard.header.tensors]
    start, header = build(tensors, metadata)
    return dataclasses.replace(plan, shards=(dataclasses.replace(shard, start=start, header=header),))


def write_hashes(path: Path, plan: Plan, records: Mapping[str, Record], inside: Folder) -> None:
    """Replace the placeholders in the file of an output by the hashes of the models. Errors: OSError.

    The hash of a model is the xxh3-128 of lines with the name and the hash of each tensor that was read, sorted by name.
    """
    (shard,) = plan.shards
    read: dict[int, dict[str, str]] = {}
    for record in records.values():
        for model, name, digest in record.inputs:
            read.setdefault(model, {})[name] = digest
    start = shard.start
    entries = json.loads(shard.header.metadata.get(INPUTS_KEY, "[]"))
    for entry, model in zip(entries, _models(plan) if entries else (), strict=True):
        if "hash" in entry:
            lines = "".join(f"{name} {digest}\n" for name, digest in sorted(read.get(model, {}).items()))
            start = start.replace(entry["hash"].encode(), xxhash.xxh3_128_hexdigest(lines.encode()).encode())
    if start == shard.start:
        return
    descriptor = open_to_write(path, inside, flags=0)
    try:
        os.pwrite(descriptor, start, 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _models(plan: Plan) -> list[int]:
    """The numbers of the models that are read, without statistics."""
    read = {tensor.model for job in plan.jobs for tensor in job.read}
    return [i for i in sorted(read) if plan.sources[i] not in plan.statistics]


def _placeholder(place: int, name: str) -> str:
    return xxhash.xxh3_128_hexdigest(f"{place} {name}".encode())


def _modelspec(models: list[Source], names: list[str]) -> dict[str, str]:
    """The keys of ModelSpec that all models have with one value, and what the output is merged from."""
    stated = [_metadata(model) for model in models]
    common = {
        key: value
        for key, value in stated[0].items()
        if key.startswith(MODELSPEC) and key not in OF_ONE_MODEL and all(s.get(key) == value for s in stated)
    }
    return common | ({f"{MODELSPEC}merged_from": ", ".join(names)} if common else {})


def _general(models: Sequence[Source], names: Sequence[str]) -> dict[str, Any]:
    """The keys by which GGUF names the models that a file is made of, and the licence on which they agree."""
    licence = common_licence([lineage_of(model) for model in models])
    keys: dict[str, Any] = {
        **{key: licence[card] for key, card in LICENCE_KEYS.items() if isinstance(licence.get(card), str)},
        "general.tags": ["merge", "alnico"],
        "general.base_model.count": len(models),
    }
    for i, (model, name) in enumerate(zip(models, names, strict=True)):
        at = f"general.base_model.{i}"
        origin = unwrap(model).origin
        keys[f"{at}.name"] = name if origin is None else name.rpartition("/")[2]
        if origin is not None:
            keys |= {
                f"{at}.version": origin.commit,
                f"{at}.organization": origin.name.partition("/")[0],
                f"{at}.repo_url": f"{HUB}/{origin.name}",
            }
        elif is_url(name):
            keys[f"{at}.url"] = name
    return keys


def _metadata(model: Source) -> Mapping[str, str]:
    """The metadata of a model's first file; empty for models in memory."""
    shards = getattr(unwrap(model), "shards", ())
    return shards[0].header.metadata if shards else {}
