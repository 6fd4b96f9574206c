"""The files beside the weights: which are carried over, and ``config.json`` with the new dtype."""

from __future__ import annotations

import itertools
import json
import os
import re
import stat
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from alnico.checkpoint.durable import copy_file, write_file
from alnico.checkpoint.files import (
    MAX_ENTRIES,
    check_inside,
    files_below,
    is_text,
    open_to_read,
    read_small,
)
from alnico.checkpoint.json_files import MAX_JSON_BYTES, read_json
from alnico.checkpoint.reference import PICKLES
from alnico.checkpoint.source import Source
from alnico.checkpoint.weight_files import INDEX, NO_WEIGHTS, holds_weights, is_inside, shard_names
from alnico.errors import ModelError, RunError
from alnico.folders import Folder, make_folders
from alnico.numerics.dtypes import CONFIG_NAMES

WEIGHTS = (
    ".safetensors", ".gguf", ".ggml", ".h5", ".keras", ".msgpack", ".onnx", ".onnx_data", ".ot", ".tflite", ".npz", ".npy", ".pkl", ".pickle", ".pdparams",
    ".nemo", ".pt2", ".pte", ".mlmodel", *PICKLES,
)  # fmt: skip
"""Endings of files that hold weights, or may: none is carried to an output, whose weights are others."""
ASIDE = (".bak", ".old", ".orig", ".data", ".part", ".tmp")
"""What follows the ending of a file that somebody put aside, or that was not fetched whole."""

INDEX_NAME = re.compile(r"\.index(\.\w+)?\.json$")
"""How the name of an index ends, that of a variant (``model.safetensors.index.fp16.json``) too."""
SIGNATURE = "model.sig"
"""Where model-signing puts a signature: of one model, never of another that has its side files."""

MODULES = "modules.json"
ROUTER = "router_config.json"
"""Where sentence-transformers names the folders of a model's modules."""

DTYPE_KEYS = frozenset(("dtype", "torch_dtype"))

NOT_CARRIED = ("adapter_config.json",)
"""A loader would look for the adapter that it describes, and for that adapter's base, in place of the merged weights."""

SHOWN = 8
"""Files that a note names."""

OURS = ("README.md", "mergekit_config.yml", "alnico.lock.json", "config.json", SIGNATURE)
"""Written new for every merge, or not at all."""

READ_BESIDE = ("adapter_config.json", INDEX)
"""Read, and not carried."""


def side_files(directory: Path) -> tuple[list[Path], list[Path]]:
    """Return (carried, left): paths relative to ``directory`` of files that go with the model, and of those that do not.

    Carried are the files beside the weights, and those in the folders of sentence-transformers' modules. Left are weights (those that are
    read are merged, and written anew), indices, hidden files and other folders.
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
            kept = [p for p in inside if is_carried(p, modules)]
            carried += kept
            left += [p for p in inside if p not in kept] if kept else [name]
        elif is_carried(name, modules):
            carried.append(name)
        elif not (
            path.name.startswith("model") and path.name.endswith((".safetensors", ".safetensors.index.json"))
        ):
            left.append(name)
    return carried, left


def is_carried(name: PurePath, modules: Collection[str]) -> bool:
    """Does a file go with the model, by its name relative to the model's folder? ``modules`` are folders whose files may."""
    top = name.parts[0]
    if top.startswith(".") or top in OURS or top == "__pycache__" or top in NOT_CARRIED:
        return False
    if len(name.parts) > 1 and not any(name.is_relative_to(folder) for folder in modules):
        return False
    return not may_hold_weights(name) and not INDEX_NAME.search(name.name)


def may_hold_weights(name: PurePath) -> bool:
    """Does a file hold weights, by the end of its name, also of one that was put aside (``model.safetensors.bak``)?"""
    return (PurePath(name.stem).suffix if name.suffix in ASIDE else name.suffix) in WEIGHTS


def modules_of(source: Source) -> list[str]:
    """The folders of a model's modules; none where it is no directory."""
    return module_folders(source.directory) if source.directory is not None else []


