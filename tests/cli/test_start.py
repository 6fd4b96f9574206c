"""What a small merge imports: time is not asserted, modules are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from made import family

SHOWN = """
import os, sys
from alnico.cli import entry
entry.os._exit = lambda code: None
sys.argv = ["alnico", "merge", sys.argv[1], "out", "--quiet"]
entry.command()
os.write(1, "\\n".join(sorted(sys.modules)).encode())
"""

MOST_MODULES = 246
"""Modules of alnico that a merge of small models imports, and a few more."""

HEAVY = (
    "numba",
    "llvmlite",
    "torch",
    "transformers",
    "rich",
    "huggingface_hub",
    "tokenizers",
    "ray",
    "scipy",
    "typer",
    "pydantic",
)
"""Libraries that it does not need: numpy runs kernels with little work."""


def test_a_small_merge_imports_what_it_uses(tmp_path: Path) -> None:
    base, tuned = family(tmp_path, 2, layers=1, hidden=32)
    recipe = tmp_path / "recipe.yml"
    models = "".join(f"  - model: {path}\n" for path in tuned)
    recipe.write_text(f"merge_method: ties\nbase_model: {base}\nmodels:\n{models}")
    ended = subprocess.run(
        [sys.executable, "-c", SHOWN, str(recipe)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    modules = set(ended.stdout.split("\n"))
    assert (tmp_path / "out" / "config.json").exists()
    assert not {name.partition(".")[0] for name in modules} & set(HEAVY)
    unused = (
        "alnico.cluster",
        "alnico.engine.cluster_merge",
        "alnico.engine.node_merge",
        "alnico.evaluation",
        "alnico.tune",
        "alnico.store",
    )
    assert not [name for name in modules if name.startswith(unused)]
    methods = {name for name in modules if name.startswith("alnico.methods.") and ".shared" not in name}
    assert methods == {"alnico.methods.base", "alnico.methods.ties"}
    assert sum(name.startswith("alnico") for name in modules) <= MOST_MODULES
