"""The command line: finds commands by name, and turns errors into messages and exit codes."""

from __future__ import annotations

import importlib
import os
import re
import sys
from typing import Any

import click

from alnico.cli import printing, signals
from alnico.cli.printing import interrupted, page, show_result
from alnico.cli.sections import SECTIONS, START
from alnico.cli.summaries import SUMMARIES
from alnico.errors import INTERRUPTED, AlnicoError, RunError

GROUPS = {
    "recipe": "Write recipes that people know by a name: chat vectors, A + (B - C), RETAIN.",
    "lora": "Fold LoRA adapters into their base, combine them without it, or extract them from fine-tunes.",
    "statistics": "Measure what Fisher merging, RegMean or fitting routers needs of models, on inputs without labels.",
    "store": "Keep, find and share task vectors: what a fine-tune changed of its base.",
}
"""Commands that have commands."""


COMPLETE = "_ALNICO_COMPLETE"
"""The environment variable by which a shell asks for completions."""


class CommandGroup(click.Group):
    """Commands that are imported when they are used: their help in the list comes from :data:`SUMMARIES`."""

    prefix = ""

    def __init__(self, **settings: Any) -> None:
        super().__init__(subcommand_metavar="COMMAND [ARGS]...", **settings)
        words = [name.removeprefix(self.prefix) for name in SUMMARIES if name.startswith(self.prefix)]
        self.commands: dict[str, Any] = dict.fromkeys(word.split()[0] for word in words)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        name = f"{self.prefix}{cmd_name}"
        if name in GROUPS:
            kind = type("CommandGroup", (CommandGroup,), {"prefix": f"{name} "})
            return kind(name=cmd_name, help=GROUPS[name], no_args_is_help=True)
        return load_command(name).build(cmd_name) if name in SUMMARIES else None

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        for title, names in SECTIONS.items():
            listed = [name for name in names if name.startswith(self.prefix)]
            if listed:
                with formatter.section("Commands" if self.prefix else title):
                    formatter.write_dl(
                        [(n.removeprefix(self.prefix), _sentence(SUMMARIES[n])) for n in listed]
                    )

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        """Complete the name of a command from the summaries, or else an option."""
        if incomplete.startswith("-"):
            return super().shell_complete(ctx, incomplete)
        from alnico.cli import completion

        names = [name for name in self.commands if name.startswith(incomplete)]
        helps = {
            name: GROUPS.get(f"{self.prefix}{name}") or SUMMARIES[f"{self.prefix}{name}"] for name in names
        }
        found = [completion.completion(name, _sentence(text)) for name, text in helps.items()]
        return (
            found if found or self.prefix else [completion.files(incomplete)]
        )  # a merge may begin with a model

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands:
            from alnico.cli.unknown_words import answer, begins_a_merge, command_of

            command = None if self.prefix else command_of(args[0])
            if command is not None:
                args = [command, *args[1:]]
            elif not self.prefix and begins_a_merge(args[0]):
                args = ["merge", *args]
            elif not ctx.resilient_parsing:  # completion parses what is typed so far
                ctx.fail(answer(args[0], self.prefix))
        return super().resolve_command(ctx, args)


def _sentence(text: str) -> str:
    return f"{text.partition('. ')[0].removesuffix('.')}."


def load_command(name: str) -> Any:
    """Import the command of a name such as ``lora fold``."""
    return importlib.import_module(f"alnico.cli.commands.{re.sub('[- ]', '_', name)}").run


@click.pass_context
def _root(context: click.Context, version: bool, install_completion: bool, show_completion: bool) -> None:
    if install_completion or show_completion:
        from alnico.cli import completion

        (completion.install if install_completion else completion.show)(app)
        context.exit()
    if version:
        from alnico._version import __version__

        show_result(page([f"alnico {__version__}"]))
        context.exit()


def _switch(name: str, text: str) -> click.Option:
    return click.Option([name], is_flag=True, default=False, help=text)


app = CommandGroup(
    name="alnico",
    callback=_root,
    params=[
        _switch("--version", "Print the version."),
        _switch("--install-completion", "Let your shell complete commands, options and methods."),
        _switch("--show-completion", "Print the completion script of your shell."),
    ],
    help=START,
    no_args_is_help=True,
    invoke_without_command=True,
)


def _run_app() -> int:
    """Run a command. Returns the exit code of one that ends early, or of a wrong command line.

    click's own ``main`` would turn an interrupt into a message and an exit code of its own.
    """
    try:
        with app.make_context("alnico", sys.argv[1:]) as context:
            app.invoke(context)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.exceptions.Exit as ended:
        return ended.exit_code
    return 0


def main() -> None:
    """Run a command and exit with the code of the error's class; a traceback is only for our own mistakes."""
    printing.begin()
    code: Any = 0
    try:
        if os.environ.get(COMPLETE):
            from alnico.cli import completion

            raise SystemExit(completion.answer(app))
        code = _run_app()
    except SystemExit as ended:
        code = ended.code or 0
    except KeyboardInterrupt:
        code = INTERRUPTED
    except AlnicoError as error:
        code = error.exit_code
        if not signals.is_interrupted():
            printing.say_error(error)
    except OSError as error:
        code = RunError.exit_code
        if not signals.is_interrupted():
            if error.filename is None:
                raise
            printing.say_error(
                RunError(
                    f"{os.fsdecode(error.filename)}: cannot be used ({error.strerror}). Check the path and its permissions."
                )
            )
    except Exception:
        if not signals.is_interrupted():  # a library turned it into another exception
            raise
        code = INTERRUPTED
    if code and (signals.is_interrupted() or code == INTERRUPTED):
        if not printing.is_reported():
            interrupted(None)
        raise SystemExit(signals.code_of_signal())
    raise SystemExit(printing.verdict(code) if isinstance(code, int) else code)
