"""Reads the words of a merge: a recipe, or models and options that a recipe is made from."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import click
import yaml

from alnico.checkpoint.lineage import LOCK
from alnico.checkpoint.near_paths import is_misspelling, near_path
from alnico.checkpoint.reference import (
    PICKLES,
    is_at_url,
    is_hub_reference,
    is_path,
    may_hold_model,
    split_adapter,
)
from alnico.checkpoint.weight_files import gguf_files, holds_weights
from alnico.cli.command import CommandCall
from alnico.cli.options import REQUIRED, Flag, dtype_names, method_names
from alnico.errors import AlnicoError, without_secrets
from alnico.recipe.from_options import Words, recipe_of_options
from alnico.recipe.schema import Recipe

MAKER = "alnico.make_recipe"
"""The function whose parameters are the options of a merge without a recipe file."""

OPTIONS = ("method", "base", "weights", "t", "density", "dtype", "tokenizer", "missing", "unrelated", "set")
"""The options that a recipe file takes the place of."""

STANDARD_INPUT = "-"
RECIPES = (".yml", ".yaml")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+),?")
MODELS = (".safetensors", ".gguf", ".index.json", *PICKLES)


@dataclass(frozen=True)
class MergeWords:
    """What the words of a command name: one recipe file, or models; and the output, which may be absent."""

    recipe: str | None
    models: tuple[str, ...]
    out: str


def flags(usage: str) -> Mapping[str, Flag]:
    """What a command adds to the parameters of :data:`MAKER`, with its argument, whose forms ``usage`` shows."""
    return {
        "words": Flag(
            "A recipe (a YAML file, or - for standard input), or models: paths, hub ids, base+adapter.",
            type=list[str],
            is_argument=True,
            metavar="RECIPE or MODELS",
            usage=usage,
            default=REQUIRED,
        ),
        "method": Flag(is_option=True, metavar="NAME", complete=method_names),
        "base": Flag(metavar="MODEL"),
        "weights": Flag(metavar="NUMBERS"),
        "t": Flag(spelled=("-t",), metavar="NUMBER"),
        "density": Flag(metavar="NUMBERS"),
        "dtype": Flag(metavar="NAME", complete=dtype_names),
        "tokenizer": Flag(metavar="SOURCE"),
        "set": Flag(
            "Another option of the method, such as lambda=0.5; may be repeated. `alnico methods NAME` lists "
            "them. Separate the values of several models by commas.",
            type=list[str],
            metavar="NAME=VALUE",
        ),
        "print_recipe": Flag("Print the recipe that the options make, and stop.", type=bool, default=False),
    }


def read_words(call: CommandCall, out: str, *, needs_out: bool, has_out: bool = True) -> MergeWords:
    """Tell the recipe or the models of a command from its output, which may be the last word.

    ``needs_out``: the command writes; ``has_out``: the last word may be the output. Errors: a wrong command line.
    """
    words = list(call["words"])
    _check_numbers(words, call)
    if has_out and not out and (needs_out or len(words) > 1):
        if needs_out and len(words) < 2:
            raise click.BadParameter(
                f"the output is missing. Write it after {without_secrets(words[0])}, or give it with -o OUT."
            )
        if needs_out or not is_model(words[-1]):
            out = words.pop()
            _check_output(out, words, call)
    elif not has_out and len(words) > 1:
        out = _take_output(words, out)
    given = [_label(call, name) for name in OPTIONS if name in call.given]
    recipe = next((word for word in words if is_recipe(word)), None)
    if recipe is None and (given or len(words) > 1 or _is_elsewhere(words[0])):
        return MergeWords(None, tuple(words), out)
    if len(words) > 1:
        other = next((word for word in words if word != recipe), recipe)
        raise click.BadParameter(
            f"{recipe} is a recipe, and {other} is given, too; expected one recipe, or models alone. "
            f"Leave one of them out, or name the output with -o OUT.{_after_ray(call, out)}"
        )
    if given:
        raise click.BadParameter(
            f"{given[0]} is an option of a merge of models, and {recipe} is a recipe. Write the setting into the "
            "recipe, or give models in its place."
        )
    if call["print_recipe"]:
        raise click.BadParameter(
            f"--print-recipe prints the recipe of models and options, and {words[0]} is a recipe already. "
            "Leave the option out."
        )
    return MergeWords(words[0], (), out)


def _after_ray(call: CommandCall, out: str) -> str:
    """Say that a word after --ray was taken for the output, where it may have been meant as an address."""
    is_alone = "ray" in call.given and call["ray"] == ""
    return (
        f" --ray takes an address only as HOST:PORT or auto; {without_secrets(repr(out))} is none."
        if is_alone
        else ""
    )


def recipe_of_words(call: CommandCall, words: MergeWords) -> Recipe:
    """Make the recipe of models and options. Errors: RecipeError, in the words of the options."""
    parameters = {p.name: p for p in call.command.parameters}
    labels = {name: p.label for name, p in parameters.items()}
    forms = {p.label: f"Give {p.label} {p.metavar}" for p in parameters.values()}
    names = {**labels, "merge_method": labels["method"], "base_model": labels["base"]}
    names |= {"weight": labels["weights"], "tokenizer_source": labels["tokenizer"]}
    options = {name: call[name] for name in ("t", "density") if call[name] is not None}
    return recipe_of_options(
        words.models,
        call["method"],
        base=call["base"],
        weights=call["weights"],
        dtype=call["dtype"],
        tokenizer=call["tokenizer"],
        seed=call["seed"],
        missing=call["missing"],
        unrelated="allow" if call.values.get("allow_crimes") else call["unrelated"],
        options=options | further_options(call["set"] or ()),
        words=Words(names, f"{labels['set']} {{}}", lambda name: forms.get(name, f"Give {name}=VALUE")),
    )


def words_of_options(words: MergeWords) -> AbstractContextManager[None]:
    """Let errors of a merge without a recipe file name options where they advise on keys of the recipe."""
    return advice_as_options() if words.recipe is None else nullcontext()


ADVICE = re.compile(
    r"\b(missing|unrelated|tokenizer)(?:_source)?: (?:\{source: )?(\w+)\}?(?: in the recipe)?"
)


@contextmanager
def advice_as_options() -> Iterator[None]:
    """Let errors name an option of the command line where they name a line of a recipe."""
    try:
        yield
    except AlnicoError as error:
        error.args = tuple(ADVICE.sub(r"--\1 \2", str(line)) for line in error.args)
        raise


def is_recipe(word: str) -> bool:
    """Does a word name a recipe: standard input, a YAML file, or another file that is not a model?

    >>> [is_recipe(word) for word in ("-", "merge.yml", "models/a", "org/model", "model.safetensors")]
    [True, True, False, False, False]
    """
    if word == STANDARD_INPUT or (word.endswith(RECIPES) and not os.path.isdir(word)):
        return True
    return os.path.exists(word) and not os.path.isdir(word) and not word.endswith(MODELS)


def is_model(word: str) -> bool:
    """Does a word name an existing model: a folder with weights, a weight file, or a base with adapters?"""
    if os.path.isdir(word):
        try:
            return holds_weights(names := os.listdir(word)) or bool(gguf_files(names))
        except OSError:
            return False
    return (os.path.isfile(word) and word.endswith(MODELS)) or split_adapter(word, is_path) is not None


def _is_hub_model(word: str) -> bool:
    """Does a word that is not a path look like a model of the hub?"""
    return not os.path.exists(word) and (is_hub_reference(word) or split_adapter(word, is_path) is not None)


def _is_elsewhere(word: str) -> bool:
    """Is a word the URL of a model, or does it look like a model of the hub?"""
    return is_at_url(word) or _is_hub_model(word)


def _check_numbers(words: Sequence[str], call: CommandCall) -> None:
    """Refuse numbers of an option that came apart from it: ``--weights 0.3 0.5``. Errors: a wrong command line."""
    lists = [name for name in ("weights", "density") if name in call.given]
    number = next((word for word in words if NUMBER.fullmatch(word) and not os.path.exists(word)), None)
    if lists and number is not None:
        raise click.BadParameter(
            f"{number} is a number; expected a model or the output. Separate the numbers of an option by commas: "
            f"{_label(call, lists[0])} 0.7,0.3."
        )


def _take_output(words: list[str], out: str) -> str:
    """The output of a command that writes nothing: the word after a recipe. Errors: a wrong command line."""
    last = words[-1]
    if not out and len(words) == 2 and is_recipe(words[0]) and not (is_model(last) or is_recipe(last)):
        return words.pop()
    if is_recipe(words[0]) or os.path.exists(last) or is_recipe(last) or _is_elsewhere(last):
        return out
    near = near_path(last, accepts=may_hold_model)
    if near is None or not is_misspelling(last, near):
        raise click.BadParameter(
            f"{last} is not a model, and `alnico plan` takes no output after models. Leave it "
            f"out, or write -o {last}."
        )
    return out


def _check_output(out: str, words: Sequence[str], call: CommandCall) -> None:
    """Refuse a last word that may have been meant as a model. Errors: a wrong command line."""
    if len(words) == 1 and is_recipe(words[0]):
        return
    if is_recipe(out) and os.path.isfile(out):
        raise click.BadParameter(
            f"{out} is a recipe, but the last word is the output. Write the recipe first, then the output."
        )
    may_replace = call["overwrite"] or call["overwrite_anything"]
    if is_model(out) and not (may_replace and os.path.exists(out)):
        if os.path.isfile(os.path.join(out, LOCK)):
            raise click.BadParameter(
                f"{out} is a finished merge, but the last word is the output. Name another output, or add "
                f"--overwrite to replace {out}."
            )
        raise click.BadParameter(
            f"{out} is a model, but the last word is the output. Write the output after it, or name it with -o OUT; "
            f"--overwrite would replace {out}."
        )
    if is_hub_reference(out) and not os.path.isdir(os.path.dirname(out)) and any(map(_is_hub_model, words)):
        raise click.BadParameter(
            f"{out} may be a model of the hub or the output. Name the output with -o OUT; ./{out} is a folder here."
        )


def _label(call: CommandCall, name: str) -> str:
    return next(p.label for p in call.command.parameters if p.name == name)


def further_options(words: Sequence[str]) -> dict[str, Any]:
    """Values by option, from ``NAME=VALUE`` words. Errors: a wrong command line."""
    options: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not name or not text:
            raise click.BadParameter(f"--set: {word!r} is not NAME=VALUE. Write it as lambda=0.5.")
        if name in options:
            raise click.BadParameter(
                f"--set: {name} is given twice. Separate the values of several models by commas."
            )
        try:
            options[name] = _value_of(text)
        except yaml.YAMLError:
            raise click.BadParameter(
                f"--set: {text!r}, the value of {name}, is not YAML. Write a number, a word, or values separated by commas."
            ) from None
    return options


def _value_of(text: str) -> Any:
    """A value as YAML; commas separate several.

    >>> _value_of("0.5"), _value_of("1e-5"), _value_of("0.1,0.2"), _value_of("{from: l2_norm, mode: exp}"), _value_of("mass")
    (0.5, 1e-05, [0.1, 0.2], {'from': 'l2_norm', 'mode': 'exp'}, 'mass')
    """
    if text[:1] in "[{":
        return yaml.safe_load(text)
    values = [_plain_value(part) for part in text.split(",")]
    return values if len(values) > 1 else values[0]


def _plain_value(text: str) -> Any:
    try:
        return float(text) if text.strip().lower().lstrip("+-") not in ("nan", "inf", "infinity") else text
    except ValueError:
        return yaml.safe_load(text)
