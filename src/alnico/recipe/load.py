"""YAML to :class:`Recipe`: strict, with the line of every mistake, all mistakes together."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from alnico.errors import AlnicoError, MethodError, RecipeError
from alnico.methods import find
from alnico.methods.base import Method, Option
from alnico.numerics.dtypes import TORCH_NAMES
from alnico.recipe import dialect
from alnico.recipe.nodes import MAX_SHOWN, Node, Reading, compose, cut, plain, shown
from alnico.recipe.schema import Missing, ModelEntry, Recipe, Value

KEYS = ("merge_method", "models", "base_model", "parameters", "dtype", "out_dtype", "seed", "missing")
MAX_BYTES = 1_000_000
MAX_MODELS = 1_000
MAX_TEXT = 4_096
SEEDS = range(-(1 << 63), 1 << 63)


def load_recipe(source: str | os.PathLike[str] | Mapping[str, Any] | Recipe, seed: int | None = None) -> Recipe:
    """Read a recipe from a YAML file, YAML text with a line break, or a mapping. ``seed`` replaces its seed.

    Errors: RecipeError with one line for every mistake, each with the line of the file.
    """
    recipe = source if isinstance(source, Recipe) else _load(source)
    if seed is None:
        return recipe
    if isinstance(seed, bool) or not isinstance(seed, int) or seed not in SEEDS:
        raise RecipeError(f"seed is {shown(seed)}; expected a whole number of at most 64 bits.")
    return dataclasses.replace(recipe, seed=seed)


def _load(source: str | os.PathLike[str] | Mapping[str, Any]) -> Recipe:
    if isinstance(source, Mapping):
        text = yaml.safe_dump(plain(source, "the mapping", 0), sort_keys=False)
        return parse_recipe(text, "recipe", has_lines=False)
    path = os.fsdecode(source)
    if "\n" in path:
        return parse_recipe(path, "recipe")
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}). Check the path of the recipe.") from None
    except ValueError:
        raise RecipeError(f"{path!r}: is no path. Check the path of the recipe.") from None
    return decode_recipe(data, path, str(Path(path).parent))


def decode_recipe(data: bytes, name: str, folder: str = ".") -> Recipe:
    """Read a recipe from the bytes of a YAML file. Errors: RecipeError."""
    if len(data) > MAX_BYTES:
        raise RecipeError(f"{name}: is larger than {MAX_BYTES} bytes; expected a recipe. Give the YAML file of the merge.")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise RecipeError(f"{name}: is not UTF-8 text; expected YAML. Give the YAML file of the merge.") from None
    return parse_recipe(text, name, folder)


def parse_recipe(text: str, name: str, folder: str = ".", *, has_lines: bool = True) -> Recipe:
    """Read a recipe from YAML text; ``name`` stands before the line numbers of messages."""
    reading = Reading(name, has_lines)
    root = compose(text, reading)
    recipe = _recipe(root, reading, folder) if root is not None and not reading.is_broken else None
    if reading.mistakes or recipe is None:
        raise reading.error()
    return dataclasses.replace(recipe, text=text, written_seed=recipe.seed)


def option_values(recipe: Recipe, method: Method, entries: tuple[ModelEntry, ...]) -> dict[str, Any]:
    """Return the option values of a method for ``entries``: under a model before global before the default."""
    values: dict[str, Any] = {}
    for name, option in method.options.items():
        if option.per_model:
            default = option.default[0] if isinstance(option.default, tuple) else option.default
            given = [e.parameters.get(name, recipe.parameters.get(name, default)) for e in entries]
            values[name] = tuple(given)
        else:
            own = next((m.parameters[name] for m in recipe.models if name in m.parameters), None)
            shared = own if own is not None else recipe.parameters.get(name)
            if shared is not None:
                values[name] = shared
    return values


def _recipe(root: Node, reading: Reading, folder: str) -> Recipe | None:
    if not isinstance(root.value, dict):
        reading.wrong(root.line, f"is {root.kind}; expected a mapping with at least merge_method and models.")
        return None
    keys: dict[str, Node] = root.value
    method = _method(keys, root, reading)
    for key, node in keys.items():
        if key in dialect.LATER:
            version, instead = dialect.LATER[key]
            reading.wrong(node.line, f"{key} is planned for {version}. {instead}")
        elif key not in KEYS:
            reading.wrong(node.line, f"unknown key {cut(key)!r}. {_belongs(key, method, 'parameters') or _nearest(key, KEYS)}")
    models = _models(keys, root, method, reading)
    base = _reference(keys["base_model"], "base_model", 0, reading) if "base_model" in keys else None
    parameters = _parameters(keys.get("parameters"), "parameters", method, reading)
    dtype, out_dtype = (_dtype(keys.get(name), name, reading) for name in ("dtype", "out_dtype"))
    if dtype and out_dtype and dtype != out_dtype:
        reading.note(keys["dtype"].line, "dtype has no effect: the output has out_dtype, and inputs are not rounded before.")
    seed = _seed(keys.get("seed"), reading)
    missing = _missing(keys.get("missing"), reading)
    if method is None:
        return None
    recipe = Recipe(method.name, tuple(models), base, parameters, out_dtype or dtype, seed, missing, (), reading.name, folder)
    _check(recipe, method, keys, reading)
    return None if reading.mistakes else dataclasses.replace(recipe, notes=tuple(reading.notes))


def _method(keys: dict[str, Node], root: Node, reading: Reading) -> Method | None:
    node = keys.get("merge_method")
    if node is None:
        reading.wrong(root.line, "merge_method is missing. `alnico methods` lists what there is.")
        return None
    name = _text(node, "merge_method", reading)
    if name is None:
        return None
    try:
        return find(name)
    except MethodError as error:
        reading.wrong(node.line, str(error).replace(repr(name), shown(name)))
        return None


def _models(keys: dict[str, Node], root: Node, method: Method | None, reading: Reading) -> list[ModelEntry]:
    node = keys.get("models")
    if node is None:
        if "slices" not in keys and "modules" not in keys:
            reading.wrong(root.line, "models is missing; expected a list of models.")
        return []
    if not isinstance(node.value, list) or not 0 < len(node.value) <= MAX_MODELS:
        found = f"a list of {len(node.value)}" if isinstance(node.value, list) else node.kind
        reading.wrong(node.line, f"models is {found}; expected a list of 1 to {MAX_MODELS} models.")
        return []
    entries = []
    for i, item in enumerate(node.value):
        where = f"models[{i}]"
        if isinstance(item.value, str):
            item = Node({"model": item}, item.line)
        if not isinstance(item.value, dict):
            reading.wrong(item.line, f"{where} is {item.kind}; expected a mapping with `model` and perhaps `parameters`.")
            continue
        for key, value in item.value.items():
            if key not in ("model", "parameters"):
                hint = _belongs(key, method, f"{where}.parameters") or _nearest(key, ("model", "parameters"))
                reading.wrong(value.line, f"{where} has the unknown key {cut(key)!r}. {hint}")
        reference = _reference(item.value.get("model"), f"{where}.model", item.line, reading)
        parameters = _parameters(item.value.get("parameters"), f"{where}.parameters", method, reading)
        if reference is not None:
            entries.append(ModelEntry(reference, parameters))
    return entries


def _reference(node: Node | None, where: str, line: int, reading: Reading) -> str | None:
    if node is None:
        reading.wrong(line, f"{where} is missing; expected the path of a model.")
        return None
    if isinstance(node.value, dict):
        reading.wrong(node.line, f"{where} is a mapping; such references are planned for 0.3. Write the path of the model.")
        return None
    return _text(node, where, reading)


def _text(node: Node | None, where: str, reading: Reading) -> str | None:
    if node is None:
        return None
    value = node.value
    if not isinstance(value, str):
        hint = " Put it in quotes." if isinstance(value, (bool, int, float)) else ""
        reading.wrong(node.line, f"{where} is {node.kind}; expected text.{hint}")
        return None
    if not value.strip() or len(value) > MAX_TEXT or not value.isprintable():
        found = "longer than any path" if len(value) > MAX_TEXT else node.kind
        reading.wrong(node.line, f"{where} is {found}; expected text of one line, of at most {MAX_TEXT} characters.")
        return None
    return value


def _dtype(node: Node | None, where: str, reading: Reading) -> str | None:
    name = _text(node, where, reading)
    if node is None or name is None:
        return None
    known = TORCH_NAMES.get(name.removeprefix("torch.").lower())
    if known is None:
        near = difflib.get_close_matches(name[:MAX_SHOWN], TORCH_NAMES, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        reading.wrong(node.line, f"{where} is {shown(name)}; expected bfloat16, float16, float32 or float64.{hint}")
    return known


def _seed(node: Node | None, reading: Reading) -> int:
    if node is None:
        return 0
    if isinstance(node.value, bool) or not isinstance(node.value, int) or node.value not in SEEDS:
        reading.wrong(node.line, f"seed is {node.kind}; expected a whole number of at most 64 bits.")
        return 0
    return node.value


def _missing(node: Node | None, reading: Reading) -> Missing:
    if node is None:
        return "error"
    choices: tuple[Missing, ...] = ("error", "copy", "drop")
    for choice in choices:
        if node.value == choice:
            return choice
    reading.wrong(node.line, f"missing is {node.kind}; expected error, copy or drop.")
    return "error"


def _parameters(node: Node | None, where: str, method: Method | None, reading: Reading) -> dict[str, Value]:
    if node is None or node.value is None:
        return {}
    if not isinstance(node.value, dict):
        reading.wrong(node.line, f"{where} is {node.kind}; expected a mapping of option names to values.")
        return {}
    if method is None:
        return {}
    found: dict[str, Value] = {}
    keys: dict[str, str] = {}
    for key, value in node.value.items():
        if key in dialect.WITHOUT_EFFECT:
            reading.note(value.line, f"{key} has no effect: it {dialect.WITHOUT_EFFECT[key]}.")
            continue
        name = dialect.own_name(method, key)
        if name is None and key in dialect.WITHOUT_EFFECT_FOR.get(method.name, {}):
            reading.note(value.line, f"{key} has no effect on {method.name}{dialect.WITHOUT_EFFECT_FOR[method.name][key]}.")
            continue
        if name is None:
            known = dialect.known_names(method)
            hint = _nearest(key, known) if known else f"{method.name} has none."
            reading.wrong(value.line, f"{where}.{cut(key)} is no option of {method.name}. {hint}")
            continue
        read = _value(value, f"{where}.{key}", method, key, reading)
        if read is None:
            continue
        if name in found and found[name] != read:
            said = f"{keys[name]} is {shown(found[name])}, {key} means {name}: {shown(read)}"
            if keys[name] != name:
                said = f"{keys[name]} means {name}: {shown(found[name])}, {key} is {shown(read)}"
            reading.wrong(value.line, f"{where}: {keys[name]} and {key} are one option and disagree ({said}). Remove one.")
        found[name], keys[name] = read, key
    return found


def _value(node: Node, where: str, method: Method, key: str, reading: Reading) -> Value | None:
    later = _later(node)
    if later is not None:
        reading.wrong(node.line, f"{where} is {later}; this version takes one value for all tensors.")
        return None
    name = dialect.own_name(method, key) or key
    option = method.options[name]
    value = dialect.own_value(method, key, node.value)
    number = _number(value) if option.kind == "number" else None
    if name != key and option.kind != "number" and not isinstance(node.value, bool):
        problem: str | None = f"is {node.kind}; expected true or false"
    elif option.kind == "number" and number is None:
        problem = f"is {node.kind}; expected a number"
    elif number is not None and not math.isfinite(number):
        problem = f"is {node.kind}; expected a finite number"
    elif option.kind != "number" and option.problem(value) is not None:
        problem = f"is {node.kind}; expected {'one of ' + ', '.join(option.choices) if option.choices else 'true or false'}"
    else:
        value = value if number is None else number
        problem = option.problem(value)
    if problem is not None:
        reading.wrong(node.line, f"{where} {problem}.{_slipped_point(number, option)}")
        return None
    result: Value = value
    return result


def _later(node: Node) -> str | None:
    """Name a kind of value that the language has and this version refuses."""
    if isinstance(node.value, list):
        filtered = any(isinstance(item.value, dict) for item in node.value)
        return "a list of filters (planned for 0.3)" if filtered else "a gradient over layers (planned for 0.3)"
    if isinstance(node.value, dict):
        for key, meaning in (
            ("filter", "a filter (planned for 0.3)"),
            ("value", "a filter (planned for 0.3)"),
            ("from", "a measured value (planned for 0.4)"),
            ("search", "a value to be searched (planned for 0.5)"),
            ("choice", "a choice to be searched (planned for 0.5)"),
        ):
            if key in node.value:
                return meaning
        return "a mapping of no known kind"
    return None


def _number(value: Any) -> float | None:
    """A number as float, also where YAML 1.1 reads text (1e-5); None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except ValueError:
        return None
    except OverflowError:
        return math.inf


