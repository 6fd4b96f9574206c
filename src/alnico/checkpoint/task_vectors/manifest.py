"""Reads and writes ``taskvector.json``, the manifest of a stored task vector, and checks what it declares."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from alnico.checkpoint.files import check_inside
from alnico.checkpoint.json_files import read_json
from alnico.errors import ModelError
from alnico.numerics.dtypes import DTYPES

MANIFEST = "taskvector.json"
FORMAT = "alnico task vector"
FORMAT_VERSION = 1

TENSORS = "taskvector.safetensors"
"""The file of the tensors, if there is one; larger vectors have shards and an index, as models do."""

Encoding = Literal["absent", "sparse", "whole", "difference", "low_rank", "top_k", "sign", "int4", "adapter"]
"""How a tensor's change is stored. See docs/task-vector-format.md."""

EXACT: tuple[Encoding, ...] = ("absent", "sparse", "whole")
"""Encodings that hold new values: the fine-tune's bits come back."""

PARTS: Mapping[Encoding, tuple[str, ...]] = {
    "absent": (),
    "sparse": ("indices", "values"),
    "whole": ("values",),
    "difference": ("values",),
    "low_rank": ("left", "right"),
    "top_k": ("indices", "values"),
    "sign": ("bits", "scales"),
    "int4": ("codes", "scales", "minimums"),
    "adapter": (),
}
"""The stored tensors of each encoding. A tensor of ``adapter`` is what PEFT's files say of it."""

GROUP = 128
"""Entries of a group of ``int4``, which share a scale and a minimum."""

MAX_TENSORS = 1_000_000
MAX_FILES = 10_000
MAX_TEXT = 100_000
"""Most characters of a text for people, and most entries of a list of words."""
MAX_WORD = 200
MAX_ELEMENTS = 1 << 48
"""Most elements of a tensor: beyond any model, and far below what would overflow a size in bytes."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
"""The name of a task vector, and that of a version: safe as the name of a folder. ``..`` is refused too."""

SHA256 = re.compile(r"[0-9a-f]{64}")
XXH3 = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class StoredFile:
    """A file with its size in bytes and the SHA-256 of its content; None where it is not known."""

    size: int
    sha256: str | None = None


@dataclass(frozen=True)
class ModelIdentity:
    """Which model a task vector was made of.

    ``root`` is the SHA-256 over the sorted lines ``SHA256  SIZE  NAME`` of its weight files, each with a newline at its end;
    it and ``files`` are absent for models in memory. ``dtype`` is the most frequent one. ``vocabulary`` is the SHA-256 of
    its tokens with their ids.
    """

    id: str | None = None
    revision: str | None = None
    root: str | None = None
    files: Mapping[str, StoredFile] = field(default_factory=dict)
    dtype: str | None = None
    vocabulary: str | None = None
    licence: str | None = None


@dataclass(frozen=True)
class TensorEntry:
    """How one tensor is stored.

    ``dtype`` and ``shape`` are those of the fine-tune's tensor. ``base`` and ``finetuned`` are the xxh3 hashes of the whole
    tensors, as in locks; ``base`` is None for a tensor that the base does not have, and both are None where nothing was
    measured (an adapter without its base). ``stored`` maps the parts of the encoding to the names of tensors in the files,
    and ``digests`` the same parts to their hashes. ``error`` is ``|D' - D| / |D|`` for the difference D and what is
    decoded, D'; 0 for exact encodings. ``norm`` is ``|D|``, and ``byte_size`` the size of the parts. ``scale`` multiplies what is
    decoded. ``sketch`` holds the sketches of D and of its signs.
    """

    encoding: Encoding
    dtype: str
    shape: tuple[int, ...]
    base: str | None = None
    finetuned: str | None = None
    stored: Mapping[str, str] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    scale: float = 1.0
    error: float = 0.0
    norm: float = 0.0
    byte_size: int = 0
    sketch: tuple[bytes, ...] = ()

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Evaluation:
    """A score of ``base + scale * vector`` on a task, and that of the base; each with the number of examples."""

    task: str
    metric: str
    value: float
    base: float | None = None
    scale: float = 1.0
    examples: int | None = None


@dataclass(frozen=True)
class SafeScale:
    """The suggested coefficient, and the range that was tried and is known to work."""

    suggested: float = 1.0
    least: float | None = None
    most: float | None = None


@dataclass(frozen=True)
class Manifest:
    """What ``taskvector.json`` says. ``files`` are the other files of the folder; ``left_out`` names tensors of
    the two models that are not part of the vector, with the reason. ``kind`` ``adapter`` is a PEFT adapter as it is."""

    name: str
    base: ModelIdentity
    finetuned: ModelIdentity
    tensors: Mapping[str, TensorEntry]
    files: Mapping[str, StoredFile] = field(default_factory=dict)
    kind: Literal["difference", "adapter"] = "difference"
    description: str = ""
    tasks: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    licence: str | None = None
    training: str = ""
    evaluations: tuple[Evaluation, ...] = ()
    scale: SafeScale = SafeScale()
    added_tokens: Mapping[str, int] = field(default_factory=dict)
    chat_template: str | None = None
    """The name of a file in the folder."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    producer: str = ""

    @property
    def is_exact(self) -> bool:
        """Do all tensors come back with the fine-tune's bits?"""
        return all(t.encoding in EXACT for t in self.tensors.values())

    @property
    def norm(self) -> float:
        return math.hypot(*(t.norm for t in self.tensors.values()))

    @property
    def error(self) -> float:
        """``|D' - D| / |D|`` over all tensors."""
        lost = math.hypot(*(t.error * t.norm for t in self.tensors.values()))
        return lost / self.norm if self.norm else 0.0

    @property
    def byte_size(self) -> int:
        """The size of all files of the folder, without the manifest."""
        return sum(f.size for f in self.files.values())


