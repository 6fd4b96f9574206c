"""Finds the kind of module that a config names, and the part of a module that a task needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alnico.errors import EvaluationError
from alnico.evaluation.loading import article
from alnico.evaluation.tasks import ModelKind


def kind_of_config(config: Mapping[str, Any]) -> ModelKind:
    """Return the kind of the module that a config names in its ``architectures``.

    >>> kind_of_config({"architectures": ["LlamaForCausalLM"]}), kind_of_config({})
    ('causal', 'encoder')
    """
    named = config.get("architectures")
    first = str(named[0]) if isinstance(named, list) and named else ""
    if first.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal"
    return "classifier" if first.endswith(("SequenceClassification", "ImageClassification")) else "encoder"


def part_of_kind(module: Any, kind: ModelKind, label: str) -> Any:
    """Return the part of a module that a task needs. Errors: EvaluationError if it has none."""
    return given_kind(_part(module, kind), kind, label)


def given_kind(module: Any, kind: ModelKind, label: str) -> Any:
    if module is None:
        raise EvaluationError(
            f"{label}: contains no {kind}; a task needs {article(kind)}. Give such a module."
        )
    return module


def _part(module: Any, kind: ModelKind) -> Any:
    """Return the part of a module of a kind, or None."""
    name = type(module).__name__
    if not hasattr(module, "base_model"):
        return module
    if kind == "encoder":
        return module.base_model
    words = ("Classification",) if kind == "classifier" else ("CausalLM", "LMHead")
    return module if any(word in name for word in words) else None
