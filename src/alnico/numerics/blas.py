"""Limits BLAS to one thread while worker threads compute on whole matrices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Keep the linear algebra of numpy to the thread that calls it, in this process, until the end of the
    block.

    Results then do not depend on the number of threads, and worker threads do not compete: two that each used
    all processors took up to ten times as long on a busy machine.
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, user_api="blas"):
        yield
