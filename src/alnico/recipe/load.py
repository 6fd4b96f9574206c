"""YAML to :class:`Recipe`: strict, with the line of every mistake, all mistakes together."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from alnico.errors import AlnicoError, MethodError, RecipeError
from alnico.methods import find
from alnico.methods.base import Method, Option
from alnico.numerics.dtypes import TORCH_NAMES
from alnico.recipe import dialect
from alnico.recipe.schema import Missing, ModelEntry, Recipe, Value

KEYS = ("merge_method", "models", "base_model", "parameters", "dtype", "out_dtype", "seed", "missing")
MAX_BYTES = 1_000_000
MAX_NODES = 100_000
MAX_DEPTH = 32
MAX_MODELS = 1_000


@dataclass
class _Reading:
    """One recipe being read: its name in messages and the mistakes found so far."""

    name: str
    mistakes: list[tuple[int, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    nodes: int = 0

    def wrong(self, line: int, message: str) -> None:
        self.mistakes.append((line, message))

    def error(self) -> RecipeError:
        lines = [f"{self.name}:{line}: {text}" if line else f"{self.name}: {text}" for line, text in sorted(self.mistakes)]
        return RecipeError("\n".join(lines))


@dataclass(frozen=True)
class _Node:
    """A value with the line it stands on: a scalar, a list of nodes, or a mapping of names to nodes."""

    value: Any
    line: int

    @property
    def kind(self) -> str:
        if isinstance(self.value, dict):
            return "a mapping"
        if isinstance(self.value, list):
            return "a list"
        return f"{self.value!r}" if self.value is not None else "empty"


def load_recipe(source: str | os.PathLike[str] | Mapping[str, Any] | Recipe, seed: int | None = None) -> Recipe:
    """Read a recipe from a YAML file, YAML text with a line break, or a mapping. ``seed`` replaces its seed.

    Errors: RecipeError with one line for every mistake, each with the line of the file.
    """
    recipe = source if isinstance(source, Recipe) else _load(source)
    return recipe if seed is None else dataclasses.replace(recipe, seed=seed)


def _load(source: str | os.PathLike[str] | Mapping[str, Any]) -> Recipe:
    if isinstance(source, Mapping):
        text = yaml.safe_dump(dict(source), sort_keys=False)
        return parse_recipe(text, "recipe")
    path = os.fspath(source)
    if "\n" in path:
        return parse_recipe(path, "recipe")
    try:
        if Path(path).stat().st_size > MAX_BYTES:
            raise RecipeError(f"{path}: is larger than {MAX_BYTES} bytes; expected a recipe. Give the YAML file of the merge.")
        text = Path(path).read_text("utf-8")
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}). Check the path of the recipe.") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: is not UTF-8 text; expected YAML. Give the YAML file of the merge.") from None
    return parse_recipe(text, path, str(Path(path).parent))


def parse_recipe(text: str, name: str, folder: str = ".") -> Recipe:
    """Read a recipe from YAML text; ``name`` stands before the line numbers of messages."""
    reading = _Reading(name)
    root = _compose(text, reading)
    recipe = _recipe(root, reading, folder) if root is not None else None
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


def _compose(text: str, reading: _Reading) -> _Node | None:
    try:
        documents = [d for d in yaml.compose_all(text, Loader=yaml.SafeLoader) if d is not None]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reading.wrong(mark.line + 1 if mark else 0, f"is not YAML: {error.problem or error.context}. Mend the line, or the one before it.")
        return None
    except (yaml.YAMLError, RecursionError) as error:
        reading.wrong(0, f"is not YAML: {str(error)[:200]}.")
        return None
    if not documents:
        reading.wrong(1, "is empty; expected at least merge_method and models.")
        return None
    if len(documents) > 1:
        reading.wrong(
            documents[1].start_mark.line + 1,
            "a second document begins; several documents in one file are planned for 0.3. Put each in a file of its own.",
        )
        return None
    return _node(documents[0], reading, 0)


def _node(node: yaml.Node, reading: _Reading, depth: int) -> _Node | None:
    line = node.start_mark.line + 1
    reading.nodes += 1
    if depth > MAX_DEPTH or reading.nodes > MAX_NODES:
        if reading.nodes <= MAX_NODES + 1:
            reading.wrong(line, f"the file is nested deeper than {MAX_DEPTH} or has more than {MAX_NODES} values; expected a recipe.")
            reading.nodes = MAX_NODES + 2
        return None
    if isinstance(node, yaml.SequenceNode):
        items = [_node(n, reading, depth + 1) for n in node.value]
        return _Node([i for i in items if i is not None], line)
    if isinstance(node, yaml.MappingNode):
        return _Node(_mapping(node, reading, depth), line)
    try:
        return _Node(yaml.SafeLoader("").construct_object(node), line)
    except (yaml.YAMLError, ValueError):
        reading.wrong(line, f"{node.value!r} has the tag {node.tag}, which a recipe cannot hold. Write a number, text, true or false.")
        return None


def _mapping(node: yaml.MappingNode, reading: _Reading, depth: int) -> dict[str, _Node]:
    found: dict[str, _Node] = {}
    merged: dict[str, _Node] = {}
    for key, value in node.value:
        inner = _node(value, reading, depth + 1)
        if inner is None:
            continue
        if key.tag == "tag:yaml.org,2002:merge" and isinstance(inner.value, dict):
            merged |= inner.value
        elif not isinstance(key, yaml.ScalarNode):
            reading.wrong(key.start_mark.line + 1, "a key is a list or a mapping; expected a name.")
        elif key.value in found:
            first = found[key.value].line
            reading.wrong(key.start_mark.line + 1, f"{key.value} is given twice, first in line {first}. Remove one.")
        else:
            found[key.value] = _Node(inner.value, key.start_mark.line + 1)
    return {**merged, **found}


def _recipe(root: _Node, reading: _Reading, folder: str) -> Recipe | None:
    if not isinstance(root.value, dict):
        reading.wrong(root.line, f"is {root.kind}; expected a mapping with at least merge_method and models.")
        return None
    keys: dict[str, _Node] = root.value
    for key, node in keys.items():
        if key in dialect.LATER:
            reading.wrong(node.line, f"{key} is planned for {dialect.LATER[key]}; this version merges whole models under `models`.")
        elif key not in KEYS:
            reading.wrong(node.line, f"unknown key {key!r}. {_nearest(key, KEYS)}")
    method = _method(keys, root, reading)
    models = _models(keys, root, method, reading)
    base = _text(keys.get("base_model"), "base_model", reading)
    parameters = _parameters(keys.get("parameters"), "parameters", method, reading)
    dtype = _dtype(keys.get("out_dtype"), "out_dtype", reading) or _dtype(keys.get("dtype"), "dtype", reading)
    seed = _seed(keys.get("seed"), reading)
    missing = _missing(keys.get("missing"), reading)
    if method is None or reading.mistakes:
        return None
    recipe = Recipe(method.name, tuple(models), base, parameters, dtype, seed, missing, (), reading.name, folder)
    _check(recipe, method, keys, reading)
    return None if reading.mistakes else dataclasses.replace(recipe, notes=tuple(reading.notes))


def _method(keys: dict[str, _Node], root: _Node, reading: _Reading) -> Method | None:
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
        reading.wrong(node.line, str(error))
        return None


def _models(keys: dict[str, _Node], root: _Node, method: Method | None, reading: _Reading) -> list[ModelEntry]:
    node = keys.get("models")
    if node is None:
        if "slices" not in keys and "modules" not in keys:
            reading.wrong(root.line, "models is missing; expected a list of models.")
        return []
    if not isinstance(node.value, list) or not 0 < len(node.value) <= MAX_MODELS:
        reading.wrong(node.line, f"models is {node.kind}; expected a list of 1 to {MAX_MODELS} models.")
        return []
    entries = []
    for i, item in enumerate(node.value):
        where = f"models[{i}]"
        if isinstance(item.value, str):
            item = _Node({"model": item}, item.line)
        if not isinstance(item.value, dict):
            reading.wrong(item.line, f"{where} is {item.kind}; expected a mapping with `model` and perhaps `parameters`.")
            continue
        for key, value in item.value.items():
            if key not in ("model", "parameters"):
                reading.wrong(value.line, f"{where} has the unknown key {key!r}. {_nearest(key, ('model', 'parameters'))}")
        reference = _reference(item.value.get("model"), f"{where}.model", item.line, reading)
        parameters = _parameters(item.value.get("parameters"), where, method, reading)
        if reference is not None:
            entries.append(ModelEntry(reference, parameters))
    return entries


def _reference(node: _Node | None, where: str, line: int, reading: _Reading) -> str | None:
    if node is None:
        reading.wrong(line, f"{where} is missing; expected the path of a model.")
        return None
    if isinstance(node.value, dict):
        reading.wrong(node.line, f"{where} is a mapping; such references are planned for 0.3. Write the path of the model.")
        return None
    return _text(node, where, reading)


def _text(node: _Node | None, where: str, reading: _Reading) -> str | None:
    if node is None:
        return None
    if not isinstance(node.value, str) or not node.value.strip():
        reading.wrong(node.line, f"{where} is {node.kind}; expected text.")
        return None
    return node.value


def _dtype(node: _Node | None, where: str, reading: _Reading) -> str | None:
    name = _text(node, where, reading)
    if node is None or name is None:
        return None
    known = TORCH_NAMES.get(name.removeprefix("torch.").lower())
    if known is None:
        reading.wrong(node.line, f"{where} is {name!r}; expected bfloat16, float16, float32 or float64. {_nearest(name, TORCH_NAMES)}")
    return known


def _seed(node: _Node | None, reading: _Reading) -> int:
    if node is None:
        return 0
    if isinstance(node.value, bool) or not isinstance(node.value, int) or not -(1 << 63) <= node.value < 1 << 63:
        reading.wrong(node.line, f"seed is {node.kind}; expected a whole number.")
        return 0
    return node.value


def _missing(node: _Node | None, reading: _Reading) -> Missing:
    if node is None:
        return "error"
    if node.value not in ("error", "copy", "drop"):
        reading.wrong(node.line, f"missing is {node.kind}; expected error, copy or drop.")
        return "error"
    chosen: Missing = node.value
    return chosen


def _parameters(node: _Node | None, where: str, method: Method | None, reading: _Reading) -> dict[str, Value]:
    if node is None or node.value is None:
        return {}
    if not isinstance(node.value, dict):
        reading.wrong(node.line, f"{where} has {node.kind} as its parameters; expected a mapping of option names to values.")
        return {}
    if method is None:
        return {}
    found: dict[str, Value] = {}
    keys: dict[str, str] = {}
    for key, value in node.value.items():
        if key in dialect.WITHOUT_EFFECT:
            reading.notes.append(f"{reading.name}:{value.line}: {key} has no effect: it {dialect.WITHOUT_EFFECT[key]}.")
            continue
        name = dialect.own_name(method, key)
        if name is None and key in dialect.WITHOUT_EFFECT_FOR.get(method.name, ()):
            reading.notes.append(f"{reading.name}:{value.line}: {key} has no effect on {method.name}, here as in mergekit.")
            continue
        if name is None:
            reading.wrong(value.line, f"{method.name} has no parameter {key!r}. {_nearest(key, dialect.known_names(method))}")
            continue
        read = _value(value, f"{where}.{key}", method, key, reading)
        if read is None:
            continue
        if name in found and found[name] != read:
            reading.wrong(value.line, f"{where}: {keys[name]} and {key} say different things ({found[name]} and {read}). Remove one.")
        found[name], keys[name] = read, key
    return found


def _value(node: _Node, where: str, method: Method, key: str, reading: _Reading) -> Value | None:
    later = _later(node)
    if later is not None:
        reading.wrong(node.line, f"{where} is {later}; this version takes one value for all tensors.")
        return None
    name = dialect.own_name(method, key)
    option = method.options[name or key]
    value = dialect.own_value(method, key, _number(node.value, option))
    problem = option.problem(value)
    if problem is not None:
        reading.wrong(node.line, f"{where} {problem}.{_slipped_point(value, option)}")
        return None
    result: Value = value
    return result


def _later(node: _Node) -> str | None:
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


def _number(value: Any, option: Option) -> Any:
    """YAML 1.1 reads 1e-5 as text; where a number is expected it is one."""
    if option.kind == "number" and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _slipped_point(value: Any, option: Option) -> str:
    if option.kind == "number" and isinstance(value, (int, float)) and math.isfinite(value):
        for slipped in (value / 10, value / 100):
            if slipped in option.range:
                return f" Did you mean {slipped:g}?"
    return ""


def _check(recipe: Recipe, method: Method, keys: dict[str, _Node], reading: _Reading) -> None:
    """What only the whole recipe can show: the base, shared options under models, the number of models."""
    line = keys["models"].line
    if method.base in ("required", "first") and recipe.base_model is None:
        reading.wrong(keys["merge_method"].line, f"{method.name} needs base_model, the model the others were tuned from.")
        return
    for name, option in method.options.items():
        if option.per_model:
            continue
        given = {i: m.parameters[name] for i, m in enumerate(recipe.models) if name in m.parameters}
        values = set(given.values()) | ({recipe.parameters[name]} if name in recipe.parameters else set())
        if given and len(values) > 1:
            places = ", ".join(f"models[{i}]: {v}" for i, v in given.items())
            reading.wrong(line, f"{name} is one value for the whole merge, and differs ({places}). Give it once, under parameters.")
    base = [m for m in recipe.models if m.reference == recipe.base_model]
    if method.space == "delta" and any(m.parameters for m in base):
        reading.notes.append(f"{reading.name}: the parameters of {recipe.base_model} have no effect: it is the base.")
    if reading.mistakes:
        return
    entries = values_of(recipe, method)
    try:
        method.check_models(len(entries))
        method.bind(option_values(recipe, method, entries), len(entries))
    except AlnicoError as error:
        reading.wrong(line, str(error))


def values_of(recipe: Recipe, method: Method) -> tuple[ModelEntry, ...]:
    """Return the models whose values the method gets, in order: without the base in delta space, base first for "first"."""
    if method.space == "delta":
        return recipe.merged
    if method.base == "first" and recipe.base_model is not None:
        listed = [m for m in recipe.models if m.reference == recipe.base_model]
        return (*(listed[:1] or (ModelEntry(recipe.base_model),)), *recipe.merged)
    return recipe.models


def _nearest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), 1)
    return f"Did you mean {near[0]}?" if near else f"Known are {', '.join(known)}." if known else "There are none."
