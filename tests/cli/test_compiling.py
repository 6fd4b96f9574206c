"""What a first run says about compiling: before it begins, in the line of the result, in JSON and in Python."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

import alnico
from alnico.cli.command import COMPILING
from alnico.cli.commands.merge import result_line
from alnico.cli.main import load_command
from alnico.cli.summaries import SUMMARIES
from alnico.engine.run import MergeResult
from alnico.kernels import build
from alnico.kernels.clock import CLOCK, time_text
from alnico.numerics.sizes import format_size
from lora.made_adapters import linear
from made import save_model
from made_tasks import Made

Run = Callable[..., tuple[int, str, str]]

pytestmark = pytest.mark.usefixtures("compiled")


@pytest.fixture
def cold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A process without kernels, in memory and on disk, in a folder with three small models.

    Compiling a kernel takes a second by the clock; its code comes from the cache of all tests, so that they take less.
    """
    everyone, compiled = os.environ.get("ALNICO_CACHE_DIR"), build._compile

    def compile_text(text: str) -> tuple[str, bytes]:
        CLOCK.add(1.0)
        with pytest.MonkeyPatch.context() as before:
            if everyone is None:
                before.delenv("ALNICO_CACHE_DIR")
            else:
                before.setenv("ALNICO_CACHE_DIR", everyone)
            key = build._key(text)
            if (kept := build.read_kernel(key)) is None:
                build.write_kernel(key, *(kept := compiled(text)))
        return kept

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(build, "_compile", compile_text)
    monkeypatch.setattr(CLOCK, "is_kept", True)
    monkeypatch.setenv("ALNICO_CACHE_DIR", str(tmp_path / "cache"))
    values = np.arange(1, 9, dtype=np.float32).reshape(4, 2)
    for name, factor in (("base", 1.0), ("a", 1.5), ("b", 2.0)):
        save_model(Path(name), {"w": ("F32", values * np.float32(factor))}, {"architectures": ["XModel"]})
    forget()
    yield tmp_path
    forget()


def forget() -> None:
    build.compile_kernel.cache_clear()
    build._load_or_compile.cache_clear()


@pytest.fixture
def raw(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """``run`` of conftest.py, with what it leaves out."""
    from alnico.cli.main import main

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["alnico", *words])
        with pytest.raises(SystemExit) as caught:
            main()
        output = capsys.readouterr()
        return int(caught.value.code or 0), output.out, output.err

    return call


def test_the_time_of_a_run_names_what_compiling_took(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CLOCK, "is_kept", True)  # an earlier test may have compiled without a cache
    assert time_text(3.7, 0.0) == time_text(3.74, 0.04) == "3.70 s"
    assert time_text(49.7, 46.0) == "3.70 s + 46 s compiling kernels (kept for the next run)"
    assert time_text(3.7, 2.0) == "1.70 s + 2.0 s compiling kernels (kept for the next run)"


def test_a_rate_never_counts_compiling() -> None:
    result = MergeResult.__new__(MergeResult)
    plan = type("Plan", (), {"bytes_to_read": 600_000_000, "bytes_to_write": 400_000_000})
    for name, value in {"plan": plan, "seconds": 51.0, "compile_seconds": 50.0}.items():
        object.__setattr__(result, name, value)
    assert result.bytes_per_second == 1e9


@pytest.mark.parametrize(("scale", "rate"), [(1, ", 1.00 GB/s"), (0.049, "")])
def test_a_merge_has_a_rate_if_it_is_large(scale: float, rate: str) -> None:
    result = MergeResult.__new__(MergeResult)
    read, write = round(600_000_000 * scale), round(400_000_000 * scale)
    sizes = {"bytes_to_read": read, "bytes_to_write": write, "jobs": (), "elements": 0}
    values = {
        "plan": type("Plan", (), sizes),
        "seconds": 1.0 * scale,
        "compile_seconds": 0.0,
        "path": "out",
        "resumed": 0,
    }
    for name, value in values.items():
        object.__setattr__(result, name, value)
    assert result_line(result) == f"out: 0 tensors, 0 parameters, {format_size(write)}, {scale:.2f} s{rate}"


@pytest.mark.usefixtures("cold")
def test_a_first_merge_says_that_it_compiles(raw: Run) -> None:
    code, stdout, stderr = raw("merge", "a", "b", "out")
    assert (code, stderr) == (0, f"{COMPILING}\n")
    assert re.search(r", \d+\.\d\d s \+ [\d.]+ s compiling kernels \(kept for the next run\)$", stdout)
    code, stdout, stderr = raw("merge", "a", "b", "again")
    assert (code, stderr) == (0, "")
    assert "compiling" not in stdout


