"""Merges into one GGUF file: the gguf package and transformers read back what was merged."""

from __future__ import annotations

import json
import shutil
import types
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
import transformers
import xxhash
import yaml

import alnico
from alnico.checkpoint.gguf.file_header import read_header
from alnico.checkpoint.gguf.gguf_layout import GgufLayout
from alnico.checkpoint.gguf.output_file import lay_out, with_keys
from alnico.checkpoint.gguf.simple_blocks import encode_q8_0
from alnico.errors import AlnicoError, ModelError, NonFiniteError, RecipeError, RunError
from alnico.events import Event, TensorDone
from alnico.kernels.choice import Backend, forced
from alnico.output.file_metadata import _general
from gguf_models import MODELS, SIZES, as_metadata, bpe_keys, piece_keys
from hostile.gguf_output_files import written
from made import save_model
from made_gguf import converted
from made_tokenizers import save_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and torch

WRITTEN = ("llama", "llama-untied", "llama-yarn", "mistral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe")
ROWS = 320
"""Rows of the embedding: more than there are tokens."""


def byte_tokenizer(folder: Path) -> None:
    """A tokenizer over bytes with a few merges, by transformers."""
    keys = bpe_keys("llama-bpe")
    tokens = keys["tokenizer.ggml.tokens"][:-1]
    types = keys["tokenizer.ggml.token_type"]
    from made_tokenizers import entry

    added = [entry(t, i, special=types[i] == 3) for i, t in enumerate(tokens) if types[i] in (3, 4)]
    from tokenizers import Regex, pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    cuts = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS["llama-bpe"]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    model = {"merges": [m.split(" ") for m in keys["tokenizer.ggml.merges"]], "ignore_merges": True}
    save_tokenizer(
        folder, {t: i for i, t in enumerate(tokens)}, added, model,
        bos_token="<s>", eos_token="</s>", chat_template="{{ messages[0].content }}",
    )  # fmt: skip
    document = json.loads((folder / "tokenizer.json").read_text())
    from tokenizers import Tokenizer

    built = Tokenizer.from_str(json.dumps(document))
    built.pre_tokenizer = cuts
    from tokenizers import decoders, processors

    built.decoder = decoders.ByteLevel()
    built.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s>:1 $B:1", [("<s>", 1)])
    built.save(str(folder / "tokenizer.json"))


def checkpoint(folder: Path, name: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """Write a random model of a family as a Hugging Face folder with a tokenizer; returns the module."""
    _, config_class, changes = MODELS[name]
    torch.manual_seed(seed)
    config = config_class(**{**SIZES, "vocab_size": ROWS, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.2)
    model.to(dtype).save_pretrained(folder)
    byte_tokenizer(folder)
    return model


def stored(path: Path) -> dict[str, tuple[str, bytes, tuple[int, ...]]]:
    """What the gguf package finds in a file: type, bytes and shape of each tensor."""
    return {
        t.name: (
            t.tensor_type.name,
            np.ascontiguousarray(t.data).tobytes(),
            tuple(int(n) for n in reversed(t.shape)),
        )
        for t in gguf.GGUFReader(path).tensors
    }


def passthrough(model: Path, out: Path, **options: Any) -> Any:
    dtype = options.pop("dtype", None)
    recipe = {"merge_method": "passthrough", "models": [str(model)]} | ({"dtype": dtype} if dtype else {})
    return alnico.merge(recipe, out, **options)


KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("name", WRITTEN)
def test_the_gguf_package_reads_the_bytes_that_it_would_write(name: str, dtype: str, tmp_path: Path) -> None:
    if dtype in ("float16", "bfloat16") and name not in ("llama", "qwen3_moe"):
        pytest.skip("as float32")
    model = checkpoint(tmp_path / "m", name)
    passthrough(tmp_path / "m", tmp_path / "out.gguf", dtype=dtype)
    expected = converted(model, MODELS[name][0])
    found = stored(tmp_path / "out.gguf")
    assert found.keys() - {"rope_freqs.weight"} == expected.keys()
    for tensor, values in expected.items():
        of_matrices = "F16" if dtype == "q8_0" and values.shape[-1] % 32 else KINDS[dtype]
        kind = gguf.GGMLQuantizationType[of_matrices if values.ndim > 1 else "F32"]
        data = gguf.quants.quantize(np.ascontiguousarray(values), kind)
        assert found[tensor] == (kind.name, data.tobytes(), values.shape), tensor


@pytest.mark.parametrize("name", WRITTEN)
def test_transformers_reads_the_file_as_the_model(name: str, tmp_path: Path) -> None:
    before = checkpoint(tmp_path / "m", name)
    passthrough(tmp_path / "m", tmp_path / "out" / "m.gguf")
    after = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out",
        gguf_file="m.gguf",
        dtype=torch.float32,
        quantization_config=transformers.GgufConfig(dequantize=True),
        ignore_mismatched_sizes=True,  # it does not read the width of experts
    )
    ids = torch.arange(24).reshape(2, 12) * 7 % ROWS
    theirs, found = before.state_dict(), after.state_dict()
    for parameter, values in theirs.items():
        if "expert" not in parameter:
            np.testing.assert_array_equal(found[parameter].numpy(), values.numpy(), err_msg=parameter)
    if "moe" not in name and name != "llama-yarn":  # nor the scaling
        with torch.no_grad():
            np.testing.assert_allclose(
                after(ids).logits.numpy(), before(ids).logits.numpy(), rtol=1e-4, atol=1e-5
            )
    ours = tokenizers.Tokenizer.from_file(str(tmp_path / "m" / "tokenizer.json"))
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="m.gguf")
    for text in ("Hello world, it's 3.14 and 20!", " two  spaces\n\n", "naïve 漢字 🙂", "<think>hello</s>"):
        assert read.encode(text) == ours.encode(text).ids, text
    assert read.chat_template == "{{ messages[0].content }}"


