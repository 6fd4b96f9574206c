"""Run the checks of the sweep over architectures: ``python tests/sweep/run_sweep.py [--kind K] [--arch A] [--check C] [--out FILE.json]``.

It tests whichever alnico is on ``PYTHONPATH``. Architectures run in processes of their own, so that one that crashes costs its own line alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [p for p in (str(HERE.parent), str(HERE)) if p not in sys.path]

import architectures  # noqa: E402

TIMEOUT_SECONDS = 900
WHOLE = (
    "causal_lm",
    "masked_lm",
    "seq2seq_lm",
    "sequence_classification",
    "image_classification",
    "image_text_to_text",
    "multimodal_lm",
    "clip_like",
    "speech_seq2seq",
    "ctc",
)
"""The kinds of which every architecture is run."""
WHATS = ("equal", "refused", "wrong", "untested")
Table = dict[str, dict[str, Any]]
"""Architecture to its kind and its outcomes: ``{"kind": ..., "outcomes": {check: [what, detail]}}``."""


def chosen(kinds: list[str], names: list[str]) -> list[tuple[str, str]]:
    """(architecture, kind), each architecture once, under its first kind.

    Beyond ``WHOLE``, a type of model that is there already is left out: its other heads have the same layers under the same names.
    """
    if names:
        return [(name, architectures.first_kind(name)) for name in names]
    found: dict[str, str] = {}
    seen: set[str] = set()
    for kind in architectures.KINDS:
        for name in architectures.of_kind(kind):
            types = architectures.types()[name]
            if kind in WHOLE or not seen.issuperset(types):
                found.setdefault(name, kind)
                seen.update(types)
    return [(name, kind) for name, kind in found.items() if not kinds or kind in kinds]


class Worker:
    """A process that takes architectures one by one."""

    def __init__(self, checks: list[str]) -> None:
        self._words = [
            sys.executable,
            str(Path(__file__)),
            "--worker",
            *(w for c in checks for w in ("--check", c)),
        ]
        self._process: subprocess.Popen[str] | None = None

    def ask(self, name: str, kind: str) -> dict[str, list[str]]:
        if self._process is None or self._process.poll() is not None:
            env = {**os.environ, "HF_HUB_OFFLINE": "1"}
            self._process = subprocess.Popen(
                self._words,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=env,
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
            self.close()
            return {"crash": ["wrong", f"the process ended ({process.returncode})"]}
        found: dict[str, list[str]] = json.loads(line)
        return found

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            with contextlib.suppress(OSError):
                self._process.communicate()  # closes what it reads and writes
            self._process = None


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


def run(
    todo: list[tuple[str, str]],
    checks: list[str],
    processes: int,
    *,
    out: Path | None = None,
    say: bool = False,
) -> Table:
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


# --- The page

TITLES = {
    "average": "an average of two fine-tunes, compared with the weighted mean in float64",
    "ties": "TIES of two fine-tunes, compared with the reference in float64",
    "tied copies": "an average with a fine-tune saved by `torch.save(module.state_dict())`",
    "prefix": "an average with a fine-tune whose names begin with `module.`",
    "stack": "six layers from two models of four, compared with the module put together by hand",
    "union": "`tokenizer_source: union` of two models whose words have different ids",
    "lora": "a LoRA adapter of PEFT on all linear layers, compared with `merge_and_unload`",
    "adamerging": "the entropy that AdaMerging reports, compared with that of the model its recipe makes",
}
MODELS = (
    "In the causes, `a` and `b` are the fine-tunes of `base`.",
    "`b-state`, `b-prefix`, `a-words` and `b-words` are copies of them as the check describes.",
    "`second` is the other model of a stack, and `adapter` is the adapter.",
)
"""What the models in the causes are."""
BEFORE = HERE / "before.json"
"""The counts on the commit before the sweep was first run: ``{check: {what: how many}}``."""


def by_check(table: Table) -> dict[str, Counter[str]]:
    found: dict[str, Counter[str]] = {check: Counter() for check in TITLES}
    for (_, check), counted in counts(table).items():
        found.setdefault(check, Counter()).update(counted)
    return found


def cause(detail: str) -> str:
    """The first error of a refusal, in its own words, without folders and without the names of one model's tensors."""
    first = detail.split(" / ")[0]
    first = re.sub(
        r"/\S*/(?:deep/)?(base|a|b|second|b-state|b-prefix|a-words|b-words|adapter)\b", r"\1", first
    )
    first = re.sub(r"\s*(Use models of one architecture|It has ').*$", "", first)
    return first.replace("|", "\\|").replace("<", "&lt;")


