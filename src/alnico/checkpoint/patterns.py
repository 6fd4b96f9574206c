"""Matches regular expressions from files as Python's ``re`` does, but in bounded time.

Python's ``re`` backtracks, so ``(a+)+$`` takes time exponential in the length of a name, and a stranger's
config or recipe can hold such a pattern. This module only answers whether a pattern matches, which needs no
backtracking: a pattern maps the set of positions where it may begin to the set where it may end, and a set is
the bits of one integer. A character moves the set by one, a repetition is followed until it adds no position,
a lookaround removes positions. Python parses the pattern, and decides for each single character.

docs/decisions/0013-patterns-without-a-library.md explains why no library is used.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Iterable, Sequence

# The parser is undocumented (once `sre_parse`); the tests compare this module's results with those of `re`.
from re import _compiler as sre_compiler  # type: ignore[attr-defined]
from re import _constants as sre  # type: ignore[attr-defined]
from re import _parser as sre_parser  # type: ignore[attr-defined]
from typing import Any, Literal

MAX_PATTERN = 10_000
"""Longest pattern, in characters.

The longest seen in adapters of vision-language models have fewer than 1,000.
"""

MAX_DEPTH = 50
"""Deepest nesting of groups."""

MAX_WIDTH = 1_000_000
"""Most characters in all sets of a pattern: Python expands case-insensitive sets one by one."""

FIRST_STEPS = 200_000
"""Steps that a pattern may take in addition to those for each name; a step takes about 200 nanoseconds."""

MAX_FOLLOWED = 50
"""Most repetitions that add steps for a name, each as many as the name has characters."""

QUICK_NAME = 1_000
"""Longest name for which `re` matches a pattern with one repetition, in at most quadratic time."""

How = Literal["search", "match", "fullmatch"]


class PatternError(ValueError):
    """A pattern is not a regular expression, or cannot be matched in bounded time.

    The text follows 'which'.
    """


def fits(pattern: str, name: str, how: How = "search") -> bool:
    """Does a regular expression match a name, as decided by ``re.search``, ``re.match`` or ``re.fullmatch``?

    Errors: PatternError.

    >>> fits(r"^(?!.*visual).*(q_proj|v_proj)$", "model.layers.0.q_proj"), fits("(a+)+$", "a" * 90 + "!", "match")
    (True, False)
    """
    return _fits(pattern, name, how)


def check_pattern(pattern: str) -> None:
    """Refuse a pattern that cannot be matched. Errors: PatternError."""
    _pattern(pattern)


def quote_pattern(pattern: str) -> str:
    """Return a pattern for a message: shortened, with unprintable characters escaped."""
    return repr(pattern if len(pattern) <= 60 else pattern[:57] + "...")


@functools.lru_cache(1 << 16)
def _fits(pattern: str, name: str, how: How) -> bool:
    return _pattern(pattern).fits(name, how)


@functools.lru_cache(1 << 10)
def _pattern(pattern: str) -> _Pattern:
    if len(pattern) > MAX_PATTERN:
        raise PatternError(f"has {len(pattern):,} characters; at most {MAX_PATTERN:,} are read")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parsed = sre_parser.parse(pattern)
            if _width(parsed) > MAX_WIDTH:
                raise PatternError("has sets of characters that are too large")
            plain = re.compile(pattern)
    except PatternError:
        raise
    except (re.error, OverflowError, RecursionError, ValueError) as error:
        raise PatternError(f"is not a regular expression ({str(error)[:80]})") from None
    return _Pattern(pattern, plain, parsed)


class _Pattern:
    """A pattern as nodes: each maps the positions where it begins to those where it ends, or the reverse."""

    def __init__(self, pattern: str, plain: re.Pattern[str], parsed: Any) -> None:
        self._plain = plain
        self._own_steps = 1_000 + 4 * len(pattern)
        self._repeats = 0
        self._allowed = FIRST_STEPS
        self._tests: list[re.Pattern[str]] = []
        self._test_numbers: dict[tuple[str, int], int] = {}
        self._letters: list[dict[str, bool]] = []
        self._is_quick = _is_quick(parsed)
        self._why_not = ""
        self._nodes: Sequence[Any] = ()
        try:
            self._nodes = self._sequence(parsed, parsed.state.flags, 0)
        except PatternError as error:
            if not self._is_quick:
                raise
            self._why_not = str(error)

    def fits(self, name: str, how: How) -> bool:
        if self._is_quick and len(name) <= QUICK_NAME:
            return getattr(self._plain, how)(name) is not None
        if self._why_not:
            raise PatternError(self._why_not)
        self._allowed += self._own_steps + len(name) * min(self._repeats, MAX_FOLLOWED)
        run = _PatternRun(self, name)
        ends = run.sequence(self._nodes, run.everywhere if how == "search" else 1, False)
        return bool(ends >> len(name) & 1 if how == "fullmatch" else ends)

    def step(self) -> None:
        self._allowed -= 1
        if self._allowed < 0:
            raise PatternError("takes too many steps")

    def is_letter(self, test: int, letter: str) -> bool:
        """Does a one-character test match a character?"""
        cache = self._letters[test]
        if letter not in cache:
            cache[letter] = self._tests[test].fullmatch(letter) is not None
        return cache[letter]

    def is_place(self, test: int, name: str, place: int) -> bool:
        """Does a position test, such as ``\\b``, match at a position?"""
        return self._tests[test].match(name, place) is not None

    def _sequence(self, items: Iterable[Any], flags: int, depth: int) -> tuple[Any, ...]:
        if depth > MAX_DEPTH:
            raise PatternError(f"has groups nested deeper than {MAX_DEPTH}")
        return tuple(self._node(op, value, flags, depth) for op, value in items)

    def _node(self, op: Any, value: Any, flags: int, depth: int) -> tuple[Any, ...]:
        if op in (sre.LITERAL, sre.NOT_LITERAL, sre.ANY, sre.IN):
            return "letter", self._test(op, value, flags)
        if op is sre.AT:
            return "place", self._test(op, value, flags)
        if op is sre.BRANCH:
            return "branch", tuple(self._sequence(branch, flags, depth + 1) for branch in value[1])
        if op is sre.SUBPATTERN:
            _, added, removed, inner = value
            inherited = flags & ~sre_parser.TYPE_FLAGS if added & sre_parser.TYPE_FLAGS else flags
            return "branch", (self._sequence(inner, (inherited | added) & ~removed, depth + 1),)
        if op in (sre.MAX_REPEAT, sre.MIN_REPEAT):
            least, most, inner = value
            self._repeats += 1
            return (
                "repeat",
                int(least),
                None if most is sre.MAXREPEAT else int(most),
                self._sequence(inner, flags, depth + 1),
            )
        if op in (sre.ASSERT, sre.ASSERT_NOT):
            direction, inner = value
            return "look", op is sre.ASSERT, direction > 0, self._sequence(inner, flags, depth + 1)
        if op is sre.FAILURE:
            return "branch", ()
        raise PatternError(
            "has a reference to a group, an atomic group or a possessive repetition, "
            "which are supported only with at most one other repetition"
        )

    def _test(self, op: Any, value: Any, flags: int) -> int:
        """Return the number of the test for one character or position. The test is Python's own."""
        key = (repr((op, value)), flags)
        if key not in self._test_numbers:
            self._test_numbers[key] = len(self._tests)
            self._tests.append(
                sre_compiler.compile(sre_parser.SubPattern(sre_parser.State(), [(op, value)]), flags)
            )
            self._letters.append({})
        return self._test_numbers[key]