@pytest.mark.parametrize("name", WRITTEN)
def test_the_file_becomes_the_model_again(name: str, tmp_path: Path) -> None:
    before = checkpoint(tmp_path / "m", name)
    passthrough(tmp_path / "m", tmp_path / "m.gguf")
    passthrough(tmp_path / "m.gguf", tmp_path / "again")
    after = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    ids = torch.arange(24).reshape(2, 12) * 7 % ROWS
    with torch.no_grad():
        np.testing.assert_allclose(
            after(ids).logits.numpy(), before(ids).logits.numpy(), rtol=1e-4, atol=1e-5
        )
    ours, read = (
        tokenizers.Tokenizer.from_file(str(tmp_path / f / "tokenizer.json")) for f in ("m", "again")
    )
    for text in ("Hello world, it's 3.14 and 20!", "naïve 漢字 🙂", "<think>hello</s>"):
        assert read.encode(text).ids == ours.encode(text).ids, text


def test_the_scaling_of_llama_3_goes_into_the_file_and_out_again(tmp_path: Path) -> None:
    checkpoint(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config["rope_parameters"] = {"rope_theta": 500000.0, **scaling}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    passthrough(tmp_path / "m", tmp_path / "m.gguf")
    assert stored(tmp_path / "m.gguf")["rope_freqs.weight"][2] == (8,)
    with alnico.open_model(tmp_path / "m.gguf") as model:
        assert (model.config["rope_scaling"], model.config["rope_theta"]) == (scaling, 500000.0)


def test_the_recipe_and_the_models_are_keys_of_the_file(tmp_path: Path) -> None:
    for i in range(2):
        checkpoint(tmp_path / f"m{i}", seed=i)
        (tmp_path / f"m{i}" / "README.md").write_text("---\nlicense: mit\n---\n")
    models = [str(tmp_path / f"m{i}") for i in range(2)]
    recipe = {"merge_method": "linear", "models": models, "unrelated": "allow"}
    alnico.merge(recipe, tmp_path / "out.gguf")
    alnico.merge(recipe, tmp_path / "folder")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "out.gguf").fields.items()}
    assert list(fields)[3:5] == ["general.architecture", "general.type"]  # after those of the reader's own
    assert {name: value for name, value in fields.items() if name.startswith("general.")} == {
        "general.architecture": "llama", "general.type": "model", "general.name": "out", "general.file_type": 0, "general.license": "mit",
        "general.tags": ["merge", "alnico"], "general.base_model.count": 2, "general.base_model.0.name": "m0", "general.base_model.1.name": "m1",
    }  # fmt: skip
    lock = json.loads((tmp_path / "folder" / "alnico.lock.json").read_text())
    hashes = [
        xxhash.xxh3_128_hexdigest("".join(f"{n} {d}\n" for n, d in sorted(i["tensors"].items())).encode())
        for i in lock["inputs"]
    ]
    assert json.loads(fields["alnico.inputs"]) == [
        {"model": f"m{i}", "hash": digest} for i, digest in enumerate(hashes)
    ]
    assert yaml.safe_load(fields["alnico.recipe"])["models"] == ["m0", "m1"]
    assert str(tmp_path) not in str(fields)


