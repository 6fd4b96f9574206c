"""Draws docs/pictures/curve.png and barrier.png, each light and dark, for docs/how-to/curve.md.

python docs/make_curve_pictures.py DIR

DIR is a folder of benchmarks/quality, which fetches the texts and trains the specialists there. It needs the
extras [eval] and [report], and what benchmarks/quality needs. It can be stopped and run again.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path

import alnico

ROOT = Path(__file__).parent.parent
PICTURES = ROOT / "docs" / "pictures"

TASKS, EXAMPLES = ("r8", "bbc", "langid", "ng20"), 512
"""Of the specialists, and the texts that each is trained on."""

ENDS = ("ng20", "langid")
"""The specialists between which the path is drawn."""

MOST_BYTES = 150_000


def main() -> None:
    """Train what is missing, score the points that are missing, and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("work", type=Path, help="where everything is kept")
    work = parser.parse_args().work.resolve()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from quality.bench import Bench
    from quality.specialists import Training

    with Bench(work, TASKS, Training(examples=EXAMPLES)) as bench:
        bench.prepare()
    PICTURES.mkdir(exist_ok=True)
    with contextlib.chdir(work):  # the pictures then name the models without a folder of this machine
        tasks = "tasks/validation.yml"
        curve = alnico.curve(
            "base", [f"specialists/{name}" for name in TASKS], tasks, out="curve", watch=print
        )
        ends = [f"specialists/{name}" for name in ENDS]
        path = alnico.curve("base", ends, tasks, path=True, scale="0:1:0.1", out="path", watch=print)
    for name, drawn in (("curve", curve), ("barrier", path)):
        for ending, dark in (("", False), ("-dark", True)):
            write_small(drawn.plot(dark=dark), PICTURES / f"{name}{ending}.png")


def write_small(figure: object, path: Path) -> None:
    """Write a picture. Errors: SystemExit if it is too large for a page."""
    from alnico.analysis.charts import write_png

    write_png(figure, path)
    if (size := path.stat().st_size) > MOST_BYTES:
        raise SystemExit(f"{path}: {size:,} bytes; expected at most {MOST_BYTES:,}. Draw fewer lines.")


if __name__ == "__main__":
    main()