class _PatternRun:
    """A pattern matched against one name: where each letter is, and the results so far."""

    def __init__(self, pattern: _Pattern, name: str) -> None:
        self._pattern = pattern
        self._name = name
        self.everywhere = (1 << len(name) + 1) - 1
        self._places: dict[str, int] = {}
        for place, letter in enumerate(name):
            self._places[letter] = self._places.get(letter, 0) | 1 << place
        self._masks: dict[Any, int] = {}

    def sequence(self, nodes: Sequence[Any], places: int, backward: bool) -> int:
        """Return where nodes end that begin at one of ``places``; with ``backward`` the reverse."""
        for node in reversed(nodes) if backward else nodes:
            if not places:
                return 0
            self._pattern.step()
            kind = node[0]
            if kind == "letter":
                mask = self._mask(node, lambda n: self._letters(n[1]))
                places = (places >> 1) & mask if backward else (places & mask) << 1
            elif kind == "place":
                places &= self._mask(node, lambda n: self._at(n[1]))
            elif kind == "branch":
                places = self._any(node[1], places, backward)
            elif kind == "repeat":
                places = self._repeat(node, places, backward)
            else:
                matches = self._mask(node, lambda n: self.sequence(n[3], self.everywhere, n[2]))
                places &= matches if node[1] else ~matches
        return places

    def _any(self, branches: Sequence[Any], places: int, backward: bool) -> int:
        ends = 0
        for branch in branches:
            ends |= self.sequence(branch, places, backward)
        return ends

    def _repeat(self, node: Any, places: int, backward: bool) -> int:
        _, least, most, inner = node
        for _ in range(least):
            before, places = places, self.sequence(inner, places, backward)
            self._pattern.step()
            if places == before:  # further repetitions change nothing
                break
        ends = new = places
        count = least
        while new and (most is None or count < most):
            self._pattern.step()
            new = self.sequence(inner, new, backward) & ~ends
            ends |= new
            count += 1
        return ends

    def _mask(self, node: Any, compute: Callable[[Any], int]) -> int:
        key = id(node) if node[0] == "look" else node
        if key not in self._masks:
            self._masks[key] = compute(node)
        return self._masks[key]

    def _letters(self, test: int) -> int:
        mask = 0
        for letter, places in self._places.items():
            if self._pattern.is_letter(test, letter):
                mask |= places
        return mask

    def _at(self, test: int) -> int:
        mask = 0
        for place in range(len(self._name) + 1):
            if self._pattern.is_place(test, self._name, place):
                mask |= 1 << place
        return mask


