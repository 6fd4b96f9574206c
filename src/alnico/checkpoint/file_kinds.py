"""Recognises what a file is by its first bytes or its name, for files that are not what they are given as."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from alnico.errors import ModelError
from alnico.numerics.sizes import format_size

SNIFFED_BYTES = 4096
"""First bytes of a file that are examined; the name in the header of a tar archive is in the first 512."""

AGAIN = "Download the file again."
CONVERT = "Convert it to safetensors with the program that wrote it."
UNPACK = "Unpack it, and give the folder inside."


@dataclass(frozen=True)
class FileKind:
    """What a file is, and what to do where a model is expected."""

    name: str
    """For a sentence: "is" and this."""
    advice: str
    is_stand_in: bool = False
    """Is it in the place of the file that was meant, as a pointer or an error page is?"""
    may_be_yaml: bool = False
    """Can a reader of YAML say more about it?"""


GGUF = FileKind(
    "a GGUF file (llama.cpp's format)",
    "Give the path or the URL of a file whose name ends in .gguf.",
)
GGML = FileKind(
    "a GGML file (an old format of llama.cpp)", "Use the model that it was converted from, as safetensors."
)
SAFETENSORS = FileKind("a safetensors file", "Rename it to end in .safetensors.")
TORCH_ZIP = FileKind("a PyTorch checkpoint (a pickle in a zip archive)", "Rename it to end in .bin.")
PICKLE = FileKind("a Python pickle, as old versions of PyTorch write", "Rename it to end in .bin.")
NUMPY = FileKind("a numpy array (.npy)", "Save the model as safetensors, with the names of its tensors.")
NUMPY_ZIP = FileKind("an archive of numpy arrays (.npz)", NUMPY.advice)
HDF5 = FileKind("an HDF5 file, as Keras and TensorFlow write", CONVERT)
KERAS = FileKind("a Keras model (.keras)", CONVERT)
FLAX = FileKind("a Flax checkpoint (.msgpack)", "Load it with from_flax=True in transformers, and save it.")
ONNX = FileKind("an ONNX model", "Use the model that it was exported from, as safetensors.")
TFLITE = FileKind("a TensorFlow Lite model", ONNX.advice)
COREML = FileKind("a Core ML model", ONNX.advice)
RUST = FileKind("a checkpoint of rust-bert (.ot)", "Use the model that it was converted from.")
PADDLE = FileKind("a PaddlePaddle checkpoint (.pdparams)", CONVERT)
NEMO = FileKind("a NeMo archive (.nemo)", "Download it, and give the path of the file.")
DISTCP = FileKind(
    "a shard of a distributed checkpoint of torch",
    "Give a folder that has .metadata and the files of all ranks: the checkpoint is incomplete without them.",
)
EXPORTED = FileKind("an exported PyTorch program (.pt2 or .pte)", ONNX.advice)
ZIP = FileKind("a zip archive", UNPACK)
TAR = FileKind("a tar archive", UNPACK)
COMPRESSED = FileKind("a compressed file", UNPACK)
PDF = FileKind("a PDF document", "Check the path.")
PICTURE = FileKind("a picture", "Check the path.")
PROGRAM = FileKind("a program", "Check the path.")
TABLE = FileKind("a table of data (Parquet or Arrow)", "Check the path: it looks like a data set.")
EMPTY = FileKind("empty (0 bytes)", AGAIN, may_be_yaml=True)
ZEROS = FileKind("all zeros at its beginning", f"{AGAIN} The download did not finish.")
HTML = FileKind(
    "an HTML page",
    "Download the file itself: the address was that of a page, or of an error or a login.",
    is_stand_in=True,
)
XML = FileKind("an XML document, mostly the error message of a server", AGAIN, is_stand_in=True)
UTF16 = FileKind("text in UTF-16", "Save it as UTF-8; PowerShell's > writes UTF-16.")
RECIPE = FileKind(
    "a merge recipe",
    "Run `alnico merge RECIPE OUT` first, and give OUT; or give the path of a model.",
    may_be_yaml=True,
)
TASKS = FileKind("a file of tasks", "Give it as the tasks, and the path of a model here.", may_be_yaml=True)
INDEX = FileKind("the index of a model's shards", "Give the folder that it is in.")
CONFIG = FileKind("a model's config", "Give the folder that it is in.")
ADAPTER_CONFIG = FileKind("a LoRA adapter's config", "Give BASE+FOLDER, with the folder that it is in.")
TOKENIZER = FileKind("a tokenizer", "Give the folder that it is in.")
JSON = FileKind("a JSON file", "Check the path.", may_be_yaml=True)
LOCK = FileKind("the lock of a merge", "Give the folder that it is in.")

MAGIC: tuple[tuple[int, bytes, FileKind], ...] = (
    (0, b"GGUF", GGUF),
    *((0, word, GGML) for word in (b"lmgg", b"tjgg", b"fmgg", b"algg")),
    (0, b"\x93NUMPY", NUMPY),
    (0, b"\x89HDF\r\n\x1a\n", HDF5),
    (4, b"TFL3", TFLITE),
    (257, b"ustar", TAR),
    *((0, word, COMPRESSED) for word in (b"\x1f\x8b\x08", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07")),
    (0, b"%PDF-", PDF),
    *((0, word, PICTURE) for word in (b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF8")),
    *((0, word, PROGRAM) for word in (b"\x7fELF", b"MZ\x90\0", b"\xcf\xfa\xed\xfe")),
    *((0, word, TABLE) for word in (b"PAR1", b"ARROW1")),
    *((0, word, UTF16) for word in (b"\xff\xfe", b"\xfe\xff")),
)  # fmt: skip
"""Where in a file these bytes stand, and what it then is."""

ENDINGS: dict[str, FileKind] = {
    ".gguf": GGUF, ".ggml": GGML, ".h5": HDF5, ".keras": KERAS, ".msgpack": FLAX, ".onnx": ONNX, ".onnx_data": ONNX, ".tflite": TFLITE,
    ".mlmodel": COREML, ".ot": RUST, ".pdparams": PADDLE, ".nemo": NEMO, ".pt2": EXPORTED, ".pte": EXPORTED, ".npy": NUMPY, ".npz": NUMPY_ZIP, ".distcp": DISTCP,
    ".pkl": PICKLE, ".pickle": PICKLE, ".zip": ZIP, ".tar": TAR, ".gz": COMPRESSED, ".tgz": COMPRESSED, ".xz": COMPRESSED, ".zst": COMPRESSED, ".7z": COMPRESSED,
}  # fmt: skip
"""What a file is by its name, where it may hold weights that alnico does not read."""

LFS = b"version https://git-lfs"
LFS_SIZE = re.compile(rb"^size (\d{1,18})$", re.MULTILINE)
HTML_START = re.compile(rb"<(!doctype html|html|head|body)\b", re.IGNORECASE)
XML_START = re.compile(rb"<(\?xml|Error>)")
YAML_KEY = re.compile(r"^(merge_method|base_model|models|slices|tasks)\s*:", re.MULTILINE)
JSON_KEYS: tuple[tuple[str, FileKind], ...] = (
    ("weight_map", INDEX), ("peft_type", ADAPTER_CONFIG), ("merge_method", RECIPE), ("architectures", CONFIG), ("model_type", CONFIG),
    ("added_tokens", TOKENIZER), ("tokenizer_class", TOKENIZER), ("alnico", LOCK),
)  # fmt: skip
ERROR_KEYS = frozenset(("error", "errors", "error_code", "message", "detail", "status", "statusCode", "code", "title", "type", "path", "timestamp"))  # fmt: skip
"""Keys of a server's answer that it has no such file; an object with others is no such answer."""
SHOWN = 60


