"""``alnico store``: what each command prints, as text and as JSON, and its exit codes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from small_vectors import write_vector

import alnico
from alnico.errors import ModelError

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of three vectors, which is the user's."""
    monkeypatch.setenv("ALNICO_STORE", os.fspath(tmp_path / "store"))
    monkeypatch.setenv("COLUMNS", "200")
    store = alnico.Store()
    assert store.folder == tmp_path / "store"
    base = {"id": "owner/base", "licence": "mit"}
    store.add(
        write_vector(
            tmp_path / "1",
            "sql",
            value=1,
            tasks=["sql"],
            licence="mit",
            base=base,
            description="Writes queries.",
        )
    )
    store.add(write_vector(tmp_path / "2", "ja", value=2, languages=["ja"], base=base))
    store.add(write_vector(tmp_path / "3", "ja", value=3, languages=["ja"], base=base))
    return tmp_path


def test_list_is_a_table(folder: Path, run: Run) -> None:
    code, text, notes = run("store", "list")
    assert (code, notes) == (0, "")
    assert text.splitlines() == [
        "name   base        tasks and languages  licence  size   error",
        "ja@2   owner/base  ja                   -        112 B  exact",
        "sql@1  owner/base  sql                  mit      112 B  exact",
        "",
        f"2 task vectors, 224 B, in {folder}/store",
    ]
    assert "ja@1" in run("store", "list", "--all")[1]
    data = json.loads(run("store", "list", "--json")[1])
    assert [v["reference"] for v in data["vectors"]] == ["ja@2", "sql@1"]
    code, text, _ = run("store", "list", "--store", os.fspath(folder / "none"))
    assert (code, text) == (
        0, f"{folder}/none: has no task vectors. `alnico store create FINETUNED --base BASE` makes one.\n",
    )  # fmt: skip


def test_search_finds_and_says_when_it_does_not(folder: Path, run: Run) -> None:
    assert run("store", "search", "quer")[1].splitlines()[1].split() == [
        "sql@1", "owner/base", "sql", "mit", "112", "B", "exact", "here",
    ]  # fmt: skip
    assert "1 task vector" in run("store", "search", "--base", "owner/base", "--language", "ja")[1]
    code, text, _ = run("store", "search", "xylophone", "--task", "music")
    assert code == 0
    assert text == (
        f"{folder}/store: no task vector for xylophone, task music. `alnico store update` asks the remotes again; --hub asks the hub.\n"
    )
    assert "2 task vectors, the first 1 of them (--limit)" in run("store", "search", "--limit", "1")[1]
    assert run("store", "search", "--limit", "0")[0] == 2
    code, _, error = run("store", "search", "--hub", "--offline")
    assert code == 1
    assert "hub and offline are both given" in error


def test_search_shows_whole_addresses(folder: Path, run: Run) -> None:
    remote = os.fspath(folder / ("a-long-name-" * 8))
    alnico.Store().push("sql", remote)
    assert run("store", "search", "--store", remote)[1].splitlines()[1].endswith(f"  {remote}")


def test_show_says_all(folder: Path, run: Run) -> None:
    code, text, notes = run("store", "show", "sql", "-v")
    assert (code, notes) == (0, "")
    for line in (
        "task vector    sql@1",
        "description    Writes queries.",
        "base           owner/base",
        "licence        mit",
        "tensors        1 whole",
        f"folder         {folder}/store/vectors/sql/1",
    ):
        assert f"{line}\n" in f"{text}\n"
    assert text.splitlines()[-1].split() == ["whole", "F32", "(2,)", "0.000%", "1.5", "8", "B", "w"]
    assert json.loads(run("store", "show", "ja@1", "--json")[1])["versions"] == [1, 2]
    code, _, error = run("store", "show", "sqk")
    assert code == 4
    assert "has no task vector 'sqk'. Did you mean sql?" in error


def test_update_makes_a_version(folder: Path, run: Run) -> None:
    code, text, _ = run(
        "store",
        "update",
        "sql",
        "--task",
        "sql",
        "--task",
        "code",
        "--licence",
        "apache-2.0",
        "--scale",
        "0.5",
    )
    assert (code, text) == (0, "made sql@2\n")
    assert alnico.Store().show("sql").entry.tasks == ("sql", "code")
    code, text, _ = run("store", "update")
    assert (code, text) == (
        0, f"{folder}/store: knows no remote. `alnico store pull NAME --from ADDRESS` makes one known.\n",
    )  # fmt: skip
    assert run("store", "update", "sql")[0] == 1