def page(table: Table, before: Mapping[str, Mapping[str, int]]) -> str:
    """``docs/architectures.md``."""
    import transformers

    lines = [
        "# Architectures",
        "",
        "This page says on which architectures of transformers merges were tested, and which merges alnico refuses.",
        "Look for the name under `architectures` in your model's `config.json` in the tables of [refused merges](#refused) and of [architectures that were not tested](#not-made).",
        "For all other architectures of the sweep, every check that transformers and PEFT can do gave the expected result.",
        "",
        f"Small models of {len(table)} architectures of transformers {transformers.__version__} were made, fine-tuned at random and saved; then each of the checks below merged them.",
        "A result counts as *equal* if transformers loads the output without missing or unused tensors, if its values are those of the reference, and if it computes the same forward pass.",
        "*Refused* means an error with its cause instead of a model.",
        "*Wrong* is every other result.",
        "*Untested* is what transformers or PEFT cannot do with that architecture.",
        "",
        "The sweep covers all causal, masked and sequence-to-sequence language models, classifiers of text and images, models of images and text, models like CLIP, and speech recognisers.",
        "Of every other model type it covers one head.",
        "",
        "    python tests/sweep/run_sweep.py --processes 2 --out sweep.json --page docs/architectures.md    # an hour; this page is its output",
        "",
        "## Results by check",
        "",
        "| check | equal | refused | wrong | untested | before: equal | refused | wrong |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for check, counted in by_check(table).items():
        row = [str(counted[w]) for w in WHATS] + [
            str(before[check].get(w, 0) if check in before else "") for w in WHATS[:3]
        ]
        lines.append(f"| {check}: {TITLES.get(check, check)} | {' | '.join(row)} |")
    lines += [
        "",
        f"*Before* is commit 95f1985, on which {sum(before.get('average', {}).values())} of them were run.",
        "",
        "## Results by kind of model",
        "",
        "Each cell is equal / refused / wrong.",
        "An architecture counts once, under the first kind that lists it.",
        "",
    ]
    checks = list(by_check(table))
    lines += [f"| kind | architectures | {' | '.join(checks)} |", "|---|---|" + "---|" * len(checks)]
    counted_by = counts(table)
    for kind in dict.fromkeys(entry["kind"] for entry in table.values()):
        many = sum(entry["kind"] == kind for entry in table.values())
        cells = [counted_by.get((kind, check)) for check in checks]
        shown = [f"{c['equal']} / {c['refused']} / {c['wrong']}" if c else "" for c in cells]
        lines.append(f"| {kind.replace('_', ' ')} | {many} | {' | '.join(shown)} |")
    for what, title in (("refused", "Refused"), ("wrong", "Wrong")):
        lines += ["", f"## {title}", ""]
        rows = [
            (c, n, cause(d)) for n, e in table.items() for c, (w, d) in e["outcomes"].items() if w == what
        ]
        if not rows:
            lines.append("Nothing.")
            continue
        lines += [*MODELS, ""]
        lines += ["| check | architecture | cause |", "|---|---|---|"]
        lines += [
            f"| {check} | {name} | {why} |"
            for check, name, why in sorted(rows, key=lambda r: (checks.index(r[0]), r[1]))
        ]
    lines += [
        "",
        "## Not made",
        "",
        "The sweep cannot make small models of these architectures of transformers:",
        "",
    ]
    lines += [
        "| architecture | why |",
        "|---|---|",
        *(f"| {name} | {why} |" for name, why in sorted(architectures.NOT_MADE.items())),
    ]
    return "\n".join(lines) + "\n"


def refused_on(written: str) -> set[tuple[str, str]]:
    """(check, architecture) of the refusals that a page lists."""
    part = written.partition("## Refused")[2].partition("\n## ")[0]
    rows = [
        line.split(" | ")
        for line in part.splitlines()
        if line.startswith("| ") and not line.startswith("| check")
    ]
    return {(row[0].removeprefix("| "), row[1]) for row in rows}


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--kind", action="append", default=[])
    words.add_argument("--arch", action="append", default=[])
    words.add_argument("--check", action="append", default=[])
    words.add_argument("--processes", type=int, default=1)
    words.add_argument("--out", type=Path)
    words.add_argument("--page", type=Path, help="write docs/architectures.md")
    words.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = words.parse_args()
    if given.worker:
        work(given.check)
        return
    table = run(chosen(given.kind, given.arch), given.check, given.processes, out=given.out, say=True)
    if given.page:
        given.page.write_text(page(table, json.loads(BEFORE.read_text())), "utf-8")
    for (kind, check), found in counts(table).items():
        print(f"{kind:28} {check:12} " + "  ".join(f"{w} {found[w]}" for w in WHATS))
    for name, entry in table.items():
        for check, (what, detail) in entry["outcomes"].items():
            if what in ("wrong", "refused") or given.arch:
                print(f"{what:9} {name} {check}: {detail}")


if __name__ == "__main__":
    main()
