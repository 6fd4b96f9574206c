"""An output without tensors is an error, and nothing advises it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import alnico
from alnico.errors import MismatchError
from made import read_file, save_file

Run = Callable[..., tuple[int, str, str]]


def save(path: Path, names: list[str], value: float = 1.0, **buffers: np.ndarray) -> str:
    tensors = {n: ("F32", np.full((4, 4), value)) for n in names} | {
        n: ("I64", v) for n, v in buffers.items()
    }
    return str(save_file(path, tensors))


def pair(folder: Path, one: list[str], other: list[str], **buffers: np.ndarray) -> dict[str, Any]:
    models = [
        save(folder / "a.safetensors", one, 1.0, **buffers),
        save(folder / "b.safetensors", other, 3.0, **buffers),
    ]
    return {"merge_method": "linear", "models": models, "unrelated": "allow"}


NOTHING = r"^the output would have no tensors: no weight is in all models, and missing: drop removes the others \(first: "


def test_dropping_everything_is_refused_on_disk_and_by_the_command(tmp_path: Path, run: Run) -> None:
    recipe = {**pair(tmp_path, ["x.w", "x.v"], ["other.q", "third.r"]), "missing": "drop"}
    for call in (
        alnico.plan,
        lambda r: alnico.merge(r, tmp_path / "out"),
        lambda r: alnico.merge(r, tmp_path / "out.safetensors"),
    ):
        with pytest.raises(MismatchError, match=NOTHING):
            call(recipe)
    (tmp_path / "r.yml").write_text(
        f"merge_method: linear\nmodels: [{tmp_path}/a.safetensors, {tmp_path}/b.safetensors]\nmissing: drop\nunrelated: allow\n"
    )
    code, _, said = run("merge", str(tmp_path / "r.yml"), str(tmp_path / "out"))
    assert code == 5
    assert "the output would have no tensors" in said
    assert not list(tmp_path.glob("*out*"))


def test_dropping_everything_is_refused_in_memory() -> None:
    one, other = {"x.w": np.ones((4, 4))}, {"other.q": np.ones((4, 4))}
    with pytest.raises(MismatchError, match=NOTHING):
        alnico.merge_state_dicts([one, other], missing="drop")
    with pytest.raises(MismatchError, match=NOTHING):
        alnico.merge_state_dicts([one], "task_arithmetic", base=other, missing="drop")


def test_dropping_everything_is_refused_in_a_stage(tmp_path: Path) -> None:
    given = pair(tmp_path, ["x.w", "x.v"], ["other.q", "third.r"])
    a, b = given["models"]
    text = (
        f"name: nothing\nmerge_method: linear\nmodels: [{a}, {b}]\nmissing: drop\nunrelated: allow\n---\n"
        f"merge_method: linear\nmodels: [nothing, {a}]\nunrelated: allow\n"
    )
    (tmp_path / "r.yml").write_text(text)
    with pytest.raises(MismatchError, match=NOTHING):
        alnico.merge_documents(tmp_path / "r.yml", tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_an_output_of_buffers_alone_is_refused(tmp_path: Path) -> None:
    recipe = {**pair(tmp_path, ["x.w"], ["other.q"], steps=np.array(3)), "missing": "drop"}
    with pytest.raises(MismatchError, match=r"^the output would have no weights: no weight is in all models"):
        alnico.plan(recipe)
    only = {"steps": np.array(3)}
    assert alnico.merge_state_dicts([only, only])["steps"] == 3


def test_what_all_have_is_merged_and_the_rest_dropped_with_its_reason(tmp_path: Path) -> None:
    recipe = {**pair(tmp_path, ["x.w", "x.v"], ["x.w", "third.r"]), "missing": "drop"}
    alnico.merge(recipe, tmp_path / "out.safetensors")
    assert {n: float(v.mean()) for n, (_, v) in read_file(tmp_path / "out.safetensors").items()} == {
        "x.w": 2.0
    }


def test_dropping_is_not_advised_where_it_leaves_next_to_nothing(tmp_path: Path) -> None:
    names = [f"layers.{i}.w" for i in range(6)]
    with pytest.raises(MismatchError) as caught:
        alnico.plan(pair(tmp_path, ["shared", *names], ["shared", *(f"blocks.{i}.q" for i in range(6))]))
    said = str(caught.value)
    assert "or set missing" not in said
    assert re.search(
        r"\n12 of 13 tensors are not in all models, so missing: drop would leave almost nothing\. Compare the names: one model "
        r"may have a prefix that the others lack\.$",
        said,
    )


def test_dropping_is_advised_where_a_few_are_missing(tmp_path: Path) -> None:
    names = [f"layers.{i}.w" for i in range(6)]
    with pytest.raises(MismatchError, match=r"or set missing: copy or missing: drop in the recipe\.$"):
        alnico.plan(pair(tmp_path, ["extra", *names], names))
