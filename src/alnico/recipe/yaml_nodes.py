"""Parses YAML into nodes with line numbers, within limits of size, depth and time."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.reader import ReaderError

from alnico.checkpoint.file_arguments import label_of_open
from alnico.errors import RecipeError
from alnico.methods import method_name
from alnico.methods.base import Method
from alnico.recipe.keys import MIXTURE, TOP
from alnico.recipe.yaml_hints import yaml_hint

MAX_NODES = 50_000
MAX_DEPTH = 32
MAX_SHOWN = 60
"""The most characters of a value that a message quotes."""


@dataclass
class ParseContext:
    """Collects mistakes and notes while a recipe is read, and limits the number of its nodes."""

    name: str
    has_lines: bool = True
    mistakes: list[tuple[int, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    nodes: int = 0
    is_broken: bool = False
    """Does the YAML hold what no recipe can? Then its content is not read."""
    expected: str = "at least merge_method and models"
    """What the message about an empty file expects."""

    def wrong(self, line: int, message: str) -> None:
        self.mistakes.append((line, message))

    def broken(self, line: int, message: str) -> None:
        self.is_broken = True
        self.wrong(line, message)

    def note(self, line: int, message: str) -> None:
        self.notes.append(self._at(line, message))

    def error(self) -> RecipeError:
        return RecipeError(*(self._at(line, text) for line, text in sorted(self.mistakes)))

    def _at(self, line: int, message: str) -> str:
        return f"{self.name}:{line}: {message}" if line and self.has_lines else f"{self.name}: {message}"


@dataclass(frozen=True)
class Node:
    """A value and its line: a scalar, a list of nodes, or a mapping of names to nodes."""

    value: Any
    line: int
    has_anchor: bool = field(default=False, compare=False)
    """Does it, or something inside it, carry a YAML anchor?"""

    @property
    def kind(self) -> str:
        return quote(self.value)


ANCHORED = "has_anchor"
"""The attribute set on PyYAML's nodes with an anchor."""

DOCUMENT_KEYS = {*TOP, *MIXTURE, "search", "stack", "tasks"}
"""The top-level keys that have a meaning; each may appear only once."""


class _TooLarge(yaml.MarkedYAMLError):
    """YAML too large for a recipe. It is refused while it is parsed, so parsing takes bounded time."""


class _NodeLoader(yaml.SafeLoader):
    """Limits the number of values and their depth while composing; constructs plain scalars only."""

    nodes = 0
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.nodes += 1
        self.depth += 1
        if self.nodes > MAX_NODES or self.depth > MAX_DEPTH + 1:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise _TooLarge(problem=_too_large(), problem_mark=mark)
        event = self.peek_event()  # type: ignore[no-untyped-call]
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        if node is not None and event.anchor is not None and not isinstance(event, yaml.AliasEvent):
            setattr(node, ANCHORED, True)
        return node


@dataclass(frozen=True)
class Document:
    """One document of a file."""

    root: Node
    text: str
    notes: tuple[str, ...] = ()


def compose(text: str, reading: ParseContext) -> list[Document]:
    """Parse the documents of a file. Empty documents are skipped; reports an error if all are empty."""
    nodes: list[tuple[int, yaml.Node]] = []
    loader = _NodeLoader("")
    try:
        loader = _NodeLoader(text)
        while loader.check_node():
            begin = loader.peek_event().start_mark.index  # type: ignore[no-untyped-call]
            document = loader.get_node()
            if document is not None and not _is_empty(document):
                nodes.append((begin, document))
    except _TooLarge as error:
        reading.broken(error.problem_mark.line + 1 if error.problem_mark else 0, f"{error.problem}.")
        return []
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        hint = yaml_hint(error, text) or "Correct this line or the one before it."
        reading.broken(mark.line + 1 if mark else 0, f"is not YAML ({problem}). {hint}")
        return []
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        code = ord(error.character) if isinstance(error.character, str) else error.character
        reading.broken(line, f"is not YAML (it has the character U+{code:04X}). Remove the character.")
        return []
    except (
        yaml.YAMLError,
        ValueError,
    ) as error:  # ValueError: PyYAML parses "%YAML 1.<5,000 digits>" as a number
        reading.broken(0, f"is not YAML ({str(error)[:MAX_SHOWN]}). Rewrite it.")
        return []
    finally:
        loader.dispose()
    if not nodes:
        reading.wrong(1, f"is empty; expected {reading.expected}.")
        return []
    begins = [0, *(begin for begin, _ in nodes[1:]), len(text)]
    documents = []
    for (_, document), begin, end in zip(nodes, begins, begins[1:], strict=False):
        reading.notes = []
        root = _node(document, reading, 0)
        if root is not None:
            documents.append(Document(root, text[begin:end], tuple(reading.notes)))
    return documents


