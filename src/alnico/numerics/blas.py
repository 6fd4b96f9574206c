"""One thread for BLAS while whole matrices are worked on, by threads of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Keep the linear algebra of numpy to the thread that calls it, in this process, until the end of the
    block.

    Results then depend on no number of threads, and threads of ours do not wait for one another's: two that
    each call for all processors took up to ten times as long on a busy machine.
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, user_api="blas"):
        yield
