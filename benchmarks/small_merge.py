"""How long a merge of small models takes as a whole process: a made Llama of 0.03 M parameters, a base and three models.

    python benchmarks/small_merge.py --work /tmp/bench                          # linear and ties, and alnico --version, --help
    python benchmarks/small_merge.py --work /tmp/bench --before OTHER/src       # in turn with another source tree

Python must be allowed to write compiled files (without PYTHONDONTWRITEBYTECODE): otherwise it compiles alnico each time.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from made import family
from processes import Run, alternating, cpu, measured, seconds


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--work", type=Path, required=True, help="folder for the models")
    words.add_argument("--runs", type=int, default=11)
    words.add_argument(
        "--before", type=Path, help="the folder src of another version, which runs in turn with this one"
    )
    given = words.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    base, tuned = family(given.work.resolve() / "small-merge", 3)
    out = base.parent / "out"
    models = "".join(f"  - model: {path}\n" for path in tuned)
    commands: dict[str, list[str]] = {}
    for method in ("linear", "ties"):
        recipe = base.parent / f"{method}.yml"
        recipe.write_text(f"merge_method: {method}\nbase_model: {base}\nmodels:\n{models}")
        commands[f"merge, {method}"] = ["merge", str(recipe), str(out), "--quiet"]
    commands |= {"--version": ["--version"], "--help": ["--help"]}
    trees = {"now": Path(__file__).resolve().parents[1] / "src"}
    trees |= {"before": given.before.resolve()} if given.before else {}

    def run(command: list[str], source: Path) -> Run:
        shutil.rmtree(out, ignore_errors=True)
        return measured([sys.executable, "-m", "alnico", *command], source)

    print("| command | version | seconds | CPU s | peak MiB |\n|---|---|---|---|---|")
    for name, command in commands.items():
        programs: dict[str, Callable[[], Run]] = {
            tree: partial(run, command, path) for tree, path in trees.items()
        }
        for tree, runs in alternating(programs, given.runs).items():
            print(
                f"| {name} | {tree} | {seconds(runs)} | {cpu(runs):.2f} | {max(r.peak for r in runs) >> 20} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
