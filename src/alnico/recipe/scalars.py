"""Reads single values of a recipe: text, numbers, booleans, and names of methods and dtypes."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from alnico.errors import MethodError, near_name
from alnico.methods import find
from alnico.methods.base import Method
from alnico.numerics.dtypes import CONFIG_NAMES, Q8_0, TORCH_NAMES
from alnico.recipe import dialect
from alnico.recipe.schema import DROP, MismatchPolicy, Missing, OtherTensors, Requantise, UnrelatedPolicy
from alnico.recipe.yaml_nodes import MAX_SHOWN, Node, ParseContext, quote, shorten

MAX_TEXT = 4_096
QUANTISED = re.compile(r"u?int\d|[48]-?bit|fp[48]|q\d|nf4|gguf|awq|gptq|float8|f8|mxfp")
"""Beginnings of names of quantised formats, which people write as a dtype."""
SEEDS = range(-(1 << 63), 1 << 63)


def text(node: Node | None, where: str, reading: ParseContext) -> str | None:
    """Read one line of text."""
    if node is None:
        return None
    value = node.value
    if not isinstance(value, str):
        hint = " Put it in quotes." if isinstance(value, (bool, int, float)) else ""
        reading.wrong(node.line, f"{where} is {node.kind}; expected text.{hint}")
        return None
    if not value.strip() or len(value) > MAX_TEXT or not value.isprintable():
        actual = "too long" if len(value) > MAX_TEXT else node.kind
        reading.wrong(
            node.line, f"{where} is {actual}; expected text of one line, of at most {MAX_TEXT} characters."
        )
        return None
    return value


def multiline_text(node: Node | None, where: str, reading: ParseContext) -> str | None:
    """Read text of any number of lines."""
    if node is None:
        return None
    if not isinstance(node.value, str) or not node.value.strip():
        hint = " Put it in quotes." if isinstance(node.value, (bool, int, float)) else ""
        reading.wrong(node.line, f"{where} is {node.kind}; expected text.{hint}")
        return None
    return node.value


def number(value: Any) -> float | None:
    """Convert a number, or text such as 1e-5 (not a number in YAML 1.1), to float; else return None."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except ValueError:
        return None
    except OverflowError:
        return math.inf


def finite_number(node: Node | None, where: str, line: int, reading: ParseContext) -> float | None:
    """Read a finite number that must be present."""
    value = number(node.value) if node is not None else None
    if node is None or value is None or not math.isfinite(value):
        reading.wrong(
            line if node is None else node.line,
            f"{where} is {node.kind if node else 'missing'}; expected a finite number.",
        )
        return None
    return value


def integer(node: Node | None, where: str, least: int, reading: ParseContext) -> int | None:
    if node is None:
        return None
    if isinstance(node.value, bool) or not isinstance(node.value, int) or node.value < least:
        reading.wrong(node.line, f"{where} is {node.kind}; expected a whole number of at least {least}.")
        return None
    return node.value


def lenient_integer(node: Node | None, where: str, least: int, reading: ParseContext) -> int | None:
    """Read an integer, or text or a float that mergekit reads as one; None if it is missing or empty."""
    value = None if node is None else node.value
    if node is None or value is None:
        return None
    if (isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < MAX_SHOWN) or (
        isinstance(value, float) and value.is_integer()
    ):
        node = Node(int(value), node.line)
    return integer(node, where, least, reading)


def boolean(node: Node | None, where: str, reading: ParseContext) -> bool:
    """Read true or false; false if it is missing."""
    if node is None:
        return False
    if not isinstance(node.value, bool):
        reading.wrong(node.line, f"{where} is {node.kind}; expected true or false.")
        return False
    return node.value


def lenient_boolean(node: Node | None, where: str, reading: ParseContext) -> bool:
    """Read a boolean, or (with a note) what mergekit reads as one; false if it is missing."""
    value = None if node is None else dialect.as_boolean(node.value)
    if node is None or isinstance(node.value, bool) or not isinstance(value, bool):
        return boolean(node, where, reading)
    reading.note(node.line, f"{where}: {node.kind} as {quote(value)}, as in mergekit.")
    return value


def method(node: Node | None, where: str, reading: ParseContext) -> Method | None:
    if node is not None and isinstance(node.value, dict) and "choice" in node.value:
        reading.wrong(
            node.line,
            f"{where} is a choice to search; expected a method. Run `alnico search`, or name a method.",
        )
        return None
    name = text(node, where, reading)
    if node is None or name is None:
        return None
    if name == DROP:
        reading.wrong(
            node.line,
            f"{where} is drop, which leaves tensors out of the output; expected a merge method. Write drop into a "
            "rule under methods, with a filter.",
        )
        return None
    try:
        found = find(name)
        if found.name != name:
            reading.note(node.line, f"{where} is {quote(name)}, which is {found.name}.")
        return found
    except MethodError as error:
        reading.wrong(node.line, str(error).replace(repr(name), quote(name)))
        return None


