"""The reader in docs/task-vector-format.md reads what alnico reads, and the page names what the format has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from alnico.checkpoint.open_model import open_model
from alnico.checkpoint.source import read_tensor
from alnico.checkpoint.task_vectors.manifest import PARTS
from alnico.checkpoint.task_vectors.manifest_schema import manifest_schema
from made import save_model
from made_vectors import random_pair, write_vector

PAGE = (Path(__file__).parents[2] / "docs" / "task-vector-format.md").read_text("utf-8")


def reader() -> Any:
    found = re.search(r"<!-- the reader -->\n```python\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    code = found[1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 26
    names: dict[str, Any] = {}
    exec(compile(code, "docs/task-vector-format.md", "exec"), names)
    return names["read_vector"]


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "F64"])
@pytest.mark.parametrize("shards", [1, 2])
def test_the_readers_of_the_page_and_of_alnico_agree(tmp_path: Path, shards: int, dtype: str) -> None:
    shapes = {
        "a.weight": (30, 31),
        "b.weight": (4, 6, 5),
        "c.bias": (13,),
        "d.weight": (7, 9),
        "e.weight": (3, 4),
        "f.weight": (5, 6),
    }
    base, tuned = random_pair(np.random.default_rng(0), shapes, dtype, changed=0.1)
    tuned["c.bias"] = base["c.bias"]
    tuned["new.weight"] = (dtype, np.ones((2, 2), np.float32))
    kinds = ("sparse", "difference", "absent", "difference F16", "whole", "difference BF16")
    encodings = dict(zip(shapes, kinds, strict=True))
    save_model(tmp_path / "base", base, {})
    write_vector(tmp_path / "vector", base, tuned, {**encodings, "new.weight": "whole"}, shards=shards)
    found = dict(reader()(tmp_path / "vector", load_file(tmp_path / "base" / "model.safetensors")))
    with open_model(f"{tmp_path / 'base'}+{tmp_path / 'vector'}") as model:
        assert found.keys() == model.tensors.keys()
        for name, values in found.items():
            ours, theirs = read_tensor(model, name), values.double().numpy()
            np.testing.assert_allclose(theirs, ours, rtol=2e-7, atol=1e-8)
            if not encodings.get(name, "").startswith("difference"):
                assert str(values.dtype) == {
                    "F64": "torch.float64",
                    "F32": "torch.float32",
                    "F16": "torch.float16",
                }.get(dtype, "torch.bfloat16")
                np.testing.assert_array_equal(theirs, ours)


def test_the_page_has_every_encoding_part_and_key() -> None:
    for encoding, parts in PARTS.items():
        row = re.search(rf"^\| `{encoding}` \|(.*)$", PAGE, re.MULTILINE)
        assert row is not None
        assert all(f"`{part}`" in row[1] for part in parts)
    assert all(f"`{key}`" in PAGE for key in manifest_schema()["properties"])
    assert all(
        f"`{key}`" in PAGE
        for key in manifest_schema()["properties"]["tensors"]["additionalProperties"]["properties"]
    )