def _node(node: yaml.Node, reading: ParseContext, depth: int) -> Node | None:
    line = node.start_mark.line + 1
    reading.nodes += 1
    if (
        depth > MAX_DEPTH or reading.nodes > MAX_NODES
    ):  # only aliases lead here: each use of one is read again
        if reading.nodes <= MAX_NODES + 1:
            reading.broken(line, f"{_too_large()}, aliases written out.")
            reading.nodes = MAX_NODES + 2
        return None
    if not isinstance(node, yaml.ScalarNode) and node.tag not in (
        "tag:yaml.org,2002:seq",
        "tag:yaml.org,2002:map",
    ):
        _refuse_tag(node, reading)
        return None
    has_anchor = getattr(node, ANCHORED, False)
    if isinstance(node, yaml.SequenceNode):
        items = [_placed(n, node, reading, depth + 1) for n in node.value]
        nodes = [i for i in items if i is not None]
        return Node(nodes, line, has_anchor or any(i.has_anchor for i in nodes))
    if isinstance(node, yaml.MappingNode):
        values = _mapping(node, reading, depth)
        return Node(values, line, has_anchor or any(v.has_anchor for v in values.values()))
    try:
        value = _NodeLoader("").construct_object(node)
    except (
        yaml.YAMLError,
        ValueError,
        LookupError,
        AttributeError,
        ArithmeticError,
    ):  # what PyYAML raises for scalars
        _refuse_tag(node, reading)
        return None
    if not isinstance(value, (str, int, float, type(None))):
        _refuse_tag(node, reading)
        return None
    return Node(value, line, has_anchor)


def _placed(node: yaml.Node, before: yaml.Node, reading: ParseContext, depth: int) -> Node | None:
    """Convert a node that follows ``before``.

    An alias does not take over the anchor of the node it refers to.
    """
    converted = _node(node, reading, depth)
    if converted is None or node.start_mark.index >= before.start_mark.index:
        return converted
    return Node(converted.value, converted.line)


def _is_empty(document: yaml.Node) -> bool:
    """Is a document empty, such as the one after ``---`` at the end of a file?"""
    return isinstance(document, yaml.ScalarNode) and document.value == "" and document.style is None


def _refuse_tag(node: yaml.Node, reading: ParseContext) -> None:
    tag = node.tag.replace("tag:yaml.org,2002:", "!!")
    subject = quote(node.value) if isinstance(node, yaml.ScalarNode) else "a value"
    reading.broken(
        node.start_mark.line + 1,
        f"{subject} is YAML of the type {shorten(tag)}, which a recipe cannot hold; expected a number, text, "
        "true or false. Put text in quotes, and remove the type.",
    )


def _mapping(node: yaml.MappingNode, reading: ParseContext, depth: int) -> dict[str, Node]:
    values: dict[str, Node] = {}
    merged: dict[str, Node] = {}
    for key, value in node.value:
        inner = _placed(value, key, reading, depth + 1)
        if inner is None:
            continue
        line = key.start_mark.line + 1
        if key.tag == "tag:yaml.org,2002:merge":
            parts = inner.value if isinstance(inner.value, list) else [inner]
            if not all(isinstance(part.value, dict) for part in parts):
                reading.broken(line, f"<< is {inner.kind}; expected a mapping. Use an alias such as *common.")
                continue
            for part in reversed(parts):  # the first mapping that has a key wins
                merged |= part.value
        elif not isinstance(key, yaml.ScalarNode):
            reading.broken(line, "a key is a list or a mapping; expected a name.")
        elif key.value in values and not _may_repeat(key.value, values[key.value], inner, depth):
            first = values[key.value].line
            if _are_same(values[key.value], inner):
                reading.note(
                    line, f"{one_line(key.value)} appears twice with the same value, first in line {first}."
                )
                continue
            reading.wrong(line, f"{one_line(key.value)} appears twice, first in line {first}. Remove one.")
        else:
            values[key.value] = Node(inner.value, line, inner.has_anchor)
    return {**merged, **values}


