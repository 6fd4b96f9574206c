"""Stored task vectors on their base, as models: bits, values, hashes, names and weights."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import alnico
from alnico.checkpoint.open_model import open_model
from alnico.checkpoint.task_vectors import equipped_model, known_hashes, stored_vector
from alnico.errors import AlnicoError, MismatchError, ModelError, NonFiniteError, RecipeError
from made import Tensors, encoded, read_model, save_file, save_model
from made_vectors import decode, encode, exact_values, hash_of, random_pair, write_manifest, write_vector

SHAPES = {
    "model.a.weight": (300, 301),
    "model.b.weight": (4, 60, 41),
    "model.c.bias": (131,),
    "model.d.weight": (7, 37),
}
EXACT = {
    "model.a.weight": "sparse",
    "model.b.weight": "whole",
    "model.c.bias": "absent",
    "model.d.weight": "sparse",
}
LOSSY = (
    "difference",
    "difference F16",
    "difference BF16",
    "top_k",
    "sign",
    "sign rows",
    "int4",
    "low_rank",
    "low_rank stack",
)


def write(
    folder: Path, encodings: dict[str, str], dtype: str = "BF16", **more: Any
) -> tuple[Tensors, Tensors]:
    base, tuned = random_pair(np.random.default_rng(5), SHAPES, dtype, changed=0.1)
    tuned = {n: base[n] if encodings.get(n, "absent") == "absent" else t for n, t in tuned.items()}
    save_model(folder / "base", base, {"model_type": "llama"})
    write_vector(folder / "vector", base, tuned, encodings, **more)
    return base, tuned


def raw_of(model: Any, name: str, pieces: int = 1) -> bytes:
    """The bytes of a tensor, read in some pieces of odd sizes."""
    size = model.tensors[name].byte_size
    raw = bytearray(size)
    ends = sorted({0, size, *(size * i // pieces + i % 3 for i in range(1, pieces))})
    for begin, end in itertools.pairwise(ends):
        model.read_into(name, begin, memoryview(raw)[begin:end])
    return bytes(raw)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_exact_encodings_give_the_bits_of_the_fine_tune(tmp_path: Path, dtype: str) -> None:
    _, tuned = write(tmp_path, EXACT, dtype)
    with open_model(f"{tmp_path / 'base'}+{tmp_path / 'vector'}") as model:
        assert set(model.tensors) == set(tuned)
        for name, (kind, values) in tuned.items():
            assert model.tensors[name].dtype == kind
            assert model.tensors[name].shape == values.shape
            assert raw_of(model, name) == encoded(kind, values)
            assert raw_of(model, name, 7) == encoded(kind, values)


@pytest.mark.parametrize("weight", [0.7, -1.0, 2.0])
@pytest.mark.parametrize("encoding", [*LOSSY, "sparse", "whole"])
def test_a_weight_multiplies_the_difference(tmp_path: Path, encoding: str, weight: float) -> None:
    stacked = "low_rank stack" if encoding == "low_rank" else encoding
    two = "low_rank" if encoding == "low_rank stack" else encoding
    one = "difference" if encoding.startswith("low_rank") else encoding
    encodings = dict(zip(SHAPES, (two, stacked, one, two), strict=True))
    base, tuned = write(tmp_path, encodings)
    with open_model(f"{tmp_path / 'base'}+{weight}*{tmp_path / 'vector'}") as model:
        for name, used in encodings.items():
            old, new = exact_values("BF16", base[name][1]), exact_values("BF16", tuned[name][1])
            difference = new - old
            if used not in ("sparse", "whole"):
                parts, keys = encode(name, used, "BF16", base[name][1], tuned[name][1])
                numbers = {part: exact_values(kind, values) for part, (_, kind, values) in parts.items()}
                difference = decode(used, numbers, {"shape": new.shape, **keys})
            assert model.tensors[name].dtype == "F32"
            assert model.tensors[name].nominal == "BF16"
            whole = raw_of(model, name)
            assert raw_of(model, name, 7) == whole
            found = np.frombuffer(whole, np.float32).reshape(new.shape)
            scale = np.abs(old) + abs(weight) * np.abs(difference)
            assert (
                np.abs(found - (old + weight * difference)) <= 4e-7 * scale + 1e-6 * np.abs(difference).max()
            ).all()


def test_the_weight_0_gives_the_base(tmp_path: Path) -> None:
    base, _ = write(tmp_path, {**EXACT, "model.d.weight": "int4"})
    with open_model(f"{tmp_path / 'base'}+0*{tmp_path / 'vector'}") as model:
        assert {n: raw_of(model, n) for n in model.tensors} == {n: encoded(*t) for n, t in base.items()}


def test_several_vectors_are_put_on_one_another(tmp_path: Path) -> None:
    base, tuned = write(tmp_path, dict.fromkeys(SHAPES, "difference"))
    other = {n: (k, v + 0.5) for n, (k, v) in base.items()}
    first = {
        n: (
            k,
            (exact_values(k, base[n][1]) + 0.5 * (exact_values(k, v) - exact_values(k, base[n][1]))).astype(
                np.float32
            ),
        )
        for n, (k, v) in tuned.items()
    }
    write_vector(
        tmp_path / "second",
        {n: ("F32", v) for n, (_, v) in first.items()},
        other,
        dict.fromkeys(SHAPES, "whole"),
    )
    with open_model(f"{tmp_path / 'base'}+0.5*{tmp_path / 'vector'}+{tmp_path / 'second'}") as model:
        for name, (kind, values) in other.items():
            assert raw_of(model, name) == encoded(kind, values)


def test_a_merge_of_vectors_has_the_bits_of_a_merge_of_the_models(tmp_path: Path) -> None:
    write(tmp_path, EXACT)
    base, tuned = random_pair(np.random.default_rng(5), SHAPES, changed=0.1)
    tuned["model.c.bias"] = base["model.c.bias"]
    save_model(tmp_path / "tuned", tuned, {"model_type": "llama"})
    vector = f"{tmp_path / 'base'}+{tmp_path / 'vector'}"
    for name, model in (("full", tmp_path / "tuned"), ("equipped", vector)):
        recipe = {
            "merge_method": "task_arithmetic",
            "base_model": str(tmp_path / "base"),
            "models": [{"model": str(model), "parameters": {"weight": 0.7}}],
            "unrelated": "allow",
        }
        alnico.merge(recipe, tmp_path / name)
    full, equipped = read_model(tmp_path / "full"), read_model(tmp_path / "equipped")
    assert all(full[n].tobytes() == equipped[n].tobytes() for n in full)
    assert alnico.verify(tmp_path / "equipped", against_inputs=True) is not None


def test_another_base_is_refused_and_the_tensor_is_named(tmp_path: Path) -> None:
    base, _ = write(
        tmp_path, {**EXACT, "model.d.weight": "difference"}, base={"id": "made/base", "revision": "abc"}
    )
    values = base["model.d.weight"][1].copy()
    values[3, 4] += 1
    save_model(tmp_path / "other", {**base, "model.d.weight": ("BF16", values)}, {"model_type": "llama"})
    with open_model(f"{tmp_path / 'other'}+{tmp_path / 'vector'}") as model:
        raw_of(model, "model.a.weight")
        with pytest.raises(MismatchError) as refused:
            raw_of(model, "model.d.weight")
        message = str(refused.value)
        for part in (
            f"{tmp_path / 'other'} is not the base of",
            "model.d.weight",
            "made/base@abc",
            "--allow-base-mismatch",
        ):
            assert part in message
        assert hash_of("BF16", values) in message
        assert hash_of(*base["model.d.weight"]) in message
        assert model.differing_tensors() == ["model.d.weight"]
        with pytest.raises(MismatchError, match=r"model\.d\.weight: its values differ"):
            model.check_base()


def test_only_differences_are_allowed_on_another_base(tmp_path: Path) -> None:
    base, _ = write(tmp_path, {**EXACT, "model.d.weight": "difference"})
    other = {n: (k, v + 1) for n, (k, v) in base.items()}
    save_model(tmp_path / "other", other, {"model_type": "llama"})
    recipe: dict[str, Any] = {
        "merge_method": "linear",
        "models": [{"model": f"{tmp_path / 'other'}+{tmp_path / 'vector'}", "parameters": {"weight": 1}}],
    }
    with pytest.raises(MismatchError, match="is not the base of"):
        alnico.merge(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    allowed = {**recipe, "base_mismatch": "allow"}
    plan = alnico.plan(allowed)
    assert any(
        "base_mismatch: allow" in note and "Nothing is known about the result" in note for note in plan.notes
    )
    with pytest.raises(
        MismatchError, match=r"model\.[abd]\.weight"
    ):  # what holds new values is refused still
        alnico.merge(allowed, tmp_path / "out")
    write_vector(
        tmp_path / "vector",
        base,
        {n: (k, v + 0.25) for n, (k, v) in base.items()},
        dict.fromkeys(SHAPES, "difference"),
    )
    alnico.merge(allowed, tmp_path / "out")
    for name, values in read_model(tmp_path / "out").items():
        expected = (
            exact_values("BF16", other[name][1])
            + exact_values("BF16", base[name][1] + 0.25)
            - exact_values("BF16", base[name][1])
        )
        np.testing.assert_allclose(values, expected, rtol=2**-7)


def test_a_flipped_bit_of_a_part_is_found(tmp_path: Path) -> None:
    write(tmp_path, {**EXACT, "model.d.weight": "int4"})
    path = tmp_path / "vector" / "taskvector.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with open_model(f"{tmp_path / 'base'}+{tmp_path / 'vector'}") as model:
        problems = []
        for name in model.tensors:
            try:
                raw_of(model, name)
            except ModelError as error:
                problems.append(str(error))
        assert len(problems) == 1
        assert "was damaged or changed. Get the task vector again." in problems[0]


def test_a_base_is_hashed_once_and_a_second_run_hashes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALNICO_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(known_hashes, "SETTLED_NS", -(10**18))
    known_hashes._of_record.cache_clear()
    _, tuned = write(tmp_path, {**EXACT, "model.d.weight": "int4"})
    hashed: list[str] = []

    def counting(source: Any, name: str, *rest: Any) -> str:
        hashed.append(name)
        return real(source, name, *rest)

    real = stored_vector.stream_tensor
    monkeypatch.setattr(stored_vector, "stream_tensor", counting)
    monkeypatch.setattr(equipped_model, "stream_tensor", counting)
    reference = f"{tmp_path / 'base'}+{tmp_path / 'vector'}"
    with open_model(reference) as model, open_model(reference) as again:
        for name in tuned:
            assert raw_of(model, name, 5) == raw_of(again, name, 5)
    parts = [n for n in hashed if n not in SHAPES]
    touched = [n for n in SHAPES if n != "model.c.bias"]  # which is absent
    assert sorted(n for n in hashed if n in SHAPES) == sorted(
        [*touched, "model.b.weight"]
    )  # once as the base's, once as a part
    assert [n for n in parts if not n.endswith(".indices")] == list(
        dict.fromkeys(n for n in parts if not n.endswith(".indices"))
    )
    known_hashes._of_record.cache_clear()  # as a new process
    hashed.clear()
    with open_model(reference) as model:
        for name in tuned:
            raw_of(model, name)
    assert hashed == []
    path = next((tmp_path / "base").glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with open_model(reference) as model:
        assert len(model.differing_tensors()) == 1


def test_only_what_a_vector_touches_must_be_the_base(tmp_path: Path) -> None:
    base, tuned = write(tmp_path, EXACT)
    other = {n: (d, v + 1 if n == "model.c.bias" else v) for n, (d, v) in base.items()}
    save_model(tmp_path / "other", other, {"model_type": "llama"})
    with open_model(f"{tmp_path / 'other'}+{tmp_path / 'vector'}") as model:
        found = {name: raw_of(model, name) for name in tuned}
        assert model.differing_tensors() == ["model.c.bias"]
    assert found["model.c.bias"] == encoded(*other["model.c.bias"])
    assert found["model.a.weight"] == encoded(*tuned["model.a.weight"])
    touched = {n: (d, v + 1 if n == "model.a.weight" else v) for n, (d, v) in base.items()}
    save_model(tmp_path / "touched", touched, {"model_type": "llama"})
    reference = f"{tmp_path / 'touched'}+{tmp_path / 'vector'}"
    with open_model(reference) as model, pytest.raises(MismatchError, match=r"model\.a\.weight"):
        raw_of(model, "model.a.weight")


def test_a_file_that_has_just_changed_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALNICO_CACHE_DIR", str(tmp_path / "cache"))
    _, tuned = write(tmp_path, EXACT)
    with open_model(f"{tmp_path / 'base'}+{tmp_path / 'vector'}") as model:
        for name in tuned:
            raw_of(model, name)
    assert not list((tmp_path / "cache").rglob("*.hashes"))


def test_the_base_may_have_other_names(tmp_path: Path) -> None:
    _, tuned = write(tmp_path, EXACT)
    base, _ = random_pair(np.random.default_rng(5), SHAPES, changed=0.1)
    renamed = {n.replace("model.", "model.language_model.", 1): t for n, t in base.items()}
    save_model(tmp_path / "renamed", renamed, {"model_type": "llama"})
    with open_model(f"{tmp_path / 'renamed'}+{tmp_path / 'vector'}") as model:
        assert {n: raw_of(model, n, 3) for n in model.tensors} == {n: encoded(*t) for n, t in tuned.items()}


@pytest.mark.parametrize("is_swapped", [False, True])
def test_packed_experts_are_found_in_a_base_that_stores_them_one_by_one(
    tmp_path: Path, is_swapped: bool
) -> None:
    rng = np.random.default_rng(0)
    stem = "model.layers.0.mlp.experts"
    base = {"model.norm.weight": ("BF16", rng.standard_normal(8).astype(np.float32))}
    packed = dict(base)
    singles = {
        (e, p): rng.standard_normal((6, 8) if p != "down_proj" else (8, 6)).astype(np.float32)
        for e in range(3)
        for p in ("gate_proj", "up_proj", "down_proj")
    }
    base |= {f"{stem}.{e}.{p}.weight": ("BF16", v) for (e, p), v in singles.items()}
    halves = ("up_proj", "gate_proj") if is_swapped else ("gate_proj", "up_proj")
    packed[f"{stem}.gate_up_proj"] = (
        "BF16",
        np.stack([np.concatenate([singles[e, p] for p in halves]) for e in range(3)]),
    )
    packed[f"{stem}.down_proj"] = ("BF16", np.stack([singles[e, "down_proj"] for e in range(3)]))
    tuned = {n: (k, v + 0.5) for n, (k, v) in packed.items()}
    save_model(tmp_path / "base", base, {"model_type": "qwen3_moe"})
    write_vector(tmp_path / "vector", packed, tuned, dict.fromkeys(packed, "difference"))
    with open_model(f"{tmp_path / 'base'}+{tmp_path / 'vector'}") as model:
        for name, (_, values) in tuned.items():
            found = np.frombuffer(raw_of(model, name), np.float32).reshape(values.shape)
            np.testing.assert_allclose(found, exact_values("BF16", values), rtol=1e-6)


def test_a_tied_copy_that_the_base_lacks_is_its_embedding(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    table = ("BF16", rng.standard_normal((10, 4)).astype(np.float32))
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "tie_word_embeddings": True,
        "vocab_size": 10,
    }
    save_model(tmp_path / "base", {"model.embed_tokens.weight": table}, config)
    full = {"model.embed_tokens.weight": table, "lm_head.weight": table}
    tuned = {**full, "lm_head.weight": ("BF16", table[1] + 0.5)}
    write_vector(tmp_path / "vector", full, tuned, {"lm_head.weight": "sparse"})
    with open_model(f"{tmp_path / 'base'}+{tmp_path / 'vector'}") as model:
        assert raw_of(model, "lm_head.weight") == encoded(*tuned["lm_head.weight"])
        assert model.config["tie_word_embeddings"] is False


def test_new_tokens_are_rows_that_the_base_lacks(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    old, new = (rng.standard_normal((n, 4)).astype(np.float32) for n in (10, 12))
    save_model(
        tmp_path / "base",
        {"model.embed_tokens.weight": ("F32", old)},
        {"model_type": "llama", "vocab_size": 10},
    )
    write_vector(tmp_path / "vector", {"model.embed_tokens.weight": ("F32", old)}, {"model.embed_tokens.weight": ("F32", new)}, {"model.embed_tokens.weight": "whole"}, added_tokens={"<a>": 10, "<b>": 11})  # fmt: skip
    for weight in (1.0, 0.5):
        with open_model(f"{tmp_path / 'base'}+{weight}*{tmp_path / 'vector'}") as model:
            found = np.frombuffer(raw_of(model, "model.embed_tokens.weight", 3), np.float32).reshape(12, 4)
            np.testing.assert_allclose(found[:10], old + weight * (new[:10] - old), rtol=1e-6)
            assert found[10:].tobytes() == new[10:].tobytes()
            assert model.config["vocab_size"] == 12
            assert any("made with 2 tokens" in note for note in model.notes)
    write_vector(tmp_path / "vector", {"model.embed_tokens.weight": ("F32", new)}, {"model.embed_tokens.weight": ("F32", old)}, {"model.embed_tokens.weight": "whole"})  # fmt: skip
    save_model(
        tmp_path / "wide",
        {"model.embed_tokens.weight": ("F32", new)},
        {"model_type": "llama", "vocab_size": 12},
    )
    with pytest.raises(
        MismatchError, match=r"expected one shape, or further rows, for the weight 0\.5\. Use the weight 1\."
    ):
        open_model(f"{tmp_path / 'wide'}+0.5*{tmp_path / 'vector'}")


def test_integers_are_the_fine_tunes_at_weight_1_and_the_bases_otherwise(tmp_path: Path) -> None:
    base = {"w": ("F32", np.ones(4, np.float32)), "steps": ("I64", np.array([3, 4]))}
    tuned = {"w": ("F32", np.full(4, 2, np.float32)), "steps": ("I64", np.array([5, 6]))}
    save_model(tmp_path / "base", base, {})
    write_vector(tmp_path / "vector", base, tuned, {"w": "whole", "steps": "whole"})
    with open_model(f"{tmp_path / 'base'}+{tmp_path / 'vector'}") as model:
        assert raw_of(model, "steps") == np.array([5, 6]).tobytes()
    with open_model(f"{tmp_path / 'base'}+0.5*{tmp_path / 'vector'}") as model:
        assert raw_of(model, "steps") == np.array([3, 4]).tobytes()
        assert any("steps" in note and "stay the base's" in note for note in model.notes)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda base: base.pop("model.a.weight"), r"model\.a\.weight: is missing in"),
        (
            lambda base: base.update({"model.a.weight": ("BF16", np.zeros((301, 300), np.float32))}),
            r"is BF16 \[301, 300\] in",
        ),
        (
            lambda base: base.update({"model.a.weight": ("F32", base["model.a.weight"][1])}),
            r"is F32 \[300, 301\] in .* needs BF16",
        ),
        (
            lambda base: base.update({"model.d.weight": ("I32", np.zeros((7, 37), np.int32))}),
            "needs floating-point values",
        ),
    ],
)
def test_a_base_that_does_not_fit_is_refused_by_its_headers(
    tmp_path: Path, change: Any, expected: str
) -> None:
    base, _ = write(tmp_path, {**EXACT, "model.d.weight": "top_k"})
    change(base)
    save_model(tmp_path / "other", base, {"model_type": "llama"})
    with pytest.raises(MismatchError, match=expected):
        open_model(f"{tmp_path / 'other'}+{tmp_path / 'vector'}")


@pytest.mark.parametrize("weight", ["1e-40", "1e39", "1e999"])
def test_a_weight_that_float32_cannot_hold_is_refused(tmp_path: Path, weight: str) -> None:
    write(tmp_path, dict.fromkeys(SHAPES, "difference"))
    with pytest.raises(RecipeError, match=r"expected a product of magnitude 1\.2e-38 to 3\.4e"):
        open_model(f"{tmp_path / 'base'}+{weight}*{tmp_path / 'vector'}")


def test_an_infinity_is_named(tmp_path: Path) -> None:
    base, _ = write(tmp_path, {})
    after = {n: (k, v + 10) for n, (k, v) in base.items()}
    write_vector(tmp_path / "vector", base, after, dict.fromkeys(SHAPES, "difference"))
    with open_model(f"{tmp_path / 'base'}+3e38*{tmp_path / 'vector'}") as model:
        assert model.tensors["model.a.weight"].dtype == "F32"
        with pytest.raises(NonFiniteError, match=r"model\.a\.weight\[0, 0\]: is inf in"):
            raw_of(model, "model.a.weight")


def test_what_a_task_vector_saves_can_be_named_too(tmp_path: Path) -> None:
    base, tuned = random_pair(np.random.default_rng(5), SHAPES, "F32")
    save_model(tmp_path / "base", base, {"model_type": "llama"})
    save_model(tmp_path / "tuned", tuned, {"model_type": "llama"})
    tau = alnico.TaskVector(tmp_path / "tuned", tmp_path / "base")
    tau.save(tmp_path / "tau.safetensors")
    tau.save(tmp_path / "tau")
    tau.compress(tmp_path / "small", rank=1.0)
    for vector in ("tau.safetensors", "tau", "small"):
        with open_model(f"{tmp_path / 'base'}+0.5*{tmp_path / vector}") as model:
            assert any("has no hashes of its base" in note for note in model.notes)
            for name, (_, values) in tuned.items():
                found = np.frombuffer(raw_of(model, name), np.float32).reshape(values.shape)
                np.testing.assert_allclose(found, (values + base[name][1]) / 2, rtol=1e-3, atol=1e-5)


def test_a_vector_of_the_store_is_named_with_or_without_its_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALNICO_STORE", str(tmp_path / "store"))
    base, tuned = write(tmp_path, EXACT)
    (tmp_path / "store/vectors/sql").mkdir(parents=True)
    shutil.copytree(tmp_path / "vector", tmp_path / "store/vectors/sql/1")
    write_vector(tmp_path / "store/vectors/sql/2", base, base, {})
    for reference, expected in (("store:sql@1", tuned), ("store:sql@2", base), ("store:sql", base)):
        with open_model(f"{tmp_path / 'base'}+{reference}") as model:
            assert {n: raw_of(model, n) for n in model.tensors} == {
                n: encoded(*t) for n, t in expected.items()
            }
    with pytest.raises(ModelError, match="Did you mean sql"):
        open_model(f"{tmp_path / 'base'}+store:sq")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    Path("recipes/r.yml").write_text(
        "merge_method: linear\nmodels: [{model: ../base+0.5*store:sql, parameters: {weight: 1}}]\n"
    )
    plan = alnico.plan("recipes/r.yml")
    assert "../base+0.5*store:sql@2" in plan.recipe.text


def test_licences_of_the_base_and_the_vector_apply(tmp_path: Path) -> None:
    write(tmp_path, EXACT, licence="cc-by-nc-4.0", base={"id": "made/base", "licence": "apache-2.0"})
    (tmp_path / "base/README.md").write_text("---\nlicense: gpl-3.0\n---\n")
    recipe = {
        "merge_method": "linear",
        "models": [{"model": f"{tmp_path / 'base'}+{tmp_path / 'vector'}", "parameters": {"weight": 1}}],
    }
    notes = " ".join(alnico.plan(recipe).notes)
    assert "made is cc-by-nc-4.0, which forbids" in notes
    assert "base is gpl-3.0, which requires" in notes
    with pytest.raises(MismatchError, match=r"cc-by-nc-4\.0"):
        alnico.plan(recipe, strict_license=True)


def adapter_folder(folder: Path, base: Tensors, name: str = "model.d.weight") -> np.ndarray:
    rng = np.random.default_rng(1)
    rows, columns = base[name][1].shape
    left, right = (
        rng.standard_normal((rows, 2)).astype(np.float32),
        rng.standard_normal((2, columns)).astype(np.float32),
    )
    module = name.removesuffix(".weight")
    save_file(
        folder / "adapter_model.safetensors",
        {
            f"base_model.model.{module}.lora_A.weight": ("F32", right),
            f"base_model.model.{module}.lora_B.weight": ("F32", left),
        },
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["d"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return np.asarray(2.0 * left @ right)


def write_adapter(folder: Path, base: Tensors) -> np.ndarray:
    difference = adapter_folder(folder, base)
    kind, values = base["model.d.weight"]
    entry = {
        "encoding": "adapter",
        "dtype": kind,
        "shape": list(values.shape),
        "base": hash_of(kind, values),
        "error": 0.0,
    }
    write_manifest(
        folder,
        {"format": "alnico task vector", "version": 1, "name": "lora", "base": {}, "finetuned": {}, "kind": "adapter", "tensors": {"model.d.weight": entry}},
    )  # fmt: skip
    return difference


def test_an_adapter_with_a_manifest_is_applied_and_its_base_is_checked(tmp_path: Path) -> None:
    base, _ = random_pair(np.random.default_rng(5), SHAPES, "F32")
    save_model(tmp_path / "base", base, {"model_type": "llama"})
    difference = write_adapter(tmp_path / "lora", base)
    with open_model(f"{tmp_path / 'base'}+0.5*{tmp_path / 'lora'}") as model:
        found = np.frombuffer(raw_of(model, "model.d.weight", 3), np.float32).reshape(7, 37)
        np.testing.assert_allclose(found, base["model.d.weight"][1] + 0.5 * difference, rtol=1e-5, atol=1e-5)
        assert raw_of(model, "model.a.weight") == encoded(*base["model.a.weight"])
    save_model(tmp_path / "other", {n: (k, v + 1) for n, (k, v) in base.items()}, {"model_type": "llama"})
    with open_model(f"{tmp_path / 'other'}+{tmp_path / 'lora'}") as model:
        with pytest.raises(MismatchError, match=r"model\.d\.weight: it has the hash"):
            raw_of(model, "model.d.weight")
        model.allow_base_mismatch()
        raw_of(model, "model.d.weight")
    path = tmp_path / "lora/adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with (
        open_model(f"{tmp_path / 'base'}+{tmp_path / 'lora'}") as model,
        pytest.raises(ModelError, match="has the SHA-256"),
    ):
        raw_of(model, "model.d.weight")


def test_low_rank_factors_load_as_an_adapter_without_the_manifest(tmp_path: Path) -> None:
    write(tmp_path, {"model.d.weight": "low_rank", "model.a.weight": "low_rank"})
    with open_model(f"{tmp_path / 'base'}+0.5*{tmp_path / 'vector'}") as model:
        equipped = {n: raw_of(model, n) for n in ("model.a.weight", "model.d.weight")}
    (tmp_path / "vector/taskvector.json").unlink()
    with open_model(f"{tmp_path / 'base'}+0.5*{tmp_path / 'vector'}") as model:
        assert {n: raw_of(model, n) for n in equipped} == equipped


def test_errors_say_what_is_not_there(tmp_path: Path) -> None:
    write(tmp_path, EXACT)
    with pytest.raises(AlnicoError, match="has no task vector 'sql'"):
        open_model(f"{tmp_path / 'base'}+store:sql")
    with pytest.raises(
        ModelError, match=r"is a stored task vector of made/base, .* Put it on its base: made/base\+"
    ):
        open_model(str(tmp_path / "vector"))


def test_a_damaged_or_foreign_record_of_hashes_costs_time_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALNICO_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(known_hashes, "SETTLED_NS", -(10**18))
    known_hashes._of_record.cache_clear()
    _, tuned = write(tmp_path, EXACT)
    reference = f"{tmp_path / 'base'}+{tmp_path / 'vector'}"

    def is_right() -> bool:
        known_hashes._of_record.cache_clear()  # as a new process
        with open_model(reference) as model:
            return {n: raw_of(model, n) for n in model.tensors} == {n: encoded(*t) for n, t in tuned.items()}

    assert is_right()
    records = list((tmp_path / "cache/hashes").glob("*.hashes"))
    assert len(records) == 2
    for content in (
        b"",
        b"\xff\n",
        b"0 x\n",
        records[0].read_bytes()[:-5],
        b"0" * 32 + b" [1]\n",
        b"0" * 32 + b' "no key of ours"\n',
    ):
        for record in records:
            record.write_bytes(content)
        assert is_right()
    assert is_right()
    for record in records:  # hashes of another tensor under the right keys
        record.write_bytes(re.sub(rb"(?m)^[0-9a-f]+ ", b"0" * 32 + b" ", record.read_bytes()))
    assert is_right()
    for record in records:
        record.write_bytes(b"")
    (tmp_path / "cache/hashes").chmod(
        0o777
    )  # anybody may write into it: nothing is believed, nothing is remembered
    assert is_right()
    assert [record.read_bytes() for record in records] == [b"", b""]
