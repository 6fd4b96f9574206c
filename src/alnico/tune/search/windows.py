"""Finds the score of every window of layers that a search repeated, for its heat map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from alnico.tune.search.objective import is_better
from alnico.tune.search.result import SearchResult
from alnico.tune.search.samplers.request import Trial
from alnico.tune.search.stack import FROM, LENGTH


@dataclass(frozen=True)
class WindowScores:
    """The best value of each window that was tried: ``values[i][j]`` is that of length ``lengths[i]`` from layer ``firsts[j]``."""

    firsts: tuple[int, ...]
    lengths: tuple[int, ...]
    values: tuple[tuple[float | None, ...], ...]

    @property
    def found(self) -> list[float]:
        return [v for row in self.values for v in row if v is not None]

    def ranked(self, goal: str) -> list[tuple[int, int, float]]:
        """First layer, length and value of each window, the best first."""
        each = [
            (first, length, value)
            for length, row in zip(self.lengths, self.values, strict=True)
            for first, value in zip(self.firsts, row, strict=True)
            if value is not None
        ]
        return sorted(each, key=lambda w: -w[2] if goal == "max" else w[2])


def window_scores(result: SearchResult, which: int = 0) -> WindowScores | None:
    """Return the scores of the windows in an objective; None if first layers and lengths were not both searched."""
    if not {FROM, LENGTH} <= {*result.dimensions}:
        return None
    best: dict[tuple[int, int], float] = {}
    for trial in _complete(result.trials):
        place, value = (int(trial.point[FROM]), int(trial.point[LENGTH])), trial.values[which]
        if place not in best or is_better(value, best[place], result.objectives[which].goal):
            best[place] = value
    if not best:
        return None
    firsts, lengths = (range(min(those), max(those) + 1) for those in zip(*best, strict=True))
    rows = tuple(tuple(best.get((first, length)) for first in firsts) for length in lengths)
    return WindowScores(tuple(firsts), tuple(lengths), rows)


def _complete(trials: Sequence[Trial]) -> list[Trial]:
    return [t for t in trials if t.state == "complete"]
