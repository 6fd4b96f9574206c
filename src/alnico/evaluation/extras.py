"""Packages that only some of this room needs, and how they are installed."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

from alnico.errors import AlnicoError

Precision = Literal["float32", "bfloat16"]
"""In what a task computes."""


def import_extra(module: str, purpose: str, extra: str) -> Any:
    """Return a module that comes with an extra of alnico. Errors: AlnicoError, saying how it is installed.

    >>> import_extra("json", "an example", "eval").dumps([1])
    '[1]'
    """
    try:
        return importlib.import_module(module)
    except ValueError as error:  # of a variable of the environment, HF_HUB_DOWNLOAD_TIMEOUT=abc
        raise AlnicoError(
            f"{purpose} needs {module}, which cannot be imported ({error}). Check the variables of the environment, such as HF_HUB_DOWNLOAD_TIMEOUT."
        ) from None
    except ImportError as error:
        package = (error.name or module).partition(".")[0]
        raise AlnicoError(
            f"{purpose} needs {package}, which is not installed. Say: pip install 'alnico[{extra}]'"
        ) from None


@contextmanager
def quiet_transformers() -> Iterator[Any]:
    """transformers without its progress bars, notes and questions, as they were before when this ends. Errors: AlnicoError.

    A call inside transformers that is not told whether code of a model may run asks on standard input; with no time to answer it refuses.
    """
    transformers = import_extra("transformers", "a transformers checkpoint", "eval")
    logging = transformers.utils.logging
    level, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(
        logging.CRITICAL
    )  # its errors quote values of configs as they are, with newlines; what fails raises, too
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
    """A context in which torch multiplies matrices in bfloat16, or nothing."""
    torch = import_extra("torch", "a task", "eval")
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()
