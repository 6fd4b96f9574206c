"""Models of several modules, each in a folder of its own with its weights, as sentence-transformers writes them; it is the referee."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import alnico
from alnico.checkpoint.shards import indices_of, split_into_shards
from alnico.errors import MismatchError, ModelError

pytestmark = pytest.mark.filterwarnings("ignore")
RECIPE = {"merge_method": "linear", "unrelated": "allow"}
TRANSFORMER, DENSE = "sentence_transformers.models.Transformer", "sentence_transformers.models.Dense"


def folder(
    path: Path,
    seed: int,
    modules: dict[str, dict[str, tuple[int, ...]]],
    config: dict | None = None,
    *,
    pickled: bool = False,
) -> str:
    """A model of modules, by their folders; '' is the model's own."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensors in modules.items():
        (path / name).mkdir(parents=True, exist_ok=True)
        held = {n: torch.randn(shape, generator=generator) for n, shape in tensors.items()}
        if pickled and name and held:
            torch.save(held, path / name / "pytorch_model.bin")
        elif held:
            save_file(held, path / name / "model.safetensors")
        (path / name / "config.json").write_text(
            json.dumps({"of": name} if name else {"model_type": "bert"} | (config or {}))
        )
    listed = [
        {"idx": i, "name": str(i), "path": name, "type": DENSE if name else TRANSFORMER}
        for i, name in enumerate(modules)
    ]
    (path / "modules.json").write_text(json.dumps(listed))
    return str(path)


PARTS = {
    "": {"encoder.w": (8, 8)},
    "1_Pooling": {},
    "2_Dense": {"linear.weight": (4, 8), "linear.bias": (4,)},
    "3_LayerNorm": {"norm.weight": (4,)},
}


def mean(models: list[str], file: str) -> dict[str, np.ndarray]:
    states = [load_file(Path(m) / file) for m in models]
    return {n: (sum(s[n].double() for s in states) / len(states)).numpy() for n in states[0]}


@pytest.mark.parametrize("pickled", [False, True])
def test_the_weights_of_modules_are_merged_named_verified_and_reproduced(tmp_path, pickled):
    models = [folder(tmp_path / n, i, PARTS, pickled=pickled) for i, n in enumerate("ab")]
    recipe = {**RECIPE, "models": models}
    plan = alnico.plan(recipe)
    names = ["2_Dense/linear.bias", "2_Dense/linear.weight", "3_LayerNorm/norm.weight", "encoder.w"]
    assert sorted(j.name for j in plan.jobs if j.kind == "mix") == names
    assert [s.name for s in plan.shards] == [
        "model.safetensors",
        "2_Dense/model.safetensors",
        "3_LayerNorm/model.safetensors",
    ]
    alnico.merge(recipe, tmp_path / "out")
    others = [folder(tmp_path / f"plain-{n}", i, PARTS) for i, n in enumerate("ab")]
    for file in ("model.safetensors", "2_Dense/model.safetensors", "3_LayerNorm/model.safetensors"):
        found = load_file(tmp_path / "out" / file)
        for name, value in mean(others, file).items():
            np.testing.assert_allclose(found[name].numpy(), value, rtol=1e-6, atol=1e-7)
    files = sorted(
        p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()
    )
    assert files == [
        "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "3_LayerNorm/config.json", "3_LayerNorm/model.safetensors",
        "README.md", "alnico.lock.json", "config.json", "mergekit_config.yml", "model.safetensors", "modules.json",
    ]  # fmt: skip
    lock = json.loads((tmp_path / "out" / "alnico.lock.json").read_text())
    assert sorted(lock["output"]) == names
    assert "2_Dense/model.safetensors" in lock["files"]
    assert {f["file"] for f in lock["inputs"][0]["files"]} == {
        "model.safetensors", *(f"{m}/{'pytorch_model.bin' if pickled else 'model.safetensors'}" for m in ("2_Dense", "3_LayerNorm")),
    }  # fmt: skip
    alnico.verify(tmp_path / "out")
    alnico.verify(tmp_path / "out", against_inputs=True)
    alnico.reproduce(tmp_path / "out", tmp_path / "again")
    assert alnico.diff(tmp_path / "out", tmp_path / "again").is_equal
    damaged = tmp_path / "out" / "2_Dense" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\7")
    with pytest.raises(alnico.errors.VerificationError, match="2_Dense/linear"):
        alnico.verify(tmp_path / "out")


