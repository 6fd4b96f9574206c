"""Measures searches of a store of 10,000 task vectors, with and without a remote of as many: ``python benchmarks/store_search.py``.

Manifests are small, as the index holds nothing else of them. The first search makes the index; the others are in this process, and
the last is the whole command.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import alnico
from alnico.store.entry import Entry

TASKS = ("math", "sql", "chat", "medical", "law", "code", "translation", "summaries")
LANGUAGES = ("ja", "de", "fr", "sw", "hi")
WORDS = (
    "writes",
    "answers",
    "queries",
    "long",
    "short",
    "careful",
    "reasoning",
    "exams",
    "dialogue",
    "agents",
    "tables",
    "proofs",
)


def manifest(draw: random.Random, i: int) -> dict[str, object]:
    return {
        "format": "alnico task vector",
        "version": 1,
        "name": f"vector-{i:05}",
        "base": {"id": f"owner/base-{i % 50}", "root": f"{i % 50:064x}"},
        "finetuned": {},
        "tensors": {},
        "description": " ".join(draw.choices(WORDS, k=12)),
        "tasks": draw.sample(TASKS, 2),
        "languages": draw.sample(LANGUAGES, 1),
        "licence": draw.choice(("mit", "apache-2.0", "cc-by-nc-4.0")),
    }


def best_of(work: Callable[[], object], times: int = 5) -> str:
    """The best of several runs: by the clock, and of a processor."""
    seconds, own = [], []
    for _ in range(times):
        begin, own_begin = time.perf_counter(), time.process_time()
        work()
        seconds.append(time.perf_counter() - begin)
        own.append(time.process_time() - own_begin)
    return f"{min(seconds):8.3f} s  {min(own):8.3f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vectors", type=int, default=10_000)
    arguments = parser.parse_args()
    draw = random.Random(1)
    with tempfile.TemporaryDirectory() as root:
        store = alnico.Store(Path(root, "store"))
        store.local.begin()
        for i in range(arguments.vectors):
            folder = store.folder / "vectors" / f"vector-{i:05}" / "1"
            folder.mkdir(parents=True)
            (folder / "taskvector.json").write_text(json.dumps(manifest(draw, i)))
        time.sleep(4)  # a folder that changed within three seconds is read again by the next search
        print(f"{arguments.vectors:,} task vectors in the store\n  by clock   processor")
        print(f"{best_of(lambda: store.search('math'), 1)}  the first search, which makes the index")
        searches: dict[str, Callable[[], object]] = {
            "one word": lambda: store.search("math"),
            "two words, of which one is rare": lambda: store.search("reasoning vector-0500"),
            "base": lambda: store.search(base="owner/base-7"),
            "base, task and licence": lambda: store.search(base="owner/base-7", task="math", licence="mit"),
            "a common word, language and task": lambda: store.search("writes", language="ja", task="law"),
            "nothing found": lambda: store.search("xylophone"),
            "everything": lambda: store.search(),
        }
        for what, search in searches.items():
            print(f"{best_of(search)}  {what}")
        entries = [
            Entry(f"remote-{i:05}", 1, f"{i:064x}", 1, description=" ".join(draw.choices(WORDS, k=12)), tasks=("math",), base=f"owner/base-{i % 50}")
            for i in range(arguments.vectors)
        ]  # fmt: skip
        store.local.note_entries("https://example.org/vectors", entries)
        store.search("math")
        print(f"with {arguments.vectors:,} more of a remote")
        for what, search in searches.items():
            print(f"{best_of(search)}  {what}")
        command = [sys.executable, "-m", "alnico", "store", "search", "math", "--store", str(store.folder)]
        print(
            f"{best_of(lambda: subprocess.run(command, check=True, capture_output=True), 3)}  the whole command"
        )


if __name__ == "__main__":
    main()