def test_a_model_of_the_hub_is_named_with_its_address() -> None:
    class FromHub:
        origin = types.SimpleNamespace(name="org/base", commit="0" * 40)
        directory = None
        label = "org/base"

    assert _general([FromHub()], ["org/base"]) == {  # type: ignore[list-item]
        "general.tags": ["merge", "alnico"], "general.base_model.count": 1, "general.base_model.0.name": "base",
        "general.base_model.0.version": "0" * 40, "general.base_model.0.organization": "org",
        "general.base_model.0.repo_url": "https://huggingface.co/org/base",
    }  # fmt: skip


@pytest.mark.parametrize("length", range(0, 40, 7))
def test_keys_are_added_without_moving_a_tensor_in_its_step(length: int) -> None:
    values = np.arange(5, dtype=np.float32)
    first = {"general.architecture": "llama", "llama.block_count": 1}
    layout = GgufLayout((2, 3), 4)
    shard = lay_out("m.gguf", first, [("w", "F32", (2, 3))], {"c": values}, [[("a", "F32", layout)]])
    more = with_keys(shard, {"general.tags": ["x"], "alnico.recipe": "r" * length}, {"k": "v"})
    data = more.start + bytes(more.byte_size - len(more.start))
    header = read_header(lambda offset, count: data[offset : offset + count], len(data), "m.gguf")
    assert header.metadata == {
        **first,
        "general.tags": ["x"],
        "alnico.recipe": header.metadata["alnico.recipe"],
    }
    assert header.metadata["alnico.recipe"].rstrip("\n") == "r" * length
    assert [(t.name, t.begin) for t in header.tensors] == [
        ("c", more.header.data_begin),
        ("w", more.header.tensors[0].begin),
    ]
    assert data[header.tensors[0].begin : header.tensors[0].end] == values.tobytes()
    assert more.header.metadata == {"k": "v"}


def test_the_window_of_mistral_goes_into_the_file_and_out_again(tmp_path: Path) -> None:
    checkpoint(tmp_path / "m", "mistral")
    path = tmp_path / "m" / "config.json"
    for window in (4096, None):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"sliding_window": window}))
        passthrough(tmp_path / "m", tmp_path / "m.gguf", overwrite=True)
        passthrough(tmp_path / "m.gguf", tmp_path / "again", overwrite=True)
        fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
        assert ("llama.attention.sliding_window" in fields) == (window is not None)
        config = json.loads((tmp_path / "again" / "config.json").read_text())
        assert config.get("sliding_window") == window
        assert config["model_type"] == ("mistral" if window else "llama")


