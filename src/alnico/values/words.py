"""Says in the words of Python what a plan of models in memory refuses in the words of a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from alnico.errors import MismatchError
from alnico.plan.tensor_matching import OR_MISSING

IN_PYTHON = ', or pass missing="copy" or missing="drop".'


@contextmanager
def in_words_of_python() -> Iterator[None]:
    """Name the argument ``missing`` where a message names the key of a recipe."""
    try:
        yield
    except MismatchError as error:
        lines = [str(line).replace(OR_MISSING, IN_PYTHON) for line in error.args]
        if lines == [str(line) for line in error.args]:
            raise
        raise MismatchError(*lines) from None