def kind_of(start: bytes) -> FileKind | None:
    """Say what a file is by its first bytes; None if they show no format that is known here.

    >>> kind_of(b"GGUF\\x03\\0\\0\\0").name, kind_of(b"<!DOCTYPE html>").name, kind_of(b"\\x08\\x00\\x01") is None
    ("a GGUF file (llama.cpp's format)", 'an HTML page', True)
    """
    if not start:
        return EMPTY
    for offset, magic, kind in MAGIC:
        if start[offset:].startswith(magic):
            return kind
    if start.startswith(b"PK\x03\x04"):
        return _kind_of_zip(start)
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return PICKLE
    if start[:4] != start[4:8] == bytes(4) and start[8:9] == b"{":
        return SAFETENSORS
    if len(start) >= 64 and not start.strip(b"\0"):
        return ZEROS
    return _kind_of_text(start)


def _kind_of_zip(start: bytes) -> FileKind:
    """Say what a zip archive is by the name of its first file."""
    first = start[30 : 30 + int.from_bytes(start[26:28], "little")]
    if first.endswith(b"/data.pkl"):
        return TORCH_ZIP
    if first.endswith(b".npy"):
        return NUMPY_ZIP
    return KERAS if first == b"metadata.json" else ZIP


def _kind_of_text(start: bytes) -> FileKind | None:
    if start.startswith(LFS[: max(8, len(start))]):
        size = LFS_SIZE.search(start)
        return FileKind(
            f"a git-lfs pointer, not the file itself{f', which has {format_size(int(size[1]))}' if size else ''}",
            "Run `git lfs install` and `git lfs pull` in the model's folder, or download the model again.",
            is_stand_in=True,
        )
    plain = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if HTML_START.match(plain):
        return HTML
    if XML_START.match(plain):
        return XML
    try:
        text = plain[: SNIFFED_BYTES - 4].decode("utf-8")
    except UnicodeDecodeError:
        return None
    if not text or any(not c.isprintable() and c not in "\t\r\n" for c in text):
        return None
    if text[0] in "{[":
        return _kind_of_json(text)
    keys = set(YAML_KEY.findall(text))
    if keys:
        return TASKS if keys == {"tasks"} else RECIPE
    line = text.splitlines()[0]
    shown = line if len(line) <= SHOWN else f"{line[:SHOWN]}..."
    return FileKind(f"text that begins with {shown!r}", AGAIN, may_be_yaml=True)


