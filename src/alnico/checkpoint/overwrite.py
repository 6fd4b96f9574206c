"""Decides what ``--overwrite`` may remove: models and alnico's own output, not a person's work.

A folder is a model's if each of its entries is a file that transformers, PEFT, diffusers,
sentence-transformers, mergekit or alnico writes, or that the folder's lock lists, and if at least one entry
identifies a model.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from alnico.checkpoint import header
from alnico.checkpoint.files import entries_below, open_binary
from alnico.checkpoint.json_files import read_json
from alnico.checkpoint.lineage import CARD, LOCK
from alnico.checkpoint.sidecars import OURS, module_folders
from alnico.checkpoint.weight_files import is_inside
from alnico.errors import AlnicoError

WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".tflite",
    ".pdparams", ".nemo", ".pte", ".mlmodel", ".unfinished",
)  # fmt: skip
"""Endings of weight files that libraries write.

Arrays and pickles (``.npy``, ``.pkl``) may be a person's data.
"""

MODEL_FILES = re.compile(
    r"config(_\w+)?\.json|[\w-]+_config(_\w+)?\.json|configuration\.json|model_index\.json|modules\.json|params\.json"  # configs
    r"|[\w.-]+\.index(\.\w+)?\.json"
    r"|tokenizer[\w.-]*\.(json|model)|tokenizer\.model\.v\d+|tekken\.json|vocab[\w-]*\.(json|txt|bpe)|merges\.txt|normalizer\.json"
    r"|special_tokens_map\.json|added_tokens\.json|bpe\.codes|dict\.txt|[\w.-]+\.tiktoken|[\w.-]+\.(spm|model)|unigram\.json"
    r"|chat_template\.(jinja|json)|chat_template\w*\.jinja|preprocessor\.json"
    r"|(modeling|configuration|tokenization|processing|image_processing|video_processing|feature_extraction)_\w+\.py"
    r"|openvino_\w+\.xml|mergekit_(moe_)?config\.yml|alnico\.lock\.json|model\.sig|\.gitattributes"
    r"|trainer_state\.json|(all|train|eval|predict|test)_results\.json|similarity_evaluation[\w.-]*\.csv",
)
FILE_MANAGER_FILES = re.compile(r"\.DS_Store|\._.+|Thumbs\.db|desktop\.ini|\.directory")
"""Files that file managers write into every folder that is opened."""
CARDS = re.compile(
    r"(readme|model_?card|licen[sc]e|notice|copying|(acceptable_)?use?_policy|usage_policy)[\w.-]*",
    re.IGNORECASE,
)
SYSTEM_FILES = re.compile(
    r"\.DS_Store|\._.+|Thumbs\.db|desktop\.ini|\.nfs[0-9a-f]+|\.ipynb_checkpoints|__pycache__", re.IGNORECASE
)
"""Files that desktops, network disks, notebooks and Python create on their own: nobody's work."""
IMAGES = (".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp")
"""Pictures shown in a card."""
FOLDERS = (
    "assets",
    "images",
    "figures",
    "onnx",
    "openvino",
    "original",
    "additional_chat_templates",
    "eval",
    "gguf",
)
"""Folders that models have in addition to their modules."""
MODEL_KEYS = (
    "model_type",
    "architectures",
    "_class_name",
    "_diffusers_version",
    "peft_type",
    "tokenizer_class",
)
"""Keys of a config; any one of them identifies a model."""

STATISTICS = ("statistics.json", "statistics.safetensors", "statistics.safetensors.unfinished")
SEARCH = re.compile(r"study\.db(-wal|-shm|-journal)?|best(-\d+)?\.yml|trials\.csv|search\.json|search\.html")
CURVE = ("points.jsonl", "curve.json", "curve.csv", "best.yml", "curve.png", "curve.html")
EVALUATION = ("evaluation.json", "report.html")
CURVE_BEGINS = b'{"kind": "alnico curve"'
"""How the file of a curve's points begins."""
ANALYSIS = (
    "pairwise_cosines.csv",
    "report.html",
    "map.png",
    "retention.json",
    "retention.csv",
    "summary.json",
)
ANALYSIS_OF_MODEL = (
    "per_param_stats.csv",
    "top50_by_l2.csv",
    "top50_by_maxabs.csv",
    "group_l2_bar.png",
    "summary.json",
)
"""Files of an analysis, and of a model's folder in it."""


def foreign_entries(path: Path) -> list[str]:
    """Return the sorted entries of a folder that are not part of a model or of alnico's output.

    The list is empty if the folder may be replaced. For a file it holds the name, unless the file holds
    weights. A link is judged by its name, since removing it removes nothing else. Errors: OSError.
    """
    if not path.is_dir():
        return [] if is_weights(path) else [path.name]
    names = sorted(
        name
        for name in os.listdir(path)
        if not (FILE_MANAGER_FILES.fullmatch(name) and (path / name).is_file())
    )
    if is_report(path, names):
        return []
    locked, modules = _locked_files(path), _module_names(path)
    foreign = [name for name in names if not _is_model_entry(path, name, locked, modules)]
    return foreign if foreign or _is_model(path, names) else names


