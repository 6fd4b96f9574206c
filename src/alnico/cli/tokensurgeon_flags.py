"""Knows the flags of mergekit-tokensurgeon 0.1.5: which work, which change nothing, and which are refused."""

from __future__ import annotations

from collections.abc import Mapping

import click

from alnico.cli import mergekit_flags
from alnico.cli.command import CommandCall
from alnico.cli.options import Flag
from alnico.cli.printing import say
from alnico.recipe.schema import APPROXIMATIONS

SYNONYMS: Mapping[str, str] = {"approximation_method": "approximate", "k": "atoms"}
"""Options of another name here."""

IGNORED: Mapping[str, str] = {
    "batch_size": "--memory decides how many rows are made at a time",
    "byte_match": "byte tokens are always matched",
    "cosine_similarity": "it is for the method common_interpolation",
    "weight_scheme": "it is for the method common_interpolation",
}
"""Flags that change nothing, and why."""

DEFAULTS: Mapping[str, tuple[object, str]] = {
    "prefix_match": (
        "no",
        "a token does not get the row of its beginning. Leave the option out, or take --approximate subword.",
    ),
    "subword_method": ("mean", "the rows of sub-words are averaged. Leave the option out."),
    "magikarp": (False, "no token is left out as untrained. Leave the option out."),
    "new_vocab_noise": (None, "no noise is added to new rows. Leave the option out."),
    "new_vocab_scale": (None, "new rows are not scaled. Leave the option out."),
}
"""Flags that are refused unless they have this value, and why."""

METHODS = ("common_interpolation", "zero", "randn", "john_hewitt", "landmark_pca", "stb", "mp_rope")
"""Ways of mergekit-tokensurgeon that alnico does not have."""


def _text(*also: str) -> Flag:
    return Flag(type=str, is_hidden=True, also=also)


def _switch(name: str) -> Flag:
    return Flag(type=bool, is_hidden=True, spelled=(f"--{name}/--no-{name}",))


FLAGS: Mapping[str, Flag] = {
    "approximation_method": _text(),
    "k": Flag(type=int, is_hidden=True, least=1),
    "batch_size": _text(),
    "byte_match": _text("-bm"),
    "weight_scheme": _text("-w"),
    "prefix_match": _text("-pm"),
    "subword_method": _text("-s"),
    "new_vocab_noise": _text("-nvn"),
    "new_vocab_scale": _text("-nvs"),
    "cosine_similarity": _switch("cosine-similarity"),
    "magikarp": _switch("magikarp"),
    **mergekit_flags.FLAGS,
}
"""Hidden options of ``alnico retokenize``."""


def with_own_words(call: CommandCall) -> CommandCall:
    """Return the call with its own options in the place of mergekit-tokensurgeon's; note those without effect, refuse what is not here.

    Errors: a wrong command line.
    """
    mergekit_flags.check_flags(call)
    for name in mergekit_flags.DEVICES:
        if call[name]:
            say(f"note: {_typed(name)} has no effect: rows are made on the processor.", call.is_quiet)
    for name, why in IGNORED.items():
        if call[name] is not None:
            say(f"note: {_typed(name)} has no effect: {why}.", call.is_quiet)
    for name, (default, why) in DEFAULTS.items():
        if call[name] not in (None, default):
            raise click.BadParameter(f"{_typed(name)}: {why}")
    values, given = dict(call.values), set(call.given)
    for name, own in SYNONYMS.items():
        if call[name] is None:
            continue
        if own in call.given and call[own] != call[name]:
            raise click.BadParameter(
                f"{_typed(name)} is --{own}, and both are given with different values. Leave one out."
            )
        if name == "approximation_method" and call[name] not in APPROXIMATIONS:
            known = (
                "a way of mergekit-tokensurgeon that alnico does not have" if call[name] in METHODS else ""
            )
            raise click.BadParameter(
                f"--approximation-method is {call[name]!r}{known and ', '}{known}; expected omp, subword or mean. Choose one of them."
            )
        values[own] = call[name]
        given.add(own)
    return CommandCall(call.command, values, given)


def _typed(name: str) -> str:
    return f"--{name.replace('_', '-')}"
