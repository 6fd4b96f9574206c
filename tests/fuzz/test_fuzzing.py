"""The fuzzers find nothing: for ten minutes each at night, and before in fixed mutations and one short run."""

from __future__ import annotations

import importlib
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fuzz.harness import Run, Target, mutated_json
from fuzz.run import HERE, MAX_INPUT_BYTES, TARGETS, import_readers

MUTATIONS = 80
NIGHTLY_MUTATIONS = 2000
DEEP = 8
"""So many mutations are made one upon the other; then the next seed is taken."""


def fuzzed(target: str, seconds: int, findings: Path) -> tuple[int, int]:
    """Run a target in a process of its own; return how often its reader ran, and how many edges were covered."""
    ended = subprocess.run(
        [
            sys.executable,
            str(HERE / "run.py"),
            target,
            "--seconds",
            str(seconds),
            "--findings",
            str(findings),
        ],
        capture_output=True,
        text=True,
        timeout=seconds + 300,
    )
    told = re.fullmatch(
        rf"{target}: ([\d,]+) executions in {seconds} s, ([\d,]+) edges, \d+ inputs kept, no finding\n",
        ended.stdout,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert told is not None
    return int(told[1].replace(",", "")), int(told[2].replace(",", ""))


@pytest.mark.parametrize(
    ("target", "seconds"),
    [
        pytest.param("header", 2, marks=[pytest.mark.slow, pytest.mark.before_each_merge]),
        *(pytest.param(target, 600, marks=pytest.mark.nightly) for target in TARGETS),
    ],
)
def test_a_run_of_the_fuzzer_finds_nothing(target: str, seconds: int, tmp_path: Path) -> None:
    executions, edges = fuzzed(target, seconds, tmp_path)
    assert executions > 20, "the reader was hardly run"
    assert edges > 10, "the reader is not instrumented"


@pytest.mark.parametrize(
    ("target", "mutations"),
    [
        *(pytest.param(target, MUTATIONS, marks=pytest.mark.slow) for target in TARGETS),
        *(pytest.param(target, NIGHTLY_MUTATIONS, marks=pytest.mark.nightly) for target in TARGETS),
    ],
)
def test_the_same_mutations_of_every_seed_find_nothing_again(target: str, mutations: int) -> None:
    import_readers()
    before = functions_of_alnico()
    run = Run(importlib.import_module(f"fuzz.fuzz_{target}").TARGET)
    change = run.target.mutate or mutated_json
    draw = random.Random(0)
    seeds = run.target.seeds()
    content = seeds[0]
    try:
        for number in range(mutations):
            if number % DEEP == 0:
                content = seeds[number // DEEP % len(seeds)]
                run(content)
            changed = change(content, draw, run.target.words)
            if changed is None or len(changed) > MAX_INPUT_BYTES:
                at = draw.randrange(len(content) + 1)
                changed = content[:at] + draw.randbytes(draw.randrange(5)) + content[at + draw.randrange(5) :]
            content = changed
            run(content)
    finally:
        run.close()
    after = functions_of_alnico()
    assert {name for name, made in before.items() if after[name] is not made} == set(), (
        "later tests meet them"
    )


def functions_of_alnico() -> dict[str, object]:
    return {
        f"{module}.{name}": value
        for module, loaded in list(sys.modules.items())
        if module.partition(".")[0] == "alnico"
        for name, value in vars(loaded).items()
        if callable(value)
    }


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("open('/etc/hostname', 'rb').close()", "open /etc/hostname"),
        ("__import__('os').listdir('/etc')", "os.listdir /etc"),
        ("eval('1 + 1')", "compile"),
        ("__import__('os').system('true')", "os.system"),
        ("bytearray(1 << 26)", "bytes for an input of 1"),
        ("__import__('pickle').loads(b'cos\\nsystem\\n.')", "pickle.find_class"),
    ],
)
def test_a_reader_that_does_what_it_must_not_is_found_even_if_it_hides_it(body: str, told: str) -> None:
    code = compile(
        f"def read(data, folder):\n  try:\n    if data: {body}\n  except Exception: pass", __file__, "exec"
    )
    names: dict[str, object] = {}
    exec(code, names)
    run = Run(Target(names["read"], lambda: [b""]))  # type: ignore[arg-type]
    try:
        run(b"")
        with pytest.raises(AssertionError, match=re.escape(told)):
            run(b"x")
    finally:
        run.close()


def test_a_crash_of_a_reader_is_found() -> None:
    def read(data: bytes, _: Path) -> None:
        if data:
            raise ValueError("not an error of alnico's")

    run = Run(Target(read, lambda: [b""]))
    try:
        with pytest.raises(ValueError, match="not an error"):
            run(b"x")
    finally:
        run.close()