def test_modules_are_cut_into_shards_of_their_own_folders(tmp_path):
    parts = {
        "0_Transformer": {f"layer.{i}.w": (8, 8) for i in range(4)},
        "1_Pooling": {},
        "2_Dense": {"linear.weight": (4, 8)},
    }
    models = [folder(tmp_path / n, i, parts) for i, n in enumerate("ab")]
    for model in models:
        (Path(model) / "0_Transformer" / "config.json").write_text(
            json.dumps({"model_type": "bert", "torch_dtype": "float32"})
        )
    alnico.merge({**RECIPE, "models": models, "dtype": "bfloat16"}, tmp_path / "out", max_shard_size=256)
    inside = sorted(p.name for p in (tmp_path / "out" / "0_Transformer").iterdir())
    assert inside == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    assert (
        json.loads((tmp_path / "out" / "0_Transformer" / "config.json").read_text())["torch_dtype"]
        == "bfloat16"
    )
    assert not list((tmp_path / "out").glob("*.safetensors"))
    with alnico.open_model(tmp_path / "out") as out:
        assert out.config["model_type"] == "bert"
        for name, value in mean(models, "0_Transformer/model.safetensors").items():
            np.testing.assert_allclose(out.read(f"0_Transformer/{name}"), value, rtol=2**-8)
    alnico.reproduce(tmp_path / "out", tmp_path / "again")
    assert alnico.diff(tmp_path / "out", tmp_path / "again").is_equal
    index = tmp_path / "out" / "0_Transformer" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("layer.0.w", "layer.9.w"))
    with pytest.raises(ModelError, match=r"'layer\.9\.w' is in"):
        alnico.open_model(tmp_path / "out")


def test_the_routes_of_a_router_are_merged_each_with_its_dtype(tmp_path):
    routes = ("query_0_Transformer", "document_0_Transformer")
    models = []
    for i, name in enumerate("ab"):
        models.append(folder(tmp_path / name, i, {route: {"layer.0.w": (4, 4)} for route in routes}))
        (tmp_path / name / "modules.json").write_text(json.dumps([{"idx": 0, "path": "", "type": "Router"}]))
        (tmp_path / name / "router_config.json").write_text(
            json.dumps({"types": dict.fromkeys(routes, TRANSFORMER)})
        )
        for route in routes:
            (tmp_path / name / route / "config.json").write_text(
                json.dumps({"model_type": "bert", "dtype": "float32"})
            )
    alnico.merge({**RECIPE, "models": models, "dtype": "float16"}, tmp_path / "out")
    for route in routes:
        found = load_file(tmp_path / "out" / route / "model.safetensors")["layer.0.w"]
        np.testing.assert_allclose(
            found.numpy(), mean(models, f"{route}/model.safetensors")["layer.0.w"], rtol=2**-10, atol=1e-4
        )
        assert json.loads((tmp_path / "out" / route / "config.json").read_text())["dtype"] == "float16"


def test_a_merge_of_modules_is_taken_up_after_it_was_killed(tmp_path):
    models = [folder(tmp_path / n, i, PARTS) for i, n in enumerate("ab")]
    recipe = {**RECIPE, "models": models}
    alnico.merge(recipe, tmp_path / "whole")
    told = []

    def stop(event):
        told.append(event)
        if len(told) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        alnico.merge(recipe, tmp_path / "out", watch=stop, threads=1)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.alnico-part" / "model" / "2_Dense" / "model.safetensors.unfinished").exists()
    alnico.merge(recipe, tmp_path / "out")
    assert alnico.diff(tmp_path / "out", tmp_path / "whole").is_equal


def test_a_module_that_a_model_lacks_follows_the_rule_of_missing_tensors(tmp_path):
    one = folder(tmp_path / "a", 0, PARTS)
    two = folder(tmp_path / "b", 1, {"": PARTS[""]})
    with pytest.raises(MismatchError, match="2_Dense/linear"):
        alnico.plan({**RECIPE, "models": [one, two]})
    alnico.merge({**RECIPE, "models": [one, two], "missing": "copy"}, tmp_path / "out")
    found, own = (load_file(Path(p) / "2_Dense/model.safetensors") for p in (tmp_path / "out", one))
    assert all(torch.equal(found[n], own[n]) for n in own)


def test_modules_with_other_words_or_configs_are_told(tmp_path):
    parts = {"0_WordEmbeddings": {"emb_layer.weight": (3, 4)}, "1_Pooling": {}}
    models = [folder(tmp_path / n, i, parts) for i, n in enumerate("ab")]
    for model, words in zip(models, (["x", "y", "z"], ["y", "x", "z"]), strict=True):
        (Path(model) / "0_WordEmbeddings" / "whitespacetokenizer_config.json").write_text(
            json.dumps({"vocab": words})
        )
    with pytest.raises(MismatchError, match=r"0_WordEmbeddings: .* have different vocabularies"):
        alnico.plan({**RECIPE, "models": models})
    shutil.copytree(models[0], tmp_path / "c")
    (tmp_path / "c" / "0_WordEmbeddings" / "config.json").write_text('{"of": "another"}')
    plan = alnico.plan({**RECIPE, "models": [models[0], str(tmp_path / "c")]})
    assert (
        f"0_WordEmbeddings: the configs of {models[0]} and {tmp_path}/c differ; the output has that of {models[0]}."
        in plan.notes
    )


