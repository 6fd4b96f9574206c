"""Makes a command from a public function: the signature gives its options, the docstring their help."""

from __future__ import annotations

import functools
import importlib
import inspect
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import click

from alnico.checkpoint.output_path import URL_AS_PATH, refuse_url
from alnico.checkpoint.remote.open_folder import is_url
from alnico.cli.options import Flag
from alnico.cli.parameters import CommandParameter, parameters_of, plain
from alnico.cli.printing import Page, interrupted, json_page, say, show_result
from alnico.events import BatchWarning
from alnico.kernels.clock import CLOCK, SHORT, time_text

COMPILING = "compiling kernels for this processor, which can take a minute; later runs load them"


class CommandCall:
    """One call of a command: the values of its options, its function, and how its result is shown."""

    def __init__(self, command: Command, values: Mapping[str, Any], given: Collection[str]) -> None:
        self.command = command
        self.values = values
        self.given = given
        """The options that were typed."""
        self._seconds = self._compile_seconds = 0.0

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def of(self, other: Command) -> CommandCall:
        """The same call of another command, whose parameters are some of this one's."""
        return CommandCall(other, self.values, self.given)

    @property
    def is_json(self) -> bool:
        return bool(self.values.get("json"))

    @property
    def is_quiet(self) -> bool:
        return bool(self.values.get("quiet"))

    @property
    def verbose(self) -> int:
        return int(self.values.get("verbose") or 0)

    @property
    def options(self) -> dict[str, Any]:
        """Values for the function, which has defaults for those that are None unless they were typed."""
        names = inspect.signature(self.command.target).parameters
        return {k: v for k, v in self.values.items() if k in names and (v is not None or k in self.given)}

    def invoke(self, *, shows_tensors: bool = False, **more: Any) -> Any:
        """Call the function with the options and ``more``, and show its progress."""
        from alnico.cli import progress

        arguments = {**self.options, **more}
        function = self.command.target
        is_silent = self.is_quiet or self.is_json
        begin, compiled_before = time.perf_counter(), CLOCK.seconds
        try:
            with CLOCK.heard_by(lambda: say(COMPILING, is_silent)), warnings.catch_warnings():
                if is_silent:  # there is no watcher
                    warnings.simplefilter("ignore", BatchWarning)
                if "watch" not in inspect.signature(function).parameters:
                    return function(**arguments)
                with progress.bar(is_silent, self.verbose if shows_tensors else 0) as watch:
                    return function(**arguments, watch=watch)
        except KeyboardInterrupt:
            resumes = self.command.resumes
            if resumes is None:
                raise
            raise interrupted(resumes if arguments.get("out") is not None else None) from None
        finally:
            self._seconds += time.perf_counter() - begin
            self._compile_seconds += CLOCK.seconds - compiled_before

    def note(self, notes: Sequence[str]) -> None:
        """Print notes to stderr."""
        for note in dict.fromkeys(notes):
            say(f"note: {note}", self.is_quiet or self.is_json)

    def show(
        self,
        data: Callable[[], Any],
        text: Callable[[], Page],
        *,
        besides: object = None,
        indent: int | None = 1,
        even_quiet: bool = False,
        stated: float = 0.0,
    ) -> None:
        """Print the result: ``data`` as JSON or ``text`` for people.

        The seconds of compiling are a key of the JSON and a line after the text, except those that the text has ``stated``.
        """
        if self.is_json:
            values = data()
            if isinstance(values, dict) and getattr(self.command.target, "counts_compiling", False):
                values = {"compile_seconds": round(self._compile_seconds, 3), **values}
            show_result(json_page(values, indent), besides=besides)
        elif even_quiet or not self.is_quiet:
            show_result(text(), besides=besides)
        if self._compile_seconds - stated >= SHORT:
            self.say_time()

    def say_time(self) -> None:
        """Say to stderr what the call took, and what of it went to compiling."""
        say(f"took {time_text(self._seconds, self._compile_seconds)}", self.is_quiet or self.is_json)


class AnswersOptions(click.Command):
    """A command that answers an unknown option with its own name of it, and a missing word with what it is."""

    listed: tuple[CommandParameter, ...] = ()

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, self._in_own_words(args))
        except click.NoSuchOption as error:
            from alnico.cli.other_options import answer

            hint = answer(error.option_name, self.listed, self._usage(ctx))
            message = f"No such option: {error.option_name}.{hint and ' ' + hint}"
            raise click.NoSuchOption(error.option_name, message, ctx=ctx) from None
        except click.MissingParameter as error:
            missing = next((p for p in self.listed if error.param and p.name == error.param.name), None)
            is_option = missing is not None and not missing.is_argument
            message = f"Give {missing.given_as}" if missing and is_option else f"Write: {self._usage(ctx)}."
            raise click.MissingParameter(message, ctx=ctx, param=error.param) from None

    def _usage(self, ctx: Any) -> str:
        """The form of the command, without marks of what is required."""
        words = (ctx.command_path, *self.collect_usage_pieces(ctx)[1:])
        return " ".join(words).replace("{", "").replace("}", "")

    def format_options(self, ctx: Any, formatter: Any) -> None:
        listed = [(p, p.get_help_record(ctx)) for p in self.get_params(ctx)]
        for title, kind in (("Arguments", "argument"), ("Options", "option")):
            records = [record for p, record in listed if record and p.param_type_name == kind]
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)

    def format_arguments(self, ctx: Any, formatter: Any) -> None:
        """Nothing: from version 8.5 on, click would write them a second time."""

    def _in_own_words(self, args: list[str]) -> list[str]:
        """The words of a command line with its own options in the place of synonyms; each is noted."""
        options = {p.name: p.label for p in self.listed if not (p.is_argument or p.flag.is_file)}
        spelled = {name for p in self.listed for names in p.names for name in names.split("/")}
        takes = {name: p.flag.takes for p in self.listed for name in p.names if p.flag.takes is not None}
        own: list[str] = []
        for i, word in enumerate(args):
            if own and (is_value := takes.get(own[-1])) is not None:
                own[-1] += "=" + (word if is_value(word) else "")
                if is_value(word):
                    continue
            if word == "--":
                return [*own, *args[i:]]
            name, equals, value = word.partition("=")
            option = None
            if name[:2] == "--" and name not in spelled:
                from alnico.methods.shared.other_words import synonyms

                synonym = synonyms("flag").get(name)
                option = None if synonym is None else options.get(synonym.words[0])
            if option is not None:
                say(f"note: {name} is {option}.", bool({"-q", "--quiet", "--json"} & {*args}))
                word = f"{option}{equals}{value}"
            own.append(word)
        if own and own[-1] in takes:
            own[-1] += "="
        return own


