"""Threads that parse the source of methods at the same time do not disturb one another."""

from __future__ import annotations

import gc
import time
from concurrent.futures import ThreadPoolExecutor

from alnico.kernels.parse import parse

TEXT = "def mix(x):\n" + "".join(
    f"    y{i} = ((((x + {i}) * 2) - (x / 3)) ** 2) if x > {i} else -x\n" for i in range(200)
)


def test_threads_may_parse_at_the_same_time() -> None:
    collects = gc.get_threshold()
    gc.set_threshold(10)

    def let_others_run(*_: object) -> None:
        time.sleep(0)

    gc.callbacks.append(let_others_run)  # the collector calls it in the middle of a tree
    try:
        with ThreadPoolExecutor(4) as pool:
            trees = list(pool.map(lambda _: parse(TEXT), range(40)))
    finally:
        gc.callbacks.remove(let_others_run)
        gc.set_threshold(*collects)
    assert {len(tree.body[0].body) for tree in trees} == {200}  # type: ignore[attr-defined]