def _slipped_point(number: float | None, option: Option) -> str:
    if number is not None and math.isfinite(number):
        for slipped in (number / 10, number / 100):
            if option.problem(slipped) is None:
                return f" Did you mean {slipped:g}?"
    return ""


def _check(recipe: Recipe, method: Method, keys: dict[str, Node], reading: Reading) -> None:
    """What only the whole recipe can show: the base, the number of models, options that are one value or required."""
    asked = keys["merge_method"].line
    line = keys["models"].line if "models" in keys else asked
    if method.base in ("required", "first") and "base_model" not in keys:
        what = "the model where the arc begins" if method.base == "first" else "the model the others were tuned from"
        reading.wrong(asked, f"{method.name} needs base_model, {what}. Add base_model: PATH.")
    for option in method.options.values():
        if option.required:
            _check_required(option, recipe, method, keys, reading)
        if not option.per_model:
            _check_shared(option.name, recipe, line, reading)
    if reading.mistakes:
        return
    entries = values_of(recipe, method)
    if (problem := _count_problem(recipe, method, len(entries))) is not None:
        reading.wrong(line, problem)
        return
    try:
        method.bind(option_values(recipe, method, entries), len(entries))
    except AlnicoError as error:
        reading.wrong(line, str(error))
    for i, entry in enumerate(recipe.models):
        names = [n for n in entry.parameters if method.options[n].per_model]
        if method.space == "delta" and entry.reference == recipe.base_model and names:
            reading.note(line, f"models[{i}] is the base; without effect under it: {', '.join(names)}.")