def named_method(node: Node | None) -> Method | None:
    """Return the method that a value names, or None; report nothing."""
    if node is None or not isinstance(node.value, str):
        return None
    try:
        return find(node.value)
    except MethodError:
        return None


def dtype(node: Node | None, where: str, reading: ParseContext) -> str | None:
    if node is not None and node.value in (16, 32, 64) and not isinstance(node.value, bool):
        reading.wrong(node.line, f"{where} is {node.kind}; expected a name. Did you mean float{node.value}?")
        return None
    name = text(node, where, reading)
    if node is None or name is None:
        return None
    plain = name.removeprefix("torch.").lower()
    canonical = TORCH_NAMES.get(plain) or (plain.upper() if plain.upper() in (*CONFIG_NAMES, Q8_0) else None)
    if canonical is None:
        prefixed = [n for n in TORCH_NAMES if plain and n.startswith(plain)]
        near = prefixed or difflib.get_close_matches(name[:MAX_SHOWN], TORCH_NAMES, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        if plain in ("int64", "long"):
            hint = " It would round weights to integers; integer buffers keep their dtype anyway."
        elif plain in ("auto", "none", "same", "default"):
            hint = " Leave dtype out: the output then has the dtype of the inputs."
        elif QUANTISED.match(plain):
            hint = " Merge in one of these, and quantise the output with another program; q8_0 is for an OUT.gguf."
        reading.wrong(
            node.line, f"{where} is {quote(name)}; expected bfloat16, float16, float32 or float64.{hint}"
        )
    return canonical


def seed(node: Node | None, reading: ParseContext) -> int:
    if node is None:
        return 0
    if isinstance(node.value, bool) or not isinstance(node.value, int) or node.value not in SEEDS:
        reading.wrong(node.line, f"seed is {node.kind}; expected a whole number of at most 64 bits.")
        return 0
    return node.value


def missing(node: Node | None, reading: ParseContext) -> Missing:
    if node is None:
        return "error"
    choices: tuple[Missing, ...] = ("error", "copy", "drop")
    for choice in choices:
        if node.value == choice:
            return choice
    reading.wrong(node.line, f"missing is {node.kind}; expected error, copy or drop.")
    return "error"


def unrelated(node: Node | None, reading: ParseContext) -> UnrelatedPolicy:
    if node is not None and node.value not in ("error", "allow"):
        reading.wrong(node.line, f"unrelated is {node.kind}; expected error or allow.")
    return "allow" if node is not None and node.value == "allow" else "error"


def other_tensors(node: Node | None, reading: ParseContext) -> OtherTensors:
    if node is not None and node.value not in ("keep", "merge"):
        reading.wrong(node.line, f"protect.others is {node.kind}; expected keep or merge.")
    return "merge" if node is not None and node.value == "merge" else "keep"


def base_mismatch(node: Node | None, reading: ParseContext) -> MismatchPolicy:
    if node is not None and node.value not in ("error", "allow"):
        reading.wrong(node.line, f"base_mismatch is {node.kind}; expected error or allow.")
    return "allow" if node is not None and node.value == "allow" else "error"


def requantise(node: Node | None, dtype: str | None, reading: ParseContext) -> Requantise | None:
    if node is None:
        return None
    if node.value != "fp8":
        reading.wrong(node.line, f"requantise is {node.kind}; expected fp8.")
    elif dtype is not None:
        reading.wrong(
            node.line,
            "requantise and dtype are both given; expected one of them: a requantised output has the dtypes of its base. Remove one.",
        )
    return "fp8"


MISSPELT = 0.7
"""Similarity from which on a name is read in the place of another."""


def misspelt_key(key: str, missing: Iterable[str]) -> str | None:
    """Return the key that is misspelt as ``key``, among those that are missing; None if there is none."""
    return near_name(key, missing, MISSPELT)


def nearest(name: str, candidates: Sequence[str], others: Sequence[str] = ()) -> str:
    """Return a hint with the candidate closest to ``name``, or with all candidates.

    ``others`` are suggested too, but not listed.
    """
    near = near_name(name, (*candidates, *others))
    return f"Did you mean {near}?" if near else f"Valid names: {', '.join(candidates)}."


def mapping(
    node: Node, where: str, keys: Iterable[str], expected: str, reading: ParseContext
) -> dict[str, Node]:
    """Read a mapping and report its unknown keys; return {} if it is not a mapping.

    A misspelt key is read as the key that is missing.
    """
    if not isinstance(node.value, dict):
        reading.wrong(node.line, f"{where} is {node.kind}; expected {expected}.")
        return {}
    names = list(keys)
    held: dict[str, Node] = {}
    for key, value in node.value.items():
        meant: str | None = key
        if key not in names:
            meant = misspelt_key(key, [k for k in names if k not in node.value and k not in held])
            hint = f"Did you mean {meant}?" if meant else nearest(key, names)
            reading.wrong(value.line, f"{where} has the unknown key {shorten(key)!r}. {hint}")
        held[meant or key] = value
    return held
