"""Malformed safetensors, indices, configs and statistics, each with the check that refuses it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alnico.checkpoint import sidecars
from alnico.checkpoint.json_files import MAX_JSON_BYTES, MAX_JSON_DEPTH, read_json
from alnico.checkpoint.open_model import open_headers
from alnico.checkpoint.statistics import SUMMARY, TENSORS, open_statistics
from alnico.checkpoint.weight_files import INDEX
from hostile.malformed import Malformed, Read, reading, save, save_json

ONE = {"w": ("F32", (2,))}


def framed(text: bytes | str, data: int = 8, length: int | None = None, rest: bytes = b""):
    """A file of a header's text and so many bytes of data."""

    def make(folder: Path) -> Read:
        raw = text if isinstance(text, bytes) else text.encode()
        size = len(raw) if length is None else length
        (folder / "m.safetensors").write_bytes(size.to_bytes(8, "little") + raw + bytes(data) + rest)
        return reading(folder / "m.safetensors")

    return make


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def header(data: int = 8, **entries: Any):
    return framed(json.dumps(entries), data)


def raw(content: bytes, name: str = "m.safetensors"):
    def make(folder: Path) -> Read:
        (folder / name).write_bytes(content)
        return reading(folder / name)

    return make


def in_a_module(path: Callable[[], str], most: int = 0):
    """A model with a module that holds folders; ``most`` entries are allowed in it."""

    def make(folder: Path) -> Read:
        save(folder / "model.safetensors", ONE)
        save_json(folder / "modules.json", [{"path": "1_Pooling"}])
        (folder / "1_Pooling" / path()).mkdir(parents=True, exist_ok=True)
        read = reading(folder)

        def bounded() -> object:
            with pytest.MonkeyPatch.context() as patch:
                if most:
                    patch.setattr(sidecars, "MAX_ENTRIES", most)
                return read()

        return bounded

    return make


def directory(*, index: Any = None, config: Any = None, **files: Any):
    """A model directory with files of one tensor each, named by their key with ``_`` for what a name cannot have."""

    def make(folder: Path) -> Read:
        for name, tensors in files.items():
            save(folder / f"{name}.safetensors", tensors)
        if index is not None:
            save_json(folder / INDEX, index)
        if config is not None:
            save_json(folder / "config.json", config)
        return reading(folder)

    return make


def outside(folder: Path) -> Read:
    save(folder / "secret" / "s.safetensors", ONE)
    (folder / "model").mkdir()
    (folder / "model" / "model.safetensors").symlink_to(folder / "secret" / "s.safetensors")
    return reading(folder / "model")


def escaping(folder: Path) -> Read:
    save(folder / "secret" / "s.safetensors", ONE)
    save_json(folder / "model" / INDEX, {"weight_map": {"w": "../secret/s.safetensors"}})
    return reading(folder / "model")


def pipe(folder: Path) -> Read:
    """A pipe that nobody writes. One process holds it open, so that a reader that opens it gets no bytes instead of waiting."""
    (folder / "m").mkdir()
    os.mkfifo(folder / "m" / "model.safetensors")
    return lambda: reading(folder / "m")()


def unreadable(folder: Path) -> Read:
    """A name that is there when the folder is looked at, and leads round in a circle when it is opened."""
    (folder / "m").mkdir()
    (folder / "m" / "model.safetensors").symlink_to("model.safetensors")
    return reading(folder / "m")


def sparse_config(folder: Path) -> Read:
    save(folder / "model.safetensors", ONE)
    (folder / "config.json").touch()
    os.truncate(folder / "config.json", MAX_JSON_BYTES + 1)
    return reading(folder)


def pickles(folder: Path) -> Read:
    for name in ("a.pt", "b.pt"):
        (folder / name).write_bytes(b"")
    return reading(folder)


def adapter(folder: Path) -> Read:
    save(folder / "adapter_model.safetensors", ONE)
    save_json(folder / "adapter_config.json", {})
    return reading(folder)


def statistics(summary: Any, tensors: Any = ONE, number: str | None = None):
    def make(folder: Path) -> Read:
        save_json(folder / SUMMARY, summary)
        save(folder / TENSORS, tensors)

        def read() -> None:
            opened = open_statistics(str(folder))
            opened.close()
            if number is not None:
                opened.number("w", number)

        return read

    return make


def asked(name: str, tensors: Any):
    def make(folder: Path) -> Read:
        from alnico.checkpoint.open_model import open_model

        path = save(folder / "m.safetensors", tensors)

        def read() -> None:
            with open_model(path) as model:
                model.read(name)

        return read

    return make


def measured(**keys: Any) -> dict[str, Any]:
    return {"schema": 1, "kind": "fisher", "tensors": {"w": {"digest": "0a", **keys}}}


DEEP = '{"a": ' + "[" * MAX_JSON_DEPTH + "]" * MAX_JSON_DEPTH + "}"


