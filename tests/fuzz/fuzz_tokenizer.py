"""The tokenizer files, templates and configs of a model, merged with another by vocabulary."""

from __future__ import annotations

import json
from pathlib import Path

import alnico
from fuzz.harness import Target, files_of, header_of, put, put_header
from made import llama_config
from made_tokenizers import entry, letters, save_tokenizer, special

NAMES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "tokenizer.model", "chat_template.jinja", "chat_template.json", "config.json", "generation_config.json",
)  # fmt: skip
HEADER = header_of(
    {"model.embed_tokens.weight": ("F32", (16, 2)), "lm_head.weight": ("F32", (16, 2))}, {"F32": 4}
)


def prepare(folder: Path) -> None:
    vocabulary, model = letters(pairs=("ab", "cd"))
    for name in ("base", "other"):
        save_tokenizer(folder / name, vocabulary, special(), model, bos_token="<s>", eos_token="</s>")
        put_header(folder / name / "model.safetensors", HEADER)
        (folder / name / "config.json").write_text(
            json.dumps(llama_config(hidden=2, vocabulary=16, tied=False))
        )


def read(data: bytes, folder: Path) -> None:
    files = files_of(data)
    put(folder / "other", files, NAMES)
    base, other = str(folder / "base"), str(folder / "other")
    how = files.get("how")
    keys = {"tokenizer": {"source": "union"}, "chat_template": "auto"} if how != "compare" else {}
    if how == "theirs":
        keys["tokenizer"] = {"source": other, "pad_to_multiple_of": 8}
    plan = alnico.plan(
        {"merge_method": "linear", "models": [other, base] if how == "first" else [base, other], **keys}
    )
    for source in plan.sources:
        source.close()


def seeds() -> list[bytes]:
    vocabulary, model = letters("hgfedcba ", ("ab", "ef"))
    tokens = [entry(t, i) for i, t in enumerate(("<unk>", "<s>", "</s>"))] + [
        entry("<|im_end|>", len(vocabulary))
    ]
    bpe = {
        "version": "1.0", "added_tokens": tokens, "model": {"type": "BPE", "vocab": vocabulary, **model},
        "post_processor": {"type": "TemplateProcessing", "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "padding": {"pad_id": 0, "pad_token": "<unk>"},
    }  # fmt: skip
    unigram = {**bpe, "model": {"type": "Unigram", "vocab": [[t, -1.0] for t in vocabulary]}}
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": "{{ messages }}",
                "added_tokens_decoder": {"14": {"content": "<|im_end|>", "special": True}}}  # fmt: skip
    config = llama_config(hidden=2, vocabulary=16, tied=False)
    generation = {"eos_token_id": [2], "bos_token_id": 1}
    lists = {
        "vocab.json": vocabulary,
        "added_tokens.json": {"<x>": 14},
        "merges.txt": "#version\na b\n",
        "tokenizer_config.json": settings,
    }
    inputs = [
        {"tokenizer.json": bpe, "tokenizer_config.json": settings, "config.json": config, "generation_config.json": generation},
        {"how": "first", "tokenizer.json": unigram, "tokenizer_config.json": settings, "config.json": config, "generation_config.json": generation},
        {"how": "theirs", "tokenizer.json": bpe, "special_tokens_map.json": {"pad_token": "<pad>", "additional_special_tokens": ["<a>"]}},
        {"how": "compare", "tokenizer.json": bpe, "config.json": config},
        {"how": "theirs", **lists, "config.json": config}, {"how": "first", **lists, "chat_template.jinja": "{% for m in messages %}{{ m }}{% endfor %}"},
        {"vocab.txt": "<unk>\n<s>\n</s>\na\nb\n", "chat_template.json": {"chat_template": [{"name": "default", "template": "x"}]}},
        {"how": "first", "tokenizer.model": "\n\x07\n\x05<unk>\n\x05\n\x03<s>\n\x06\n\x04</s>\n\x03\n\x01a", "tokenizer_config.json": settings},
    ]  # fmt: skip
    return [json.dumps(i).encode() for i in inputs]


WORDS = (
    *NAMES, "how", "first", "theirs", "compare", "model", "vocab", "merges", "added_tokens", "content", "id", "special", "post_processor", "padding",
    "pad_token", "pad_id", "special_tokens", "tokens", "ids", "sep", "cls", "processors", "bos_token", "eos_token", "unk_token", "added_tokens_decoder",
    "chat_template", "default", "template", "text_config", "vocab_size", "eos_token_id", "suppress_tokens", "tokenizer_class", "XLMRoberta",
    "continuing_subword_prefix", "<s>", "</s>", "<unk>", "a", "ab", "num_hidden_layers", "layer_types",
)  # fmt: skip
TARGET = Target(read, seeds, WORDS, prepare)
