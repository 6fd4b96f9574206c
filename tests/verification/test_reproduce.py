"""What a lock says is merged again, to the same bytes; what is not the same is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import alnico
from alnico.errors import AlnicoError, OutputError, UncheckedError, VerificationError
from alnico.events import Event, TensorDone
from made import family, model_bytes, save_model
from verification.test_verify import CHAIN, NAME, TIES, edit_lock, flip, hashes, names, place_of, told


@pytest.fixture(autouse=True)
def _models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base, _ = family(tmp_path, 3, layers=2)
    (base / "tokenizer_config.json").write_text("{}")


@pytest.mark.parametrize("limit", [2_000, 5_000, 12_345, 5_000_000_000])
def test_the_same_bytes_come_again_in_as_many_files_with_the_seed_of_the_command_line(limit: int) -> None:
    alnico.merge({**TIES, "merge_method": "dare_ties"}, "out", seed=77, max_shard_size=limit)
    before = names()
    found = alnico.reproduce("out")
    assert (found.tensors, found.again, found.versions) == (20, None, (alnico.__version__,) * 2)
    assert names() == before
    alnico.reproduce("out", "new", threads=1)
    assert model_bytes(Path("new")) == model_bytes(Path("out"))
    assert names() == before | {"new"}


def test_files_of_tensors_of_several_widths_are_cut_as_before() -> None:
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        tensors = {
            f"t{i}": (dtype, random.standard_normal(50 + 7 * i))
            for i, dtype in enumerate(["F32", "BF16", "F64", "F16"] * 4)
        }
        save_model(Path(name), tensors)
    for limit in (500, 900, 1500):
        alnico.merge(
            {"merge_method": "linear", "models": ["a", "b"], "unrelated": "allow"},
            f"out-{limit}",
            max_shard_size=limit,
        )
        assert alnico.reproduce(f"out-{limit}").tensors == 16


def test_stages_are_run_again() -> None:
    Path("r.yml").write_text(CHAIN)
    alnico.merge_documents("r.yml", "out", seed=9)
    alnico.reproduce("out", "new")
    assert model_bytes(Path("new")) == model_bytes(Path("out"))


def test_one_of_several_outputs_is_made_again_by_itself() -> None:
    Path("r.yml").write_text(
        "name: mean\nmerge_method: linear\nmodels: [tuned-0, tuned-1]\n---\nmerge_method: linear\nmodels: [tuned-2]\n"
    )
    alnico.merge_documents("r.yml", "out")
    Path("tuned-2").rename("gone")
    assert alnico.reproduce("out/mean", inputs={}).tensors == 20


def test_an_interrupted_second_merge_is_taken_up() -> None:
    alnico.merge(TIES, "out")
    left = 5

    def watch(event: Event) -> None:
        nonlocal left
        left -= isinstance(event, TensorDone)
        if left == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        alnico.reproduce("out", threads=1, watch=watch)
    kept: list[str] = []
    alnico.reproduce("out", watch=lambda e: kept.append(e.tensor) if isinstance(e, TensorDone) else None)
    assert 0 < len(kept) < 20
    assert not [n for n in names() if n.startswith(".")]


def test_a_damaged_output_is_named_with_the_byte() -> None:
    alnico.merge(TIES, "out")
    byte = place_of(Path("out/model.safetensors"), NAME) + 5
    flip(Path("out/model.safetensors"), byte)
    assert told(lambda: alnico.reproduce("out")) == (
        f"out/model.safetensors: differs from byte {byte} on from what is merged again, at .out.alnico-again/model.safetensors; expected the same "
        "bytes. The output was changed since it was merged: its lock has the hashes of the second. Get a new copy of the output."
    )
    edit_lock(lambda lock: lock["output"][NAME].update(digest=hashes(Path("out"))[NAME]))
    assert told(lambda: alnico.reproduce("out")).startswith(
        f"out: {NAME} has the hash {hashes(Path('out'))[NAME]} in the lock and "
    )


def test_versions_that_differ_are_named() -> None:
    alnico.merge(TIES, "out")
    edit_lock(lambda lock: lock.update(alnico="0.0.9"))
    assert alnico.reproduce("out").versions == ("0.0.9", alnico.__version__)
    flip(Path("out/config.json"), 3)
    assert told(lambda: alnico.reproduce("out")) == (
        f"out/config.json: differs from byte 3 on from what is merged again (merged by alnico 0.0.9, again by {alnico.__version__}), at "
        ".out.alnico-again/config.json; expected the same bytes. The output's was changed since, or that of the model which it was carried "
        "from. Compare the two."
    )
    edit_lock(lambda lock: lock.update(arithmetic=1))
    assert "with arithmetic 1, here it is" in told(lambda: alnico.reproduce("out"), UncheckedError)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda: Path("out/tokenizer_config.json").unlink(), "out: tokenizer_config.json is only in .out.alnico-again, where it was merged again; "),
        (lambda: Path("base/tokenizer_config.json").unlink(), "out: tokenizer_config.json is not in .out.alnico-again, where it was merged again; "),
    ],
)  # fmt: skip
def test_files_that_are_missing_on_a_side_are_named(change: Callable[[], object], expected: str) -> None:
    alnico.merge(TIES, "out")
    change()
    assert told(lambda: alnico.reproduce("out")).startswith(expected)


def test_other_inputs_are_no_difference_of_the_output() -> None:
    alnico.merge(TIES, "out")
    shutil.move("tuned-1", "moved")
    assert told(lambda: alnico.reproduce("out"), UncheckedError).startswith(
        "out: could not check against its inputs: tuned-1 is neither "
    )
    assert alnico.reproduce("out", inputs={"tuned-1": "moved"}).tensors == 20
    message = told(lambda: alnico.reproduce("out", inputs={"tuned-1": "tuned-2"}), UncheckedError)
    assert message == (
        f"out: could not be reproduced: {sorted(_read())[0]} of tuned-1 is not the one that was merged, by its hash in the lock; expected the same "
        "model. Say where that is with --input tuned-1=PATH."
    )


def _read() -> list[str]:
    return list(json.loads(Path("out/alnico.lock.json").read_text())["inputs"][1]["tensors"])


def test_what_stands_at_the_place_of_the_second_is_left_alone() -> None:
    alnico.merge(TIES, "out")
    Path("new").mkdir()
    Path("new/mine.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"^new: exists and is not empty"):
        alnico.reproduce("out", "new")
    assert Path("new/mine.txt").read_text() == "mine"
    with pytest.raises(AlnicoError):
        alnico.reproduce("out", "out")
    assert alnico.verify("out").tensors == 20


def test_an_output_that_was_cut_by_hand_is_found(tmp_path: Path) -> None:
    alnico.merge(TIES, "out", max_shard_size=5_000)
    other = tmp_path / "other"
    alnico.merge(TIES, other, max_shard_size=9_000)
    for path in [*Path("out").glob("model*")]:
        path.unlink()
    for path in other.glob("model*"):
        shutil.copy(path, "out")
    with pytest.raises(VerificationError):
        alnico.verify("out")
    assert (
        alnico.reproduce("out").tensors == 20
    )  # the same model in other files, which are those it is cut into
