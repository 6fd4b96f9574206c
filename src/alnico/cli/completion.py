"""Completes commands, options and values in a shell, by typer's scripts for bash, zsh, fish and PowerShell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import typer
from typer import completion

from alnico.cli.printing import page, show_result

PROGRAM = "alnico"


@dataclass(frozen=True)
class Completion:
    """A word that may follow, as typer prints it for a shell."""

    value: str
    help: str
    type: str = "plain"


def begin() -> None:
    """Prepare to answer a shell."""
    completion.completion_init()  # type: ignore[attr-defined]


def install() -> None:
    """Install the script of the shell that alnico was started from. Errors: a wrong command line."""
    try:
        shell, path = completion.install(prog_name=PROGRAM)  # type: ignore[attr-defined]
    except typer.Exit:
        raise typer.BadParameter(
            "--install-completion: alnico was not started from a shell with completion. Run it in bash, zsh, fish or PowerShell."
        ) from None
    show_result(page([f"{path}: completion for {shell}. It takes effect in the next shell."]))


def show(context: Any) -> None:
    """Print the script of the shell that alnico was started from, and end the command."""
    completion.show_callback(context, None, True)  # type: ignore[arg-type]
