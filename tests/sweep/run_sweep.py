"""Run the checks of the sweep over architectures: ``python tests/sweep/run_sweep.py [--kind K] [--arch A] [--check C] [--out FILE.json]``.

It tests whichever alnico is on ``PYTHONPATH``. Architectures run in processes of their own, so that one that crashes costs its own line alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [p for p in (str(HERE.parent), str(HERE)) if p not in sys.path]

import architectures  # noqa: E402

TIMEOUT_SECONDS = 180
Table = dict[str, dict[str, Any]]
"""Architecture to its kind and its outcomes: ``{"kind": ..., "outcomes": {check: [what, detail]}}``."""


def chosen(kinds: list[str], names: list[str]) -> list[tuple[str, str]]:
    """(architecture, kind), each architecture once, under its first kind."""
    if names:
        return [(name, architectures.first_kind(name)) for name in names]
    found: dict[str, str] = {}
    for kind in architectures.KINDS:
        for name in architectures.of_kind(kind):
            found.setdefault(name, kind)
    return [(name, kind) for name, kind in found.items() if not kinds or kind in kinds]


class Worker:
    """A process that takes architectures one by one."""

    def __init__(self, checks: list[str]) -> None:
        self._words = [sys.executable, str(Path(__file__)), "--worker", *(w for c in checks for w in ("--check", c))]
        self._process: subprocess.Popen[str] | None = None

    def ask(self, name: str, kind: str) -> dict[str, list[str]]:
        if self._process is None or self._process.poll() is not None:
            env = {**os.environ, "HF_HUB_OFFLINE": "1"}
            self._process = subprocess.Popen(
                self._words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env
            )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        clock = threading.Timer(TIMEOUT_SECONDS, process.kill)
        clock.start()
        try:
            process.stdin.write(json.dumps([name, kind]) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = ""
        finally:
            clock.cancel()
        if not line:
            process.kill()
            process.wait()
            return {"crash": ["wrong", f"the process ended ({process.returncode})"]}
        found: dict[str, list[str]] = json.loads(line)
        return found

    def close(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.wait()


def work(checks: list[str]) -> None:
    """What a worker does: a line in, a line out."""
    told = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    import sweep_checks

    sweep_checks.quiet()
    names = tuple(checks) or tuple(sweep_checks.CHECKS)
    for line in sys.stdin:
        name, kind = json.loads(line)
        with tempfile.TemporaryDirectory(prefix="sweep-") as folder:
            found = sweep_checks.outcomes(name, kind, Path(folder), names)
        os.write(told, (json.dumps({c: [o.what, o.detail] for c, o in found.items()}) + "\n").encode())


def run(todo: list[tuple[str, str]], checks: list[str], processes: int, *, out: Path | None = None, say: bool = False) -> Table:
    """The outcomes of all; those that ``out`` has already are not run again, and each is written there as soon as it is known."""
    table: Table = json.loads(out.read_text()) if out is not None and out.exists() else {}
    waiting = [(name, kind) for name, kind in reversed(todo) if name not in table]
    lock = threading.Lock()

    def serve() -> None:
        worker = Worker(checks)
        while True:
            with lock:
                if not waiting:
                    break
                name, kind = waiting.pop()
            began = time.monotonic()
            found = worker.ask(name, kind)
            with lock:
                table[name] = {"kind": kind, "outcomes": found, "seconds": round(time.monotonic() - began, 1)}
                if out is not None:
                    out.write_text(json.dumps(table, indent=1))
                if say:
                    short = " ".join(f"{c}={w}" for c, (w, _) in found.items() if w != "equal")
                    print(f"{len(table)}/{len(todo)} {name} {short}", file=sys.stderr, flush=True)
        worker.close()

    threads = [threading.Thread(target=serve) for _ in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {name: table[name] for name, _ in todo}


def counts(table: Table) -> dict[tuple[str, str], Counter[str]]:
    """How many are equal, refused, wrong and untested, by (kind, check)."""
    found: dict[tuple[str, str], Counter[str]] = {}
    for entry in table.values():
        for check, (what, _) in entry["outcomes"].items():
            found.setdefault((entry["kind"], check), Counter())[what] += 1
    return found


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--kind", action="append", default=[])
    words.add_argument("--arch", action="append", default=[])
    words.add_argument("--check", action="append", default=[])
    words.add_argument("--processes", type=int, default=1)
    words.add_argument("--out", type=Path)
    words.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = words.parse_args()
    if given.worker:
        work(given.check)
        return
    table = run(chosen(given.kind, given.arch), given.check, given.processes, out=given.out, say=True)
    for (kind, check), found in counts(table).items():
        print(f"{kind:28} {check:12} " + "  ".join(f"{w} {found[w]}" for w in ("equal", "refused", "wrong", "untested")))
    for name, entry in table.items():
        for check, (what, detail) in entry["outcomes"].items():
            if what in ("wrong", "refused") or given.arch:
                print(f"{what:9} {name} {check}: {detail}")


if __name__ == "__main__":
    main()
