"""Sums up what methods said about matrices: one line for each text and models, whatever the tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from alnico.events import Noted


def sum_up(notes: Sequence[Noted], places: Mapping[str, int]) -> tuple[str, ...]:
    """Return a line for each text about the same models, with the smallest and the largest of each number.

    ``places`` has the position of each tensor in the output, by name: the order of the lines does not depend on threads.

    >>> said = [Noted(n, "{} and {} agree (cosine {:.2f})", ("a", "b", c)) for n, c in (("w", 0.97), ("v", 0.99))]
    >>> sum_up(said, {"v": 0, "w": 1})
    ('2 tensors, such as v: a and b agree (cosine 0.97 to 0.99)',)
    """
    groups: dict[tuple[str, tuple[str, ...]], list[Noted]] = {}
    for note in sorted(notes, key=lambda note: (places.get(note.tensor, 0), note.form)):
        labels = tuple(value for value in note.values if isinstance(value, str))
        groups.setdefault((note.form, labels), []).append(note)
    return tuple(_line(group) for group in groups.values())


def _line(group: Sequence[Noted]) -> str:
    first, tensors = group[0], len({note.tensor for note in group})
    text = str(first)
    if len(group) > 1:
        values = [
            column[0] if isinstance(column[0], str) else _Range([float(value) for value in column])
            for column in zip(*(note.values for note in group), strict=True)
        ]
        text = first.form.format(*values) if values else text
    place = first.tensor if tensors == 1 else f"{tensors} tensors, such as {first.tensor}"
    return f"{place}: {text}"


class _Range:
    """The smallest and the largest of some numbers, each in the form of the text."""

    def __init__(self, numbers: Sequence[float]) -> None:
        self._ends = min(numbers), max(numbers)

    def __format__(self, form: str) -> str:
        return " to ".join(dict.fromkeys(format(number, form) for number in self._ends))
