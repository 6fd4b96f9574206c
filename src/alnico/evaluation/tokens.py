"""Caches what a task computes from its texts with a tokenizer, once per tokenizer."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import xxhash

from alnico.errors import AlnicoError
from alnico.evaluation.tasks import evaluation_failed

Tokenised = TypeVar("Tokenised")


class ForEachTokenizer(Generic[Tokenised]):
    """Caches the result of ``make`` per tokenizer; tokenizers read from equal files share it."""

    def __init__(self, make: Callable[[Any], Tokenised]) -> None:
        self._make = make
        self._digests: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
        self._cache: dict[str, Tokenised] = {}

    def of(self, tokenizer: Any, where: str) -> Tokenised:
        """Return the result for a tokenizer. Errors: EvaluationError, starting with ``where``, if it raises."""
        with named_failures(where):
            digest = self._digests.get(tokenizer)
            if digest is None:
                digest = self._digests[tokenizer] = _digest(tokenizer)
            if digest not in self._cache:
                self._cache[digest] = self._make(tokenizer)
        return self._cache[digest]


@contextmanager
def named_failures(where: str) -> Iterator[None]:
    """Turn exceptions of a tokenizer into an error of the evaluation. Errors: EvaluationError."""
    try:
        yield
    except AlnicoError:
        raise
    except Exception as error:  # the tokenizers package raises Exception itself
        raise evaluation_failed(where, error) from error


def _digest(tokenizer: Any) -> str:
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:
        return f"object {id(tokenizer)}"
    # Padding and truncation are those of its last call.
    settings = json.loads(fast.to_str()) | {"padding": None, "truncation": None}
    return xxhash.xxh3_128_hexdigest(
        f"{tokenizer.pad_token_id} {tokenizer.model_max_length} {json.dumps(settings)}".encode()
    )
