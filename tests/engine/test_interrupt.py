"""Ctrl-C ends a run whatever its threads do, and an input that changes meanwhile is never published."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import alnico
from alnico.checkpoint.file_model import FileModel
from alnico.checkpoint.files import OpenFiles
from alnico.engine import matrix, merge_run
from alnico.engine.batches import Batch
from alnico.errors import ModelError, OutputError
from alnico.events import Event, Started, TensorDone
from alnico.lora import extract
from alnico.lora.folded_distances import FoldedDistances
from alnico.output import journal
from alnico.threads import Abandoned, Crew, Stopped
from compiling import without_compiling
from made import family, model_bytes


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    base, tuned = family(tmp_path, 2, layers=1)
    path = tmp_path / "recipe.yml"
    path.write_text(
        f"merge_method: ties\nbase_model: {base}\nmodels: [{tuned[0]}, {tuned[1]}]\nparameters: {{density: 0.5}}\n"
    )
    return path


def interrupting(event: threading.Event) -> None:
    """Interrupt the main thread once ``event`` is set."""

    def wait() -> None:
        if event.wait(60):  # else the test has failed, and an interrupt would end those after it
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    threading.Thread(target=wait, daemon=True).start()


def test_an_interrupt_does_not_wait_for_a_thread_that_does_not_look_up() -> None:
    begun, may_end = threading.Event(), threading.Event()

    def computes() -> None:
        begun.set()
        may_end.wait(60)

    interrupting(begun)
    with pytest.raises(Abandoned), Crew(2) as crew:
        crew.run([(computes, ())])
    with pytest.raises(Stopped):
        crew.check()
    assert not may_end.is_set()
    may_end.set()


def merged_pair(folder: Path) -> tuple[Path, Path, Path]:
    """A base, a fine-tune, and a merge of both."""
    base, (tuned,) = family(folder, 1, layers=1, hidden=64)
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [{"model": str(tuned), "parameters": {"weight": 0.5}}],
    }
    return base, tuned, alnico.merge(recipe, folder / "merged").path


COMMANDS: dict[str, Callable[[Path, Path, Path], object]] = {
    "verify": lambda _b, _t, merged: alnico.verify(merged, threads=2),
    "verify against inputs": lambda _b, _t, merged: alnico.verify(merged, against_inputs=True, threads=2),
    "diff": lambda base, tuned, _: alnico.diff(base, tuned, threads=2),
    "extract": lambda base, tuned, merged: extract(tuned, base, merged.parent / "adapter", rank=2, threads=2),
    "analyze": lambda base, tuned, _: alnico.analyze(tuned, base=base, threads=2),
    "norm": lambda base, tuned, _: alnico.TaskVector(tuned, base).norm(),
    "weights": lambda base, tuned, merged: alnico.norm_weights([tuned, merged], base=base, threads=2),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_does_not_wait_for_a_thread_that_reads_for_long(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = merged_pair(tmp_path)
    begun, may_end, ended = (threading.Event() for _ in range(3))
    read = FileModel.read_into

    def hang(self: FileModel, name: str, offset: int, buffer: memoryview) -> None:
        if threading.current_thread() is not threading.main_thread():
            begun.set()
            may_end.wait(20)
            ended.set()
        read(self, name, offset, buffer)

    interrupting(begun)
    monkeypatch.setattr(FileModel, "read_into", hang)
    try:
        with pytest.raises(KeyboardInterrupt):
            COMMANDS[command](*models)
        assert begun.is_set()
        assert not ended.is_set()
    finally:
        may_end.set()


def test_ctrl_c_ends_the_check_of_an_extracted_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned, _ = merged_pair(tmp_path)
    begun, may_end, ended = (threading.Event() for _ in range(3))

    def hang(*_: object) -> tuple[float, float]:
        begun.set()
        may_end.wait(20)
        ended.set()
        return 0.0, 0.0

    interrupting(begun)
    monkeypatch.setattr(FoldedDistances, "_distance", hang)
    try:
        with pytest.raises(KeyboardInterrupt):
            extract(tuned, base, tmp_path / "adapter", rank=2, threads=2)
        assert not ended.is_set()
    finally:
        may_end.set()


def test_an_interrupted_merge_leaves_what_takes_long_and_keeps_what_is_done(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = alnico.merge(recipe, tmp_path / "whole")
    begun, interrupt, may_end, ended = (threading.Event() for _ in range(4))
    real = merge_run.MergeRun._make_batch
    late: list[str] = []

    def make(self: merge_run.MergeRun, batch: Batch) -> None:
        names = [job.name for job in batch.jobs]
        if "model.embed_tokens.weight" in names:
            late.extend(names)
            begun.set()
            may_end.wait(60)
            ended.set()
        real(self, batch)

    done: list[str] = []

    def watch(event: Event) -> None:
        if isinstance(event, TensorDone):
            done.append(event.tensor)
            if len(done) == len(whole.digests) - len(late):
                interrupt.set()

    interrupting(interrupt)
    with monkeypatch.context() as patch:
        patch.setattr(merge_run.MergeRun, "_make_batch", make)
        with pytest.raises(KeyboardInterrupt):
            alnico.merge(recipe, tmp_path / "out", threads=2, watch=watch)
        assert begun.is_set()
        assert not ended.is_set()
        may_end.set()
        assert ended.wait(60)
    assert alnico.merge(recipe, tmp_path / "out").resumed == len(done)
    assert model_bytes(tmp_path / "out") == model_bytes(tmp_path / "whole")


def test_an_interrupted_run_does_not_wait_for_a_disk_that_takes_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "ABANDON_SECONDS", 0.01)
    may_end = threading.Event()
    lines = journal.JournalLines(tmp_path / "journal.jsonl", {}, sync=lambda: bool(may_end.wait(60)) and None)
    lines.add({"tensor": "w"})
    assert not lines.close(is_interrupted=True)
    may_end.set()


def test_a_file_that_a_thread_reads_is_closed_after_it(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x")
    opened = OpenFiles()
    with opened.descriptor(tmp_path / "x") as descriptor:
        opened.close()
        assert os.fstat(descriptor).st_size == 1
    with pytest.raises(OSError):
        os.fstat(descriptor)


def test_the_command_says_how_it_goes_on_after_ctrl_c(recipe: Path, tmp_path: Path) -> None:
    """As a user does it: the signal comes from outside, while threads work."""
    code = (
        "import os, signal, sys\n"
        "from alnico.cli import entry, progress\n"
        "from alnico.events import TensorDone\n"
        "from contextlib import contextmanager\n"
        "@contextmanager\n"
        "def bar(*_):\n"
        "    yield lambda event: os.kill(os.getpid(), signal.SIGINT) if isinstance(event, TensorDone) else None\n"
        "progress.bar = bar\n"
        f"sys.argv = ['alnico', 'merge', {str(recipe)!r}, {str(tmp_path / 'out')!r}]\n"
        "entry.command()\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, without_compiling(ended.stderr)) == (
        130,
        "alnico: interrupted. The same command resumes the merge.\n",
    )
    assert alnico.merge(recipe, tmp_path / "out").resumed > 0


def rewritten(path: Path) -> str:
    """Other bytes of the same size."""
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    return "its modification time differs"


def removed(path: Path) -> str:
    path.unlink()
    return "No such file or directory"


def grown(path: Path) -> str:
    size = path.stat().st_size
    with path.open("ab") as file:
        file.write(b"\0")
    return f"it had {size} bytes, now {size + 1}"


@pytest.mark.parametrize("change", [rewritten, removed, grown])
@pytest.mark.parametrize("name", ["tuned-1/model.safetensors", "base/config.json"])
def test_an_input_that_changes_during_the_run_is_named_and_nothing_is_published(
    change: Callable[[Path], str], name: str, recipe: Path, tmp_path: Path
) -> None:
    hows: list[str] = []

    def watch(event: Event) -> None:
        if isinstance(event, TensorDone) and event.tensor == "model.norm.weight":
            hows.append(change(tmp_path / name))

    with pytest.raises(ModelError) as caught:
        alnico.merge(recipe, tmp_path / "out", threads=1, watch=watch)
    assert str(caught.value) == (
        f"{tmp_path / name} ({hows[0]}): was changed while it was merged; expected the file that was planned with. "
        "Run the command again when nobody writes the file."
    )
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


def test_an_input_that_changes_back_is_told_by_its_hash(tmp_path: Path) -> None:
    """A tensor that two others are made of, with other bytes the second time; size and time are those that were planned with."""
    family(tmp_path, 1, layers=1)
    file = tmp_path / "tuned-0" / "model.safetensors"
    status = file.stat()
    slices = [{"sources": [{"model": str(tmp_path / "tuned-0"), "layer_range": [0, 1]}]} for _ in range(2)]
    done: list[str] = []

    def watch(event: Event) -> None:
        if isinstance(event, TensorDone) and event.tensor.startswith("model.layers.0"):
            done.append(event.tensor)
            if len(done) == 9:
                raw = bytearray(file.read_bytes())
                raw[:] = raw[: len(raw) // 2] + bytes(b ^ 1 for b in raw[len(raw) // 2 :])
                with file.open("r+b") as same:
                    same.write(raw)
                os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))

    given = {"merge_method": "passthrough", "slices": slices}
    with pytest.raises(
        ModelError,
        match=r"tuned-0: model\.layers\.0\.\S+: was read twice, with the hashes \w+ and \w+; expected one",
    ):
        alnico.merge(given, tmp_path / "out", threads=1, watch=watch)
    assert not (tmp_path / "out").exists()


def test_a_second_process_on_the_outputs_of_stages_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    family(tmp_path, 2, layers=1)
    Path("r.yml").write_text(
        "name: one\nmerge_method: linear\nmodels: [tuned-0, tuned-1]\n---\nmerge_method: linear\nmodels: [one, base]\nunrelated: allow\n"
    )
    refused: list[str] = []

    def watch(event: Event) -> None:
        if isinstance(event, Started):
            code = "import alnico; alnico.merge_documents('r.yml', 'out', restart=True)"
            refused.append(
                subprocess.run(
                    [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
                ).stderr
            )

    alnico.merge_documents("r.yml", "out", watch=watch)
    assert len(refused) == 2
    for message in refused:
        assert (
            "OutputError: out: another process is writing it. Wait for it, or choose another output."
            in message
        )
    with pytest.raises(OutputError, match="exists and is not empty"):
        alnico.merge_documents("r.yml", "out")


def test_an_interrupt_leaves_a_decomposition_and_the_same_command_takes_the_merge_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole matrices: a decomposition cannot be interrupted, finished matrices are kept, the bytes are the same."""
    base, tuned = family(tmp_path, 2, layers=2)
    given = {"merge_method": "tsv", "base_model": str(base), "models": [str(t) for t in tuned]}
    whole = alnico.merge(given, tmp_path / "whole")
    begun, interrupt, may_end, ended = (threading.Event() for _ in range(4))
    real, done = matrix.leading_vectors, list[str]()

    def decompose(*arguments: Any) -> Any:
        if len(done) >= 5 and not begun.is_set():
            begun.set()
            interrupt.set()
            may_end.wait(60)
            ended.set()
        return real(*arguments)

    def watch(event: Event) -> None:
        if isinstance(event, TensorDone):
            done.append(event.tensor)

    interrupting(interrupt)
    with monkeypatch.context() as patch:
        patch.setattr(matrix, "leading_vectors", decompose)
        with pytest.raises(KeyboardInterrupt):
            alnico.merge(given, tmp_path / "out", threads=2, watch=watch, factor_cache=tmp_path / "cache")
        assert begun.is_set()
        assert not ended.is_set()
        may_end.set()
        assert ended.wait(60)
    again = alnico.merge(given, tmp_path / "out", factor_cache=tmp_path / "cache")
    assert again.resumed >= 5
    assert len(whole.digests) > again.resumed
    assert model_bytes(tmp_path / "out") == model_bytes(tmp_path / "whole")
