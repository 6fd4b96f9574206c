"""LoRA files without a config: read by the names of the base, and folded to what the formulas of their programs give in float64."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import alnico
import made
from alnico.checkpoint.open_adapter import open_adapter
from alnico.errors import ModelError
from lora import dialect_files as files
from lora.dialect_files import lora, near, random_factors

Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
OUT = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
FF = "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj"
CONV = "down_blocks.0.resnets.0.conv1"
PROJ = "down_blocks.0.attentions.0.proj_in"


def kohya(module: str) -> str:
    return "lora_unet_" + module.replace(".", "_")


def folded(base: Path, *adapters: Path, **options: object) -> dict[str, np.ndarray]:
    """The tensors of a fold, in memory."""
    return alnico.lora.fold(base, list(adapters), **options)  # type: ignore[return-value]


def as_arrays(found: dict) -> dict[str, np.ndarray]:
    return {name: np.asarray(values) for name, values in found.items()}


def agrees(found: dict, before: dict, changes: dict[str, np.ndarray]) -> None:
    """Each changed tensor is the base plus a change, to 1e-6 of its largest entry, and all others keep their bits."""
    found = as_arrays(found)
    assert set(found) == set(before)
    for name, values in before.items():
        if name not in changes:
            assert np.array_equal(found[name], values), name
            continue
        expected = values.astype(np.float64) + changes[name].reshape(values.shape)
        assert near(found[name], expected), name


ALGEBRAS: dict[str, tuple[str, files.Factors]] = {
    "LoRA": (Q, lora((8, 8), 2, 1, alpha=3)),
    "LoRA without alpha": (Q, lora((8, 8), 3, 2)),
    "LoRA of a convolution": (CONV, lora((8, 8, 3, 3), 2, 3, alpha=1)),
    "LoRA of a 1x1 convolution": (PROJ, lora((8, 8, 1, 1), 2, 4, alpha=2)),
    "LoRA of a 1x1 convolution, stored as matrices": (PROJ, lora((8, 8), 2, 4, alpha=2)),
    "LoRA with a core": (
        CONV,
        random_factors({".lora_down.weight": (3, 8, 1, 1), ".lora_mid.weight": (3, 3, 3, 3), ".lora_up.weight": (8, 3, 1, 1)}, 5)
        | {".alpha": np.float32(2)},
    ),
    "LoHa": (
        FF,
        random_factors({".hada_w1_a": (48, 2), ".hada_w1_b": (2, 8), ".hada_w2_a": (48, 2), ".hada_w2_b": (2, 8)}, 6)
        | {".alpha": np.float32(5)},
    ),
    "LoHa of a rank above the matrix": (
        Q,
        random_factors({".hada_w1_a": (8, 5), ".hada_w1_b": (5, 8), ".hada_w2_a": (8, 5), ".hada_w2_b": (5, 8)}, 7),
    ),
    "LoHa of a convolution": (
        CONV,
        random_factors({".hada_w1_a": (8, 2), ".hada_w1_b": (2, 72), ".hada_w2_a": (8, 2), ".hada_w2_b": (2, 72)}, 8)
        | {".alpha": np.float32(1)},
    ),
    "LoHa with cores": (
        CONV,
        random_factors(
            {
                ".hada_t1": (2, 2, 3, 3), ".hada_w1_a": (2, 8), ".hada_w1_b": (2, 8),
                ".hada_t2": (2, 2, 3, 3), ".hada_w2_a": (2, 8), ".hada_w2_b": (2, 8),
            },
            9,
        )
        | {".alpha": np.float32(1)},
    ),
    "LoKr of two whole matrices": (
        FF,
        random_factors({".lokr_w1": (6, 2), ".lokr_w2": (8, 4)}, 10) | {".alpha": np.float32(7)},
    ),
    "LoKr with a low rank": (
        FF,
        random_factors({".lokr_w1": (6, 2), ".lokr_w2_a": (8, 2), ".lokr_w2_b": (2, 4)}, 11) | {".alpha": np.float32(3)},
    ),
    "LoKr of two low ranks": (
        FF,
        random_factors({".lokr_w1_a": (6, 1), ".lokr_w1_b": (1, 2), ".lokr_w2_a": (8, 1), ".lokr_w2_b": (1, 4)}, 12)
        | {".alpha": np.float32(3)},
    ),
    "LoKr of a convolution": (
        CONV,
        random_factors({".lokr_w1": (2, 4), ".lokr_w2": (4, 2, 3, 3)}, 13),
    ),
    "LoKr of a convolution with a low rank": (
        CONV,
        random_factors({".lokr_w1": (2, 4), ".lokr_w2_a": (4, 3), ".lokr_w2_b": (3, 18)}, 14) | {".alpha": np.float32(2)},
    ),
    "LoKr with a core": (
        CONV,
        random_factors({".lokr_w1": (2, 4), ".lokr_t2": (3, 3, 3, 3), ".lokr_w2_a": (3, 4), ".lokr_w2_b": (3, 2)}, 15)
        | {".alpha": np.float32(2)},
    ),
    "a whole difference": (CONV, random_factors({".diff": (8, 8, 3, 3)}, 16)),
}  # fmt: skip


@pytest.mark.parametrize("case", ALGEBRAS)
def test_a_fold_is_what_the_formula_gives(tmp_path: Path, case: str) -> None:
    module, factors = ALGEBRAS[case]
    before = files.unet(tmp_path / "unet")
    adapter = files.file_of(tmp_path / "a.safetensors", {kohya(module): factors})
    agrees(folded(tmp_path / "unet", adapter), before, {f"{module}.weight": files.added(factors)})


@pytest.mark.parametrize("case", ALGEBRAS)
def test_the_factors_of_any_algebra_are_its_difference(tmp_path: Path, case: str) -> None:
    """What combinations compute with: left @ right is the difference, with the rank that the update states."""
    module, factors = ALGEBRAS[case]
    path = files.file_of(tmp_path / "a.safetensors", {kohya(module): factors})
    with open_adapter(str(path)) as adapter:
        (update,) = adapter.updates.values()
        (left,), (right,) = adapter.matrices(update, np.dtype(np.float64))
        assert left.shape[1] == right.shape[0] == update.rank
        assert near(update.scale * left @ right, files.added(factors))


@pytest.mark.parametrize("case", ["LoRA", "LoHa", "LoKr with a low rank", "LoRA with a core"])
@pytest.mark.parametrize("side", ["output", "input"])
def test_dora_rescales_outputs_or_inputs(tmp_path: Path, case: str, side: str) -> None:
    module, factors = ALGEBRAS[case]
    before = files.unet(tmp_path / "unet")
    weight = before[f"{module}.weight"]
    ones = (1,) * (weight.ndim - 2)
    shape = (weight.shape[0], 1, *ones) if side == "output" else (1, weight.shape[1], *ones)
    magnitude = np.random.default_rng(3).uniform(0.5, 2, shape).astype(np.float32)
    adapter = files.file_of(tmp_path / "a.safetensors", {kohya(module): factors | {".dora_scale": magnitude}})
    found = as_arrays(folded(tmp_path / "unet", adapter))[f"{module}.weight"]
    expected = files.with_dora(weight, files.added(factors), magnitude)
    assert near(found, expected)
    half = as_arrays(folded(tmp_path / "unet", adapter, weights=0.5))[f"{module}.weight"]
    assert near(half, (weight + expected) / 2)


def test_differences_of_biases_and_norms_are_added(tmp_path: Path) -> None:
    norm = "down_blocks.0.attentions.0.transformer_blocks.0.norm1"
    before = files.unet(tmp_path / "unet")
    factors = {
        OUT: random_factors({".diff_b": (8,)}, 1) | lora((8, 8), 2, 5, alpha=1, words="peft"),
        norm: random_factors({".diff": (8,)}, 2),
    }
    adapter = files.file_of(
        tmp_path / "a.safetensors", {f"diffusion_model.{m}": f for m, f in factors.items()}
    )
    changes = {
        f"{OUT}.weight": files.added({n: v for n, v in factors[OUT].items() if n != ".diff_b"}),
        f"{OUT}.bias": factors[OUT][".diff_b"],
        f"{norm}.weight": factors[norm][".diff"],
    }
    agrees(folded(tmp_path / "unet", adapter), before, changes)


SPELLINGS = {
    "kohya": ("kohya", lambda m: "lora_unet_" + m.replace(".", "_")),
    "OneTrainer": ("kohya", lambda m: "lora_transformer_" + m.replace(".", "_")),
    "Wan": ("kohya", lambda m: "lora_unet__" + m.replace(".", "_")),
    "LyCORIS": ("kohya", lambda m: "lycoris_" + m.replace(".", "_")),
    "ComfyUI": ("peft", lambda m: "diffusion_model." + m),
    "ComfyUI, up and down": ("kohya", lambda m: "diffusion_model." + m),
    "diffusers": ("peft", lambda m: "unet." + m),
    "diffusers of a transformer": ("peft", lambda m: "transformer." + m),
    "diffusers of one part": ("peft", lambda m: m),
    "diffusers, older": ("plain", lambda m: "unet." + m),
    "diffusers, processors": (
        "processor",
        lambda m: "unet." + m.replace("attn1.", "attn1.processor.").removesuffix(".0"),
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_each_dialect_is_matched_by_the_names_of_the_base(tmp_path: Path, spelling: str) -> None:
    words, name = SPELLINGS[spelling]
    before = files.unet(tmp_path / "unet")
    modules = {
        m: lora((8, 8), 2, i, alpha=i + 1 if words == "kohya" else None, words=words)
        for i, m in enumerate((Q, OUT))
    }
    adapter = files.file_of(tmp_path / "a.safetensors", {name(m): f for m, f in modules.items()})
    changes = {f"{m}.weight": files.added(f) for m, f in modules.items()}
    agrees(folded(tmp_path / "unet", adapter), before, changes)
    alnico.merge(
        {"merge_method": "passthrough", "models": [f"{tmp_path / 'unet'}+0.5*{adapter}"]}, tmp_path / "out"
    )
    agrees(made.read_model(tmp_path / "out"), before, {n: 0.5 * c for n, c in changes.items()})


def test_a_folder_that_diffusers_wrote_is_an_adapter(tmp_path: Path) -> None:
    before = files.unet(tmp_path / "unet")
    factors = lora((8, 8), 2, 1, words="peft")
    files.file_of(tmp_path / "adapter" / "pytorch_lora_weights.safetensors", {f"unet.{Q}": factors})
    agrees(folded(tmp_path / "unet", tmp_path / "adapter"), before, {f"{Q}.weight": files.added(factors)})


def test_ranks_and_alphas_that_diffusers_states_in_the_header_are_applied(tmp_path: Path) -> None:
    before = files.unet(tmp_path / "unet")
    modules = {Q: lora((8, 8), 4, 1, words="peft"), OUT: lora((8, 8), 2, 2, words="peft")}
    stated = {
        "unet.r": 4,
        "unet.lora_alpha": 6,
        "unet.rank_pattern": {"to_out.0": 2},
        "unet.alpha_pattern": {"to_out.0": 8},
        "unet.peft_type": "LORA",
    }
    adapter = files.file_of(
        tmp_path / "a.safetensors",
        {f"unet.{m}": f for m, f in modules.items()},
        lora_adapter_metadata=json.dumps(stated),
    )
    changes = {f"{Q}.weight": 1.5 * files.added(modules[Q]), f"{OUT}.weight": 4 * files.added(modules[OUT])}
    agrees(folded(tmp_path / "unet", adapter), before, changes)


LDM = {
    "input_blocks.0.0": "conv_in",
    "input_blocks.1.0.in_layers.2": CONV,
    "input_blocks.1.1.proj_in": PROJ,
    "input_blocks.1.1.transformer_blocks.0.attn1.to_q": Q,
    "input_blocks.3.0.op": "down_blocks.0.downsamplers.0.conv",
    "middle_block.1.proj_in": "mid_block.attentions.0.proj_in",
    "output_blocks.5.1.proj_out": "up_blocks.1.attentions.2.proj_out",
    "output_blocks.5.2.conv": "up_blocks.1.upsamplers.0.conv",
}
"""Names of the original checkpoints of SD, and diffusers'."""


