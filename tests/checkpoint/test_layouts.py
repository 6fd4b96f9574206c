"""One model under two spellings: prefixes, names of transformers 4 and 5, experts packed or one by one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import alnico
from alnico.checkpoint.layouts import Layout, meet
from alnico.errors import MismatchError


def named(layout: Layout) -> dict[str, str | None]:
    return {name: layout.whole(name) for name in layout.stored}


def shapes(*names: str, shape: tuple[int, ...] = (4, 4)) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys(names, shape)


# ---- Prefixes ------------------------------------------------------------------------------------------------------------

ENCODER = ("encoder.layer.0.w", "encoder.layer.1.w", "pooler.w")


@pytest.mark.parametrize("prefix", ["bert.", "module.", "_orig_mod.", "model.", "base_model.model.", "module._orig_mod.model."])
def test_a_prefix_is_taken_off_and_put_on(prefix: str) -> None:
    plain, wrapped = shapes(*ENCODER), shapes(*(prefix + n for n in ENCODER))
    assert named(meet(wrapped, plain)) == {n: prefix + n for n in plain}
    assert named(meet(plain, wrapped)) == {prefix + n: n for n in plain}


def test_what_compile_and_fsdp_put_inside_a_name_is_left_out() -> None:
    wrapped = shapes(*(f"model._orig_mod.{n.replace('.0.', '.0._fsdp_wrapped_module.')}" for n in ENCODER))
    assert set(named(meet(wrapped, shapes(*(f"model.{n}" for n in ENCODER))))) == {f"model.{n}" for n in ENCODER}


def test_names_that_meet_as_they_are_are_left() -> None:
    layout = meet(shapes(*ENCODER), shapes(*ENCODER[:2]))
    assert layout.is_identity
    assert (layout.missing, layout.unused) == ((), ("pooler.w",))


def test_heads_that_one_model_has_alone_do_not_hinder() -> None:
    with_head = shapes(*(f"bert.{n}" for n in ENCODER)) | shapes("cls.predictions.w")
    layout = meet(shapes(*ENCODER), with_head)
    assert layout.missing == ("cls.predictions.w",)
    assert layout.unused == ()


def test_two_spellings_that_fit_are_refused_by_name() -> None:
    towers = shapes(*(f"{tower}.{n}" for tower in ("text", "vision") for n in ENCODER))
    with pytest.raises(MismatchError, match=r"text\.encoder\.layer\.0\.w: may be .* or nothing"):
        meet(shapes(*ENCODER), towers)


def test_models_of_other_names_do_not_meet() -> None:
    layout = meet(shapes("a.w", "b.w", "c.w"), shapes("x.v", "y.v", "z.v"))
    assert (layout.is_identity, dict(layout.stored)) == (True, {})


# ---- On disk, in memory, in every command ----------------------------------------------------------------------------------


def state(seed: int, *names: str, shape: tuple[int, ...] = (8, 8)) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {n: rng.standard_normal(shape, np.float32) for n in names}


def renamed(tensors: dict[str, np.ndarray], rename: Callable[[str], str]) -> dict[str, np.ndarray]:
    return {rename(n): v for n, v in tensors.items()}


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    monkeypatch.chdir(tmp_path)
    base = state(0, *ENCODER)
    tuned = {n: v + np.float32(0.1) for n, v in base.items()}
    save_file(base, "base.safetensors")
    save_file(renamed(tuned, "module.bert.".__add__), "tuned.safetensors")
    return base, tuned


def test_a_merge_reads_a_wrapped_model_and_says_so(pair: tuple[dict[str, np.ndarray], dict[str, np.ndarray]]) -> None:
    base, tuned = pair
    recipe = {"merge_method": "linear", "models": ["base.safetensors", "tuned.safetensors"]}
    assert any("without the prefix 'module.bert.'" in note for note in alnico.plan(recipe).notes)
    alnico.merge(recipe, "out.safetensors")
    got = load_file("out.safetensors")
    assert set(got) == set(base)
    for name in base:
        np.testing.assert_allclose(got[name], (base[name].astype(float) + tuned[name]) / 2, rtol=1e-6)


def test_models_in_memory_meet_likewise(pair: tuple[dict[str, np.ndarray], dict[str, np.ndarray]]) -> None:
    base, tuned = pair
    merged = alnico.merge_state_dicts([base, renamed(tuned, "model.".__add__)], method="linear")
    for name in base:
        np.testing.assert_allclose(merged[name], (base[name].astype(float) + tuned[name]) / 2, rtol=1e-6)


def test_analyses_and_differences_read_a_wrapped_model_too(pair: tuple[dict[str, np.ndarray], dict[str, np.ndarray]]) -> None:
    base, tuned = pair
    analysis = alnico.analyze(["tuned.safetensors"], base="base.safetensors")
    assert analysis.skipped == ()
    assert "module.bert." in analysis.models[0].layout
    norm = float(np.sqrt(sum(((tuned[n].astype(float) - base[n]) ** 2).sum() for n in base)))
    assert analysis.whole.changes[0].l2 == pytest.approx(norm, rel=1e-6)
    difference = alnico.diff("base.safetensors", "tuned.safetensors")
    assert [t.verdict for t in difference.tensors] == ["differs"] * 3
    assert (difference.only_in_a, difference.only_in_b, difference.is_equal) == ((), (), False)
    save_file(renamed(base, "model.".__add__), "same.safetensors")
    assert not alnico.diff("base.safetensors", "same.safetensors").is_equal  # its names differ


# ---- Experts -----------------------------------------------------------------------------------------------------------------

EXPERTS, INNER, WIDTH = 3, 2, 4


def experts_one_by_one(
    stem: str = "model.layers.0.mlp.experts", names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
) -> dict[str, tuple[int, ...]]:
    return {f"{stem}.{e}.{n}.weight": (WIDTH, INNER) if n == names[2] else (INNER, WIDTH) for e in range(EXPERTS) for n in names}


def experts_packed(stem: str = "model.layers.0.mlp.experts") -> dict[str, tuple[int, ...]]:
    return {f"{stem}.gate_up_proj": (EXPERTS, 2 * INNER, WIDTH), f"{stem}.down_proj": (EXPERTS, WIDTH, INNER)}


@pytest.mark.parametrize(
    "stored",
    [experts_one_by_one(), experts_one_by_one("model.layers.0.block_sparse_moe.experts", ("w1", "w3", "w2"))],
    ids=["qwen", "mixtral"],
)
def test_packed_experts_are_made_of_those_stored_one_by_one_and_the_other_way_round(stored: dict[str, tuple[int, ...]]) -> None:
    packed = experts_packed()
    rng = np.random.default_rng(0)
    values = {n: rng.standard_normal(s) for n, s in stored.items()}
    whole = {
        "gate_up_proj": np.stack([np.concatenate(list(values.values())[3 * e : 3 * e + 2]) for e in range(EXPERTS)]),
        "down_proj": np.stack([list(values.values())[3 * e + 2] for e in range(EXPERTS)]),
    }
    layout = meet(stored, packed)
    assert (layout.missing, layout.unused) == ((), ())
    for name, pieces in layout.stored.items():
        made = np.concatenate([values[p.name].reshape(-1)[p.first : p.first + p.elements] for p in pieces])
        np.testing.assert_array_equal(made.reshape(packed[name]), whole[name.rpartition(".")[2]])
    back = meet(packed, stored)
    assert (back.missing, back.unused) == ((), ())
    for name, pieces in back.stored.items():
        (piece,) = pieces
        found = whole[piece.name.rpartition(".")[2]].reshape(-1)[piece.first : piece.first + piece.elements]
        np.testing.assert_array_equal(found.reshape(stored[name]), values[name])
