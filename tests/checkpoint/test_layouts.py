"""One model under two spellings: prefixes, names of transformers 4 and 5, experts packed or one by one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import alnico
import architectures
from alnico.checkpoint.layouts import SPELLINGS, Layout, find_layout, shapes_of
from alnico.checkpoint.renamed_model import with_names_of
from alnico.errors import MismatchError


def named(layout: Layout) -> dict[str, str | None]:
    return {name: layout.whole(name) for name in layout.stored}


def shapes(*names: str, shape: tuple[int, ...] = (4, 4)) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys(names, shape)


# ---- Prefixes ------------------------------------------------------------------------------------------------------------

ENCODER = ("encoder.layer.0.w", "encoder.layer.1.w", "pooler.w")


@pytest.mark.parametrize(
    "prefix",
    [
        "bert.",
        "module.",
        "_orig_mod.",
        "model.",
        "base_model.model.",
        "module._orig_mod.model.",
        "0_Transformer/",
    ],
)
def test_a_prefix_is_taken_off_and_put_on(prefix: str) -> None:
    plain, wrapped = shapes(*ENCODER), shapes(*(prefix + n for n in ENCODER))
    assert named(find_layout(wrapped, plain)) == {n: prefix + n for n in plain}
    assert named(find_layout(plain, wrapped)) == {prefix + n: n for n in plain}


def test_what_compile_and_fsdp_put_inside_a_name_is_left_out() -> None:
    wrapped = shapes(*(f"model._orig_mod.{n.replace('.0.', '.0._fsdp_wrapped_module.')}" for n in ENCODER))
    assert set(named(find_layout(wrapped, shapes(*(f"model.{n}" for n in ENCODER))))) == {
        f"model.{n}" for n in ENCODER
    }


def test_names_that_meet_as_they_are_are_left() -> None:
    layout = find_layout(shapes(*ENCODER), shapes(*ENCODER[:2]))
    assert layout.is_identity
    assert (layout.missing, layout.unused) == ((), ("pooler.w",))


def test_heads_that_one_model_has_alone_do_not_hinder() -> None:
    with_head = shapes(*(f"bert.{n}" for n in ENCODER)) | shapes("cls.predictions.w")
    layout = find_layout(shapes(*ENCODER), with_head)
    assert layout.missing == ("cls.predictions.w",)
    assert layout.unused == ()


def test_two_spellings_that_fit_are_refused_by_name() -> None:
    towers = shapes(*(f"{tower}.{n}" for tower in ("text", "vision") for n in ENCODER))
    with pytest.raises(MismatchError, match=r"text\.encoder\.layer\.0\.w: may be .* or nothing"):
        find_layout(shapes(*ENCODER), towers)


@pytest.mark.parametrize(
    ("full", "linear"),
    [
        ("model.layers.{}.self_attn.o_proj.weight", "model.layers.{}.self_attn.out_proj.weight"),  # MiniMax
        ("backbone.layers.{}.mixer.o_proj.weight", "backbone.layers.{}.mixer.out_proj.weight"),  # NemotronH
    ],
)
def test_tensors_that_a_model_keeps_apart_are_no_two_names_of_one(full: str, linear: str) -> None:
    rest = {f"model.layers.{i}.mlp.up_proj.weight": (8, 4) for i in range(3)}
    one = {full.format(0): (4, 4), linear.format(1): (4, 4), full.format(2): (4, 4), **rest}
    other = {linear.format(0): (4, 4), full.format(1): (4, 4), full.format(2): (4, 4), **rest}
    layout = find_layout(one, other)
    assert layout.is_identity
    assert layout.missing == (linear.format(0), full.format(1))


def test_models_of_other_names_do_not_meet() -> None:
    layout = find_layout(shapes("a.w", "b.w", "c.w"), shapes("x.v", "y.v", "z.v"))
    assert (layout.is_identity, dict(layout.stored)) == (True, {})


# ---- On disk, in memory, in every command ----------------------------------------------------------------------------------


def state(seed: int, *names: str, shape: tuple[int, ...] = (8, 8)) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {n: rng.standard_normal(shape, np.float32) for n in names}


def renamed(tensors: dict[str, np.ndarray], rename: Callable[[str], str]) -> dict[str, np.ndarray]:
    return {rename(n): v for n, v in tensors.items()}


@pytest.fixture
def pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    monkeypatch.chdir(tmp_path)
    base = state(0, *ENCODER)
    tuned = {n: v + np.float32(0.1) for n, v in base.items()}
    save_file(base, "base.safetensors")
    save_file(renamed(tuned, "module.bert.".__add__), "tuned.safetensors")
    return base, tuned


def test_a_merge_reads_a_wrapped_model_and_says_so(
    pair: tuple[dict[str, np.ndarray], dict[str, np.ndarray]],
) -> None:
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


def test_analyses_and_differences_read_a_wrapped_model_too(
    pair: tuple[dict[str, np.ndarray], dict[str, np.ndarray]],
) -> None:
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

EXPERTS, INNER, WIDTH = 3, 3, 4


def experts_one_by_one(
    stem: str = "model.layers.0.mlp.experts", names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
) -> dict[str, tuple[int, ...]]:
    return {
        f"{stem}.{e}.{n}.weight": (WIDTH, INNER) if n == names[2] else (INNER, WIDTH)
        for e in range(EXPERTS)
        for n in names
    }


def experts_packed(stem: str = "model.layers.0.mlp.experts") -> dict[str, tuple[int, ...]]:
    return {f"{stem}.gate_up_proj": (EXPERTS, 2 * INNER, WIDTH), f"{stem}.down_proj": (EXPERTS, WIDTH, INNER)}


@pytest.mark.parametrize(
    "stored",
    [
        experts_one_by_one(),
        experts_one_by_one("model.layers.0.block_sparse_moe.experts", ("w1", "w3", "w2")),
        experts_one_by_one("mtp.layers.0.mlp.experts"),
    ],
    ids=["qwen", "mixtral", "mtp"],
)
def test_packed_experts_are_made_of_those_stored_one_by_one_and_the_other_way_round(
    stored: dict[str, tuple[int, ...]],
) -> None:
    packed = experts_packed("mtp.layers.0.mlp.experts") if "mtp" in next(iter(stored)) else experts_packed()
    rng = np.random.default_rng(0)
    values = {n: rng.standard_normal(s) for n, s in stored.items()}
    whole = {
        "gate_up_proj": np.stack(
            [np.concatenate(list(values.values())[3 * e : 3 * e + 2]) for e in range(EXPERTS)]
        ),
        "down_proj": np.stack([list(values.values())[3 * e + 2] for e in range(EXPERTS)]),
    }
    layout = find_layout(stored, packed)
    assert (layout.missing, layout.unused) == ((), ())
    for name, pieces in layout.stored.items():
        made = np.concatenate([values[p.name].reshape(-1)[p.first : p.first + p.elements] for p in pieces])
        np.testing.assert_array_equal(made.reshape(packed[name]), whole[name.rpartition(".")[2]])
    back = find_layout(packed, stored)
    assert (back.missing, back.unused) == ((), ())
    for name, pieces in back.stored.items():
        (piece,) = pieces
        found = whole[piece.name.rpartition(".")[2]].reshape(-1)[piece.first : piece.first + piece.elements]
        np.testing.assert_array_equal(found.reshape(stored[name]), values[name])


# ---- The table, line by line, on models that transformers makes ------------------------------------------------------------------

MADE = {
    "llava": "LlavaForConditionalGeneration",
    "aria": "AriaForConditionalGeneration",
    "shieldgemma2": "ShieldGemma2ForImageClassification",
    "emu3": "Emu3ForConditionalGeneration",
    "paddleocr_vl": "PaddleOCRVLForConditionalGeneration",
    "hunyuan_vl": "HunYuanVLForConditionalGeneration",
    "cosmos3_edge": "Cosmos3EdgeForConditionalGeneration",
    "lfm3_vl": "Lfm3VlForConditionalGeneration",
    "hyperclovax_vision_v2": "HyperCLOVAXVisionV2ForConditionalGeneration",
    "altclip": "AltCLIPModel",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_omni_thinker": "Qwen2_5OmniThinkerForConditionalGeneration",
    "t5gemma2": "T5Gemma2ForConditionalGeneration",
    "mixtral": "MixtralForCausalLM",
    "phimoe": "PhimoeForCausalLM",
    "kimi_linear": "KimiLinearForCausalLM",
    "granitemoe": "GraniteMoeForCausalLM",
    "ernie4_5_moe": "Ernie4_5_MoeForCausalLM",
    "exaone_moe": "ExaoneMoeForCausalLM",
    "hy_v3": "HYV3ForCausalLM",
    "kolibri1": "Kolibri1ForCausalLM",
    "laguna": "LagunaForCausalLM",
    "nemotron_h": "NemotronHForCausalLM",
    "glm5_next": "Glm5NextForConditionalGeneration",
    "dory": "DoryForCausalLM",
    "deepseek_v4": "DeepseekV4ForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
    "mimo_v2_flash": "MiMoV2FlashForCausalLM",
    "axk1": "AXK1ForCausalLM",
    "axk2": "AXK2ForCausalLM",
    "olmo_hybrid": "OlmoHybridForCausalLM",
    "bailing_hybrid": "BailingHybridForCausalLM",
    "hrm_text": "HrmTextForCausalLM",
    "hy_v4": "HYV4ForCausalLM",
    "hy_v4_vl": "HYV4VLForConditionalGeneration",
    "lara_mini": "LaraMiniForCausalLM",
    "qianfan_ocr": "QianfanOCRForConditionalGeneration",
    "nemo_speechlm": "Nemotron3_5TranscribeForConditionalGeneration",
    "glm": "GlmForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "bert": "EsmForMaskedLM",
    "gte": "GteForMaskedLM",
    "jina_embeddings_v3": "JinaEmbeddingsV3ForMaskedLM",
    "nomic_bert": "NomicBertForMaskedLM",
    "ultrabert": "UltrabertForMaskedLM",
    "ultravbert": "UltraVBertForMaskedLM",
    "vit": "ViTForImageClassification",
    "vit_msn": "ViTMSNForImageClassification",
    "pixio": "PixioModel",
    "videomae": "VideoMAEForVideoClassification",
    "yolos": "YolosForObjectDetection",
    "rt_detr": "RTDetrForObjectDetection",
    "timesfm2_5": "TimesFm2_5ModelForPrediction",
    "dinov2": "Dinov2WithRegistersForImageClassification",
    "swin": "SegformerForImageClassification",
    "wav2vec2": "Wav2Vec2ForCTC",
}
"""For each line of the table an architecture that it is needed for."""

FAST = ("llava", "qwen2_vl", "mixtral", "vit", "glm", "phi3")


def test_every_line_of_the_table_has_a_model_here() -> None:
    assert [s.types[0] for s in SPELLINGS] == list(MADE)


def as_chatglm(stored: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of a GLM under the names of its first repositories, whose code fuses queries, keys and values."""
    names = {
        "model.embed_tokens.": "transformer.embedding.word_embeddings.",
        "model.layers.": "transformer.encoder.layers.",
        "model.norm.": "transformer.encoder.final_layernorm.",
        "lm_head.": "transformer.output_layer.",
        ".self_attn.o_proj.": ".self_attention.dense.",
        ".self_attn.q_proj.": ".self_attention.query_key_value.",
        ".mlp.gate_up_proj.": ".mlp.dense_h_to_4h.",
        ".mlp.down_proj.": ".mlp.dense_4h_to_h.",
    }
    old = {}
    for name, values in stored.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            values = np.concatenate([stored[name.replace(".q_proj.", f".{p}_proj.")] for p in "qkv"])
        for new, before in names.items():
            name = name.replace(new, before)
        old[name] = values
    return old