@pytest.mark.parametrize("is_ldm", [True, False], ids=["LDM names", "diffusers' names"])
@pytest.mark.parametrize("is_checkpoint", [True, False], ids=["on a checkpoint", "on a U-Net of diffusers"])
def test_names_of_one_form_are_found_in_a_base_of_the_other(
    tmp_path: Path, is_ldm: bool, is_checkpoint: bool
) -> None:
    values = files.unet(tmp_path / "unet")
    base = tmp_path / "unet"
    if is_checkpoint:
        base = tmp_path / "sd.safetensors"
        values = {f"model.diffusion_model.{a}.weight": values[f"{b}.weight"] for a, b in LDM.items()}
        values["first_stage_model.decoder.conv_in.weight"] = np.ones((8, 4, 3, 3), np.float32)
        made.save_file(base, {n: ("F32", v) for n, v in values.items()})
    factors = {a: lora(files.UNET[f"{b}.weight"], 2, i, alpha=1) for i, (a, b) in enumerate(LDM.items())}
    adapter = files.file_of(
        tmp_path / "a.safetensors", {kohya(a if is_ldm else LDM[a]): f for a, f in factors.items()}
    )
    changes = {
        (f"model.diffusion_model.{a}.weight" if is_checkpoint else f"{LDM[a]}.weight"): files.added(f)
        for a, f in factors.items()
    }
    agrees(folded(base, adapter), values, changes)