def is_weights(path: Path) -> bool:
    """Is a file weights, safetensors or GGUF? An empty file may be replaced too."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return False
        with open_binary(path) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            if start.startswith(b"GGUF"):
                return True
            length = header.parse_length(start, size, str(path)) if size else 0
            entries = json.loads(file.read(length)) if size else {}
    except (AlnicoError, OSError, ValueError, RecursionError):
        return False
    tensors = (
        [entry for name, entry in entries.items() if name != "__metadata__"]
        if isinstance(entries, dict)
        else [None]
    )
    return all(isinstance(entry, dict) and "data_offsets" in entry for entry in tensors)


def is_report(folder: Path, names: Collection[str]) -> bool:
    """Is a folder with these entries only an analysis, search, curve, evaluation or statistics by alnico?"""
    if set(names) <= set(STATISTICS):
        return "statistics.json" not in names or holds_statistics(folder)
    if set(names) <= set(EVALUATION):
        return is_evaluation(folder / "evaluation.json")
    if names and all(SEARCH.fullmatch(name) for name in names):
        return is_search(folder)
    if names and set(names) <= set(CURVE):
        return is_curve(folder)
    summary = _read_mapping(folder / "summary.json")
    if "quantile_error" not in summary:
        return False
    with suppress(KeyError, TypeError):
        models = {str(model["name"]) for model in summary["models"]}
        return all(
            name in ANALYSIS or (name in models and _has_only(folder / name, ANALYSIS_OF_MODEL))
            for name in names
        )
    return False


def is_evaluation(path: Path) -> bool:
    """Is a file the results of an evaluation by alnico?"""
    return {"models", "tasks"} <= _read_mapping(path).keys()


def is_search(folder: Path) -> bool:
    """Does a folder hold a search by alnico, perhaps with other files?

    A search that runs has only its study.
    """
    return (
        {"trials", "objectives"} <= _read_mapping(folder / "search.json").keys()
        if (folder / "search.json").exists()
        else _is_database(folder / "study.db")
    )


def is_curve(folder: Path) -> bool:
    """Does a folder hold a curve by alnico, perhaps with other files?

    The first line of its points names them.
    """
    points = folder / CURVE[0]
    try:
        if not stat.S_ISREG(points.lstat().st_mode):
            return False
        with open_binary(points) as file:
            return file.read(len(CURVE_BEGINS)) == CURVE_BEGINS
    except OSError:
        return False


def _is_database(path: Path) -> bool:
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return False
        with open_binary(path) as file:
            return file.read(16) in (b"", b"SQLite format 3\0")
    except OSError:
        return False


def holds_statistics(folder: Path) -> bool:
    """Does a folder hold statistics of a model, perhaps with other files?"""
    return {"kind", "tensors"} <= _read_mapping(folder / "statistics.json").keys()


def _has_only(folder: Path, names: Collection[str]) -> bool:
    return folder.is_dir() and not folder.is_symlink() and set(os.listdir(folder)) <= set(names)


def _read_mapping(path: Path) -> Mapping[str, Any]:
    """Return the JSON object of a small file; empty if it cannot be read."""
    try:
        return read_json(path) if stat.S_ISREG(path.lstat().st_mode) else {}
    except (AlnicoError, OSError):
        return {}


def _locked_files(folder: Path) -> frozenset[str]:
    """Return the files that the lock of a finished merge lists, except hidden ones."""
    files = _read_mapping(folder / LOCK).get("files")
    if not isinstance(files, dict):
        return frozenset()
    return frozenset(
        name for name in files if is_inside(name) and not name.startswith(".") and "/." not in name
    )


def _module_names(folder: Path) -> Collection[str]:
    """Return the module folders that a model lists, for sentence-transformers and for diffusers."""
    index = _read_mapping(folder / "model_index.json")
    return {*(name.split("/")[0] for name in module_folders(folder)), *index}


def _is_model_entry(folder: Path, name: str, locked: Collection[str], modules: Collection[str]) -> bool:
    path = folder / name
    mode = path.lstat().st_mode
    if SYSTEM_FILES.fullmatch(name) and not stat.S_ISLNK(mode):
        # Notebooks and Python keep copies of the files used with them; those must be a model's files too.
        return not stat.S_ISDIR(mode) or all(
            _is_model_file(
                re.sub(r"-checkpoint(?=\.\w+$)|\.cpython-\d+(?=\.)", "", file).replace(".pyc", ".py")
            )
            for file in os.listdir(path)
        )
    if not stat.S_ISDIR(mode):
        return (stat.S_ISREG(mode) or stat.S_ISLNK(mode)) and (name in locked or _is_model_file(name))
    if name == ".cache":
        return all(entry == "huggingface" for entry in os.listdir(path))
    has_locked = any(file.startswith(f"{path.name}/") for file in locked)
    if name in modules or name in FOLDERS or has_locked or (path / "adapter_config.json").is_file():
        return all(_is_model_file(Path(file).name) or f"{name}/{file}" in locked for file in _files(path))
    return False


def _files(folder: Path) -> Iterator[str]:
    """Yield the files and hidden folders in a folder and its subfolders, relative to it."""
    for path, is_folder in entries_below(folder):
        if not is_folder or path.name.startswith("."):
            yield path.relative_to(folder).as_posix()


def _is_model_file(name: str) -> bool:
    if name in OURS or name == CARD or CARDS.fullmatch(name) or MODEL_FILES.fullmatch(name):
        return True
    return not name.startswith(".") and Path(name).suffix.lower() in (*WEIGHTS, *IMAGES)


def _is_model(folder: Path, names: Collection[str]) -> bool:
    """Does an entry of the folder identify a model? Cards and pictures alone do not."""
    if any(Path(name).suffix in WEIGHTS for name in names) or LOCK in names:
        return True
    configs = ("config.json", "adapter_config.json", "model_index.json", "tokenizer_config.json")
    return "modules.json" in names or any(
        set(MODEL_KEYS) & _read_mapping(folder / name).keys() for name in configs if name in names
    )
