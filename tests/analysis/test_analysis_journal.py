"""An analysis that is written into a folder can be killed at any moment and is taken up by the same command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import alnico
from alnico.checkpoint.file_model import FileModel
from alnico.errors import ModelError, OutputError, RunError
from alnico.events import Advanced, Event
from made import family

KILLED = """
import os, signal, sys, time
from pathlib import Path
import alnico
from alnico.events import Advanced

out, base, models = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
journal = out.parent / f".{out.name}.alnico-analysis" / "journal.jsonl"
done = set()

def watch(event):
    if isinstance(event, Advanced):
        done.add(event.tensor)
        if len(done) == 9:
            while journal.read_text().count("tally") < 8:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

alnico.analyze(models, base=base, out=out, threads=1, watch=watch)
"""


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, list[Path]]:
    return family(tmp_path, 3, shards=2)


def part_of(out: Path) -> Path:
    return out.parent / f".{out.name}.alnico-analysis"


def contents(folder: Path) -> dict[str, object]:
    """The files of a report; without the one number that says how long it took."""
    found: dict[str, object] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        data = path.read_bytes()
        if path == folder / "summary.json":
            summary = json.loads(data)
            del summary["seconds"]
            found["summary.json"] = json.dumps(summary)
        elif path.suffix != ".html":
            found[str(path.relative_to(folder))] = data
    return found


def killed(out: Path, models: tuple[Path, list[Path]]) -> set[str]:
    """Kill an analysis after some tensors; returns the names of those in its journal."""
    command = [sys.executable, "-c", KILLED, str(out), str(models[0]), *map(str, models[1])]
    ended = subprocess.run(command, capture_output=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    return {
        json.loads(line)["tensor"] for line in (part_of(out) / "journal.jsonl").read_text().splitlines()[1:]
    }


def test_a_killed_analysis_is_taken_up_and_gives_the_same_files(
    models: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = killed(tmp_path / "out", models)
    assert len(finished) >= 8
    assert not (tmp_path / "out" / "summary.json").exists()
    read: set[str] = set()
    real = FileModel.read_into

    def read_into(model: FileModel, name: str, offset: int, buffer: memoryview) -> None:
        read.add(name)
        real(model, name, offset, buffer)

    with monkeypatch.context() as patch:
        patch.setattr(FileModel, "read_into", read_into)
        found = alnico.analyze(models[1], base=models[0], out=tmp_path / "out")
    assert read
    assert not read & finished
    assert read | finished == {t.name for t in found.tensors}
    alnico.analyze(models[1], base=models[0], out=tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))


def interrupted(out: Path, models: tuple[Path, list[Path]], **options: float) -> None:
    done: list[str] = []

    def watch(event: Event) -> None:
        if isinstance(event, Advanced):
            done.append(event.tensor)
            if len(done) == 6:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        alnico.analyze(models[1], base=models[0], out=out, threads=1, watch=watch, **options)


def test_an_analysis_that_changed_is_noticed_and_named_and_restart_begins_anew(
    models: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    interrupted(tmp_path / "out", models)
    with pytest.raises(OutputError) as caught:
        alnico.analyze(models[1], base=models[0], out=tmp_path / "out", top_share=0.1)
    assert str(caught.value) == (
        f"{part_of(tmp_path / 'out')}: holds an unfinished analysis; changed since it began: the share of top parameters. "
        "Undo the change to resume it, or pass --restart to start over."
    )
    alnico.analyze(models[1], base=models[0], out=tmp_path / "out", top_share=0.1, restart=True)
    alnico.analyze(models[1], base=models[0], out=tmp_path / "whole", top_share=0.1)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    interrupted(tmp_path / "other", models)
    os.utime(models[1][1] / "model-00002-of-00002.safetensors", (1, 1))
    with pytest.raises(
        OutputError,
        match=r"changed since it began: an input file \(.*tuned-1: model-00002-of-00002\.safetensors; its size",
    ):
        alnico.analyze(models[1], base=models[0], out=tmp_path / "other")


def test_an_analysis_killed_while_its_report_is_written_is_taken_up(
    models: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import alnico.analysis.files as files

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "somewhere")

    with monkeypatch.context() as patch:
        patch.setattr(files, "_pairs", full)
        with pytest.raises(OutputError, match="No space left"):
            alnico.analyze(models[1], base=models[0], out=tmp_path / "out")
    assert any((tmp_path / "out").iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(FileModel, "read_into", lambda *_: pytest.fail("a tensor was read again"))
        alnico.analyze(models[1], base=models[0], out=tmp_path / "out")
    alnico.analyze(models[1], base=models[0], out=tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_second_process_on_one_folder_is_refused(models: tuple[Path, list[Path]], tmp_path: Path) -> None:
    refused: list[str] = []

    def watch(event: Event) -> None:
        if isinstance(event, Advanced) and not refused:
            code = f"import alnico; alnico.analyze({[*map(str, models[1])]!r}, base={str(models[0])!r}, out={str(tmp_path / 'out')!r})"
            refused.append(
                subprocess.run(
                    [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
                ).stderr
            )

    alnico.analyze(models[1], base=models[0], out=tmp_path / "out", watch=watch)
    assert "out: another process is writing it. Wait for it, or choose another output." in refused[0]


def test_a_model_that_changes_while_it_is_measured_ends_the_analysis(
    models: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    file = models[1][0] / "model-00001-of-00002.safetensors"

    def watch(event: Event) -> None:
        if isinstance(event, Advanced):
            os.utime(file, (1, 1))

    with pytest.raises(ModelError) as caught:
        alnico.analyze(models[1], base=models[0], out=tmp_path / "out", threads=1, watch=watch)
    assert str(caught.value) == (
        f"{file} (its modification time differs): changed during the analysis; expected a file that stays the same. "
        "Run the command again when nothing writes to the file."
    )
    assert not list(tmp_path.glob(".*"))
    assert not any((tmp_path / "out").iterdir())


def test_a_full_disk_ends_the_analysis_and_keeps_what_is_measured(
    models: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import alnico.output.journal as journal

    with monkeypatch.context() as patch:
        patch.setattr(
            journal, "write_all", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
        with pytest.raises(RunError, match=r"journal\.jsonl: cannot be written \(No space left on device\)"):
            alnico.analyze(models[1], base=models[0], out=tmp_path / "out")
    assert part_of(tmp_path / "out").exists()
    assert alnico.analyze(models[1], base=models[0], out=tmp_path / "out").tensors
