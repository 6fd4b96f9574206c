"""``alnico store create``: what it prints, and what it leaves in the store."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import alnico
from made import save_file

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALNICO_STORE", str(tmp_path / "store"))
    rng = np.random.default_rng(0)
    base = {
        "layers.0.weight": ("F32", rng.standard_normal((64, 64)).astype(np.float32)),
        "layers.1.weight": ("F32", rng.standard_normal((64, 64)).astype(np.float32)),
    }
    left, right = rng.standard_normal((64, 1)), rng.standard_normal((1, 64))
    tuned = {
        **base,
        "layers.0.weight": ("F32", (base["layers.0.weight"][1] + left @ right).astype(np.float32)),
    }
    for name, tensors in (("base", base), ("sql-7b", tuned)):
        save_file(tmp_path / name / "model.safetensors", tensors)
    return tmp_path


EXPECTED = """\
fine-tune  sql-7b
base       base
           8,192 parameters, 50.0% of them equal in both; matrices have an effective rank of 1 of 64 on average

encoding          size     error
top_k:0.01        246 B    0.89
sign              516 B    0.77
low_rank:0.03125  1.0 kB   tiny
int4              2.3 kB   0.11
top_k:0.1         2.5 kB   0.57
low_rank:0.125    4.1 kB   tiny
low_rank:0.25     8.2 kB   tiny
difference:f16    8.2 kB   0.0002
difference:bf16   8.2 kB   0.0017
exact             16.4 kB  none
difference:f32    16.4 kB  tiny

error: |decoded - difference| / |difference|; about: from a sample of each tensor.

sql@1: 512 B, relative error tiny (1 absent, 1 low_rank)
why: error 0.01 was asked for
"""


def without_tiny(text: str) -> str:
    """The text without the digits of rounding errors, which depend on the machine's linear algebra."""
    return re.sub(r"\d(\.\d)?e-0[789]", "tiny", text)


def test_it_measures_prints_what_encodings_cost_and_keeps_the_vector(models: Path, run: Run) -> None:
    code, out, err = run(
        "store", "create", "sql-7b", "--base", "base", "--name", "sql", "--error", "0.01", "--task", "sql"
    )
    place = models / "store" / "vectors" / "sql" / "1"
    assert (code, without_tiny(out), err) == (0, f"{EXPECTED}written: {place}\n", "")
    assert alnico.Store().show("sql").manifest.tasks == ("sql",)
    assert run("store", "create", "sql-7b", "--base", "base", "--name", "sql", "--exact")[0] == 0
    assert [v.reference for v in alnico.Store().list(all_versions=True)] == ["sql@2", "sql@1"]


def test_a_dry_run_leaves_nothing(models: Path, run: Run) -> None:
    code, out, _ = run("store", "create", "sql-7b", "--base", "base", "--dry-run", "--error", "0.01")
    assert code == 0
    assert without_tiny(out) == EXPECTED.replace("sql@1", "sql-7b") + "nothing was written (--dry-run)\n"
    assert sorted(p.name for p in models.iterdir()) == ["base", "sql-7b"]


def test_json_has_all_of_it(models: Path, run: Run) -> None:
    code, out, _ = run("store", "create", "sql-7b", "--base", "base", "--json", "--encoding", "int4")
    data = json.loads(out)
    assert code == 0
    assert (data["name"], data["version"], data["encodings"]) == ("sql-7b", 1, {"absent": 1, "int4": 1})
    assert data["path"] == str(models / "store" / "vectors" / "sql-7b" / "1")
    assert data["measured"]["equal_share"] == 0.5
    (int4,) = (o for o in data["options"] if o["encoding"] == "int4")
    assert int4["error"] == pytest.approx(data["error"])


def test_what_is_wrong_is_said_and_nothing_is_kept(models: Path, run: Run) -> None:
    for words, code, said in (
        (
            ("sql-7b", "--base", "base", "--exact", "--tsv", "0.1"),
            3,
            "exact and tsv are given; expected one of",
        ),
        (("sql-7b",), 4, "base is missing; expected the model"),
        (("sql-7b", "--base", "sql-7b"), 5, "finetuned and base are the same model"),
        (("sql-7b", "--base", "base", "--name", "../x"), 3, "name is '../x'; expected"),
        (("sql-7b", "--base", "base", "--size", "300B"), 7, "size is 300 B; the smallest encodings"),
        (("none", "--base", "base"), 4, "model 'none': no such directory or file"),
    ):
        found, out, err = run("store", "create", *words)
        assert (found, out) == (code, "")
        assert said in err
        assert len(alnico.Store().list()) == 0
    left = [p for p in (models / "store").rglob("*") if p.is_file() and p.suffix == ".safetensors"]
    assert left == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--encoding", "low_rank:0"),
            "expected a share in (0, 1] or a number of directions after the colon",
        ),
        (
            ("--encoding", "low_rank:\u00b2"),
            "expected a share in (0, 1] or a number of directions after the colon",
        ),
        (("--encoding", "top_k:7"), "expected a share in (0, 1] after the colon. Write top_k:0.1."),
        (("--error", "nan"), "error is nan; expected a finite number"),
        (("--tsv", "inf"), "tsv is inf; expected a finite number"),
        (("--scale", "nan"), "scale is nan; expected a finite number"),
        (("--scale-range", "0,inf"), "scale_range is inf; expected a finite number"),
    ],
)
@pytest.mark.usefixtures("models")
def test_wrong_numbers_are_errors_of_the_options(run: Run, words: tuple[str, ...], message: str) -> None:
    code, out, error = run("store", "create", "sql-7b", "--base", "base", *words)
    assert (code, out) == (3, "")
    assert message in error
