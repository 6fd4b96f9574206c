"""Two models side by side: what is equal, what differs, and by how much."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import alnico
from alnico.analysis.diff import ModelDiff, TensorPair, diff_sources
from alnico.checkpoint.open_model import open_model
from alnico.errors import ResourceError
from alnico.numerics.digest import PIECE, piece_digest, tensor_digest
from alnico.run_options import RunOptions
from hub.stub import serving
from made import decoded, encoded, family, read_model, save_file, save_model
from real import BASE, TUNED
from test_real_models import installed

Run = Callable[..., tuple[int, str, str]]
RANDOM = np.random.default_rng(0)
VALUES = RANDOM.standard_normal((50, 700)).astype(np.float32)
"""More than two runs of elements."""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def diff_of(a: tuple[str, np.ndarray], b: tuple[str, np.ndarray]) -> TensorPair:
    """The difference of one tensor, given as (dtype, values)."""
    save_file(Path("a.safetensors"), {"w": a})
    save_file(Path("b.safetensors"), {"w": b})
    (found,) = alnico.diff("a.safetensors", "b.safetensors").tensors
    return found


def timeless(found: ModelDiff) -> dict[str, object]:
    return {k: v for k, v in found.data().items() if k != "seconds"}


@pytest.mark.parametrize(
    ("dtype", "other"), [("F32", "F32"), ("BF16", "BF16"), ("F64", "F32"), ("F16", "BF16"), ("I32", "I32")]
)
def test_statistics_of_what_differs_are_those_of_float64(dtype: str, other: str) -> None:
    scale = 1000 if dtype == "I32" else 1
    changed = VALUES * scale + np.where(RANDOM.random(VALUES.shape) < 0.3, 0.2 * scale, 0)
    found = diff_of((dtype, VALUES * scale), (other, changed)).values
    a, b = (
        decoded(d, encoded(d, v)).astype(np.float64).ravel()
        for d, v in ((dtype, VALUES * scale), (other, changed))
    )
    assert found is not None
    assert (found.elements, found.differing, found.not_finite) == (a.size, np.count_nonzero(a != b), 0)
    assert found.max_abs == np.abs(b - a).max()
    assert found.l2 == pytest.approx(np.linalg.norm(b - a), rel=1e-12)
    assert found.relative_l2 == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a), rel=1e-12)
    assert found.cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-12)


def test_a_tensor_is_equal_where_its_hash_is_the_one_a_merge_records() -> None:
    base, (tuned,) = family(Path(), 1)
    alnico.merge({"merge_method": "passthrough", "models": [str(tuned)]}, "out")
    lock = json.loads(Path("out/alnico.lock.json").read_text())["output"]
    found = alnico.diff(tuned, "out")
    assert {t.name: t.digests[1] for t in found.tensors} == {
        name: entry["digest"] for name, entry in lock.items()
    }
    assert {t.verdict for t in found.tensors} == {"equal"}
    assert found.is_equal
    assert not alnico.diff(base, "out").is_equal


def test_one_other_bit_is_found_wherever_it_is() -> None:
    values = np.arange(
        5_000_000, dtype=np.float32
    )  # five pieces of a hash, more than a thread takes at a time
    raw = values.tobytes()
    pieces = [piece_digest(raw[start : start + PIECE]) for start in range(0, len(raw), PIECE)]
    for place in (0, 1_048_576, 4_999_999):
        other = values.copy()
        other.view(np.uint32)[place] ^= 1
        found = diff_of(("F32", values), ("F32", other))
        assert (found.verdict, found.values and found.values.differing) == ("differs", 1)
        assert found.digests[0] == tensor_digest("F32", (5_000_000,), pieces) != found.digests[1]


def test_the_number_of_threads_changes_nothing() -> None:
    base, (tuned,) = family(Path(), 1, vocabulary=3000)
    found = []
    for threads in (1, 3):
        with open_model(base) as a, open_model(tuned) as b:
            found.append(timeless(diff_sources(a, b, RunOptions(threads=threads))))
    assert found[0] == found[1]


def test_the_same_values_in_another_dtype_are_told_from_others() -> None:
    halves = np.round(VALUES * 8) / 8
    assert diff_of(("F32", halves), ("BF16", halves)).verdict == "same values"
    assert diff_of(("F64", halves), ("F16", halves)).verdict == "same values"
    assert diff_of(("F32", VALUES), ("BF16", VALUES)).verdict == "differs"


def test_zeros_of_both_signs_are_one_value_in_other_bytes() -> None:
    found = diff_of(("F32", np.zeros(3)), ("F32", np.float32([0.0, -0.0, 0.0])))
    assert (found.verdict, found.values) == ("same values", None)


def test_entries_that_are_not_finite_are_counted_and_left_out_of_the_sums() -> None:
    nan, inf = np.nan, np.inf
    a = np.float32([1.0, nan, inf, inf, nan, 2.0])
    b = np.float32([3.0, nan, inf, -inf, 1.0, 2.0])
    found = diff_of(("F32", a), ("F32", b)).values
    assert found is not None
    assert (found.differing, found.not_finite) == (3, 2)
    assert (found.max_abs, found.l2, found.relative_l2) == (2.0, 2.0, pytest.approx(2 / 5**0.5))


def test_large_integers_are_compared_as_they_are() -> None:
    found = diff_of(("I64", np.array([2**60, 7])), ("I64", np.array([2**60 + 1, 7]))).values
    assert found is not None
    assert found.differing == 1


def test_a_tensor_of_zeros_has_no_relative_change() -> None:
    found = diff_of(("F32", np.zeros(4)), ("F32", np.ones(4))).values
    assert found is not None
    assert (found.l2, found.relative_l2, found.cosine) == (2.0, None, None)


def test_shapes_that_differ_and_tensors_that_one_model_has_are_named_with_their_twins() -> None:
    embedding = ("F32", VALUES)
    save_file(
        Path("a.safetensors"),
        {"embed": embedding, "w": ("F32", np.ones((2, 3))), "old": ("I64", np.arange(3))},
    )
    save_file(Path("b.safetensors"), {"embed": embedding, "head": embedding, "w": ("F32", np.ones((3, 2)))})
    found = alnico.diff("a.safetensors", "b.safetensors")
    assert [(t.name, t.verdict) for t in found.tensors] == [("embed", "equal"), ("w", "other shape")]
    assert found.tensors[1].shapes == ((2, 3), (3, 2))
    assert [(t.name, t.dtype, t.shape, t.twins) for t in found.only_in_a] == [("old", "I64", (3,), ())]
    assert [(t.name, t.twins) for t in found.only_in_b] == [("head", ("embed",))]
    assert not found.is_equal


def test_dtypes_without_values_are_compared_by_their_bytes() -> None:
    header = json.dumps({"w": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]}}).encode()
    for name, data in (("a", bytes(4)), ("b", bytes(range(4)))):
        Path(f"{name}.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    (found,) = alnico.diff("a.safetensors", "b.safetensors").tensors
    assert (found.verdict, found.values) == ("other bytes", None)
    assert alnico.diff("a.safetensors", "a.safetensors").is_equal


def test_a_base_with_an_adapter_is_read_as_the_model_they_make() -> None:
    save_model(Path("base"), {"fc.weight": ("F32", VALUES[:8, :6])})
    a, b = (
        RANDOM.standard_normal((2, 6)).astype(np.float32),
        RANDOM.standard_normal((8, 2)).astype(np.float32),
    )
    prefix = "base_model.model.fc.lora_"
    save_file(
        Path("lora/adapter_model.safetensors"),
        {f"{prefix}A.weight": ("F32", a), f"{prefix}B.weight": ("F32", b)},
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["fc"]}
    Path("lora/adapter_config.json").write_text(json.dumps(config))
    (found,) = alnico.diff("base", "base+lora").tensors
    assert found.values is not None
    assert found.values.l2 == pytest.approx(np.linalg.norm(2.0 * b.astype(np.float64) @ a), rel=1e-6)


def test_models_of_the_hub_are_fetched_and_compared_with_local_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, (tuned,) = family(Path("local"), 1, shards=2)
    (base / "tokenizer.json").write_text("{}")
    with serving(tmp_path / "home", monkeypatch) as hub:
        hub.add("org/base", base)
        assert alnico.diff("org/base", base).is_equal
        assert {t.verdict for t in alnico.diff(tuned, "org/base@main").tensors} == {"differs"}


def test_keys_of_configs_and_contents_of_side_files_are_compared() -> None:
    config = {"hidden_size": 4, "rope": {"factor": 2.0, "type": "linear"}, "dtype": "float32"}
    other = {"hidden_size": 4, "rope": {"factor": 4.0, "type": "linear"}, "eos": [1, 2]}
    for name, said in (("a", config), ("b", other)):
        save_model(Path(name), {"w": ("F32", np.ones(2))}, said)
        Path(name, "tokenizer.model").write_bytes(name.encode())
        Path(name, "vocab.txt").write_text("same")
        Path(name, "README.md").write_text(name)
    Path("a/generation_config.json").write_text('{"top_p": 1}')
    Path("b/generation_config.json").write_text('{ "top_p": 1 }')
    Path("b/added.json").write_text("{}")
    found = alnico.diff("a", "b")
    assert found.files is not None
    names = ["config.json", "added.json", "generation_config.json", "tokenizer.model"]
    assert [f.name for f in found.files] == names
    of_config, added, written, model = found.files
    assert [(k.key, k.a, k.b) for k in of_config.keys or ()] == [
        ("rope.factor", "2.0", "4.0"),
        ("dtype", '"float32"', None),
        ("eos", None, "[1, 2]"),
    ]
    assert (added.in_a, added.in_b) == (False, True)
    assert (written.keys, model.keys) == ((), None)
    assert not found.is_equal
    assert alnico.diff("a", "b/model.safetensors").files is None


def test_a_budget_without_room_for_a_thread_is_refused_with_one_that_has() -> None:
    base, (tuned,) = family(Path(), 1)
    with pytest.raises(ResourceError) as caught:
        alnico.diff(base, tuned, memory="100MiB")
    said = str(caught.value)
    assert said.startswith("diff: needs at least 348.")
    assert said.endswith("the budget is 104.9 MB. Raise --memory to 333MiB.")
    assert not alnico.diff(base, tuned, memory="333MiB").is_equal


def test_diff_prints_what_differs_and_exits_as_asked(run: Run) -> None:
    tensors = {"equal": ("F32", np.ones(4)), "near": ("F32", np.ones(4)), "far": ("F32", np.ones(4))}
    save_model(Path("a"), tensors | {"gone": ("F32", np.ones(3))}, {"hidden_size": 4})
    changed = {
        "near": ("F32", np.float32([1, 1, 1, 1.5])),
        "far": ("F32", np.full(4, -1.0)),
        "equal": ("F64", np.ones(4)),
    }
    save_model(Path("b"), changed, {"hidden_size": 8})
    code, stdout, stderr = run("diff", "a", "b")
    assert (code, stderr) == (0, "")
    assert stdout.splitlines() == [
        "A         a",
        "B         b",
        "tensors   1 of the same values, 2 differ, 1 only in A",
        "files     1 differ: config.json",
        "",
        "entries differ     change  max |b-a|       cosine  tensor",
        "       100.00%   200.000%   2.00e+00  -1.00000000  far",
        "        25.00%    25.000%   5.00e-01   0.98198051  near",
        "",
        "equal: the same values, F32 in A, F64 in B",
        "",
        "only in A",
        "gone: F32 (3,)",
        "",
        "config.json",
        "  hidden_size: 4 in A, 8 in B",
        "",
        "change: |b - a| / |a|, over a tensor. max |b-a|: of one entry. cosine: 1 for the same direction, 0 for none in common.",
    ]
    assert run("diff", "a", "b", "--exit-code")[0] == 14
    code, stdout, _ = run("diff", "a", "a", "--exit-code")
    assert (code, stdout.splitlines()[-1]) == (0, "The models are equal.")
    data = json.loads(run("diff", "a", "b", "--json")[1])
    assert data["is_equal"] is False
    assert {t["name"]: t["verdict"] for t in data["tensors"]} == {
        "equal": "same values",
        "near": "differs",
        "far": "differs",
    }
    assert {t["name"]: t["values"] and t["values"]["max_abs"] for t in data["tensors"]} == {
        "equal": None,
        "near": 0.5,
        "far": 2.0,
    }


def test_long_lists_are_cut_unless_all_is_asked_for(run: Run) -> None:
    for name, value in (("a", 1.0), ("b", 2.0)):
        save_file(Path(f"{name}.safetensors"), {f"w{i:02}": ("F32", np.full(2, value)) for i in range(20)})
    lines = run("diff", "a.safetensors", "b.safetensors")[1].splitlines()
    assert "... and 8 more (-v prints all)" in lines
    assert len(run("diff", "a.safetensors", "b.safetensors", "-v")[1].splitlines()) == len(lines) + 7


@pytest.mark.slow
def test_the_real_pair_differs_in_all_but_its_unused_tensors() -> None:
    base, tuned = installed(*BASE), installed(*TUNED)
    found = alnico.diff(base, tuned)
    a, b = read_model(base), read_model(tuned)
    assert [t.name for t in found.only_in_a] == ["embeddings.position_ids"]
    assert {t.name for t in found.tensors if t.verdict == "equal"} == {
        n for n in b if np.array_equal(a[n], b[n])
    }
    for tensor in (t for t in found.tensors if t.values):
        one, other = (m[tensor.name].astype(np.float64).ravel() for m in (a, b))
        assert tensor.values is not None
        assert tensor.values.differing == np.count_nonzero(one != other)
        assert tensor.values.relative_l2 == pytest.approx(
            np.linalg.norm(other - one) / np.linalg.norm(one), rel=1e-12
        )
