"""What --overwrite may remove: folders of models and of reports, and nothing else that a person may have made."""

from __future__ import annotations

import json
import os
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from alnico.analysis import files as analysis_files
from alnico.analysis.files import OF_MODEL, OWN
from alnico.checkpoint import overwrite
from alnico.checkpoint.overwrite import foreign_entries
from alnico.evaluation import scorecard_page
from alnico.tune.search import files
from made import save_file

MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "T"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "P"},
]
WRITERS = {
    "transformers": "config.json generation_config.json model-00001-of-00002.safetensors model-00002-of-00002.safetensors "
    "model.safetensors.index.json tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json merges.txt "
    "chat_template.jinja preprocessor_config.json processor_config.json video_preprocessor_config.json training_args.bin",
    "the hub": "README.md LICENSE LICENSE.txt NOTICE USE_POLICY.md .gitattributes config.json pytorch_model.bin tf_model.h5 flax_model.msgpack "
    "rust_model.ot model.onnx tokenizer.model vocab.txt banner.png assets/plot.svg onnx/model.onnx onnx/config.json original/params.json "
    "original/consolidated.00.pth original/tokenizer.model .cache/huggingface/.gitignore .cache/huggingface/download/config.json.metadata",
    "code beside the weights": "config.json model.safetensors modeling_x.py configuration_x.py tokenization_x_fast.py image_processing_x.py",
    "mergekit": "README.md mergekit_config.yml config.json model.safetensors tokenizer.json",
    "PEFT": "README.md adapter_config.json adapter_model.safetensors second/adapter_config.json second/adapter_model.safetensors",
    "sentence-transformers": "modules.json config_sentence_transformers.json sentence_bert_config.json config.json model.safetensors "
    "1_Pooling/config.json README.md tokenizer.json eval/similarity_evaluation_sts-dev_results.csv",
    "diffusers": "model_index.json unet/config.json unet/diffusion_pytorch_model.safetensors vae/config.json "
    "vae/diffusion_pytorch_model.fp16.safetensors scheduler/scheduler_config.json tokenizer/vocab.json tokenizer/merges.txt",
    "gguf": "README.md x.Q4_K_M.gguf",
    "one file": "model.safetensors",
    "a file manager": "config.json model.safetensors .DS_Store ._config.json Thumbs.db desktop.ini .directory",
    "optimum": "config.json model.safetensors onnx/model.onnx openvino/openvino_model.xml openvino/openvino_model.bin",
    "a trainer": "config.json model.safetensors optimizer.pt scheduler.pt rng_state_0.pth trainer_state.json train_results.json all_results.json",
}
CONFIGS = {
    "modules.json": MODULES,
    "model_index.json": {
        "_class_name": "P",
        "unet": ["diffusers", "U"],
        "vae": ["diffusers", "V"],
        "scheduler": ["d", "S"],
        "tokenizer": ["t", "T"],
    },
    "config.json": {"model_type": "x"},
}


def put(folder: Path, names: str) -> Path:
    for name in names.split():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(CONFIGS.get(name, {})))
    return folder


@pytest.mark.parametrize("writer", WRITERS)
def test_a_model_may_be_replaced_whoever_wrote_it(writer: str, tmp_path: Path) -> None:
    assert foreign_entries(put(tmp_path / "out", WRITERS[writer])) == []


@pytest.mark.parametrize(
    "name",
    [
        ".git/HEAD", ".gitignore", ".env", ".hidden", ".cache/mine", "src/main.py", "main.py", "setup.py", "thesis.docx", "notes.txt", "todo.md",
        "data.csv", "data.json", "train.jsonl", "x.ipynb", "run.sh", "recipe.yml", "tasks.yml", "config.yaml", "package.json", "a.zip", "x.npy",
        "x.pkl", "scores.xlsx", "unknown/model.safetensors/x", "checkpoint-10/model.safetensors", "runs/events.out", "assets/mine.txt",
        "1_Pooling/mine.txt", "1_Pooling/.git/HEAD", "1_Pooling/deep/mine.py", "assets/.ssh/key", "model.safetensors.txt", "wandb/log",
        ".mine.safetensors", ".photo.png", "assets/.git/config.json",
    ],
)  # fmt: skip
def test_a_model_with_anything_else_beside_it_may_not(name: str, tmp_path: Path) -> None:
    out = put(tmp_path / "out", f"{WRITERS['sentence-transformers']} {name}")
    assert foreign_entries(out) == [name.split("/")[0]]


