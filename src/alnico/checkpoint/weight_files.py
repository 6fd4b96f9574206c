"""Which files of a folder hold a model's weights: those of its index, or those with the usual names."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path, PurePosixPath

from alnico.checkpoint.files import check_inside
from alnico.checkpoint.json_files import read_json
from alnico.checkpoint.reference import PICKLES
from alnico.checkpoint.source import Source
from alnico.errors import ModelError

STEM = "model"


DIFFUSERS_STEM = "diffusion_pytorch_model"
"""What the names of weights begin with, as transformers writes them, and diffusers."""


INDEX = f"{STEM}.safetensors.index.json"


INDICES = (INDEX, f"{DIFFUSERS_STEM}.safetensors.index.json")


PICKLE_INDEX = "pytorch_model.bin.index.json"


PICKLE_INDICES = (PICKLE_INDEX, f"{DIFFUSERS_STEM}.bin.index.json")


SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.safetensors|\.bin)")


NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state.*)\.(bin|pt|pth)")
"""What trainers leave beside the weights."""


def _shard_paths(directory: Path, has_modules: bool) -> list[Path]:
    names = [p.name for p in directory.iterdir() if not p.is_dir()]
    if has_modules and not holds_weights(names):
        return []
    found = shard_names(str(directory), names, directory, lambda name: (directory / name).is_file())
    for name in found:
        check_inside(directory / name, directory)
    return [directory / name for name in found]


def holds_weights(names: Iterable[str]) -> bool:
    """Are there files with weights, of the formats that are read, among some names?"""
    return any(
        n.endswith((".safetensors", *PICKLES)) and not NO_WEIGHTS.fullmatch(n) and not n.startswith(".")
        for n in names
    )


def shard_names(
    where: str, names: Collection[str], folder: Path, is_there: Callable[[str], bool]
) -> list[str]:
    """Tell which of a model's files hold its weights: those of the index, if it has one. Hidden files do not: macOS leaves
    ``._model.safetensors`` on other disks, and no loader reads them. Errors: ModelError."""
    names = [name for name in names if not name.startswith(".")]
    if index := next((i for i in INDICES if i in names), None):
        return _indexed_names(folder / index, is_there)
    usual = [f"{stem}.safetensors" for stem in (STEM, DIFFUSERS_STEM)]
    found = _weights_among(where, [n for n in names if n.endswith(".safetensors")], usual)
    if found:
        return found
    if "adapter_config.json" in names:
        raise ModelError(
            f"{where}: is a LoRA adapter, expected a whole model. Write it with its base, as BASE+{where}."
        )
    if index := next((i for i in PICKLE_INDICES if i in names), None):
        return _indexed_names(folder / index, is_there)
    pickles = [n for n in names if n.endswith(PICKLES) and not NO_WEIGHTS.fullmatch(n)]
    found = _weights_among(where, pickles, ["pytorch_model.bin", f"{DIFFUSERS_STEM}.bin"])
    if not found and "model_index.json" in names:
        raise ModelError(
            f"{where}: is a pipeline of diffusers, expected one of its parts. Merge its parts by themselves, each by its folder (unet, "
            "transformer, vae, text_encoder), and put the results into a copy of the pipeline."
        )
    if not found:
        raise ModelError(f"{where}: has no .safetensors or .bin file, expected a model. Check the path.")
    if len(found) > 1 and not SHARD_NAME.fullmatch(found[0]):
        raise ModelError(
            f"{where}: has {len(found)} checkpoints ({', '.join(found[:3])}), expected one, or shards with an index. "
            "Give the path of the file that is meant."
        )
    return found


def _weights_among(where: str, names: Collection[str], usual: Sequence[str]) -> list[str]:
    """The files that hold the weights, of files of one format; none if there are none."""
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
        what = f"misses {missing[0]}" if missing else f"has {surplus[0]} beside {expected[0]}"
        raise ModelError(
            f"{where}: {what}; expected the {count} shards of one model, or an index ({INDEX}). Complete the download."
        )
    return expected


def _indexed_names(index: Path, is_there: Callable[[str], bool]) -> list[str]:
    weight_map = read_json(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(v, str) for v in weight_map.values())
    ):
        raise ModelError(
            f"{index}: has no weight_map from tensor names to files. Get the index from the model's source."
        )
    for tensor, name in weight_map.items():
        if not is_inside(name):
            raise ModelError(
                f"{index}: tensor {tensor!r} is said to be in {name!r}, outside the model's directory; "
                "expected a file inside it. Do not use this model: its index is hostile or damaged."
            )
    names = sorted(set(weight_map.values()))
    if (forgotten := _forgotten(names, is_there)) is not None:
        raise ModelError(
            f"{index}: does not list {forgotten}, which lies beside it and is one of the shards of {names[0]}; expected all of them. Index and "
            "shards are of different downloads; download the model again, or remove the file that is no part of the model."
        )
    for name in names:
        if not is_there(name):
            raise ModelError(
                f"{index}: names {PurePosixPath(name).name}, which is not there. Complete the download."
            )
    return names


def _forgotten(names: Sequence[str], is_there: Callable[[str], bool]) -> str | None:
    """A shard of the set that an index lists, which lies there and is not listed."""
    for stem, count, suffix in dict.fromkeys(
        (m["stem"], m["count"], m["suffix"]) for n in names if (m := SHARD_NAME.fullmatch(n))
    ):
        expected = (f"{stem}-{i:05d}-of-{count}{suffix}" for i in range(1, int(count) + 1))
        found = next((name for name in expected if name not in names and is_there(name)), None)
        if found is not None:
            return found
    return None


def is_inside(name: str) -> bool:
    """Does a relative name stay inside the folder it is relative to?"""
    path = PurePosixPath(name)
    return bool(path.parts) and not (path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name)


def stem_of(source: Source) -> str:
    """What the names of a model's weights begin with: diffusers', if the config says that it loads the model, or without a config its
    files are called so; else that of transformers."""
    if source.config:
        return DIFFUSERS_STEM if "_diffusers_version" in source.config else STEM
    return DIFFUSERS_STEM if any(path.name.startswith(DIFFUSERS_STEM) for path in source.paths()) else STEM
