"""Combinations of LoRA files without a config: exact sums in float64, written in the dialect of the first."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

import alnico
from alnico.checkpoint.open_adapter import open_adapter
from alnico.errors import MismatchError, ModelError, OutputError
from lora import dialect_files as files
from lora.dialect_files import lora, near, random_factors

Q, FF, CONV = "lora_unet_down_blocks_0_attn1_to_q", "lora_unet_mid_block_ff", "lora_unet_down_blocks_0_conv1"
SHAPES = {Q: (8, 6), FF: (12, 8), CONV: (8, 4, 3, 3)}


def two(folder: Path, **more: files.Factors) -> tuple[list[Path], list[dict[str, files.Factors]]]:
    """Two files of kohya with other ranks and alphas, and their factors."""
    modules = [
        {m: lora(s, 2 + seed, 10 * seed + i, alpha=1 + seed) for i, (m, s) in enumerate(SHAPES.items())}
        for seed in (0, 1)
    ]
    modules[1] |= more
    paths = [
        files.file_of(folder / f"{i}.safetensors", m, ss_base_model_version="sd_v1", ss_seed=str(i))
        for i, m in enumerate(modules)
    ]
    return paths, modules


def differences(path: Path) -> dict[str, np.ndarray]:
    """What a file adds, by the reader under test, which other tests hold against the formulas."""
    found = {}
    with open_adapter(str(path)) as adapter:
        for update in adapter.updates.values():
            (left,), (right,) = adapter.matrices(update, np.dtype(np.float64))
            found[update.module] = update.scale * left @ right
    return found


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_a_sum_is_exact_and_has_the_names_of_its_files(tmp_path: Path, method: str) -> None:
    paths, modules = two(tmp_path)
    options = {"rank": 5} if method == "svd" else {}
    combined = alnico.lora.combine(
        paths, tmp_path / "out.safetensors", weights=[0.7, -0.4], method=method, **options
    )
    assert combined.path == tmp_path / "out.safetensors"
    with safe_open(tmp_path / "out.safetensors", "np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    assert set(tensors) == {m + e for m in SHAPES for e in (".lora_up.weight", ".lora_down.weight", ".alpha")}
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert "ss_seed" not in metadata
    assert json.loads(metadata["alnico.combined"])["weights"] == [0.7, -0.4]
    for module, shape in SHAPES.items():
        down, up = tensors[f"{module}.lora_down.weight"], tensors[f"{module}.lora_up.weight"]
        assert down.shape == (len(down), *shape[1:])
        assert up.shape == (shape[0], len(down), *[1] * (len(shape) - 2))
        found = files.added(
            {".lora_up.weight": up, ".lora_down.weight": down, ".alpha": tensors[f"{module}.alpha"]}
        )
        expected = 0.7 * files.added(modules[0][module]) - 0.4 * files.added(modules[1][module])
        assert near(found, expected), module


def test_a_folder_has_the_file_that_diffusers_looks_for_and_a_lock(tmp_path: Path) -> None:
    paths, _ = two(tmp_path)
    alnico.lora.combine(paths, tmp_path / "out", method="cat")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "README.md",
        "alnico.lock.json",
        "pytorch_lora_weights.safetensors",
    ]
    lock = json.loads((tmp_path / "out" / "alnico.lock.json").read_text())
    assert set(lock["inputs"][0]["tensors"]) == {
        m + e for m in SHAPES for e in (".lora_up.weight", ".lora_down.weight", ".alpha")
    }
    again = differences(tmp_path / "out")
    assert set(again) == set(SHAPES)
    assert alnico.verify(tmp_path / "out")


LYCORIS: dict[str, dict[str, files.Factors]] = {
    "LoHa": {
        Q: random_factors(
            {".hada_w1_a": (8, 2), ".hada_w1_b": (2, 6), ".hada_w2_a": (8, 2), ".hada_w2_b": (2, 6)}, 1
        )
        | {".alpha": np.float32(3)},
        CONV: random_factors(
            {".hada_w1_a": (8, 2), ".hada_w1_b": (2, 36), ".hada_w2_a": (8, 2), ".hada_w2_b": (2, 36)}, 2
        ),
    },
    "LoKr": {
        FF: random_factors({".lokr_w1": (3, 2), ".lokr_w2_a": (4, 2), ".lokr_w2_b": (2, 4)}, 3)
        | {".alpha": np.float32(2)},
        Q: random_factors({".lokr_w1": (2, 3), ".lokr_w2": (4, 2)}, 4),
    },
    "whole": {FF: random_factors({".diff": (12, 8)}, 5)},
}


@pytest.mark.parametrize("kind", LYCORIS)
@pytest.mark.parametrize("method", ["cat", "svd"])
def test_loha_and_lokr_are_combined_exactly_and_written_as_lora(
    tmp_path: Path, kind: str, method: str
) -> None:
    paths, modules = two(tmp_path)
    other = files.file_of(tmp_path / "lycoris.safetensors", LYCORIS[kind])
    options = {"rank": 36} if method == "svd" else {}
    combined = alnico.lora.combine(
        [paths[0], other], tmp_path / "out.safetensors", weights=[1, 0.5], method=method, **options
    )
    assert any("are written as LoRA" in note for note in combined.notes)
    found = differences(tmp_path / "out.safetensors")
    for module in SHAPES:
        expected = files.added(modules[0][module])
        if module in LYCORIS[kind]:
            expected = expected + 0.5 * files.added(LYCORIS[kind][module])
        assert near(found[module], expected), module


KEPT: dict[str, files.Factors] = {
    "LoHa": LYCORIS["LoHa"][Q],
    "LoHa of a convolution, without alpha": LYCORIS["LoHa"][CONV],
    "LoHa with cores": random_factors(
        {f".hada_{n}": s for i in "12" for n, s in ((f"t{i}", (2, 2, 3, 3)), (f"w{i}_a", (2, 8)), (f"w{i}_b", (2, 4)))}, 6
    ),
    "LoKr": LYCORIS["LoKr"][FF],
    "LoKr of whole matrices": LYCORIS["LoKr"][Q] | {".alpha": np.float32(5)},
    "a core": random_factors(
        {".lora_down.weight": (3, 4, 1, 1), ".lora_mid.weight": (3, 3, 3, 3), ".lora_up.weight": (8, 3, 1, 1)}, 7
    )
    | {".alpha": np.float32(2)},
    "whole": random_factors({".diff": (12, 8)}, 5),
}  # fmt: skip


def stored(path: Path) -> dict[str, files.Factors]:
    """The factors of each module of a file, without alnico."""
    found: dict[str, files.Factors] = {}
    with safe_open(path, "np") as file:
        for name in file.keys():  # noqa: SIM118
            module, _, ending = name.partition(".")
            found.setdefault(module, {})[f".{ending}"] = file.get_tensor(name)
    return found


@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.parametrize("method", ["cat", "svd"])
def test_a_module_that_one_file_alone_changes_keeps_its_form(tmp_path: Path, kind: str, method: str) -> None:
    module = "lora_unet_up_blocks_3_attentions_0_own"
    paths, modules = two(tmp_path)
    other = files.file_of(tmp_path / "lycoris.safetensors", {module: KEPT[kind], Q: modules[0][Q]})
    combined = alnico.lora.combine(
        [paths[0], other],
        tmp_path / "out.safetensors",
        weights=[1, -0.3],
        blocks=[None, "OUT09=0.5"],
        method=method,
    )
    assert any("keep their form" in note for note in combined.notes)
    found = stored(tmp_path / "out.safetensors")
    assert set(found[module]) - {".alpha"} == set(KEPT[kind]) - {".alpha"}
    scale = -0.3 * 0.5
    assert near(files.added(found[module]), scale * files.added(KEPT[kind]))
    assert near(differences(tmp_path / "out.safetensors")[module], scale * files.added(KEPT[kind]))
    assert near(files.added(found[Q]), 0.7 * files.added(modules[0][Q]))


def test_a_form_is_not_kept_where_the_rank_is_cut_or_a_method_makes_another_matrix(tmp_path: Path) -> None:
    other = files.file_of(tmp_path / "lycoris.safetensors", {Q: KEPT["LoHa"]})
    for options in ({"rank": 3}, {"energy": 0.9}, {"method": "ties", "density": 0.5}):
        combined = alnico.lora.combine([other], tmp_path / "out.safetensors", overwrite=True, **options)
        assert ".lora_up.weight" in stored(tmp_path / "out.safetensors")[Q]
        assert any("are written as LoRA" in note for note in combined.notes)
    alnico.lora.combine([other], tmp_path / "out.safetensors", overwrite=True, rank=4)
    assert ".hada_w1_a" in stored(tmp_path / "out.safetensors")[Q]


@pytest.mark.parametrize("space", ["dense", "core"])
def test_a_method_of_task_vectors_is_applied_to_what_the_files_add(tmp_path: Path, space: str) -> None:
    paths, modules = two(tmp_path)
    other = files.file_of(tmp_path / "lycoris.safetensors", LYCORIS["LoHa"])
    alnico.lora.combine([*paths, other], tmp_path / "out.safetensors", method="task_arithmetic", rank=36)
    alnico.lora.combine(
        [*paths, other], tmp_path / "ties.safetensors", method="ties", space=space, density=1.0, rank=36
    )
    found = differences(tmp_path / "ties.safetensors")
    assert set(found) == set(SHAPES)
    if space == "dense":  # TIES of all entries: the sign of the sum, the mean of those that agree
        stack = np.stack([files.added(m[Q]) for m in (*modules, LYCORIS["LoHa"])])
        sign = np.sign(stack.sum(0))
        agreeing = stack * (np.sign(stack) == sign)
        expected = agreeing.sum(0) / np.maximum((agreeing != 0).sum(0), 1)
        assert near(found[Q], expected, 1e-5)


def test_files_of_other_dialects_are_written_with_the_names_of_the_first(tmp_path: Path) -> None:
    paths, modules = two(tmp_path)
    name = "unet.down_blocks.0.attn1.to_q"
    factors = lora(SHAPES[Q], 3, 9, words="peft")
    other = files.file_of(
        tmp_path / "diffusers.safetensors", {name: factors, "unet.conv_out": lora((4, 4), 1, 3, words="peft")}
    )
    alnico.lora.combine([paths[0], other], tmp_path / "out.safetensors", method="cat")
    found = differences(tmp_path / "out.safetensors")
    assert set(found) == {*SHAPES, "lora_unet_conv_out"}
    assert near(found[Q], files.added(modules[0][Q]) + files.added(factors))
    with pytest.raises(MismatchError, match=r"Give .*0\.safetensors first"):
        alnico.lora.combine([other, paths[0]], tmp_path / "other.safetensors", method="cat")


SPELLINGS: dict[str, tuple[str, Callable[[str], str]]] = {
    "ComfyUI": ("peft", lambda m: f"diffusion_model.{m}"),
    "diffusers": ("peft", lambda m: f"unet.{m}"),
    "older diffusers": ("plain", lambda m: f"unet.{m}"),
}


@pytest.mark.parametrize("dialect", SPELLINGS)
def test_a_dialect_without_alphas_has_the_scale_in_its_factors(tmp_path: Path, dialect: str) -> None:
    words, name = SPELLINGS[dialect]
    factors = [lora((8, 6), 2, seed, words=words) for seed in (1, 2)]
    paths = [
        files.file_of(tmp_path / f"{i}.safetensors", {name("mid.to_q"): f}) for i, f in enumerate(factors)
    ]
    alnico.lora.combine(paths, tmp_path / "out.safetensors", weights=[0.3, 0.3], method="cat")
    with safe_open(tmp_path / "out.safetensors", "np") as file:
        assert set(file.keys()) == {name("mid.to_q") + e for e in factors[0]}
    assert near(
        differences(tmp_path / "out.safetensors")[name("mid.to_q")], 0.3 * sum(map(files.added, factors))
    )


def test_alphas_of_half_precision_files_are_not_rounded(tmp_path: Path) -> None:
    paths, _ = two(tmp_path)
    alnico.lora.combine(
        [paths[0]], tmp_path / "out.safetensors", weights=[0.7], method="cat", dtype="bfloat16"
    )
    with safe_open(tmp_path / "out.safetensors", "np") as file:
        assert file.get_tensor(f"{Q}.alpha").dtype == np.float32
        assert abs(file.get_tensor(f"{Q}.alpha") - 0.7) < 1e-7


def test_differences_of_vectors_are_summed(tmp_path: Path) -> None:
    biases = [random_factors({".diff_b": (8,)}, seed) for seed in (1, 2)]
    modules = [
        {
            "diffusion_model.q": lora((8, 6), 2, i, words="peft") | b,
            "diffusion_model.norm": random_factors({".diff": (8,)}, i),
        }
        for i, b in enumerate(biases)
    ]
    paths = [files.file_of(tmp_path / f"{i}.safetensors", m) for i, m in enumerate(modules)]
    alnico.lora.combine(paths, tmp_path / "out.safetensors", weights=[0.5, 2], method="cat")
    with safe_open(tmp_path / "out.safetensors", "np") as file:
        assert near(
            file.get_tensor("diffusion_model.q.diff_b"), 0.5 * biases[0][".diff_b"] + 2 * biases[1][".diff_b"]
        )
        norms = [m["diffusion_model.norm"][".diff"] for m in modules]
        assert near(file.get_tensor("diffusion_model.norm.diff"), 0.5 * norms[0] + 2 * norms[1])
    with pytest.raises(MismatchError, match="hold differences of a vector, and ties is for matrices"):
        alnico.lora.combine(paths, tmp_path / "ties.safetensors", method="ties")


def test_what_cannot_be_combined_is_refused(tmp_path: Path) -> None:
    paths, _ = two(tmp_path)
    magnitude = {Q: lora(SHAPES[Q], 2, 1) | {".dora_scale": np.ones((8, 1), np.float32)}}
    dora = files.file_of(tmp_path / "dora.safetensors", magnitude)
    with pytest.raises(ModelError, match="has DoRA magnitudes"):
        alnico.lora.combine([paths[0], dora], tmp_path / "out")
    other = files.file_of(tmp_path / "other.safetensors", {Q: lora((8, 7), 2, 1)})
    with pytest.raises(MismatchError, match="expected the same parameter in both"):
        alnico.lora.combine([paths[0], other], tmp_path / "out")
    from lora import made_adapters

    (tmp_path / "peft").mkdir()
    of_peft = made_adapters.linear(tmp_path / "peft")
    with pytest.raises(OutputError, match="expected a directory"):
        alnico.lora.combine([of_peft, of_peft], tmp_path / "out.safetensors")
    assert not (tmp_path / "out").exists()