def test_update_asks_the_remotes(folder: Path, run: Run) -> None:
    remote = os.fspath(folder / "remote")
    other = alnico.Store(folder / "other")
    alnico.Store().push("ja@1", remote)
    other.pull("ja", source=remote)
    alnico.Store().push("ja@2", remote)
    code, text, _ = run("store", "update", "--store", os.fspath(other.folder))
    assert (code, text.splitlines()) == (0, [
        f"{remote}: 1 task vector, new: ja@2",
        f"ja@1 was pulled as ja@1 from {remote}, which has ja@2 now: `alnico store pull ja@2 --from {remote}`.",
    ])  # fmt: skip
    assert (
        json.loads(run("store", "update", "--json", "--store", os.fspath(other.folder))[1])["remotes"][0][
            "new"
        ]
        == []
    )


@pytest.mark.usefixtures("folder")
def test_verify_says_what_passed(run: Run) -> None:
    code, text, _ = run("store", "verify")
    assert code == 0
    assert text.splitlines() == [
        f"{n}: 1 file (112 B) as the manifest says" for n in ("ja@1", "ja@2", "sql@1")
    ]
    assert json.loads(run("store", "verify", "sql", "--json")[1])["is_verified"]
    (alnico.Store().path("ja@1") / "taskvector.safetensors").write_bytes(bytes(112))
    code, text, error = run("store", "verify")
    assert (code, text) == (10, "")
    assert "ja/1/taskvector.safetensors: has the SHA-256" in error


@pytest.mark.usefixtures("folder")
def test_rm_removes_what_is_named_or_nothing(run: Run) -> None:
    assert run("store", "rm", "sql", "nothing")[0] == 4
    assert len(alnico.Store().list(all_versions=True)) == 3
    code, text, _ = run("store", "rm", "sql", "ja@2")
    assert (code, text) == (0, "removed sql@1\nremoved ja@2\n")
    assert alnico.Store().list(all_versions=True).references == ("ja@1",)
    assert json.loads(run("store", "rm", "ja", "--json")[1]) == {"removed": ["ja@1"]}


def test_a_remote_is_not_mistaken_for_the_own_store(
    folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = os.fspath(folder / "public")
    alnico.Store().push("sql", remote)
    for place in (remote, Path(remote).as_uri()):
        for words in (
            ("create", "one", "--base", "two"),
            ("rm", "sql"),
            ("show", "sql"),
            ("push", "sql", "elsewhere"),
            ("pull", "sql"),
            ("verify",),
            ("update", "sql", "--task", "x"),
        ):
            code, text, error = run("store", *words, "--store", place)
            assert (code, text) == (4, ""), (words, place)
            assert f"store is a remote, {place}; expected the folder of a store on this machine" in error
        with pytest.raises(ModelError, match="is a remote, of which nothing is removed"):
            alnico.Store(place).remove("sql")
    assert alnico.Store().list(all_versions=True).references == ("ja@2", "ja@1", "sql@1")
    code, _, error = run("equip", "base", "sql", "--dry-run", "--store", "s3://bucket/vectors")
    assert code == 4
    assert "store is the address of a remote, s3://bucket/vectors; expected the folder" in error
    monkeypatch.setenv("ALNICO_STORE", "https://example.org/vectors")
    code, _, error = run("store", "list")
    assert code == 4
    assert (
        "ALNICO_STORE is the address of a remote, https://example.org/vectors; expected the folder" in error
    )


def test_names_of_strangers_cannot_forge_lines(folder: Path, run: Run) -> None:
    store = alnico.Store()
    store.add(
        write_vector(
            folder / "4", "bad", description="a\nalnico: done", tasks=["x\x1b[2K"], licence="\u202eevil"
        )
    )
    for command in (("list",), ("search", "bad"), ("show", "bad"), ("show", "bad", "-v")):
        text = run("store", *command)[1]
        assert "\x1b" not in text
        assert "\u202e" not in text
        assert "\nalnico: done" not in text
