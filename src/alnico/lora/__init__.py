"""Folds LoRA adapters into their base, combines adapters, and extracts them from fine-tunes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from alnico._package import make_lazy

if TYPE_CHECKING:
    from alnico.lora.combine import Combined as Combined
    from alnico.lora.combine import combine as combine
    from alnico.lora.extract import extract as extract
    from alnico.lora.extract_result import Extraction as Extraction
    from alnico.lora.fold import fold as fold
    from alnico.lora.triples import Triples as Triples

__all__ = make_lazy(
    __name__,
    {
        "alnico.lora.combine": ["Combined", "combine"],
        "alnico.lora.extract": ["extract"],
        "alnico.lora.extract_result": ["Extraction"],
        "alnico.lora.fold": ["fold"],
        "alnico.lora.triples": ["Triples"],
    },
)
