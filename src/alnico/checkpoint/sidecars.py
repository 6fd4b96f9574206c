"""Copies the files next to the weights to the output; writes ``config.json`` with the new dtype."""

from __future__ import annotations

import itertools
import json
import os
import re
import stat
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from alnico.checkpoint.durable import copy_file, write_file
from alnico.checkpoint.file_kinds import LFS, SNIFFED_BYTES, kind_of
from alnico.checkpoint.files import (
    MAX_ENTRIES,
    check_inside,
    files_below,
    is_text,
    open_to_read,
    read_small,
)
from alnico.checkpoint.json_files import MAX_JSON_BYTES, read_json
from alnico.checkpoint.pipelines import PIPELINE, check_parts, is_pipeline, parts_of
from alnico.checkpoint.reference import PICKLES
from alnico.checkpoint.source import Source
from alnico.checkpoint.weight_files import (
    DIFFUSERS_STEM,
    INDEX,
    NO_WEIGHTS,
    STEM,
    holds_weights,
    is_inside,
    shard_names,
)
from alnico.errors import ModelError, RunError
from alnico.folders import Folder, make_folders
from alnico.numerics.dtypes import CONFIG_NAMES

WEIGHTS = (
    ".safetensors", ".gguf", ".ggml", ".h5", ".keras", ".msgpack", ".onnx", ".onnx_data", ".ot", ".tflite", ".npz", ".npy", ".pkl", ".pickle", ".pdparams",
    ".nemo", ".pt2", ".pte", ".mlmodel", ".distcp", *PICKLES,
)  # fmt: skip
"""Endings of files that may hold weights. None is copied to an output, which has its own weights."""
ASIDE = (".bak", ".old", ".orig", ".data", ".part", ".tmp")
"""Endings added to the name of a backup, or of a file that was not completely downloaded."""

INDEX_NAME = re.compile(r"\.index(\.\w+)?\.json$")
"""End of the name of an index, also of a variant's (``model.safetensors.index.fp16.json``)."""
SIGNATURE = "model.sig"
"""File of a signature by model-signing. It signs one model, so it is never copied to another."""

MODULES = "modules.json"
ROUTER = "router_config.json"
"""Files in which sentence-transformers lists the folders of a model's modules."""

DTYPE_KEYS = frozenset(("dtype", "torch_dtype"))

QUANTISER = "hf_quant_config.json"
"""What ModelOpt's quantiser did, which its loaders read."""

NOT_CARRIED = ("adapter_config.json", QUANTISER, "quantize_config.json", "quant_config.json")
"""With the first, a loader would load an adapter and that adapter's base instead of the merged weights; with the others (of
ModelOpt, GPTQ and AWQ) it would take the weights for codes."""

OF_TRAINERS = ("trainer_state.json", "latest", "zero_to_fp32.py")
"""Files that describe a checkpoint or its shards, and would be wrong next to merged weights. Optimizer states have endings of weights."""

READ_WHILE_PLANNING = (".json", ".txt", ".model", ".jinja", "README.md")
"""Endings of small files that are fetched before the weights: config, index, tokenizer, template, card."""

MAX_SMALL_BYTES = 1 << 30
"""Most bytes of all small files of a model."""

SHOWN = 8
"""Files that a note names at most."""

RECIPE_FILE = "mergekit_config.yml"

OURS = ("README.md", RECIPE_FILE, "alnico.lock.json", "config.json", SIGNATURE)
"""Written new for every merge, or not at all."""

READ_ONLY = ("adapter_config.json", INDEX)
"""Files that are read but not copied."""


def side_files(directory: Path) -> tuple[list[Path], list[Path]]:
    """Return (carried, left): relative paths of the files that are copied to an output, and of the others.

    Carried are the files next to the weights, and those in the folders of sentence-transformers' modules and of a
    pipeline's parts.
    Left are weights (they are merged and written again), indices, hidden files and other folders.
    """
    carried: list[Path] = []
    left: list[Path] = []
    modules = module_folders(directory)
    for path in sorted(directory.iterdir()):
        name = Path(path.name)
        if path.name.startswith(".") or path.name in OURS or path.name == "__pycache__":
            continue
        if path.is_dir():
            is_module = any(folder.split("/")[0] == path.name for folder in modules)
            inside = (
                [p.relative_to(directory) for p in _files_of_module(path, directory)] if is_module else []
            )
            carried_inside = [p for p in inside if is_carried(p, modules)]
            carried += carried_inside
            left += [p for p in inside if p not in carried_inside] if carried_inside else [name]
        elif is_carried(name, modules):
            carried.append(name)
        elif not (
            path.name.startswith("model") and path.name.endswith((".safetensors", ".safetensors.index.json"))
        ):
            left.append(name)
    return carried, left


