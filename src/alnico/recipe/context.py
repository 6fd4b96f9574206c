"""What is known of a whole document while its parts are read: the methods it names, and the parts found so far."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from alnico.methods.base import Method
from alnico.recipe import dialect, scalars
from alnico.recipe.keys import MAY_BE_EMPTY, TOKENIZER, TOP
from alnico.recipe.schema import ModelEntry, Parameters
from alnico.recipe.yaml_nodes import Node, ParseContext, shorten


@dataclass(frozen=True)
class RecipePart:
    """What is merged by one method: all models, or the sources of one slice; with its lines."""

    place: str
    """As messages name it: ``models``, ``slices[2].sources``, ``modules.text_decoder.models``."""
    line: int
    asked: int
    """The line that names the method."""
    method: Method
    entries: tuple[ModelEntry, ...]
    entry_lines: tuple[int, ...]
    base_model: str | None
    shared: tuple[tuple[str, Parameters], ...]
    """The parameters of its slice and module, with their places; the recipe's come after them."""


@dataclass
class Context:
    """A document being read."""

    reading: ParseContext
    used: Mapping[str, Method]
    """The methods it names, those at the top first."""
    rules: tuple[Method, ...]
    """The methods under ``methods``."""
    is_complete: bool
    """Are all methods that it names known? If not, options of the unknown ones cannot be told from mistakes."""
    base_model: str | None = None
    failed: set[str] = field(default_factory=set)
    """Keys of options that are given wrongly somewhere."""
    parts: list[RecipePart] = field(default_factory=list)

    @property
    def methods(self) -> tuple[Method, ...]:
        return tuple(self.used.values())

    def level(self, *methods: Method | None) -> tuple[Method, ...]:
        """The methods that can meet the options of a level: its own, if known, and those of the rules."""
        return tuple(dict.fromkeys(m for m in (*methods, *self.rules) if m is not None))

    def belongs(self, key: str, place: str, known: Iterable[str]) -> str:
        """A hint for an option that stands one level too high, also for one that is misspelt and no misspelt key of this level."""
        for method in self.methods:
            if dialect.option_name(method, key):
                return f"It is an option of {method.name}: write it under {place}."
        options = [name for method in self.methods for name in dialect.option_names(method)]
        near = (
            []
            if difflib.get_close_matches(key, list(known), 1)
            else difflib.get_close_matches(key, options, 1, 0.7)
        )
        return f"Did you mean {near[0]}, under {place}?" if near else ""

    def check_keys(self, node: Node, where: str, known: Iterable[str], options_under: str = "") -> None:
        """Tell the keys of a mapping that are unknown."""
        for key, value in node.value.items():
            if key in known or self._means_nothing(key, value, where, known):
                continue
            hint = _place_of(key, node, where, known)
            hint = (
                hint
                or (options_under and self.belongs(key, options_under, known))
                or scalars.nearest(key, list(known))
            )
            start = f"{where} has the unknown key" if where else "unknown key"
            self.reading.wrong(value.line, f"{start} {shorten(key)!r}. {hint}")

    def given(self, keys: dict[str, Node], where: str = "") -> dict[str, Node]:
        """The keys that have a value, or must have one: mergekit takes the others as not given where they are empty."""
        empty = [key for key in MAY_BE_EMPTY if key in keys and keys[key].value is None]
        for key in empty:
            self.reading.note(
                keys[key].line, f"{where}.{key} is empty, and counts as not given.".removeprefix(".")
            )
        return {key: node for key, node in keys.items() if key not in empty}

    def _means_nothing(self, key: str, value: Node, where: str, known: Iterable[str]) -> bool:
        """Note a key that has no effect: one that mergekit's users write, or a place for YAML anchors at the top."""
        idle = dialect.WITHOUT_EFFECT if where else dialect.WITHOUT_EFFECT_AT_THE_TOP
        if key in idle and "parameters" in known:
            self.reading.note(value.line, f"{where}.{key} has no effect: it {idle[key]}.".removeprefix("."))
            return True
        if where or not holds_anchors(key, value, known):
            return False
        self.reading.note(
            value.line, f"{shorten(key)} is no key of a recipe, and is left out but for its YAML anchors."
        )
        return True


def _place_of(key: str, node: Node, where: str, known: Iterable[str]) -> str:
    """A hint for a key that belongs elsewhere: into the reference of a model, under tokenizer, at the top."""
    if not where:
        return "Write it under tokenizer." if key in TOKENIZER else ""
    if key in TOP:
        return "Write it at the top of the recipe."
    if "model" not in known:
        return ""
    named = {k: v.value for k, v in node.value.items() if isinstance(v.value, str)}
    model = named.get("model", "NAME")
    if key == "revision":
        return (
            f"Write it behind the model's name: model: {shorten(model)}@{shorten(named.get(key, 'REVISION'))}"
        )
    if key in ("lora", "adapter"):
        return (
            f"Write it behind the model's name: model: {shorten(model)}+{shorten(named.get(key, 'ADAPTER'))}"
        )
    return ""


def holds_anchors(key: str, value: Node, known: Iterable[str]) -> bool:
    """Is an unknown key at the top a place for YAML anchors, and no misspelt word?"""
    return value.has_anchor and key not in known and not _is_misspelt(key, value, known)


def _is_misspelt(key: str, value: Node, known: Iterable[str]) -> bool:
    """Is a key at the top a misspelt one that could have this value, rather than a name of the author's own?"""
    near = difflib.get_close_matches(key, list(known), 1, 0.9)
    if near and re.match(rf"{near[0]}[-_.\d]", key):  # parameters_2 is no slip
        return False
    kind = {
        "models": list,
        "slices": list,
        "methods": list,
        "modules": dict,
        "parameters": dict,
        "lines": dict,
    }
    return bool(near) and isinstance(value.value, kind.get(near[0], (dict, str, int, float)))


def read_context(keys: Mapping[str, Node], reading: ParseContext) -> Context:
    """Look through a document for the methods it names."""
    rules = [n for n in _items(keys.get("methods")) if isinstance(n.value, dict)]
    named = [*_methods_named(keys), *(r.value["merge_method"] for r in rules if "merge_method" in r.value)]
    found = [(node, scalars.named_method(node)) for node in named]
    used = {m.name: m for _, m in found if m is not None}
    of_rules = [scalars.named_method(r.value.get("merge_method")) for r in rules]
    return Context(
        reading,
        used,
        tuple(dict.fromkeys(m for m in of_rules if m is not None)),
        all(m is not None for _, m in found),
    )


def nested_methods(keys: Mapping[str, Node]) -> list[Node | None]:
    """The ``merge_method`` of each slice or module of a document; None for one without."""
    modules = keys.get("modules")
    holders = list(modules.value.values()) if modules is not None and isinstance(modules.value, dict) else []
    holders += _items(keys.get("slices"))
    return [next(_methods_named(h.value), None) for h in holders if isinstance(h.value, dict)]


def _methods_named(holder: Mapping[str, Node]) -> Iterator[Node]:
    if "merge_method" in holder:
        yield holder["merge_method"]
    modules = holder.get("modules")
    if modules is not None and isinstance(modules.value, dict):
        for module in modules.value.values():
            if isinstance(module.value, dict):
                yield from _methods_named(module.value)
    for inner in (*_items(holder.get("slices")), *_items(holder.get("sources"))):
        if isinstance(inner.value, dict):
            yield from _methods_named(inner.value)


def _items(node: Node | None) -> list[Node]:
    return node.value if node is not None and isinstance(node.value, list) else []
