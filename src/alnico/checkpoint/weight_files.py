"""Finds the files of a folder that hold a model's weights, by its index or by their usual names."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath

from alnico.checkpoint.file_kinds import kind_by_name
from alnico.checkpoint.files import MAX_ENTRIES, check_inside
from alnico.checkpoint.json_files import read_json
from alnico.checkpoint.reference import PICKLES
from alnico.checkpoint.source import Source
from alnico.checkpoint.training.recognise import training_folder
from alnico.errors import ModelError

STEM = "model"


DIFFUSERS_STEM = "diffusion_pytorch_model"
"""First part of the names of weight files, as transformers and as diffusers write them."""


INDEX = f"{STEM}.safetensors.index.json"


INDICES = (INDEX, f"{DIFFUSERS_STEM}.safetensors.index.json")


PICKLE_INDEX = "pytorch_model.bin.index.json"


PICKLE_INDICES = (PICKLE_INDEX, f"{DIFFUSERS_STEM}.bin.index.json")


SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.safetensors|\.bin)")


GGUF_ENDING = ".gguf"


GGUF_SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
"""The name of a file of a GGUF model that was split."""


NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state.*)\.(bin|pt|pth)")
"""Files that trainers write next to the weights."""


UNFINISHED = (".incomplete", ".part", ".crdownload", ".aria2", ".tmp")
"""Endings that downloaders give a file until it is complete."""

SHOWN = 3
"""Most folders that a message names."""
MAX_SEARCHED = 1000
"""Most entries of a folder among which a message looks for models."""


def _shard_paths(directory: Path, has_modules: bool) -> list[Path]:
    names = [p.name for p in directory.iterdir() if not p.is_dir()]
    if has_modules and not holds_weights(names):
        return []
    weights = shard_names(str(directory), names, directory, lambda name: (directory / name).is_file())
    for name in weights:
        check_inside(directory / name, directory)
    return [directory / name for name in weights]


def gguf_path(label: str, location: Path) -> Path | None:
    """Return the file of a GGUF model: one whose name says so, or the only one of a folder without other weights; None for all else.

    Errors: ModelError for a folder of several.
    """
    if not location.is_dir():
        return location if location.suffix == GGUF_ENDING and location.is_file() else None
    with os.scandir(location) as entries:
        names = [entry.name for entry in itertools.islice(entries, MAX_ENTRIES) if not entry.is_dir()]
    found = gguf_files(names)
    if len(found) > 1:
        raise ModelError(
            f"{label}: has {len(found)} GGUF models ({', '.join(found[:SHOWN])}); expected one. Give the path of the file to use."
        )
    if not found:
        return None
    check_inside(location / found[0], location)
    return location / found[0]


def is_gguf_file(single_file: str | None) -> bool:
    """Is the output one GGUF file?"""
    return single_file is not None and single_file.endswith(GGUF_ENDING)


def holds_weights(names: Iterable[str]) -> bool:
    """Do some of the names belong to weight files of a format that can be read?"""
    return any(
        n.endswith((".safetensors", *PICKLES)) and not NO_WEIGHTS.fullmatch(n) and not n.startswith(".")
        for n in names
    )


def gguf_files(names: Iterable[str]) -> list[str]:
    """Return the names of GGUF models among the files of a folder, of a split one its first file alone; none if the folder holds weights
    of another format. Files of vision towers (`mmproj`) are no models.

    >>> gguf_files(["a-00002-of-00002.gguf", "a-00001-of-00002.gguf", "mmproj-a.gguf", "README.md"])
    ['a-00001-of-00002.gguf']
    """
    names = list(names)
    found = [
        n for n in names if n.endswith(GGUF_ENDING) and not n.startswith(".") and "mmproj" not in n.lower()
    ]
    if not found or holds_weights(names):
        return []
    return sorted(n for n in found if (match := GGUF_SPLIT.fullmatch(n)) is None or int(match["number"]) == 1)


def shard_names(where: str, names: Collection[str], folder: Path, exists: Callable[[str], bool]) -> list[str]:
    """Return the names of a model's weight files: those of the index, if it has one.

    Hidden files are ignored: macOS writes ``._model.safetensors`` to foreign disks, and no loader reads them.
    Errors: ModelError.
    """
    names = [name for name in names if not name.startswith(".")]
    if index := next((i for i in INDICES if i in names), None):
        return _indexed_names(folder / index, exists)
    usual = [f"{stem}.safetensors" for stem in (STEM, DIFFUSERS_STEM)]
    weights = _weights_among(where, [n for n in names if n.endswith(".safetensors")], usual)
    if weights:
        return weights
    if "adapter_config.json" in names:
        raise ModelError(
            f"{where}: is a LoRA adapter, expected a whole model. Name it together with its base: "
            f"BASE+{where}."
        )
    if index := next((i for i in PICKLE_INDICES if i in names), None):
        return _indexed_names(folder / index, exists)
    pickles = [n for n in names if n.endswith(PICKLES) and not NO_WEIGHTS.fullmatch(n)]
    weights = _weights_among(where, pickles, ["pytorch_model.bin", f"{DIFFUSERS_STEM}.bin"])
    if not weights and "model_index.json" in names:
        raise ModelError(
            f"{where}: model_index.json lists no part of a pipeline that has weights; expected some (unet, transformer, vae, "
            "text_encoder). Complete the download."
        )
    if not weights:
        raise ModelError(
            f"{where}: has no .safetensors or .bin file, expected a model. {_what_is_there(names, folder)}"
        )
    if len(weights) > 1 and not SHARD_NAME.fullmatch(weights[0]):
        raise ModelError(
            f"{where}: has {len(weights)} checkpoints ({', '.join(weights[:3])}), expected one, or shards "
            "with an index. Give the path of the file to merge."
        )
    return weights


def _what_is_there(names: Collection[str], folder: Path) -> str:
    """Say what a folder without weights holds instead, and what to do."""
    if (unread := kind_by_name(names)) is not None:
        return f"It has {unread[0]}, {unread[1].name}. {unread[1].advice}"
    if unfinished := sorted(n for n in names if n.endswith(UNFINISHED)):
        return f"It has {unfinished[0]}, an unfinished download. Complete the download."
    below = _models_below(folder)
    if below:
        shown = ", ".join(below[:SHOWN]) + (f" and {len(below) - SHOWN} more" if len(below) > SHOWN else "")
        return (
            f"Models are in its {'folder' if len(below) == 1 else 'folders'} {shown}: give the path of one."
        )
    if "config.json" in names:
        return "It has config.json, but the weights are not there. Complete the download."
    return "Check the path." if names else "It has no files. Check the path."


def _models_below(folder: Path) -> list[str]:
    """Return the folders in a folder that hold weights: a trainer's checkpoints, snapshots of the hub's cache."""
    found = []
    with suppress(OSError):
        for inner in _entries(folder):
            inside = _entries(inner) if inner.name == "snapshots" and inner.is_dir() else [inner]
            found += [
                path.relative_to(folder).as_posix()
                for path in inside
                if path.is_dir()
                and (holds_weights(p.name for p in _entries(path)) or training_folder(path) is not None)
            ]
    return found


def _entries(folder: Path) -> list[Path]:
    return sorted(itertools.islice(folder.iterdir(), MAX_SEARCHED))


def _weights_among(where: str, names: Collection[str], usual: Sequence[str]) -> list[str]:
    """Return the weight files among files of one format; an empty list if there are none."""
    weights = sorted(n for n in names if not n.startswith("adapter_"))
    if whole := next((name for name in usual if name in weights), None):
        return [whole]
    numbered = {name: match for name in weights if (match := SHARD_NAME.fullmatch(name))}
    return _complete_set(where, numbered) if numbered else weights


def _complete_set(where: str, numbered: dict[str, re.Match[str]]) -> list[str]:
    first = next(iter(numbered.values()))
    stem, count, suffix = first["stem"], max(1, int(first["count"])), first["suffix"]
    expected = [f"{stem}-{i:05d}-of-{count:05d}{suffix}" for i in range(1, count + 1)]
    missing = [name for name in expected if name not in numbered]
    surplus = [name for name in numbered if name not in expected]
    if missing or surplus:
        problem = f"{missing[0]} is missing" if missing else f"has {surplus[0]} next to {expected[0]}"
        raise ModelError(
            f"{where}: {problem}; expected the {count} shards of one model, or an index ({INDEX}). "
            "Complete the download."
        )
    return expected


def _indexed_names(index: Path, exists: Callable[[str], bool]) -> list[str]:
    weight_map = read_json(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(v, str) for v in weight_map.values())
    ):
        raise ModelError(
            f"{index}: has no weight_map from tensor names to files. Get the index from the model's source."
        )
    names = sorted(set(weight_map.values()))
    for name in names:
        if not is_inside(name):
            tensor = next(tensor for tensor, file in weight_map.items() if file == name)
            raise ModelError(
                f"{index}: places tensor {tensor!r} in {name!r}, outside the model's directory; "
                "expected a file inside it. Do not use this model: its index is hostile or damaged."
            )
    if (unlisted := _unlisted_shard(names, exists)) is not None:
        raise ModelError(
            f"{index}: does not list {unlisted}, which is in the same folder and is one of the shards of "
            f"{names[0]}; expected all of them. The index and the shards come from different downloads: "
            "download the model again, or remove the file that is not part of the model."
        )
    for name in names:
        if not exists(name):
            raise ModelError(
                f"{index}: lists {PurePosixPath(name).name}, which does not exist. Complete the download."
            )
    return names


def _unlisted_shard(names: Sequence[str], exists: Callable[[str], bool]) -> str | None:
    """Return a shard that exists but is missing from an index that lists others of its set."""
    for stem, count, suffix in dict.fromkeys(
        (m["stem"], m["count"], m["suffix"]) for n in names if (m := SHARD_NAME.fullmatch(n))
    ):
        expected = (f"{stem}-{i:05d}-of-{count}{suffix}" for i in range(1, int(count) + 1))
        unlisted = next((name for name in expected if name not in names and exists(name)), None)
        if unlisted is not None:
            return unlisted
    return None


def is_inside(name: str) -> bool:
    """Does a relative name stay inside the folder it is relative to?"""
    path = PurePosixPath(name)
    return bool(path.parts) and not (path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name)


def stem_of(source: Source) -> str:
    """Return the first part of the names of a model's weight files.

    This is diffusers' if the config names diffusers, or if there is no config and the files have that name;
    otherwise transformers'.
    """
    if source.config:
        return DIFFUSERS_STEM if "_diffusers_version" in source.config else STEM
    return DIFFUSERS_STEM if any(path.name.startswith(DIFFUSERS_STEM) for path in source.paths()) else STEM