def is_carried(name: PurePath, modules: Collection[str]) -> bool:
    """Is a file copied to the output?

    ``name`` is relative to the model's folder, ``modules`` are its module folders.
    """
    top = name.parts[0]
    if top.startswith(".") or top in OURS or top == "__pycache__" or top in (*NOT_CARRIED, *OF_TRAINERS):
        return False
    if len(name.parts) > 1 and not any(name.is_relative_to(folder) for folder in modules):
        return False
    return not may_hold_weights(name) and not INDEX_NAME.search(name.name)


def may_hold_weights(name: PurePath) -> bool:
    """Does a file's ending say that it may hold weights? A backup (``model.safetensors.bak``) counts too."""
    return (PurePath(name.stem).suffix if name.suffix in ASIDE else name.suffix) in WEIGHTS


def modules_of(source: Source) -> list[str]:
    """Return the folders of a model's modules; an empty list if the model is not a directory."""
    return module_folders(source.directory) if source.directory is not None else []


def module_stems(source: Source) -> dict[str, str]:
    """Return the folders of a model's modules, each with the first part of the names of its weight files."""
    return {folder: _stem_in(source.directory / folder) for folder in modules_of(source) if source.directory}


def _stem_in(folder: Path) -> str:
    path = folder / "config.json"
    is_diffusers = path.exists() and "_diffusers_version" in read_json(path)
    return DIFFUSERS_STEM if is_diffusers else STEM


def module_weights(directory: Path) -> dict[str, list[str]]:
    """Return the weight files in each module's folder.

    Errors: ModelError, as ``weight_files.shard_names``, and for a pipeline without one of its parts.
    """
    modules = module_folders(directory)
    tops = dict.fromkeys(folder.split("/")[0] for folder in modules)
    paths = [
        p
        for top in tops
        if (directory / top).is_dir()
        for p in _files_of_module(directory / top, directory)
        if p.is_file()
    ]
    weights = modules_among(directory, [p.relative_to(directory).as_posix() for p in paths], modules)
    for folder, names in weights.items():
        for name in names:
            check_inside(directory / folder / name, directory)
    return weights


def _files_of_module(folder: Path, directory: Path) -> list[Path]:
    """Return the files in a module's folder. Errors: ModelError if the folder is a link out of the model."""
    check_inside(folder, directory)
    return [path for path in files_below(folder, MAX_ENTRIES) if not path.is_dir()]


def modules_among(directory: Path, files: Collection[str], modules: Collection[str]) -> dict[str, list[str]]:
    """Return the weight files in each module's folder; ``files`` are all files of the model. Errors: as for :func:`module_weights`."""
    folders: dict[str, list[str]] = {}
    for file in files:
        path = PurePosixPath(file)
        if (
            len(path.parts) > 1
            and not path.name.startswith(".")
            and any(path.is_relative_to(folder) for folder in modules)
        ):
            folders.setdefault(path.parent.as_posix(), []).append(path.name)
    existing = set(files)
    found = {
        folder: shard_names(
            str(directory / folder),
            names,
            directory / folder,
            lambda name, at=folder: f"{at}/{name}" in existing,  # type: ignore[misc]
        )
        for folder, names in sorted(folders.items())
        if holds_weights(n for n in names if not n.startswith("adapter_"))
    }
    if is_pipeline(directory):
        check_parts(directory, files, found)
    return found


