"""Adapters that change one of two tied tensors: the folded model gives the logits of PEFT's live model, which unties them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import alnico
import made
from alnico.checkpoint.tied_weights import tied_copies
from alnico.lora.combine import combine
from alnico.lora.extract import extract
from alnico.lora.fold import fold

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and peft

ROWS = 40
TOKENS = torch.arange(9)[None]
SMALL = {
    "vocab_size": ROWS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 1,
}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 2, "tie_word_embeddings": True}
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 16, "patch_size": 8,
}  # fmt: skip
KINDS: dict[str, tuple[str, Callable[[Any], Any], tuple[str, str, str]]] = {
    "llama": ("LlamaForCausalLM", lambda t: t.LlamaConfig(**GROUPED), ("embed_tokens", "lm_head", "q_proj")),
    "qwen2": ("Qwen2ForCausalLM", lambda t: t.Qwen2Config(**GROUPED), ("embed_tokens", "lm_head", "q_proj")),
    "gemma": ("GemmaForCausalLM", lambda t: t.GemmaConfig(**GROUPED, head_dim=8), ("embed_tokens", "lm_head", "q_proj")),
    "phi": ("PhiForCausalLM", lambda t: t.PhiConfig(**SMALL, tie_word_embeddings=True), ("embed_tokens", "lm_head", "q_proj")),
    "gpt2": (
        "GPT2LMHeadModel",
        lambda t: t.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=ROWS, n_positions=64),
        ("wte", "lm_head", "c_attn"),
    ),
    "bloom": (
        "BloomForCausalLM",
        lambda t: t.BloomConfig(vocab_size=ROWS, hidden_size=32, n_layer=1, n_head=4),
        ("word_embeddings", "lm_head", "query_key_value"),
    ),
    "opt": (
        "OPTForCausalLM",
        lambda t: t.OPTConfig(vocab_size=ROWS, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4, word_embed_proj_dim=32),
        ("embed_tokens", "lm_head", "q_proj"),
    ),
    "bert": ("BertForMaskedLM", lambda t: t.BertConfig(**SMALL), ("word_embeddings", "decoder", "query")),
    "roberta": ("RobertaForMaskedLM", lambda t: t.RobertaConfig(**SMALL), ("word_embeddings", "decoder", "query")),
    "t5": (
        "T5ForConditionalGeneration",
        lambda t: t.T5Config(vocab_size=ROWS, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4),
        ("shared", "lm_head", "q"),
    ),
    "bart": (
        "BartForConditionalGeneration",
        lambda t: t.BartConfig(
            vocab_size=ROWS, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=48, decoder_ffn_dim=48,
            encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=64,
        ),
        ("shared", "lm_head", "q_proj"),
    ),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        lambda t: t.Gemma3Config(text_config={**GROUPED, "head_dim": 8}, vision_config=VISION, mm_tokens_per_image=4),
        ("embed_tokens", "lm_head", "q_proj"),
    ),
}  # fmt: skip

CASES: dict[str, dict[str, Any]] = {
    "saved embedding": {"modules_to_save": ["E"]},
    "saved head": {"modules_to_save": ["H"]},
    "both saved": {"modules_to_save": ["E", "H"]},
    "saved and tied": {"modules_to_save": ["E"], "ensure_weight_tying": True},
    "LoRA on the embedding": {"target_modules": ["E"]},
    "LoRA on the head": {"target_modules": ["H"]},
    "LoRA on both": {"target_modules": ["E", "H"]},
    "LoRA and tied": {"target_modules": ["E"], "ensure_weight_tying": True},
    "rows": {"trainable_token_indices": [3, 7]},
    "rows of both": {"trainable_token_indices": {"E": [3, 7], "H": [2, 5]}},
}
"""Options of PEFT; E stands for the embedding, H for the head."""

FORGOTTEN = {("phi", "saved and tied"), ("phi", "rows"), ("bert", "rows"), ("roberta", "rows")}
"""Where PEFT's live model leaves out the bias of a tied head: its own fault, which its merge of rows does not have."""

FEW = ("saved embedding", "LoRA on the head", "LoRA and tied", "rows")

REACH = ("embed_tokens", "lm_head")
"""The embeddings that ``ensure_weight_tying`` knows by their names."""


def options(case: str, embedding: str, head: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        json.dumps(CASES[case]).replace('"E"', f'"{embedding}"').replace('"H"', f'"{head}"')
    )
    return found