class TakesModels(AnswersOptions):
    """A command whose models may follow the word ``--models``, as in mergekit, or come alone."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [a.removeprefix("--models=") for a in args if a != "--models"])


class TakesForms(AnswersOptions):
    """A command whose arguments have several forms, which its line of usage shows."""

    usage = ""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return ["[OPTIONS]", self.usage]


@dataclass(frozen=True)
class Command:
    """A command: its public function by name, what it adds to the parameters, and what it does with a call."""

    body: Callable[[CommandCall], None]
    function: str
    flags: Mapping[str, Flag]
    fills: tuple[str, ...]
    """Parameters of the function that the command fills itself: they are not options."""
    summary: str
    resumes: str | None
    also: str = ""

    @property
    def target(self) -> Callable[..., Any]:
        """The public function, imported when the command is used."""
        return _public(self.function)

    @property
    def targets(self) -> tuple[Callable[..., Any], ...]:
        """The functions whose parameters are options."""
        return (self.target, *([_public(self.also)] if self.also else []))

    @functools.cached_property
    def parameters(self) -> tuple[CommandParameter, ...]:
        """Arguments, then options: those of the functions, then the command's own."""
        return parameters_of(self.targets, self.flags, self.fills)

    @property
    def help(self) -> str:
        """What the command does, in a sentence or two."""
        described = plain((inspect.getdoc(self.target) or "").partition("\n\n")[0])
        printed = described.replace("Return ", "Print ").replace(" return ", " print ")
        resumes = f" The same command resumes an interrupted {self.resumes}." if self.resumes else ""
        return f"{self.summary or printed}{resumes}"

    def build(self, name: str) -> click.Command:
        """Return the command for click."""

        @click.pass_context
        def callback(context: click.Context, /, **typed: Any) -> None:
            sources = {name: getattr(context.get_parameter_source(name), "name", "") for name in typed}
            # Before version 8.3, click takes arguments that are missing, (), for typed ones.
            given = {n for n, value in typed.items() if sources[n] == "COMMANDLINE" and value != ()}
            values = {p.name: p.value(typed[p.name]) for p in self.parameters}
            refuse_url_outputs(self.function, values)
            self.body(CommandCall(self, values, given))

        arguments = [p for p in self.parameters if p.is_argument]
        kind: type[AnswersOptions] = (
            TakesModels if any(p.name == "models" for p in arguments) else AnswersOptions
        )
        if forms := [p.usage for p in arguments if p.flag.usage]:
            kind = type("TakesForms", (TakesForms,), {"usage": " ".join(forms)})
        kind = type(kind.__name__, (kind,), {"listed": self.parameters})
        parameters = [p.click_parameter() for p in self.parameters]
        return kind(name, params=parameters, help=self.help, callback=callback)


WRITE_TO_URLS = (
    "alnico.merge_documents",
    "alnico.plan_documents",
    "alnico.complete",
    "alnico.average",
    "alnico.retokenize",
    "alnico.lora.fold",
)
"""Functions whose output may be at a URL."""

READ_OUTPUTS = ("alnico.verify", "alnico.reproduce", "alnico.sign", "alnico.push", "alnico.unequip")
"""Functions whose ``out`` is a finished output, which they read."""


def refuse_url_outputs(function: str, values: Mapping[str, Any]) -> None:
    """Refuse a URL as the output of a command that writes to this machine alone. Errors: OutputError."""
    if function in WRITE_TO_URLS:
        return
    names = ("new",) if function in READ_OUTPUTS else ("out", "file")
    for out in (values.get(name) for name in names):
        if isinstance(out, str) and (is_url(out) or URL_AS_PATH.match(out)):
            refuse_url(out)


def _public(name: str) -> Callable[..., Any]:
    module, _, function = name.rpartition(".")
    return getattr(importlib.import_module(module), function)  # type: ignore[no-any-return]


def command(
    function: str,
    *,
    also: str = "",
    summary: str = "",
    resumes: str | None = None,
    fills: tuple[str, ...] = (),
    more: Mapping[str, Flag] = MappingProxyType({}),
    **flags: Flag,
) -> Callable[[Callable[[CommandCall], None]], Command]:
    """Declare a command.

    Args:
        function: the public function by its full name; imported when the command is used.
        also: another one, whose parameters are options, too, and which the command calls itself.
        summary: instead of the first paragraph of the function's docstring.
        resumes: what the same command resumes after an interrupt.
        fills: parameters that the command gives the functions itself.
        flags, more: by name, what is added to a parameter of the function, and the parameters of the command alone.
    """
    return lambda body: Command(body, function, {**flags, **more}, fills, summary, resumes, also)
