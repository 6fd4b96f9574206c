"""Runs the blocks of a how-to page in one folder, and says what each printed."""

from __future__ import annotations

import glob
import json
import os
import shlex
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from how_to.page_blocks import ROOT, Block, Command, commands_of, programs_of
from how_to.page_text import FOLDER, agrees, difference

FORKING = ROOT / "tests" / "cli" / "forking.py"
PYTHON = Path(__file__).with_name("python_blocks.py")
SHELL_SIGNS = set("|&;<>()$`~{}")
"""A command with one of these is run by bash; all others by the words that they are."""

INTERRUPT = "^C"
"""A line of this among the printed ones interrupts a merge as soon as its first tensor is done."""

PROCESSORS = 2
"""Pages show the plans of a machine with so many."""


@dataclass
class Outcome:
    """A part of a page, with what it really printed."""

    page_line: int
    typed: str
    shown: str
    printed: str
    status: int
    is_equal: bool

    def problem(self) -> str | None:
        """Why the page is wrong here, or None."""
        lines = self.shown.split("\n")
        if INTERRUPT in lines:
            return None if self.is_equal and self.status == 130 else f"{self._at}\n{self._difference}"
        expects_error = any(line.startswith("alnico: ") for line in lines)
        if self.status != 0 and not expects_error:
            return f"{self._at}\nended with {self.status}:\n{self.printed}"
        if self.status == 0 and expects_error:
            return f"{self._at}\nsucceeded, and the page shows an error:\n{self.printed}"
        if not self.is_equal:
            return f"{self._at}\n{self._difference}"
        return None

    @property
    def _at(self) -> str:
        return f"line {self.page_line}: {self.typed}"

    @property
    def _difference(self) -> str:
        return f"ended with {self.status}\n{difference(self.shown, self.printed)}"


@dataclass
class Session:
    """One page being run: its folder, and the processes that run its commands and its Python."""

    folder: Path
    forks: subprocess.Popen[str]
    environment: dict[str, str]
    python: subprocess.Popen[str] | None = None
    output: Path = field(init=False)

    def __post_init__(self) -> None:
        self.output = self.folder.parent / f"{self.folder.name}.printed"

    def run(self, blocks: list[Block]) -> Iterator[Outcome]:
        """Run blocks in order; yields commands and Python, with what they printed."""
        for block, following in zip(blocks, [*blocks[1:], None], strict=True):
            numbers = block.reason is None
            if block.kind == "file":
                path = self.folder / str(block.title)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(block.text, "utf-8")
            elif block.kind == "console":
                for command in commands_of(block):
                    yield self._command(command, numbers)
            elif block.kind == "python":
                shown = following if following is not None and following.kind == "output" else None
                status, printed = self._python(block)
                expected = shown.text.strip("\n") if shown else ""
                numbers = numbers and (shown is None or shown.reason is None)
                equal = agrees(expected, printed, numbers=numbers)
                typed = block.text.strip().partition("\n")[0]
                yield Outcome(block.line, typed, expected, printed, status, equal)

    def close(self) -> None:
        if self.python is not None:
            self.python.communicate()

    def _command(self, command: Command, numbers: bool) -> Outcome:
        plain = command.typed.replace("\\\n", " ")
        words = shlex.split(plain, comments=True)
        is_interrupted = INTERRUPT in command.printed.split("\n")
        if words[0] == "alnico" and not SHELL_SIGNS & set(plain.partition(" # ")[0]):
            status, printed = self._fork(
                [name for word in words[1:] for name in self._names(word)], is_interrupted
            )
        else:
            ended = subprocess.run(
                ["bash", "-c", plain],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            status, printed = ended.returncode, ended.stdout
        printed = self._as_on_pages(f"{INTERRUPT}\n{printed}" if is_interrupted else printed)
        equal = agrees(command.printed, printed, numbers=numbers)
        return Outcome(command.line, command.typed, command.printed, printed, status, equal)

    def _names(self, word: str) -> list[str]:
        """A word, or the names of files that it is a pattern of, as in a shell."""
        is_pattern = bool(set("*?[") & set(word))
        return (sorted(glob.glob(word, root_dir=self.folder)) if is_pattern else []) or [word]

    def _fork(self, words: list[str], is_interrupted: bool) -> tuple[int, str]:
        self.output.unlink(missing_ok=True)
        fds = [os.devnull, str(self.output), str(self.output)]
        order = {
            "words": words,
            "fds": fds,
            "encoding": "utf-8",
            "signal": [signal.SIGINT, "TensorDone", 1] if is_interrupted else None,
            "folder": str(self.folder),
            "environment": self.environment,
            "processors": PROCESSORS,
            "line_buffering": True,
        }
        assert self.forks.stdin is not None
        assert self.forks.stdout is not None
        self.forks.stdin.write(json.dumps(order) + "\n")
        self.forks.stdin.flush()
        status = int(self.forks.stdout.readline())
        return status, self.output.read_text("utf-8") if self.output.exists() else ""

    def _python(self, block: Block) -> tuple[int, str]:
        if self.python is None:
            self.python = subprocess.Popen(
                [sys.executable, str(PYTHON)],
                cwd=self.folder,
                env=self.environment,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        assert self.python.stdin is not None
        assert self.python.stdout is not None
        self.python.stdin.write(json.dumps(block.text) + "\n")
        self.python.stdin.flush()
        status, printed = json.loads(self.python.stdout.readline())
        return status, self._as_on_pages(printed)

    def _as_on_pages(self, printed: str) -> str:
        hub = self.environment.get("HF_ENDPOINT")
        printed = printed.replace(hub, "https://huggingface.co") if hub else printed
        return printed.replace(str(self.folder), FOLDER).strip("\n")


@contextmanager
def forking(*imported: str) -> Iterator[subprocess.Popen[str]]:
    """A process that runs commands in forks, and has imported alnico and these modules."""
    with subprocess.Popen(
        [sys.executable, str(FORKING), *imported],
        env={**os.environ, **_python_path(), "OMP_NUM_THREADS": "1"},
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as server:
        yield server


@contextmanager
def session(
    folder: Path, forks: subprocess.Popen[str], environment: Mapping[str, str] | None = None
) -> Iterator[Session]:
    """Begin a page in a folder; ``environment`` is added to this process's."""
    programs = _programs(programs_of(folder))
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    added = {
        "PATH": path,
        **_python_path(),
        "COLUMNS": "100",
        "OMP_NUM_THREADS": "1",
        **(environment or {}),
    }
    begun = Session(folder, forks, {**os.environ, **added})
    try:
        yield begun
    finally:
        begun.close()


def _python_path() -> dict[str, str]:
    """This checkout goes before an installed alnico."""
    before = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *([before] if before else [])])}


def _programs(folder: Path) -> Path:
    """The package's commands, as an installation puts them on the path."""
    folder.mkdir(exist_ok=True)
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]
    for name, target in scripts.items():
        module, _, function = target.partition(":")
        program = folder / name
        program.write_text(
            f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c "from {module} import {function}; {function}()" "$@"\n'
        )
        program.chmod(0o755)
    (folder / "python").unlink(missing_ok=True)
    (folder / "python").symlink_to(sys.executable)
    return folder
