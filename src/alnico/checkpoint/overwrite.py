"""What ``--overwrite`` may remove: folders and files that alnico, or another writer of models, made. All else has a person's work in it.

A folder is known by its entries: each must be a file that transformers, PEFT, diffusers, sentence-transformers, mergekit or alnico
writes, or that the folder's lock lists; and something must say that it is a model.
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
"""Endings of weights that a writer of models leaves. Arrays and pickles (``.npy``, ``.pkl``) may be anybody's."""

KNOWN = re.compile(
    r"config(_\w+)?\.json|[\w-]+_config(_\w+)?\.json|configuration\.json|model_index\.json|modules\.json|params\.json"  # configs
    r"|[\w.-]+\.index(\.\w+)?\.json"
    r"|tokenizer[\w.-]*\.(json|model)|tokenizer\.model\.v\d+|tekken\.json|vocab[\w-]*\.(json|txt|bpe)|merges\.txt|normalizer\.json"
    r"|special_tokens_map\.json|added_tokens\.json|bpe\.codes|dict\.txt|[\w.-]+\.tiktoken|[\w.-]+\.(spm|model)|unigram\.json"
    r"|chat_template\.(jinja|json)|chat_template\w*\.jinja|preprocessor\.json"
    r"|(modeling|configuration|tokenization|processing|image_processing|video_processing|feature_extraction)_\w+\.py"
    r"|openvino_\w+\.xml|mergekit_(moe_)?config\.yml|alnico\.lock\.json|model\.sig|\.gitattributes"
    r"|trainer_state\.json|(all|train|eval|predict|test)_results\.json|similarity_evaluation[\w.-]*\.csv",
)
OF_SYSTEMS = re.compile(r"\.DS_Store|\._.+|Thumbs\.db|desktop\.ini|\.directory")
"""What file managers leave in every folder that somebody looks into."""
CARDS = re.compile(
    r"(readme|model_?card|licen[sc]e|notice|copying|(acceptable_)?use?_policy|usage_policy)[\w.-]*",
    re.IGNORECASE,
)
SYSTEMS = re.compile(
    r"\.DS_Store|\._.+|Thumbs\.db|desktop\.ini|\.nfs[0-9a-f]+|\.ipynb_checkpoints|__pycache__", re.IGNORECASE
)
"""What desktops, disks of networks, notebooks and Python put into folders that are looked at: nobody's work."""
IMAGES = (".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp")
"""Pictures of a card."""
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
"""Folders that models have beside their modules."""
TELLING = ("model_type", "architectures", "_class_name", "_diffusers_version", "peft_type", "tokenizer_class")
"""Keys of a config, one of which says that it is a model's."""

STATISTICS = ("statistics.json", "statistics.safetensors", "statistics.safetensors.unfinished")
SEARCH = re.compile(r"study\.db(-wal|-shm|-journal)?|best(-\d+)?\.yml|trials\.csv|search\.json|search\.html")
EVALUATION = ("evaluation.json", "report.html")
ANALYSIS = ("pairwise_cosines.csv", "report.html", "kept.json", "kept.csv", "summary.json")
OF_A_MODEL = (
    "per_param_stats.csv",
    "top50_by_l2.csv",
    "top50_by_maxabs.csv",
    "group_l2_bar.png",
    "summary.json",
)
"""Files of an analysis, and of the folder of a model in it."""


def foreign(place: Path) -> list[str]:
    """The entries of a folder, sorted, that neither alnico nor another writer of models made; the name of a file that holds no weights.

    Nothing is foreign in what may be replaced. A link is known by its name: removing it removes nothing else. Errors: OSError.
    """
    if not place.is_dir():
        return [] if is_weights(place) else [place.name]
    names = sorted(
        name for name in os.listdir(place) if not (OF_SYSTEMS.fullmatch(name) and (place / name).is_file())
    )
    if is_report(place, names):
        return []
    locked, modules = _locked(place), _modules(place)
    found = [name for name in names if not _is_known(place, name, locked, modules)]
    return found if found or _is_model(place, names) else names