def module_weights(directory: Path) -> dict[str, list[str]]:
    """The files with weights of each module's folder. Errors: ModelError, as of :func:`alnico.checkpoint.weight_files.shard_names`."""
    modules = module_folders(directory)
    tops = dict.fromkeys(folder.split("/")[0] for folder in modules)
    paths = [
        p
        for top in tops
        if (directory / top).is_dir()
        for p in _files_of_module(directory / top, directory)
        if p.is_file()
    ]
    found = modules_among(directory, [p.relative_to(directory).as_posix() for p in paths], modules)
    for folder, names in found.items():
        for name in names:
            check_inside(directory / folder / name, directory)
    return found


def _files_of_module(folder: Path, directory: Path) -> list[Path]:
    """What lies in the folder of a module. Errors: ModelError for a folder that is a link out of the model, before it is looked into."""
    check_inside(folder, directory)
    return [path for path in files_below(folder, MAX_ENTRIES) if not path.is_dir()]


def modules_among(directory: Path, files: Collection[str], modules: Collection[str]) -> dict[str, list[str]]:
    """The files with weights of each module's folder, of a model whose files are ``files``, relative to it."""
    folders: dict[str, list[str]] = {}
    for file in files:
        path = PurePosixPath(file)
        if (
            len(path.parts) > 1
            and not path.name.startswith(".")
            and any(path.is_relative_to(folder) for folder in modules)
        ):
            folders.setdefault(path.parent.as_posix(), []).append(path.name)
    there = set(files)
    return {
        folder: shard_names(
            str(directory / folder),
            names,
            directory / folder,
            lambda name, at=folder: f"{at}/{name}" in there,  # type: ignore[misc]
        )
        for folder, names in sorted(folders.items())
        if holds_weights(n for n in names if not n.startswith("adapter_"))
    }


def listed_weights(directory: Path) -> list[str]:
    """Files with weights of any format in a model's directory and the folders in it, relative to it."""
    paths = [p for p in sorted(directory.iterdir()) if not p.name.startswith(".")]
    inside = [
        p for folder in paths if folder.is_dir() and not folder.is_symlink() for p in sorted(folder.iterdir())
    ]
    return [
        p.relative_to(directory).as_posix() for p in (*paths, *inside) if may_hold_weights(p) and p.is_file()
    ]


def unread_weights(label: str, files: Iterable[str], read: Collection[str]) -> list[str]:
    """A note on files with weights that are no part of the model as it is read; none if there are none."""
    left = [
        f
        for f in files
        if f not in read
        and PurePosixPath(f).suffix in WEIGHTS
        and not NO_WEIGHTS.fullmatch(PurePosixPath(f).name)
    ]
    if not left:
        return []
    shown = ", ".join(left[:SHOWN]) + (f" and {len(left) - SHOWN} more" if len(left) > SHOWN else "")
    return [f"{label}: weights in other files are left out, neither merged nor carried: {shown}."]


def check_links(directory: Path) -> None:
    """Refuse links, among the files that are read or carried, that lead out of a model's folder. Errors: ModelError."""
    for relative in (*side_files(directory)[0], *map(Path, OURS)):
        if (directory / relative).exists():
            check_inside(directory / relative, directory)


def check_kinds(directory: Path) -> None:
    """Refuse what is no file, among the files that are read or carried: a pipe would be waited for. Errors: ModelError."""
    with os.scandir(directory) as entries:
        if sum(1 for _ in itertools.islice(entries, MAX_ENTRIES + 1)) > MAX_ENTRIES:
            raise ModelError(
                f"{directory}: holds more than {MAX_ENTRIES} files and folders; expected those of one model. Put the model into a folder of "
                "its own."
            )
    configs = [Path(folder, "config.json") for folder in module_folders(directory)]
    for relative in (*side_files(directory)[0], *map(Path, (*OURS, *READ_BESIDE)), *configs):
        path = directory / relative
        try:
            is_file = stat.S_ISREG(os.stat(path).st_mode)
        except OSError:  # nothing, or a link that leads nowhere: told where the file is needed, but for a config, without which a model is read
            is_file = path.name != "config.json" or not path.is_symlink()
        if not is_file:
            raise ModelError(
                f"{path}: is a folder, a pipe, a socket, a device or a link to nowhere; expected a regular file, as in every model. Remove "
                "it, or do not use this model."
            )