def test_weights_in_other_files_are_named_and_not_carried(tmp_path):
    one = Path(folder(tmp_path / "a", 0, PARTS))
    others = [
        "consolidated.safetensors", "model.fp16.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "tf_model.h5", "original/consolidated.00.pth", "model.safetensors.bak",
        "onnx/model.onnx", "2_Dense/pytorch_model.bin",
    ]  # fmt: skip
    for name in (*others, "training_args.bin", "adapter_config.json"):
        (one / name).parent.mkdir(exist_ok=True)
        (one / name).write_bytes(b"{}")
    plan = alnico.plan({**RECIPE, "models": [str(one)]})
    (note,) = [n for n in plan.notes if "are ignored" in n]
    assert note.startswith(
        f"{one}: other weight files are ignored, neither merged nor copied to the output: "
    )
    assert set(note.rstrip(".").rpartition(": ")[2].replace(" and 1 more", "").split(", ")) < set(others)
    alnico.merge({**RECIPE, "models": [str(one)]}, tmp_path / "out")
    files = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*")}
    assert not files & {*others, "training_args.bin", "adapter_config.json"}


def test_a_shard_that_the_index_forgets_is_an_error(tmp_path):
    weights = {f"model-0000{i}-of-00003.safetensors": {f"w{i}": torch.ones(2)} for i in (1, 2, 3)}
    for name, held in weights.items():
        save_file(held, tmp_path / name)
    listed = {t: name for name, held in weights.items() for t in held if "00003-of" not in name}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    with pytest.raises(ModelError) as caught:
        alnico.open_model(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}/model.safetensors.index.json: does not list model-00003-of-00003.safetensors, which is in the same folder and is one of the shards of "
        "model-00001-of-00003.safetensors; expected all of them. The index and the shards come from different downloads: download the model again, or remove "
        "the file that is not part of the model."
    )


def test_one_file_holds_the_modules_under_their_names(tmp_path):
    models = [folder(tmp_path / n, i, PARTS) for i, n in enumerate("ab")]
    alnico.merge({**RECIPE, "models": models}, tmp_path / "out.safetensors")
    assert sorted(load_file(tmp_path / "out.safetensors")) == sorted(
        ["encoder.w", "2_Dense/linear.bias", "2_Dense/linear.weight", "3_LayerNorm/norm.weight"]
    )


def test_names_with_slashes_of_no_module_stay_in_the_models_file():
    shards = split_into_shards(
        [("a/b.w", "F32", (2,)), ("2_Dense/w", "F32", (2,)), ("c", "F32", (2,))],
        100,
        None,
        folders={"2_Dense": "model"},
    )
    assert {s.name: [t.name for t in s.header.tensors] for s in shards} == {
        "model.safetensors": ["a/b.w", "c"], "2_Dense/model.safetensors": ["2_Dense/w"],
    }  # fmt: skip
    assert indices_of(shards) == {}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Two sentence encoders of the same words, with a Dense, a LayerNorm and weighted layers."""
    root = tmp_path_factory.mktemp("encoders")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "magnet", "holds", "iron", "nickel"]
    (root / "vocab.txt").write_text("\n".join(words) + "\n")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sentence_transformers as st
        from sentence_transformers import models as modules
        from transformers import BertConfig, BertModel, BertTokenizerFast

        for i, name in enumerate("ab"):
            torch.manual_seed(i)
            config = BertConfig(
                vocab_size=10,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
            )
            BertModel(config).save_pretrained(root / f"bert-{name}")
            BertTokenizerFast(str(root / "vocab.txt")).save_pretrained(root / f"bert-{name}")
            encoder = modules.Transformer(str(root / f"bert-{name}"))
            dense = modules.Dense(16, 8, activation_function=torch.nn.Tanh())
            norm = modules.LayerNorm(8)
            torch.nn.init.normal_(norm.norm.weight)
            parts = [encoder, modules.Pooling(16), dense, norm]
            st.SentenceTransformer(modules=parts, device="cpu").save(str(root / name))
    return root


@pytest.mark.slow
def test_a_merged_sentence_encoder_embeds_as_the_one_that_is_averaged_by_hand(encoders, tmp_path):
    import sentence_transformers as st

    models = [str(encoders / n) for n in "ab"]
    alnico.merge({**RECIPE, "models": models}, tmp_path / "out")
    merged, one, two = (st.SentenceTransformer(str(p), device="cpu") for p in (tmp_path / "out", *models))
    state, other = one.state_dict(), two.state_dict()
    one.load_state_dict({n: ((v.double() + other[n].double()) / 2).to(v.dtype) for n, v in state.items()})
    texts = ["the magnet holds iron", "nickel"]
    np.testing.assert_allclose(merged.encode(texts), one.encode(texts), rtol=1e-4, atol=1e-6)
    assert not np.allclose(merged.encode(texts), two.encode(texts), rtol=1e-2)