def weight_files_of(
    label: str,
    files: Collection[str],
    directory: Path,
    fetch_small: Callable[[Iterable[str]], None],
    choose: Callable[..., list[str]] = shard_names,
    exists: Callable[[str], bool] | None = None,
) -> dict[str, str]:
    """Return the weight files of a model that is elsewhere, each with the folder before the names of its tensors.

    ``directory`` has the small files of the model's folder already; those of its modules are put there by ``fetch_small``.
    ``choose`` returns the names of the weight files, as :func:`shard_names` does. Errors: ModelError.
    """
    modules = module_folders(directory) if choose is shard_names else []
    if modules:  # their configs and indices
        fetch_small(f for f in files if "/" in f and any(f.startswith(f"{m}/") for m in modules))
    of_modules = modules_among(directory, list(files), modules)
    top = [f for f in files if "/" not in f and not (of_modules and is_pipeline(directory))]
    is_there = exists if exists is not None else files.__contains__
    names = [] if of_modules and not holds_weights(top) else choose(label, top, directory, is_there)
    in_modules = {f"{folder}/{name}": f"{folder}/" for folder, found in of_modules.items() for name in found}
    return dict.fromkeys(names, "") | in_modules


def refuse_pickles(label: str, files: Iterable[str]) -> None:
    """Refuse pickles that would have to be downloaded. Errors: ModelError."""
    pickle = next((name for name in files if name.endswith(PICKLES)), None)
    if pickle is not None:
        raise ModelError(
            f"{label}: its weights are a pickle ({pickle}), expected .safetensors; alnico does not download "
            "pickles. Download the model yourself, and give its path."
        )


def listed_weights(directory: Path) -> list[str]:
    """Return the weight files of any format in a model's directory and its folders, relative to it."""
    paths = [p for p in sorted(directory.iterdir()) if not p.name.startswith(".")]
    inside = [
        p for folder in paths if folder.is_dir() and not folder.is_symlink() for p in sorted(folder.iterdir())
    ]
    return [
        p.relative_to(directory).as_posix() for p in (*paths, *inside) if may_hold_weights(p) and p.is_file()
    ]


def unread_weights(label: str, files: Iterable[str], read: Collection[str]) -> list[str]:
    """Return a note on weight files that are not part of the model as read; empty if there are none."""
    unread = [
        f
        for f in files
        if f not in read
        and PurePosixPath(f).suffix in WEIGHTS
        and not NO_WEIGHTS.fullmatch(PurePosixPath(f).name)
    ]
    if not unread:
        return []
    shown = ", ".join(unread[:SHOWN]) + (f" and {len(unread) - SHOWN} more" if len(unread) > SHOWN else "")
    return [f"{label}: other weight files are ignored, neither merged nor copied to the output: {shown}."]


def check_links(directory: Path) -> None:
    """Refuse files that are read or copied and are links out of the model's folder. Errors: ModelError."""
    for relative in (*side_files(directory)[0], *map(Path, OURS)):
        if (directory / relative).exists():
            check_inside(directory / relative, directory)


def check_kinds(directory: Path) -> None:
    """Refuse files that are read or copied and are not regular: reading a pipe would block.

    Errors: ModelError.
    """
    with os.scandir(directory) as entries:
        if sum(1 for _ in itertools.islice(entries, MAX_ENTRIES + 1)) > MAX_ENTRIES:
            raise ModelError(
                f"{directory}: holds more than {MAX_ENTRIES} files and folders; expected those of one model. "
                "Put the model into its own folder."
            )
    configs = [Path(folder, "config.json") for folder in module_folders(directory)]
    for relative in (*side_files(directory)[0], *map(Path, (*OURS, *READ_ONLY)), *configs):
        path = directory / relative
        try:
            is_file = stat.S_ISREG(os.stat(path).st_mode)
        except OSError:
            # Missing, or a broken link: reported where the file is needed. A config that is a broken link is
            # refused here, since a model can be read without one.
            is_file = path.name != "config.json" or not path.is_symlink()
        if not is_file:
            raise ModelError(
                f"{path}: is a folder, a pipe, a socket, a device or a broken link; expected a regular file. "
                "Remove it, or do not use this model."
            )


def check_carried(directory: Path, excluded: Collection[str] = ()) -> None:
    """Refuse files that :func:`copy_side_files` could not copy, and those that a pointer or an error page replaces.

    Errors: ModelError.
    """
    for relative in side_files(directory)[0]:
        if relative.as_posix() in excluded:
            continue
        if not is_text(relative.as_posix()):
            raise ModelError(
                f"{directory / relative}: its name is not UTF-8; expected a name that the lock can hold. "
                "Rename the file, or remove it."
            )
        descriptor = open_to_read(directory / relative)
        try:
            start = os.pread(descriptor, SNIFFED_BYTES, 0)
        finally:
            os.close(descriptor)
        kind = kind_of(start)
        if kind is not None and kind.is_stand_in and (relative.suffix == ".json" or start.startswith(LFS)):
            raise ModelError(
                f"{directory / relative}: is {kind.name}; the output would have it, too. {kind.advice} Or remove it."
            )


