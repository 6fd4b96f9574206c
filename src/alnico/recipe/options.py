"""Resolves a method's options at a tensor from levels, filters, gradients and mergekit's names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alnico.checkpoint import patterns
from alnico.checkpoint.image_blocks import BLOCK, matches_blocks
from alnico.errors import MethodError, RecipeError
from alnico.methods.base import Method, Option
from alnico.numerics.numbers import complement
from alnico.recipe import dialect
from alnico.recipe.schema import (
    PAIR_KEY,
    Case,
    Cases,
    EachModel,
    Gradient,
    ModelEntry,
    NormWeight,
    PairWeight,
    Parameters,
    Scalar,
    ScheduleWeight,
    Setting,
)


@dataclass(frozen=True)
class Levels:
    """The parameters that apply to one part of the output, from the highest precedence to the lowest.

    A rule's parameters come first. Then come those of the model (for options of a model), the slice, the
    module, the recipe and the preset.
    """

    rule: Parameters
    shared: tuple[Parameters, ...]
    models: tuple[Parameters, ...] = ()
    """The parameters of all listed models, including the base: any of them may hold an option shared by all
    models."""


@dataclass(frozen=True)
class TensorPlace:
    """A tensor of the output and its relative depth: 0 is the first layer, 1 the last or the only one."""

    name: str
    depth: float


def options_at(
    method: Method, levels: Levels, entries: Sequence[ModelEntry], place: TensorPlace, names: Sequence[str]
) -> dict[str, Any]:
    """Return the option values of ``method`` at a tensor; options of a model have one value per model.

    ``names`` are the tensor's names in the models. Filters of options of a model match these names; other
    filters match the output's name.
    """
    values_by_option: dict[str, Any] = {}
    for name, option in method.options.items():
        if option.per_model:
            default = option.default[0] if isinstance(option.default, tuple) else option.default
            values = []
            for i, (entry, model_name) in enumerate(zip(entries, names, strict=True)):
                scopes = (levels.rule, entry.parameters, *levels.shared)
                tensor = TensorPlace(model_name, place.depth)
                value = _first(method, option, scopes, tensor, i, len(entries))
                values.append(default if value is None else value)
            values_by_option[name] = tuple(values)
        else:
            scopes = (levels.rule, *levels.models, *(e.parameters for e in entries), *levels.shared)
            value = _first(method, option, scopes, place, 0, len(entries))
            if value is not None:
                values_by_option[name] = value
    return values_by_option


def _first(
    method: Method, option: Option, scopes: Sequence[Parameters], place: TensorPlace, model: int, models: int
) -> Scalar | NormWeight | None:
    for parameters in scopes:
        for key, setting in parameters.items():
            if (
                dialect.option_name(method, key) == option.name
                and (value := setting_at(setting, place, model, models)) is not None
            ):
                if isinstance(setting, PairWeight) and models != 2:
                    raise MethodError(f"{PAIR_KEY} is {not_a_pair(method, models)}")
                return dialect.translate_value(method, key, value)  # type: ignore[no-any-return]
    return None


def not_a_pair(method: Method, models: int) -> str:
    """The end of a message about weights [1 - alpha, alpha] of more models than two, or of one."""
    besides = " besides base_model" if method.space == "delta" else ""
    return f"weight [1 - {PAIR_KEY}, {PAIR_KEY}] of two models{besides}; found {models}. Write a weight under each model."


def setting_at(
    setting: Setting, place: TensorPlace, model: int = 0, models: int = 1
) -> Scalar | NormWeight | None:
    """Return a setting's value at a tensor for one of several models; None if no filter matches. Norm weights stay as they are.

    >>> setting_at(Gradient((0.0, 1.0, 0.5)), TensorPlace("layers.1.w", 0.25))
    0.5
    """
    match setting:
        case Cases(cases):
            for case in cases:
                if matches_filter(case.filter, place.name):
                    return setting_at(case.value, place, model, models)
            return None
        case EachModel(values):
            return values[model]
        case PairWeight(share):
            value = setting_at(share, place)
            return complement(value) if model == 0 and isinstance(value, float) else value
        case Gradient(values):
            return _between(values, place.depth)
        case ScheduleWeight():
            return setting.weights(models)[model]
    return setting


def _between(values: Sequence[Scalar], depth: float) -> Scalar:
    place = depth * (len(values) - 1)
    left = int(place)
    first, second = values[left], values[min(left + 1, len(values) - 1)]
    if isinstance(first, (bool, str)) or isinstance(second, (bool, str)):
        return first
    share = place - left
    return (1 - share) * first + share * second


def matches_filter(pattern: str, name: str) -> bool:
    """Does a filter match a tensor's name?

    >>> [matches_filter(p, "model.layers.0.mlp.up_proj.weight") for p in ("mlp", "*", "=mlp", r"re:layers\\.\\d\\.mlp", "attn")]
    [True, True, False, True, False]
    """
    if pattern.startswith("="):
        return name == pattern[1:]
    if pattern.startswith(BLOCK):
        return matches_blocks(pattern[len(BLOCK) :], name)
    if pattern.startswith("re:"):
        try:
            return patterns.fits(pattern[3:], name)
        except patterns.PatternError as error:
            raise RecipeError(
                f"the filter {patterns.quote_pattern(pattern)}: {error}; expected a regular expression of at most "
                f"{patterns.MAX_PATTERN} characters with few nested repetitions. Write a shorter one, or "
                "several filters."
            ) from None
    return pattern == "*" or pattern in name


def merged_entries(
    method: Method, entries: Sequence[ModelEntry], base_model: str | None
) -> tuple[ModelEntry, ...]:
    """Return the models that ``method`` merges, in order.

    In delta space the base is left out; for methods with base "first" it comes first.

    A base that comes first but is not among ``entries`` uses the layers of the first entry.
    """
    others = tuple(e for e in entries if e.reference != base_model)
    if method.space == "delta":
        return others
    if method.base == "first" and base_model is not None:
        layers = entries[0].layers if entries else None
        listed = [e for e in entries if e.reference == base_model]
        return (*(listed[:1] or (ModelEntry(base_model, layers=layers),)), *others)
    return tuple(entries)


def starts_from_a_model(method: Method) -> bool:
    """Does a method merge two models, one of which is the base?"""
    return method.base in ("first", "required") and method.models[1] == 1 + (method.base == "first")


def translate_setting(method: Method, key: str, setting: Setting) -> Setting:
    """Translate a setting written under mergekit's name, or under a synonym.

    >>> from alnico.methods import find
    >>> translate_setting(find("ties"), "normalize", Gradient((True, False)))
    Gradient(values=('weight', 'none'))
    >>> translate_setting(find("ties"), "trim_ratio", Gradient((0.1, 0.2)))
    Gradient(values=(0.9, 0.8))
    """
    synonym = dialect.synonym_of(method, key)
    if synonym is not None and synonym.relation == "pair":
        return PairWeight(setting)
    match setting:
        case Cases(cases):
            return Cases(tuple(Case(c.filter, translate_setting(method, key, c.value)) for c in cases))
        case Gradient(values):
            return Gradient(tuple(_translate(method, key, v) for v in values))
        case EachModel(values):
            return EachModel(tuple(_translate(method, key, v) for v in values))
        case PairWeight() | NormWeight() | ScheduleWeight():
            return setting
    return _translate(method, key, setting)


def _translate(method: Method, key: str, value: Scalar) -> Scalar:
    if isinstance(value, float):
        return dialect.number_of(method, key, value)
    return dialect.translate_value(method, key, value)  # type: ignore[no-any-return]


def preset_options(method: Method, preset: str | None) -> Mapping[str, Any]:
    """Return the option values of a preset."""
    return {} if preset is None else method.presets.get(preset, {})
