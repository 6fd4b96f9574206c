"""Uses transformers and torch without their progress bars, notes and questions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

from alnico.installation import import_extra

Precision = Literal["float32", "bfloat16"]
"""The precision in which a task computes."""


@contextmanager
def quiet_transformers() -> Iterator[Any]:
    """Yield transformers without progress bars, notes and questions; the settings are restored at the end.

    If a call inside transformers does not say whether a model's code may run, transformers asks on standard input; with
    a timeout of 0 it refuses. Errors: AlnicoError.
    """
    transformers = import_extra("transformers", "a transformers checkpoint", "eval")
    logging = transformers.utils.logging
    level, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    # Its error logs quote values of configs with newlines; real failures also raise exceptions.
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    asking = transformers.dynamic_module_utils
    seconds = asking.TIME_OUT_REMOTE_CODE
    asking.TIME_OUT_REMOTE_CODE = 0
    try:
        yield transformers
    finally:
        asking.TIME_OUT_REMOTE_CODE = seconds
        logging.set_verbosity(level)
        if has_bars:
            logging.enable_progress_bar()


def computing_in(precision: Precision, device: Any) -> AbstractContextManager[Any]:
    """Return a context in which torch multiplies matrices in bfloat16, or one without effect."""
    torch = import_extra("torch", "a task", "eval")
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()