def _may_repeat(key: str, first: Node, other: Node, depth: int) -> bool:
    """Is it a top-level key that only holds anchors?"""
    return depth == 0 and key not in DOCUMENT_KEYS and first.has_anchor and other.has_anchor


def _are_same(node: Node, other: Node) -> bool:
    """Do two nodes have the same content? Takes time proportional to the smaller one."""
    first, second = node.value, other.value
    if isinstance(first, dict) and isinstance(second, dict):
        return (
            len(first) == len(second)
            and list(first) == list(second)
            and all(_are_same(first[key], second[key]) for key in first)
        )
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(_are_same, first, second))
    return type(first) is type(second) and not isinstance(first, (dict, list)) and first == second


LARGEST_INTEGER = 10**4000
"""Python refuses to print integers of more than 4,300 digits."""


def to_plain_data(value: Any, where: str, depth: int) -> Any:
    """Convert Python values to those YAML can write: paths and methods become text, numpy numbers plain numbers."""
    if depth > MAX_DEPTH:
        raise RecipeError(f"recipe: {_too_large()}.")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and abs(value) >= LARGEST_INTEGER:
        raise RecipeError(
            f"recipe: {where} is {quote(int(value))}; expected a number in the range of float64."
        )
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind.__str__(value) if kind is str else kind(value)
    if isinstance(value, os.PathLike):
        return os.fsdecode(value)
    if isinstance(value, Method):
        return method_name(value)
    if (label := label_of_open(value)) is not None:
        return label
    if isinstance(value, Mapping):
        return {str(k): to_plain_data(v, str(k), depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain_data(v, where, depth + 1) for v in value]
    if getattr(value, "shape", None) == ():  # a scalar of numpy or torch
        return to_plain_data(value.item(), where, depth + 1)
    raise RecipeError(
        f"recipe: {where} holds a value of type {type(value).__name__}; expected numbers, text, true or "
        f"false, lists and mappings.{_how_to_merge(value)}"
    )


def _how_to_merge(value: Any) -> str:
    """Say what merges models in memory, if a value is part of one."""
    if not (
        hasattr(value, "shape") or callable(getattr(value, "state_dict", None)) or hasattr(value, "terms")
    ):
        return ""
    return (
        " A recipe names models by their paths; alnico.merge_models and alnico.merge_state_dicts merge models "
        "in memory."
    )


def holds_anchors(key: str, value: Node, keys: Iterable[str]) -> bool:
    """Does an unknown top-level key only hold YAML anchors, and is it not a misspelt key?"""
    return value.has_anchor and key not in keys and not _is_misspelt(key, value, keys)


def _is_misspelt(key: str, value: Node, keys: Iterable[str]) -> bool:
    """Is a top-level key a misspelling of a key that could have this value, and not the author's own name?"""
    near = difflib.get_close_matches(key, list(keys), 1, 0.9)
    if near and re.match(rf"{near[0]}[-_.\d]", key):  # parameters_2 is not a misspelling
        return False
    kind = {
        "models": list,
        "slices": list,
        "methods": list,
        "modules": dict,
        "parameters": dict,
        "lines": dict,
        "protect": dict,
    }
    return bool(near) and isinstance(value.value, kind.get(near[0], (dict, str, int, float)))


def quote(value: Any) -> str:
    """Describe a value for a message, in YAML's words."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int) and abs(value) >= 10**MAX_SHOWN:
        return "a number of more than 60 digits"
    return repr(shorten(value) if isinstance(value, str) else value)


def shorten(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


def one_line(text: str) -> str:
    """Text for a message, without quotes and on one line."""
    return shorten(text if text.isprintable() else repr(text)[1:-1])


def _too_large() -> str:
    return f"is nested deeper than {MAX_DEPTH} or has more than {MAX_NODES} values; expected a recipe"