def apart(stored: dict[str, np.ndarray], config: Any) -> dict[str, np.ndarray]:
    """The tensors of a Phi-3 as programs for Llama store them: each projection apart."""
    head = config.hidden_size // config.num_attention_heads
    rows = [n * head for n in (config.num_attention_heads, *[config.num_key_value_heads] * 2)]
    single = {}
    for name, values in stored.items():
        if ".qkv_proj." in name:
            cuts = np.split(values, np.cumsum(rows)[:-1])
            single |= {name.replace(".qkv_proj.", f".{p}_proj."): v for p, v in zip("qkv", cuts, strict=True)}
        elif ".gate_up_proj." in name:
            halves = zip(("gate", "up"), np.split(values, 2), strict=True)
            single |= {name.replace(".gate_up_proj.", f".{p}_proj."): v for p, v in halves}
        else:
            single[name] = values
    return single


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in FAST else pytest.mark.slow) for kind in MADE]
)
def test_every_parameter_of_a_module_is_found_in_its_file_with_its_values(kind: str, tmp_path: Path) -> None:
    module = architectures.make(MADE[kind])
    module.save_pretrained(tmp_path)
    held = {n: v.detach().float().numpy() for n, v in module.state_dict().items()}
    with alnico.open_model(tmp_path) as file:
        stored = {name: file.read(name) for name in file.tensors}
    if kind == "wav2vec2":  # as torch wrote weight norms before it had parametrizations
        old = {
            ".parametrizations.weight.original0": ".weight_g",
            ".parametrizations.weight.original1": ".weight_v",
        }
        stored = {
            n.replace(k, old[k]) if (k := next((k for k in old if n.endswith(k)), "")) else n: v
            for n, v in stored.items()
        }
    if kind == "glm":
        stored = as_chatglm(stored)
    if kind == "phi3":
        stored = apart(stored, module.config)
    tied = set(getattr(module, "all_tied_weights_keys", None) or {})
    layout = find_layout(shapes_of(stored), shapes_of(held))
    assert set(stored) != set(held) - tied, "names agree: this model shows nothing"
    assert layout.unused == ()
    assert set(layout.missing) <= tied
    for name, pieces in layout.stored.items():
        made = np.concatenate([stored[p.name].reshape(-1)[p.first : p.first + p.elements] for p in pieces])
        np.testing.assert_array_equal(made.reshape(held[name].shape), held[name], err_msg=name)
    back = find_layout(shapes_of(held), shapes_of(stored))
    assert back.missing == ()
    for name, pieces in back.stored.items():
        made = np.concatenate([held[p.name].reshape(-1)[p.first : p.first + p.elements] for p in pieces])
        np.testing.assert_array_equal(made.reshape(stored[name].shape), stored[name], err_msg=name)