def copy_side_files(
    source: Path, target: Path, excluded: Collection[str] = (), inside: Folder | None = None
) -> None:
    """Copy the contents of the files that :func:`side_files` carries, except those in ``excluded``.

    Errors: ModelError for a link out of the model; RunError with the system's reason.
    """
    for relative in side_files(source)[0]:
        if relative.as_posix() in excluded:
            continue
        check_inside(source / relative, source)
        try:
            make_folders((target / relative).parent, target, inside)
            copy_file(source / relative, target / relative, inside)
        except OSError as error:
            raise _copy_error(source / relative, error) from None


def quantiser_files(directory: Path | None) -> dict[str, bytes]:
    """Return the file of ModelOpt's quantiser in a model's folder, for an output with the same codes. Errors: ModelError."""
    if directory is None or not (directory / QUANTISER).exists():
        return {}
    check_inside(directory / QUANTISER, directory)
    return {QUANTISER: read_small(directory / QUANTISER, MAX_JSON_BYTES, "a small JSON file")}


def write_config(
    source: Path, config: Mapping[str, Any], dtype: str | None, target: Path, inside: Folder | None = None
) -> None:
    """Write ``config.json`` with the values of ``config`` and the dtype; set the dtype in modules' configs.

    A file whose values do not change is copied byte for byte. Errors: RunError.
    """
    main = config_path(source)
    if main is not None:
        _write_config(main, config, dtype, target / main.relative_to(source), target, inside)
    for path in (source / folder / "config.json" for folder in module_folders(source)):
        if path != main and path.exists() and DTYPE_KEYS & (values := read_json(path)).keys():
            _write_config(path, values, dtype, target / path.relative_to(source), target, inside)


def _write_config(
    path: Path,
    config: Mapping[str, Any],
    dtype: str | None,
    out: Path,
    target: Path,
    inside: Folder | None,
) -> None:
    changed = dict(config)
    if dtype in CONFIG_NAMES:
        adds_dtype = dtype != "F32" and "_diffusers_version" not in config  # diffusers has no such key
        keys = [k for k in ("dtype", "torch_dtype") if k in config] or (["torch_dtype"] if adds_dtype else [])
        changed.update(dict.fromkeys(keys, CONFIG_NAMES[dtype]))
    try:
        make_folders(out.parent, target, inside)
        if changed == read_json(path):
            copy_file(path, out, inside)
        else:
            write_file(out, json.dumps(changed, indent=2, ensure_ascii=False) + "\n", inside)
    except OSError as error:
        raise _copy_error(path, error) from None


def _copy_error(path: Path, error: OSError) -> RunError:
    return RunError(
        f"{path}: could not be copied to the output ({error.strerror}). "
        "Make room or repair the file; the same command resumes the merge."
    )


def module_folders(directory: Path) -> list[str]:
    """Return the folders that sentence-transformers' ``modules.json`` or a router's config lists, or diffusers' ``model_index.json``."""
    names: list[str] = []
    with suppress(ModelError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        if (directory / MODULES).exists():
            names += [
                str(m["path"])
                for m in json.loads(read_small(directory / MODULES, MAX_JSON_BYTES, "a list of modules"))
                if m.get("path")
            ]
            if (directory / ROUTER).exists():
                names += [str(name) for name in read_json(directory / ROUTER)["types"]]
        if is_pipeline(directory):
            names += parts_of(directory)
    paths = (PurePosixPath(name) for name in names if is_inside(name) and is_text(name))
    return list(
        dict.fromkeys(path.as_posix() for path in paths if path.parts and not path.parts[0].startswith("."))
    )


def config_path(location: Path) -> Path | None:
    """Return the path of a model's config: in its directory, a pipeline's list of parts, or that of the first transformer module."""
    if not location.is_dir():
        return None
    own = location / "config.json"
    if own.exists():
        return own
    if (location / PIPELINE).exists():
        return location / PIPELINE
    paths = (location / folder / "config.json" for folder in module_folders(location))
    return next((path for path in paths if path.exists() and "model_type" in read_json(path)), None)
