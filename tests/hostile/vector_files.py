"""Malformed task vectors and training runs, each with the check that refuses it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alnico.checkpoint.task_vectors import delta_chain
from alnico.checkpoint.task_vectors.stored_vector import open_vector
from hostile.malformed import Malformed, Read, reading
from made import save_file, save_model
from made_vectors import write_manifest, write_vector

A = np.arange(12, dtype=np.float32).reshape(3, 4)
B = A.copy()
B[1, 1] = 50
BASE = {"a.weight": ("F32", A), "b.weight": ("F32", A)}
TUNED = {"a.weight": ("F32", B), "b.weight": ("F32", A + 1)}
ENCODINGS = {"a.weight": "sparse", "b.weight": "difference"}
Change = Callable[[dict[str, Any]], object]


def write(folder: Path) -> dict[str, Any]:
    save_model(folder / "base", BASE, {"model_type": "llama"})
    return write_vector(folder / "vector", BASE, TUNED, ENCODINGS)


def manifest(change: Change) -> Callable[[Path], Read]:
    """A task vector whose manifest was changed."""

    def make(folder: Path) -> Read:
        data = write(folder)
        change(data)
        (folder / "vector/taskvector.json").write_text(json.dumps(data))
        return reading(f"{folder / 'base'}+{folder / 'vector'}")

    return make


def entry(**changes: Any) -> Callable[[Path], Read]:
    """A task vector with other values in the entry of its first tensor."""
    return manifest(lambda data: data["tensors"]["a.weight"].update(changes))


def flipped(folder: Path) -> Read:
    write(folder)
    path = folder / "vector/taskvector.safetensors"
    data = bytearray(path.read_bytes())
    data[-20] ^= 1  # of the differences of b.weight
    path.write_bytes(data)
    return reading(f"{folder / 'base'}+{folder / 'vector'}")


def truncated(folder: Path) -> Read:
    data = write(folder)
    data["files"]["taskvector.safetensors"]["size"] += 4
    (folder / "vector/taskvector.json").write_text(json.dumps(data))
    return reading(f"{folder / 'base'}+{folder / 'vector'}")


def lying_index(folder: Path) -> Read:
    write(folder)
    index = {"weight_map": {"a.weight.indices": "other.safetensors"}}
    (folder / "vector/taskvector.safetensors.index.json").write_text(json.dumps(index))
    write_manifest(folder / "vector", json.loads((folder / "vector/taskvector.json").read_text()))
    return reading(f"{folder / 'base'}+{folder / 'vector'}")


def no_manifest(folder: Path) -> Read:
    (folder / "vector").mkdir()
    return lambda: open_vector(folder / "vector")


def other_name(folder: Path) -> Read:
    write(folder)

    def read() -> None:
        with open_vector(folder / "vector") as vector:
            vector.read("c.weight")

    return read


def enormous(folder: Path) -> Read:
    """A tensor of 2 PiB, of which two entries are stored."""
    values = {"i": ("I64", np.array([1, 5])), "v": ("F32", np.ones(2, np.float32))}
    save_file(folder / "vector/taskvector.safetensors", values)
    digests = {"indices": "", "values": ""}
    data = write(folder / "x")
    digests = dict.fromkeys(digests, data["tensors"]["a.weight"]["digests"]["values"])
    tensor = {"encoding": "top_k", "dtype": "F32", "shape": [1 << 24, 1 << 24], "stored": {"indices": "i", "values": "v"}, "digests": digests}  # fmt: skip
    write_manifest(folder / "vector", {**data, "tensors": {"a.weight": tensor}})

    def read() -> None:
        with open_vector(folder / "vector") as vector, pytest.MonkeyPatch.context() as patch:
            patch.setattr(vector, "check", lambda _: None)
            vector.read("a.weight")

    return read


def adapter(change: Change, *, flip: bool = False) -> Callable[[Path], Read]:
    """An adapter with a manifest."""

    def make(folder: Path) -> Read:
        save_model(folder / "base", BASE, {"model_type": "llama"})
        factors = {"base_model.model.a.lora_A.weight": ("F32", A[:1]), "base_model.model.a.lora_B.weight": ("F32", A[:, :1])}  # fmt: skip
        path = save_file(folder / "vector/adapter_model.safetensors", factors)
        config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["a"]}
        (folder / "vector/adapter_config.json").write_text(json.dumps(config))
        tensor = {"encoding": "adapter", "dtype": "F32", "shape": [3, 4]}
        data = {"format": "alnico task vector", "version": 1, "name": "x", "base": {}, "finetuned": {}, "kind": "adapter", "tensors": {"a.weight": tensor}}  # fmt: skip
        write_manifest(folder / "vector", data)
        change(data)
        (folder / "vector/taskvector.json").write_text(json.dumps(data))
        if flip:
            raw = bytearray(path.read_bytes())
            raw[-1] ^= 1
            path.write_bytes(raw)
        return reading(f"{folder / 'base'}+{folder / 'vector'}")

    return make


def unsorted(folder: Path) -> Read:
    write_run(
        folder / "run",
        {"a.weight.indices": ("I32", np.array([3, 2])), "a.weight.values": ("F32", np.ones(2, np.float32))},
    )
    return reading(f"{folder / 'run'}@1")


def write_run(run: Path, delta: Any, steps: tuple[int, ...] = (1,)) -> None:
    save_file(run / "anchors/step_0.safetensors", BASE)
    for step in steps:
        save_file(run / f"deltas/step_{step}.safetensors", delta)


def run(delta: Any, steps: tuple[int, ...] = (1,), step: int = 1, most: int = 0) -> Callable[[Path], Read]:
    """A training run with some deltas, of which a step is read; ``most`` deltas are allowed."""

    def make(folder: Path) -> Read:
        write_run(folder / "run", delta, steps)
        read = reading(f"{folder / 'run'}@{step}")

        def bounded() -> object:
            with pytest.MonkeyPatch.context() as patch:
                if most:
                    patch.setattr(delta_chain, "MAX_DELTAS", most)
                return read()

        return bounded

    return make


def file_of_deltas(folder: Path) -> Read:
    save_file(folder / "run/anchors/step_0.safetensors", BASE)
    (folder / "run/deltas").write_text("")
    return reading(f"{folder / 'run'}@0")


def saved(tensors: Any, **metadata: str) -> Callable[[Path], Read]:
    """What looks like a saved task vector."""

    def make(folder: Path) -> Read:
        save_model(folder / "base", BASE, {"model_type": "llama"})
        save_file(folder / "tau.safetensors", tensors, {"alnico.kind": "task vector", **metadata})
        return reading(f"{folder / 'base'}+{folder / 'tau.safetensors'}")

    return make


def in_place_of_a_model(folder: Path) -> Read:
    write(folder)
    return reading(folder / "vector")


def file_in_place_of_a_model(folder: Path) -> Read:
    write(folder)
    return reading(folder / "vector/taskvector.safetensors")


ONE_PLACE = {"a.weight.indices": ("I32", np.array([3])), "a.weight.values": ("F32", np.ones(1, np.float32))}
NARROW = {**ONE_PLACE, "a.weight.values": ("F16", np.ones(1, np.float32))}
ALONE = {"a.weight.values": ("F32", np.ones(1, np.float32))}
COMPRESSED = {"alnico.compressed": "rank 1"}


def without_sha256(data: dict[str, Any]) -> None:
    del data["files"]["taskvector.safetensors"]["sha256"]


def twice(data: dict[str, Any]) -> None:
    data["tensors"]["b.weight"] = {**data["tensors"]["a.weight"]}


def other_shape(data: dict[str, Any]) -> None:
    data["tensors"]["b.weight"]["shape"] = [4, 3]


VECTOR_FILES: tuple[Malformed, ...] = (
    Malformed("format | format | {}", "format is 'other'", manifest(lambda d: d.update(format="other"))),
    Malformed("has version {} of the format", "has version 2 of the format", manifest(lambda d: d.update(version=2))),
    Malformed("chat_template | {} | the name of", "chat_template is 'x'", manifest(lambda d: d.update(chat_template="x"))),
    Malformed("the key {}{}{} | unknown | {}", "the key 'more' is 'unknown'", manifest(lambda d: d.update(more=1))),
    Malformed("{}.shape | {} | at most {} elements", "expected at most 281474976710656 elements", entry(shape=[1 << 30, 1 << 30])),
    Malformed("{}.{} | {} | {} for {}", "expected indices, values for sparse", entry(digests={})),
    Malformed("{}: the name {} | not allowed | the name of", "the name '../x' is 'not allowed'", manifest(lambda d: d["files"].update({"../x": {"size": 1}}))),
    Malformed("{}[{}].sha256 | None | 64", ".sha256 is None; expected 64", manifest(without_sha256)),
    Malformed("{} | {} | an object of at most", "tensors is []; expected an object", manifest(lambda d: d.update(tensors=[]))),
    Malformed("{} | {} | a list of at most", "tasks is 'sql'; expected a list", manifest(lambda d: d.update(tasks="sql"))),
    Malformed("{} | {} | a text of at most", "description is 1; expected a text", manifest(lambda d: d.update(description=1))),
    Malformed("{} | {} | letters, digits", "name is '..'; expected letters", manifest(lambda d: d.update(name=".."))),
    Malformed("the name of a tensor | {}", "the name of a tensor is ''", manifest(lambda d: d.update(left_out={"": "x"}))),
    Malformed("{} | {} | one of {}", ".dtype is 'F128'; expected one of", entry(dtype="F128")),
    Malformed("{} | {} | a whole number", ".byte_size is -1; expected a whole number", entry(byte_size=-1)),
    Malformed("{} | {} | {}", ".error is -0.5; expected a finite number", entry(error=-0.5)),
    Malformed("{} | {} | {} hexadecimal digits", ".finetuned is 'x'; expected 32", entry(finetuned="x")),
    Malformed("{} | {} | 32 hexadecimal digits", ".digests.indices is None", entry(digests={"indices": None, "values": None})),
    Malformed("{} | {} | base64", ".sketch is 'A'; expected base64", entry(sketch=["A"])),
    Malformed("{}: has no {}; expected the folder of a task vector", "expected the folder of a task vector", no_manifest),
    Malformed("has {} elements; expected a tensor that fits", "expected a tensor that fits the memory", enormous),
    Malformed("{}: has no tensor {}. `alnico store show`", "has no tensor 'c.weight'", other_name),
    Malformed("{}: {} has the hash {}, {} says {}", "has the hash", flipped),
    Malformed("{}: has the SHA-256 {}", "has the SHA-256", adapter(lambda _: None, flip=True)),
    Malformed("{}: has {} bytes, {} says {}", "The file is truncated or another one", truncated),
    Malformed("{} has the encoding {} in a task vector of kind", "has the encoding sparse in a task vector of kind adapter", manifest(lambda d: d.update(kind="adapter"))),
    Malformed("which no file of the task vector holds", "is in 'x', which no file", entry(stored={"indices": "a.weight.indices", "values": "x"})),
    Malformed("is a part of {} and of {}", "is a part of a.weight and of b.weight", manifest(twice)),
    Malformed("The manifest and the files do not belong together", "values is F32 [3, 4]; expected", manifest(other_shape)),
    Malformed("expected the files of an adapter", "has no adapter_config.json among its files", adapter(lambda d: d["files"].pop("adapter_config.json"))),
    Malformed("does not say what {} is", "does not say what 'b.weight.difference' is", manifest(lambda d: d["tensors"].pop("b.weight"))),
    Malformed("does not list the tensors of the files", "does not list the tensors of the files", lying_index),
    Malformed("{} | {} | is {} {} | {}", "a.weight is F16 [3, 4]", run({"a.weight": ("F16", A)})),
    Malformed("{} | {} | {} | {}", "and values F16 [1]", run(NARROW)),
    Malformed("{} | {} | has {} alone | {}", "a.weight has values alone", run(ALONE)),
    Malformed("which the anchor does not have", "changes 'c.weight', which", run({"c.weight": ("F32", A)})),
    Malformed("{}: step {} {}; expected an anchor", "step 7 is not there", run(ONE_PLACE, step=7)),
    Malformed("deltas after the anchor {}; expected at most", "has 2 deltas after the anchor 0", run(ONE_PLACE, (1, 2), 2, 1)),
    Malformed("{}: cannot be read ({}). Check its permissions.", "deltas: cannot be read", file_of_deltas),
    Malformed("a delta is missing between", "a delta is missing between the steps 2 and 4", run(ONE_PLACE, (1, 2, 4), 4)),
    Malformed("expected floating-point differences in a task vector", "a.weight is I32", saved({"a.weight": ("I32", A)})),
    Malformed("has not two factors", "a.weight has not two factors", saved({"a.weight:left": ("F32", A[:, :1])}, **COMPRESSED)),
    Malformed("{}: the indices {}: {}; expected places", "not ascending and distinct", unsorted),
    Malformed("is a stored task vector{}", "is a stored task vector of made/base", in_place_of_a_model),
    Malformed("is a file of a task vector", "is a file of a task vector", file_in_place_of_a_model),
)  # fmt: skip