# ---- Gate and up ---------------------------------------------------------------------------------------------------------------


def experts(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in experts_one_by_one().items()}


def pack(one_by_one: dict[str, np.ndarray], first: str, second: str) -> dict[str, np.ndarray]:
    stem = "model.layers.0.mlp.experts"
    halves = [
        np.concatenate([one_by_one[f"{stem}.{e}.{n}.weight"] for n in (first, second)])
        for e in range(EXPERTS)
    ]
    down = [one_by_one[f"{stem}.{e}.down_proj.weight"] for e in range(EXPERTS)]
    return {f"{stem}.gate_up_proj": np.stack(halves), f"{stem}.down_proj": np.stack(down)}


@pytest.mark.parametrize(
    "order", [("gate_proj", "up_proj"), ("up_proj", "gate_proj")], ids=["gate first", "up first"]
)
@pytest.mark.parametrize("base", ["packed", "one by one"])
def test_the_order_of_gate_and_up_is_told_by_their_values(
    order: tuple[str, str], base: str, tmp_path: Path
) -> None:
    before = experts(0)
    tuned = {n: v + np.float32(0.1) * experts(1)[n] for n, v in before.items()}
    mean = {n: (before[n].astype(float) + tuned[n]) / 2 for n in before}
    first, second = (pack(before, *order), tuned) if base == "packed" else (before, pack(tuned, *order))
    expected = pack(mean, *order) if base == "packed" else mean
    save_file(first, tmp_path / "a.safetensors")
    save_file(second, tmp_path / "b.safetensors")
    alnico.merge(
        {"merge_method": "linear", "models": [str(tmp_path / n) for n in ("a.safetensors", "b.safetensors")]},
        tmp_path / "out.safetensors",
    )
    got = load_file(tmp_path / "out.safetensors")
    assert set(got) == set(expected)
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], atol=1e-6)


