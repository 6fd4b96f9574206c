"""Keeps what was drawn in tensors, so that later merges with the same seed and chances only read it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable

import numpy as np

from alnico.checkpoint.resident_model import SharedBudget
from alnico.engine.kernel_arguments import Draws

MOST_REQUESTS = 20_000
"""Most requests that are remembered; the least recent one goes first."""


class DrawStore:
    """Draws in memory, a bit for each model and element, within a budget: call :meth:`begin` before each merge. Safe for threads.

    Draws are kept from the second request on: a search that tries a new density each time would only fill memory.
    What neither this merge nor the one before has used leaves if there is no room, the least recently used first; what one of
    them has used stays, as merges use the same draws in the same order.
    """

    def __init__(self, room: SharedBudget) -> None:
        self._room = room
        self._kept: OrderedDict[Hashable, Draws] = OrderedDict()
        self._used: dict[Hashable, int] = {}
        self._requests: OrderedDict[Hashable, None] = OrderedDict()
        self._merge = 0
        self._lock = threading.Lock()

    def begin(self) -> None:
        """Begin a merge."""
        self._merge += 1

    def draws(self, key: Hashable, models: int, words: int) -> Draws | None:
        """Return the draws of a tensor, or room for them; None at the first request, and where there is no room.

        Whoever has drawn all of them notes that they are known. Only one merge runs at a time.
        """
        with self._lock:
            if key not in self._kept:
                if not self._is_repeated(key) or not self._make_room(8 * models * words):
                    return None
                self._kept[key] = Draws(np.empty((models, words), np.uint64), stay=True)
            self._kept.move_to_end(key)
            self._used[key] = self._merge
            return self._kept[key]

    def _is_repeated(self, key: Hashable) -> bool:
        is_repeated = key in self._requests
        self._requests[key] = None
        self._requests.move_to_end(key)
        if len(self._requests) > MOST_REQUESTS:
            self._requests.popitem(last=False)
        return is_repeated

    def _make_room(self, byte_size: int) -> bool:
        while not self._room.take(byte_size):
            oldest = next(iter(self._kept), None)
            if oldest is None or self._used[oldest] >= self._merge - 1:
                return False
            self._room.give(self._kept.pop(oldest).words.nbytes)
            del self._used[oldest]
        return True
