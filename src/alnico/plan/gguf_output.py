"""Plans an output that is one GGUF file: the types of its tensors, its keys, and where each tensor stands."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alnico.checkpoint.gguf.gguf_layout import BLOCK, GgufLayout
from alnico.checkpoint.gguf.output_file import WrittenTensor, lay_out
from alnico.checkpoint.gguf.written_keys import (
    FILE_TYPES,
    GgufPlace,
    config_keys,
    place_of,
    written_family,
)
from alnico.checkpoint.shards import OutputShard
from alnico.checkpoint.sidecars import copy_side_files
from alnico.checkpoint.source import Source, Tensor
from alnico.checkpoint.weight_files import GGUF_ENDING, is_gguf_file
from alnico.errors import MismatchError, ModelError, RecipeError
from alnico.folders import temporary_files
from alnico.numerics.dtypes import DTYPES, Q8_0
from alnico.plan.job import Job
from alnico.recipe.schema import Recipe
from alnico.vocabulary.chat_template import template_of
from alnico.vocabulary.gguf_vocabulary import gguf_vocabulary
from alnico.vocabulary.tokenizer import read_tokenizer

QUANTISATION_VERSION = 2
"""Of the blocks, as ggml counts them."""
EMBEDDING = "token_embd.weight"


def check_type(recipe: Recipe, single_file: str | None) -> None:
    """Refuse a dtype that only GGUF files have, or that they do not have. Errors: RecipeError."""
    if is_gguf_file(single_file):
        if recipe.dtype == "F64":
            raise RecipeError(
                "dtype is float64; a GGUF file has float32, float16, bfloat16 or q8_0. Write one of these, or another output."
            )
    elif recipe.dtype == Q8_0:
        raise RecipeError(
            "dtype is q8_0, which only GGUF files have; expected an output of one file whose name ends in .gguf. Write OUT.gguf, or another "
            "dtype."
        )


def computed_dtype(recipe: Recipe, tensor: Tensor) -> str | None:
    """Return the dtype in which a tensor of a GGUF file is computed: vectors are F32, and so is what becomes blocks of Q8_0. None for a
    matrix whose dtype the models decide.

    Rows that are not whole blocks become F16, as llama.cpp writes them.
    """
    if is_vector(tensor.shape):
        return "F32"
    if recipe.dtype == Q8_0:
        return "F32" if tensor.shape[-1] % BLOCK == 0 else "F16"
    return recipe.dtype


def is_vector(shape: tuple[int, ...]) -> bool:
    """Is a tensor a vector, which GGUF has as F32? A matrix of one row, such as the gate of a shared expert, is one."""
    return len(shape) < 2 or shape[0] == 1


def gguf_shard(
    recipe: Recipe,
    jobs: Sequence[Job],
    donor: Source,
    config: Mapping[str, Any],
    files: Mapping[str, bytes],
    left: frozenset[str],
    single_file: str,
) -> OutputShard:
    """Lay out the file. Errors: ModelError for a family, tensors or a tokenizer that are not written; MismatchError for experts of which
    some are missing."""
    if donor.directory is None:
        raise ModelError(
            f"{donor.label}: has no folder, and so neither config nor tokenizer; expected both for the GGUF file. Write another output, or give "
            "the folder of the model."
        )
    family = written_family(config, donor.label)
    keys, constants = config_keys(config, family, donor.label)
    groups: dict[str, list[tuple[GgufPlace, Job]]] = {}
    for job in jobs:
        place = place_of(job.name, family, config, donor.label)
        groups.setdefault(place.name, []).append((place, job))
    tensors: list[WrittenTensor] = []
    parts = []
    for name, group in groups.items():
        inside = _in_order(group)
        first, experts = inside[0], keys.get(f"{family.architecture}.expert_count")
        if group[0][0].expert is not None and len(inside) != experts:
            raise ModelError(
                f"{donor.label}: {first.name} is one of {len(inside)} experts, config.json has {experts}; expected one number. Check the model."
            )
        if first.dtype not in FILE_TYPES:
            raise ModelError(
                f"{donor.label}: {first.name} is {first.dtype}; a GGUF file has F32, F16 or BF16. Name a dtype in the recipe, or write another "
                "output."
            )
        is_encoded = recipe.dtype == Q8_0 and first.dtype == "F32" and not is_vector(first.shape)
        shape = first.shape if group[0][0].expert is None else (len(inside), *first.shape)
        if name.endswith("ffn_gate_inp_shexp.weight"):
            shape = shape[-1:]  # without its only row
        tensors.append((name, Q8_0 if is_encoded else first.dtype, shape))
        heads, height = group[0][0].heads, (*first.shape, 0)[0]
        if heads is not None and (not heads or not height or height % (2 * heads)):
            raise ModelError(
                f"{donor.label}: {first.name} has {height} rows, config.json {heads} heads; expected an even number of rows for "
                "each. Check the model."
            )
        parts.append(
            [
                (job.name, job.dtype, GgufLayout(job.shape, DTYPES[job.dtype].bytes, is_encoded, heads or 0))
                for job in inside
            ]
        )
    kind = recipe.dtype or max((t[1] for t in tensors), key=[t[1] for t in tensors if len(t[2]) > 1].count)
    head: dict[str, Any] = {
        "general.architecture": family.architecture,
        "general.type": "model",
        "general.name": single_file.removesuffix(GGUF_ENDING).encode("utf-8", "replace").decode(),
        "general.file_type": FILE_TYPES[kind],
        **({"general.quantization_version": QUANTISATION_VERSION} if kind == Q8_0 else {}),
    }
    rows = keys[f"{family.architecture}.vocab_size"]
    embedding = next((shape for name, _, shape in tensors if name == EMBEDDING), (0,))
    if embedding[0] != rows:
        raise ModelError(
            f"{donor.label}: config.json has the vocab_size {rows}, the embedding {embedding[0]} rows; expected one number. Check the model."
        )
    vocabulary = _vocabulary(donor.label, donor.directory, files, left, rows)
    return lay_out(single_file, head | keys | vocabulary, tensors, constants, parts)


def _in_order(group: Sequence[tuple[GgufPlace, Job]]) -> list[Job]:
    """The tensors of a stack of experts in their order. Errors: MismatchError for one that is missing, or of another shape or dtype."""
    if group[0][0].expert is None:
        return [job for _, job in group]
    ordered = sorted(group, key=lambda entry: entry[0].expert or 0)
    first = ordered[0][1]
    for number, (place, job) in enumerate(ordered):
        if place.expert != number or (job.shape, job.dtype) != (first.shape, first.dtype):
            raise MismatchError(
                f"{job.name}: is {job.dtype} {job.shape}, expert {place.expert} of {len(ordered)}; expected experts from 0 on, all "
                f"{first.dtype} {first.shape}: GGUF stacks them. Merge all experts alike."
            )
    return [job for _, job in ordered]


def _vocabulary(
    label: str, folder: Path, files: Mapping[str, bytes], left: frozenset[str], rows: int
) -> dict[str, Any]:
    """The keys of the output's tokenizer: that of the donor's folder, or of the plan's ``files``. Errors: ModelError."""
    if not files:
        return _keys_of_folder(label, folder, rows)
    with temporary_files(), tempfile.TemporaryDirectory(prefix="alnico-") as made:
        copy_side_files(folder, Path(made), left | set(files))
        for name, data in files.items():
            (Path(made) / name).write_bytes(data)
        return _keys_of_folder(label, Path(made), rows)


def _keys_of_folder(label: str, folder: Path, rows: int) -> dict[str, Any]:
    """The keys of the tokenizer in a folder. Errors: ModelError."""
    tokenizer = read_tokenizer(folder)
    if tokenizer is None:
        raise ModelError(
            f"{label}: has no tokenizer that can be read; expected a tokenizer.json for the GGUF file. Write another output."
        )
    return gguf_vocabulary(tokenizer, rows, template_of(folder), label)