def factors(folder: Path) -> Read:
    save(folder / "m.safetensors", {"q.lora_A.weight": ("F32", [2, 8]), "q.lora_B.weight": ("F32", [8, 2])})
    return reading(folder / "m.safetensors")


def pipeline(folder: Path) -> Read:
    save(folder / "unet" / "diffusion_pytorch_model.safetensors", {"w": ("F32", [2])})
    save_json(folder / "model_index.json", {})
    return reading(folder)


def parts(**others: Any):
    """A pipeline whose U-Net is whole; of each other part it has the config, or no folder."""

    def make(folder: Path) -> Read:
        listed = {part: ["diffusers", "A"] for part in ("unet", *others)}
        save_json(folder / "model_index.json", listed)
        save(folder / "unet" / "diffusion_pytorch_model.safetensors", ONE)
        for part, config in others.items():
            if config is not None:
                save_json(folder / part / "config.json", config)
        return reading(folder)

    return make


def forgotten(folder: Path) -> Read:
    for i in (1, 2):
        save(folder / f"m-0000{i}-of-00002.safetensors", {f"w{i}": ("F32", [2])})
    save_json(folder / "model.safetensors.index.json", {"weight_map": {"w1": "m-00001-of-00002.safetensors"}})
    return reading(folder)


def of_ours(text: str) -> Callable[[Path], Read]:
    """A file that alnico writes, changed by somebody."""

    def make(folder: Path) -> Read:
        (folder / "alnico.lock.json").write_text(text)
        return lambda: read_json(folder / "alnico.lock.json", is_ours=True)

    return make


