"""The rows of all models' matrices are those that mergekit 0.1.5 gathers: see make_vocabulary.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alnico.checkpoint.open_model import open_model
from alnico.vocabulary.remapped_model import remap_rows
from alnico.vocabulary.tokenizer import read_tokenizer
from made_tokenizers import CASES, EMBED, HEAD, matrix, planned, save_family

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "vocabulary.json").read_text())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_family(tmp_path_factory.mktemp("family"))


@pytest.mark.parametrize("case", CASES)
def test_every_token_has_the_row_that_mergekit_gives_it(
    case: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    expected = GOLDEN[case]
    sources = [open_model(folders[name]) for name in CASES[case]["models"]]
    plan = planned(CASES[case], sources)
    for name, data in plan.files.items():
        (tmp_path / name).write_bytes(data)
    written = read_tokenizer(tmp_path)
    assert written is not None
    assert plan.size == expected["size"]
    for source, row_map, name in zip(sources, plan.rows, CASES[case]["models"], strict=True):
        assert set(written.tokens) == set(expected["rows"][name])
        model = remap_rows(source, sources, (EMBED, HEAD), row_map)
        embed = matrix(model, EMBED)
        np.testing.assert_array_equal(matrix(model, HEAD), embed / 2)
        found = {token: embed[row] for token, row in written.tokens.items()}
        np.testing.assert_allclose(
            [found[t] for t in written.tokens], [expected["rows"][name][t] for t in written.tokens], rtol=1e-7
        )
        for padding in expected["padding"][name]:
            np.testing.assert_allclose(
                embed[len(found) :], np.tile(padding, (plan.size - len(found), 1)), rtol=1e-6
            )
