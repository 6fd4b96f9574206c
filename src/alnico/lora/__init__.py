"""LoRA adapters: folded into their base, combined without it, extracted from fine-tunes."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alnico.lora.combining import Combined, combine
    from alnico.lora.extracting import extract
    from alnico.lora.extraction import Extraction
    from alnico.lora.folding import fold

_PLACES = {
    "Combined": "alnico.lora.combining",
    "Extraction": "alnico.lora.extraction",
    "combine": "alnico.lora.combining",
    "extract": "alnico.lora.extracting",
    "fold": "alnico.lora.folding",
}

__all__ = ["Combined", "Extraction", "combine", "extract", "fold"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'alnico.lora' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = globals()[name] = getattr(importlib.import_module(_PLACES[name]), name)
    return value