def _check_required(option: Option, recipe: Recipe, method: Method, keys: dict[str, Node], reading: Reading) -> None:
    """An option without a default: given under parameters, or under a model (under every one, if it is one a model)."""

    def is_given(holder: Any) -> bool:
        inner = holder.get("parameters") if isinstance(holder, dict) else None
        names = inner.value if inner is not None and isinstance(inner.value, dict) else ()
        return any(dialect.own_name(method, name) == option.name for name in names)

    listed = keys["models"].value if "models" in keys else []
    given = [is_given(item.value) for item in listed] if isinstance(listed, list) else []
    if is_given(keys) or (any(given) and not option.per_model):
        return
    meaning = f": {option.meaning}" if option.meaning else f" ({option.describe()})"
    if not option.per_model or not any(given):
        place = "under parameters, or under each model" if option.per_model else "under parameters"
        reading.wrong(keys["merge_method"].line, f"{method.name} needs the option {option.name}{meaning}. Give it {place}.")
        return
    for i, item in enumerate(listed):
        reference = item.value.get("model") if isinstance(item.value, dict) else item
        is_base = reference is not None and reference.value == recipe.base_model and method.space == "delta"
        if not given[i] and not is_base:
            reading.wrong(item.line, f"models[{i}] lacks {option.name}{meaning}. Give it there, or under parameters for all.")


