"""A merge can be killed at any moment and is taken up by the same command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import alnico
from alnico.checkpoint.file_model import FileModel
from alnico.checkpoint.files import write_fully
from alnico.errors import NonFiniteError, OutputError, RunError
from alnico.events import Event, TensorDone
from made import family, model_bytes

KILLED = """
import json, os, signal, sys, time
from pathlib import Path
import alnico
from alnico.events import TensorDone

recipe, out, after = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
journal = out.parent / f".{out.name}.alnico-part" / "journal.jsonl"
done = 0

def watch(event):
    global done
    if isinstance(event, TensorDone):
        done += 1
        if done == after:
            while journal.read_text().count("digest") < after:  # the lines of a batch come after the data is synced
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

alnico.merge(recipe, out, threads=1, watch=watch)
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    base, tuned = family(tmp_path, 3, shards=2)
    path = tmp_path / "recipe.yml"
    models = "".join(f"  - model: {p}\n" for p in tuned)
    path.write_text(f"merge_method: ties\nbase_model: {base}\nmodels:\n{models}parameters:\n  density: 0.5\n")
    return path


def part_of(out: Path) -> Path:
    return out.parent / f".{out.name}.alnico-part"


def killed(recipe: Path, out: Path, after: int) -> set[str]:
    """Kill a merge once ``after`` tensors are in its journal; returns their names."""
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, str(recipe), str(out), str(after)], capture_output=True, timeout=120
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    lines = (part_of(out) / "journal.jsonl").read_text().splitlines()
    return {entry["tensor"] for line in map(json.loads, lines[1:]) for entry in line.get("tensors", [line])}


