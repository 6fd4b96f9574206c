"""Says what a stored task vector must keep: every bit, an error, a size, a share of directions, or one encoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from alnico.errors import RecipeError, near_name
from alnico.numerics.numbers import finite_number
from alnico.numerics.sizes import bytes_of

DIFFERENCE_DTYPES = {"f64": "F64", "f32": "F32", "bf16": "BF16", "f16": "F16"}

ENCODINGS = ("exact", "whole", "sparse", "difference", "low_rank", "top_k", "sign", "int4")
"""What ``encoding`` may name. ``exact`` chooses among absent, sparse and whole."""

DEFAULT_ERROR = 0.01
"""The relative error of a task vector that is neither sparse nor small, unless something else is asked for."""
DEFAULT_RANK = 0.125
DEFAULT_SHARE = 0.1


@dataclass(frozen=True)
class Target:
    """What a stored task vector must keep. At most one is given; none chooses by what is measured.

    ``exact``: every bit of the fine-tune. ``error``: at most this relative error, ``|D' - D| / |D|``, in each tensor. ``size``: at
    most so many bytes in all files, with the least error. ``tsv``: this share of the singular directions of each matrix.
    ``encoding``: one encoding for all matrices, with its option after a colon: ``difference:f32`` (f64, bf16, f16),
    ``top_k:0.1`` (the share of entries), ``low_rank:0.125`` (the share of directions) or ``low_rank:16`` (the rank).
    """

    exact: bool = False
    error: float | None = None
    size: int | str | None = None
    tsv: float | None = None
    encoding: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("error", "size", "tsv", "encoding") if getattr(self, name) is not None]
        given = ["exact", *given] if self.exact else given
        if len(given) > 1:
            raise RecipeError(
                f"{' and '.join(given)} are given; expected one of exact, error, size, tsv and encoding. Choose one, or none for "
                "what the measurements suggest."
            )
        if self.error is not None and not 0 <= finite_number(self.error, "error", error=RecipeError) < 1:
            raise RecipeError(
                f"error is {self.error:g}; expected a relative error of 0 or more and below 1. 0.01 keeps what scores show."
            )
        if self.tsv is not None and not 0 < finite_number(self.tsv, "tsv", error=RecipeError) <= 1:
            raise RecipeError(
                f"tsv is {self.tsv:g}; expected a share of directions in (0, 1]. 0.1 keeps a tenth."
            )
        if self.size is not None:
            object.__setattr__(self, "size", bytes_of(self.size))
        if self.encoding is not None:
            _parsed(self.encoding)

    @property
    def is_default(self) -> bool:
        return not self.exact and {self.error, self.size, self.tsv, self.encoding} == {None}

    @property
    def size_bytes(self) -> int:
        assert isinstance(self.size, int)
        return self.size

    @property
    def forced(self) -> tuple[str, Any]:
        """The encoding that is asked for, and its option."""
        assert self.encoding is not None
        return _parsed(self.encoding)

    def __str__(self) -> str:
        if self.exact:
            return "exact"
        given = [
            f"{n} {v}" for n in ("error", "size", "tsv", "encoding") if (v := getattr(self, n)) is not None
        ]
        return given[0] if given else "the default"


def _parsed(text: Any) -> tuple[str, Any]:
    """Return the encoding of ``NAME`` or ``NAME:OPTION``, and its option. Errors: RecipeError.

    >>> _parsed("top_k:0.05"), _parsed("low_rank:16"), _parsed("difference")
    (('top_k', 0.05), ('low_rank', 16), ('difference', 'F32'))
    """
    name, colon, option = str(text).partition(":")
    if name not in ENCODINGS:
        near = near_name(name, ENCODINGS)
        raise RecipeError(
            f"encoding is {text!r}; expected one of {', '.join(ENCODINGS)}."
            + (f" Did you mean {near}?" if near else " Choose one.")
        )
    if name == "difference":
        if colon and option not in DIFFERENCE_DTYPES:
            raise RecipeError(
                f"encoding is {text!r}; expected one of {', '.join(DIFFERENCE_DTYPES)} after difference:. Choose one."
            )
        return name, DIFFERENCE_DTYPES[option or "f32"]
    if name == "top_k":
        return name, _share(text, option, DEFAULT_SHARE) if colon else DEFAULT_SHARE
    if name == "low_rank":
        if option.isdecimal() and 1 <= int(option) < 1 << 31:
            return name, int(option)
        return name, _share(
            text, option, DEFAULT_RANK, " or a number of directions"
        ) if colon else DEFAULT_RANK
    if colon:
        raise RecipeError(
            f"encoding is {text!r}; expected {name} alone, which has no option. Remove {':' + option!r}."
        )
    return name, None


def _share(text: Any, option: str, example: float, also: str = "") -> float:
    try:
        share = float(option)
    except ValueError:
        share = float("nan")
    if not 0 < share <= 1:
        raise RecipeError(
            f"encoding is {text!r}; expected a share in (0, 1]{also} after the colon. Write {str(text).partition(':')[0]}:{example:g}."
        )
    return share