@pytest.mark.parametrize(
    "names",
    [
        "README.md",
        "README.md LICENSE",
        "picture.png other.jpg",
        "README.md vocab.json",
        "assets/a.png README.md",
        "params.json",
        "mergekit_config.yml",
    ],
)
def test_known_names_without_a_model_may_not(names: str, tmp_path: Path) -> None:
    assert foreign_entries(put(tmp_path / "out", names)) == sorted(
        {name.split("/")[0] for name in names.split()}
    )


def test_a_config_of_something_else_is_no_model(tmp_path: Path) -> None:
    (put(tmp_path, "README.md") / "config.json").write_text('{"database": "x"}')
    assert foreign_entries(tmp_path) == ["README.md", "config.json"]


def test_special_files_and_links_to_folders_are_known_by_their_names(tmp_path: Path) -> None:
    out = put(tmp_path / "out", "config.json model.safetensors")
    (out / "README.md").symlink_to("/etc/hostname")
    assert foreign_entries(out) == []
    (out / "src").symlink_to("/etc")
    os.mkfifo(out / "LICENSE")
    assert foreign_entries(out) == ["LICENSE", "src"]


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", ".git/config", ".env", "a/../../x", "deep/.git/HEAD"]
)
def test_a_lock_makes_nothing_known_that_no_lock_lists(name: str, tmp_path: Path) -> None:
    out = put(tmp_path / "out", "model.safetensors .git/config .env deep/.git/HEAD carried.txt")
    (out / "alnico.lock.json").write_text(json.dumps({"files": {name: {}, "carried.txt": {}}}))
    assert foreign_entries(out) == [".env", ".git", "deep"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"files": 1}', '{"files": {"a": null, "": {}}}', "\0", "[" * 5000]
)
def test_a_lock_that_is_damaged_makes_nothing_known(text: str, tmp_path: Path) -> None:
    out = put(tmp_path / "out", "model.safetensors carried.txt")
    (out / "alnico.lock.json").write_text(text)
    assert foreign_entries(out) == ["carried.txt"]


def test_a_file_is_weights_by_its_header(tmp_path: Path) -> None:
    assert (
        foreign_entries(save_file(tmp_path / "x.safetensors", {"w": ("F32", np.ones(3, np.float32))})) == []
    )
    for text in (
        b"mine",
        b"\x02" + bytes(7) + b"[]",
        b"\x02" + bytes(7) + b"{",
        b"\x07" + bytes(7) + b'{"a":1}',
        bytes(8) + b"x",
    ):
        (tmp_path / "y.safetensors").write_bytes(text)
        assert foreign_entries(tmp_path / "y.safetensors") == ["y.safetensors"], text
    (tmp_path / "z.safetensors").symlink_to("x.safetensors")
    assert foreign_entries(tmp_path / "z.safetensors") == ["z.safetensors"]


def test_names_of_reports_alone_are_no_reports(tmp_path: Path) -> None:
    statistics = put(tmp_path / "statistics", "statistics.json statistics.safetensors")
    assert foreign_entries(statistics) != []
    assert foreign_entries(put(tmp_path / "evaluation", "evaluation.json report.html")) != []
    analysis = put(tmp_path / "analysis", "summary.json report.html")
    (analysis / "summary.json").write_text(json.dumps({"models": []}))
    assert foreign_entries(analysis) != []
    (analysis / "summary.json").write_text(json.dumps({"quantile_error": 0, "models": [{"name": "a"}]}))
    assert foreign_entries(analysis) == []
    (analysis / "a").symlink_to(put(tmp_path / "elsewhere", "summary.json"))
    assert foreign_entries(analysis) != []