def _is_quick(parsed: Any) -> bool:
    """Is `re` at most quadratic in a name's length?

    It is with one repetition of a character and one choice.
    """
    repeats = branches = 0
    level = list(parsed)
    while level:
        op, value = level.pop()
        if op in (sre.MAX_REPEAT, sre.MIN_REPEAT, sre.POSSESSIVE_REPEAT):
            inner = list(value[2])
            repeats += 1
            if len(inner) != 1 or inner[0][0] not in (sre.LITERAL, sre.NOT_LITERAL, sre.ANY, sre.IN):
                return False
        elif op is sre.BRANCH:
            branches += 1
            level += [item for branch in value[1] for item in branch]
        elif op is sre.SUBPATTERN:
            level += value[3]
        elif op is sre.ATOMIC_GROUP:
            level += value
        elif op in (sre.ASSERT, sre.ASSERT_NOT):
            level += value[1]
        elif op is sre.GROUPREF_EXISTS:
            return False
    return repeats <= 1 and branches <= 1


def _width(items: Any) -> int:
    """Return how many characters the sets of a pattern hold."""
    total = 0
    level = [items]
    while level:
        inner = level.pop()
        if isinstance(inner, tuple) and len(inner) == 2 and inner[0] is sre.RANGE:
            total += inner[1][1] - inner[1][0]
        elif isinstance(inner, (tuple, list, sre_parser.SubPattern)):
            level += list(inner)
    return total
