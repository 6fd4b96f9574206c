"""Loads recipes from YAML or a mapping; reports all mistakes at once, each with its line."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from alnico.checkpoint.file_kinds import SNIFFED_BYTES, TASKS, UTF16, not_yaml
from alnico.checkpoint.files import open_named
from alnico.checkpoint.near_paths import MAX_ENTRIES, suggestion
from alnico.checkpoint.remote.open_folder import is_url
from alnico.checkpoint.sidecars import RECIPE_FILE
from alnico.checkpoint.weight_files import gguf_files, holds_weights
from alnico.errors import RecipeError
from alnico.methods.base import Method
from alnico.numerics.arithmetic import ieee_arithmetic
from alnico.recipe import scalars
from alnico.recipe.context import Context, nested_methods, read_context
from alnico.recipe.keys import ROUTERS, TOP
from alnico.recipe.misspelt_keys import correct_keys
from alnico.recipe.models import check_one_of, read_listed, read_modules, read_reference
from alnico.recipe.parameters import read_parameters
from alnico.recipe.rules import read_lines, read_preset, read_protect, read_rules
from alnico.recipe.schema import Recipe
from alnico.recipe.stages import check_stages
from alnico.recipe.tokenizer import read_tokenizer
from alnico.recipe.validate import check
from alnico.recipe.yaml_nodes import Document, Node, ParseContext, compose, quote, to_plain_data

MAX_BYTES = 1_000_000

SEARCH_KEYS = ("search", "stack")
"""Keys that only `alnico search` understands."""

RecipeLike = str | os.PathLike[str] | Mapping[str, Any] | Recipe
Recipes = RecipeLike | tuple[Recipe, ...]


@ieee_arithmetic()
def load_recipe(source: RecipeLike, *, seed: int | None = None) -> Recipe:
    """Load a recipe from a YAML file, from YAML text with a line break, or from a mapping.

    ``seed`` replaces the recipe's seed. A file of several documents is an error; use
    :func:`alnico.merge_documents` for it.

    Errors: RecipeError with one line per mistake, each with its line in the file.

    >>> load_recipe({"merge_method": "linear", "models": ["a", "b"]}).merge_method
    'linear'
    """
    recipe = source if isinstance(source, Recipe) else parse_recipe(*read_source(source))
    return _seeded((recipe,), seed)[0]


def load_recipes(source: Recipes, seed: int | None = None) -> tuple[Recipe, ...]:
    """Load all documents of a file, or of any source that :func:`load_recipe` takes."""
    if isinstance(source, Recipe):
        source = (source,)
    recipes = source if isinstance(source, tuple) else parse_recipes(*read_source(source))
    return _seeded(recipes, seed)


def _seeded(recipes: tuple[Recipe, ...], seed: int | None) -> tuple[Recipe, ...]:
    if seed is None:
        return recipes
    if isinstance(seed, bool) or not isinstance(seed, int) or seed not in scalars.SEEDS:
        raise RecipeError(f"seed is {quote(seed)}; expected a whole number of at most 64 bits.")
    return tuple(dataclasses.replace(r, seed=seed) for r in recipes)


def read_source(
    source: str | os.PathLike[str] | Mapping[str, Any], of_what: str = "merge"
) -> tuple[str, str, str, bool]:
    """Return a source's text, its name in messages, its folder, and whether messages give lines.

    Errors: RecipeError.
    """
    if isinstance(source, Mapping):
        return yaml.safe_dump(to_plain_data(source, "the mapping", 0), sort_keys=False), "recipe", ".", False
    if not isinstance(source, (str, bytes, os.PathLike)):
        listed = source if isinstance(source, (list, tuple)) else [source]
        are_paths = all(isinstance(model, (str, os.PathLike)) for model in listed)
        raise RecipeError(
            f"recipe is of type {type(source).__name__}; expected a path, a mapping or a Recipe. "
            + (
                "alnico.make_recipe(models, method) makes one of models."
                if are_paths
                else "alnico.make_recipe(models, method) makes one of paths, and alnico.merge_models(models, "
                "method) merges models in memory."
            )
        )
    path = os.fsdecode(source)
    if "\n" in path:
        return path, "recipe", ".", True
    try:
        with open_named(path) as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        if os.path.isdir(path):
            raise RecipeError(
                f"{path}: is a folder; expected a recipe, which is a YAML file. {_recipe_in(Path(path))}"
            ) from None
        if is_url(path):
            raise RecipeError(
                f"{path}: is a URL; expected a recipe on this machine. Download it, and give its path."
            ) from None
        hint = suggestion(path, "Check the path of the recipe.", accepts=_may_be_recipe)
        raise RecipeError(f"{path}: cannot be read ({error.strerror}). {hint}") from None
    except ValueError:
        raise RecipeError(f"{path!r}: is not a path. Check the path of the recipe.") from None
    return _decoded(data, path, of_what), path, str(Path(path).parent), True


def _may_be_recipe(path: Path) -> bool:
    return path.suffix in (".yml", ".yaml", ".json", "") and path.is_file()


def _recipe_in(folder: Path) -> str:
    """Say which recipe a folder holds, or what to do with the model in it."""
    with suppress(OSError):
        if (folder / RECIPE_FILE).is_file():
            return f"It holds the recipe that it was merged by: give {folder / RECIPE_FILE}."
        names = sorted(path.name for path in itertools.islice(folder.iterdir(), MAX_ENTRIES))
        recipes = [name for name in names if name.endswith((".yml", ".yaml"))]
        if recipes:
            return f"It holds {' and '.join(recipes[:2])}: give one file."
        if holds_weights(names) or gguf_files(names):
            return (
                "It is a model. Merge models without a recipe by `alnico merge A B OUT`, or look at this one "
                "with `alnico inspect`."
            )
    return "Give the path of the file."


def _decoded(data: bytes, name: str, of_what: str = "merge") -> str:
    if len(data) > MAX_BYTES:
        raise RecipeError(
            f"{name}: is larger than {MAX_BYTES} bytes; expected a recipe. Give the YAML file of the "
            f"{of_what}."
        )
    if (kind := not_yaml(data[:SNIFFED_BYTES], name, TASKS)) is not None:
        advice = kind.advice if kind.is_stand_in or kind is UTF16 else f"Give the YAML file of the {of_what}."
        raise RecipeError(f"{name}: is {kind.name}; expected a recipe. {advice}")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise RecipeError(
            f"{name}: is not UTF-8 text; expected YAML. Give the YAML file of the {of_what}."
        ) from None


def decode_recipes(data: bytes, name: str, folder: str = ".") -> tuple[Recipe, ...]:
    """Parse all documents in the bytes of a YAML file. Errors: RecipeError."""
    return parse_recipes(_decoded(data, name), name, folder)


def parse_recipe(text: str, name: str, folder: str = ".", has_lines: bool = True) -> Recipe:
    """Parse one recipe from YAML text. ``name`` precedes the line number in messages."""
    return _parse(text, name, folder, has_lines, is_one=True)[0]


def parse_recipes(text: str, name: str, folder: str = ".", has_lines: bool = True) -> tuple[Recipe, ...]:
    """Parse all documents of YAML text, in order."""
    return _parse(text, name, folder, has_lines, is_one=False)


def _parse(text: str, name: str, folder: str, has_lines: bool, *, is_one: bool) -> tuple[Recipe, ...]:
    reading = ParseContext(name, has_lines)
    documents = compose(text, reading)
    if is_one and len(documents) > 1:
        reading.broken(
            documents[1].root.line,
            "a second document begins; expected one recipe. Pass the file to `alnico merge` or "
            "alnico.merge_documents.",
        )
    if reading.is_broken:
        raise reading.error()
    results = [_recipe(document, reading, folder) for document in documents]
    recipes = [r for r in results if r is not None]
    if len(recipes) == len(documents) > 1:
        recipes = check_stages(recipes, [d.root for d in documents], reading)
    if reading.mistakes or not recipes:
        raise reading.error()
    return tuple(recipes)


def read_document(root: Node, name: str, folder: str) -> list[tuple[int, str]]:
    """Check one composed document; return its mistakes, each with its line."""
    reading = ParseContext(name)
    _recipe(Document(root, ""), reading, folder)
    return reading.mistakes


def _recipe(document: Document, reading: ParseContext, folder: str) -> Recipe | None:
    before = len(reading.mistakes)
    if isinstance(document.root.value, dict) and _is_mixture(document.root.value):
        from alnico.recipe.mixture import read_mixture  # few recipes are of mixtures

        return read_mixture(document, reading, folder)
    root = correct_keys(document.root, reading, SEARCH_KEYS)
    if not isinstance(root.value, dict):
        hint = ""
        if isinstance(root.value, str):
            hint = " Write a colon and a space after each key, as in merge_method: linear."
        elif isinstance(root.value, list) and any(isinstance(item.value, dict) for item in root.value):
            hint = " Remove the dashes before its keys."
        reading.wrong(
            root.line, f"is {root.kind}; expected a mapping with at least merge_method and models.{hint}"
        )
        return None
    keys: dict[str, Node] = root.value
    for key in SEARCH_KEYS:
        if key in keys:
            reading.wrong(
                keys[key].line,
                f"{key} belongs to a search; expected a recipe without it. Run `alnico search` and merge the "
                "recipe it writes.",
            )
            return None
    reading.notes = list(document.notes)
    context = read_context(keys, reading)
    method, method_line = _method(keys, root, context)
    context.check_keys(root, "", TOP, "parameters")
    keys = context.without_empty(keys)
    base = read_reference(keys["base_model"], "base_model", 0, reading) if "base_model" in keys else None
    context.base_model = base
    if base is None and "base_model" in keys:
        context.failed.add("base_model")
    check_one_of(keys, ("models", "checkpoints", "slices", "modules"), root.line, "", reading)
    is_run = "checkpoints" in keys
    if is_run:
        from alnico.recipe.checkpoints import with_models  # with all that opens a checkpoint

        keys = with_models(keys, folder, reading)
    models, slices = read_listed(keys, "", method, method_line, (), context)
    modules = read_modules(keys["modules"], method, method_line, context) if "modules" in keys else ()
    rules = read_rules(keys.get("methods"), context)
    parameters = read_parameters(keys.get("parameters"), "parameters", context.methods, context)
    preset = read_preset(keys.get("preset"), "preset", context.methods, context)
    dtype, out_dtype = (scalars.dtype(keys.get(name), name, reading) for name in ("dtype", "out_dtype"))
    if dtype and out_dtype and dtype != out_dtype:
        reading.note(
            keys["dtype"].line,
            "dtype has no effect: the output has out_dtype, and inputs are not rounded first.",
        )
    routers, calibrated = _routers(keys, base, reading)
    recipe = Recipe(
        merge_method=method.name if method is not None else "",
        models=models,
        base_model=base,
        parameters=parameters,
        dtype=out_dtype or dtype,
        seed=scalars.seed(keys.get("seed"), reading),
        missing=scalars.missing(keys.get("missing"), reading),
        unrelated=scalars.unrelated(keys.get("unrelated"), reading),
        base_mismatch=scalars.base_mismatch(keys.get("base_mismatch"), reading),
        complete_from=_completing(keys, reading),
        routers=routers,
        calibrate_routers=calibrated,
        requantise=scalars.requantise(keys.get("requantise"), out_dtype or dtype, reading),
        slices=slices,
        modules=modules,
        methods=tuple(rule for rule, _, _ in rules),
        preset=preset,
        lines=read_lines(keys.get("lines"), context),
        protect=read_protect(keys, context),
        tokenizer=read_tokenizer(keys, reading),
        chat_template=scalars.multiline_text(keys.get("chat_template"), "chat_template", reading),
        stage=scalars.text(keys.get("name"), "name", reading) or "",
        name=reading.name,
        folder=folder,
        text=document.text,
    )
    check(recipe, rules, context)
    if len(reading.mistakes) > before:
        return None
    if is_run:  # the text would name other models once the run goes on
        recipe = dataclasses.replace(recipe, text=yaml.safe_dump(recipe.canonical(), sort_keys=False))
    return dataclasses.replace(recipe, notes=tuple(reading.notes), written_seed=recipe.seed)


def _is_mixture(keys: dict[str, Node]) -> bool:
    """Does a document build a mixture of experts? The key may be misspelt, if no other says what the document is."""
    if "experts" in keys or keys.keys() & {"merge_method", "models", "checkpoints", "slices", "modules"}:
        return "experts" in keys
    return any(scalars.misspelt_key(key, ["experts"]) for key in keys)


def _completing(keys: dict[str, Node], reading: ParseContext) -> str | None:
    """Read the model that completes the output of models that are merged whole."""
    node = keys.get("complete_from")
    if node is None:
        return None
    parts = next((key for key in ("slices", "modules") if key in keys), None)
    if parts is not None:
        reading.wrong(
            node.line,
            f"complete_from completes models that are merged whole; found {parts}. Merge these first, and complete the "
            "output: alnico complete OUT --from MODEL COMPLETED.",
        )
    return read_reference(node, "complete_from", 0, reading)


def _routers(keys: dict[str, Node], base: str | None, reading: ParseContext) -> tuple[str | None, str | None]:
    """Read what the routers become: a word or a reference, and the directory that they are fitted to."""
    node = keys.get("routers")
    if node is None:
        return None, None
    parts = next((key for key in ("slices", "modules") if key in keys), None)
    if parts is not None:
        reading.wrong(
            node.line,
            f"routers is for models that are merged whole; found {parts}. Write a rule under methods for them, with their filter.",
        )
    if isinstance(node.value, dict) and not {"model", "path"} & node.value.keys():
        held = scalars.mapping(node, "routers", ROUTERS, "a mapping with calibrate", reading)
        if "calibrate" not in held:
            reading.wrong(node.line, "routers.calibrate is missing; expected a directory of statistics.")
        return None, scalars.text(held.get("calibrate"), "routers.calibrate", reading)
    setting = read_reference(node, "routers", 0, reading)
    if setting == "base" and base is None:
        reading.wrong(
            node.line,
            "routers is base, and the recipe has no base_model; expected one. Add base_model: PATH, or name a model.",
        )
    return setting, None


def _method(keys: dict[str, Node], root: Node, context: Context) -> tuple[Method | None, int]:
    """Return the document's method and the line that names it.

    Without a top-level method, the slices' common one.
    """
    node = keys.get("merge_method")
    if node is not None:
        return scalars.method(node, "merge_method", context.reading), node.line
    nested = nested_methods(keys)
    methods = {m.name: m for n in nested if (m := scalars.named_method(n)) is not None}
    if nested and nested[0] is not None and None not in nested and len(methods) == 1:
        return next(iter(methods.values())), nested[0].line
    context.reading.wrong(root.line, "merge_method is missing. `alnico methods` lists all methods.")
    return None, 0
