"""Results of looking into a store: lists of task vectors, what a search found, and all that is known of one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from alnico.notebook import (
    ResultTable,
    name_text,
    names_text,
    never_fails,
    result_html,
    result_line,
)
from alnico.numerics.sizes import count_of, format_size
from alnico.store.entry import Entry


@dataclass(frozen=True)
class FoundVector:
    """A task vector with where it is: ``source`` is empty for the local store, otherwise the address of a remote or ``hub``.

    ``reference`` is what ``pull`` and recipes take. ``cosine``, with its standard error, and ``sign_conflict`` compare it with ``like``, if that was given.
    ``note`` says what else is known, such as how often the hub counts it as downloaded.
    """

    reference: str
    entry: Entry
    source: str = ""
    cosine: float | None = None
    cosine_error: float | None = None
    sign_conflict: float | None = None
    note: str = ""

    def data(self) -> dict[str, Any]:
        """Return it as plain data, for ``--json``."""
        own: dict[str, Any] = {"reference": self.reference, "source": self.source, **self.entry.data()}
        if self.cosine is not None:
            own |= {
                "cosine": self.cosine,
                "cosine_error": self.cosine_error,
                "sign_conflict": self.sign_conflict,
            }
        return own | ({"note": self.note} if self.note else {})


@dataclass(frozen=True)
class FoundVectors(Sequence[FoundVector]):
    """What a list or a search of a store found, the best first; ``total`` is how many there are without the limit.

    ``notes`` says what could not be read or was not asked.
    """

    store: str
    vectors: tuple[FoundVector, ...]
    total: int
    asked: str = ""
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, at: Any) -> Any:
        return self.vectors[at]

    def __iter__(self) -> Iterator[FoundVector]:
        return iter(self.vectors)

    @property
    def byte_size(self) -> int:
        """The bytes of all files; what versions share counts once."""
        return sum({f.sha256: f.size for v in self.vectors for f in v.entry.files.values()}.values())

    @property
    def references(self) -> tuple[str, ...]:
        return tuple(v.reference for v in self.vectors)

    def data(self) -> dict[str, Any]:
        """Return it as plain data, for ``--json``."""
        return {
            "store": self.store,
            "asked": self.asked,
            "total": self.total,
            "vectors": [v.data() for v in self.vectors],
            "notes": list(self.notes),
        }

    def rows(self) -> list[list[str]]:
        """Return a row of text for each, under :data:`COLUMNS`."""
        return [_row(v) for v in self.vectors]

    def __repr__(self) -> str:
        return result_line(
            f"{count_of(self.total, 'task vector')} in {name_text(self.store)}",
            f"searched: {self.asked}" if self.asked else "",
            names_text(self.references),
        )

    @never_fails
    def _repr_html_(self) -> str:
        return result_html(
            f"{count_of(self.total, 'task vector')} in {name_text(self.store)}",
            ResultTable(COLUMNS, self.rows()),
            *self.notes,
            facts=[("searched", self.asked)] if self.asked else [],
        )


COLUMNS = ("name", "base", "tasks and languages", "licence", "size", "error", "where")


def _row(v: FoundVector) -> list[str]:
    e = v.entry
    return [
        v.reference,
        e.base or "-",
        ", ".join((*e.tasks, *e.languages)) or "-",
        e.licence or "-",
        format_size(e.byte_size) if e.byte_size else "-",
        error_text(e),
        v.source or "here",
    ]


def error_text(entry: Entry) -> str:
    """Return what a vector loses: ``exact``, its measured error, or nothing for an adapter, which is what it is."""
    if entry.kind == "adapter":
        return "adapter"
    if set(entry.encodings) <= {"absent", "sparse", "whole"}:
        return "exact"
    return f"{entry.error:.2%}"
