"""Whatever stands under a key of config.json: a plan, an inspection and a layer stack are made, or end in an error of alnico."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import alnico
from alnico.errors import AlnicoError
from made import family, llama_config
from made_tokenizers import letters, save_tokenizer, special
from test_house import SOURCE

ODD: tuple[Any, ...] = (5, -1, "x", True, [], [1], [None], {}, {"a": 5}, 1e308)
KEYS = sorted(
    {
        key
        for room in ("checkpoint", "plan", "vocabulary", "engine")
        for path in (SOURCE / room).rglob("*.py")
        for key in re.findall(r"(?:config|settings|text|held|of_model)\.get\(\"(\w+)\"", path.read_text())
    }
    | set(llama_config())
)


VOCABULARY = (letters()[0], special(), letters()[1])


@pytest.mark.parametrize("key", KEYS)
def test_odd_values_end_in_errors_of_alnico(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    family(tmp_path, 1, layers=2)
    family(tmp_path / "untied", 0, layers=2, tied=False)
    for name in ("untied/base", "tuned-0"):
        save_tokenizer(Path(name), *VOCABULARY)
    plain = json.loads(Path("tuned-0/config.json").read_text())
    stack = [
        {"sources": [{"model": "tuned-0", "layer_range": [0, 1]}]},
        {"sources": [{"model": "tuned-0", "layer_range": [0, 2]}]},
    ]
    recipes: list[dict[str, Any]] = [
        {"merge_method": "linear", "models": ["tuned-0", "base"]},
        {"merge_method": "linear", "models": ["untied/base", "tuned-0"], "tokenizer": {"source": "union"}},
        {"merge_method": "passthrough", "slices": stack},
    ]
    for value in ODD:
        Path("tuned-0/config.json").write_text(json.dumps({**plain, key: value}))
        for recipe in recipes:
            try:
                alnico.plan(recipe)
            except AlnicoError:
                pass
            except Exception as error:
                raise AssertionError(f"{key}: {value!r} in {recipe}") from error
