"""What a task makes of its texts with a tokenizer: once for each tokenizer, and kept."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import xxhash

from alnico.errors import AlnicoError
from alnico.evaluation.tasks import evaluation_failed

Made = TypeVar("Made")


class ForEachTokenizer(Generic[Made]):
    """What ``make`` gives for a tokenizer; for one that is read from equal files, the same again."""

    def __init__(self, make: Callable[[Any], Made]) -> None:
        self._make = make
        self._digests: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
        self._made: dict[str, Made] = {}

    def of(self, tokenizer: Any, where: str) -> Made:
        """Errors: EvaluationError, beginning with ``where``, for whatever a tokenizer raises."""
        with named_failures(where):
            digest = self._digests.get(tokenizer)
            if digest is None:
                digest = self._digests[tokenizer] = _digest(tokenizer)
            if digest not in self._made:
                self._made[digest] = self._make(tokenizer)
        return self._made[digest]


@contextmanager
def named_failures(where: str) -> Iterator[None]:
    """What a tokenizer of a stranger raises, as an error of an evaluation. Errors: EvaluationError."""
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
    held = json.loads(fast.to_str()) | {
        "padding": None,
        "truncation": None,
    }  # of its last call, not of its own
    return xxhash.xxh3_128_hexdigest(
        f"{tokenizer.pad_token_id} {tokenizer.model_max_length} {json.dumps(held)}".encode()
    )