FLUX = {
    "double_blocks.0.img_attn.qkv": ([f"transformer_blocks.0.attn.to_{p}" for p in "qkv"], [4, 4, 4], 4),
    "double_blocks.0.txt_attn.qkv": ([f"transformer_blocks.0.attn.add_{p}_proj" for p in "qkv"], [4, 4, 4], 4),
    "double_blocks.0.img_mlp.0": (["transformer_blocks.0.ff.net.0.proj"], [16], 4),
    "double_blocks.0.txt_mod.lin": (["transformer_blocks.0.norm1_context.linear"], [24], 4),
    "single_blocks.1.linear1": ([*(f"single_transformer_blocks.1.attn.to_{p}" for p in "qkv"), "single_transformer_blocks.1.proj_mlp"], [4, 4, 4, 16], 4),
    "single_blocks.1.linear2": (["single_transformer_blocks.1.proj_out"], [4], 20),
    "img_in": (["x_embedder"], [4], 16),
    "time_in.in_layer": (["time_text_embed.timestep_embedder.linear_1"], [4], 8),
}  # fmt: skip
"""Modules of Flux as it was published, their parts in diffusers with their rows, and their columns."""


def flux(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Save a small Flux in both forms, and return their tensors: as published, and diffusers'."""
    random = np.random.default_rng(5)
    published, of_diffusers = {}, {}
    for name, (parts, rows, columns) in FLUX.items():
        whole = random.standard_normal((sum(rows), columns)).astype(np.float32)
        published[f"{name}.weight"] = whole
        pieces = np.split(whole, np.cumsum(rows)[:-1])
        of_diffusers |= {f"{part}.weight": piece for part, piece in zip(parts, pieces, strict=True)}
    made.save_file(folder / "flux.safetensors", {n: ("F32", v) for n, v in published.items()})
    made.save_file(
        folder / "transformer" / "diffusion_pytorch_model.safetensors",
        {n: ("F32", v) for n, v in of_diffusers.items()},
    )
    return published, of_diffusers


@pytest.mark.parametrize("kind", ["LoRA", "LoKr"])
def test_a_lora_of_fused_matrices_changes_their_parts(tmp_path: Path, kind: str) -> None:
    published, of_diffusers = flux(tmp_path)
    factors = {}
    for i, (name, (_, rows, columns)) in enumerate(FLUX.items()):
        shapes = {".lokr_w1": (2, 2), ".lokr_w2": (sum(rows) // 2, columns // 2)}
        factors[name] = (
            lora((sum(rows), columns), 2, i, alpha=3) if kind == "LoRA" else random_factors(shapes, i)
        )
    adapter = files.file_of(tmp_path / "a.safetensors", {kohya(n): f for n, f in factors.items()})
    whole = {f"{n}.weight": files.added(f) for n, f in factors.items()}
    agrees(folded(tmp_path / "flux.safetensors", adapter), published, whole)
    changes = {}
    for name, (parts, rows, _) in FLUX.items():
        pieces = np.split(whole[f"{name}.weight"], np.cumsum(rows)[:-1])
        changes |= {f"{part}.weight": piece for part, piece in zip(parts, pieces, strict=True)}
    agrees(folded(tmp_path / "transformer", adapter), of_diffusers, changes)


@pytest.mark.parametrize("kind", ["LoRA", "LoHa"])
def test_a_lora_of_parts_changes_rows_of_a_fused_matrix(tmp_path: Path, kind: str) -> None:
    published, of_diffusers = flux(tmp_path)
    factors = {}
    for i, (name, values) in enumerate(of_diffusers.items()):
        if name == "transformer_blocks.0.attn.to_k.weight":
            continue  # a part without an update
        (rows, columns), module = values.shape, name.removesuffix(".weight")
        shapes = {
            ".hada_w1_a": (rows, 2),
            ".hada_w1_b": (2, columns),
            ".hada_w2_a": (rows, 2),
            ".hada_w2_b": (2, columns),
        }
        factors[module] = (
            lora((rows, columns), 2, i, words="peft") if kind == "LoRA" else random_factors(shapes, i)
        )
    adapter = files.file_of(tmp_path / "a.safetensors", {f"transformer.{m}": f for m, f in factors.items()})
    agrees(
        folded(tmp_path / "transformer", adapter),
        of_diffusers,
        {f"{m}.weight": files.added(f) for m, f in factors.items()},
    )
    changes = {
        f"{name}.weight": np.concatenate(
            [
                files.added(factors[p]) if p in factors else np.zeros((r, columns))
                for p, r in zip(parts, rows, strict=True)
            ]
        )
        for name, (parts, rows, columns) in FLUX.items()
    }
    agrees(folded(tmp_path / "flux.safetensors", adapter), published, changes)


LAST_LAYER: dict[str, files.Factors] = {
    "LoRA": lora((8, 4), 2, 1, alpha=3),
    "LoRA with a bias": lora((8, 4), 2, 1, alpha=3) | random_factors({".diff_b": (8,)}, 2),
    "LoHa": random_factors({".hada_w1_a": (8, 2), ".hada_w1_b": (2, 4), ".hada_w2_a": (8, 2), ".hada_w2_b": (2, 4)}, 3),
    "a whole difference": random_factors({".diff": (8, 4)}, 4),
    "DoRA": lora((8, 4), 2, 5) | {".dora_scale": np.linspace(0.5, 2, 8, dtype=np.float32)[:, None]},
    "DoRA of inputs": lora((8, 4), 2, 6) | {".dora_scale": np.linspace(0.5, 2, 4, dtype=np.float32)[None]},
}  # fmt: skip


@pytest.mark.parametrize("is_published", [True, False], ids=["published names", "diffusers' names"])
@pytest.mark.parametrize("kind", LAST_LAYER)
def test_shift_and_scale_of_the_last_layer_change_places(
    tmp_path: Path, kind: str, is_published: bool
) -> None:
    """Flux's last modulation is (shift, scale) as published, and (scale, shift) in diffusers: a file of one form on a base of the other."""
    published, of_diffusers = "final_layer.adaLN_modulation.1", "norm_out.linear"
    random = np.random.default_rng(9)
    weight, bias = (random.standard_normal(s).astype(np.float32) for s in ((8, 4), (8,)))
    own, other = (published, of_diffusers) if is_published else (of_diffusers, published)
    swapped = {f"{other}.weight": np.roll(weight, 4, 0), f"{other}.bias": np.roll(bias, 4)}
    for folder, tensors in (("own", {f"{own}.weight": weight, f"{own}.bias": bias}), ("other", swapped)):
        made.save_file(tmp_path / folder / "model.safetensors", {n: ("F32", v) for n, v in tensors.items()})
    factors = LAST_LAYER[kind]
    adapter = files.file_of(tmp_path / "a.safetensors", {f"diffusion_model.{own}": factors})
    change = files.added({n: v for n, v in factors.items() if n not in (".diff_b", ".dora_scale")})
    expected = {"weight": weight + change, "bias": bias + factors.get(".diff_b", 0)}
    if ".dora_scale" in factors:
        expected["weight"] = files.with_dora(weight, change, factors[".dora_scale"])
    for parameter, values in expected.items():
        assert near(as_arrays(folded(tmp_path / "own", adapter))[f"{own}.{parameter}"], values)
        found = as_arrays(folded(tmp_path / "other", adapter))[f"{other}.{parameter}"]
        assert near(found, np.roll(values, 4, 0))


CLIP = {
    "self_attn.q_proj": (4, 4),
    "self_attn.k_proj": (4, 4),
    "self_attn.v_proj": (4, 4),
    "self_attn.out_proj": (4, 4),
    "mlp.fc1": (8, 4),
}


def test_text_encoders_of_a_checkpoint_are_told_apart(tmp_path: Path) -> None:
    """SDXL's: the first has transformers' names, the second OpenCLIP's, with q, k and v in one matrix."""
    random = np.random.default_rng(7)
    layer = "text_model.encoder.layers.1"
    first = {f"conditioner.embedders.0.transformer.{layer}.{m}.weight": s for m, s in CLIP.items()}
    second = "conditioner.embedders.1.model.transformer.resblocks.1"
    shapes = first | {
        f"{second}.attn.in_proj_weight": (12, 4),
        f"{second}.attn.out_proj.weight": (4, 4),
        f"{second}.mlp.c_fc.weight": (8, 4),
    }
    values = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    made.save_file(tmp_path / "sdxl.safetensors", {n: ("F32", v) for n, v in values.items()})
    modules = {
        f"lora_te{i}_{(layer + '.' + m).replace('.', '_')}": lora(s, 2, 10 * i + j, alpha=1)
        for i in (1, 2)
        for j, (m, s) in enumerate(CLIP.items())
    }
    adapter = files.file_of(tmp_path / "a.safetensors", modules)
    change = {n: files.added(f) for n, f in modules.items()}
    of_second = {m: change[f"lora_te2_{(layer + '.' + m).replace('.', '_')}"] for m in CLIP}
    changes = {
        f"conditioner.embedders.0.transformer.{layer}.{m}.weight": change[
            f"lora_te1_{(layer + '.' + m).replace('.', '_')}"
        ]
        for m in CLIP
    }
    changes[f"{second}.attn.in_proj_weight"] = np.concatenate(
        [of_second[f"self_attn.{p}_proj"] for p in "qkv"]
    )
    changes[f"{second}.attn.out_proj.weight"] = of_second["self_attn.out_proj"]
    changes[f"{second}.mlp.c_fc.weight"] = of_second["mlp.fc1"]
    agrees(folded(tmp_path / "sdxl.safetensors", adapter), values, changes)


def test_a_file_of_half_precision_on_a_base_of_half_precision(tmp_path: Path) -> None:
    """The sum is float32 and is rounded once, as in every fold."""
    factors = lora((8, 8), 2, 1, alpha=1)
    values = np.random.default_rng(1).standard_normal((8, 8)).astype(np.float16)
    made.save_file(tmp_path / "base" / "model.safetensors", {f"{Q}.weight": ("F16", values)})
    half = {n: v.astype(np.float16) for n, v in factors.items()}
    adapter = files.file_of(tmp_path / "a.safetensors", {kohya(Q): half}, "F16")
    found = as_arrays(folded(tmp_path / "base", adapter))[f"{Q}.weight"]
    exact = values.astype(np.float64) + files.added({n: v.astype(np.float32) for n, v in half.items()})
    assert found.dtype == np.float16
    assert np.array_equal(found, exact.astype(np.float16))


def test_the_part_that_is_read_changes_no_bit(tmp_path: Path) -> None:
    files.unet(tmp_path / "unet")
    modules = {
        kohya(m): f
        for m, f in (ALGEBRAS["LoHa"], ALGEBRAS["LoKr with a core"], ALGEBRAS["LoRA with a core"])
        if m != CONV or ".lokr_w1" in f
    }
    adapter = files.file_of(tmp_path / "a.safetensors", modules)
    with alnico.open_model(f"{tmp_path / 'unet'}+{adapter}") as model:
        for name in (f"{FF}.weight", f"{CONV}.weight"):
            whole = bytearray(model.tensors[name].byte_size)
            model.read_into(name, 0, memoryview(whole))
            for step in (4, 12, 100):
                parts = bytearray(len(whole))
                for begin in range(0, len(whole), step):
                    model.read_into(name, begin, memoryview(parts)[begin : begin + step])
                assert parts == whole, (name, step)


def test_a_dict_of_tensors_in_a_dialect_needs_no_config(tmp_path: Path) -> None:
    before = files.unet(tmp_path / "unet")
    factors = lora((8, 8), 2, 1, alpha=3)
    tensors = {kohya(Q) + ending: np.asarray(values) for ending, values in factors.items()}
    agrees(alnico.lora.fold(before, tensors), before, {f"{Q}.weight": files.added(factors)})


def test_a_file_of_bare_names_says_that_its_scale_is_assumed(tmp_path: Path) -> None:
    files.unet(tmp_path / "unet")
    adapter = files.file_of(tmp_path / "a.safetensors", {Q: lora((8, 8), 2, 1, words="peft")})
    with alnico.open_model(f"{tmp_path / 'unet'}+{adapter}") as model:
        assert any("has no alphas and no config" in note for note in model.notes)


def refused(tmp_path: Path, modules: dict[str, files.Factors], **metadata: str) -> str:
    files.unet(tmp_path / "unet")
    adapter = files.file_of(tmp_path / "a.safetensors", modules, **metadata)
    with pytest.raises(ModelError) as caught:
        alnico.open_model(f"{tmp_path / 'unet'}+{adapter}")
    return str(caught.value).replace(str(tmp_path), "").removeprefix("/unet+")


BAD: dict[str, tuple[dict[str, files.Factors], str]] = {
    "another base": (
        {kohya(Q): lora((8, 12), 2, 1)},
        f"/a.safetensors: {Q}.weight is (8, 8) in the base, the adapter's {kohya(Q)} is for (8, 12); expected one shape. Use the base that it "
        "was trained for.",
    ),
    "another kernel": (
        {kohya(CONV): lora((8, 24, 3, 1), 2, 1)},
        f"/a.safetensors: {CONV}.weight is (8, 8, 3, 3) in the base, the adapter's {kohya(CONV)} is for (8, 24, 3, 1); expected one shape. Use "
        "the base that it was trained for.",
    ),
    "modules of another architecture": (
        {"lora_unet_double_blocks_0_img_attn_qkv": lora((8, 8), 2, 1)},
        "/a.safetensors: 1 of 1 modules of /a.safetensors match nothing in /unet: lora_unet_double_blocks_0_img_attn_qkv; expected modules of "
        "the base. Use the base that it was trained for.",
    ),
    "an alpha that is no number": (
        {kohya(Q): lora((8, 8), 2, 1, alpha=float("nan"))},
        f"/a.safetensors: {kohya(Q)}.alpha is nan; expected a finite number, which the factors are scaled by. Get the file from its source.",
    ),
    "several alphas": (
        {kohya(Q): lora((8, 8), 2, 1) | {".alpha": np.ones(2, np.float32)}},
        f"/a.safetensors: {kohya(Q)}.alpha is F32 of (2,); expected one number. Get the file from its source.",
    ),
    "up without down": (
        {kohya(Q): random_factors({".lora_up.weight": (8, 2)}, 1)},
        f"/a.safetensors: has {kohya(Q)}.lora_up.weight for {kohya(Q)}, and not all factors; expected up (lora_B) and down (lora_A). Complete the download.",
    ),
    "another kind": (
        {kohya(Q): lora((8, 8), 2, 1) | random_factors({".oft_blocks": (2, 4, 4)}, 1)},
        f"/a.safetensors: {kohya(Q)}.oft_blocks is of a kind that is not applied here; expected factors of LoRA, LoHa or LoKr, differences, alphas "
        "or DoRA's norms. Merge the file into its base with the program that wrote it, and use the result.",
    ),
    "two dialects": (
        {kohya(Q): lora((8, 8), 2, 1), f"diffusion_model.{OUT}": lora((8, 8), 2, 2)},
        f"/a.safetensors: mixes the names of several programs, such as {kohya(Q)}.lora_down.weight and "
        f"diffusion_model.{OUT}.lora_down.weight; expected those of one. Convert the file with one program, or split it.",
    ),
    "ranks that do not fit": (
        {kohya(Q): random_factors({".lora_down.weight": (2, 8), ".lora_up.weight": (8, 3)}, 1)},
        f"/a.safetensors: {kohya(Q)}.lora_down.weight is (2, 8), {kohya(Q)}.lora_up.weight is (8, 3); expected factors of LoRA that fit "
        "together. Get the file from its source.",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_wrong_has_one_message(tmp_path: Path, what: str) -> None:
    modules, message = BAD[what]
    assert refused(tmp_path, modules) == message


def test_what_matches_nothing_is_named_with_what_the_file_was_trained_for(tmp_path: Path) -> None:
    modules = {
        kohya(Q): lora((8, 8), 2, 1),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": lora((8, 4), 2, 1),
    }
    stated = {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}
    message = refused(tmp_path, modules, **stated)
    assert (
        "1 of 2 modules of /a.safetensors match nothing in /unet: lora_te1_text_model_encoder_layers_0_mlp_fc1;"
        in message
    )
    assert "Its header says that it is for stable-diffusion-xl-v1-base/lora." in message
    assert message.endswith("is left out with blocks (--blocks BASE=0).")


def test_an_adapter_of_peft_without_its_config_is_answered_with_the_folder(tmp_path: Path) -> None:
    files.unet(tmp_path / "unet")
    adapter = files.file_of(
        tmp_path / "a.safetensors", {f"base_model.model.{Q}": lora((8, 8), 2, 1, words="peft")}
    )
    with pytest.raises(ModelError, match="has PEFT's names, such as base_model"):
        alnico.open_model(f"{tmp_path / 'unet'}+{adapter}")


def test_a_model_is_no_adapter(tmp_path: Path) -> None:
    files.unet(tmp_path / "unet")
    other = made.save_file(tmp_path / "b.safetensors", {f"{Q}.weight": ("F32", np.ones((8, 8)))})
    with pytest.raises(ModelError, match=r"has no adapter_config\.json and no factors of LoRA"):
        alnico.open_model(f"{tmp_path / 'unet'}+{other}")