def test_sentencepiece_keeps_its_merges(tmp_path: Path) -> None:
    checkpoint(tmp_path / "m")
    keys = piece_keys("llama")
    from alnico.checkpoint.gguf.tokenizer_files import tokenizer_files

    for file, data in tokenizer_files(as_metadata(keys)).items():
        (tmp_path / "m" / file).write_bytes(data)
    passthrough(tmp_path / "m", tmp_path / "out" / "m.gguf")
    passthrough(tmp_path / "out" / "m.gguf", tmp_path / "again")
    ours, read = (transformers.AutoTokenizer.from_pretrained(tmp_path / f) for f in ("m", "again"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="m.gguf")
    for text in ("hello world, it", "hello hello", "abc <0x41> 漢"):
        assert read.encode(text) == ours.encode(text) == theirs.encode(text), text


def odd_blocks() -> dict[str, np.ndarray]:
    """Blocks of float32 by what is odd about them."""
    random = np.random.default_rng(0)
    blocks = random.standard_normal((20_000, 32)).astype(np.float32)
    blocks *= np.exp2(random.integers(-40, 20, (20_000, 1))).astype(np.float32)
    halves = random.integers(-254, 255, (2_000, 32)).astype(np.float32) / 2
    halves[:, 0] = 127
    ends = np.where(random.random(halves.shape) < 0.5, np.float32(-np.inf), np.float32(np.inf))
    near_halves = np.nextafter(halves, ends)
    near_halves[:, 0] = 127
    small = random.integers(0, 1 << 24, (2_000, 32), np.uint32) >> random.integers(
        0, 24, (2_000, 1), np.uint32
    )
    signs = random.integers(0, 2, (2_000, 32), np.uint32) << 31
    huge = (random.uniform(-1, 1, (300, 32)) * np.float64(np.finfo(np.float32).max)).astype(np.float32)
    return {
        "random": blocks, "negative": -blocks, "sparse": (blocks * (random.random(blocks.shape) < 0.1)).astype(np.float32),
        "ties": halves, "next to ties": near_halves, "zero": np.zeros((3, 32), np.float32), "negative zero": np.full((3, 32), -0.0, np.float32),
        "denormal": (small | signs).view(np.float32), "huge": huge, "one block": blocks[:1], "none": blocks[:0],
    }  # fmt: skip


@pytest.mark.parametrize("backend", ["interpreted", "compiled"])
def test_q8_0_has_the_bits_of_the_gguf_package(backend: Backend) -> None:
    for what, values in odd_blocks().items():
        with np.errstate(all="ignore"):
            expected = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
        with forced(backend):
            np.testing.assert_array_equal(encode_q8_0(values), expected, err_msg=what)


@pytest.mark.parametrize("backend", ["interpreted", "compiled"])
def test_a_block_with_a_nan_or_an_infinity_has_no_scale(backend: Backend) -> None:
    values = np.ones((3, 32), np.float32)
    values[0, 30], values[2, 1] = np.nan, -np.inf
    with forced(backend):
        scales = encode_q8_0(values).view(np.float16)[:, 0]
    assert np.isfinite(scales).tolist() == [False, True, False]


@pytest.mark.parametrize("is_encoded", [False, True])
def test_rows_of_heads_stand_where_llama_cpp_puts_them_however_a_tensor_is_cut(is_encoded: bool) -> None:
    random = np.random.default_rng(0)
    heads, head, width = 3, 8, 96
    values = random.standard_normal((heads * head, width)).astype(np.float32)
    turned = values.reshape(heads, 2, head // 2, width).swapaxes(1, 2).reshape(values.shape)
    expected = (
        gguf.quants.quantize(turned, gguf.GGMLQuantizationType.Q8_0) if is_encoded else turned
    ).tobytes()
    layout = GgufLayout(values.shape, 4, is_encoded, heads)
    data = values.tobytes()
    for _ in range(20):
        cuts = [0, *sorted(128 * int(c) for c in random.integers(0, len(data) // 128, 4)), len(data)]
        found = bytearray(layout.byte_size)
        for begin, end in pairwise(cuts):
            for place, part in layout.stored("w", begin, memoryview(data)[begin:end]):
                found[place : place + len(part)] = part
        assert bytes(found) == expected


def test_a_merge_is_quantised_once_from_float32(tmp_path: Path) -> None:
    for i in range(2):
        checkpoint(tmp_path / f"m{i}", seed=i, dtype=torch.bfloat16)
    recipe = {
        "merge_method": "linear",
        "models": [str(tmp_path / f"m{i}") for i in range(2)],
        "unrelated": "allow",
    }
    alnico.merge(recipe | {"dtype": "q8_0"}, tmp_path / "out.gguf")
    alnico.merge(recipe | {"dtype": "float32"}, tmp_path / "exact.gguf")
    exact = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "exact.gguf").tensors}
    for name, (kind, data, _) in stored(tmp_path / "out.gguf").items():
        values = np.ascontiguousarray(exact[name])
        assert data == gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind]).tobytes(), name


def test_threads_and_memory_change_no_byte(tmp_path: Path) -> None:
    checkpoint(tmp_path / "m")
    for i, options in enumerate(({"threads": 1}, {"threads": 3}, {"memory": "400MiB"})):
        passthrough(tmp_path / "m", tmp_path / f"{i}" / "m.gguf", dtype="q8_0", **options)
    assert len({(tmp_path / f"{i}" / "m.gguf").read_bytes() for i in range(3)}) == 1


@pytest.mark.parametrize("dtype", ["float16", "q8_0"])
def test_an_interrupted_merge_continues_with_the_same_bytes(dtype: str, tmp_path: Path) -> None:
    checkpoint(tmp_path / "m")
    passthrough(tmp_path / "m", tmp_path / "whole" / "m.gguf", dtype=dtype)
    done = 0

    def watch(event: Event) -> None:
        nonlocal done
        done += isinstance(event, TensorDone)
        if done == 4:
            raise RunError("stop")

    with pytest.raises(RunError, match="stop"):
        passthrough(tmp_path / "m", tmp_path / "m.gguf", dtype=dtype, threads=1, watch=watch)
    assert not (tmp_path / "m.gguf").exists()
    result = passthrough(tmp_path / "m", tmp_path / "m.gguf", dtype=dtype)
    assert result.resumed > 0
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "whole" / "m.gguf").read_bytes()


