"""Creating task vectors of every kind of model: put on the base, they give the fine-tune; what cannot be stored is refused."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import alnico
from alnico.checkpoint.task_vectors.manifest import Evaluation, SafeScale, read_manifest
from alnico.errors import (
    AlnicoError,
    MismatchError,
    ModelError,
    NonFiniteError,
    OutputError,
    RecipeError,
    ResourceError,
)
from alnico.run_options import RunOptions
from alnico.store.create import create_vector
from alnico.store.create_options import create_task_vector
from alnico.store.metadata import Details
from alnico.store.target import Target
from made import Tensors, decoded, encoded, save_file

Q = "model.layers.0.self_attn.q_proj.weight"
V = "model.layers.0.self_attn.v_proj.weight"
EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def numbers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def save_model(folder: Path, tensors: Tensors, **config: Any) -> Path:
    save_file(folder / "model.safetensors", tensors)
    whole = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 64, **config}
    (folder / "config.json").write_text(json.dumps(whole))
    return folder


def plain(dtype: str = "F32") -> dict[str, tuple[str, np.ndarray]]:
    return {
        EMBED: (dtype, numbers(1, 64, 32)),
        Q: (dtype, numbers(2, 32, 32)),
        V: (dtype, numbers(3, 16, 32)),
    }


def changed(tensors: Tensors, by: float = 0.1) -> dict[str, tuple[str, np.ndarray]]:
    return {
        n: (t, v + np.float32(by) * numbers(10 + i, *v.shape))
        for i, (n, (t, v)) in enumerate(tensors.items())
    }


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return save_model(tmp_path / "tuned", changed(plain())), save_model(tmp_path / "base", plain())


def on_base(base: Path, vector: Path, name: str) -> bytes:
    """The bytes of a tensor of ``base+vector``, read as a model."""
    with alnico.open_model(f"{base}+{vector}") as model:
        raw = np.empty(model.tensors[name].byte_size, np.uint8)
        model.read_into(name, 0, memoryview(raw))
    return raw.tobytes()


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_an_exact_task_vector_on_its_base_is_the_fine_tune(tmp_path: Path, dtype: str) -> None:
    tuned = changed(plain(dtype))
    tuned[V] = plain(dtype)[V]
    base = save_model(tmp_path / "base", plain(dtype))
    create_vector(
        save_model(tmp_path / "tuned", tuned), base, tmp_path / "v", name="x", target=Target(exact=True)
    )
    for name, values in tuned.items():
        assert on_base(base, tmp_path / "v", name) == encoded(*values)


@pytest.mark.parametrize(
    "encoding", ["difference", "difference:f16", "int4", "sign", "top_k:0.2", "low_rank:4"]
)
def test_an_arithmetic_task_vector_on_its_base_is_as_far_from_the_fine_tune_as_it_says(
    folders: tuple[Path, Path], tmp_path: Path, encoding: str
) -> None:
    create_vector(*folders, tmp_path / "v", name="x", target=Target(encoding=encoding))
    tuned, base = changed(plain()), plain()
    for name, entry in read_manifest(tmp_path / "v").tensors.items():
        found = decoded("F32", on_base(folders[1], tmp_path / "v", name)).reshape(entry.shape)
        difference = tuned[name][1].astype(np.float64) - base[name][1]
        lost = found.astype(np.float64) - base[name][1] - difference
        error = float(np.linalg.norm(lost) / np.linalg.norm(difference))
        assert error == pytest.approx(entry.error, rel=1e-4, abs=1e-5), name


def test_models_in_memory_are_compared_like_files(folders: tuple[Path, Path], tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    tuned, base = ({n: v for n, (_, v) in m.items()} for m in (changed(plain()), plain()))
    create_vector(*folders, tmp_path / "files", name="x", target=Target(error=0.05))
    create_vector(tuned, base, tmp_path / "arrays", name="x", target=Target(error=0.05))
    as_torch = [{n: torch.from_numpy(v.copy()) for n, v in m.items()} for m in (tuned, base)]
    create_vector(*as_torch, tmp_path / "torch", name="x", target=Target(error=0.05))
    weights = [(tmp_path / p / "taskvector.safetensors").read_bytes() for p in ("files", "arrays", "torch")]
    manifest = read_manifest(tmp_path / "arrays")
    assert manifest.base.root is None
    assert manifest.finetuned.id is None
    of_files = read_manifest(tmp_path / "files").tensors
    assert {n: t.error for n, t in manifest.tensors.items()} == {n: t.error for n, t in of_files.items()}
    assert weights[1] == weights[2]


def test_a_sum_of_task_vectors_is_stored_as_the_difference_it_is(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    tuned, base = folders
    other = save_model(tmp_path / "other", changed(plain(), 0.3))
    tau = 0.5 * alnico.TaskVector(tuned, base) - 0.25 * alnico.TaskVector(other, base)
    create_vector(tau, base, tmp_path / "v", name="x", target=Target(encoding="difference"))
    manifest = read_manifest(tmp_path / "v")
    for name, (_, values) in plain().items():
        a, b = changed(plain())[name][1].astype(np.float64), changed(plain(), 0.3)[name][1].astype(np.float64)
        wanted = 0.5 * (a - values) - 0.25 * (b - values)
        assert manifest.tensors[name].norm == pytest.approx(float(np.linalg.norm(wanted)), rel=1e-9)
        found = decoded("F32", on_base(base, tmp_path / "v", name)).reshape(values.shape)
        np.testing.assert_allclose(found, values + wanted, atol=1e-6)
        assert (manifest.tensors[name].finetuned, manifest.tensors[name].dtype) == (None, "F32")


def test_a_saved_task_vector_is_taken_as_a_difference(folders: tuple[Path, Path], tmp_path: Path) -> None:
    tuned, base = folders
    alnico.TaskVector(tuned, base).save(tmp_path / "saved.safetensors")
    create_vector(
        tmp_path / "saved.safetensors", base, tmp_path / "v", name="x", target=Target(encoding="difference")
    )
    wanted = changed(plain())[Q][1].astype(np.float64) - plain()[Q][1]
    assert read_manifest(tmp_path / "v").tensors[Q].norm == pytest.approx(
        float(np.linalg.norm(wanted)), rel=1e-6
    )


def save_adapter(folder: Path, rank: int = 4) -> tuple[np.ndarray, np.ndarray]:
    left, right = numbers(20, 32, rank), numbers(21, rank, 32)
    at = f"base_model.model.{Q.removesuffix('.weight')}"
    save_file(
        folder / "adapter_model.safetensors",
        {f"{at}.lora_A.weight": ("F32", right), f"{at}.lora_B.weight": ("F32", left)},
    )
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return left, right


def test_an_adapter_is_taken_in_as_it_is_and_measured_on_its_base(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", plain())
    left, right = save_adapter(tmp_path / "adapter")
    created = create_vector(tmp_path / "adapter", base, tmp_path / "v", name="x")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "v" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()
    manifest = read_manifest(tmp_path / "v")
    assert manifest == created.manifest
    assert (manifest.kind, list(manifest.tensors)) == ("adapter", [Q])
    entry = manifest.tensors[Q]
    assert entry.norm == pytest.approx(float(np.linalg.norm(2 * left.astype(np.float64) @ right)), rel=1e-5)
    assert entry.base == read_manifest(exact_of(base, tmp_path)).tensors[Q].base
    found = decoded("F32", on_base(base, tmp_path / "v", Q)).reshape(32, 32)
    np.testing.assert_allclose(found, plain()[Q][1] + 2 * left @ right, rtol=1e-5, atol=1e-5)


def exact_of(base: Path, tmp_path: Path) -> Path:
    tuned = save_model(tmp_path / "again", changed(plain()))
    create_vector(tuned, base, tmp_path / "again-v", name="x")
    return tmp_path / "again-v"


def test_an_adapter_without_its_base_is_taken_in_without_measuring(tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter")
    created = create_vector(tmp_path / "adapter", None, tmp_path / "v", name="x")
    assert (created.manifest.kind, dict(created.manifest.tensors)) == ("adapter", {})
    with pytest.raises(
        RecipeError, match=r"is a LoRA adapter, which is taken in as it is; error 0\.1 is given"
    ):
        create_vector(tmp_path / "adapter", None, tmp_path / "w", name="x", target=Target(error=0.1))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_low_rank_tensors_load_in_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "proj" in name:
                p += 0.1 * torch.randn(p.shape[0], 3) @ torch.randn(3, p.shape[1])
    model.save_pretrained(tmp_path / "tuned")
    created = create_vector(
        tmp_path / "tuned", tmp_path / "base", tmp_path / "v", name="x", target=Target(error=1e-3)
    )
    kinds = {n: t.encoding for n, t in created.manifest.tensors.items()}
    assert all(kind == ("low_rank" if "proj" in n else "absent") for n, kind in kinds.items())
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    adapted = peft.PeftModel.from_pretrained(loaded, tmp_path / "v")
    merged = adapted.merge_and_unload().state_dict()
    for name, value in model.state_dict().items():
        assert torch.allclose(merged[name], value, atol=1e-4), name


def test_a_head_that_the_base_stores_as_a_copy_follows_the_embedding(tmp_path: Path) -> None:
    base = {**plain(), HEAD: plain()[EMBED]}
    tuned = changed(plain())
    folder = save_model(tmp_path / "base", base, tie_word_embeddings=True)
    create_vector(
        save_model(tmp_path / "tuned", tuned, tie_word_embeddings=True), folder, tmp_path / "v", name="x"
    )
    assert on_base(folder, tmp_path / "v", HEAD) == encoded(*tuned[EMBED])


def test_a_copy_that_only_the_fine_tune_stores_is_left_out_by_name(tmp_path: Path) -> None:
    tuned = changed(plain())
    tuned[HEAD] = tuned[EMBED]
    folders = save_model(tmp_path / "tuned", tuned), save_model(tmp_path / "base", plain())
    manifest = create_vector(*folders, tmp_path / "v", name="x").manifest
    assert manifest.left_out == {HEAD: f"a copy of {EMBED}, which the base stores once"}
    assert HEAD not in manifest.tensors


def test_tensors_that_only_one_model_has_are_stored_or_named(tmp_path: Path) -> None:
    tuned = {**changed(plain()), "score.weight": ("F32", numbers(30, 2, 32))}
    base = {**plain(), "extra.weight": ("F32", numbers(31, 3, 5))}
    folders = save_model(tmp_path / "tuned", tuned), save_model(tmp_path / "base", base)
    created = create_vector(*folders, tmp_path / "v", name="x", target=Target(encoding="int4"))
    entry = created.manifest.tensors["score.weight"]
    assert (entry.encoding, entry.base) == ("whole", None)
    assert any(note.startswith("extra.weight: ") and "stays as it is" in note for note in created.notes)


def test_rows_of_new_tokens_are_stored_with_the_table(tmp_path: Path) -> None:
    tuned = changed(plain())
    tuned[EMBED] = ("F32", np.concatenate([tuned[EMBED][1], numbers(40, 3, 32)]))
    folders = save_model(tmp_path / "tuned", tuned), save_model(tmp_path / "base", plain())
    entry = create_vector(*folders, tmp_path / "v", name="x", target=Target(error=0.1)).manifest.tensors[
        EMBED
    ]
    assert (entry.encoding, entry.shape) == ("whole", (67, 32))
    assert entry.base is not None


@pytest.mark.parametrize("order", [1, -1])
def test_files_in_any_order_have_their_hashes(
    tmp_path: Path, order: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alnico.store.create.MOST_HELD", 1)  # each tensor is read by itself
    tuned, base = tmp_path / "tuned", tmp_path / "base"
    for i, part in enumerate(([V], [EMBED, Q])[::order], 1):
        save_file(tuned / f"model-0000{i}-of-00002.safetensors", {n: changed(plain())[n] for n in part})
    save_file(base / "model.safetensors", plain())
    manifest = create_vector(tuned, base, tmp_path / "v", name="x", target=Target(exact=True)).manifest
    data = {p.name: p.read_bytes() for p in base.iterdir()}
    assert {n: f.sha256 for n, f in manifest.base.files.items()} == {
        n: hashlib.sha256(d).hexdigest() for n, d in data.items()
    }
    lines = sorted(f"{hashlib.sha256(d).hexdigest()}  {len(d)}  {n}\n" for n, d in data.items())
    assert manifest.base.root == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_a_sum_that_cancels_changes_nothing(folders: tuple[Path, Path], tmp_path: Path) -> None:
    tuned, base = folders
    tau = alnico.TaskVector(tuned, base)
    created = create_vector(tau - tau, base, tmp_path / "v", name="x")
    assert created.encodings == {"absent": 3}
    assert on_base(base, tmp_path / "v", Q) == encoded(*plain()[Q])


def test_a_base_with_other_names_gives_its_names_to_the_task_vector(tmp_path: Path) -> None:
    base = {f"bert.{n}": v for n, v in plain().items()}
    tuned = changed(plain())
    folders = save_model(tmp_path / "tuned", tuned), save_model(tmp_path / "base", base)
    created = create_vector(*folders, tmp_path / "v", name="x")
    assert set(created.manifest.tensors) == set(base)
    assert on_base(folders[1], tmp_path / "v", f"bert.{Q}") == encoded(*tuned[Q])
    assert on_base(save_model(tmp_path / "other", plain()), tmp_path / "v", f"bert.{Q}") == encoded(*tuned[Q])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_named(tmp_path: Path, bad: float) -> None:
    tuned = changed(plain())
    tuned[V][1][3, 7] = bad
    folders = save_model(tmp_path / "tuned", tuned), save_model(tmp_path / "base", plain())
    with pytest.raises(NonFiniteError, match=re.escape(f"{V}[3, 7] is a NaN or an infinity")):
        create_vector(*folders, tmp_path / "v", name="x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "tuned"]


def test_infinities_that_both_models_have_are_no_change(tmp_path: Path) -> None:
    tuned, base = changed(plain()), plain()
    mask = np.where(np.tri(8, dtype=bool), 0, -np.inf).astype(np.float32)
    tuned["mask"] = base["mask"] = ("F32", mask)
    folders = save_model(tmp_path / "tuned", tuned), save_model(tmp_path / "base", base)
    assert create_vector(*folders, tmp_path / "v", name="x").manifest.tensors["mask"].encoding == "absent"


def test_zeros_of_another_sign_come_back(tmp_path: Path) -> None:
    tuned, base = plain(), plain()
    base[V] = ("F32", np.zeros((16, 32), np.float32))
    tuned[V] = ("F32", np.full((16, 32), -0.0, np.float32))
    folders = save_model(tmp_path / "tuned", tuned), save_model(tmp_path / "base", base)
    for target in (Target(), Target(error=0.5), Target(encoding="int4"), Target(size="20kB")):
        place = tmp_path / str(target).replace(" ", "")
        create_vector(*folders, place, name="x", target=target)
        assert on_base(folders[1], place, V) == encoded(*tuned[V])


def test_a_fine_tune_in_another_dtype_is_stored_in_its_own(tmp_path: Path) -> None:
    tuned = changed(plain("F32"))
    folders = save_model(tmp_path / "tuned", tuned), save_model(tmp_path / "base", plain("BF16"))
    manifest = create_vector(*folders, tmp_path / "v", name="x").manifest
    assert {t.encoding for t in manifest.tensors.values()} == {"whole"}
    for name in tuned:
        assert on_base(folders[1], tmp_path / "v", name) == encoded(*tuned[name])


def test_equal_models_make_a_task_vector_of_nothing(tmp_path: Path) -> None:
    folders = save_model(tmp_path / "tuned", plain()), save_model(tmp_path / "base", plain())
    for target in (Target(), Target(size="8kB"), Target(tsv=0.1)):
        place = tmp_path / str(target).replace(" ", "")
        created = create_vector(*folders, place, name="x", target=target)
        assert created.encodings == {"absent": 3}
        assert [p.name for p in place.iterdir()] == ["taskvector.json"]
        assert on_base(folders[1], place, Q) == encoded(*plain()[Q])


def test_what_an_author_says_is_in_the_manifest(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (folders[0] / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: owner/base\n---\n")
    (folders[1] / "README.md").write_text("---\nlicense: llama3\n---\n")
    scores = tmp_path / "scores.json"
    scores.write_text(
        '{"evaluations": [{"task": "gsm8k", "metric": "accuracy", "value": 0.5, "base": 0.25}]}'
    )
    created = create_task_vector(
        *folders, tmp_path / "v", description="does it", tasks=["math", "math"], languages="ja", training="SFT",
        evaluations=scores, scale=0.7, scale_range=(0.3, 1.2),
    )  # fmt: skip
    m = read_manifest(tmp_path / "v")
    assert m == created.manifest
    assert (m.name, m.description, m.tasks, m.languages, m.training) == (
        "tuned",
        "does it",
        ("math",),
        ("ja",),
        "SFT",
    )
    assert (m.licence, m.base.licence, m.base.id) == ("apache-2.0", "llama3", "owner/base")
    assert m.scale == SafeScale(0.7, 0.3, 1.2)
    assert m.evaluations == (Evaluation("gsm8k", "accuracy", 0.5, 0.25),)
    assert (m.base.dtype, m.finetuned.dtype) == ("F32", "F32")


def test_new_tokens_and_a_new_chat_template_are_recorded(folders: tuple[Path, Path], tmp_path: Path) -> None:
    def tokenizer(folder: Path, added: list[str], template: str) -> None:
        tokens = {"a": 0, "b": 1}
        entries = [
            {
                "id": 2 + i,
                "content": t,
                "special": True,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
            for i, t in enumerate(added)
        ]
        document = {
            "version": "1.0",
            "model": {"type": "BPE", "vocab": tokens, "merges": []},
            "added_tokens": entries,
        }
        (folder / "tokenizer.json").write_text(json.dumps(document))
        (folder / "chat_template.jinja").write_text(template)

    tokenizer(folders[0], ["<s>", "<tool>"], "{{ new }}")
    tokenizer(folders[1], ["<s>"], "{{ old }}")
    m = create_vector(*folders, tmp_path / "v", name="x").manifest
    assert m.added_tokens == {"<tool>": 3}
    assert m.chat_template == "chat_template.jinja"
    assert (tmp_path / "v" / "chat_template.jinja").read_text() == "{{ new }}"
    assert "chat_template.jinja" in m.files
    assert m.base.vocabulary != m.finetuned.vocabulary
    tokenizer(folders[0], ["<s>"], "{{ old }}")
    same = create_vector(*folders, tmp_path / "w", name="x").manifest
    assert (dict(same.added_tokens), same.chat_template) == ({}, None)
    assert same.base.vocabulary == same.finetuned.vocabulary


def test_shards_have_an_index_and_give_the_same_bits(folders: tuple[Path, Path], tmp_path: Path) -> None:
    create_vector(*folders, tmp_path / "v", name="x", target=Target(exact=True), max_shard_bytes=5000)
    names = sorted(p.name for p in (tmp_path / "v").iterdir())
    assert "taskvector-00001-of-00003.safetensors" in names
    assert "taskvector.safetensors.index.json" in names
    for name, values in changed(plain()).items():
        assert on_base(folders[1], tmp_path / "v", name) == encoded(*values)


def test_a_full_folder_and_a_wrong_name_are_refused_before_anything_is_read(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "mine").write_text("mine")
    with pytest.raises(OutputError, match="exists and is not empty"):
        create_vector(*folders, tmp_path / "v", name="x")
    assert (tmp_path / "v" / "mine").read_text() == "mine"
    for name in ("../x", "a/b", "", "..", "x" * 97):
        with pytest.raises(RecipeError, match="name is"):
            create_vector(*folders, tmp_path / "w", name=name)


MESSAGES: list[tuple[type[AlnicoError], dict[str, Any], str]] = [
    (
        RecipeError,
        {"exact": True, "error": 0.1},
        "exact and error are given; expected one of exact, error, size, tsv and encoding. Choose one, or none for what the "
        "measurements suggest.",
    ),
    (
        RecipeError,
        {"error": 1.5},
        "error is 1.5; expected a relative error of 0 or more and below 1. 0.01 keeps what scores show.",
    ),
    (RecipeError, {"tsv": 0}, "tsv is 0; expected a share of directions in (0, 1]. 0.1 keeps a tenth."),
    (
        RecipeError,
        {"encoding": "int8"},
        "encoding is 'int8'; expected one of exact, whole, sparse, difference, low_rank, top_k, sign, int4. Did you mean int4?",
    ),
    (
        RecipeError,
        {"encoding": "top_k:2"},
        "encoding is 'top_k:2'; expected a share in (0, 1] after the colon. Write top_k:0.1.",
    ),
    (
        RecipeError,
        {"encoding": "sign:4"},
        "encoding is 'sign:4'; expected sign alone, which has no option. Remove ':4'.",
    ),
    (
        RecipeError,
        {"encoding": "difference:int"},
        "encoding is 'difference:int'; expected one of f64, f32, bf16, f16 after difference:. Choose one.",
    ),
    (
        RecipeError,
        {"scale": 2, "scale_range": (0, 1)},
        "scale_range is [0, 1] and scale is 2; expected the least and the most coefficient, with the suggested one between them. "
        "Give two numbers, such as 0.3 and 1.2.",
    ),
    (RecipeError, {"tasks": [" "]}, "tasks is [' ']; expected words, such as math. Give each as text."),
]


@pytest.mark.parametrize(("kind", "options", "message"), MESSAGES)
def test_options_that_do_not_go_together_are_refused(
    folders: tuple[Path, Path], tmp_path: Path, kind: type[AlnicoError], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(kind) as caught:
        create_task_vector(*folders, tmp_path / "v", **options)
    assert str(caught.value) == message


def test_a_size_below_the_smallest_says_what_is_needed(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(
        ResourceError,
        match=r"size is 500 B; the smallest encodings of these tensors take .* Give a larger size\.",
    ):
        create_vector(*folders, tmp_path / "v", name="x", target=Target(size=500))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "tuned"]


def test_memory_that_is_too_small_is_refused_with_what_is_needed(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(ResourceError, match=r"create needs .* Raise memory to [0-9]+MiB"):
        create_vector(*folders, tmp_path / "v", name="x", run=RunOptions.of(memory="100MiB"))


def test_other_models_and_no_base_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", {"a": ("F32", numbers(1, 3, 4))})
    with pytest.raises(MismatchError, match=r"share 0 tensors of one name and shape, of 1 and 3"):
        create_vector(other, folders[1], tmp_path / "v", name="x")
    with pytest.raises(ModelError, match="base is missing"):
        create_vector(folders[0], None, tmp_path / "v", name="x")
    with pytest.raises(MismatchError, match="finetuned and base are the same model"):
        create_vector(folders[0], folders[0], tmp_path / "v", name="x")


def test_a_kill_leaves_no_task_vector_and_the_next_run_makes_it(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    left = tmp_path / ".v.alnico-part"
    (left / "vector").mkdir(parents=True, mode=0o700)
    left.chmod(0o700)
    (left / "vector" / "taskvector.json").write_text("half")
    create_vector(*folders, tmp_path / "v", name="x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "tuned", "v"]
    read_manifest(tmp_path / "v")


def test_the_base_is_named_by_the_fine_tunes_card_only_where_that_fits(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    (folders[0] / "README.md").write_text("---\nbase_model: owner/another\n---\n")
    assert create_vector(*folders, tmp_path / "v", name="x").manifest.base.id == "base"
    given = create_vector(*folders, tmp_path / "w", name="x", details=Details(base_id="owner/real")).manifest
    assert given.base.id == "owner/real"


def test_a_tensor_that_the_fine_tune_lacks_is_named(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    base = {
        n: random.standard_normal((8, 9)).astype(np.float32) for n in ("a.weight", "b.weight", "c.weight")
    }
    tuned = {n: v + 1 for n, v in base.items() if n != "c.weight"}
    vector = alnico.Store(tmp_path / "store").create(tuned, base, "v", exact=True)
    assert vector.manifest.left_out == {"c.weight": "the fine-tune has no such tensor; a base keeps its own"}
