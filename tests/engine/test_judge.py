"""Models are looked at before they are merged: were they tuned from one base?"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import alnico
from alnico.checkpoint.model import FileModel
from alnico.engine.judge import SAMPLE
from alnico.errors import MismatchError
from made import family, llama_config, read_model, save_model

Run = Callable[..., tuple[int, str, str]]
WIDE: dict[str, Any] = {"hidden": 64, "layers": 1, "vocabulary": 128}


def save(path: str, tensors: Mapping[str, np.ndarray], dtype: str = "BF16") -> str:
    save_model(Path(path), {n: (dtype, v) for n, v in tensors.items()}, llama_config(**WIDE))
    return path


@pytest.fixture(autouse=True)
def _models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base with two fine-tunes, and a model of another start: base, tuned-0, tuned-1, stranger."""
    monkeypatch.chdir(tmp_path)
    family(Path(), 2, **WIDE)
    family(Path("other"), 0, seed=1, **WIDE)
    Path("other/base").rename("stranger")


# ---- what is compared ------------------------------------------------------------------------------------------------


def test_change_cosine_and_what_differs_are_those_of_float64() -> None:
    (found,) = alnico.compare(["tuned-0"], base="base").likenesses
    base, tuned = read_model(Path("base")), read_model(Path("tuned-0"))
    assert max(v.size for v in base.values()) <= SAMPLE, "then the sample is all of it"
    b, m = (np.concatenate([v.ravel() for v in model.values()]).astype(np.float64) for model in (base, tuned))
    assert found.change == pytest.approx(np.linalg.norm(m - b) / np.linalg.norm(b), rel=1e-12)
    assert found.cosine == pytest.approx(m @ b / np.linalg.norm(m) / np.linalg.norm(b), rel=1e-12)
    assert found.length == pytest.approx(np.linalg.norm(m) / np.linalg.norm(b), rel=1e-12)
    assert (found.tensors, found.elements, found.elements_differ) == (len(base), b.size, int(np.count_nonzero(m != b)))
    gate = "model.layers.0.mlp.gate_proj.weight"
    x, y = (model[gate].ravel().astype(np.float64) for model in (base, tuned))
    assert found.cosines[gate] == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-12)


def test_a_fine_tune_is_told_from_a_model_of_another_start() -> None:
    tuned, stranger = alnico.compare(["tuned-0", "stranger"], base="base").likenesses
    assert (tuned.verdict, stranger.verdict) == ("tuned", "unrelated")
    assert min(tuned.cosines.values()) > 0.9
    assert max(map(abs, stranger.cosines.values())) < 0.1


def test_neurons_in_another_order_make_a_model_unrelated() -> None:
    random = np.random.default_rng(0)
    shuffled = {n: random.permutation(v.ravel()).reshape(v.shape) if v.ndim > 1 else v for n, v in read_model(Path("base")).items()}
    save("shuffled", shuffled)
    assert alnico.compare(["base", "shuffled"]).likenesses[0].verdict == "unrelated"


def test_a_scaled_model_is_far_though_parallel() -> None:
    save("scaled", {n: 2 * v for n, v in read_model(Path("base")).items()})
    (found,) = alnico.compare(["base", "scaled"]).likenesses
    assert (found.verdict, found.cosine, found.length) == ("far", 1.0, 2.0)


def test_fewer_than_four_matrices_are_not_judged() -> None:
    random = np.random.default_rng(0)
    for count, verdict in ((3, "tuned"), (4, "unrelated")):
        for name in ("one", "other"):
            save(name, {f"w{i}": random.standard_normal((64, 64)) for i in range(count)}, "F32")
        assert alnico.compare(["one", "other"]).likenesses[0].verdict == verdict


def test_at_most_64_kib_of_float32_are_read_of_a_tensor_whatever_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[str, int, int]] = []
    genuine = FileModel.read_into

    def watched(self: FileModel, name: str, offset: int, buffer: memoryview) -> None:
        read.append((name, offset, len(buffer)))
        genuine(self, name, offset, buffer)

    monkeypatch.setattr(FileModel, "read_into", watched)
    for name in ("one", "other"):
        save(name, {"w": np.ones((400, 500)), "v": np.ones(3)}, "F32")
    alnico.compare(["one", "other"])
    middle = (200_000 - 16_384) // 2 * 4
    assert sorted(set(read)) == [("v", 0, 12), ("w", middle, 65_536)]
    assert len(read) == 4


def test_models_that_share_no_tensor_cannot_be_compared() -> None:
    save("one", {"w": np.ones((2, 2))})
    with pytest.raises(MismatchError) as caught:
        alnico.compare(["one"], base="base")
    assert str(caught.value) == (
        "base and one have no float tensor of one name and shape; expected models of one architecture. "
        "`alnico inspect` lists what they hold."
    )


def test_compare_prints_a_line_a_model_and_the_tensors_that_were_made_anew(run: Run) -> None:
    values = read_model(Path("base"))
    values["model.layers.0.mlp.up_proj.weight"] = np.random.default_rng(3).standard_normal((192, 64)).astype(np.float32)
    save("anew", values)
    code, stdout, stderr = run("compare", "base", "base", "tuned-0", "anew", "stranger")
    assert (code, stderr) == (0, "")
    lines = stdout.splitlines()
    assert lines[0] == f"compared with base, by a sample of {sum(v.size for v in values.values()):,} numbers"
    assert lines[2].split("  ")[0] == "tensors differ"
    assert lines[3].split() == ["0", "of", "11", "0.0%", "0.00%", "1.0000", "the", "same", "base"]
    assert [line.split()[-1] for line in lines[3:8]] == [
        "base",
        "tuned-0",
        "anew",
        "model.layers.0.mlp.up_proj.weight",
        "stranger",
    ]
    assert "  1 of 11  " in lines[5]
    assert lines[7].endswith("  not of one base           stranger")
    data = json.loads(run("compare", "base", "anew", "--json")[1])
    assert list(data["models"][0]["uncorrelated"]) == ["model.layers.0.mlp.up_proj.weight"]
    assert run("compare", "base")[0] == 2
