"""Derives the arguments and options of a command from the signature and docstring of its function."""

from __future__ import annotations

import builtins
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import click

from alnico.cli import click_parameters
from alnico.cli.options import REQUIRED, SHARED, Flag, numbers_of, pairs_of, size_of
from alnico.run_options import option_texts


@dataclass(frozen=True)
class CommandParameter:
    """One argument or option of a command, before click makes it."""

    name: str
    names: tuple[str, ...]
    help: str
    default: Any
    type: Any
    """bool, str, int, float, list[str], or the words to choose from."""
    parse: Callable[[Any, str], Any] | None
    flag: Flag

    @property
    def is_argument(self) -> bool:
        return not self.names

    @property
    def is_required(self) -> bool:
        return self.default is REQUIRED

    @property
    def label(self) -> str:
        """How errors name it."""
        return self.names[0].partition("/")[0] if self.names else self.metavar

    @property
    def given_as(self) -> str:
        """The option and what it is, for a command line that lacks it."""
        text = self.help if self.help[1:2].isupper() else f"{self.help[:1].lower()}{self.help[1:]}"
        return f"{self.label}: {text}"

    @property
    def metavar(self) -> str:
        plural = self.name.endswith("s") and self.type == list[str]
        return self.flag.metavar or self.name.removesuffix("s" if plural else "").upper()

    @property
    def usage(self) -> str:
        """An argument in the line of usage."""
        word = f"{self.metavar}{'...' if self.type == list[str] else ''}"
        return self.flag.usage or (word if self.is_required else f"[{word}]")

    def click_parameter(self) -> click.Parameter:
        """The same for click."""
        if self.is_argument:
            return click_parameters.argument(
                self.name,
                self.type,
                metavar=self.metavar,
                text=self.help,
                default=self.default,
                values=self.flag.complete,
            )
        is_empty = self.is_required or self.default is None or self.default is False or self.default == ""
        return click_parameters.option(
            self.name,
            self.names,
            self.type,
            metavar=self.flag.metavar,
            text=self.help,
            default=self.default,
            shows_default=not (is_empty or self.flag.is_count),
            limits=(self.flag.least, self.flag.most),
            is_count=self.flag.is_count,
            is_hidden=self.flag.is_hidden,
            values=self.flag.complete,
        )

    def value(self, typed: Any) -> Any:
        """Convert what was typed. Errors: a wrong command line."""
        if isinstance(typed, tuple):  # click's values of a list, empty without any
            typed = list(typed) or None
        return self.parse(typed, self.label) if self.parse is not None and typed is not None else typed


def parameters_of(
    functions: Sequence[Callable[..., Any]], flags: Mapping[str, Flag], fills: Sequence[str]
) -> tuple[CommandParameter, ...]:
    """Arguments, then options: those of ``functions`` without ``fills`` and ``watch``, then those that only ``flags`` has.

    Those of the last function come first. A parameter of several functions is that of the first.
    """
    found: dict[str, CommandParameter] = {}
    for function in reversed(functions):
        found |= _derived_of(function, flags, fills)
    derived = list(found.values())
    labels = {p.name: p.label for p in derived if not p.is_argument}
    own = [
        CommandParameter(name, _names(name, f, f.is_argument), f.help, f.default, f.type, f.parse, f)
        for name, f in flags.items()
        if f.type is not None
    ]
    unknown = set(flags) - {p.name for p in (*derived, *own)}
    assert not unknown, f"{functions[0].__name__} has no parameter {sorted(unknown)}"
    worded = [replace(p, help=_in_options(p.help, labels)) for p in derived]
    return tuple(sorted((*worded, *own), key=lambda p: not p.is_argument))


