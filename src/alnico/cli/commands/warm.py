"""``alnico warm``: compiles the kernels of methods ahead of their use."""

from __future__ import annotations

import click

from alnico.cli.command import CommandCall, command
from alnico.cli.options import JSON, Flag, dtype_names, method_names
from alnico.cli.printing import Page, page
from alnico.engine.warm import WarmResult
from alnico.numerics.sizes import format_size


def _numbers(typed: str, option: str) -> tuple[int, ...]:
    parts = typed.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise click.BadParameter(
            f"{option} is {typed!r}; expected whole numbers from 1 on, as in {option} 2,3,4."
        )
    return tuple(map(int, parts))


def _names(typed: list[str], option: str) -> tuple[str, ...] | None:
    names = tuple(name for part in typed for name in part.split(","))
    wrong = next((name for name in names if name not in dtype_names()), None)
    if wrong is not None:
        raise click.BadParameter(f"{option} is {wrong!r}; expected {', '.join(dtype_names())}.")
    return names or None


@command(
    "alnico.warm",
    methods=Flag(complete=method_names, metavar="METHOD"),
    models=Flag(spelled=("--models",), is_option=True, parse=_numbers, metavar="N,N", default="2,3,4"),
    dtypes=Flag(spelled=("--dtype",), metavar="NAME", parse=_names, complete=dtype_names),
    json=JSON,
)
def run(call: CommandCall) -> None:
    result = call.invoke()
    call.show(result.data, lambda: warm_text(result))


def warm_text(result: WarmResult) -> Page:
    """What was compiled, what was there, and where it is."""
    models = ", ".join(map(str, result.models))
    lines = [
        f"compiled {result.made} kernels in {result.seconds:.1f} s; {result.ready} were ready",
        f"methods: {', '.join(result.methods) or 'none'}",
        f"for {models} models ({', '.join(result.dtypes)})",
        f"in {result.folder}: {format_size(result.byte_size)}",
    ]
    return page([*lines, *(f"left out {name}: {why}" for name, why in result.left.items())])
