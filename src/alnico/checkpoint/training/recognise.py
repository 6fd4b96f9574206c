"""Recognises the folders and files in which trainers keep a model, by the names in them."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

from alnico.checkpoint.files import read_small
from alnico.errors import ModelError

METADATA = ".metadata"
"""The index of a distributed checkpoint of torch."""
RANK_METADATA = re.compile(r"__\d{1,6}\.metadata")
RANK_FILE = re.compile(r"model_world_size_(?P<ranks>\d{1,6})_rank_(?P<rank>\d{1,6})\.pt")
"""One rank's part of a model, as FSDP trainers save it without torch's distributed checkpoints."""
PARTITION = re.compile(
    r"(bf16_)?zero_pp_rank_(?P<rank>\d{1,6})_mp_rank_(?P<model_rank>\d{1,4})_optim_states\.pt"
)
"""One rank's partition of the optimizer of DeepSpeed."""
MODEL_STATES = re.compile(r"(zero_pp_rank_\d{1,6}_)?mp_rank_\d{1,4}_model_states\.pt")
"""What DeepSpeed saves of a model beside its optimizer."""
UNIVERSAL_FOLDER = "zero"
"""The folder of a universal checkpoint of DeepSpeed that has one for each parameter."""
STORAGE_SHARD = re.compile(r"shard-(?P<shard>\d{5})-model-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
"""One rank's safetensors file, as torch's HuggingFaceStorageWriter names it."""
STORAGE_FOLDER = "sharded"
"""The folder in which it keeps them until they are consolidated."""
LOCAL_FILE = re.compile(r"pytorch_model_fsdp(_\d{1,3})?_rank\d{1,6}\.bin")
"""The flat parameters of one rank of FSDP (LOCAL_STATE_DICT), as Accelerate saves them."""
FSDP_FOLDER = re.compile(r"pytorch_model_fsdp_\d{1,3}")
"""The folder in a checkpoint of Accelerate that holds the model's shards."""
LATEST = ("latest", "latest_universal")
"""The files in which DeepSpeed names the folder of its newest step, and of its newest universal checkpoint."""
LATEST_NAME = re.compile(r"(?!\.)[\w.-]{1,200}")
MAX_LATEST_BYTES = 1_000

ORDINARY = re.compile(
    r"(?!adapter_|\.|shard-\d{5}-model-\d{5}-of-).*\.safetensors|pytorch_model(?!_fsdp(_\d{1,3})?_rank\d).*\.bin|.*\.safetensors\.index\.json"
)
"""Files of a model that is read as such, whatever lies next to it."""
MAX_ENTRIES = 100_000
"""Most names of a folder that are looked at."""

Kind = Literal["distributed", "ranks", "partitions", "universal", "storage", "local"]


class TrainingFolder(NamedTuple):
    """How the weights in a folder are stored, and which folder holds them."""

    kind: Kind
    folder: Path


def training_folder(folder: Path) -> TrainingFolder | None:
    """Recognise a trainer's checkpoint; None for any other folder. Reads names, and DeepSpeed's file ``latest``.

    The weights are in the folder itself, or in the one inside that Accelerate or DeepSpeed made for them.
    """
    names = _names(folder)
    if any(ORDINARY.fullmatch(name) for name in names):
        return None
    if (kind := _kind_of(names)) is not None:
        return TrainingFolder(kind, folder)
    inside = [name for name in sorted(names) if FSDP_FOLDER.fullmatch(name) or name == STORAGE_FOLDER]
    latest = [name for file in LATEST if file in names and (name := _latest(folder / file)) in names]
    for name in latest or (inside if len(inside) == 1 else []):
        if (kind := _kind_of(_names(folder / name))) is not None:
            return TrainingFolder(kind, folder / name)
    return None


def is_rank_file(name: str) -> bool:
    """Is a file, by its name, what one rank of many saved?"""
    return name.endswith(".distcp") or any(
        p.fullmatch(name) for p in (RANK_FILE, PARTITION, RANK_METADATA, STORAGE_SHARD)
    )


def _latest(path: Path) -> str:
    """The folder that DeepSpeed's file names; an empty text where it names none."""
    with suppress(ModelError, UnicodeDecodeError):
        text = read_small(path, MAX_LATEST_BYTES, "the name of a folder").decode("ascii").strip()
        return text if LATEST_NAME.fullmatch(text) else ""
    return ""


def _kind_of(names: Collection[str]) -> Kind | None:
    if METADATA in names or any(RANK_METADATA.fullmatch(name) for name in names):
        return "distributed"
    if any(RANK_FILE.fullmatch(name) for name in names):
        return "ranks"
    if any(PARTITION.fullmatch(name) for name in names):
        return "partitions"
    if UNIVERSAL_FOLDER in names and any(MODEL_STATES.fullmatch(name) for name in names):
        return "universal"
    if any(STORAGE_SHARD.fullmatch(name) for name in names):
        return "storage"
    return "local" if any(LOCAL_FILE.fullmatch(name) for name in names) else None


def _names(folder: Path) -> set[str]:
    """The names in a folder; none where it cannot be listed."""
    with suppress(OSError, ValueError), os.scandir(folder) as entries:
        return {entry.name for entry in itertools.islice(entries, MAX_ENTRIES)}
    return set()
