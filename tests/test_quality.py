"""The testbed in small: four real tasks, fetched, parsed, trained, merged and scored; only what is far from noise is asserted."""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

TASKS = ("bbc", "senti", "wnlex", "langid")
"""Tasks whose texts come from Python's and Debian's archives: no npm is needed."""


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Two threads of torch beside another worker's tests wait for one another most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_merging_keeps_of_four_specialists_more_than_averaging_and_less_than_they_are(tmp_path: Path) -> None:
    from quality.bench import Bench
    from quality.results import measure, scores_of
    from quality.specialists import Training
    from quality.tables import results_table
    from quality.ways import WAYS, Way, fixed

    ways = [way for way in WAYS if way.name in ("base", "average")]
    ways.append(Way("arithmetic", fixed(lambda bench: bench.sum("task_arithmetic", scale=0.4))))
    with Bench(tmp_path, TASKS, Training(examples=512), {"validation": 50, "test": 250}) as bench:
        bench.prepare()
        found = measure(bench, ways)
    print(results_table(found["rows"]))
    means = {row["name"]: statistics.mean(score.value for score in scores_of(row).values()) for row in found["rows"]}
    in_order = [means[name] for name in ("base", "average", "arithmetic", "specialists")]
    assert all(after > before + 0.03 for before, after in itertools.pairwise(in_order)), means