def is_weights(path: Path) -> bool:
    """Does a file hold weights as safetensors? One that holds nothing may be replaced, too."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return False
        with open_binary(path) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
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
    """Is a folder with these entries all an analysis, a search, an evaluation or statistics of alnico?"""
    if set(names) <= set(STATISTICS):
        return "statistics.json" not in names or holds_statistics(folder)
    if set(names) <= set(EVALUATION):
        return is_evaluation(folder / "evaluation.json")
    if names and all(SEARCH.fullmatch(name) for name in names):
        return is_search(folder)
    models = _data(folder / "summary.json")
    if "quantile_error" not in models:
        return False
    with suppress(KeyError, TypeError):
        own = {str(model["name"]) for model in models["models"]}
        return all(
            name in ANALYSIS or (name in own and _has_only(folder / name, OF_A_MODEL)) for name in names
        )
    return False


def is_evaluation(path: Path) -> bool:
    """Is a file the numbers of an evaluation of alnico?"""
    return {"models", "tasks"} <= _data(path).keys()


def is_search(folder: Path) -> bool:
    """Does a folder hold a search of alnico, among other things perhaps? Until its end a search is its study alone."""
    return (
        {"trials", "objectives"} <= _data(folder / "search.json").keys()
        if (folder / "search.json").exists()
        else _is_database(folder / "study.db")
    )


def _is_database(path: Path) -> bool:
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return False
        with open_binary(path) as file:
            return file.read(16) in (b"", b"SQLite format 3\0")
    except OSError:
        return False


def holds_statistics(folder: Path) -> bool:
    """Does a folder hold statistics of a model, among other things perhaps?"""
    return {"kind", "tensors"} <= _data(folder / "statistics.json").keys()


def _has_only(folder: Path, names: Collection[str]) -> bool:
    return folder.is_dir() and not folder.is_symlink() and set(os.listdir(folder)) <= set(names)


def _data(path: Path) -> Mapping[str, Any]:
    """What a small file says; nothing where it is none, or no mapping."""
    try:
        return read_json(path) if stat.S_ISREG(path.lstat().st_mode) else {}
    except (AlnicoError, OSError):
        return {}


def _locked(folder: Path) -> frozenset[str]:
    """The files that the lock of a finished merge lists, relative to its folder; none of them hidden."""
    files = _data(folder / LOCK).get("files")
    if not isinstance(files, dict):
        return frozenset()
    return frozenset(
        name for name in files if is_inside(name) and not name.startswith(".") and "/." not in name
    )


def _modules(folder: Path) -> Collection[str]:
    """The folders of modules that a model names: sentence-transformers' and diffusers'."""
    return {*(name.split("/")[0] for name in module_folders(folder)), *_data(folder / "model_index.json")}


def _is_known(folder: Path, name: str, locked: Collection[str], modules: Collection[str]) -> bool:
    path = folder / name
    mode = path.lstat().st_mode
    if SYSTEMS.fullmatch(name) and not stat.S_ISLNK(mode):
        # Notebooks keep copies of what was edited in them: of files that a model has.
        return not stat.S_ISDIR(mode) or all(
            _is_known_file(
                re.sub(r"-checkpoint(?=\.\w+$)|\.cpython-\d+(?=\.)", "", file).replace(".pyc", ".py")
            )
            for file in os.listdir(path)
        )
    if not stat.S_ISDIR(mode):
        return (stat.S_ISREG(mode) or stat.S_ISLNK(mode)) and (name in locked or _is_known_file(name))
    if name == ".cache":
        return all(inside == "huggingface" for inside in os.listdir(path))
    inside = [name for name in locked if name.startswith(f"{path.name}/")]
    if name in modules or name in FOLDERS or inside or (path / "adapter_config.json").is_file():
        return all(_is_known_file(Path(file).name) or f"{name}/{file}" in locked for file in _files(path))
    return False


def _files(folder: Path) -> Iterator[str]:
    """All that lies in a folder and the folders in it, relative to it; of a folder that is empty, or a special file, its name."""
    for path, is_folder in entries_below(folder):
        if not is_folder or path.name.startswith("."):
            yield path.relative_to(folder).as_posix()


def _is_known_file(name: str) -> bool:
    if name in OURS or name == CARD or CARDS.fullmatch(name) or KNOWN.fullmatch(name):
        return True
    return not name.startswith(".") and Path(name).suffix.lower() in (*WEIGHTS, *IMAGES)


def _is_model(folder: Path, names: Collection[str]) -> bool:
    """Does something in a folder of known entries say that it is a model? Cards and pictures alone do not."""
    if any(Path(name).suffix in WEIGHTS for name in names) or LOCK in names:
        return True
    configs = ("config.json", "adapter_config.json", "model_index.json", "tokenizer_config.json")
    return "modules.json" in names or any(
        set(TELLING) & _data(folder / name).keys() for name in configs if name in names
    )
