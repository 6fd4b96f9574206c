"""The options of an extraction, checked, and the largest rank that they allow a matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from alnico.errors import RecipeError
from alnico.lora.extract_targets import EmbeddingsChoice, ExtractTarget, OthersChoice
from alnico.numerics.dtypes import DTYPES, TORCH_NAMES
from alnico.numerics.numbers import finite_number, quote_value, whole_number
from alnico.numerics.sizes import bytes_of

MOST_RANK = 256
"""Default of ``max_rank`` with ``size``."""

DEFAULT_RANK = 32


@dataclass(frozen=True)
class Options:
    """The checked options that decide an adapter's bits."""

    rank: int | None
    energy: float | None
    size: int | None
    max_rank: int | None
    exact: bool
    others: OthersChoice
    embeddings: EmbeddingsChoice
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    dtype: str
    seed: int

    def cap(self, target: ExtractTarget) -> int:
        """Return the largest rank that a matrix may get."""
        side = min(target.matrix)
        if self.rank is not None:
            return min(self.rank, side)
        if self.energy is not None:
            return min(self.max_rank or side, side)
        assert self.size is not None
        return min(
            self.max_rank or MOST_RANK,
            side,
            self.size // (sum(target.sides) * DTYPES[self.dtype].bytes),
        )

    def data(self) -> dict[str, Any]:
        """Return the options that differ from their default, and those that always matter."""
        optional = {
            "rank": self.rank,
            "energy": self.energy,
            "size": self.size,
            "max_rank": self.max_rank,
            "exact": self.exact or None,
            "include": list(self.include) or None,
            "exclude": list(self.exclude) or None,
        }
        fixed = {
            "others": self.others,
            "embeddings": self.embeddings,
            "dtype": self.dtype,
            "seed": self.seed,
        }
        return {key: value for key, value in optional.items() if value is not None} | fixed


def checked_options(
    rank: int | None,
    energy: float | None,
    size: int | str | None,
    max_rank: int | None,
    exact: bool,
    others: OthersChoice,
    embeddings: EmbeddingsChoice,
    include: Sequence[str],
    exclude: Sequence[str],
    dtype: str,
    seed: int,
) -> Options:
    for name, filters in (("include", include), ("exclude", exclude)):
        if (
            isinstance(filters, str)
            or not isinstance(filters, Sequence)
            or not all(isinstance(f, str) for f in filters)
        ):
            raise RecipeError(
                f"extract: {name} is {quote_value(filters)}; expected a list of filters. Write ['mlp'], for "
                "example."
            )
    rank_options = [
        name for name, value in (("rank", rank), ("energy", energy), ("size", size)) if value is not None
    ]
    if len(rank_options) > 1:
        raise RecipeError(
            f"extract: {' and '.join(rank_options)} both set the ranks; expected one of them. Remove one."
        )
    rank, max_rank = (
        None if v is None else whole_number(v, f"extract: {n}", None, RecipeError)
        for n, v in (("rank", rank), ("max_rank", max_rank))
    )
    for name, number in (("rank", rank), ("max_rank", max_rank)):
        if number is not None and number < 1:
            raise RecipeError(f"extract: {name} is {number}; expected at least 1. Choose a larger one.")
    seed = whole_number(seed, "extract: seed", None, RecipeError)
    share = "the share of squares to keep, in (0, 1]. Choose 0.9, for example"
    if (
        energy is not None
        and not 0 < (energy := finite_number(energy, "extract: energy", share, RecipeError)) <= 1
    ):
        raise RecipeError(f"extract: energy is {energy:g}; expected {share}.")
    if max_rank is not None and rank is not None:
        raise RecipeError(
            "extract: max_rank limits energy or size, but rank is set; expected one of the two. Remove one."
        )
    for name, choice, choices in (
        ("others", others, ("save", "leave")),
        ("embeddings", embeddings, ("lora", "save", "leave")),
    ):
        if choice not in choices:
            raise RecipeError(
                f"extract: {name} is {choice!r}; expected {' or '.join(choices)}. Choose one of them."
            )
    code = TORCH_NAMES.get(
        (dtype if isinstance(dtype, str) else quote_value(dtype)).removeprefix("torch."), ""
    )
    if code not in ("F32", "BF16", "F16"):
        raise RecipeError(
            f"extract: dtype is {quote_value(dtype)}; expected float32, bfloat16 or float16. Choose one of "
            "them."
        )
    return Options(
        DEFAULT_RANK if not rank_options else rank,
        energy,
        None if size is None else bytes_of(size),
        max_rank,
        exact,
        others,
        embeddings,
        tuple(include),
        tuple(exclude),
        code,
        seed,
    )
