"""Completion in a shell, by bash's protocol, and mergekit's command under its own name."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from alnico.cli.sections import SECTIONS
from alnico.methods import registry
from compiling import without_compiling
from made import read_model, save_model

ROOT = Path(__file__).parents[2]


def completed(*words: str) -> list[str]:
    """What bash is told to offer for the last word: words, or ``file`` for files."""
    asked = {
        "COMP_WORDS": " ".join(words),
        "COMP_CWORD": str(len(words) - 1),
        "_ALNICO_COMPLETE": "bash_complete",
    }
    done = subprocess.run(
        [sys.executable, "-m", "alnico"],
        env={**os.environ, **asked},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    offered = [line.partition(",") for line in done.stdout.split()]
    return [value if kind == "plain" else kind for kind, _, value in offered]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("alnico", ""), list(dict.fromkeys(n.split()[0] for names in SECTIONS.values() for n in names))),
        (("alnico", "me"), ["merge", "methods"]),
        (("alnico", "lora", ""), ["fold", "combine", "extract"]),
        (("alnico", "--in"), ["--install-completion"]),
        (("alnico", "merge", "a", "b", "--meth"), ["--method"]),
        (("alnico", "merge", "a", "b", "--method", "dare"), ["dare_linear", "dare_ties"]),
        (("alnico", "plan", "a", "b", "--method", ""), list(registry())),
        (("alnico", "merge", "a", "b", "--dtype", "float"), ["float16", "float32", "float64"]),
        (("alnico", "methods", "sl"), ["slerp"]),
        (("alnico", "models/a", "models/b", "--dens"), ["--density"]),
        (("alnico", "lora", "fold", "--weig"), ["--weights"]),
        (("alnico", "merge", "some"), ["file"]),
        (("alnico", "merge", "a", "b", "--base", "some"), ["file"]),
        (("alnico", "models/"), ["file"]),
        (("alnico", "nonsense", "x"), ["file"]),
    ],
)
def test_bash_completes_commands_options_and_methods(words: tuple[str, ...], expected: list[str]) -> None:
    assert completed(*words) == expected


def test_commands_are_completed_without_being_imported() -> None:
    code = (
        "import sys; from alnico.cli.main import app, main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({n for n in sys.modules if n.startswith('alnico.cli.commands')} | {'numpy'} & set(sys.modules)))"
    )
    asked = {"COMP_WORDS": "alnico s", "COMP_CWORD": "1", "_ALNICO_COMPLETE": "bash_complete"}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **asked}, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_completion_is_installed_where_the_shell_finds_it(tmp_path: Path) -> None:
    home = {**os.environ, "HOME": str(tmp_path), "SHELL": "/bin/bash"}
    command = f"{sys.executable} -m alnico --install-completion; exit $?"
    done = subprocess.run(["bash", "-c", command], env=home, capture_output=True, text=True, check=True)
    script = tmp_path / ".bash_completions" / "alnico.sh"
    assert done.stdout == f"{script}: completion for bash. It takes effect in the next shell.\n"
    assert f"source '{script}'" in (tmp_path / ".bashrc").read_text()
    shown = subprocess.run(
        ["bash", "-c", command.replace("install", "show")],
        env=home,
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout == script.read_text()
    assert "_ALNICO_COMPLETE=bash_complete" in shown.stdout


def test_mergekits_command_merges(tmp_path: Path) -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts["mergekit-yaml"].partition(":")
    for name, factor in (("a", 1), ("b", 3)):
        save_model(
            tmp_path / name,
            {"w": ("F32", np.full((2, 2), factor, np.float32))},
            {"architectures": ["XModel"]},
        )
    (tmp_path / "config.yml").write_text(
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]\n"
    )
    code = f"import sys; sys.argv = ['mergekit-yaml', *sys.argv[1:]]; from {module} import {function}; {function}()"
    words = ("config.yml", "out", "--lazy-unpickle", "--out-shard-size", "1B", "--allow-crimes")
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert (
        without_compiling(done.stderr)
        == "note: --lazy-unpickle has no effect: files are always read in part.\n"
    )
    np.testing.assert_array_equal(read_model(tmp_path / "out")["w"], np.full((2, 2), 2, np.float32))
    refused = subprocess.run(
        [sys.executable, "-c", code, "config.yml", "two", "--trust-remote-code"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 2
    assert "--trust-remote-code: alnico runs no code of a model." in refused.stderr