def _kind_of_json(text: str) -> FileKind:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if (kind := error_message(value)) is not None:
        return kind
    named = next((kind for key, kind in JSON_KEYS if re.search(rf'"{key}"\s*:', text)), None)
    return named or JSON


def error_message(value: Any) -> FileKind | None:
    """Say that a JSON value is a server's error message, saved as a file; None if it is something else.

    >>> error_message({"error": "Repository not found"}).name, error_message({"error": 0.5}) is None
    ("a server's error message ('Repository not found')", True)
    """
    if not isinstance(value, dict) or not 0 < len(value) <= len(ERROR_KEYS) or not value.keys() <= ERROR_KEYS:
        return None
    stated = next((v for k in ("error", "message", "detail") if isinstance(v := value.get(k), str) and v), "")
    if not stated:
        return None
    shown = stated if len(stated) <= SHOWN else f"{stated[:SHOWN]}..."
    return FileKind(f"a server's error message ({shown!r})", AGAIN, is_stand_in=True)


def kind_by_name(names: Iterable[str]) -> tuple[str, FileKind] | None:
    """Return the first of some files whose name shows a format that is not read, and what it is.

    >>> kind_by_name(["README.md", "llama.Q4_K_M.gguf"])[0]
    'llama.Q4_K_M.gguf'
    """
    return next(
        (
            (name, kind)
            for name in sorted(names)
            for ending, kind in ENDINGS.items()
            if name.lower().endswith(ending)
        ),
        None,
    )


def not_yaml(start: bytes, name: str, *others: FileKind) -> FileKind | None:
    """Say what a file is that is given as YAML and is not, or is one of ``others``; None if it may be meant.

    A name says it too, for a pickle among others, which may begin as text.
    """
    kind = kind_of(start)
    if kind is None:
        by_name = kind_by_name([name])
        return by_name[1] if by_name else None
    return kind if kind in others or not kind.may_be_yaml else None


def refuse_other(start: bytes, where: object, expected: str, *allowed: FileKind) -> None:
    """Refuse a file that its first bytes show to be something else than ``expected``.

    ``allowed`` are the kinds that are expected. Errors: ModelError.
    """
    kind = kind_of(start)
    if kind is not None and kind not in allowed:
        raise ModelError(f"{where}: is {kind.name}; expected {expected}. {kind.advice}")
