"""Kills merges, each in a process of its own, takes them up, and compares bytes. ``python tests/killing.py`` prints the figures.

The process that does so loads no test framework: it forks, so that a merge that is killed costs no start-up, and nothing but the
killed merge has threads.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import alnico
from alnico.checkpoint.file_model import FileModel
from alnico.checkpoint.open_model import open_model
from alnico.errors import ModelError
from alnico.output import journal as journals
from made import family
from os_calls import Counting, watched
from small_merges import everything, made_recipe, merged, tensors_in

CHAIN = """\
name: one
merge_method: linear
models: [{0}/tuned-0, {0}/tuned-1]
dtype: bfloat16
unrelated: allow
---
merge_method: slerp
base_model: one
models: [one, {0}/base]
parameters: {{t: 0.4}}
unrelated: allow
"""


def dies(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def part_of(out: Path) -> Path:
    return out.parent / f".{out.name}.alnico-part"


def is_killed(merge: Callable[[], object], wait: Callable[[], None] | None = None) -> bool:
    """Run a merge in a process of its own; ``wait`` returns when it is to be killed, if it does not do so itself."""
    child = os.fork()
    if child == 0:
        try:
            merge()
        finally:
            os._exit(0)
    if wait is not None:
        wait()
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def models_in(folder: Path) -> list[Path]:
    """What under a folder loads as a model: folders, and files by themselves."""
    found = []
    for path in [folder, *folder.rglob("*")] if folder.exists() else []:
        try:
            with open_model(path):
                found.append(path)
        except ModelError:
            pass
    return found


class Tally:
    """What was seen over all kills."""

    def __init__(self) -> None:
        self.seen = {
            "killed": 0,
            "after_the_first_tensor": 0,
            "output_complete": 0,
            "differences": 0,
            "read_again": 0,
            "visible": 0,
        }

    def take_up(
        self, out: Path, expected: dict[str, bytes], merge: Callable[[], alnico.MergeResult | None]
    ) -> None:
        """Look at what a killed merge left, give the same command again, and compare."""
        self.seen["killed"] += 1
        found = everything(out)
        finished = tensors_in(part_of(out) / "journal.jsonl")
        self.seen["after_the_first_tensor"] += bool(finished) or bool(found)
        self.seen["output_complete"] += found == expected
        self.seen["visible"] += found not in ({}, expected)
        # Under its hidden place a file has a header, and a model its names, when all of it is there and on the disk.
        for model in models_in(part_of(out)):
            is_whole = (
                model.is_file() and model.read_bytes() == expected[model.name.removesuffix(".unfinished")]
            )
            self.seen["visible"] += not (is_whole or everything(model) == expected)
        read: set[str] = set()
        real = FileModel.read_into

        def read_into(model: FileModel, name: str, offset: int, buffer: memoryview) -> None:
            read.add(name)
            real(model, name, offset, buffer)

        FileModel.read_into = read_into  # type: ignore[method-assign]
        try:
            if found != expected or part_of(out).exists():
                with watched(out.parent):
                    merge()
        finally:
            FileModel.read_into = real  # type: ignore[method-assign]
        self.seen["read_again"] += len(read & finished)
        self.seen["differences"] += everything(out) != expected
        left = [p for p in out.parent.glob(".*") if not p.name.endswith("-gone")]
        self.seen["visible"] += len(left)
        for path in (out, *out.parent.glob(".*")):
            shutil.rmtree(path)


def at_calls(root: Path, every: int) -> dict[str, Any]:
    """Kill a small merge at each of its calls of the system (or each ``every`` th)."""
    recipe, out, tally = made_recipe(root), root / "out", Tally()
    expected = everything(merged(recipe, root / "whole").path)
    with watched(root, counting := Counting(-1, dies)):
        merged(recipe, out)
    shutil.rmtree(out)
    for number in range(0, counting.calls, every):

        def merge(number: int = number) -> None:
            with watched(root, Counting(number, dies)):
                merged(recipe, out)

        if is_killed(merge):
            tally.take_up(out, expected, lambda: merged(recipe, out))
        else:  # the background thread has written in fewer batches this time
            shutil.rmtree(out)
    return {"calls": counting.calls, **tally.seen}


def at_calls_of_stages(root: Path, every: int) -> dict[str, Any]:
    """Kill two stages at each (or each ``every`` th) call of the system."""
    made_recipe(root)
    recipe, out, tally = root / "chain.yml", root / "out", Tally()
    recipe.write_text(CHAIN.format(root))

    def run(target: Path) -> None:
        alnico.merge_documents(recipe, target, threads=1, max_shard_size=300)

    run(root / "whole")
    expected = everything(root / "whole")
    with watched(root, counting := Counting(-1, dies)):
        run(out)
    shutil.rmtree(out)
    for number in range(0, counting.calls, every):

        def merge(number: int = number) -> None:
            with watched(root, Counting(number, dies)):
                run(out)

        if is_killed(merge):
            stages = root / ".out.alnico-stages"
            found = everything(out)
            tally.seen["killed"] += 1
            tally.seen["output_complete"] += found == expected
            tally.seen["visible"] += found not in ({}, expected)
            if found != expected or stages.exists():
                with watched(root):
                    run(out)
            tally.seen["differences"] += everything(out) != expected
            tally.seen["visible"] += stages.exists()
        for path in (out, *root.glob(".*")):
            shutil.rmtree(path)
    return {"calls": counting.calls, **tally.seen}


def at_moments(root: Path, moments: int, seed: int) -> dict[str, Any]:
    """Kill a merge of 146 tensors, with two threads, at random moments: four of five after its first finished tensor."""
    base, tuned = family(root, 3, layers=16, hidden=64, vocabulary=512, shards=2)
    recipe = root / "recipe.yml"
    recipe.write_text(
        f"merge_method: ties\nbase_model: {base}\nmodels: [{', '.join(map(str, tuned))}]\nparameters: {{density: 0.5}}\n"
    )
    out, chance, tally = root / "out", random.Random(seed), Tally()
    journals.BATCH_SECONDS = 0.01  # many batches, so that a kill falls among them

    def merge() -> alnico.MergeResult:
        return alnico.merge(recipe, out, threads=2)

    expected = everything(merge().path)
    shutil.rmtree(out)
    begin = time.perf_counter()
    is_killed(merge)
    seconds = time.perf_counter() - begin
    shutil.rmtree(out)
    while tally.seen["killed"] < moments:
        is_late = tally.seen["killed"] >= moments // 5
        share = chance.random()

        def wait(share: float = share, is_late: bool = is_late) -> None:
            begin = time.perf_counter()
            while is_late and not tensors_in(part_of(out) / "journal.jsonl") and not out.exists():
                time.sleep(0.001)
            time.sleep(share * max(seconds - (time.perf_counter() - begin), 0.01))

        if is_killed(merge, wait):
            tally.take_up(out, expected, merge)
        else:
            shutil.rmtree(out)  # it was faster than the kill
    return {"tensors": len(alnico.plan(recipe).jobs), "moments": moments, **tally.seen}


def interrupts(root: Path, moments: int, seed: int) -> dict[str, Any]:
    """Interrupt the same merge at random moments, as Ctrl-C does; returns how long each took to end."""
    base, tuned = family(root, 3, layers=16, hidden=64, vocabulary=512, shards=2)
    given = {
        "merge_method": "ties",
        "base_model": str(base),
        "models": [*map(str, tuned)],
        "parameters": {"density": 0.5},
    }
    out, chance = root / "out", random.Random(seed)
    expected = everything(alnico.merge(given, out, threads=2).path)
    shutil.rmtree(out)
    begin = time.perf_counter()
    is_killed(lambda: alnico.merge(given, out, threads=2))
    seconds = time.perf_counter() - begin
    shutil.rmtree(out)
    ended: list[float] = []
    resumed = differences = 0
    while len(ended) < moments:
        child = os.fork()
        if child == 0:
            try:
                alnico.merge(given, out, threads=2)
            except KeyboardInterrupt:
                os._exit(130)
            finally:
                os._exit(0)
        time.sleep(0.02 + chance.random() * seconds)
        begin = time.perf_counter()
        os.kill(child, signal.SIGINT)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130:
            ended.append(time.perf_counter() - begin)
            if everything(out) != expected:
                resumed += alnico.merge(given, out, threads=2).resumed > 0
            differences += everything(out) != expected
        shutil.rmtree(out)
    return {
        "interrupted": moments,
        "longest_seconds": round(max(ended), 3),
        "resumed": resumed,
        "differences": differences,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["calls", "stages", "moments", "interrupts"])
    parser.add_argument("--every", type=int, default=1, help="kill at each call, or at each nth")
    parser.add_argument("--moments", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--folder", help="where models and outputs lie for the while; a kill loses nothing that is in memory"
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        root = Path(folder).resolve()
        if given.what in ("moments", "interrupts"):
            found = (at_moments if given.what == "moments" else interrupts)(root, given.moments, given.seed)
        else:
            found = (at_calls if given.what == "calls" else at_calls_of_stages)(root, given.every)
    json.dump(found, sys.stdout)
    print()


if __name__ == "__main__":
    main()
