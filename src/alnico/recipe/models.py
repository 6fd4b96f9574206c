"""Reads the models, slices and modules of a recipe, and the references in them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from alnico.checkpoint.reference import check_urls
from alnico.errors import ModelError
from alnico.methods.base import Method
from alnico.recipe import scalars
from alnico.recipe.context import Context, RecipePart
from alnico.recipe.keys import ENTRY, MODULE, PATH, REFERENCE, SLICE, SOURCE, Keys
from alnico.recipe.parameters import read_parameters
from alnico.recipe.schema import ModelEntry, Module, Parameters, Slice
from alnico.recipe.yaml_nodes import Node, ParseContext, one_line, quote, shorten

MAX_MODELS = 1_000
MAX_DIGITS = 10
"""The most digits of a layer number that is written as text."""

Shared = tuple[tuple[str, Parameters], ...]


def read_listed(
    keys: Mapping[str, Node],
    prefix: str,
    method: Method | None,
    method_line: int,
    shared: Shared,
    context: Context,
) -> tuple[tuple[ModelEntry, ...], tuple[Slice, ...]]:
    """Read ``models`` or ``slices`` of a document or module.

    ``method_line`` is the line that names the method.
    """
    models: tuple[ModelEntry, ...] = ()
    slices: tuple[Slice, ...] = ()
    if "models" in keys:
        node = keys["models"]
        entries, lines = read_entries(
            node, f"{prefix}models", context.methods_of_level(method), context, ENTRY
        )
        models = entries
        if method is not None:
            place = f"{prefix}models"
            context.parts.append(
                RecipePart(place, node.line, method_line, method, entries, lines, context.base_model, shared)
            )
    if "slices" in keys:
        slices = _slices(keys["slices"], f"{prefix}slices", method, method_line, shared, context)
    return models, slices


def read_entries(
    node: Node, where: str, level: tuple[Method, ...], context: Context, keys: Keys
) -> tuple[tuple[ModelEntry, ...], tuple[int, ...]]:
    """Read a list of models or sources, each with some of ``keys``; return its entries and their lines."""
    reading = context.reading
    has_layers = keys is SOURCE
    if not isinstance(node.value, list) or not 0 < len(node.value) <= MAX_MODELS:
        actual = f"a list of {len(node.value)}" if isinstance(node.value, list) else node.kind
        hint = _as_list(node, has_layers=has_layers)
        reading.wrong(node.line, f"{where} is {actual}; expected a list of 1 to {MAX_MODELS} models.{hint}")
        return (), ()
    entries, lines = [], []
    for i, item in enumerate(node.value):
        place = f"{where}[{i}]"
        if isinstance(item.value, str) and (match := NO_SPACE.match(item.value)):
            reading.wrong(
                item.line,
                f"{place} is {item.kind}; expected a mapping. Write a space after the colon: "
                f"{match[1]}: {'URL' if '://' in item.value else shorten(item.value[match.end() :])}.",
            )
            continue
        if isinstance(item.value, str) and not has_layers:
            item = Node({"model": item}, item.line)
        if not isinstance(item.value, dict):
            needed = "`model`, `layer_range`" if has_layers else "`model`"
            reading.wrong(
                item.line,
                f"{place} is {item.kind}; expected a mapping with {needed} and optionally `parameters`."
                f"{' Remove one pair of brackets.' if isinstance(item.value, list) else ''}",
            )
            continue
        context.check_keys(item, place, keys, f"{place}.parameters")
        if i and item.value.keys() == {"parameters"}:
            reading.wrong(
                item.line,
                f"{place} has parameters and no model; expected both. If they belong to {where}[{i - 1}], "
                "remove the dash before them.",
            )
            continue
        reference = read_reference(item.value.get("model"), f"{place}.model", item.line, reading)
        parameters = read_parameters(item.value.get("parameters"), f"{place}.parameters", level, context)
        may_have_layers = "layer_range" in keys and "layer_range" in item.value
        layers = _layers(item, place, reading) if has_layers or may_have_layers else None
        if reference is None or (layers is None and has_layers):
            continue
        if layers is not None and not has_layers:
            reading.note(
                item.value["layer_range"].line,
                f"{place}.layer_range has no effect, as in mergekit: models are merged with all their "
                "layers.",
            )
        entries.append(
            ModelEntry(reference, parameters, layers)
            if has_layers
            else ModelEntry(reference, parameters, None, layers)
        )
        lines.append(item.line)
    return tuple(entries), tuple(lines)


def _layers(source: Node, where: str, reading: ParseContext) -> tuple[int, int] | None:
    node = source.value.get("layer_range")
    expected = "expected [first, end), whole numbers with 0 <= first < end"
    if node is None:
        reading.wrong(source.line, f"{where}.layer_range is missing; {expected}.")
        return None
    ends = [_whole(i.value) for i in node.value] if isinstance(node.value, list) else []
    whole = all(isinstance(e, int) and not isinstance(e, bool) for e in ends)
    if len(ends) == 2 and whole and 0 <= ends[0] < ends[1]:
        return ends[0], ends[1]
    actual = shorten(f"[{', '.join(quote(e) for e in ends)}]") if isinstance(node.value, list) else node.kind
    numbers = re.findall(r"\d{1,9}", node.value) if isinstance(node.value, str) else ends if whole else []
    meant = sorted(int(n) for n in numbers if n is not None)
    is_clear = len(meant) == 2 and 0 <= meant[0] < meant[1]
    hint = f" Did you mean [{meant[0]}, {meant[1]}]?" if is_clear else ""
    reading.wrong(node.line, f"{where}.layer_range is {actual}; {expected}.{hint}")
    return None


NO_SPACE = re.compile(r"(model|path):(?=\S)(?!//)")
"""A key without a space after its colon, which YAML reads as text."""


def _as_list(node: Node, *, has_layers: bool) -> str:
    """Say how to write models as a list, for what people write in its place."""
    value = node.value
    if isinstance(value, dict) and value:
        name, held = next(iter(value.items()))
        weight = scalars.number(held.value)
        options = f", parameters: {{weight: {weight:g}}}" if weight is not None else ""
        named = held.value.get("model") if isinstance(held.value, dict) else None
        model = named.value if named is not None and isinstance(named.value, str) else name
        if isinstance(value.get("model"), Node) and isinstance(value["model"].value, str):
            model = value["model"].value
        return f" Begin each model with a dash: - {{model: {shorten(model)}{options}}}."
    if not isinstance(value, str) or has_layers:
        return f" Write [{{model: {shorten(value)}, layer_range: [0, 8]}}]." if isinstance(value, str) else ""
    if value.startswith("-"):
        return " Write a space after each dash."
    names = [part for part in re.split(r"[,\s]+", value) if part]
    return f" Write them in brackets: {shorten('[' + ', '.join(names) + ']')}."


def _whole(value: Any) -> Any:
    """Convert text and floats that mergekit reads as integers; return any other value unchanged."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < MAX_DIGITS:
        return int(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _slices(
    node: Node, where: str, method: Method | None, method_line: int, shared: Shared, context: Context
) -> tuple[Slice, ...]:
    reading = context.reading
    if not isinstance(node.value, list) or not 0 < len(node.value) <= MAX_MODELS:
        actual = f"a list of {len(node.value)}" if isinstance(node.value, list) else node.kind
        reading.wrong(
            node.line,
            f"{where} is {actual}; expected a list of 1 to {MAX_MODELS} slices, each with `sources`.",
        )
        return ()
    slices = [
        _slice(item, f"{where}[{i}]", method, method_line, shared, context)
        for i, item in enumerate(node.value)
    ]
    return tuple(s for s in slices if s is not None)


def _slice(
    node: Node, where: str, outer: Method | None, method_line: int, shared: Shared, context: Context
) -> Slice | None:
    reading = context.reading
    if not isinstance(node.value, dict):
        reading.wrong(node.line, f"{where} is {node.kind}; expected a mapping with `sources`.")
        return None
    keys: dict[str, Node] = node.value
    if "model" in keys and "sources" not in keys:
        reading.wrong(
            keys["model"].line,
            f"{where} has a model; expected `sources`, a list of models, each with its layer_range. Write "
            f"sources: [{{model: {shorten(str(keys['model'].value))}, layer_range: [0, 8]}}].",
        )
        return None
    context.check_keys(node, where, SLICE, f"{where}.parameters")
    if "residual_weight" in keys:
        reading.note(keys["residual_weight"].line, f"{where}.residual_weight has no effect, as in mergekit.")
    own, line = _slice_method(keys, where, context)
    method = own if line else outer
    _note_other_method(own, outer, line, where, reading)
    level = context.methods_of_level(method)
    parameters = read_parameters(keys.get("parameters"), f"{where}.parameters", level, context)
    own_base = keys.get("base_model")
    base = None
    if own_base is not None and own_base.value is None:
        reading.note(own_base.line, f"{where}.base_model is empty and is ignored.")
    elif own_base is not None:
        base = read_reference(own_base, f"{where}.base_model", 0, reading)
    if "sources" not in keys:
        reading.wrong(
            node.line, f"{where}.sources is missing; expected a list of models, each with its layer_range."
        )
        return None
    sources, lines = read_entries(keys["sources"], f"{where}.sources", level, context, SOURCE)
    counts = [end - first for e in sources if e.layers is not None for first, end in [e.layers]]
    for entry, count, entry_line in zip(sources, counts, lines, strict=True):
        if count != counts[0]:
            reading.wrong(
                entry_line,
                f"{where} takes {count} {'layer' if count == 1 else 'layers'} of {shorten(entry.reference)} and {counts[0]} of "
                f"{shorten(sources[0].reference)}; expected the same number from each source. Change a "
                "layer_range.",
            )
    if method is not None:
        below = ((f"{where}.parameters", parameters), *shared)
        place = f"{where}.sources"
        context.parts.append(
            RecipePart(
                place,
                keys["sources"].line,
                line or method_line,
                method,
                sources,
                lines,
                base or context.base_model,
                below,
            )
        )
    return Slice(sources, parameters, base, own.name if own is not None else None)


def _note_other_method(
    own: Method | None, outer: Method | None, line: int, where: str, reading: ParseContext
) -> None:
    if own is not None and outer is not None and own != outer:
        reading.note(
            line,
            f"{where} is merged by {own.name}, its merge_method; mergekit would use {outer.name}.",
        )


def _slice_method(keys: dict[str, Node], where: str, context: Context) -> tuple[Method | None, int]:
    """Return the method that a slice or its sources name, and its line; line 0 if none does."""
    holders = [(where, keys)]
    sources = keys["sources"].value if "sources" in keys else []
    for i, source in enumerate(sources if isinstance(sources, list) else []):
        if isinstance(source.value, dict):
            holders.append((f"{where}.sources[{i}]", source.value))
    chosen: Method | None = None
    line = 0
    for place, holder in holders:
        node = holder.get("merge_method")
        if node is None:
            continue
        method = scalars.method(node, f"{place}.merge_method", context.reading)
        if chosen is not None and method is not None and method != chosen:
            context.reading.wrong(
                node.line,
                f"{place}.merge_method is {method.name}, and the slice's is {chosen.name}; expected one "
                "method. Remove one.",
            )
        chosen = chosen or method
        line = line or node.line
    return chosen, line


def read_modules(node: Node, outer: Method | None, method_line: int, context: Context) -> tuple[Module, ...]:
    reading = context.reading
    if not isinstance(node.value, dict) or not node.value:
        actual = "an empty mapping" if isinstance(node.value, dict) else node.kind
        reading.wrong(
            node.line, f"modules is {actual}; expected a mapping of module names to models or slices."
        )
        return ()
    modules = []
    for name, item in node.value.items():
        where = f"modules.{one_line(name)}"
        if not isinstance(item.value, dict):
            reading.wrong(item.line, f"{where} is {item.kind}; expected a mapping with `models` or `slices`.")
            continue
        keys: dict[str, Node] = item.value
        context.check_keys(item, where, MODULE, f"{where}.parameters")
        keys = context.without_empty(keys, where)
        own = scalars.method(keys.get("merge_method"), f"{where}.merge_method", reading)
        method = own if "merge_method" in keys else outer
        line = keys["merge_method"].line if "merge_method" in keys else method_line
        _note_other_method(own, outer, line, where, reading)
        check_one_of(keys, ("models", "slices"), item.line, where, reading)
        nested = [scalars.named_method(n) for n in _methods_of_slices(keys)]
        parameters = read_parameters(
            keys.get("parameters"), f"{where}.parameters", context.methods_of_level(method, *nested), context
        )
        shared = ((f"{where}.parameters", parameters),)
        models, slices = read_listed(keys, f"{where}.", method, line, shared, context)
        modules.append(Module(name, models, slices, parameters, own.name if own is not None else None))
    return tuple(modules)


def _methods_of_slices(keys: Mapping[str, Node]) -> list[Node]:
    listed = keys["slices"].value if "slices" in keys else []
    holders = [s.value for s in listed if isinstance(s.value, dict)] if isinstance(listed, list) else []
    return [h["merge_method"] for h in holders if "merge_method" in h]


def check_one_of(
    keys: Mapping[str, Node], names: tuple[str, ...], line: int, where: str, reading: ParseContext
) -> None:
    """Report a mistake unless exactly one of ``names`` is present."""
    present = [n for n in names if n in keys]
    start = f"{where}: " if where else ""
    if not present:
        missing = f"{where}.models" if where else "models"
        reading.wrong(line, f"{missing} is missing; expected a list of models.")
    for name in present[1:]:
        reading.wrong(
            keys[name].line,
            f"{start}{present[0]} and {name} are both present; expected one of {', '.join(names[:-1])} and "
            f"{names[-1]}. Remove one.",
        )


def read_reference(node: Node | None, where: str, line: int, reading: ParseContext) -> str | None:
    """Read a reference to a model, text or mergekit's mapping, and return it as text."""
    if node is None:
        reading.wrong(line, f"{where} is missing; expected the path of a model.")
        return None
    if not isinstance(node.value, dict):
        return _text(node, where, reading)
    if "path" in node.value or "revision" in node.value:
        return _path(node, where, reading)
    keys = scalars.mapping(node, where, REFERENCE, "a reference", reading)
    if "override_architecture" in keys:
        reading.note(
            keys["override_architecture"].line,
            f"{where}.override_architecture has no effect: {REFERENCE_NOTE}.",
        )
    if "model" not in keys:
        reading.wrong(
            node.line,
            f"{where} is a mapping without model; expected model, or path, as in {{path: a, revision: b}}.",
        )
        return None
    model = _path(keys["model"], f"{where}.model", reading)
    if "lora" not in keys or keys["lora"].value is None:
        return model
    adapter = _path(keys["lora"], f"{where}.lora", reading)
    if model is None or adapter is None:
        return None
    for part, name in ((model, "model"), (adapter, "lora")):
        if "+" in part:
            reading.wrong(
                keys[name].line,
                f"{where}.{name} is {quote(part)}; expected a path without +. Rename it or create a link.",
            )
            return None
    return f"{model}+{adapter}"


def _text(node: Node, where: str, reading: ParseContext) -> str | None:
    """Read text that may be a URL. One with credentials is refused without being shown."""
    text = scalars.text(node, where, reading)
    if text is not None:
        try:
            check_urls(text)
        except ModelError as error:
            reading.wrong(node.line, f"{where}: {error}")
            return None
    return text


REFERENCE_NOTE = "names and shapes are read from the headers"


def _path(node: Node, where: str, reading: ParseContext) -> str | None:
    """Read a path and an optional revision, written as text or a mapping."""
    if not isinstance(node.value, dict):
        return _text(node, where, reading)
    keys = scalars.mapping(node, where, PATH, "path and revision", reading)
    if "path" not in keys:
        reading.wrong(node.line, f"{where}.path is missing; expected the path of a model.")
        return None
    path = _text(keys["path"], f"{where}.path", reading)
    revision_node = keys.get("revision")
    if revision_node is None or revision_node.value is None:
        return path
    revision = scalars.text(revision_node, f"{where}.revision", reading)
    for part, name in ((path, "path"), (revision, "revision")):
        if part is not None and ("@" in part or "+" in part):
            reading.wrong(
                keys[name].line,
                f"{where}.{name} is {quote(part)}; expected text without @ and +. Rename it or create a "
                "link.",
            )
            return None
    return f"{path}@{revision}" if path is not None and revision is not None else None