class Reads:
    """Names of the tensors that are read while it is in place."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: set[str] = set()
        real = FileModel.read_into

        def read_into(model: FileModel, name: str, offset: int, buffer: memoryview) -> None:
            self.names.add(name)
            real(model, name, offset, buffer)

        whole = FileModel.read_whole

        def read_whole(model: FileModel, tensors: Sequence[tuple[str, memoryview]]) -> None:
            self.names |= {name for name, _ in tensors}
            whole(model, tensors)

        monkeypatch.setattr(FileModel, "read_into", read_into)
        monkeypatch.setattr(FileModel, "read_whole", read_whole)


@pytest.mark.parametrize(
    "after", [pytest.param(1, marks=pytest.mark.slow), 7, pytest.param(19, marks=pytest.mark.slow)]
)
def test_a_killed_merge_is_taken_up_and_gives_the_same_bytes(
    recipe: Path, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = killed(recipe, tmp_path / "out", after)
    assert len(finished) >= after
    assert not (tmp_path / "out").exists()
    assert not list(part_of(tmp_path / "out").rglob("*.safetensors")), "something could be loaded as a model"
    reads = Reads(monkeypatch)
    result = alnico.merge(recipe, tmp_path / "out")
    assert result.resumed == len(finished)
    assert not reads.names & finished
    alnico.merge(recipe, tmp_path / "uninterrupted")
    assert model_bytes(tmp_path / "out") == model_bytes(tmp_path / "uninterrupted")
    assert not part_of(tmp_path / "out").exists()


def test_a_damaged_tensor_is_made_again(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = killed(recipe, tmp_path / "out", 3)
    alnico.merge(recipe, tmp_path / "uninterrupted")
    whole = (tmp_path / "uninterrupted" / "model.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    damaged = sorted(finished)[0]
    begin, _ = json.loads(whole[8 : 8 + length])[damaged]["data_offsets"]
    shard = part_of(tmp_path / "out") / "model" / "model.safetensors.unfinished"
    raw = bytearray(shard.read_bytes())
    raw[8 + length + begin] ^= 1
    shard.write_bytes(raw)
    reads = Reads(monkeypatch)
    result = alnico.merge(recipe, tmp_path / "out")
    assert reads.names & finished == {damaged}
    assert result.resumed == len(finished) - 1
    assert model_bytes(tmp_path / "out") == model_bytes(tmp_path / "uninterrupted")


@pytest.mark.slow
def test_a_line_cut_off_in_the_journal_is_left_out(recipe: Path, tmp_path: Path) -> None:
    killed(recipe, tmp_path / "out", 3)
    journal = part_of(tmp_path / "out") / "journal.jsonl"
    journal.write_text(journal.read_text()[:-9])
    result = alnico.merge(recipe, tmp_path / "out")
    assert result.resumed == 2


def test_a_changed_recipe_is_noticed_and_named(recipe: Path, tmp_path: Path) -> None:
    killed(recipe, tmp_path / "out", 3)
    recipe.write_text(recipe.read_text().replace("0.5", "0.4"))
    with pytest.raises(OutputError) as caught:
        alnico.merge(recipe, tmp_path / "out")
    assert str(caught.value) == (
        f"{part_of(tmp_path / 'out')}: holds an unfinished merge; changed since it began: the recipe. "
        "Undo the change to resume it, or pass --restart to start over."
    )
    assert alnico.merge(recipe, tmp_path / "out", restart=True).resumed == 0


@pytest.mark.slow
def test_a_changed_input_is_noticed_and_named(recipe: Path, tmp_path: Path) -> None:
    killed(recipe, tmp_path / "out", 3)
    os.utime(tmp_path / "tuned-1" / "model-00001-of-00002.safetensors", (1, 1))
    changed = rf"changed since it began: an input file \({tmp_path}/tuned-1: model-00001-of-00002\.safetensors; its size, time, commit or header\)\."
    with pytest.raises(OutputError, match=changed):
        alnico.merge(recipe, tmp_path / "out")


def test_a_second_process_on_one_output_is_refused(recipe: Path, tmp_path: Path) -> None:
    refused: list[BaseException] = []

    def watch(event: Event) -> None:
        if isinstance(event, TensorDone) and not refused:
            code = f"import alnico; alnico.merge({str(recipe)!r}, {str(tmp_path / 'out')!r})"
            ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
            refused.append(OSError(ended.stderr))

    alnico.merge(recipe, tmp_path / "out", watch=watch)
    assert "another process is writing it. Wait for it, or choose another output." in str(refused[0])


def test_a_wrong_input_leaves_nothing_and_a_full_disk_keeps_what_is_done(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import alnico.checkpoint.writer as writer

    writes = []

    def full(descriptor: int, data: memoryview, offset: int, *where: object) -> None:
        writes.append(where[0])
        if len(writes) > 8:
            raise RunError(f"{where[0]}: writing failed (No space left on device).")
        write_fully(descriptor, data, offset, *where)

    with monkeypatch.context() as patched:
        patched.setattr(writer, "write_fully", full)
        with pytest.raises(RunError, match="No space left"):
            alnico.merge(recipe, tmp_path / "out", threads=1)
    assert not (tmp_path / "out").exists()
    assert part_of(tmp_path / "out").exists()
    assert alnico.merge(recipe, tmp_path / "out").resumed > 0

    shard = tmp_path / "tuned-0" / "model-00002-of-00002.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-2:] = b"\xc0\x7f"  # a bfloat16 NaN
    shard.write_bytes(raw)
    with pytest.raises(NonFiniteError):
        alnico.merge(recipe, tmp_path / "other")
    assert not part_of(tmp_path / "other").exists()


def test_an_interrupt_stops_all_threads_and_keeps_what_is_done(recipe: Path, tmp_path: Path) -> None:
    def watch(event: Event) -> None:
        if isinstance(event, TensorDone):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        alnico.merge(recipe, tmp_path / "out", watch=watch)
    assert alnico.merge(recipe, tmp_path / "out").resumed >= 1


def test_overwrite_keeps_the_old_model_until_the_new_one_is_complete(recipe: Path, tmp_path: Path) -> None:
    alnico.merge(recipe, tmp_path / "out")
    before = model_bytes(tmp_path / "out")

    def watch(event: Event) -> None:
        if isinstance(event, TensorDone):
            assert model_bytes(tmp_path / "out") == before

    recipe.write_text(recipe.read_text().replace("0.5", "0.4"))
    alnico.merge(recipe, tmp_path / "out", overwrite=True, watch=watch)
    assert model_bytes(tmp_path / "out") != before
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "base",
        "out",
        "recipe.yml",
        "tuned-0",
        "tuned-1",
        "tuned-2",
    ]
