"""The recipe as a value: what a YAML file or a mapping says, checked and in alnico's own terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Value = float | bool | str

Missing = Literal["error", "copy", "drop"]


@dataclass(frozen=True)
class ModelEntry:
    """One model of the recipe with the options given under it."""

    reference: str
    parameters: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenSource:
    """Where the row of one token comes from: a model's row of it, another token's row, zeros; None leaves it to the rule."""

    kind: Literal["model", "model_token", "zero"] | None = None
    model: str = ""
    token: str | None = None
    token_id: int | None = None
    force: bool = False
    """For every model, also those that have the token."""


@dataclass(frozen=True)
class TokenizerSetting:
    """The output's vocabulary: the ``union`` of all, ``base``, or that of the model of this reference."""

    source: str = "union"
    tokens: Mapping[str, TokenSource] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None


@dataclass(frozen=True)
class Recipe:
    """What is asked. Options have alnico's names; ``notes`` tell what was accepted and means nothing.

    ``dtype`` is the output dtype (``out_dtype`` of the file wins over ``dtype``), as the safetensors format calls it, or
    None for the promotion of the inputs' dtypes. ``folder`` is the directory of the recipe's file: a model that is not found
    from the working directory is looked for there.
    """

    merge_method: str
    models: tuple[ModelEntry, ...]
    base_model: str | None = None
    parameters: Mapping[str, Value] = field(default_factory=dict)
    dtype: str | None = None
    seed: int = 0
    missing: Missing = "error"
    notes: tuple[str, ...] = ()
    name: str = "recipe"
    folder: str = "."
    text: str = field(default="", compare=False)
    """The YAML it was read from, if it was."""
    written_seed: int = field(default=0, compare=False)
    """The seed in that YAML; ``seed`` may come from the command line."""

    @property
    def merged(self) -> tuple[ModelEntry, ...]:
        """The models besides the base."""
        return tuple(m for m in self.models if m.reference != self.base_model)

    @property
    def references(self) -> tuple[str, ...]:
        """The models and the base, each once, in the order of ``Plan.sources``."""
        return tuple(dict.fromkeys([*(m.reference for m in self.models), *([self.base_model] if self.base_model else [])]))

    def canonical(self) -> dict[str, Any]:
        """Return the recipe as plain data; equal recipes give equal data."""
        return {
            "merge_method": self.merge_method,
            "models": [
                {"model": m.reference, **({"parameters": dict(sorted(m.parameters.items()))} if m.parameters else {})}
                for m in self.models
            ],
            **({"base_model": self.base_model} if self.base_model else {}),
            **({"parameters": dict(sorted(self.parameters.items()))} if self.parameters else {}),
            **({"dtype": self.dtype} if self.dtype else {}),
            **({"missing": self.missing} if self.missing != "error" else {}),
            "seed": self.seed,
        }
