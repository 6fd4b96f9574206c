"""Fuzz alnico's readers, guided by coverage: ``python tests/fuzz/run.py TARGET --seconds 600``; ``all`` takes one after the other.

It ends with a line a target: how often its reader ran, what was covered, and what was found. The exit code is 1 if a target failed;
its input is kept, and ``python tests/fuzz/run.py TARGET --again FILE`` gives it to the reader again.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1] / "src"), str(HERE.parent)]

TARGETS = tuple(sorted(p.stem.removeprefix("fuzz_") for p in HERE.glob("fuzz_*.py")))
ROOMS = ("numerics", "checkpoint", "recipe", "vocabulary", "plan", "engine", "analysis", "tune")
TIMEOUT_SECONDS = 20
MAX_INPUT_BYTES = 1 << 16
INSIDE = "--inside"
"""Says that the rest are libFuzzer's options: this process is the one that it ends."""

FREE = 0.3
"""Share of mutations that are of bytes where a target has mutations of its own."""


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("target", choices=(*TARGETS, "all"))
    words.add_argument("--seconds", type=int, default=600, help="how long each target runs")
    words.add_argument("--seed", type=int, default=0, help="of libFuzzer; 0 draws one")
    words.add_argument(
        "--corpus", type=Path, help="a folder that keeps inputs which cover something new, for later runs"
    )
    words.add_argument("--findings", type=Path, default=Path(), help="the folder for inputs that fail")
    words.add_argument("--again", type=Path, help="give this input to the reader, and stop")
    if len(sys.argv) > 2 and sys.argv[2] == INSIDE:
        return _fuzz(sys.argv[1], sys.argv[3:])
    given = words.parse_args()
    if given.again is not None:
        return _again(given.target, given.again)
    return max([_started(name, given) for name in (TARGETS if given.target == "all" else (given.target,))])


def _started(name: str, given: argparse.Namespace) -> int:
    """Run one target in a process of its own, which libFuzzer ends; print what it did."""
    with tempfile.TemporaryDirectory() as made:
        corpus = given.corpus / name if given.corpus else Path(made) / "corpus"
        corpus.mkdir(parents=True, exist_ok=True)
        given.findings.mkdir(parents=True, exist_ok=True)
        options = [
            f"-max_total_time={given.seconds}", f"-seed={given.seed}", f"-timeout={TIMEOUT_SECONDS}", "-rss_limit_mb=2048",
            f"-max_len={MAX_INPUT_BYTES}", "-print_final_stats=1", f"-artifact_prefix={given.findings}/{name}-", str(corpus),
        ]  # fmt: skip
        ended = subprocess.run(
            [sys.executable, __file__, name, INSIDE, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    progress = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", ended.stdout) or [("?", "?", "?")]
    runs = re.search(r"stat::number_of_executed_units:\s*(\d+)", ended.stdout)
    if ended.returncode:
        print(ended.stdout[-6000:], file=sys.stderr)
    print(
        f"{name}: {int(runs[1]) if runs else 0:,} executions in {given.seconds} s, {int(progress[-1][0] if progress[-1][0] != '?' else 0):,} edges, "
        f"{progress[-1][2]} inputs kept, {'a finding' if ended.returncode else 'no finding'}",
        flush=True,
    )
    return 1 if ended.returncode else 0


def _fuzz(name: str, options: list[str]) -> int:
    import atheris

    with atheris.instrument_imports(include=["alnico"], enable_loader_override=False):
        import_readers()
        target = importlib.import_module(f"fuzz.fuzz_{name}").TARGET
    from fuzz.harness import Run, mutated_json

    corpus = Path(options[-1])
    for number, seed in enumerate(target.seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)
    own = target.mutate or mutated_json

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        draw = random.Random(seed)
        changed = own(data, draw, target.words) if draw.random() >= FREE else None
        return changed if changed is not None and len(changed) <= most else atheris.Mutate(data, most)

    run = Run(target)
    atheris.Setup([__file__, *options], run, custom_mutator=mutate)
    try:
        atheris.Fuzz()
    finally:
        run.close()
    return 0


def _again(name: str, file: Path) -> int:
    import_readers()
    target = importlib.import_module(f"fuzz.fuzz_{name}").TARGET
    from fuzz.harness import Run

    run = Run(target)
    try:
        run(file.read_bytes())
    finally:
        run.close()
    print(f"{name}: {file} is read, or refused, as it should be")
    return 0


def import_readers() -> None:
    """Import the readers, so that nothing is imported while one is watched."""
    import alnico

    for room in ROOMS:
        package = importlib.import_module(f"alnico.{room}")
        for module in pkgutil.iter_modules(package.__path__):
            try:
                importlib.import_module(f"alnico.{room}.{module.name}")
            except ImportError:  # an extra that is not installed
                continue
    alnico.methods()


if __name__ == "__main__":
    sys.exit(main())
