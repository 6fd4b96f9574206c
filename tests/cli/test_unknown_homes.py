"""A path below the home of a user who is not there is a path to nothing, wherever it stands: an error of its class."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from made import family

NOWHERE = "~nosuchuser/x"
Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("inspect", NOWHERE), 4),
        (("inspect", f"base+{NOWHERE}"), 4),
        (("diff", "base", NOWHERE), 4),
        (("analyze", NOWHERE, "--base", "base"), 4),
        (("verify", NOWHERE), 8),
        (("lora", "fold", "base", NOWHERE, "out"), 4),
        (("plan", "linear.json"), 4),
        (("plan", "fisher.json"), 4),
        (("plan", "weights.json"), 4),
        (("plan", "tokenizer.json"), 4),
        (("evaluate", "base", "--tasks", "tasks.json"), 12),
    ],
)
def test_it_is_named(
    words: tuple[str, ...], code: int, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    family(tmp_path, 2, layers=1)
    pair = ["tuned-0", "base"]
    recipes = {
        "linear": {"merge_method": "linear", "models": [NOWHERE, "base"]},
        "fisher": {
            "merge_method": "fisher",
            "models": [{"model": m, "parameters": {"fisher": NOWHERE}} for m in pair],
        },
        "weights": {
            "merge_method": "task_arithmetic",
            "base_model": "base",
            "models": [
                {"model": m, "parameters": {"weight": {"from": "analysis", "path": NOWHERE}}}
                for m in ("tuned-0", "tuned-1")
            ],
        },
        "tokenizer": {"merge_method": "linear", "models": pair, "tokenizer_source": NOWHERE},
        "tasks": {"tasks": [{"name": "t", "type": "classification", "data": NOWHERE}]},
    }
    for name, recipe in recipes.items():
        Path(f"{name}.json").write_text(json.dumps(recipe))
    found, _, stderr = run(*words)
    assert found == code, stderr
    assert NOWHERE in " ".join(stderr.split())
