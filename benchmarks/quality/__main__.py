"""What every way of merging keeps of eight specialists: fetches, parses, trains, merges, scores, and writes the tables.

    python benchmarks/quality --work DIR --seeds 0,1,2 --table docs/quality.md

Needs alnico with [eval] and [search], about 1 GB in DIR, and pip, npm, apt-get and dpkg-deb to fetch. It can be stopped at any moment and
run again: what is fetched, trained and scored is kept in DIR. Everything that is chosen is chosen on validation rows; test rows are
for the tables alone.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/quality", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--work", type=Path, required=True, help="where everything is kept")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--core", action="store_true", help="the short table (default)")
    size.add_argument("--full", action="store_true", help="all rows, an hour more a seed")
    parser.add_argument("--tasks", help="names of tasks, with commas between them (default: all eight)")
    parser.add_argument(
        "--examples", type=int, default=1536, help="training examples of a task (default: 1536)"
    )
    parser.add_argument(
        "--seeds",
        default="0",
        help="seeds of the specialists' training, with commas between them (default: 0): the rows of several are means over them",
    )
    parser.add_argument(
        "--ways",
        help="names of rows, with commas between them: only these, and the row that others are compared with",
    )
    parser.add_argument(
        "--continual",
        action="store_true",
        help="also merge the specialists of one seed one by one (included in --full)",
    )
    parser.add_argument(
        "--table", type=Path, help="the document whose tables are replaced, such as docs/quality.md"
    )
    asked = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    from transformers.utils import logging

    from quality.bench import Bench, folder_of
    from quality.continual import MANNERS
    from quality.parse import CORPORA
    from quality.results import measure, over_seeds
    from quality.specialists import Training
    from quality.tables import text_of, write_tables
    from quality.ways import WAYS

    logging.disable_progress_bar()
    tasks = asked.tasks.split(",") if asked.tasks else list(CORPORA)
    names = asked.ways.split(",") if asked.ways else [way.name for way in WAYS if way.is_core or asked.full]
    found = []
    seeds = [int(seed) for seed in asked.seeds.split(",")]
    manners = MANNERS if len(seeds) == 1 and (asked.full or asked.continual) else ()
    for seed in seeds:
        training = Training(examples=asked.examples, seed=seed)
        with Bench(folder_of(asked.work.resolve(), seed), tasks, training) as bench:
            bench.prepare()
            ways = [way for way in WAYS if way.name in names]
            found.append(measure(bench, ways, manners))
    results = over_seeds(found)
    print(text_of(results))
    if asked.table:
        write_tables(results, asked.table)


if __name__ == "__main__":
    main()
