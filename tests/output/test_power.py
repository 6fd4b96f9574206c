"""The power goes at every moment of a merge: what the disk holds then is taken up, and is never half a model."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from alnico.checkpoint import durable
from alnico.checkpoint.file_model import FileModel
from alnico.output import journal
from os_calls import watched
from power import Disk, Recorder
from small_merges import everything, made_recipe, merged, tensors_in


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return made_recipe(tmp_path.resolve())


def recorded(recipe: Path, folder: Path, overwrite: bool = False) -> Recorder:
    recorder = Recorder(folder)
    with pytest.MonkeyPatch.context() as patch, watched(folder, recorder):
        patch.setattr(
            journal, "BATCH_SECONDS", 0.001
        )  # lines and syncs among the tensors, not after the last
        merged(recipe, folder / "out", overwrite=overwrite)
    return recorder


def test_the_disk_that_forgets_keeps_what_was_synced_alone(tmp_path: Path) -> None:
    disk = Disk()
    for event in [
        ("mkdir", "a"),
        ("create", "a/x", 1),
        ("write", 1, 2, b"cd"),
        ("sync", 1),
        ("write", 1, 0, b"ab"),
        ("create", "b", 2),
        ("sync directory", "."),
        ("write", 2, 0, b"lost"),
        ("rename", "a/x", "y"),
    ]:
        disk.take(event)
    disk.put(tmp_path / "cut")
    assert everything(tmp_path / "cut") == {"b": b""}
    disk.take(("sync directory", "a"))
    disk.put(tmp_path / "later")
    assert everything(tmp_path / "later") == {"b": b"", "y": b"\0\0cd"}


@pytest.fixture
def same_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that was cut off has the same files; here they are put elsewhere, which a journal tells apart."""
    monkeypatch.setattr(journal, "_is_from_here", lambda *_: True)


@pytest.mark.slow
@pytest.mark.usefixtures("same_disk")
@pytest.mark.parametrize("kept", ["nothing", "some"])
def test_a_merge_is_taken_up_after_a_power_cut_at_any_moment(kept: str, recipe: Path) -> None:
    """``kept`` of what was not synced; what the journal says is on the disk, and is not made again."""
    root = recipe.parent
    (root / "run").mkdir()
    recorder = recorded(recipe, root / "run")
    expected = everything(root / "run" / "out")
    out, chance = root / "cut" / "out", random.Random(0)
    resumed = tensors = complete = 0
    for moment in range(len(recorder.log) + 1):
        disk = Disk()
        for event in recorder.log[:moment]:
            disk.take(event)
        disk.cut_off(chance if kept == "some" else None)
        disk.put(root / "cut")
        assert everything(out) in ({}, expected), recorder.log[moment - 1]
        if out.exists():
            complete += 1
        else:
            part = root / "cut" / ".out.alnico-part"
            assert all(
                p.read_bytes() == expected[p.name] for p in part.rglob("*.safetensors")
            )  # others are called .unfinished
            finished = tensors_in(part / "journal.jsonl") if kept == "nothing" else set()
            read: set[str] = set()
            real = FileModel.read_into

            def read_into(model: FileModel, name: str, offset: int, buffer: memoryview) -> None:
                read.add(name)  # noqa: B023 (used in this turn alone)
                real(model, name, offset, buffer)  # noqa: B023

            with pytest.MonkeyPatch.context() as patch, watched(root):
                patch.setattr(FileModel, "read_into", read_into)
                result = merged(recipe, out)
            assert kept == "some" or result.resumed == len(finished), recorder.log[moment - 1]
            assert not read & finished
            assert everything(out) == expected, recorder.log[moment - 1]
            resumed, tensors = resumed + bool(result.resumed), tensors + result.resumed
        shutil.rmtree(root / "cut")
    shutil.rmtree(root / "run")
    print(
        f"{kept} kept: {moment + 1} cuts, {complete} with the whole output, {resumed} took up {tensors} finished tensors"
    )
    assert resumed
    assert complete


@pytest.mark.slow
@pytest.mark.usefixtures("same_disk")
@pytest.mark.parametrize("can_exchange", [True, False], ids=["exchange", "two renames"])
def test_a_power_cut_while_a_model_is_replaced_leaves_the_old_one_or_the_new_one(
    can_exchange: bool, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_exchange:
        monkeypatch.setattr(durable, "_renameat2", lambda: None)
    root = recipe.parent
    other = root / "other.yml"
    other.write_text(recipe.read_text().replace("0.5", "0.3"))
    (root / "run").mkdir()
    recorded(other, root / "run")
    (root / "run" / "out" / "LICENSE").write_text("of the old model alone")
    old = everything(root / "run" / "out")
    before = {f"out/{name}": data for name, data in old.items()}
    recorder = recorded(recipe, root / "run", overwrite=True)
    new = everything(root / "run" / "out")
    out = root / "cut" / "out"
    first = next(n for n, event in enumerate(recorder.log) if str(event[1]).endswith("published.json.tmp"))
    seen = set()
    for moment in range(first, len(recorder.log) + 1):
        disk = Disk(before)
        for event in recorder.log[:moment]:
            disk.take(event)
        disk.put(root / "cut")
        found = everything(out)
        seen.add("old" if found == old else "new" if found == new else "none")
        if not found and not can_exchange:
            assert everything(root / "cut" / ".out.alnico-old") == old
        else:
            assert found in (old, new), recorder.log[moment - 1]
        with watched(root):
            merged(recipe, out, overwrite=True)
        assert everything(out) == new, recorder.log[moment - 1]
        assert not [p for p in (root / "cut").glob(".*") if not p.name.endswith("-gone")]
        shutil.rmtree(root / "cut")
    shutil.rmtree(root / "run")
    assert {"old", "new"} <= seen
