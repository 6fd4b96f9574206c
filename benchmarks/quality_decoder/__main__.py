"""What merges keep of four fine-tunes of a decoder: fetches, parses, trains, merges, scores, and writes the tables.

    python benchmarks/quality_decoder --work DIR --table docs/quality-decoder.md

Needs alnico with [eval] and [dev], about 10 GB in DIR, and pip, apt-get and dpkg-deb to fetch. It can be stopped at any moment and run
again: what is fetched, trained and scored is kept in DIR. Everything that is chosen is chosen on validation rows; test rows are for the
tables alone.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/quality_decoder", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--work", type=Path, required=True, help="where everything is kept")
    parser.add_argument("--table", type=Path, help="the document whose tables are replaced")
    parser.add_argument(
        "--only", choices=("main", "fewer", "shapes"), help="measure these models, and print their rows"
    )
    asked = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    from transformers.utils import logging

    from quality_decoder.bench import Bench
    from quality_decoder.sets import ALL, FEWER, SHAPES, WAYS_OF_SETS
    from quality_decoder.tables import tables, write_tables
    from quality_decoder.ways import SHARES, WAYS, measure_all

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    wanted = {asked.only} if asked.only else {"main", "fewer", "shapes"}
    with Bench(asked.work.resolve()) as bench:
        bench.prepare()
        main_rows = measure_all(bench, ALL, WAYS, SHARES) if "main" in wanted else {}
        fewer, shapes = (
            {models: measure_all(bench, models, WAYS_OF_SETS) for models in sets} if name in wanted else {}
            for name, sets in (("fewer", FEWER), ("shapes", SHAPES))
        )
        if asked.only is None:
            found = tables(bench, main_rows, fewer, shapes)
            print(found["results"])
            if asked.table:
                write_tables(found, asked.table)


if __name__ == "__main__":
    main()