def test_a_fold_may_go_into_a_gguf_file(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "m")
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    alnico.lora.fold(tmp_path / "m", tmp_path / "adapter", tmp_path / "out.gguf", dtype="float32")
    expected = converted(adapted.merge_and_unload(), "llama")
    for name, (_, data, shape) in stored(tmp_path / "out.gguf").items():
        np.testing.assert_allclose(
            np.frombuffer(data, np.float32).reshape(shape), expected[name], atol=1e-6, err_msg=name
        )


def refusal(folder: Path, out: str = "out.gguf", **recipe: Any) -> str:
    with pytest.raises(AlnicoError) as caught:
        alnico.merge({"merge_method": "passthrough", "models": [str(folder)], **recipe}, folder.parent / out)
    assert not (folder.parent / out).exists()
    return f"{type(caught.value).__name__}: {caught.value}"


def test_types_that_do_not_fit_the_output_are_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path / "m")
    assert refusal(tmp_path / "m", "out", dtype="q8_0") == (
        "RecipeError: dtype is q8_0, which only GGUF files have; expected an output of one file whose name ends in .gguf. Write OUT.gguf, "
        "or another dtype."
    )
    assert refusal(tmp_path / "m", dtype="float64") == (
        "RecipeError: dtype is float64; a GGUF file has float32, float16, bfloat16 or q8_0. Write one of these, or another output."
    )
    assert issubclass(RecipeError, AlnicoError)


def test_a_family_that_is_not_written_is_refused_by_name(tmp_path: Path) -> None:
    save_model(tmp_path / "m", {"w": ("F32", np.ones((32, 32), np.float32))}, {"model_type": "bert"})
    assert refusal(tmp_path / "m") == (
        f"ModelError: {tmp_path}/m: its config has the model_type 'bert'; as GGUF, llama, mistral, qwen2, qwen2_moe, qwen3, qwen3_moe are "
        "written. Write a folder, and convert that with llama.cpp."
    )


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path / "m")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "m" / name).unlink()
    assert refusal(tmp_path / "m") == (
        f"ModelError: {tmp_path}/m: has no tokenizer that can be read; expected a tokenizer.json for the GGUF file. Write another output."
    )
    assert issubclass(ModelError, AlnicoError)


def test_a_tensor_without_a_name_in_gguf_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path / "m")
    from safetensors.torch import load_file, save_file

    file = tmp_path / "m" / "model.safetensors"
    save_file({**load_file(file), "model.layers.0.extra.weight": torch.ones(3)}, file)
    assert refusal(tmp_path / "m") == (
        f"ModelError: {tmp_path}/m: model.layers.0.extra.weight has no name in GGUF files of the family 'llama'; expected tensors of the "
        "model_type llama, experts one by one. Leave it out by a rule, or write a folder and convert that with llama.cpp."
    )