def _derived_of(
    function: Callable[..., Any], flags: Mapping[str, Flag], fills: Sequence[str]
) -> dict[str, CommandParameter]:
    names = _ModuleNames(vars(inspect.getmodule(inspect.unwrap(function))))
    types = get_type_hints(inspect.unwrap(function), {}, names)
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    texts = option_texts(function)
    return {
        p.name: _derived(p, types.get(p.name), texts.get(p.name, ""), flags.get(p.name, Flag()))
        for p in inspect.signature(function).parameters.values()
        if p.name not in (*fills, "watch") and p.kind not in variable
    }


def _derived(parameter: inspect.Parameter, kind: Any, text: str, flag: Flag) -> CommandParameter:
    name, default = parameter.name, parameter.default
    if name in SHARED:
        flag = replace(SHARED[name], **{k: v for k, v in vars(flag).items() if v != getattr(Flag, k)})
    type_, parse = _conversion(kind)
    if flag.switch is not None:
        off, on = flag.switch
        type_, parse, default = bool, lambda typed, _: on if typed else off, default == on
    elif parse is size_of and isinstance(default, int):
        default = _size_text(default)
    elif parse is numbers_of and isinstance(default, float):
        default = f"{default:g}"
    elif type_ == list[str] and default is not REQUIRED:
        default = None
    names = _names(name, flag, parameter.kind is parameter.POSITIONAL_OR_KEYWORD, default is True)
    text = flag.help or text[:1].upper() + text[1:]
    default = default if flag.default is None else flag.default
    return CommandParameter(name, names, text, default, type_, flag.parse or parse, flag)


class _ModuleNames(dict[str, Any]):
    """The names of a module; those that it imports for type checkers alone are any type."""

    def __missing__(self, name: str) -> Any:
        return getattr(builtins, name, Any)


def _conversion(kind: Any) -> tuple[Any, Callable[[Any, str], Any] | None]:
    """The type that the command line reads for a parameter's type, and what converts that further."""
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    kinds = tuple(k for k in kinds if k is not NoneType)
    elements = [get_args(k) for k in kinds if get_origin(k) in (Sequence, tuple, list)]
    flat = {e for listed in elements for k in listed for e in (get_args(k) or (k,))}
    if str in flat:
        return list[str], None
    if str in kinds:
        return str, size_of if int in kinds else None
    literals = [get_args(k) for k in kinds if get_origin(k) is Literal]
    if literals:
        return literals[0], None
    if bool in kinds:
        return bool, None
    if float in flat:
        return str, numbers_of
    if float in kinds or int in kinds:
        return (float if float in kinds else int), None
    return (list[str], pairs_of) if any(get_origin(k) is Mapping for k in kinds) else (str, None)


def _names(name: str, flag: Flag, is_positional: bool, is_on: bool = False) -> tuple[str, ...]:
    """The names of an option; none for an argument."""
    if is_positional and not flag.is_option:
        return ()
    own = "--" + name.replace("_", "-")
    names = flag.spelled or (f"{own}/--no-{own[2:]}" if is_on else own,)
    return (*names, *flag.also)


def _size_text(size: int) -> str:
    """A size in the largest unit that says it exactly.

    >>> _size_text(2 << 30), _size_text(5 * 10**9)
    ('2GiB', '5GB')
    """
    units = {"GiB": 1 << 30, "GB": 10**9, "MiB": 1 << 20, "MB": 10**6}
    return next((f"{size // unit}{word}" for word, unit in units.items() if size % unit == 0), str(size))


def plain(text: str) -> str:
    """A docstring's text without the marks of reStructuredText, on one line.

    >>> plain("Score models: a :class:`~alnico.Scorecard` with ``mean``.")
    'Score models: a Scorecard with mean.'
    """
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"\1", " ".join(text.split()))
    return text.replace("``", "")


def _in_options(text: str, labels: Mapping[str, str]) -> str:
    """A help text in which parameters are called by their options."""

    def option(match: re.Match[str]) -> str:
        return labels.get(next(filter(None, match.groups())), match[0])

    named = r"``(\w+)``|(?<=^With )(\w+)(?=:)|\b([a-z]+(?:_[a-z]+)+)\b"
    return plain(re.sub(named, option, text))