def test_gate_and_up_that_cannot_be_told_apart_are_refused(tmp_path: Path) -> None:
    before = experts(0)
    other = experts(1)  # of another model: neither half is like the other's
    save_file(pack(before, "gate_proj", "up_proj"), tmp_path / "a.safetensors")
    save_file(
        other | {n: np.zeros_like(v) for n, v in other.items() if "down_proj" not in n},
        tmp_path / "b.safetensors",
    )
    with pytest.raises(
        MismatchError,
        match=r"gate_up_proj: the gate and up projections of .* cannot be told apart by their values",
    ):
        alnico.plan(
            {
                "merge_method": "linear",
                "models": [str(tmp_path / n) for n in ("a.safetensors", "b.safetensors")],
            }
        )


def test_a_packed_tensor_is_read_from_any_byte_on(tmp_path: Path) -> None:
    before = experts(0)
    save_file(before, tmp_path / "one.safetensors")
    save_file(pack(before, "gate_proj", "up_proj"), tmp_path / "packed.safetensors")
    with (
        alnico.open_model(tmp_path / "one.safetensors") as one,
        alnico.open_model(tmp_path / "packed.safetensors") as packed,
    ):
        for source, like in ((one, packed), (packed, one)):
            translated = with_names_of(source, like)
            for name in like.tensors:
                raw = like.read(name).tobytes()
                for offset, size in ((0, len(raw)), (4, 12), (len(raw) // 2 - 4, 20), (len(raw) - 4, 4)):
                    buffer = bytearray(size)
                    translated.read_into(name, offset, memoryview(buffer))
                    assert bytes(buffer) == raw[offset : offset + size]


# ---- Stacks of transposes, as Llama 4 and gpt-oss have them --------------------------------------------------------------------


def stack(one_by_one: dict[str, np.ndarray], *, is_turned: bool) -> dict[str, np.ndarray]:
    """Pack experts, gate first: (experts, out, in), or (experts, in, out)."""
    packed = pack(one_by_one, "gate_proj", "up_proj")
    return {n: np.ascontiguousarray(v.swapaxes(1, 2)) for n, v in packed.items()} if is_turned else packed


FORMS: dict[str, Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]] = {
    "one by one": lambda experts: experts,
    "out first": lambda experts: stack(experts, is_turned=False),
    "in first": lambda experts: stack(experts, is_turned=True),
}


@pytest.mark.parametrize("other", FORMS)
@pytest.mark.parametrize("base", FORMS)
def test_a_stack_of_transposes_meets_every_other_form(base: str, other: str, tmp_path: Path) -> None:
    before = experts(0)
    tuned = {n: v + np.float32(0.1) * experts(1)[n] for n, v in before.items()}
    mean = FORMS[base]({n: (before[n].astype(float) + tuned[n]) / 2 for n in before})
    rest = {f"model.layers.0.self_attn.{p}_proj.weight": np.eye(4, dtype=np.float32) for p in "qkvo"}
    save_file({**FORMS[base](before), **rest}, tmp_path / "a.safetensors")
    save_file({**FORMS[other](tuned), **rest}, tmp_path / "b.safetensors")
    models = [str(tmp_path / n) for n in ("a.safetensors", "b.safetensors")]
    result = alnico.merge({"merge_method": "linear", "models": models}, tmp_path / "out.safetensors")
    got = load_file(tmp_path / "out.safetensors")
    assert set(got) == {*mean, *rest}
    for name in mean:
        np.testing.assert_allclose(got[name], mean[name], atol=1e-6)
    notes = [note for note in result.plan.notes if "experts are turned" in note]
    assert bool(notes) == (base != other and "in first" in (base, other))


@pytest.mark.parametrize("form", ["one by one", "out first"])
def test_a_turned_tensor_is_read_from_any_byte_on(form: str, tmp_path: Path) -> None:
    before = experts(0)
    save_file(FORMS[form](before), tmp_path / "one.safetensors")
    save_file(FORMS["in first"](before), tmp_path / "turned.safetensors")
    with (
        alnico.open_model(tmp_path / "one.safetensors") as one,
        alnico.open_model(tmp_path / "turned.safetensors") as turned,
    ):
        for source, like in ((one, turned), (turned, one)):
            translated = with_names_of(source, like)
            assert translated.reading_bytes > source.reading_bytes
            for name in like.tensors:
                raw = like.read(name).tobytes()
                for first in range(0, len(raw), 12):
                    part = bytearray(20 if first + 20 <= len(raw) else len(raw) - first)
                    translated.read_into(name, first, memoryview(part))
                    assert bytes(part) == raw[first : first + len(part)], (name, first)
