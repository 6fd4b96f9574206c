"""GGUF models at URLs: their headers are read, then weights by ranges, and merges are those of the files here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_remote_models import contents

import alnico
from alnico.errors import ModelError
from counting_folder import ADDRESS, Elsewhere
from made_gguf import gguf_bytes, save_small, small_keys, small_tensors


def save_split(folder: Path) -> None:
    folder.mkdir(parents=True)
    names = list(small_tensors())
    for i, part in enumerate((names[:4], names[4:])):
        keys = (small_keys() if i == 0 else {}) | {"split.count": 2}
        data = gguf_bytes(keys, {n: small_tensors()[n] for n in part})
        (folder / f"m-0000{i + 1}-of-00002.gguf").write_bytes(data)


@pytest.mark.parametrize("file", ["m.gguf", "split/m-00002-of-00002.gguf"])
def test_a_merge_of_a_model_at_a_url_is_that_of_the_file(
    elsewhere: Elsewhere, tmp_path: Path, file: str
) -> None:
    save_small(elsewhere.root / "m.gguf")
    save_split(elsewhere.root / "split")
    for out, reference in (("there", f"{ADDRESS}/{file}"), ("here", f"{elsewhere.root}/{file}")):
        alnico.merge({"merge_method": "linear", "models": [reference]}, tmp_path / out)
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    assert "config.json" in contents(tmp_path / "here")


def test_opening_reads_the_header_alone(elsewhere: Elsewhere) -> None:
    tensors = small_tensors(token_embd__weight=(0, (6, 8), np.zeros((6, 8), "<f4").tobytes()))
    (elsewhere.root / "m.gguf").write_bytes(gguf_bytes(small_keys(), tensors))
    with alnico.open_model(f"{ADDRESS}/m.gguf") as model:
        before = sum(size for _, size in elsewhere.reads["/m.gguf"])
        q = model.read("model.layers.0.self_attn.q_proj.weight")
        after = sum(size for _, size in elsewhere.reads["/m.gguf"])
        assert after - before == q.nbytes
        assert model.directory is not None
        assert (model.directory / "config.json").is_file()
    assert before > 0


def test_a_missing_file_is_named(elsewhere: Elsewhere) -> None:
    save_split(elsewhere.root / "split")
    (elsewhere.root / "split" / "m-00001-of-00002.gguf").unlink()
    for url, told in (
        (f"{ADDRESS}/n.gguf", "there is no such file; expected the file of a model. Check the URL."),
        (
            f"{ADDRESS}/split/m-00002-of-00002.gguf",
            "is one of 2 files of a model; 1 of the others are missing",
        ),
    ):
        with pytest.raises(ModelError, match=told):
            alnico.open_model(url)
