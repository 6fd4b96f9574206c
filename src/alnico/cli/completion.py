"""Installs and prints scripts that complete commands, options and values in bash, zsh, fish and PowerShell."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem, get_completion_class, shell_complete

from alnico.cli.printing import page, show_result

PROGRAM = "alnico"
VARIABLE = "_ALNICO_COMPLETE"
"""The environment variable by which a shell asks for completions."""

SHELLS = {"bash": "bash", "zsh": "zsh", "fish": "fish", "pwsh": "powershell", "powershell": "powershell"}
"""click's name of a shell by the name of its program."""


def answer(app: Any) -> int:
    """Print what a shell asks for. Returns the exit code."""
    return shell_complete(app, {}, PROGRAM, VARIABLE, os.environ[VARIABLE])


def completion(value: str, text: str) -> CompletionItem[str]:
    """A word that may follow, and what it means."""
    return CompletionItem(value, help=text)


def files(incomplete: str) -> CompletionItem[str]:
    """The files whose paths begin with ``incomplete``."""
    return CompletionItem(incomplete, type="file")


def install(app: Any) -> None:
    """Install the script of the shell that alnico was started from. Errors: a wrong command line."""
    program = _shell("--install-completion")
    script = f"{_script(app, program)}\n"
    home = Path.home()
    if program == "bash":
        path = _written(home / ".bash_completions" / f"{PROGRAM}.sh", script)
        _append(home / ".bashrc", f"source '{path}'")
    elif program == "zsh":
        path = _written(home / ".zfunc" / f"_{PROGRAM}", script)
        _append(home / ".zshrc", "fpath+=~/.zfunc; autoload -Uz compinit; compinit")
    elif program == "fish":
        path = _written(home / ".config" / "fish" / "completions" / f"{PROGRAM}.fish", script)
    else:
        words = [program, "-NoProfile", "-Command", "echo $profile"]
        path = Path(subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip())
        _append(path, script)
    show_result(page([f"{path}: completion for {program}. It takes effect in the next shell."]))


def show(app: Any) -> None:
    """Print the script of the shell that alnico was started from. Errors: a wrong command line."""
    click.echo(_script(app, _shell("--show-completion")))


def _script(app: Any, program: str) -> str:
    kind = get_completion_class(SHELLS[program])
    if kind is None:
        raise click.BadParameter(
            f"this version of click has no completion for {program}. Install a newer one."
        )
    return kind(app, {}, PROGRAM, VARIABLE).source().strip()


def _shell(option: str) -> str:
    """The shell among the processes that started this one; where they cannot be seen, that of the user."""
    number = os.getppid()
    try:
        while number > 1:
            folder = Path("/proc", str(number))
            name = (folder / "comm").read_text().strip()
            if name in SHELLS:
                return name
            number = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        pass
    name = Path(os.environ.get("SHELL", "")).name
    if name not in SHELLS:
        raise click.BadParameter(
            f"{option}: alnico was not started from a shell with completion. Run it in bash, zsh, fish or PowerShell."
        )
    return name


def _written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def _append(path: Path, line: str) -> None:
    """Append a line to a file that lacks it. What the file has is not written again."""
    text = path.read_text() if path.is_file() else ""
    if line not in text:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(f"{'' if text.endswith(chr(10)) or not text else chr(10)}{line}\n")
