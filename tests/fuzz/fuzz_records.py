"""What alnico wrote once and reads again, and anyone may have changed: an analysis, the journal of a merge, the lock of an output."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path

from alnico.analysis.results import SUMMARY, read_analysis
from alnico.errors import AlnicoError
from alnico.output.card import LOCK
from alnico.output.journal import FORM, NAME, format_line, read_journal
from alnico.output.validate import check_finished, local_paths
from alnico.plan.build import build_plan
from alnico.recipe.load import load_recipe
from fuzz.harness import Target, files_of, header_of, put, put_header

FINGERPRINT = {"recipe": {"merge_method": "linear"}, "arithmetic": 1, "plan": "0a", "inputs": [[]]}
WEIGHTS = header_of({"w": ("F32", (2, 3)), "v": ("F32", (3,))}, {"F32": 4})


def prepare(folder: Path) -> None:
    for name in ("base", "a", "b", "out"):
        (folder / name).mkdir()
        put_header(folder / name / "model.safetensors", WEIGHTS)
    (folder / "report").mkdir()
    (folder / "part").mkdir()


def read(data: bytes, folder: Path) -> None:
    files = files_of(data)
    put(folder / "report", files, (SUMMARY,))
    put(folder / "part", files, (NAME,))
    put(folder / "out", files, (LOCK,))
    with contextlib.suppress(AlnicoError):
        read_analysis(folder / "report").data()
    with contextlib.suppress(AlnicoError):
        weight = {"from": "analysis", "path": "report"}
        recipe = {
            "merge_method": "task_arithmetic",
            "base_model": "base",
            "models": ["a", "b"],
            "parameters": {"weight": weight},
        }
        plan = build_plan(dataclasses.replace(load_recipe(recipe), folder=str(folder)))
        for source in plan.sources:
            source.close()
    with contextlib.suppress(AlnicoError):
        read_journal(folder / "part", FINGERPRINT)
    _check_lines(folder / "part" / NAME)
    with contextlib.suppress(AlnicoError):
        read_journal(folder / "part", FINGERPRINT)
    with contextlib.suppress(AlnicoError):
        check_finished(folder / "out")
        local_paths(folder / "out")


def _check_lines(path: Path) -> None:
    """Give every line of a journal the check that belongs to it: what a fuzzer would not guess."""
    lines = path.read_text("utf-8", "replace").split("\n") if path.exists() else []
    with contextlib.suppress(ValueError, RecursionError):
        loaded = [json.loads(line) for line in lines if line]
        path.write_text(
            "".join(format_line(fields) for fields in loaded if isinstance(fields, dict) and fields), "utf-8"
        )


def seeds() -> list[bytes]:
    change = {"elements": 6, "l1": 1.0, "l2": 1.0, "relative_l1": 0.1, "relative_l2": 0.1, "max_abs": 1.0, "mean": 0.0, "std": 1.0,
              "skewness": 0.0, "excess_kurtosis": None, "quantiles": [0.0] * 11, "unchanged": 0.5, "effective_sparsity": 0.1}  # fmt: skip
    pair = {"models": [0, 1], "cosine": 0.5, "distance": 1.0, "sign_conflict": 0.1, "weighted_sign_conflict": 0.1, "top_overlap": 0.2,
            "top_sign_conflict": None, "subspace": {"left": 0.1, "right": 0.2, "rank": 2, "matrices": 1}}  # fmt: skip
    scope = {
        "name": "whole",
        "changes": [change, change],
        "pairs": [pair],
        "sign_conflict": 0.1,
        "cancelled": 0.1,
    }
    tensors = [
        {
            **scope,
            "name": name,
            "dtype": "F32",
            "shape": shape,
            "group": "other",
            "layer": None,
            "module": name,
        }
        for name, shape in (("w", [2, 3]), ("v", [3]))
    ]
    summary = {
        "schema": 1, "version": "0.1.0", "base": {"name": "base", "reference": "base", "commit": None},
        "models": [{"name": n, "reference": n, "commit": None} for n in ("a", "b")], "top_share": 0.2, "whole": scope,
        "groups": {"other": scope}, "layers": {"0": scope}, "tensors": tensors, "skipped": [], "seconds": 1.0,
    }  # fmt: skip
    record = {"tensor": "w", "digest": "0a", "inputs": [[0, "w", "0b"], [1, "w", "0c"]]}
    lines = [
        {"journal": FORM, "made": [], "fingerprint": FINGERPRINT},
        {"fact": 0, "value": [1.0, 2.0]},
        {"norms": 0, "value": [1.0]},
        record,
    ]
    output = {
        "w": {"dtype": "F32", "shape": [2, 3], "do": "mix", "digest": "0a"},
        "v": {"dtype": "F32", "shape": [3], "digest": "0b"},
    }
    lock = {
        "alnico": "0.1.0",
        "inputs": [{"model": "/a/b", "files": []}, {"statistics": "x/y"}, {"repositories": [{}, {}]}],
        "output": output,
    }
    inputs = [
        {SUMMARY: summary},
        {LOCK: lock},
        *({NAME: "".join(json.dumps(x) + "\n" for x in lines[:n])} for n in (1, 3, 4)),
    ]
    return [json.dumps(i).encode() for i in inputs]


WORDS = (
    SUMMARY, NAME, LOCK, "fingerprint", "fact", "norms", "value", "tensor", "digest", "inputs", "output", "dtype", "shape", "schema", "models",
    "reference", "commit", "tensors", "changes", "pairs", "quantiles", "layers", "groups", "l2", "model", "statistics", "repository", "repositories",
    '{"fact": 0, "value": [1e999]}\n', '{"fact": Infinity, "value": []}\n', "\n",
)  # fmt: skip
TARGET = Target(read, seeds, WORDS, prepare)