def test_a_tokenizer_that_cuts_text_in_another_way_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path / "m")
    document = json.loads((tmp_path / "m" / "tokenizer.json").read_text())
    document["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\w+"}
    (tmp_path / "m" / "tokenizer.json").write_text(json.dumps(document))
    assert "its tokenizer cuts text before BPE by Split, ByteLevel, which has no name in GGUF" in refusal(
        tmp_path / "m"
    )


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
NO_SCALING = "as GGUF, whole ones are written, scaled by linear, yarn or llama3. Write a folder, and convert that with llama.cpp."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {"hidden_size": None}}, "config.json has the hidden_size None; expected a whole number for the GGUF file. Check the model."),
        ({"config": {"vocab_size": 1 << 32}}, "config.json has the vocab_size 4294967296; expected a whole number for the GGUF file. Check the model."),
        ({"config": {"rope_theta": "1e4"}}, "config.json has the rope_theta 1e4; expected a number for the GGUF file. Check the model."),
        ({"config": {"rope_scaling": {"type": "linear"}}}, "config.json has the factor None; expected a number for the GGUF file. Check the model."),
        ({"config": {"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0, "factor": 0}}}, f"its rotary embeddings are 'llama3'; {NO_SCALING}"),
        ({"config": {"rope_scaling": {**LLAMA3, "mscale": 2}}}, f"its rotary embeddings are 'llama3' with mscale; {NO_SCALING}"),
        ({"config": {"num_attention_heads": 3}}, "model.layers.0.self_attn.q_proj.weight has 8 rows, config.json 3 heads; expected an even number of rows for each. Check the model."),
        ({"config": {"vocab_size": 7}}, "config.json has the vocab_size 7, the embedding 6 rows; expected one number. Check the model."),
        ({"tensors": {"model.norm.weight": ("I64", (8,))}}, "model.norm.weight is I64; a GGUF file has F32, F16 or BF16. Name a dtype in the recipe, or write another output."),
        ({"tokenizer": {"model": {"type": "WordLevel", "vocab": {"a": 0}}}}, "its tokenizer is not a tokenizer.json of BPE; expected that for the GGUF file. Write a folder, and convert that with llama.cpp."),
        ({"tokenizer": {"model": {"type": "BPE", "vocab": {"a": 6}}}}, "its tokenizer has the id 6, the embedding 6 rows; expected a row for each token. Check the model."),
        ({"tokenizer": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["ab"]}}}, "its tokenizer.json has the merge \"['ab']\"; expected two tokens. Download the file again."),
    ],
)  # fmt: skip
def test_what_a_gguf_file_cannot_hold_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(AlnicoError) as caught:
        written(**changes)(tmp_path)()
    assert str(caught.value) == f"{tmp_path}/m: {message}"


def test_one_file_without_its_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        written(is_file=True)(tmp_path)()
    assert str(caught.value) == (
        f"{tmp_path}/m/model.safetensors: has no folder, and so neither config nor tokenizer; expected both for the GGUF file. Write another "
        "output, or give the folder of the model."
    )


def test_numbers_beyond_q8_0_are_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path / "m")
    from safetensors.torch import load_file, save_file

    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 40] = 1e9
    save_file(tensors, file)
    told = refusal(tmp_path / "m", dtype="q8_0")
    assert told == (
        "NonFiniteError: model.layers.1.mlp.up_proj.weight: the values from element 224 on are beyond what Q8_0 can hold, about 8,300,000; "
        "expected smaller ones. Write it with dtype: float32."
    )
    assert issubclass(NonFiniteError, AlnicoError)


def test_an_existing_file_is_replaced_only_where_that_is_asked_for(tmp_path: Path) -> None:
    checkpoint(tmp_path / "m")
    passthrough(tmp_path / "m", tmp_path / "out.gguf")
    with pytest.raises(AlnicoError, match="exists and is not empty"):
        passthrough(tmp_path / "m", tmp_path / "out.gguf", dtype="q8_0")
    passthrough(tmp_path / "m", tmp_path / "out.gguf", dtype="q8_0", overwrite=True)
    assert {kind for kind, *_ in stored(tmp_path / "out.gguf").values()} == {"Q8_0", "F32"}
    shutil.rmtree(tmp_path / "m")