def logits(model: Any) -> torch.Tensor:
    more = {"decoder_input_ids": TOKENS} if model.config.is_encoder_decoder else {}
    found: torch.Tensor = model.eval()(TOKENS, **more).logits.detach()
    return found


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """The class and the saved base of a kind, every weight of it random."""
    import transformers as t

    held: dict[str, tuple[Any, Path]] = {}

    def base(kind: str) -> tuple[Any, Path]:
        if kind not in held:
            name, config, _ = KINDS[kind]
            torch.manual_seed(0)
            model = getattr(t, name)(config(t))
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.05)
            held[kind] = getattr(t, name), tmp_path_factory.mktemp(kind)
            model.save_pretrained(held[kind][1])
        return held[kind]

    return base


def adapted(cls: Any, base: Path, place: Path, given: dict[str, Any], layer: str, seed: int = 1) -> Any:
    """Save an adapter that moves every number it trains; return PEFT's live model."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    given = {**given, "target_modules": [layer, *given.get("target_modules", [])]}
    live = get_peft_model(cls.from_pretrained(base), LoraConfig(r=2, **given))
    with torch.no_grad():
        for parameter in live.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    live.save_pretrained(place)
    return live


def check(
    bases: Callable[[str], tuple[Any, Path]], root: Path, kind: str, case: str
) -> dict[str, np.ndarray]:
    cls, base = bases(kind)
    embedding, head, layer = KINDS[kind][2]
    live = adapted(cls, base, root / "adapter", options(case, embedding, head), layer)
    expected = logits(live)
    if (kind, case) in FORGOTTEN:
        expected += cls.from_pretrained(base).get_output_embeddings().bias.detach()
    fold(base, root / "adapter", root / "out")
    assert (logits(cls.from_pretrained(root / "out")) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (logits(cls.from_pretrained(base)) - expected).abs().max() > 1e-3, (
        "the adapter changes nothing, so nothing is shown"
    )
    config = json.loads((root / "out" / "config.json").read_text())
    is_tied = case == "rows" or ("tied" in case and embedding in REACH)
    held = made.read_model(root / "out")
    stored = [
        n for n, v in held.items() if f".{n}".split(".")[-2] in (embedding, head) and v.shape == (ROWS, 32)
    ]
    assert (len(stored), config.get("tie_word_embeddings", True)) == ((1, True) if is_tied else (2, False))
    assert (
        is_tied or config.get("text_config", {"tie_word_embeddings": False})["tie_word_embeddings"] is False
    )
    return held


@pytest.mark.parametrize("case", CASES)
def test_a_folded_adapter_has_the_logits_of_the_live_one(
    bases: Callable[[str], tuple[Any, Path]], tmp_path: Path, case: str
) -> None:
    check(bases, tmp_path, "llama", case)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "llama"])
def test_so_does_an_adapter_of_another_architecture(
    bases: Callable[[str], tuple[Any, Path]], tmp_path: Path, kind: str
) -> None:
    for case in FEW:
        check(bases, tmp_path / case, kind, case)


def test_a_head_that_the_base_stores_is_untied_too(
    bases: Callable[[str], tuple[Any, Path]], tmp_path: Path
) -> None:
    cls, base = bases("llama")
    shutil.copytree(base, tmp_path / "base")
    tensors = made.read_file(base / "model.safetensors")
    made.save_file(
        tmp_path / "base" / "model.safetensors",
        {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]},
    )
    for case in ("saved embedding", "LoRA on the embedding", "saved and tied"):
        live = adapted(
            cls, tmp_path / "base", tmp_path / case / "a", options(case, "embed_tokens", "lm_head"), "q_proj"
        )
        fold(tmp_path / "base", tmp_path / case / "a", tmp_path / case / "out")
        found = logits(cls.from_pretrained(tmp_path / case / "out"))
        assert torch.allclose(found, logits(live), atol=1e-5), case


def test_a_merge_of_tied_and_untied_models_merges_the_head(
    bases: Callable[[str], tuple[Any, Path]], tmp_path: Path
) -> None:
    cls, base = bases("llama")
    for i, case in enumerate(("saved embedding", "LoRA on the head", "rows")):
        adapted(cls, base, tmp_path / f"a{i}", options(case, "embed_tokens", "lm_head"), "q_proj", seed=i)
        fold(base, tmp_path / f"a{i}", tmp_path / f"whole{i}")
    models = [{"model": f"{base}+{tmp_path}/a{i}", "parameters": {"weight": 0.5}} for i in range(3)]
    alnico.merge(
        {"merge_method": "task_arithmetic", "base_model": str(base), "models": models}, tmp_path / "out"
    )
    before, found = made.read_model(base), made.read_model(tmp_path / "out")
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    before[head] = before[embedding]
    assert set(found) == set(before)
    for name, values in found.items():
        wholes = [made.read_model(tmp_path / f"whole{i}") for i in range(3)]
        deltas = [
            w.get(name, w[embedding] if name == head else None).astype(np.float64) - before[name]
            for w in wholes
        ]  # type: ignore[union-attr]
        np.testing.assert_allclose(values, before[name] + 0.5 * sum(deltas), atol=2e-6)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.isfinite(logits(cls.from_pretrained(tmp_path / "out"))).all()


def test_combined_adapters_that_save_an_embedding_fold_as_peft_loads_them(
    bases: Callable[[str], tuple[Any, Path]], tmp_path: Path
) -> None:
    from peft import PeftModel

    cls, base = bases("llama")
    for i in range(2):
        adapted(
            cls,
            base,
            tmp_path / f"a{i}",
            options("saved embedding", "embed_tokens", "lm_head"),
            "q_proj",
            seed=i,
        )
    combine([tmp_path / "a0", tmp_path / "a1"], tmp_path / "both", weights=0.5)
    fold(base, tmp_path / "both", tmp_path / "out")
    expected = logits(PeftModel.from_pretrained(cls.from_pretrained(base), tmp_path / "both"))
    assert torch.allclose(logits(cls.from_pretrained(tmp_path / "out")), expected, atol=1e-5)


@pytest.mark.parametrize("case", ["saved and tied", "LoRA and tied"])
def test_combined_adapters_of_tied_weights_add_in_peft_what_a_merge_adds(
    bases: Callable[[str], tuple[Any, Path]], tmp_path: Path, case: str
) -> None:
    from peft import PeftModel

    cls, base = bases("llama")
    for i in range(2):
        adapted(cls, base, tmp_path / f"a{i}", options(case, "embed_tokens", "lm_head"), "q_proj", seed=i)
    held = []
    for i in range(2):
        live = PeftModel.from_pretrained(cls.from_pretrained(base), tmp_path / f"a{i}")
        head = live.get_submodule("base_model.model.lm_head")
        if hasattr(head, "base_layer"):  # else PEFT adds both updates to the one weight in place
            head.base_layer.weight = torch.nn.Parameter(head.base_layer.weight.detach().clone())
        held.append({n: v.detach().clone() for n, v in live.merge_and_unload().state_dict().items()})
    mean = cls(cls.config_class.from_pretrained(base, tie_word_embeddings=False))
    mean.load_state_dict({n: (held[0][n] + held[1][n]) / 2 for n in held[0]})
    expected = logits(mean)
    combine([tmp_path / "a0", tmp_path / "a1"], tmp_path / "both", weights=0.5, rank=4)
    combined = PeftModel.from_pretrained(cls.from_pretrained(base), tmp_path / "both")
    assert torch.allclose(logits(combined), expected, atol=1e-5)
    fold(base, tmp_path / "both", tmp_path / "out")
    assert torch.allclose(logits(cls.from_pretrained(tmp_path / "out")), expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_are_those_that_transformers_ties(bases: Callable[[str], tuple[Any, Path]], kind: str) -> None:
    cls, base = bases(kind)
    model = cls.from_pretrained(base)
    found = tied_copies(json.loads((base / "config.json").read_text()), made.read_model(base))
    assert set(found) == set(model.all_tied_weights_keys)


@pytest.mark.parametrize("embeddings", ["lora", "save"])
def test_an_adapter_extracted_of_an_untied_fine_tune_has_its_logits(
    bases: Callable[[str], tuple[Any, Path]], tmp_path: Path, embeddings: Any
) -> None:
    from peft import PeftModel

    cls, base = bases("llama")
    adapted(cls, base, tmp_path / "a", options("LoRA on both", "embed_tokens", "lm_head"), "q_proj")
    fold(base, tmp_path / "a", tmp_path / "tuned")
    extract(tmp_path / "tuned", base, tmp_path / "extracted", rank=32, embeddings=embeddings)
    expected = logits(cls.from_pretrained(tmp_path / "tuned"))
    near = 1e-4 * float(expected.abs().max())
    found = PeftModel.from_pretrained(cls.from_pretrained(base), tmp_path / "extracted")
    assert torch.allclose(logits(found), expected, atol=near)
    fold(base, tmp_path / "extracted", tmp_path / "again")
    assert torch.allclose(logits(cls.from_pretrained(tmp_path / "again")), expected, atol=near)