def check_carried(directory: Path, left: Collection[str] = ()) -> None:
    """Refuse files that :func:`copy_side_files` could not copy: that lead nowhere, or may not be read. Errors: ModelError."""
    for relative in side_files(directory)[0]:
        if relative.as_posix() in left:
            continue
        if not is_text(relative.as_posix()):
            raise ModelError(
                f"{directory / relative}: its name is not UTF-8; expected one that the lock can hold. Rename the file, or remove it."
            )
        os.close(open_to_read(directory / relative))


def copy_side_files(
    source: Path, target: Path, left: Collection[str] = (), inside: Folder | None = None
) -> None:
    """Copy what :func:`side_files` carries, contents only, but the files of ``left``.

    Errors: ModelError for a link that leads out of the model; RunError with the system's reason.
    """
    for relative in side_files(source)[0]:
        if relative.as_posix() in left:
            continue
        check_inside(source / relative, source)
        try:
            make_folders((target / relative).parent, target, inside)
            copy_file(source / relative, target / relative, inside)
        except OSError as error:
            raise _not_carried(source / relative, error) from None


def write_config(
    source: Path, config: Mapping[str, Any], dtype: str | None, target: Path, inside: Folder | None = None
) -> None:
    """Write ``config.json`` as ``config`` says, byte for byte as in ``source`` unless that, or the dtype, differs; those of other modules
    with the dtype. Errors: RunError."""
    place = config_path(source)
    if place is not None:
        _write_config(place, config, dtype, target / place.relative_to(source), target, inside)
    for path in (source / folder / "config.json" for folder in module_folders(source)):
        if path != place and path.exists() and DTYPE_KEYS & (held := read_json(path)).keys():
            _write_config(path, held, dtype, target / path.relative_to(source), target, inside)


def _write_config(
    place: Path, config: Mapping[str, Any], dtype: str | None, made: Path, target: Path, inside: Folder | None
) -> None:
    changed = dict(config)
    if dtype in CONFIG_NAMES:
        is_told = dtype != "F32" and "_diffusers_version" not in config  # diffusers knows no such key
        keys = [k for k in ("dtype", "torch_dtype") if k in config] or (["torch_dtype"] if is_told else [])
        changed.update(dict.fromkeys(keys, CONFIG_NAMES[dtype]))
    try:
        make_folders(made.parent, target, inside)
        if changed == read_json(place):
            copy_file(place, made, inside)
        else:
            write_file(made, json.dumps(changed, indent=2, ensure_ascii=False) + "\n", inside)
    except OSError as error:
        raise _not_carried(place, error) from None


def _not_carried(path: Path, error: OSError) -> RunError:
    return RunError(
        f"{path}: could not be carried to the output ({error.strerror}). "
        "Make room or mend the file; the same command resumes the merge."
    )


def module_folders(directory: Path) -> list[str]:
    """The folders inside a model that sentence-transformers' ``modules.json`` names, in its order, or a router's config."""
    found: list[str] = []
    with suppress(ModelError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        if (directory / MODULES).exists():
            found += [
                str(m["path"])
                for m in json.loads(read_small(directory / MODULES, MAX_JSON_BYTES, "a list of modules"))
                if m.get("path")
            ]
            if (directory / ROUTER).exists():
                found += [str(name) for name in read_json(directory / ROUTER)["types"]]
    paths = (PurePosixPath(name) for name in found if is_inside(name) and is_text(name))
    return list(
        dict.fromkeys(path.as_posix() for path in paths if path.parts and not path.parts[0].startswith("."))
    )


def config_path(location: Path) -> Path | None:
    """Where the config of a model lies: in its directory, or with sentence-transformers' modules in that of its first transformer."""
    if not location.is_dir():
        return None
    own = location / "config.json"
    if own.exists():
        return own
    from alnico.checkpoint.sidecars import module_folders

    paths = (location / folder / "config.json" for folder in module_folders(location))
    return next((path for path in paths if path.exists() and "model_type" in read_json(path)), None)
