"""Makes click's arguments and options, with help for arguments and the types of values in words of Python."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import click

from alnico.cli.options import REQUIRED

NAMES = {str: "str", int: "int", float: "float", list[str]: "list[str]"}


class HelpedArgument(click.Argument):
    """An argument with a line of help, which click has from version 8.5 on."""

    def __init__(self, name: str, *, kind: Any, text: str, **settings: Any) -> None:
        super().__init__([name], **settings)
        self._kind, self._text = kind, text

    def make_metavar(self, ctx: click.Context | None = None) -> str:
        word = f"{{{self.metavar}}}" if self.required else f"[{self.metavar}]"
        return f"{word}..." if self.nargs != 1 else word

    def get_error_hint(self, ctx: click.Context | None) -> str:
        return f"'{self.metavar}'"

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        return f"{self.metavar} <{self._kind}>", f"{self._text}{'  [required]' if self.required else ''}"

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[Any]:
        return _completed(super().shell_complete(ctx, incomplete), incomplete)


class TypedOption(click.Option):
    """An option that shows its metavar or the type of its value."""

    def __init__(self, names: Sequence[str], *, kind: str, **settings: Any) -> None:
        super().__init__(names, **settings)
        self._kind = kind

    def make_metavar(self, ctx: click.Context | None = None) -> str:
        return self.metavar or f"<{self._kind}>"

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[Any]:
        return _completed(super().shell_complete(ctx, incomplete), incomplete)


def argument(
    name: str, kind: Any, *, metavar: str, text: str, default: Any, values: Callable[[], Iterable[str]] | None
) -> HelpedArgument:
    """Return an argument of a type: str, int, float, list[str], or the words to choose from."""
    more: dict[str, Any] = {"nargs": -1, "type": str} if kind == list[str] else {"type": _type(kind)}
    more |= {"required": True} if default is REQUIRED else {"required": False, "default": default}
    return HelpedArgument(
        name, kind=_name(kind), text=text, metavar=metavar, shell_complete=_beginning(values), **more
    )


def option(
    name: str,
    names: Sequence[str],
    kind: Any,
    *,
    metavar: str | None,
    text: str,
    default: Any,
    shows_default: bool,
    limits: tuple[float | None, float | None],
    is_count: bool,
    is_hidden: bool,
    values: Callable[[], Iterable[str]] | None,
) -> TypedOption:
    """Return an option of a type: bool (a flag), str, int, float, list[str], or the words to choose from."""
    more: dict[str, Any] = {}
    if is_count:
        more["count"] = True
    elif kind is bool:
        more["is_flag"] = True
    elif kind == list[str]:
        more |= {"multiple": True, "type": str}
    else:
        more["type"] = _type(kind, *limits)
    more |= {"required": True} if default is REQUIRED else {"default": default}
    return TypedOption(
        [*names, name],
        kind=f"{_name(kind)}{' range' if limits != (None, None) else ''}",
        metavar=metavar,
        help=text,
        show_default=shows_default,
        hidden=is_hidden,
        shell_complete=_beginning(values),
        **more,
    )


def _type(kind: Any, least: float | None = None, most: float | None = None) -> Any:
    if isinstance(kind, tuple):
        return click.Choice(kind)
    if (least, most) == (None, None):
        return kind
    limited: Any = click.IntRange(least, most) if kind is int else click.FloatRange(least, most)  # type: ignore[arg-type]
    limited.name = limited.name.removesuffix(" range")  # of errors: 'x' is not a valid integer
    return limited


def _name(kind: Any) -> str:
    return "|".join(kind) if isinstance(kind, tuple) else NAMES.get(kind, "")


def _beginning(values: Callable[[], Iterable[str]] | None) -> Callable[..., list[Any]] | None:
    """What completes a word: those of ``values`` that begin with it."""
    if values is None:
        return None
    return lambda _ctx, _parameter, incomplete: [v for v in values() if v.startswith(incomplete)]


def _completed(found: list[Any], incomplete: str) -> list[Any]:
    """What a shell is to offer: words, or else files."""
    from click.shell_completion import CompletionItem

    return found or [CompletionItem(incomplete, type="file")]