def test_names_of_a_search_alone_are_no_search(tmp_path: Path) -> None:
    assert foreign_entries(put(tmp_path / "out", "best.yml trials.csv")) == ["best.yml", "trials.csv"]


def test_what_alnico_reports_may_be_replaced(tmp_path: Path) -> None:
    analysis = put(tmp_path / "analysis", " ".join((*OWN, *(f"a/{name}" for name in OF_MODEL))))
    (analysis / "summary.json").write_text(json.dumps({"quantile_error": 0, "models": [{"name": "a"}]}))
    assert foreign_entries(analysis) == []
    put(analysis, "a/mine.txt")
    assert foreign_entries(analysis) != []
    evaluation = put(tmp_path / "evaluation", "report.html")
    (evaluation / "evaluation.json").write_text(json.dumps({"models": [], "tasks": []}))
    assert foreign_entries(evaluation) == []
    search = put(tmp_path / "search", "best.yml best-12.yml trials.csv search.html")
    (search / "search.json").write_text(json.dumps({"trials": [], "objectives": []}))
    assert foreign_entries(search) == []
    put(search, "best-practices.yml")
    assert "best-practices.yml" in foreign_entries(search)
    with sqlite3.connect(tmp_path / "study.db") as study:
        study.execute("create table t (x)")
    (tmp_path / "begun").mkdir()
    (tmp_path / "study.db").rename(tmp_path / "begun" / "study.db")
    assert foreign_entries(tmp_path / "begun") == []
    curve = put(tmp_path / "curve", "best.yml curve.csv curve.json curve.png curve.html")
    assert foreign_entries(curve) != []
    (curve / "points.jsonl").write_text('{"kind": "alnico curve", "identity": {}}\n')
    assert foreign_entries(curve) == []
    put(curve, "mine.txt")
    assert foreign_entries(curve) != []
    statistics = put(tmp_path / "statistics", "statistics.safetensors")
    (statistics / "statistics.json").write_text(json.dumps({"kind": "fisher", "tensors": {}}))
    assert foreign_entries(statistics) == []


def test_the_names_of_reports_are_those_that_are_written() -> None:
    assert set(overwrite.ANALYSIS) == set(OWN)
    assert set(overwrite.ANALYSIS_OF_MODEL) == set(OF_MODEL)
    assert set(overwrite.EVALUATION) == {scorecard_page.DATA, scorecard_page.PAGE}
    written = (files.STUDY, files.BEST, "best-3.yml", files.TABLE, files.RESULT, files.PAGE)
    assert all(overwrite.SEARCH.fullmatch(name) for name in written)
    assert analysis_files.SUMMARY in overwrite.ANALYSIS


@pytest.mark.parametrize(
    "name",
    [".DS_Store", "._model.safetensors", "Thumbs.db", "desktop.ini", ".nfs0000000002", ".ipynb_checkpoints/README-checkpoint.md",
     "__pycache__/modeling_x.cpython-311.pyc"],
)  # fmt: skip
def test_what_systems_put_into_folders_is_nobodys_work(name: str, tmp_path: Path) -> None:
    assert foreign_entries(put(tmp_path / "out", f"{WRITERS['sentence-transformers']} {name}")) == []


@pytest.mark.parametrize(
    "name",
    [
        ".ipynb_checkpoints/thesis-checkpoint.ipynb",
        "__pycache__/mine.cpython-311.pyc",
        "__pycache__/deep/x",
        ".DS_Store_mine",
    ],
)
def test_other_things_there_are(name: str, tmp_path: Path) -> None:
    assert foreign_entries(put(tmp_path / "out", f"{WRITERS['sentence-transformers']} {name}")) == [
        name.split("/")[0]
    ]
