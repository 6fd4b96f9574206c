"""Verifying, showing and describing stored task vectors again, and signing them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_artifacts import digest
from small_vectors import safetensors_bytes, write_vector

import alnico
from alnico.errors import AlnicoError, MismatchError, ModelError, UncheckedError, VerificationError

BASE = np.array([0.5, -2.0], np.float32)


def write_model(folder: Path, values: np.ndarray) -> Path:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(safetensors_bytes({"w": ("F32", [2], values.tobytes())}))
    (folder / "config.json").write_text("{}")
    return folder


def change(folder: Path, **keys: Any) -> None:
    """Change the manifest of a folder."""
    path = folder / "taskvector.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def entry_with(folder: Path, **keys: Any) -> dict[str, Any]:
    tensors = json.loads((folder / "taskvector.json").read_text())["tensors"]
    return {"w": {**tensors["w"], **keys}}


@pytest.fixture
def store(tmp_path: Path) -> alnico.Store:
    """A store with one vector, made of the base above."""
    folder = write_vector(
        tmp_path / "a",
        value=3.0,
        tasks=["sql"],
        base={"id": "owner/base", "licence": "cc-by-nc-4.0"},
        licence="mit",
    )
    change(folder, tensors=entry_with(folder, base=digest(BASE, "F32")))
    store = alnico.Store(tmp_path / "store")
    store.add(folder)
    return store


def test_a_good_vector_passes(tmp_path: Path, store: alnico.Store) -> None:
    result = store.verify("sql")
    assert [(v.vector, v.files, v.byte_size) for v in result.vectors] == [("sql@1", 1, 112)]
    assert result.data()["is_verified"]
    assert repr(result) == "<1 task vector verified: 112 B; sql@1>"
    base = write_model(tmp_path / "base", BASE)
    assert store.verify(base=base).vectors[0].base == os.fspath(base)


def test_another_base_is_refused_by_its_values(tmp_path: Path, store: alnico.Store) -> None:
    other = write_model(tmp_path / "other", BASE + np.float32(1e-6))
    with pytest.raises(MismatchError, match=r"other is not the base of .*: w: its values differ"):
        store.verify("sql", base=other)


def test_an_adapter_without_hashes_of_a_base_is_not_called_checked(
    tmp_path: Path, store: alnico.Store
) -> None:
    folder = write_vector(tmp_path / "b", "unknown")
    tensors = entry_with(folder)
    tensors["w"].pop("base")
    change(folder, tensors=tensors)
    store.add(folder)
    base = write_model(tmp_path / "base", BASE)
    with pytest.raises(
        UncheckedError, match=r"unknown@1: .*base could not be checked: the manifest has no hashes of a base"
    ):
        store.verify("unknown", base=base)


def test_each_bit_of_a_file_counts(store: alnico.Store) -> None:
    path = store.path("sql") / "taskvector.safetensors"
    data = path.read_bytes()
    for at in (0, 20, len(data) - 1):
        flipped = bytearray(data)
        flipped[at] ^= 4
        path.write_bytes(flipped)
        with pytest.raises(VerificationError, match=r"taskvector\.safetensors: has the SHA-256"):
            store.verify("sql")
    path.write_bytes(data[:-1])
    with pytest.raises(VerificationError, match="has 111 bytes; the manifest says 112"):
        store.verify()
    path.unlink()
    with pytest.raises(VerificationError, match=r"taskvector\.safetensors: is missing"):
        store.verify()
    path.symlink_to("/dev/zero")
    with pytest.raises(VerificationError, match="bytes; the manifest says 112"):
        store.verify()


def test_a_file_that_is_not_listed_is_told(store: alnico.Store) -> None:
    for allowed in ("README.md", "LICENSE"):
        (store.path("sql") / allowed).write_text("# sql")
    store.verify()
    (store.path("sql") / "adapter_config.json").write_text("{}")
    with pytest.raises(VerificationError, match=r"adapter_config\.json: is not in the manifest"):
        store.verify()


def test_a_manifest_that_its_own_files_contradict_is_told(tmp_path: Path, store: alnico.Store) -> None:
    for key, value, said in (
        ("digests", {"values": "1" * 32}, "has the hash .* says 1111"),
        ("shape", [3], "shape|elements|bytes"),
        ("stored", {"values": "x"}, "x"),
    ):
        folder = write_vector(tmp_path / key, key)
        change(folder, tensors=entry_with(folder, **{key: value}))
        store.add(folder)
        with pytest.raises(VerificationError, match=said):
            store.verify(key)
        store.remove(key)
    folder = store.folder / "vectors" / "moved" / "1"
    write_vector(folder, "other")
    with pytest.raises(VerificationError, match="its manifest says that it is 'other'; expected 'moved'"):
        store.verify()


def test_all_problems_are_told_together(tmp_path: Path, store: alnico.Store) -> None:
    store.add(write_vector(tmp_path / "b", "second"))
    for name in ("sql", "second"):
        (store.path(name) / "taskvector.safetensors").unlink()
    with pytest.raises(VerificationError) as caught:
        store.verify()
    assert len(caught.value.args) == 2


def keys_of(folder: Path, name: str) -> tuple[Path, Path]:
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    for command in (
        f"ecparam -name prime256v1 -genkey -noout -out {private}",
        f"ec -in {private} -pubout -out {public}",
    ):
        subprocess.run(["openssl", *command.split()], check=True, capture_output=True)
    return private, public


def test_a_signature_is_made_checked_and_travels(tmp_path: Path, store: alnico.Store) -> None:
    pytest.importorskip("model_signing")
    private, public = keys_of(tmp_path, "mine")
    _, other = keys_of(tmp_path, "other")
    with pytest.raises(UncheckedError, match=r"there is no model\.sig"):
        store.verify("sql", key=public)
    assert alnico.sign(store.path("sql"), private) == store.path("sql") / "model.sig"
    assert store.verify("sql", key=public).vectors[0].signed_by == os.fspath(public)
    with pytest.raises(VerificationError, match=r"model\.sig is not valid"):
        store.verify("sql", key=other)
    remote = os.fspath(tmp_path / "remote")
    store.push("sql", remote)
    there = alnico.Store(tmp_path / "there")
    there.pull("sql", source=remote)
    assert there.verify("sql", key=public).vectors[0].signed_by == os.fspath(public)
    change(there.path("sql"), description="better")
    with pytest.raises(VerificationError, match=r"model\.sig is not valid"):
        there.verify("sql", key=public)


def test_only_a_good_vector_is_signed(tmp_path: Path, store: alnico.Store) -> None:
    pytest.importorskip("model_signing")
    private, _ = keys_of(tmp_path, "mine")
    (store.path("sql") / "taskvector.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="bytes"):
        alnico.sign(store.path("sql"), private)
    assert not (store.path("sql") / "model.sig").exists()


def test_what_is_known_is_shown(store: alnico.Store) -> None:
    details = store.show("sql")
    data = details.data()
    assert json.loads(json.dumps(data)) == data
    assert (data["name"], data["versions"], data["tasks"], data["origin"]) == ("sql", [1], ["sql"], {})
    assert data["tensors"]["w"]["encoding"] == "whole"
    assert details.licence_conflicts == (
        "licences: owner/base is cc-by-nc-4.0, which forbids commercial use, also of models made from it; sql is mit.",
    )
    assert repr(details) == "<task vector sql@1: of owner/base; 112 B; exact>"
    assert "<table" in details._repr_html_()
    with pytest.raises(ModelError, match=r"has no task vector 'sqk'\. Did you mean sql"):
        store.show("sqk")


def test_a_new_description_is_a_new_version_that_shares_its_files(store: alnico.Store) -> None:
    made = store.update(
        "sql",
        description="Writes queries.",
        tasks=["sql", "code"],
        licence="apache-2.0",
        scale=0.8,
        least=0.1,
        most=1.2,
    ).made
    assert made is not None
    assert (made.version, made.description, made.tasks, made.licence) == (
        2,
        "Writes queries.",
        ("sql", "code"),
        "apache-2.0",
    )
    one, two = (store.path(f"sql@{v}") / "taskvector.safetensors" for v in (1, 2))
    assert one.samefile(two)
    before, after = (json.loads((store.path(f"sql@{v}") / "taskvector.json").read_text()) for v in (1, 2))
    assert after["scale"] == {"suggested": 0.8, "least": 0.1, "most": 1.2}
    for manifest in (before, after):  # which alnico always writes
        manifest.pop("kind", None)
        manifest["tensors"]["w"].pop("error", None)
    assert {k for k in after if after[k] != before.get(k)} == {"description", "tasks", "licence", "scale"}
    store.verify()
    assert store.search(task="code").references == ("sql@2",)
    store.remove("sql@1")
    store.verify("sql@2")


def test_a_change_that_a_manifest_cannot_hold_is_refused(store: alnico.Store) -> None:
    search: Any = store.update
    for changes, said in (
        ({}, "sql: nothing to change is given"),
        ({"description": "x" * 100_001}, "sql: description is .* Change it"),
        ({"tasks": ["x" * 300]}, "sql: tasks is"),
        ({"scale": float("nan")}, "sql: a value cannot be written"),
        ({"licence": 3}, "sql: licence is 3"),
    ):
        with pytest.raises(AlnicoError, match=said) as caught:
            search("sql", **changes)
        assert "damaged" not in str(caught.value)
    with pytest.raises(AlnicoError, match="scale, most: no task vector is named"):
        store.update(scale=1.0, most=2.0)
    assert store.list(all_versions=True).references == ("sql@1",)
    assert not list((store.folder / "unfinished").iterdir())


def test_a_description_alone_changes_no_hash_of_the_files(store: alnico.Store) -> None:
    before = hashlib.sha256((store.path("sql") / "taskvector.safetensors").read_bytes()).hexdigest()
    store.update("sql", training="three epochs")
    assert store.show("sql").manifest.training == "three epochs"
    assert hashlib.sha256((store.path("sql@2") / "taskvector.safetensors").read_bytes()).hexdigest() == before


def test_a_folder_outside_of_the_store_is_verified_by_its_path(tmp_path: Path, store: alnico.Store) -> None:
    folder = os.fspath(tmp_path / "a")
    base = write_model(tmp_path / "base", BASE)
    assert store.verify(folder, base=base).vectors[0].vector == folder
    (tmp_path / "a" / "taskvector.safetensors").unlink()
    with pytest.raises(VerificationError, match="is missing"):
        store.verify(folder)
