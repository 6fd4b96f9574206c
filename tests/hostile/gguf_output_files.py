"""Models that cannot become a GGUF file, each with the check that refuses it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import alnico
from alnico.checkpoint.gguf.gguf_layout import GgufLayout
from hostile.malformed import Malformed, Read, save, save_json
from made import llama_config, llama_shapes

TOKENS = {"a": 0, "b": 1, "ab": 2}
BYTES = {"type": "ByteLevel"}
EXPERTS = {
    f"model.layers.0.mlp.experts.{i}.{part}_proj.weight": ("F32", (8, 8)) for i in (0, 2) for part in ("gate", "up", "down")
}  # fmt: skip


def written(
    config: Mapping[str, Any] | None = None, tensors: Mapping[str, tuple[str, tuple[int, ...]] | None] | None = None, tokenizer: Mapping[str, Any] | None = None,
    *, has_tokenizer: bool = True, is_file: bool = False, out: str = "out.gguf", dtype: str | None = None,
) -> Callable[[Path], Read]:  # fmt: skip
    """A small Llama with another config, tensors or tokenizer, planned as a GGUF file."""

    def make(folder: Path) -> Read:
        kept = {name: ("F32", shape) for name, shape in llama_shapes(8, 1, 6).items()} | dict(tensors or {})
        file = save(folder / "m" / "model.safetensors", {n: t for n, t in kept.items() if t is not None})
        save_json(folder / "m" / "config.json", {**llama_config(8, 1, 6), **(config or {})})
        if has_tokenizer:
            model = {"type": "BPE", "vocab": TOKENS, "merges": ["a b"]}
            save_json(
                folder / "m" / "tokenizer.json",
                {"model": model, "pre_tokenizer": BYTES, "added_tokens": [], **(tokenizer or {})},
            )
        recipe = {"merge_method": "passthrough", "models": [str(file if is_file else folder / "m")]}

        def read() -> None:
            for source in alnico.plan(
                recipe | ({"dtype": dtype} if dtype else {}), single_file=out or None
            ).sources:
                source.close()

        return read

    return make


def model(**keys: Any) -> dict[str, Any]:
    return {"model": {"type": "BPE", "vocab": TOKENS, "merges": [], **keys}}


def beyond(_: Path) -> Read:
    """Numbers whose scale half precision does not hold."""
    values = memoryview(np.full(32, 1e9, np.float32).view(np.uint8))
    return lambda: list(GgufLayout((1, 32), 4, is_encoded=True).stored("w", 0, values))


GGUF_OUTPUT_FILES = (
    # written_keys.py
    Malformed("its config has the model_type {}; as GGUF", "its config has the model_type 'falcon'; as GGUF", written({"model_type": "falcon"})),
    Malformed("for the GGUF file. Check the model", "config.json has the hidden_size 8.0; expected a whole number for the GGUF file", written({"hidden_size": 8.0})),
    Malformed("its rotary embeddings are {}{}; as GGUF", "its rotary embeddings are 'longrope'; as GGUF", written({"rope_scaling": {"type": "longrope"}})),
    Malformed("has no name in GGUF files of the family", "model.extra.weight has no name in GGUF files of the family 'llama'", written(tensors={"model.extra.weight": ("F32", (2,))})),
    # gguf_vocabulary.py
    Malformed("its tokenizer is not a tokenizer.json of BPE", "its tokenizer is not a tokenizer.json of BPE", written(tokenizer=model(type="WordPiece"))),
    Malformed("its tokenizer has the id {}, the embedding", "its tokenizer has the id 6, the embedding 6 rows", written(tokenizer=model(vocab={"a": 6}))),
    Malformed("its tokenizer.json has the merge", "its tokenizer.json has the merge '[1, 2]'", written(tokenizer=model(merges=[[1, 2]]))),
    Malformed("its tokenizer cuts text before BPE by", "its tokenizer cuts text before BPE by Whitespace", written(tokenizer={"pre_tokenizer": {"type": "Whitespace"}})),
    # gguf_output.py
    Malformed("dtype is float64; a GGUF file has", "dtype is float64; a GGUF file has", written(dtype="float64")),
    Malformed("dtype is q8_0, which only GGUF files have", "dtype is q8_0, which only GGUF files have", written(dtype="q8_0", out="")),
    Malformed("{} is {}; a GGUF file has F32, F16 or BF16", "embed_tokens.weight is F64; a GGUF file has F32, F16 or BF16", written(tensors={"model.embed_tokens.weight": ("F64", (6, 8))})),
    Malformed("expected an even number of rows for each. Check the model", "has 8 rows, config.json 3 heads", written({"num_attention_heads": 3})),
    Malformed("config.json has the vocab_size {}, the embedding", "config.json has the vocab_size 7, the embedding 6 rows", written({"vocab_size": 7})),
    Malformed("expected experts from 0 on, all", "expert 2 of 2; expected experts from 0 on", written({"model_type": "qwen3_moe", "num_experts": 2}, EXPERTS)),
    Malformed("is one of {} experts, config.json has {}", "is one of 2 experts, config.json has 3", written({"model_type": "qwen3_moe", "num_experts": 3}, {n.replace(".2.", ".1."): t for n, t in EXPERTS.items()})),
    Malformed("has no folder, and so neither config nor tokenizer", "has no folder, and so neither", written(is_file=True)),
    Malformed("has no tokenizer that can be read", "has no tokenizer that can be read", written(has_tokenizer=False)),
    # gguf_layout.py
    Malformed("are beyond what Q8_0 can hold", "w: the values from element 0 on are beyond what Q8_0 can hold", beyond),
)  # fmt: skip
