"""Returns the keys of a GGUF header as numbers and text, and refuses values of other types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from alnico.errors import ModelError

MOST = 1 << 31
"""Largest whole number that a key may have."""


class Metadata:
    """The keys of a file. Keys that begin with a dot are those of its family: ``.block_count`` is ``llama.block_count``."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    @property
    def architecture(self) -> str:
        """The family. Errors: ModelError if the file does not state it."""
        return self.text("general.architecture")

    def __contains__(self, key: str) -> bool:
        return self._name(key) in self.values

    def _name(self, key: str) -> str:
        return self.architecture + key if key.startswith(".") else key

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a whole number, not negative. Errors: ModelError if it is another value, or missing without a default."""
        value = self.values.get(self._name(key), default)
        if type(value) is not int or not 0 <= value <= MOST:
            raise self._wrong(key, value, f"an integer from 0 to {MOST}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a number. That of a float32 is the shortest decimal number that rounds to it: 1e-05, not 9.999999747378752e-06.

        Errors: ModelError if it is another value, not finite, or missing without a default.
        """
        value = self.values.get(self._name(key), default)
        if type(value) not in (int, float) or not np.isfinite(np.float32(value)):
            raise self._wrong(key, value, "a finite number")
        return float(str(np.float32(value)))

    def text(self, key: str, default: str | None = None) -> str:
        """Return a text. Errors: ModelError if it is another value, or missing without a default."""
        value = self.values.get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a text")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """Return a bool. Errors: ModelError if it is another value."""
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def texts(self, key: str) -> list[str]:
        """Return an array of strings; an empty list if there is none. Errors: ModelError for another value."""
        value = self.values.get(key, [])
        if not isinstance(value, list):
            raise self._wrong(key, value, "an array of strings")
        return value

    def numbers(self, key: str) -> np.ndarray | None:
        """Return an array of numbers; None if there is none. Errors: ModelError for another value."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, np.ndarray):
            raise self._wrong(key, value, "an array of numbers")
        return value

    def _wrong(self, key: str, value: object, expected: str) -> ModelError:
        name = key if not key.startswith(".") else self.architecture[:80] + key
        found = "missing" if value is None else str(value)[:60]
        return ModelError(
            f"{self.where}: the key {name!r} is {found}; expected {expected}. The file is damaged or incomplete; convert the model again."
        )