def _check_shared(name: str, recipe: Recipe, line: int, reading: Reading) -> None:
    given = {f"models[{i}]": m.parameters[name] for i, m in enumerate(recipe.models) if name in m.parameters}
    if given and name in recipe.parameters:
        given["parameters"] = recipe.parameters[name]
    if len(set(given.values())) > 1:
        places = ", ".join(f"{place}: {shown(v)}" for place, v in given.items())
        reading.wrong(line, f"{name} is one value for the whole merge, and differs ({places}). Give it once, under parameters.")


def _count_problem(recipe: Recipe, method: Method, count: int) -> str | None:
    low, high = method.models
    if method.base == "first" and sum(m.reference == recipe.base_model for m in recipe.models) > 1:
        return "base_model is listed more than once under models; expected once. Remove the others."
    if count >= low and (high is None or count <= high):
        return None
    wanted = f"{low}" if low == high else f"at least {low}" if high is None else f"{low} to {high}"
    noun = "model" if wanted.endswith("1") and not wanted.endswith("to 1") else "models"
    base = {True: " besides base_model"}.get(method.space == "delta", ", base_model one of them" if method.base == "first" else "")
    return f"{method.name} merges {wanted} {noun}{base}; found {count}. {'Add' if count < low else 'Remove'} models."


def values_of(recipe: Recipe, method: Method) -> tuple[ModelEntry, ...]:
    """Return the models whose values the method gets, in order: without the base in delta space, base first for "first"."""
    if method.space == "delta":
        return recipe.merged
    if method.base == "first" and recipe.base_model is not None:
        listed = [m for m in recipe.models if m.reference == recipe.base_model]
        return (*(listed[:1] or (ModelEntry(recipe.base_model),)), *recipe.merged)
    return recipe.models


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name[:MAX_SHOWN], known, 1)
    return f"Did you mean {near[0]}?" if near else f"Known are {', '.join(known)}."


def _belongs(key: str, method: Method | None, place: str) -> str:
    """A hint for an option that stands one level too high."""
    return f"It is an option of {method.name}: write it under {place}." if method and dialect.own_name(method, key) else ""
