"""What jobs read is asked for before, each byte once, in long runs of each file, and only so much of it at a time."""

from __future__ import annotations

import threading
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

import alnico
from alnico.checkpoint.file_model import FileModel
from alnico.checkpoint.source import Source
from alnico.checkpoint.writer import OutputFiles
from alnico.engine import disk_ahead
from alnico.engine.disk_ahead import DiskAhead
from alnico.errors import ModelError
from alnico.plan.job import Job
from made import family, read_model

RUN = 16 << 10


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, list[Path]]:
    return family(tmp_path, 2, shards=2, layers=2, hidden=128, vocabulary=1000)


class Asked:
    """Notes what the system is asked for; ``changed`` is notified of each request."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.requests: list[tuple[Path, int, int]] = []
        self.changed = threading.Condition()
        monkeypatch.setattr(disk_ahead, "RUN_BYTES", RUN)
        monkeypatch.setattr(FileModel, "ask_to_read", lambda _, *request: self._note(request))
        monkeypatch.setattr(FileModel, "missing_from_cache", lambda _: 1.0)

    def _note(self, request: tuple[Path, int, int]) -> None:
        with self.changed:
            self.requests.append(request)
            self.changed.notify_all()

    @property
    def bytes(self) -> int:
        return sum(end - begin for _, begin, end in self.requests)

    def wait_for(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.bytes >= count, 10)


def read(source: Source, name: str, start: int, size: int) -> None:
    source.read_into(name, start, memoryview(bytearray(size)))


def data_bytes(path: Path) -> tuple[int, int]:
    """Where the tensors of a file begin and end."""
    with open(path, "rb") as file:
        return 8 + int.from_bytes(file.read(8), "little"), path.stat().st_size


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_all_that_a_merge_reads_is_asked_for_once(
    models: tuple[Path, list[Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    threads: int,
) -> None:
    base, tuned = models
    asked = Asked(monkeypatch)
    recipe = alnico.make_recipe(tuned, method, base=None if method == "linear" else base)
    plan = alnico.plan(recipe)
    jobs = plan.jobs
    ahead = DiskAhead(plan.sources, 0)
    with ahead.over(jobs):
        asked.wait_for(plan.bytes_to_read)
    ahead.close()
    of_file: dict[Path, list[tuple[int, int]]] = defaultdict(list)
    for path, begin, end in asked.requests:
        of_file[path].append((begin, end))
    read = [*tuned, *([] if method == "linear" else [base])]
    assert set(of_file) == {file for model in read for file in model.glob("*.safetensors")}
    for path, spans in of_file.items():
        assert spans == sorted(spans)  # in the order of the file
        assert [end for _, end in spans[:-1]] == [begin for begin, _ in spans[1:]]  # without a gap
        assert (spans[0][0], spans[-1][1]) == data_bytes(path)
    longest = max(job.byte_size for job in jobs)
    assert longest > 4 * RUN  # such a tensor is cut
    assert max(end - begin for _, begin, end in asked.requests) <= 3 * RUN
    assert len(asked.requests) <= 3 * plan.bytes_to_read / RUN  # small ones are joined
    alnico.merge(recipe, tmp_path / "with", threads=threads)
    monkeypatch.setattr(DiskAhead, "_work", lambda _: None)
    alnico.merge(recipe, tmp_path / "without", threads=threads)
    ours, theirs = read_model(tmp_path / "with"), read_model(tmp_path / "without")
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_only_so_much_is_asked_for_before_it_is_read(
    models: tuple[Path, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Asked(monkeypatch)
    monkeypatch.setattr(disk_ahead, "MOST_BYTES", 8 * RUN)
    plan = alnico.plan(alnico.make_recipe(models[1], "linear"))
    ahead = DiskAhead(plan.sources, 0)
    run = 2 * RUN  # of each of two files
    with ahead.over(plan.jobs):
        asked.wait_for(8 * RUN)
        done = 0
        for job in plan.jobs:
            for start in range(0, job.inputs[0].byte_size, RUN):
                size = min(RUN, job.inputs[0].byte_size - start)
                for tensor in job.read:
                    read(plan.sources[tensor.model], tensor.name, start, size)
                    done += size
                    asked.wait_for(min(done + 8 * RUN - run, plan.bytes_to_read))
                    assert asked.bytes <= done + 8 * RUN + 2 * run
            for tensor in job.read:  # a second pass
                read(plan.sources[tensor.model], tensor.name, 0, tensor.byte_size)
    assert asked.bytes == plan.bytes_to_read
    ahead.close()


def test_a_model_that_is_in_memory_is_not_asked_for(
    models: tuple[Path, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Asked(monkeypatch)
    cached = models[1][0]
    share = disk_ahead.NEGLIGIBLE_SHARE
    monkeypatch.setattr(
        FileModel, "missing_from_cache", lambda model: share if model.location == cached else 2 * share
    )
    plan = alnico.plan(alnico.make_recipe(models[1], "linear"))
    ahead = DiskAhead(plan.sources, 0)
    with ahead.over(plan.jobs):
        asked.wait_for(plan.bytes_to_read // 2)
    ahead.close()
    assert {path.parent for path, _, _ in asked.requests} == {models[1][1]}
    assert asked.bytes == plan.bytes_to_read // 2


def test_what_cannot_be_asked_for_is_reported_where_it_is_read(
    models: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = threading.Event()

    def refused(*_: object) -> None:
        tried.set()
        raise ModelError("changed")

    monkeypatch.setattr(FileModel, "ask_to_read", refused)
    monkeypatch.setattr(FileModel, "missing_from_cache", lambda _: 1.0)
    plan = alnico.plan(alnico.make_recipe(models[1], "linear"))
    ahead = DiskAhead(plan.sources, 0)
    with ahead.over(plan.jobs):
        assert tried.wait(10)
    ahead.close()
    alnico.merge(alnico.make_recipe(models[1], "linear"), tmp_path / "out")


@pytest.mark.parametrize("method", ["linear", "ties"])
@pytest.mark.parametrize("missing_bytes", [0, 1])
def test_tensors_that_are_done_leave_the_page_cache_where_it_is_too_small(
    models: tuple[Path, list[Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    missing_bytes: int,
) -> None:
    base, tuned = models
    recipe = alnico.make_recipe(tuned, method, base=None if method == "linear" else base)
    plan = alnico.plan(recipe)
    room = plan.bytes_to_read + plan.bytes_to_write - missing_bytes
    done: set[str] = set()
    read: list[int] = []
    written: list[str] = []
    finished, closed = DiskAhead.done, DiskAhead.close

    def finish(self: DiskAhead, *jobs: Job) -> None:
        done.update(job.name for job in jobs)
        finished(self, *jobs)

    def end(self: DiskAhead) -> None:
        closed(self)
        read.extend(last - first for _, first, last, _, _ in self._used)  # the thread had no time left for

    def let_go(model: FileModel, path: Path, begin: int, end: int) -> None:
        inside = [
            n for n in model.tensors if (p := model.place_of(n)) and p[0] == path and begin <= p[1] < end
        ]
        assert inside
        assert done.issuperset(inside)
        read.append(end - begin)

    monkeypatch.setattr(disk_ahead, "cache_bytes", lambda: room)
    monkeypatch.setattr(disk_ahead, "WRITING_BYTES", RUN)
    monkeypatch.setattr(DiskAhead, "done", finish)
    monkeypatch.setattr(DiskAhead, "close", end)
    monkeypatch.setattr(FileModel, "let_go", let_go)
    monkeypatch.setattr(OutputFiles, "let_go", lambda _, name: written.append(name))
    alnico.merge(recipe, tmp_path / "out", threads=2)
    if not missing_bytes:
        assert (read, written) == ([], [])
        return
    assert sum(read) == plan.bytes_to_read
    assert len(written) == len(set(written))
    left = [job.byte_size for job in plan.jobs if job.name not in written]
    assert 0 < sum(left) < plan.bytes_to_write


def test_an_output_leaves_the_page_cache_when_the_disk_has_had_time_to_write_it(
    models: tuple[Path, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = alnico.plan(alnico.make_recipe(models[1], "linear"))
    after = [sum(job.byte_size for job in plan.jobs[i + 1 :]) for i in range(len(plan.jobs))]
    expected = [job.name for job, later in zip(plan.jobs, after, strict=True) if later >= RUN]
    assert 0 < len(expected) < len(plan.jobs) - 1
    monkeypatch.setattr(disk_ahead, "cache_bytes", lambda: 0)
    monkeypatch.setattr(disk_ahead, "WRITING_BYTES", RUN)
    written: list[str] = []
    changed = threading.Condition()

    def forget(name: str) -> None:
        with changed:
            written.append(name)
            changed.notify()

    ahead = DiskAhead(plan.sources, 1, forget)
    with ahead.over(plan.jobs), changed:
        for job in plan.jobs:
            ahead.done(job)
        assert changed.wait_for(lambda: len(written) == len(expected), 10)
    ahead.close()
    assert written == expected
