"""Makes kernels of their texts by numba-cuda, and keeps them for the process

They are kept by their text, as a method creates its equation again for every merge, and not on disk: a GPU is used for
much work, and compiling takes about a second per kernel.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

MOST_TEXTS = 1024
"""Compiled kernels that are kept."""

_compiling = threading.Lock()


def compiled(text: str) -> Any:
    """Return the kernel of a text, for any GPU; numba-cuda compiles it when it is first launched there."""
    with _compiling:
        return _compiled(text)


@functools.lru_cache(maxsize=MOST_TEXTS)
def _compiled(text: str) -> Any:
    from alnico.kernels.cuda import elements

    names = {**vars(elements), "__name__": "alnico_gpu_kernel"}
    exec(compile(text, "<alnico gpu kernel>", "exec"), names)
    if elements.SIMULATED:  # its threads have numpy's defaults, which warn of overflows
        quiet = "def quiet(*arguments):\n    with np.errstate(all='ignore'):\n        run(*arguments)\n"
        exec(compile(quiet, "<alnico gpu kernel>", "exec"), names)
        return elements.jit(names["quiet"])
    return elements.jit(names["run"])