MODEL_FILES = (
    Malformed("duplicate key", "duplicate key", of_ours('{"a": 1, "a": 2}')),
    Malformed("is not a JSON number", "is not a JSON number", of_ours('{"a": Infinity}')),
    # header.py
    Malformed("{}: is {}; expected {}. {}", "is a git-lfs pointer, not the file itself, which has 9 B; expected safetensors", raw(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")),
    Malformed("holds folders nested deeper than", "holds folders nested deeper than 100", in_a_module(lambda: "/".join(["d"] * 120))),
    Malformed("holds more than {} files and folders", "holds more than 5 files and folders", in_a_module(lambda: "d/d/d/d/d/d", 5)),
    Malformed("the file has {} bytes; a safetensors file begins", "begins with an 8-byte header length", raw(b"\1\0\0")),
    Malformed("the header claims {} bytes; at most {} are allowed", "are allowed", framed("{}", length=1 << 40)),
    Malformed("the header claims {} bytes, the file has {}", "the header claims 99 bytes, the file has 18", framed("{}", length=99)),
    Malformed("tensors {} and {} overlap", "overlap at byte 4", header(12, a=entry(), b=entry(offsets=(4, 12)))),
    Malformed("belong to no tensor; gaps are not allowed", "bytes 8 to 12 of the data", header(20, a=entry(), b=entry(offsets=(12, 20)))),
    Malformed("they must end together", "they must end together", header(9, w=entry())),
    Malformed("the header names {} twice", "names 'w' twice", framed('{"w": 1, "w": ' + json.dumps(entry()) + "}")),
    Malformed("the header begins with {}, expected", "the header begins with b' '", framed(" " + json.dumps({"w": entry()}))),
    Malformed("the header is not JSON", "the header is not JSON (JSONDecodeError", framed("{]")),
    Malformed("__metadata__ must map strings to strings", "__metadata__ must map", header(w=entry(), __metadata__={"a": 1})),
    Malformed("{} is an unpaired surrogate; expected Unicode text", "is an unpaired surrogate", framed(json.dumps({"\ud800": entry()}))),
    Malformed("{} | dtype, shape and data_offsets", "has the keys ['data_offsets', 'dtype', 'shape', 'x']", header(w=entry(x=1))),
    Malformed("has the unknown dtype", "has the unknown dtype 'F33'", header(w=entry(dtype="F33"))),
    Malformed("the shape {} | a list of at most {} sizes", "a list of at most 64 sizes", header(w=entry(shape=[1] * 64 + [2]))),
    Malformed("two byte positions, none negative", "two byte positions", header(w=entry(offsets=(0, 8, 9)))),
    Malformed("an end not before the begin", "an end not before the begin", header(0, w=entry(shape=(0,), offsets=(8, 0)))),
    Malformed("{}: tensor {} ends at byte {}, the file has {}. The file is truncated", "The file is truncated", header(4, w=entry())),
    Malformed("{} bytes | {} for shape {} of {}", "has 8 bytes; expected 12 bytes", header(w=entry(shape=(3,)))),
    # files.py
    Malformed("{}: cannot be opened ({})", "cannot be opened (Too many levels of symbolic links)", lambda folder: lambda: __import__("alnico.checkpoint.files", fromlist=["x"]).open_to_read(circle(folder))),
    Malformed("is a folder, a pipe or a device", "is a folder, a pipe or a device", pipe),
    Malformed("{}: is larger than {} bytes; expected {}. Check the model.", "expected a small JSON file", sparse_config),
    Malformed("{}: is a link to {}, outside the model's directory", "outside the model's directory; expected a file inside it. If you trust", outside),
    # model.py
    Malformed("expected it in one file", "expected it in one file", directory(a=ONE, b=ONE)),
    Malformed("has no tensor {}. `alnico inspect`", "has no tensor 'x'", asked("x", ONE)),
    Malformed("cannot be read as numbers, only copied", "F8_E8M0 cannot be read as numbers", asked("w", {"w": ("F8_E8M0", (2,))})),
    Malformed("its files cannot be read", "its files cannot be read (File name too long)", lambda folder: lambda: open_headers(folder / ("x" * 300))),
    Malformed("{}: cannot be read ({}). Check the path and its permissions.", "cannot be read (File name too long)", lambda folder: reading(folder / ("x" * 300))),
    Malformed("and not base+adapter; expected two paths", "and not base+adapter", lambda folder: reading(f"{folder}/a+{folder}/b")),
    Malformed("expected a directory with safetensors files, one such file, or", "no such directory or file; expected a directory", lambda folder: reading(folder / "none")),
    Malformed("{}: is not JSON ({})", "is not JSON (Expecting", directory(model=ONE, config="{]")),
    Malformed("{}: is not JSON, but {}. {}", "is not JSON, but an HTML page. Download the file itself", directory(model=ONE, config="<!doctype html>")),
    Malformed("{}: holds {}, not the file itself. {}", "holds a server's error message ('Entry not found'), not the file itself", directory(model=ONE, config={"error": "Entry not found"})),
    Malformed("holds a JSON {}, expected an object", "holds a JSON list", directory(model=ONE, config=[1])),
    Malformed("is nested deeper than {} levels; expected a file that describes", "is nested deeper than 100", directory(model=ONE, config=DEEP)),
    Malformed("{}: contains half of a character (a lone surrogate); expected Unicode text", "contains half of a character", directory(model=ONE, config='{"a": "\\ud800"}')),
    Malformed("is a LoRA adapter, expected a whole model", "is a LoRA adapter", adapter),
    Malformed("is an adapter ({} of its {} tensors", "is an adapter (2 of its 2 tensors", factors),
    Malformed("a difference of models; expected a whole model", "is a task vector of base", header(__metadata__={"alnico.kind": "task vector", "alnico.base": "base"}, w=entry())),
    Malformed("lists no part of a pipeline that has weights", "lists no part of a pipeline that has weights", pipeline),
    Malformed("lists the part {}, which has no folder", "lists the part 'vae', which has no folder", parts(vae=None)),
    Malformed("has config.json and no .safetensors or .bin file", "vae: has config.json and no .safetensors", parts(vae={"_class_name": "AutoencoderKL"})),
    Malformed("has no .safetensors or .bin file", "has no .safetensors or .bin file", lambda folder: reading(folder)),
    Malformed("has {} checkpoints ({}), expected one", "has 2 checkpoints", pickles),
    Malformed("shards of one model, or an index", "m-00002-of-00002.safetensors is missing", directory(**{"m-00001-of-00002": ONE})),
    Malformed("does not list {}, which is in the same folder", "does not list m-00002-of-00002.safetensors", forgotten),
    Malformed("has no weight_map from tensor names to files", "has no weight_map", directory(model=ONE, index={"weight_map": {"w": 1}})),
    Malformed("places tensor {} in {}, outside the model's directory", "places tensor 'w' in '../secret/s.safetensors', outside", escaping),
    Malformed("lists {}, which does not exist", "which does not exist. Complete", directory(model=ONE, index={"weight_map": {"w": "x.safetensors"}})),
    Malformed("says that {} is in {}, which does not hold it", "which does not hold it", directory(a=ONE, index={"weight_map": {"w": "a.safetensors", "v": "a.safetensors"}})),
    Malformed("holds {}, which {} does not list", "does not list (1 such tensors)", directory(a={**ONE, "v": ONE["w"]}, index={"weight_map": {"w": "a.safetensors"}})),
    # statistics.py
    Malformed("has no {} of {}; expected what `alnico statistics {}`", "has no rows of w", statistics(measured(), number="rows")),
    Malformed("statistics {}: {}; expected a directory written by `alnico statistics`. {}", "does not exist; expected", lambda folder: lambda: open_statistics(str(folder / "none"))),
    Malformed("does not hold statistics of schema", "does not hold statistics of schema 1", statistics({**measured(), "schema": 2})),
    Malformed("{}: is damaged ({}). Measure the model again.", "is damaged ('digest')", statistics({**measured(), "tensors": {"w": {}}})),
    Malformed("names {}, which {} does not hold", "names 'g', which", statistics(measured(stored="g"))),
)  # fmt: skip


def circle(folder: Path) -> Path:
    path = folder / "circle"
    if not path.is_symlink():
        path.symlink_to("circle")
    return path