def test_kernels_that_cannot_be_kept_are_not_said_to_be(
    cold: Path, raw: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALNICO_CACHE_DIR", str(cold / "a" / "config.json"))
    _, stdout, _ = raw("merge", "a", "b", "out")
    assert " s compiling kernels (not kept: ALNICO_CACHE_DIR names no private folder)" in stdout


COMMANDS = {
    "merge": "merge a b out",
    "analyze": "analyze a b --base base",
    "compare": "compare a b base",
    "suggest": "suggest a b --base base",
    "norm-weights": "norm-weights a b --base base",
    "lora fold": "lora fold layers adapter out",
    "lora combine": "lora combine adapter other out --weights 1,2",
    "lora extract": "lora extract tuned layers out --rank 2",
}


def check_said(cold: Path, raw: Run, *words: str) -> None:
    """A first run says once before it begins and once at its end that it compiles; a first run with --json has a key."""
    code, stdout, stderr = raw(*words)
    assert code == 0, stderr
    assert stderr.count(f"{COMPILING}\n") == 1
    assert len(re.findall(r"s \+ [\d.]+ s compiling kernels \(kept for the next run\)", stdout + stderr)) == 1
    forget()
    for path in (cold / "cache" / "kernels").iterdir():
        path.unlink()
    code, stdout, stderr = raw(*words, "--json", *(["--overwrite"] if "out" in words else []))
    assert (code, stderr) == (0, "")
    assert json.loads(stdout)["compile_seconds"] >= 1.0


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_that_compiles_says_so(cold: Path, raw: Run, name: str) -> None:
    rows = np.random.default_rng(0).standard_normal((2, 30, 20)).astype(np.float32)
    for model, step in (("layers", 0), ("tuned", 0.1)):
        tensors = {
            "m.q.weight": ("F32", rows[0] + step * rows[1]),
            "m.o.weight": ("F32", rows[1].T + step * rows[0].T),
        }
        save_model(Path(model), tensors, {"architectures": ["XModel"]})
    for number, adapter in enumerate(("adapter", "other")):
        linear(Path(adapter), seed=number)
    check_said(cold, raw, *COMMANDS[name].split())


@pytest.mark.nightly
def test_commands_on_tasks_say_so(cold: Path, raw: Run, made: Made) -> None:
    models = (*made.references, "--base", str(made.base))
    code, stdout, stderr = raw("soup", *models, "--tasks", str(made.valid), "--json")
    assert (code, COMPILING in stderr) == (0, False)
    assert json.loads(stdout)["compile_seconds"] >= 1.0
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(made.base),
        "models": list(made.references),
        "parameters": {"weight": {"search": [0.0, 1.0]}},
        "search": {"tasks": str(made.valid), "trials": 2, "sampler": "random"},
    }
    Path("s.yml").write_text(yaml.safe_dump(recipe))
    forget()
    for path in (cold / "cache" / "kernels").iterdir():
        path.unlink()
    code, stdout, _ = raw("search", "s.yml", "--json", "--workers", "2")
    assert code == 0
    assert (
        json.loads(stdout)["compile_seconds"] == 0.0
    )  # workers are processes, where numpy runs such small merges


def test_no_command_is_forgotten() -> None:
    without = {n for n in SUMMARIES if not getattr(load_command(n).target, "counts_compiling", False)}
    assert {n for n in without if not n.startswith(("store ", "recipe "))} == {
        "plan",
        "inspect",
        "sign",
        "push",
        "methods",
        "schema",
        "demo",
    }


@pytest.mark.usefixtures("cold")
def test_results_in_python_carry_it() -> None:
    first = alnico.merge({"merge_method": "linear", "models": ["a", "b"]}, "out")
    assert first.compile_seconds >= 1.0
    assert alnico.merge({"merge_method": "linear", "models": ["a", "b"]}, "again").compile_seconds == 0.0
    analysis = alnico.analyze(["a", "b"], base="base")
    assert analysis.compile_seconds >= 1.0
    assert "compile_seconds" not in analysis.data()
    assert alnico.verify("out", against_inputs=True).compile_seconds == 0.0
    assert alnico.reproduce("out").compile_seconds == 0.0
