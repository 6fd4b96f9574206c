"""Reports an extraction: how each tensor was treated and how much of its change is kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from alnico._version import __version__
from alnico.notebook import ResultTable, name_text, never_fails, result_html, result_line, share_text
from alnico.numerics.sizes import count_of, format_size

SHOWN = 12
"""Number of tensors listed in the card."""


@dataclass(frozen=True)
class ExtractedTensor:
    """A tensor of both models.

    ``change`` is |fine-tune - base|. ``expected`` is the error of the factors, computed from the singular values;
    ``measured`` is the error after folding the adapter back (None: not verified).
    """

    name: str
    shape: tuple[int, ...]
    treatment: Literal["factors", "saved", "left out", "unchanged"]
    why: str
    rank: int
    bytes: int
    change: float
    expected: float
    measured: float | None = None

    @property
    def left(self) -> float:
        """The part of the change that is lossy: measured if verified, else expected."""
        return self.expected if self.measured is None else self.measured

    @property
    def error(self) -> float:
        """Share of the length of the change that is lossy: |W + s B A - fine-tune| / |fine-tune - W|."""
        return self.left / self.change if self.change else 0.0

    @property
    def energy(self) -> float:
        """Share of the squares of the change that is kept."""
        return 1 - min(self.error**2, 1.0)

    def data(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "shape": list(self.shape),
            "treatment": self.treatment,
            **({"why": self.why} if self.why else {}),
            "rank": self.rank,
            "bytes": self.bytes,
            "change": self.change,
            "energy_kept": self.energy,
            "relative_error": self.error,
            "expected_error": self.expected / self.change if self.change else 0.0,
        }


@dataclass(frozen=True)
class Extraction:
    """A finished extraction: the adapter in ``path``, and how much of the change from ``base`` to ``tuned`` it keeps."""

    path: Path
    tuned: str
    base: str
    options: Mapping[str, Any]
    tensors: tuple[ExtractedTensor, ...]
    unmatched: tuple[tuple[str, str], ...]
    """Tensors without a counterpart of the same shape, each with the reason why it is left out."""
    byte_size: int
    base_bytes: int
    is_verified: bool
    seconds: float
    resumed: int
    """Number of tensors reused from an interrupted run."""
    compile_seconds: float = field(default=0.0, compare=False)

    def __repr__(self) -> str:
        return result_line(
            f"adapter in {self.path}",
            f"{name_text(self.tuned)} less {name_text(self.base)}",
            f"{share_text(self.energy)} of the energy of the change kept",
            format_size(self.byte_size),
        )

    @never_fails
    def _repr_html_(self) -> str:
        changed = sorted((t for t in self.tensors if t.change), key=lambda t: -t.change)
        rows = [
            [t.name, t.treatment, t.rank, share_text(self.share(t)), share_text(t.energy)] for t in changed
        ]
        return result_html(
            f"Adapter in {self.path}",
            ResultTable(("tensor", "treatment", "rank", "share of the change", "energy kept"), rows),
            facts=[
                ("fine-tune", self.tuned),
                ("base", self.base),
                ("energy kept", share_text(self.energy)),
                ("size", format_size(self.byte_size)),
                ("verified", self.is_verified),
            ],
        )

    @property
    def change(self) -> float:
        """|fine-tune - base| over all tensors that both models have."""
        return _length(t.change for t in self.tensors)

    @property
    def error(self) -> float:
        """Share of the length of the whole change that is lossy."""
        return _length(t.left for t in self.tensors) / self.change if self.change else 0.0

    @property
    def energy(self) -> float:
        """Share of the squares of the whole change that is kept."""
        return 1 - min(self.error**2, 1.0)

    def share(self, tensor: ExtractedTensor) -> float:
        """A tensor's share of the squares of the whole change."""
        return (tensor.change / self.change) ** 2 if self.change else 0.0

    def of(self, treatment: str) -> list[ExtractedTensor]:
        return [t for t in self.tensors if t.treatment == treatment]

    def data(self) -> dict[str, Any]:
        """Return plain data for ``--json`` and ``extraction.json``; it does not depend on the machine or on timing."""
        return {
            "tuned": self.tuned,
            "base": self.base,
            "options": dict(self.options),
            "bytes": self.byte_size,
            "base_bytes": self.base_bytes,
            "energy_kept": self.energy,
            "relative_error": self.error,
            "is_verified": self.is_verified,
            "tensors": [{**t.data(), "share_of_change": self.share(t)} for t in self.tensors],
            "without_counterpart": [{"name": name, "why": why} for name, why in self.unmatched],
        }

    def summary(self) -> list[str]:
        """Return lines of text that report what was kept and left out."""
        factors, saved, left = (
            self.of("factors"),
            self.of("saved"),
            [t for t in self.of("left out") if t.change],
        )
        ranks = [t.rank for t in factors]
        span = f"rank {ranks[0]}" if len(set(ranks)) == 1 else f"ranks {min(ranks)} to {max(ranks)}"
        within = sum(self.share(t) * t.energy for t in factors) / (sum(map(self.share, factors)) or 1.0)
        lines = [
            f"{len(factors)} matrices as factors of {span}, which keep {within:.1%} of the energy of their "
            "change",
            f"{count_of(len(saved), 'tensor')} saved as they are"
            + (f", {format_size(sum(t.bytes for t in saved))}" if saved else ""),
            f"{count_of(len(left), 'changed tensor')} left out, {sum(map(self.share, left)):.2%} of the energy of the "
            "change" + (f", and {len(self.unmatched)} without a counterpart" if self.unmatched else ""),
            f"{len(self.of('unchanged'))} tensors did not change",
            f"energy kept in total {self.energy:.2%}, relative error {self.error:.4f}"
            + (", verified" if self.is_verified else ""),
            f"adapter {format_size(self.byte_size)}, {self.byte_size / max(self.base_bytes, 1):.2%} of the "
            "base",
        ]
        return lines

    def worst(self) -> list[ExtractedTensor]:
        """Return the changed tensors, those that lose most of the whole change first."""
        lossy = [t for t in self.tensors if t.left > 0 and t.change > 0]
        return sorted(lossy, key=lambda t: (-t.left, t.name))


def card_text(extraction: Extraction, tuned: str, base: str) -> str:
    """Return the card without its front matter. ``tuned`` and ``base`` are names that may be published."""
    lines = [
        f"# {tuned} as a LoRA adapter of {base}",
        "",
        f"Extracted with alnico {__version__}: the leading singular vectors of fine-tune minus base.",
        "",
        *(f"- {line}" for line in extraction.summary()),
        "",
        "Energy is the sum of the squares of fine-tune minus base. The tensors that lose most:",
        "",
        "| tensor | as | rank | energy kept | share of the change |",
        "|---|---|---|---|---|",
    ]
    for t in extraction.worst()[:SHOWN]:
        lines.append(
            f"| {t.name} | {t.treatment} | {t.rank or '-'} | {t.energy:.2%} | {extraction.share(t):.3%} |"
        )
    options = " ".join(f"`{key}: {value}`" for key, value in extraction.options.items())
    lines += ["", f"`extraction.json` lists all tensors. Options: {options}.", ""]
    return "\n".join(lines)


def _length(lengths: Any) -> float:
    return math.sqrt(math.fsum(float(x) ** 2 for x in lengths))
