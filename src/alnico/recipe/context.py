"""Holds the state of a document while it is read: its methods and the parts read so far."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from alnico.errors import near_name
from alnico.methods.base import Method
from alnico.recipe import dialect, scalars
from alnico.recipe.keys import MAY_BE_EMPTY, MIXTURE, TOKENIZER, TOP
from alnico.recipe.schema import DROP, ModelEntry, Parameters, Rule
from alnico.recipe.yaml_nodes import Node, ParseContext, holds_anchors, shorten


@dataclass(frozen=True)
class RecipePart:
    """Models merged by one method, with their lines: all models, or the sources of one slice."""

    place: str
    """Its name in messages: ``models``, ``slices[2].sources``, ``modules.text_decoder.models``."""
    line: int
    method_line: int
    """The line that names the method."""
    method: Method
    entries: tuple[ModelEntry, ...]
    entry_lines: tuple[int, ...]
    base_model: str | None
    shared: tuple[tuple[str, Parameters], ...]
    """The parameters of its slice and module, each with its place. The recipe's parameters come after
    them."""
    rule: Rule | None = None
    """The rule that lists these models itself."""


@dataclass
class Context:
    """The document that is being read."""

    reading: ParseContext
    used: Mapping[str, Method]
    """The methods it names, top level first."""
    rules: tuple[Method, ...]
    """The methods under ``methods``."""
    is_complete: bool
    """Are all its methods known? If not, an unknown option may belong to an unknown method."""
    base_model: str | None = None
    failed: set[str] = field(default_factory=set)
    """Option keys with an invalid value somewhere."""
    parts: list[RecipePart] = field(default_factory=list)

    @property
    def listed(self) -> tuple[RecipePart, ...]:
        """The parts that rules apply to: all except those of rules with their own models."""
        return tuple(part for part in self.parts if part.rule is None)

    @property
    def methods(self) -> tuple[Method, ...]:
        return tuple(self.used.values())

    def methods_of_level(self, *methods: Method | None) -> tuple[Method, ...]:
        """Return the methods that the options of a level can apply to: ``methods`` and those of the rules."""
        return tuple(dict.fromkeys(m for m in (*methods, *self.rules) if m is not None))

    def misplaced_option_hint(self, key: str, place: str, keys: Iterable[str]) -> str:
        """Return a hint if ``key`` is (or resembles) an option of the level below; "" otherwise."""
        for method in self.methods:
            if dialect.meant_option(method, key):
                return f"It is an option of {method.name}: write it under {place}."
        options = [name for method in self.methods for name in dialect.option_names(method)]
        near = None if near_name(key, keys) else near_name(key, options, scalars.MISSPELT)
        return f"Did you mean {near}, under {place}?" if near else ""

    def check_keys(self, node: Node, where: str, keys: Iterable[str], options_under: str = "") -> None:
        """Report the unknown keys of a mapping."""
        for key, value in node.value.items():
            if key in keys or self._note_no_effect(key, value, where, keys):
                continue
            hint = _misplaced_key_hint(key, node, where, keys)
            hint = (
                hint
                or (options_under and self.misplaced_option_hint(key, options_under, keys))
                or scalars.nearest(key, list(keys))
            )
            start = f"{where} has the unknown key" if where else "unknown key"
            self.reading.wrong(value.line, f"{start} {shorten(key)!r}. {hint}")

    def without_empty(self, keys: dict[str, Node], where: str = "") -> dict[str, Node]:
        """Return the keys without those that mergekit ignores when they are empty."""
        empty = [key for key in MAY_BE_EMPTY if key in keys and keys[key].value is None]
        for key in empty:
            self.reading.note(keys[key].line, f"{where}.{key} is empty and is ignored.".removeprefix("."))
        return {key: node for key, node in keys.items() if key not in empty}

    def _note_no_effect(self, key: str, value: Node, where: str, keys: Iterable[str]) -> bool:
        """Note a key without effect (of mergekit, or only for YAML anchors); return whether it is one."""
        idle = dialect.WITHOUT_EFFECT if where else dialect.WITHOUT_EFFECT_AT_THE_TOP
        if key in idle and "parameters" in keys:
            self.reading.note(value.line, f"{where}.{key} has no effect: it {idle[key]}.".removeprefix("."))
            return True
        if where or not holds_anchors(key, value, keys):
            return False
        self.reading.note(
            value.line, f"{shorten(key)} is not a key of a recipe; only its YAML anchors are used."
        )
        return True


COMMAND_LINE = {
    **dict.fromkeys(("output", "output_dir", "out_dir", "output_folder", "save_path", "out"), "OUT"),
    **dict.fromkeys(("max_shard_size", "out_shard_size", "shard_size"), "OUT --max-shard-size 5GB"),
    **dict.fromkeys(("memory", "max_memory"), "OUT --memory 8GiB"),
    **dict.fromkeys(("threads", "num_threads", "workers", "num_workers"), "OUT --threads 8"),
}
"""Keys that people write into a recipe, and what the command line has for them."""


def _misplaced_key_hint(key: str, node: Node, where: str, keys: Iterable[str]) -> str:
    """Return a hint for a key that goes elsewhere: in a model's reference, under tokenizer, at the top."""
    if not where:
        if key in MIXTURE and key not in keys:
            return "It is a key of a mixture of experts, which has `experts`, and no merge_method."
        if key in TOKENIZER:
            return "Write it under tokenizer."
        option = COMMAND_LINE.get(key.casefold().replace("-", "_"))
        return f"It belongs to the command line: alnico merge RECIPE {option}." if option else ""
    if key in TOP:
        return "Write it at the top of the recipe."
    if "model" not in keys:
        return ""
    named = {k: v.value for k, v in node.value.items() if isinstance(v.value, str)}
    model = named.get("model", "NAME")
    if key == "revision":
        return (
            f"Write it after the model's name: model: {shorten(model)}@{shorten(named.get(key, 'REVISION'))}"
        )
    if key in ("lora", "adapter"):
        return (
            f"Write it after the model's name: model: {shorten(model)}+{shorten(named.get(key, 'ADAPTER'))}"
        )
    return ""


def read_context(keys: Mapping[str, Node], reading: ParseContext) -> Context:
    """Collect the methods that a document names."""
    rules = [n for n in _items(keys.get("methods")) if isinstance(n.value, dict)]
    of_rules = [r.value["merge_method"] for r in rules if "merge_method" in r.value]
    nodes = [*_methods_named(keys), *(node for node in of_rules if node.value != DROP)]
    methods = [(node, scalars.named_method(node)) for node in nodes]
    used = {m.name: m for _, m in methods if m is not None}
    chosen = map(scalars.named_method, of_rules)
    return Context(
        reading,
        used,
        tuple(dict.fromkeys(m for m in chosen if m is not None)),
        bool(methods) and all(m is not None for _, m in methods),
    )


def nested_methods(keys: Mapping[str, Node]) -> list[Node | None]:
    """Return the ``merge_method`` of each slice or module of a document, None where it has none."""
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
