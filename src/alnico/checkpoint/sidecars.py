"""The files beside the weights: which are carried over, and ``config.json`` with the new dtype."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path, PurePath
from typing import Any

from alnico.checkpoint.files import check_inside, read_small
from alnico.checkpoint.lasting import copy_file, write_file
from alnico.checkpoint.model import MAX_JSON_BYTES, PICKLES, read_json
from alnico.errors import ModelError, RunError
from alnico.numerics.dtypes import CONFIG_NAMES

WEIGHTS = (".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".tflite", ".npz", *PICKLES)
INDEX_NAME = re.compile(r"\.index(\.\w+)?\.json$")
"""How the name of an index ends, that of a variant (``model.safetensors.index.fp16.json``) too."""
SIGNATURE = "model.sig"
"""Where model-signing puts a signature: of one model, never of another that has its side files."""

OURS = ("README.md", "mergekit_config.yml", "alnico.lock.json", "config.json", SIGNATURE)
"""Written new for every merge, or not at all."""


def side_files(directory: Path) -> tuple[list[Path], list[Path]]:
    """Return (carried, left): paths relative to ``directory`` of files that go with the model, and of those that do not.

    Carried are the files beside the weights and whole folders that sentence-transformers' ``modules.json`` names (their
    own small weights too). Left are other weights, indices, hidden files and other folders.
    """
    carried: list[Path] = []
    left: list[Path] = []
    modules = module_folders(directory)
    for path in sorted(directory.iterdir()):
        name = Path(path.name)
        if path.name.startswith(".") or path.name in OURS or path.name == "__pycache__":
            continue
        if path.is_dir():
            inside = [p.relative_to(directory) for p in sorted(path.rglob("*")) if p.is_file()]
            (carried if path.name in modules else left).extend(inside if path.name in modules else [name])
        elif is_carried(name, modules):
            carried.append(name)
        elif not (path.name.startswith("model") and path.name.endswith((".safetensors", ".safetensors.index.json"))):
            left.append(name)
    return carried, left


def is_carried(name: PurePath, modules: set[str]) -> bool:
    """Does a file go with the model, by its name relative to the model's folder? ``modules`` are whole folders that do."""
    top = name.parts[0]
    if top.startswith(".") or top in OURS or top == "__pycache__":
        return False
    if len(name.parts) > 1:
        return top in modules
    return name.suffix not in WEIGHTS and not INDEX_NAME.search(top)


def check_links(directory: Path) -> None:
    """Refuse links, among the files that are read or carried, that lead out of a model's folder. Errors: ModelError."""
    for relative in (*side_files(directory)[0], *map(Path, OURS)):
        if (directory / relative).exists():
            check_inside(directory / relative, directory)


def copy_side_files(source: Path, target: Path, left: Collection[str] = ()) -> None:
    """Copy what :func:`side_files` carries, contents only, but the files of ``left``.

    Errors: ModelError for a link that leads out of the model; RunError with the system's reason.
    """
    for relative in side_files(source)[0]:
        if relative.as_posix() in left:
            continue
        check_inside(source / relative, source)
        try:
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            copy_file(source / relative, target / relative)
        except OSError as error:
            raise _not_carried(source / relative, error) from None


def write_config(source: Path, config: Mapping[str, Any], dtype: str | None, target: Path) -> None:
    """Write ``config.json`` as ``config`` says, byte for byte as in ``source`` unless that, or the dtype, differs. Errors: RunError."""
    if not (source / "config.json").exists():
        return
    changed = dict(config)
    if dtype in CONFIG_NAMES:
        keys = [k for k in ("dtype", "torch_dtype") if k in config] or (["torch_dtype"] if dtype != "F32" else [])
        changed.update(dict.fromkeys(keys, CONFIG_NAMES[dtype]))
    try:
        if changed == read_json(source / "config.json"):
            copy_file(source / "config.json", target / "config.json")
        else:
            write_file(target / "config.json", json.dumps(changed, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise _not_carried(source / "config.json", error) from None


def _not_carried(path: Path, error: OSError) -> RunError:
    return RunError(
        f"{path}: could not be carried to the output ({error.strerror}). "
        "Make room or mend the file; the same command takes the merge up again."
    )


def module_folders(directory: Path) -> set[str]:
    """The folders that sentence-transformers' ``modules.json`` names."""
    path = directory / "modules.json"
    if not path.exists():
        return set()
    try:
        modules = json.loads(read_small(path, MAX_JSON_BYTES, "a list of modules"))
        return {str(m["path"]) for m in modules if m.get("path")}
    except (ModelError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return set()