def format_manifest(manifest: Manifest) -> str:
    """Return the text of ``taskvector.json``: one line per tensor, without what is absent.

    Errors: ModelError for a manifest that could not be read again.
    """
    data = {"format": FORMAT, "version": FORMAT_VERSION, **_plain(manifest)}
    lines = []
    for key, value in data.items():
        if key in ("tensors", "files") and value:
            rows = ",\n".join(f"  {_json(name)}: {_json(entry)}" for name, entry in value.items())
            lines.append(f" {_json(key)}: {{\n{rows}\n }}")
        else:
            lines.append(f" {_json(key)}: {_json(value)}")
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    parse_manifest(json.loads(text), MANIFEST)
    return text


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a folder. Errors: ModelError naming the file and what is wrong in it."""
    path = folder / MANIFEST
    check_inside(path, folder)
    return parse_manifest(read_json(path, is_ours=True), str(path))


def parse_manifest(data: Mapping[str, Any], where: str) -> Manifest:
    """Check and return what a manifest declares. Errors: ModelError, which begins with ``where``."""
    return _Reader(where).manifest(data)


def is_name(text: object) -> bool:
    """Is a text the name of a task vector or of a version?

    >>> [is_name(n) for n in ("sql", "sql.v2", "..", "a..b", "a/b", "", ".hidden")]
    [True, True, False, False, False, False, False]
    """
    return isinstance(text, str) and NAME.fullmatch(text) is not None and ".." not in text


def is_file_name(text: object) -> bool:
    """Is a text the plain name of a file in the folder of a task vector? Names of folders are not allowed."""
    return is_name(text) and text != MANIFEST


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    """Return a dataclass as JSON, without fields that have their default value."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        entries = {}
        for one in dataclasses.fields(value):
            own = getattr(value, one.name)
            missing = dataclasses.MISSING
            default = one.default_factory() if one.default_factory is not missing else one.default
            if default is missing or own != default or one.name in ("kind", "error"):
                entries[one.name] = _plain(own)
        return entries
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    return [_plain(v) for v in value] if isinstance(value, (tuple, list)) else value


