"""Writes docs/cli.md and the summaries of `alnico --help` from the commands: ``python docs/make_cli.py``.

A test fails when they are out of date.
"""

from __future__ import annotations

import re
from pathlib import Path

from alnico.cli import main
from alnico.cli.command import Command
from alnico.cli.parameters import CommandParameter
from alnico.cli.sections import SECTIONS

PAGE = Path(__file__).with_name("cli.md")
SUMMARIES = Path(main.__file__).with_name("summaries.py")

ORDER = tuple(name for names in SECTIONS.values() for name in names)

START = """# Commands

Every command of `alnico`, with its arguments and options.
`alnico COMMAND --help` prints the same for one command.

```sh
alnico plan recipe.yml          # what would be done
alnico merge recipe.yml out/    # do it
alnico verify out/              # check the result
```

What the commands have in common:

- Results go to standard output, everything else to standard error.
- `--json` prints the result as JSON, for scripts.
- `--quiet` prints only errors, and `--verbose` prints details.
- `--memory` and sizes take units: `2GiB` is 2 x 1024^3 bytes, `5GB` is 5 x 10^9 bytes.
- A model is a path, or `owner/name@revision` on the hub ([how to name a model](recipes.md#how-to-name-a-model)).
- [Exit codes](errors.md) say what went wrong.

Most commands are also [Python functions](python.md), and this page is made from their docstrings by `python docs/make_cli.py`.
"""


def page() -> str:
    """Return the whole page: a table of the commands, and a section for each."""
    commands = {name: main.load_command(name) for name in ORDER}
    lines = [START]
    for title, names in SECTIONS.items():
        rows = [f"| [{n}](#alnico-{n.replace(' ', '-')}) | {_cell(commands[n].help)} |" for n in names]
        lines += [f"**{title}**", "", "| command | what it does |", "| --- | --- |", *rows, ""]
    return "\n".join([*lines, *(section(name, command) for name, command in commands.items())])


def section(name: str, command: Command) -> str:
    """Return the section of one command: its usage, its function, and a table of its arguments and options."""
    shown = [p for p in command.parameters if not p.flag.is_hidden]
    usage = " ".join(filter(None, ["alnico", name, *map(_usage, shown)]))
    function = f" In Python: `{command.function}`." if ".cli." not in command.function else ""
    rows = [f"| {_names(p)} | {_cell(p.help)} | {_default(p)} |" for p in shown]
    table = ["| option | what it does | default |", "| --- | --- | --- |", *rows, ""] if rows else []
    return "\n".join(
        [f"## alnico {name}", "", "```text", usage, "```", "", f"{command.help}{function}", "", *table]
    )


def summaries() -> str:
    """Return the module of summaries."""
    lines = []
    for name in ORDER:
        text = main.load_command(name).help.replace('"', r"\"")
        lines.append(f'    "{name}": "{text}",\n')
    return (
        '"""The summary of each command, for `alnico --help`, which imports no command: made by docs/make_cli.py."""\n\n'
        f"SUMMARIES = {{\n{''.join(lines)}}}\n"
    )


def _usage(parameter: CommandParameter) -> str:
    if parameter.is_argument:
        return parameter.usage
    return f"{parameter.label} {parameter.metavar}" if parameter.is_required else ""


def _names(parameter: CommandParameter) -> str:
    return ", ".join(f"`{n}`" for n in parameter.names) if parameter.names else f"`{parameter.metavar}`"


def _default(parameter: CommandParameter) -> str:
    if parameter.is_required:
        return "required"
    if parameter.default is True:
        return f"`{parameter.names[0].partition('/')[0]}`"
    is_empty = parameter.default in (None, "") or parameter.default is False or parameter.flag.is_count
    return "" if is_empty else f"`{parameter.default}`"


def _cell(text: str) -> str:
    return re.sub(r"([|<>])", r"\\\1", text)


if __name__ == "__main__":
    SUMMARIES.write_text(summaries(), "utf-8")
    PAGE.write_text(page(), "utf-8")
