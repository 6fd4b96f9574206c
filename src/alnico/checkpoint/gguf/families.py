"""Maps the tensors of GGUF files of known families to the names and the layout of Hugging Face.

llama.cpp's converter renames tensors, stacks experts, and changes values in two ways: rows of the query and key projections of
Llama are reordered for its rotary embedding, and Gemma's norms have 1 added. Names: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from alnico.checkpoint.gguf.file_header import GgufTensor
from alnico.checkpoint.gguf.metadata import Metadata
from alnico.errors import ModelError

_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_FOUR_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_SHARED_EXPERT = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_QWEN_EXPERTS = {
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
_MIXTRAL_EXPERTS = {
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}

WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
"""Tensors in no layer."""
_DENSE = {**_NORMS, **_ATTENTION, **_MLP}

IN_CONFIG = frozenset(
    ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight", "attn_rot_embd.weight")
)
"""Ends of the names of tensors that are not weights: they follow from ``rope_scaling`` in the config."""


@dataclass(frozen=True)
class GgufFamily:
    """One family. ``layer`` maps names in ``blk.N.`` to names in ``model.layers.N.``; ``experts`` those of stacked experts, with ``{}``
    for the expert's number.

    ``is_reordered``: the rows of queries and keys are those of pairs of Llama's rotary embedding. ``shift`` is what the
    converter adds to norms.
    """

    architecture: str
    model_type: str
    class_name: str
    layer: Mapping[str, str]
    experts: Mapping[str, str] = field(default_factory=dict)
    is_reordered: bool = False
    shift: float = 0.0


FAMILIES: tuple[GgufFamily, ...] = (
    GgufFamily("llama", "llama", "LlamaForCausalLM", _DENSE, is_reordered=True),
    GgufFamily("llama", "mistral", "MistralForCausalLM", _DENSE, is_reordered=True),
    GgufFamily(
        "llama",
        "mixtral",
        "MixtralForCausalLM",
        {**_NORMS, **_ATTENTION, "ffn_gate_inp": "block_sparse_moe.gate"},
        _MIXTRAL_EXPERTS,
        is_reordered=True,
    ),
    GgufFamily("qwen2", "qwen2", "Qwen2ForCausalLM", _DENSE),
    GgufFamily(
        "qwen2moe",
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        {**_DENSE, **_SHARED_EXPERT, "ffn_gate_inp": "mlp.gate"},
        _QWEN_EXPERTS,
    ),
    GgufFamily("qwen3", "qwen3", "Qwen3ForCausalLM", {**_DENSE, **_HEAD_NORMS}),
    GgufFamily(
        "qwen3moe",
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        {**_DENSE, **_HEAD_NORMS, "ffn_gate_inp": "mlp.gate"},
        _QWEN_EXPERTS,
    ),
    GgufFamily("gemma", "gemma", "GemmaForCausalLM", _DENSE, shift=1.0),
    GgufFamily("gemma2", "gemma2", "Gemma2ForCausalLM", {**_ATTENTION, **_MLP, **_FOUR_NORMS}, shift=1.0),
    GgufFamily(
        "gemma3",
        "gemma3_text",
        "Gemma3ForCausalLM",
        {**_ATTENTION, **_MLP, **_FOUR_NORMS, **_HEAD_NORMS},
        shift=1.0,
    ),
    GgufFamily(
        "phi3",
        "phi3",
        "Phi3ForCausalLM",
        {
            **_NORMS,
            "attn_qkv": "self_attn.qkv_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
        },
    ),
)

KNOWN = tuple(dict.fromkeys(f.architecture for f in FAMILIES))


def family_of(metadata: Metadata) -> GgufFamily:
    """Return the family of a file by its architecture; Mistral, which may have a window, and Mixtral are ``llama`` in GGUF.

    Errors: ModelError for an unknown one.
    """
    found = [family for family in FAMILIES if family.architecture == metadata.architecture]
    if not found:
        raise ModelError(
            f"{metadata.where}: is a model of the family {metadata.architecture[:80]!r}; of GGUF files the families {', '.join(KNOWN)} are "
            "read. Use the model that it was converted from, as safetensors."
        )
    if found[0].model_type != "llama":
        return found[0]
    if metadata.integer(".expert_count", 0):
        return found[2]
    name = f"{metadata.text('general.name', '')} {metadata.text('general.basename', '')}".lower()
    return found[1] if "mistral" in name or ".attention.sliding_window" in metadata else found[0]


def file_rows(rows: np.ndarray, head: int) -> np.ndarray:
    """The rows of a file that are ``rows`` of a model, in heads of ``head`` rows: the file has the two halves of a head in turns.

    >>> file_rows(np.arange(8), 4)
    array([0, 2, 1, 3, 4, 6, 5, 7])
    """
    within = rows % head
    half = head // 2
    result: np.ndarray = rows - within + within % half * 2 + within // half
    return result


@dataclass(frozen=True, slots=True)
class StoredPart:
    """A tensor of the model: the elements from ``first`` on of a tensor of the file, in ``shape``.

    With ``heads``, its rows are reordered in each head; ``shift`` is what the file's values have added.
    """

    stored: GgufTensor
    shape: tuple[int, ...]
    first: int = 0
    heads: int = 0
    shift: float = 0.0

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


IN_LAYER = re.compile(
    r"blk\.(?P<layer>\d{1,6})\.(?P<stem>[a-z0-9_]+)(\.(?P<expert>\d{1,6}))?\.(?P<kind>weight|bias)"
)
MAX_EXPERTS = 10_000
"""Most experts of a layer: each is a tensor of its own."""
SINGLE = {"ffn_gate": "ffn_gate_exps", "ffn_up": "ffn_up_exps", "ffn_down": "ffn_down_exps"}
"""Experts one by one, as the first files of Mixtral had them: ``ffn_gate.3`` is a part of ``ffn_gate_exps``."""


def parts_of(tensors: Iterable[GgufTensor], family: GgufFamily, metadata: Metadata) -> dict[str, StoredPart]:
    """Return the tensors of the model under Hugging Face's names, in the order of the file.

    Errors: ModelError for a tensor that the family does not have, in a layer beyond the last, that two tensors of the file are, and for
    stacked experts or heads of another number than the keys say.
    """
    parts: dict[str, StoredPart] = {}
    for tensor in tensors:
        if tensor.name.endswith(tuple(IN_CONFIG)):
            continue
        for name, part in _parts_of_one(tensor, family, metadata).items():
            if name in parts:
                raise ModelError(
                    f"{metadata.where}: {parts[name].stored.name!r} and {tensor.name!r} both are {name}; expected one. Get the file from its "
                    "source."
                )
            parts[name] = part
    return parts


def _parts_of_one(tensor: GgufTensor, family: GgufFamily, metadata: Metadata) -> dict[str, StoredPart]:
    stem, _, kind = tensor.name.rpartition(".")
    if stem in WHOLE and kind == "weight":
        shift = family.shift if stem == "output_norm" else 0.0
        return {f"{WHOLE[stem]}.weight": StoredPart(tensor, tensor.shape, shift=shift)}
    match = IN_LAYER.fullmatch(tensor.name)
    place = _place(match, family) if match is not None else None
    if match is None or place is None:
        raise ModelError(
            f"{metadata.where}: tensor {tensor.name[:80]!r} is unknown in the family {family.architecture!r}; expected tensors whose place "
            "in the Hugging Face model is known. Use the model that it was converted from, as safetensors."
        )
    layers = metadata.integer(".block_count")
    if int(match["layer"]) >= layers:
        raise ModelError(
            f"{metadata.where}: tensor {tensor.name!r} is in layer {match['layer']}, the model has {layers}; expected layers below that. "
            "Get the file from its source."
        )
    stem, name = match["stem"], f"model.layers.{int(match['layer'])}.{place}.{match['kind']}"
    if match["expert"] is not None:
        return {name: StoredPart(tensor, tensor.shape)}
    if stem in family.experts:
        return _experts(tensor, name, metadata)
    if stem == "ffn_gate_inp_shexp" and len(tensor.shape) == 1:  # stored without its only row
        return {name: StoredPart(tensor, (1, *tensor.shape))}
    heads = _heads(tensor, stem, metadata) if family.is_reordered else 0
    shift = family.shift if stem.endswith("_norm") else 0.0
    return {name: StoredPart(tensor, tensor.shape, heads=heads, shift=shift)}


def _place(match: re.Match[str], family: GgufFamily) -> str | None:
    """The name of a tensor in its layer of the model, with ``{}`` for the numbers of stacked experts; None for an unknown one."""
    if match["expert"] is not None:
        stacked = family.experts.get(SINGLE.get(match["stem"], ""))
        return stacked.format(int(match["expert"])) if stacked is not None else None
    return family.experts.get(match["stem"], family.layer.get(match["stem"]))


def _experts(tensor: GgufTensor, name: str, metadata: Metadata) -> dict[str, StoredPart]:
    """Divide a stack of experts."""
    count = metadata.integer(".expert_count")
    if len(tensor.shape) < 2 or tensor.shape[0] != count or count > MAX_EXPERTS:
        raise ModelError(
            f"{metadata.where}: tensor {tensor.name!r} is {tensor.shape}, the model has {count} experts; expected that many first, up to {MAX_EXPERTS}. Get the "
            "file from its source."
        )
    size = math.prod(tensor.shape[1:])
    return {name.format(i): StoredPart(tensor, tensor.shape[1:], i * size) for i in range(count)}


def _heads(tensor: GgufTensor, stem: str, metadata: Metadata) -> int:
    """The heads whose rows llama.cpp's converter has reordered; 0 for other tensors."""
    if stem not in ("attn_q", "attn_k"):
        return 0
    heads = metadata.integer(".attention.head_count")
    if stem == "attn_k":
        heads = metadata.integer(".attention.head_count_kv", heads)
    rows = tensor.shape[0] if tensor.shape else 0
    if not heads or not rows or rows % (2 * heads):
        raise ModelError(
            f"{metadata.where}: tensor {tensor.name!r} has {rows} rows, the model {heads} heads; expected an even number of rows for each. "
            "Get the file from its source."
        )
    return heads