class _Reader:
    """Checks the values of one manifest. Every check names the place of the value."""

    def __init__(self, where: str) -> None:
        self._where = where

    def wrong(self, at: str, found: object, expected: str) -> ModelError:
        shown = repr(found)
        shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
        return ModelError(
            f"{self._where}: {at} is {shown}; expected {expected}. The task vector is damaged or not one: get it again."
        )

    def manifest(self, data: Mapping[str, Any]) -> Manifest:
        if data.get("format") != FORMAT:
            raise self.wrong("format", data.get("format"), repr(FORMAT))
        version = data.get("version")
        if type(version) not in (int, float) or version != FORMAT_VERSION:
            raise ModelError(
                f"{self._where}: has version {version!r:.40} of the format; this alnico reads version {FORMAT_VERSION}. "
                "Update alnico, or get another version of the task vector."
            )
        self.keys("", data, (*_fields(Manifest), "format", "version"))
        tensors = self.mapping("tensors", data.get("tensors"), MAX_TENSORS)
        result = Manifest(
            name=self.name("name", data.get("name")),
            base=self.identity("base", data.get("base")),
            finetuned=self.identity("finetuned", data.get("finetuned")),
            tensors={self.tensor_name(n): self.tensor(f"tensors[{n!r:.80}]", e) for n, e in tensors.items()},
            files=self.files("files", data.get("files", {}), is_file_name),
            kind=self.choice("kind", data.get("kind", "difference"), ("difference", "adapter")),
            description=self.text("description", data.get("description", ""), MAX_TEXT),
            tasks=self.words("tasks", data.get("tasks", [])),
            languages=self.words("languages", data.get("languages", [])),
            licence=self.word("licence", data.get("licence")),
            training=self.text("training", data.get("training", ""), MAX_TEXT),
            evaluations=self.evaluations(data.get("evaluations", [])),
            scale=self.safe_scale(data.get("scale", {})),
            added_tokens={
                self.text(f"added_tokens[{t!r:.40}]", t, MAX_WORD): self.whole(f"added_tokens[{t!r:.40}]", i)
                for t, i in self.mapping("added_tokens", data.get("added_tokens", {}), MAX_TENSORS).items()
            },
            chat_template=self.word("chat_template", data.get("chat_template")),
            left_out={
                self.tensor_name(n): self.text(f"left_out[{n!r:.80}]", why, MAX_TEXT)
                for n, why in self.mapping("left_out", data.get("left_out", {}), MAX_TENSORS).items()
            },
            producer=self.text("producer", data.get("producer", ""), MAX_WORD),
        )
        if result.chat_template is not None and result.chat_template not in result.files:
            raise self.wrong("chat_template", result.chat_template, "the name of one of its files")
        return result

    def keys(self, at: str, data: Mapping[str, Any], known: Sequence[str]) -> None:
        for key in data:
            if key not in known:
                raise self.wrong(f"the key {at}{'.' if at else ''}{key!r:.60}", "unknown", ", ".join(known))

    def tensor(self, at: str, data: Any) -> TensorEntry:
        data = self.mapping(at, data, 100)
        self.keys(at, data, _fields(TensorEntry))
        encoding = self.choice(f"{at}.encoding", data.get("encoding"), get_args(Encoding))
        dtype = self.choice(f"{at}.dtype", data.get("dtype"), tuple(DTYPES))
        shape = tuple(
            self.whole(f"{at}.shape", n) for n in self.sequence(f"{at}.shape", data.get("shape"), 32)
        )
        if math.prod(shape) > MAX_ELEMENTS:
            raise self.wrong(f"{at}.shape", list(shape), f"at most {MAX_ELEMENTS} elements")
        parts = PARTS[encoding]
        stored = self.mapping(f"{at}.stored", data.get("stored", {}), 10)
        digests = self.mapping(f"{at}.digests", data.get("digests", {}), 10)
        for key, given in (("stored", stored), ("digests", digests)):
            if tuple(sorted(given)) != tuple(sorted(parts)):
                raise self.wrong(
                    f"{at}.{key}", sorted(given), f"{', '.join(parts) or 'nothing'} for {encoding}"
                )
        return TensorEntry(
            encoding=encoding,
            dtype=dtype,
            shape=shape,
            base=self.hash(f"{at}.base", data.get("base"), XXH3),
            finetuned=self.hash(f"{at}.finetuned", data.get("finetuned"), XXH3),
            stored={p: self.tensor_name(stored[p]) for p in parts},
            digests={p: self.digest(f"{at}.digests.{p}", digests[p]) for p in parts},
            scale=self.number(f"{at}.scale", data.get("scale", 1.0)),
            error=self.number(f"{at}.error", data.get("error", 0.0), least=0.0),
            norm=self.number(f"{at}.norm", data.get("norm", 0.0), least=0.0),
            byte_size=self.whole(f"{at}.byte_size", data.get("byte_size", 0)),
            sketch=tuple(
                self.bytes(f"{at}.sketch", s)
                for s in self.sequence(f"{at}.sketch", data.get("sketch", []), 2)
            ),
        )

    def identity(self, at: str, data: Any) -> ModelIdentity:
        data = self.mapping(at, data, 100)
        self.keys(at, data, _fields(ModelIdentity))
        dtype = data.get("dtype")
        return ModelIdentity(
            id=self.word(f"{at}.id", data.get("id")),
            revision=self.word(f"{at}.revision", data.get("revision")),
            root=self.hash(f"{at}.root", data.get("root"), SHA256),
            files=self.files(f"{at}.files", data.get("files", {}), _is_relative),
            dtype=None if dtype is None else self.choice(f"{at}.dtype", dtype, tuple(DTYPES)),
            vocabulary=self.hash(f"{at}.vocabulary", data.get("vocabulary"), SHA256),
            licence=self.word(f"{at}.licence", data.get("licence")),
        )

    def files(self, at: str, data: Any, is_allowed: Callable[[object], bool]) -> dict[str, StoredFile]:
        files: dict[str, StoredFile] = {}
        for name, entry in self.mapping(at, data, MAX_FILES).items():
            if not is_allowed(name):
                raise self.wrong(
                    f"{at}: the name {name!r:.80}", "not allowed", "the name of a file in its folder"
                )
            entry = self.mapping(f"{at}[{name!r}]", entry, 10)
            self.keys(f"{at}[{name!r}]", entry, _fields(StoredFile))
            sha256 = self.hash(f"{at}[{name!r}].sha256", entry.get("sha256"), SHA256)
            if sha256 is None and at == "files":
                raise self.wrong(f"{at}[{name!r}].sha256", None, "64 hexadecimal digits")
            files[name] = StoredFile(self.whole(f"{at}[{name!r}].size", entry.get("size")), sha256)
        return files

    def evaluations(self, data: Any) -> tuple[Evaluation, ...]:
        results = []
        for i, entry in enumerate(self.sequence("evaluations", data, 10_000)):
            at = f"evaluations[{i}]"
            entry = self.mapping(at, entry, 20)
            self.keys(at, entry, _fields(Evaluation))
            base, examples = entry.get("base"), entry.get("examples")
            results.append(
                Evaluation(
                    task=self.text(f"{at}.task", entry.get("task"), MAX_WORD),
                    metric=self.text(f"{at}.metric", entry.get("metric"), MAX_WORD),
                    value=self.number(f"{at}.value", entry.get("value")),
                    base=None if base is None else self.number(f"{at}.base", base),
                    scale=self.number(f"{at}.scale", entry.get("scale", 1.0)),
                    examples=None if examples is None else self.whole(f"{at}.examples", examples),
                )
            )
        return tuple(results)

    def safe_scale(self, data: Any) -> SafeScale:
        data = self.mapping("scale", data, 10)
        self.keys("scale", data, _fields(SafeScale))
        least, most = (
            None if data.get(k) is None else self.number(f"scale.{k}", data[k]) for k in ("least", "most")
        )
        return SafeScale(self.number("scale.suggested", data.get("suggested", 1.0)), least, most)

    def mapping(self, at: str, value: Any, most: int) -> Mapping[str, Any]:
        if not isinstance(value, dict) or len(value) > most:
            raise self.wrong(at, value, f"an object of at most {most} keys")
        return value

    def sequence(self, at: str, value: Any, most: int) -> Sequence[Any]:
        if not isinstance(value, list) or len(value) > most:
            raise self.wrong(at, value, f"a list of at most {most} values")
        return value

    def text(self, at: str, value: Any, most: int) -> str:
        if not isinstance(value, str) or len(value) > most:
            raise self.wrong(at, value, f"a text of at most {most} characters")
        return value

    def word(self, at: str, value: Any) -> str | None:
        return None if value is None else self.text(at, value, MAX_WORD)

    def words(self, at: str, value: Any) -> tuple[str, ...]:
        return tuple(self.text(at, word, MAX_WORD) for word in self.sequence(at, value, 1000))

    def name(self, at: str, value: Any) -> str:
        if not is_name(value):
            raise self.wrong(at, value, "letters, digits, '.', '_' and '-', without '..'")
        return str(value)

    def tensor_name(self, value: Any) -> str:
        if not isinstance(value, str) or not 0 < len(value) <= 2000:
            raise self.wrong("the name of a tensor", value, "a text of 1 to 2000 characters")
        return value

    def choice(self, at: str, value: Any, choices: Sequence[str]) -> Any:
        if not isinstance(value, str) or value not in choices:
            raise self.wrong(at, value, f"one of {', '.join(choices)}")
        return value

    def whole(self, at: str, value: Any) -> int:
        if type(value) is float and value.is_integer() and abs(value) < 1 << 53:
            value = int(value)  # 2.0 is the number 2 in JSON
        if type(value) is not int or not 0 <= value < 1 << 63:
            raise self.wrong(at, value, "a whole number, 0 or more")
        return value

    def number(self, at: str, value: Any, least: float = -math.inf) -> float:
        if type(value) not in (int, float) or not abs(value) <= 1.7e308 or value < least:
            raise self.wrong(at, value, "a finite number" if least < 0 else "a finite number, 0 or more")
        return float(value)

    def hash(self, at: str, value: Any, pattern: re.Pattern[str]) -> str | None:
        if value is not None and (not isinstance(value, str) or not pattern.fullmatch(value)):
            raise self.wrong(at, value, f"{64 if pattern is SHA256 else 32} hexadecimal digits")
        return value

    def digest(self, at: str, value: Any) -> str:
        if self.hash(at, value, XXH3) is None:
            raise self.wrong(at, value, "32 hexadecimal digits")
        return str(value)

    def bytes(self, at: str, value: Any) -> bytes:
        try:
            return base64.b64decode(self.text(at, value, 10_000), validate=True)
        except (binascii.Error, ValueError):
            raise self.wrong(at, value, "base64") from None


def _fields(kind: type) -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(kind))


def _is_relative(name: object) -> bool:
    """Is it the name of a file of a model, below its folder?"""
    if not isinstance(name, str) or not 0 < len(name) <= 1000:
        return False
    return all(part not in ("", ".", "..") for part in name.split("/")) and "\\" not in name
