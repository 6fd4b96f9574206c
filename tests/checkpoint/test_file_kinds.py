"""A file that is not what it is given as is named: which format it has, and what to do."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

import alnico
from alnico.errors import AlnicoError, EvaluationError, ModelError, RecipeError
from alnico.evaluation.task_file import read_tasks
from made import save_file, save_model

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 3438121984\n"
ONE = {"w": ("F32", np.ones((4, 2), np.float32))}


def zipped(name: str) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr(name, "x")
    return held.getvalue()


def tarred() -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model/config.json"))
    return held.getvalue()


def saved(save) -> bytes:
    held = io.BytesIO()
    save(held)
    return held.getvalue()


FILES: dict[str, tuple[bytes, str]] = {
    "gguf": (b"GGUF\x03\0\0\0" + b"\1" * 90, "a GGUF file (llama.cpp's format)"),
    "ggml": (b"tjgg" + b"\1" * 90, "a GGML file (an old format of llama.cpp)"),
    "pointer": (POINTER, "a git-lfs pointer, not the file itself, which has 3.4 GB"),
    "html": (b"\n<!DOCTYPE HTML>\n<html>", "an HTML page"),
    "html without a doctype": (b"<html lang=en>", "an HTML page"),
    "xml": (b'<?xml version="1.0"?><Error>', "an XML document, mostly the error message of a server"),
    "error": (b'{"error": "Repository not found"}', "a server's error message ('Repository not found')"),
    "error of an api": (b'{"detail": "Not Found", "status": 404}', "a server's error message ('Not Found')"),
    "text": (b"Invalid username or password.", "text that begins with 'Invalid username or password.'"),
    "recipe": (b"# a merge\nmerge_method: linear\nmodels: [a, b]\n", "a merge recipe"),
    "tasks": (b"tasks:\n  - {name: a}\n", "a file of tasks"),
    "config": (json.dumps({"model_type": "llama"}).encode(), "a model's config"),
    "index": (b'{"metadata": {}, "weight_map": {"w": "a"}}', "the index of a model's shards"),
    "adapter config": (b'{"peft_type": "LORA", "r": 4}', "a LoRA adapter's config"),
    "json": (b'{"a": 1}', "a JSON file"),
    "zip": (zipped("model/config.json"), "a zip archive"),
    "keras": (zipped("metadata.json"), "a Keras model (.keras)"),
    "npz": (saved(lambda file: np.savez(file, w=np.ones(3))), "an archive of numpy arrays (.npz)"),
    "npy": (saved(lambda file: np.save(file, np.ones(3))), "a numpy array (.npy)"),
    "tar": (tarred(), "a tar archive"),
    "gzip": (gzip.compress(b"model"), "a compressed file"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(90), "an HDF5 file, as Keras and TensorFlow write"),
    "tflite": (b"\x1c\0\0\0TFL3" + bytes(90), "a TensorFlow Lite model"),
    "pdf": (b"%PDF-1.7\n", "a PDF document"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(90), "a picture"),
    "empty": (b"", "empty (0 bytes)"),
    "zeros": (bytes(5000), "all zeros at its beginning"),
    "utf-16": ("merge_method: linear\n".encode("utf-16"), "text in UTF-16"),
}  # fmt: skip
TORCH = (zipped("model/data.pkl"), "a PyTorch checkpoint (a pickle in a zip archive)")
PICKLE = (b"\x80\x02}q\0.", "a Python pickle, as old versions of PyTorch write")


def refusal(what: str, kind: type[AlnicoError], read) -> str:
    with pytest.raises(kind) as caught:
        read()
    told = str(caught.value)
    assert "\n" not in told
    assert told.endswith("."), told
    assert what in told
    assert "bytes" not in told.replace("(0 bytes)", "")
    return told


@pytest.mark.parametrize("name", [*FILES, "torch", "pickle"])
def test_a_file_of_another_format_given_as_safetensors_is_named(name: str, tmp_path: Path) -> None:
    content, what = {**FILES, "torch": TORCH, "pickle": PICKLE}[name]
    save_model(tmp_path / "m", ONE, {"model_type": "x"})
    file = tmp_path / "m" / "model.safetensors"
    file.write_bytes(content)
    for path in (file, tmp_path / "m"):
        told = refusal(what, ModelError, lambda path=path: alnico.open_model(path))
        assert told.startswith(f"{file}: is {what}; expected safetensors. ")


@pytest.mark.parametrize("name", [n for n in FILES if n != "zip"])
def test_a_file_of_another_format_given_as_a_torch_checkpoint_is_named(name: str, tmp_path: Path) -> None:
    content, what = FILES[name]
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(content)
    assert refusal(what, ModelError, lambda: alnico.open_model(tmp_path)).startswith(f"{file}: is {what}")


def test_safetensors_with_the_ending_of_a_pickle_are_to_be_renamed(tmp_path: Path) -> None:
    save_file(tmp_path / "model.safetensors", ONE).rename(tmp_path / "model.pt")
    told = refusal("a safetensors file", ModelError, lambda: alnico.open_model(tmp_path / "model.pt"))
    assert told.endswith("Rename it to end in .safetensors.")


def test_a_damaged_safetensors_file_keeps_its_own_message(tmp_path: Path) -> None:
    file = save_file(tmp_path / "model.safetensors", ONE)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelError, match="The file is truncated"):
        alnico.open_model(file)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("flax_model.msgpack", "a Flax checkpoint (.msgpack). Load it with from_flax=True"),
        ("tf_model.h5", "an HDF5 file, as Keras and TensorFlow write. Convert it"),
        ("model.onnx", "an ONNX model. Use the model that it was exported from"),
        ("model.zip", "a zip archive. Unpack it"),
        ("weights.npz", "an archive of numpy arrays (.npz). Save the model as safetensors"),
        ("rust_model.ot", "a checkpoint of rust-bert (.ot)."),
        ("model.nemo", "a NeMo archive (.nemo). Download it"),
        ("model.safetensors.incomplete", "an unfinished download. Complete the download."),
    ],
)
def test_a_folder_with_only_another_format_names_the_file(name: str, advice: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x08\x07")
    (tmp_path / "config.json").write_text("{}")
    told = refusal(advice, ModelError, lambda: alnico.open_model(tmp_path))
    assert told.startswith(f"{tmp_path}: has no .safetensors or .bin file, expected a model. It has {name}, ")


def test_a_folder_of_models_names_those_inside(tmp_path: Path) -> None:
    for step in (500, 1000):
        save_model(tmp_path / f"checkpoint-{step}", ONE)
    told = refusal("Models are in its folders", ModelError, lambda: alnico.open_model(tmp_path))
    assert told.endswith("Models are in its folders checkpoint-1000, checkpoint-500: give the path of one.")


def test_a_folder_of_the_hubs_cache_names_its_snapshot(tmp_path: Path) -> None:
    save_model(tmp_path / "snapshots" / "0123", ONE)
    (tmp_path / "blobs").mkdir()
    told = refusal("Models are in", ModelError, lambda: alnico.open_model(tmp_path))
    assert told.endswith("Models are in its folder snapshots/0123: give the path of one.")


def test_a_folder_without_weights_says_that_the_download_is_incomplete(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    told = refusal("has no .safetensors", ModelError, lambda: alnico.open_model(tmp_path))
    assert told.endswith("It has config.json, but the weights are not there. Complete the download.")


@pytest.mark.parametrize("content", ["pointer", "html", "xml", "text", "empty", "error"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_json_file_of_a_model_that_is_something_else_is_named(
    name: str, content: str, tmp_path: Path
) -> None:
    save_model(tmp_path, ONE, {"model_type": "x"})
    (tmp_path / name).write_bytes(FILES[content][0])
    told = refusal(FILES[content][1], ModelError, lambda: alnico.open_model(tmp_path).config)
    assert told.startswith(f"{tmp_path / name}: ")


@pytest.mark.parametrize("content", ["pointer", "html"])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_of_an_adapter_that_is_something_else_is_named(
    name: str, content: str, tmp_path: Path
) -> None:
    save_model(tmp_path / "base", ONE)
    save_file(
        tmp_path / "adapter" / "adapter_model.safetensors",
        {
            "base_model.model.lora_A.weight": ("F32", np.ones((1, 2), np.float32)),
            "base_model.model.lora_B.weight": ("F32", np.ones((4, 1), np.float32)),
        },
    )
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 1, "lora_alpha": 1}'
    )
    (tmp_path / "adapter" / name).write_bytes(FILES[content][0])
    told = refusal(
        FILES[content][1],
        ModelError,
        lambda: alnico.open_model(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}"),
    )
    assert told.startswith(f"{tmp_path / 'adapter' / name}: ")


CARRIED = [
    ("tokenizer.json", "pointer"),
    ("tokenizer_config.json", "html"),
    ("special_tokens_map.json", "error"),
    ("vocab.txt", "pointer"),
    ("tokenizer.model", "pointer"),
    ("generation_config.json", "pointer"),
    ("preprocessor_config.json", "html"),
    ("logo.png", "pointer"),
]


@pytest.mark.parametrize(("name", "content"), CARRIED)
def test_a_pointer_is_not_copied_to_an_output(name: str, content: str, tmp_path: Path) -> None:
    for model in ("a", "b"):
        save_model(tmp_path / model, ONE, {"model_type": "x"})
    (tmp_path / "a" / name).write_bytes(FILES[content][0])
    recipe = {"merge_method": "linear", "models": [str(tmp_path / "a"), str(tmp_path / "b")]}
    told = refusal(FILES[content][1], ModelError, lambda: alnico.plan(recipe))
    assert told.startswith(f"{tmp_path / 'a' / name}: ")


def test_a_page_next_to_the_weights_is_copied_like_other_files(tmp_path: Path) -> None:
    for model in ("a", "b"):
        save_model(tmp_path / model, ONE, {"model_type": "x"})
    (tmp_path / "a" / "report.html").write_bytes(FILES["html"][0])
    alnico.merge({"merge_method": "linear", "models": [str(tmp_path / m) for m in "ab"]}, tmp_path / "out")
    assert (tmp_path / "out" / "report.html").read_bytes() == FILES["html"][0]


NO_RECIPES = [n for n in FILES if n not in ("recipe", "json", "text", "empty")]


@pytest.mark.parametrize("name", NO_RECIPES)
def test_a_file_given_as_a_recipe_is_named(name: str, tmp_path: Path) -> None:
    content, what = FILES[name]
    path = tmp_path / "recipe.yml"
    path.write_bytes(content)
    told = refusal(what, RecipeError, lambda: alnico.load_recipe(path))
    assert told.startswith(f"{path}: is {what}; expected a recipe. ")


@pytest.mark.parametrize("name", ["recipe", *(n for n in NO_RECIPES if n != "tasks")])
def test_a_file_given_as_tasks_is_named(name: str, tmp_path: Path) -> None:
    content, what = FILES[name]
    path = tmp_path / "tasks.yml"
    path.write_bytes(content)
    told = refusal(what, EvaluationError, lambda: read_tasks(path))
    assert told.startswith(f"{path}: is {what}; expected a list of tasks. ")


def test_a_model_given_as_a_recipe_is_named_by_its_ending_too(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\x08\x07\xff\xfe")
    told = refusal("an ONNX model", RecipeError, lambda: alnico.load_recipe(tmp_path / "model.onnx"))
    assert told.endswith("is an ONNX model; expected a recipe. Give the YAML file of the merge.")


def test_a_folder_given_as_a_recipe_names_the_recipe_in_it(tmp_path: Path) -> None:
    save_model(tmp_path / "a", ONE, {"model_type": "x"})
    start = f"{tmp_path / 'a'}: is a folder; expected a recipe, which is a YAML file. "
    told = refusal(start, RecipeError, lambda: alnico.plan(str(tmp_path / "a")))
    assert told.endswith(
        "It is a model. Merge models without a recipe by `alnico merge A B OUT`, or look at this one with `alnico inspect`."
    )
    alnico.merge({"merge_method": "passthrough", "models": [str(tmp_path / "a")]}, tmp_path / "out")
    told = refusal("is a folder", RecipeError, lambda: alnico.plan(str(tmp_path / "out")))
    assert told.endswith(
        f"It holds the recipe that it was merged by: give {tmp_path}/out/mergekit_config.yml."
    )
    (tmp_path / "recipes").mkdir()
    for name in ("b.yml", "a.yml"):
        (tmp_path / "recipes" / name).touch()
    told = refusal("is a folder", RecipeError, lambda: alnico.plan(str(tmp_path / "recipes")))
    assert told.endswith("It holds a.yml and b.yml: give one file.")


def test_a_json_file_with_a_number_called_error_is_no_message_of_a_server(tmp_path: Path) -> None:
    from alnico.checkpoint.json_files import read_json

    (tmp_path / "scores.json").write_text('{"error": 0.5}')
    assert read_json(tmp_path / "scores.json") == {"error": 0.5}


def test_a_model_given_as_an_adapter_is_named(tmp_path: Path) -> None:
    save_model(tmp_path / "base", ONE, {"model_type": "x"})
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "adapter.gguf").touch()
    for adapter, advice in (
        (
            "base",
            "It is a whole model: merge it by a recipe, or make an adapter of it with `alnico lora extract`.",
        ),
        (
            "gguf",
            "It has adapter.gguf, a GGUF file (llama.cpp's format): use the adapter that it was converted from.",
        ),
    ):

        def call(adapter: str = adapter) -> object:
            return alnico.lora.fold(tmp_path / "base", tmp_path / adapter, tmp_path / "out")

        assert refusal("expected a LoRA adapter", ModelError, call).endswith(advice)


@pytest.mark.parametrize("content", ["pointer", "html"])
@pytest.mark.parametrize("name", ["data.jsonl", "data.csv", "data.npz"])
def test_a_pointer_in_the_place_of_examples_is_named(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(FILES[content][0])
    task = {"name": "a", "type": "classification", "data": name}
    told = refusal(FILES[content][1], EvaluationError, lambda: read_tasks({"tasks": [task]}, folder=tmp_path))
    assert f"{tmp_path / name}: is {FILES[content][1]}; expected examples. " in told


def test_a_pointer_in_the_place_of_a_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "wiki.txt").write_bytes(POINTER)
    task = {"name": "a", "type": "perplexity", "data": "wiki.txt"}
    refusal("is a git-lfs pointer", EvaluationError, lambda: read_tasks({"tasks": [task]}, folder=tmp_path))
