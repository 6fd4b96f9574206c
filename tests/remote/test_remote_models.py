"""Models at URLs: what is read of them, what they merge to, and what locks, cards and messages call them."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import alnico
import counting_folder
from alnico.checkpoint.remote.folder import FileVersion
from alnico.errors import HubError, ModelError, OutputError, RecipeError
from alnico.events import Started, TensorDone
from counting_folder import ADDRESS, Elsewhere
from how_to.page_models import DEMO_MODELS
from made import family, read_file, save_file
from made_pipelines import pipeline
from made_tokenizers import save_family
from real import installed
from web_server import WebServer

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def models(elsewhere: Elsewhere) -> tuple[str, list[str]]:
    """A base and three fine-tunes in two shards each."""
    base, tuned = family(elsewhere.root, 3, shards=2, layers=2)
    (base / "tokenizer_config.json").write_text('{"model_max_length": 128}')
    (base / "notes.xyz").write_text("carried with the base")
    return f"{ADDRESS}/{base.name}", [f"{ADDRESS}/{path.name}" for path in tuned]


def local(elsewhere: Elsewhere, reference: str) -> str:
    return reference.replace(f"{ADDRESS}/", f"{elsewhere.root}/")


def contents(folder: Path) -> dict[str, bytes]:
    """All files of an output but those that name the models."""
    names_models = ("README.md", "alnico.lock.json", "mergekit_config.yml")
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in names_models
    }


METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "ties": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "tsv": {},
    "model_stock": {},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_merge_of_models_at_urls_has_the_bytes_of_a_local_one(
    elsewhere: Elsewhere, models: tuple[str, list[str]], tmp_path: Path, method: str
) -> None:
    base, tuned = models
    recipe = alnico.make_recipe(tuned, method, base=None if method == "linear" else base, **METHODS[method])
    here = alnico.make_recipe(
        [local(elsewhere, t) for t in tuned],
        method,
        base=None if method == "linear" else local(elsewhere, base),
        **METHODS[method],
    )
    alnico.merge(recipe, tmp_path / "there")
    alnico.merge(here, tmp_path / "here")
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


def test_a_model_is_read_by_its_headers_and_then_by_ranges(
    elsewhere: Elsewhere, models: tuple[str, list[str]]
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    with alnico.open_model(models[0]) as model:
        assert set(elsewhere.weight_bytes().values()) == {0}
        values = model.read(name)
        assert model.directory is not None
        kept = model.directory
        assert {p.name for p in kept.iterdir()} == {
            "config.json",
            "model.safetensors.index.json",
            "tokenizer_config.json",
        }
    file = elsewhere.root / "base" / "model-00002-of-00002.safetensors"
    np.testing.assert_array_equal(values, read_file(file)[name][1])
    assert sum(elsewhere.weight_bytes().values()) == values.size * 2
    assert not kept.exists()


def test_a_side_file_that_arrived_in_part_is_fetched_again(
    elsewhere: Elsewhere, models: tuple[str, list[str]]
) -> None:
    def fails(*_: object) -> None:
        raise HubError("the server is gone.")

    with alnico.open_model(models[0]) as model:
        absent = model.absent([], True)
        assert list(absent) == ["notes.xyz"]
        elsewhere.before_read = fails
        with pytest.raises(HubError, match="the server is gone"):
            model.fetch(absent)
        elsewhere.before_read = None
        assert model.absent([], True) == absent
        model.fetch(absent)
        assert model.directory is not None
        assert (model.directory / "notes.xyz").read_text() == "carried with the base"


def test_a_server_that_lists_no_files_is_asked_for_the_usual_names(
    elsewhere: Elsewhere, models: tuple[str, list[str]]
) -> None:
    elsewhere.lists_files = False
    with alnico.open_model(models[0]) as model:
        assert len(model.shards) == 2
        assert model.config["model_type"] == "llama"


@pytest.mark.parametrize("lists_files", [True, False])
def test_a_pipeline_at_a_url_is_one_model(elsewhere: Elsewhere, tmp_path: Path, lists_files: bool) -> None:
    for i in range(2):
        pipeline(elsewhere.root / f"p{i}", i)
    elsewhere.lists_files = lists_files
    recipe = {"merge_method": "linear", "unrelated": "allow"}
    alnico.merge({**recipe, "models": [f"{ADDRESS}/p{i}" for i in range(2)]}, tmp_path / "out")
    alnico.merge({**recipe, "models": [str(elsewhere.root / f"p{i}") for i in range(2)]}, tmp_path / "local")
    assert contents(tmp_path / "out") == contents(tmp_path / "local")


def test_a_web_server_without_a_model_there_is_no_folder_without_files(web_server: WebServer) -> None:
    with pytest.raises(ModelError, match=r"the server lists no files, and has none of the usual names there"):
        alnico.open_model(f"{web_server.url}/nothing")


def test_one_file_at_a_url_is_a_model(elsewhere: Elsewhere, tmp_path: Path) -> None:
    for i in range(2):
        save_file(
            elsewhere.root / f"{i}.safetensors", {"weight": ("F32", np.full((4, 4), float(i), np.float32))}
        )
    recipe = alnico.make_recipe([f"{ADDRESS}/{i}.safetensors" for i in range(2)], unrelated="allow")
    alnico.merge(recipe, tmp_path / "out.safetensors")
    np.testing.assert_array_equal(read_file(tmp_path / "out.safetensors")["weight"][1], np.full((4, 4), 0.5))


def test_lock_card_and_recipe_name_the_urls(
    elsewhere: Elsewhere, models: tuple[str, list[str]], tmp_path: Path
) -> None:
    base, tuned = models
    alnico.merge(alnico.make_recipe(tuned, "ties", base=base), tmp_path / "out")
    lock = json.loads((tmp_path / "out" / "alnico.lock.json").read_text())
    assert [entry["model"] for entry in lock["inputs"]] == [*tuned, base]
    first = lock["inputs"][-1]["files"][0]
    assert first["url"] == f"{base}/model-00001-of-00002.safetensors"
    assert first["tag"]
    assert first["size"] == (elsewhere.root / "base" / "model-00001-of-00002.safetensors").stat().st_size
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(url in card for url in (base, *tuned))
    assert "on the maker's disk" not in card
    assert base in (tmp_path / "out" / "mergekit_config.yml").read_text()


def test_a_merge_of_urls_is_verified_and_made_again(models: tuple[str, list[str]], tmp_path: Path) -> None:
    base, tuned = models
    alnico.merge(alnico.make_recipe(tuned, "ties", base=base), tmp_path / "out")
    assert alnico.verify(tmp_path / "out", against_inputs=True)
    assert alnico.reproduce(tmp_path / "out")


def test_an_object_that_is_replaced_during_a_merge_is_noticed(
    elsewhere: Elsewhere, models: tuple[str, list[str]], tmp_path: Path
) -> None:
    _, tuned = models
    file = elsewhere.root / "tuned-1" / "model-00002-of-00002.safetensors"
    changed = bytearray(file.read_bytes())
    changed[-1] ^= 1

    done = []

    def replace(event: Any) -> None:
        done.append(event)
        if sum(isinstance(e, TensorDone) for e in done) == 20:  # all are made: nothing will be read again
            file.write_bytes(changed)

    with pytest.raises(
        ModelError, match=r"tuned-1/model-00002-of-00002\.safetensors: was changed while it was read"
    ):
        alnico.merge(alnico.make_recipe(tuned, "linear"), tmp_path / "out", watch=replace)
    assert not (tmp_path / "out").exists()


SECRETS = (
    "s3://key:topsecret@bucket/model",
    "https://user:topsecret@host/model",
    "https://host/model?X-Amz-Signature=topsecret",
)


@pytest.mark.parametrize("url", SECRETS)
@pytest.mark.parametrize("form", ["{}", "org/base+{}", "{}+0.5*org/adapter"])
def test_credentials_in_a_recipe_are_refused_and_not_shown(
    url: str, form: str, run: Run, tmp_path: Path
) -> None:
    text = f"merge_method: linear\nmodels:\n  - model: {json.dumps(form.format(url))}\n"
    (tmp_path / "recipe.yml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        alnico.plan(tmp_path / "recipe.yml")
    assert "recipe.yml:3: models[0].model: the URL" in str(caught.value)
    assert "topsecret" not in str(caught.value)
    code, out, err = run("merge", form.format(url), form.format(url), str(tmp_path / "out"))
    assert code == RecipeError.exit_code
    assert "topsecret" not in out + err
    with pytest.raises(ModelError) as other:
        alnico.open_model(form.format(url))
    assert "topsecret" not in str(other.value)


def test_offline_refuses_a_url(elsewhere: Elsewhere, models: tuple[str, list[str]]) -> None:
    with pytest.raises(HubError, match="is at a URL, and alnico is offline"):
        alnico.open_model(models[0], offline=True)
    assert not elsewhere.reads


def test_a_page_of_the_hub_is_answered_with_the_id() -> None:
    with pytest.raises(ModelError, match="Write the id in place of the address: org/model"):
        alnico.open_model("https://huggingface.co/org/model")


@pytest.mark.parametrize(
    ("text", "url"), [("s3:/bucket/model", "s3://bucket/model"), ("https:host/m", "https://host/m")]
)
def test_a_url_that_lacks_slashes_is_answered_with_the_url(
    text: str, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=f"Write {url}"):
        alnico.open_model(text)
    with pytest.raises(OutputError, match=f"Write {url}, or ./{text} "):
        alnico.merge({"merge_method": "linear", "models": ["nothing/here", "nor/here"]}, text)
    with pytest.raises(OutputError, match="Write s3://bucket/out"):
        alnico.merge({"merge_method": "linear", "models": ["nothing/here"]}, Path("s3://bucket/out"))
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_at_a_url_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"recipe.yml: is a URL; expected a recipe on this machine"):
        alnico.plan(f"{ADDRESS}/recipe.yml")


@pytest.mark.parametrize("option", ["download_cache", "factor_cache", "work_dir"])
@pytest.mark.parametrize("folder", ["s3://key:topsecret@bucket/folder", Path("s3://bucket/folder")])
def test_folders_of_this_machine_are_no_urls(
    option: str, folder: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flag = "--" + option.replace("_", "-")
    with pytest.raises(OutputError, match=f"^{flag}: is a URL; expected a folder of this machine"):
        alnico.merge(
            {"merge_method": "linear", "models": ["nothing/here"]}, "s3://bucket/out", **{option: folder}
        )
    assert list(tmp_path.iterdir()) == []


def test_pickles_at_a_url_are_refused(elsewhere: Elsewhere) -> None:
    (elsewhere.root / "old").mkdir()
    (elsewhere.root / "old" / "pytorch_model.bin").write_bytes(b"PK")
    for url in (f"{ADDRESS}/old", f"{ADDRESS}/old/pytorch_model.bin"):
        with pytest.raises(ModelError, match=r"its weights are a pickle \(pytorch_model.bin\)"):
            alnico.open_model(url)
    assert not elsewhere.reads


def test_models_at_urls_can_be_named_in_place_of_a_recipe(
    models: tuple[str, list[str]], run: Run, tmp_path: Path
) -> None:
    base, tuned = models
    out = str(tmp_path / "out")
    code, _, err = run("merge", *tuned, out, "--base", base, "--method", "ties")
    assert (code, err.count("Traceback")) == (0, 0), err
    code, text, _ = run("plan", *tuned, "--base", base, "--method", "ties")
    assert code == 0
    assert base in text


def test_every_command_that_reads_models_reads_them_at_urls(
    elsewhere: Elsewhere, models: tuple[str, list[str]], run: Run, tmp_path: Path
) -> None:
    base, tuned = models
    for words in (
        ("inspect", base),
        ("diff", base, tuned[0]),
        ("analyze", tuned[0], "--base", base, "--out", str(tmp_path / "analysis")),
        ("lora", "extract", base, tuned[0], str(tmp_path / "adapter"), "--rank", "4"),
    ):
        code, _, err = run(*words)
        assert code == 0, (words, err)
    shutil.copytree(tmp_path / "adapter", elsewhere.root / "adapter")
    url = f"{ADDRESS}/adapter"
    assert alnico.inspect(url).data()["updates"] == alnico.inspect(tmp_path / "adapter").data()["updates"]
    for words in (
        ("merge", f"{base}+0.5*{url}", tuned[0], str(tmp_path / "mixed"), "--method", "linear"),
        ("lora", "fold", base, url, str(tmp_path / "folded")),
        ("lora", "combine", url, url, str(tmp_path / "combined"), "--saved", "average"),
    ):
        code, _, err = run(*words)
        assert code == 0, (words, err)
    here = alnico.make_recipe([local(elsewhere, f"{base}+0.5*{url}"), local(elsewhere, tuned[0])], "linear")
    alnico.merge(here, tmp_path / "here")
    assert contents(tmp_path / "mixed") == contents(tmp_path / "here")


@pytest.mark.parametrize("place", ["lora", "lora/style.safetensors", "named"])
def test_a_lora_file_without_a_config_is_an_adapter_at_a_url(
    elsewhere: Elsewhere, models: tuple[str, list[str]], tmp_path: Path, place: str
) -> None:
    module, random = "lora_unet_model_layers_0_mlp_up_proj", np.random.default_rng(1)
    tensors = {
        f"{module}.lora_down.weight": ("F32", random.standard_normal((2, 16))),
        f"{module}.lora_up.weight": ("F32", random.standard_normal((48, 2))),
        f"{module}.alpha": ("F32", np.array(1.0)),
    }
    save_file(elsewhere.root / "lora" / "style.safetensors", tensors)
    save_file(elsewhere.root / "named" / "pytorch_lora_weights.safetensors", tensors)
    url, here = f"{ADDRESS}/{place}", elsewhere.root / place
    assert alnico.inspect(url).data()["updates"] == alnico.inspect(here).data()["updates"]
    base = local(elsewhere, models[0])
    alnico.lora.fold(base, url, tmp_path / "there")
    alnico.lora.fold(base, here, tmp_path / "here")
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    alnico.lora.combine([url, here], tmp_path / "a.safetensors", method="cat")
    alnico.merge({"merge_method": "passthrough", "models": [f"{models[0]}+0.5*{url}"]}, tmp_path / "mixed")


class Going:
    """A server that goes away when six tensors are made; the last shard of the last model is not read before."""

    def __init__(self) -> None:
        self.is_merging = False
        self.done = 0
        self.enough = threading.Event()

    def watch(self, event: Any) -> None:
        self.is_merging = self.is_merging or isinstance(event, Started)
        self.done += isinstance(event, TensorDone)
        if self.done > 5:
            self.enough.set()

    def before_read(self, name: str, *_: int) -> None:
        if self.is_merging and name == "tuned-2/model-00002-of-00002.safetensors":
            assert self.enough.wait(20)
            raise HubError(f"{name}: the server went away. Try again.")


def interrupted(elsewhere: Elsewhere, recipe: Any, out: Path) -> None:
    going = Going()
    elsewhere.before_read = going.before_read
    with pytest.raises(HubError, match="the server went away"):
        alnico.merge(recipe, out, watch=going.watch)
    elsewhere.before_read = None
    assert not out.exists()


@pytest.mark.parametrize("method", ["ties", "linear"])
def test_an_interrupted_merge_is_taken_up(
    elsewhere: Elsewhere, models: tuple[str, list[str]], tmp_path: Path, method: str
) -> None:
    base, tuned = models
    recipe = alnico.make_recipe(tuned, method, base=base)
    interrupted(elsewhere, recipe, tmp_path / "out")
    elsewhere.reads.clear()
    result = alnico.merge(recipe, tmp_path / "out", threads=1)
    assert result.resumed > 5
    assert sum(elsewhere.weight_bytes().values()) < result.plan.bytes_to_read
    here = alnico.make_recipe([local(elsewhere, t) for t in tuned], method, base=local(elsewhere, base))
    alnico.merge(here, tmp_path / "here")
    assert contents(tmp_path / "out") == contents(tmp_path / "here")


def test_a_merge_of_files_that_changed_after_an_interrupt_is_not_taken_up(
    elsewhere: Elsewhere, models: tuple[str, list[str]], tmp_path: Path
) -> None:
    base, tuned = models
    recipe = alnico.make_recipe(tuned, "ties", base=base)
    interrupted(elsewhere, recipe, tmp_path / "out")
    file = elsewhere.root / "tuned-0" / "model-00001-of-00002.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(alnico.errors.OutputError, match="--restart"):
        alnico.merge(recipe, tmp_path / "out")


def test_without_tags_an_interrupted_merge_begins_again(
    elsewhere: Elsewhere, models: tuple[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = counting_folder._Folder.state

    def untagged(self: counting_folder._Folder, name: str) -> FileVersion | None:
        found = real(self, name)
        return None if found is None else FileVersion(found.size, "")

    monkeypatch.setattr(counting_folder._Folder, "state", untagged)
    base, tuned = models
    recipe = alnico.make_recipe(tuned, "ties", base=base)
    interrupted(elsewhere, recipe, tmp_path / "out")
    file = elsewhere.root / "tuned-0" / "model-00001-of-00002.safetensors"
    data = bytearray(file.read_bytes())
    data[-1001:] = bytes(1001)  # the same size, and the same header
    file.write_bytes(data)
    assert alnico.merge(recipe, tmp_path / "out").resumed == 0
    alnico.merge(recipe, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_vocabularies_of_models_at_urls_are_joined(elsewhere: Elsewhere, tmp_path: Path) -> None:
    save_family(elsewhere.root)
    names = sorted(p.name for p in elsewhere.root.iterdir() if (p / "tokenizer.json").exists())[:2]
    for place, out in ((ADDRESS, "there"), (str(elsewhere.root), "here")):
        recipe = {
            "merge_method": "linear",
            "models": [{"model": f"{place}/{name}", "parameters": {"weight": 0.5}} for name in names],
            "tokenizer": {"source": "union"},
            "unrelated": "allow",
        }
        plan = alnico.plan(recipe)
        elsewhere.reads.clear()
        alnico.merge(recipe, tmp_path / out)
        if place == ADDRESS:
            assert sum(elsewhere.weight_bytes().values()) == plan.bytes_to_request
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["linear", "slerp", "tsv"])
def test_the_models_of_the_demo_give_the_local_bytes(
    elsewhere: Elsewhere, tmp_path: Path, method: str
) -> None:
    for name, place in DEMO_MODELS.items():
        shutil.copytree(installed(*place), elsewhere.root / name)
    names = list(DEMO_MODELS)
    for place, out in ((ADDRESS, "there"), (str(elsewhere.root), "here")):
        base = f"{place}/{names[0]}" if method != "linear" else None
        models = [f"{place}/{name}" for name in names]
        keys = {"t": 0.3} if method == "slerp" else {}
        recipe = alnico.make_recipe(models[1:] if method == "tsv" else models, method, base=base, **keys)
        plan = alnico.plan(recipe)
        elsewhere.reads.clear()
        alnico.merge(recipe, tmp_path / out)
        if place == ADDRESS:
            assert sum(elsewhere.weight_bytes().values()) == plan.bytes_to_request
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
