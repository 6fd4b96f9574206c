"""The fuzzers run, for a few seconds each; for long they run by hand, as CONTRIBUTING.md says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fuzz.harness import Run, Target
from fuzz.run import HERE, TARGETS


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_a_short_run_finds_nothing(target: str, tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, str(HERE / "run.py"), target, "--seconds", "5", "--findings", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    told = re.fullmatch(
        rf"{target}: ([\d,]+) executions in 5 s, ([\d,]+) edges, \d+ inputs kept, no finding\n", ended.stdout
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert told is not None
    assert int(told[1].replace(",", "")) > 20, "the reader was hardly run"
    assert int(told[2].replace(",", "")) > 10, "the reader is not instrumented"


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
