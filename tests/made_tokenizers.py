"""Small tokenizers and the models they belong to, written as files without alnico."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from made import decoded, llama_config, save_model

if TYPE_CHECKING:
    from alnico.checkpoint.source import Source
    from alnico.recipe.schema import TokenizerSetting
    from alnico.vocabulary.output_vocabulary import VocabularyPlan

SPECIAL = ("<unk>", "<s>", "</s>")
LETTERS = tuple("abcdefgh ")
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def entry(content: str, row: int, **keys: Any) -> dict[str, Any]:
    """An added token as tokenizer.json has it."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": row, "content": content, **plain, **keys}


def save_tokenizer(
    folder: Path,
    vocabulary: Mapping[str, int],
    added: Sequence[dict[str, Any]] = (),
    model: Mapping[str, Any] | None = None,
    **keys: Any,
) -> Path:
    """Write tokenizer.json (BPE unless ``model`` says else) and tokenizer_config.json with ``keys``."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": False, "byte_fallback": False, "merges": []}  # fmt: skip
    document = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": list(added), "normalizer": None,
        "pre_tokenizer": None, "post_processor": None, "decoder": None,
        "model": {**kind, "vocab": dict(vocabulary), **(model or {})},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **keys}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def letters(
    order: str = "".join(LETTERS), pairs: Sequence[str] = ()
) -> tuple[dict[str, int], dict[str, Any]]:
    """A BPE vocabulary: special tokens, letters in an order, and pairs of them with their merges."""
    tokens = [*SPECIAL, *order, *pairs]
    return {t: i for i, t in enumerate(tokens)}, {"merges": [[p[0], p[1:]] for p in pairs]}


def save_matrices(folder: Path, model: int, rows: int, dtype: str = "F32", **keys: Any) -> Path:
    """Write a model of embedding and head. All values tell model and row: (1000 model + row, 7 row + model) and half of it."""
    at = np.arange(rows, dtype=np.float32)
    embed = np.stack([1000 * model + at, 7 * at + model], axis=1)
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    config = {**llama_config(hidden=2, vocabulary=rows, tied=False, dtype="float32"), **heads, **keys}
    return save_model(folder, {EMBED: (dtype, embed), HEAD: (dtype, embed / 2)}, config)


def special() -> list[dict[str, Any]]:
    return [entry(t, i) for i, t in enumerate(SPECIAL)]


def save_family(root: Path) -> dict[str, Path]:
    """Models with different vocabularies.

    ``base``: letters; ``chat``: the same and two added tokens; ``unused``: the same and four added tokens beyond its rows;
    ``other``: other order, other pairs, an added token that chat has too; ``third``: has pairs of other that base lacks.
    """
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    made = {
        "base": (letters(pairs=("ab", "cd")), ()),
        "chat": (letters(pairs=("ab", "cd")), ("<|im_start|>", "<|im_end|>")),
        "unused": (letters(pairs=("ab", "cd")), tuple(f"<UNUSED_{i}>" for i in range(4))),
        "other": (letters("hgfedcba ", ("ab", "ef", "gh")), ("<|im_end|>",)),
        "third": (letters("abcdefgh xy", ("gh", "ef", "cd", "xy")), ()),
    }
    for number, (name, ((vocabulary, model), added)) in enumerate(made.items()):
        entries = [*special(), *(entry(t, len(vocabulary) + i) for i, t in enumerate(added))]
        save_tokenizer(root / name, vocabulary, entries, model, **names)
        save_matrices(root / name, number, len(vocabulary) + (0 if name == "unused" else len(added)))
    return {name: root / name for name in made}


CASES: dict[str, dict[str, Any]] = {
    "base": {"models": ["base", "unused", "chat"], "base_model": "base", "tokenizer": {"source": "base"}},
    "union": {"models": ["base", "unused", "chat"], "base_model": "base", "tokenizer": {"source": "union"}},
    "model": {"models": ["base", "unused", "chat"], "base_model": "base", "tokenizer": {"source": "chat"}},
    "union-two": {"models": ["base", "chat"], "base_model": "base", "tokenizer": {"source": "union"}},
    "union-orders": {"models": ["base", "other", "third"], "base_model": "base", "tokenizer": {"source": "union"}},
    "union-no-base": {"models": ["base", "other", "third"], "tokenizer": {"source": "union"}},
    "union-base-last": {"models": ["base", "other", "third"], "base_model": "third", "tokenizer": {"source": "union"}},
    "base-orders": {"models": ["other", "base", "third"], "base_model": "other", "tokenizer": {"source": "base"}},
    "model-orders": {"models": ["base", "other", "chat"], "base_model": "base", "tokenizer": {"source": "other"}},
    "pad": {"models": ["chat"], "base_model": "chat", "tokenizer": {"source": "base", "pad_to_multiple_of": 16}},
    "union-pad": {
        "models": ["base", "other", "third"], "tokenizer": {"source": "union", "pad_to_multiple_of": 8},
    },
    "force": {
        "models": ["base", "chat"], "base_model": "base",
        "tokenizer": {"source": "union", "tokens": {
            "c": {"source": "chat", "force": True}, "d": {"source": "base", "force": True}, "<|im_end|>": {"source": "chat"},
        }},
    },
    "model-token": {
        "models": ["base", "other"], "base_model": "base",
        "tokenizer": {"source": "base", "tokens": {
            "c": {"source": {"kind": "model_token", "model": "other", "token_id": 14}, "force": True},
            "d": {"source": {"kind": "model_token", "model": "base", "token": "<s>"}, "force": True},
            "cd": {"source": {"kind": "model_token", "model": "other", "token": "ef"}},
        }},
    },
    "zero-and-new": {
        "models": ["base", "other"], "base_model": "base",
        "tokenizer": {"source": "union", "tokens": {
            "gh": {"source": {"kind": "zero"}}, "ab": {"source": {"kind": "zero"}, "force": True},
            "<tool>": {"source": {"kind": "model_token", "model": "base", "token": "</s>"}}, "<nil>": {"source": {"kind": "zero"}},
        }},
    },
}  # fmt: skip


def setting_of(case: Mapping[str, Any]) -> TokenizerSetting:
    """The ``tokenizer`` of a case as alnico's value."""
    from alnico.recipe.schema import TokenizerSetting, TokenSource

    wishes = {}
    for token, wish in case["tokenizer"].get("tokens", {}).items():
        source = wish["source"]
        about = source if isinstance(source, dict) else {"kind": "model", "model": source}
        force = wish.get("force", False)
        wishes[token] = TokenSource(
            about["kind"], about.get("model", ""), about.get("token"), about.get("token_id"), force
        )
    return TokenizerSetting(case["tokenizer"]["source"], wishes, case["tokenizer"].get("pad_to_multiple_of"))


def planned(case: Mapping[str, Any], sources: Sequence[Source], **keys: Any) -> VocabularyPlan:
    """Plan the vocabulary of a case; ``sources`` are its models in order."""
    from alnico.vocabulary.output_vocabulary import plan_vocabulary

    names = case["models"]
    donor = names.index(case.get("base_model", names[0]))
    has_base = "base_model" in case
    return plan_vocabulary(
        setting_of(case), sources, names, donor, range(len(names)), has_base=has_base, **keys
    )


def matrix(source: Source, name: str) -> np.ndarray:
    """A whole tensor of any source as numbers, read in one go."""
    tensor = source.tensors[name]
    raw = bytearray(tensor.byte_size)
    source.read_into(name, 0, memoryview(raw))
    return decoded(tensor.dtype, bytes(raw)).reshape(tensor.shape)
