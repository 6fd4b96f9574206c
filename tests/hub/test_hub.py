"""Models from the hub: found once, refused before their weights come, fetched into the common cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import alnico
from alnico.errors import AlnicoError, HubError, MismatchError, ModelError
from alnico.events import Event, Fetched, Fetching
from compiling import without_compiling
from hub.stub import Hub, serving
from made import family, model_bytes, save_file, save_model
from made_cluster import ThreadCluster
from made_pipelines import pipeline

Run = Callable[..., tuple[int, str, str]]
TIES = "merge_method: ties\nbase_model: {}\nmodels: [{}, {}]\nparameters: {{density: 0.5}}\n"
NAMES = ("org/base", "org/one", "org/two")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    with serving(tmp_path / "home", monkeypatch) as running:
        yield running


def models(hub: Hub, shards: int = 2) -> list[Path]:
    """A base and two fine-tunes, on the hub as NAMES and in local folders."""
    base, tuned = family(Path("local"), 2, shards=shards)
    (base / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
    (base / "LICENSE").write_text("free")
    (base / "pytorch_model.bin").write_bytes(b"a pickle")
    for name, folder in zip(NAMES, (base, *tuned), strict=True):
        hub.add(name, folder)
    return [base, *tuned]


def weights(out: str) -> dict[str, bytes]:
    return {name: data for name, data in model_bytes(Path(out)).items() if name != "alnico.lock.json"}


def told(call: Callable[[], object], kind: type[AlnicoError] = HubError) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    return str(caught.value)


# ---- what comes, and when ---------------------------------------------------------------------------------------------


def test_a_merge_from_the_hub_has_the_bytes_of_a_merge_of_local_copies(hub: Hub, run: Run) -> None:
    local = models(hub)
    Path("hub.yml").write_text(TIES.format("org/base", "org/one@main", "org/two"))
    Path("local.yml").write_text(TIES.format(*local))
    code, _, stderr = run("merge", "hub.yml", "out")
    note = "note: org/base: other weight files are ignored, neither merged nor copied to the output: pytorch_model.bin.\n"
    assert (code, stderr) == (0, "fetching 7 files of org/one@main, org/two, org/base, 46.5 kB\n" + note)
    assert run("merge", "local.yml", "expected")[0] == 0
    assert weights("out") == weights("expected")
    assert {p.name for p in Path("out").iterdir()} == {p.name for p in Path("expected").iterdir()}
    assert (Path("out/LICENSE").read_text(), Path("out/tokenizer.json").exists()) == ("free", True)


def test_nodes_fetch_what_their_tensors_need(hub: Hub, thread_cluster: ThreadCluster) -> None:
    base, *tuned = models(hub)
    there = alnico.analyze(NAMES[1:], base=NAMES[0], ray=True).data()
    here = alnico.analyze(tuned, base=base).data()
    assert there["tensors"] == here["tensors"]
    alnico.lora.extract("org/one", "org/base", "there", rank=4, ray=True)
    alnico.lora.extract(tuned[0], base, "here", rank=4)
    name = "adapter_model.safetensors"
    assert Path("there", name).read_bytes() == Path("here", name).read_bytes()
    asked = [r.path for r in hub.requests if r.host == "store" and not r.range]
    assert len(asked) == len(set(asked))
    assert sum(node.done for node in thread_cluster.nodes) > 8


def test_no_pickle_and_no_weight_that_is_not_read_is_fetched(hub: Hub) -> None:
    models(hub)
    alnico.merge(
        {"merge_method": "linear", "base_model": "org/base", "models": ["org/one", "org/two"]}, "out"
    )
    asked = {r.path for r in hub.requests if r.host == "store" and not r.range}
    assert {path.split("/")[1] for path in asked} == {
        hub.repos[name].refs["main"] for name in ("org/one", "org/two")
    }
    assert not any(r.path.endswith(".bin") for r in hub.requests)
    assert Path("out/LICENSE").exists()


def test_an_adapter_of_the_hub_is_applied_to_a_base_of_the_hub_or_of_this_disk(hub: Hub) -> None:
    base, tuned = models(hub)[:2]
    name, random = "base_model.model.model.layers.0.mlp.up_proj", np.random.default_rng(0)
    factors = {
        f"{name}.lora_A.weight": random.standard_normal((2, 16)),
        f"{name}.lora_B.weight": random.standard_normal((48, 2)),
    }
    save_file(Path("lora/adapter_model.safetensors"), {n: ("F32", v) for n, v in factors.items()})
    Path("lora/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    hub.add("org/lora", Path("lora"))
    commit = {n: hub.repos[n].refs["main"] for n in ("org/base", "org/lora")}
    assert alnico.inspect("org/lora").data()["updates"] == alnico.inspect("lora").data()["updates"]
    assert (
        alnico.open_model("org/base+org/lora").tensors["model.layers.0.mlp.up_proj.weight"].nominal == "BF16"
    )
    assert hub.weight_bytes() == 0
    for i, (reference, there) in enumerate({
        f"{base}+lora": f"{base}+lora",
        f"{base}+org/lora": f"{base}+org/lora@{commit['org/lora']}",
        "org/base@main+org/lora": f"org/base@{commit['org/base']}+org/lora@{commit['org/lora']}",
    }.items()):  # fmt: skip
        alnico.merge({"merge_method": "linear", "models": [reference, str(tuned)]}, f"out{i}")
        assert there in Path(f"out{i}/mergekit_config.yml").read_text()
        assert weights(f"out{i}") == weights("out0")
    card, lock = Path("out2/README.md").read_text(), json.loads(Path("out2/alnico.lock.json").read_text())
    assert "base_model:\n- org/base\n- org/lora\n" in card
    assert lock["inputs"][0]["repositories"] == [
        {"repository": n, "commit": commit[n]} for n in ("org/base", "org/lora")
    ]
    alnico.lora.combine(["org/lora", "lora"], "combined", method="cat")


def lora_file(folder: Path, name: str = "style.safetensors") -> Path:
    """A LoRA file of kohya for a matrix of the models, which has no config."""
    module, random = "lora_unet_model_layers_0_mlp_up_proj", np.random.default_rng(1)
    tensors = {
        f"{module}.lora_down.weight": ("F32", random.standard_normal((2, 16))),
        f"{module}.lora_up.weight": ("F32", random.standard_normal((48, 2))),
        f"{module}.alpha": ("F32", np.array(1.0)),
    }
    return save_file(folder / name, tensors)


@pytest.mark.parametrize("name", ["style.safetensors", "pytorch_lora_weights.safetensors"])
def test_a_lora_file_without_a_config_is_an_adapter_of_the_hub(hub: Hub, run: Run, name: str) -> None:
    base = models(hub)[0]
    file = lora_file(Path("lora"), name)
    hub.add("org/lora", Path("lora"))
    code, stdout, stderr = run("inspect", "org/lora")
    assert (code, stderr) == (0, "")
    assert "dialect       kohya" in stdout.splitlines()
    alnico.lora.fold("org/base", "org/lora", "there")
    alnico.lora.fold(base, file, "here")
    assert weights("there") == weights("here") != weights(str(base))
    alnico.lora.combine(["org/lora", file], "there.safetensors", method="cat")
    alnico.lora.combine([file, file], "here.safetensors", method="cat")
    assert alnico.diff("there.safetensors", "here.safetensors").is_equal
    lora_file(Path("pair"), "a.safetensors")
    hub.add("org/pair", lora_file(Path("pair"), "b.safetensors").parent)
    assert told(lambda: alnico.lora.fold(base, "org/pair", "out"), ModelError) == (
        "org/pair: has no adapter_config.json and 2 files of weights (a.safetensors, b.safetensors); expected one LoRA file, or one named "
        "pytorch_lora_weights.safetensors. Give the path of the file to use; of a repository on the hub, download it first."
    )


def test_planning_and_inspecting_fetch_no_weights(hub: Hub, run: Run) -> None:
    models(hub)
    Path("r.yml").write_text(TIES.format(*NAMES))
    code, stdout, _ = run("plan", "r.yml")
    assert code == 0
    assert f"model     org/one (commit {hub.repos['org/one'].refs['main'][:12]})" in stdout
    assert "download  7 files, 46.5 kB, into the hub's cache before the merge" in stdout
    code, stdout, _ = run("inspect", "org/base")
    assert code == 0
    assert "    2 x  BF16  (48, 16)             model.layers.*.mlp.gate_proj.weight" in stdout
    assert json.loads(run("inspect", "org/base", "--json")[1])["commit"] == hub.repos["org/base"].refs["main"]
    assert hub.weight_bytes() == 0
    assert any(r.range for r in hub.requests)


@pytest.mark.parametrize("takes_ranges", [True, False])
def test_models_that_do_not_fit_are_refused_before_their_weights_come(hub: Hub, takes_ranges: bool) -> None:
    hub.takes_ranges = takes_ranges
    wide = np.zeros((4096, 1024), np.float32)
    hub.add("org/a", save_model(Path("a"), {"w": ("F32", wide)}, {}))
    hub.add("org/b", save_model(Path("b"), {"w": ("F32", wide[:4])}, {}))
    recipe = {"merge_method": "linear", "models": ["org/a", "org/b"]}
    assert told(lambda: alnico.merge(recipe, "out"), MismatchError).startswith("w: ")
    assert hub.weight_bytes() == 0 if takes_ranges else hub.weight_bytes() < wide.nbytes


def test_an_output_that_exists_is_refused_before_weights_come(hub: Hub, run: Run) -> None:
    models(hub)
    Path("r.yml").write_text(TIES.format(*NAMES))
    Path("out").mkdir()
    Path("out/mine").write_text("mine")
    assert run("merge", "r.yml", "out")[0] == 8
    assert hub.weight_bytes() == 0


def test_a_full_disk_is_told_before_weights_come(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from collections import namedtuple

    models(hub)
    usage = namedtuple("usage", "free")
    # Enough for the output and its margin, not for the downloads too.
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage((16 << 20) + 52_000))
    with pytest.raises(alnico.errors.ResourceError) as caught:
        alnico.merge({"merge_method": "linear", "models": list(NAMES)}, "out")
    assert str(caught.value).endswith(
        "the downloads and the output need 16.9 MB, 16.8 MB are free. Make room, or set HF_HOME to another disk."
    )
    assert hub.weight_bytes() == 0


def test_the_second_run_takes_everything_from_the_cache(hub: Hub) -> None:
    models(hub)
    recipe = {"merge_method": "linear", "models": list(NAMES)}
    alnico.merge(recipe, "one")
    before = len(hub.requests)
    seen: list[Event] = []
    alnico.merge(recipe, "two", watch=seen.append)
    assert not any(isinstance(event, Fetching) for event in seen)
    later = [r.path for r in hub.requests[before:] if r.path.startswith(("/org", "/api/models"))]
    assert later == [f"/api/models/{name}/revision/main?blobs=true" for name in NAMES]
    assert model_bytes(Path("one")) == model_bytes(Path("two"))


def test_what_other_tools_fetched_is_used_and_they_find_what_alnico_fetched(hub: Hub) -> None:
    from huggingface_hub import hf_hub_download, snapshot_download

    models(hub)
    theirs = hf_hub_download("org/base", "model-00001-of-00002.safetensors")
    served = hub.weight_bytes()
    assert served > 0
    with alnico.open_model("org/base") as model:
        assert model.shards[0].path == Path(theirs)
        model.read("model.embed_tokens.weight")
        assert hub.weight_bytes() == served
        model.fetch(["model-00002-of-00002.safetensors"])
    assert (
        Path(snapshot_download("org/base", local_files_only=True, allow_patterns=["*.safetensors"]))
        == Path(theirs).parent
    )


def test_reading_a_tensor_of_an_opened_model_fetches_its_file(hub: Hub) -> None:
    hub.add("org/a", save_model(Path("a"), {"w": ("F32", np.arange(4, dtype=np.float32))}, {}))
    with alnico.open_model("org/a") as model:
        np.testing.assert_array_equal(model.read("w"), [0, 1, 2, 3])


def test_a_local_merge_never_loads_huggingface_hub(hub: Hub) -> None:
    base, *tuned = models(hub)
    code = (
        "import alnico, sys; "
        f"alnico.merge({{'merge_method': 'linear', 'models': {[str(t) for t in (base, *tuned)]!r}}}, 'out'); "
        "print('huggingface_hub' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "False\n"
    )


# ---- which model is meant ---------------------------------------------------------------------------------------------


def test_a_path_that_is_there_wins(hub: Hub) -> None:
    hub.add("org/a", save_model(Path("a"), {"w": ("F32", np.zeros(2, np.float32))}, {}))
    save_model(Path("org/a"), {"w": ("F32", np.zeros(3, np.float32))}, {})
    with alnico.open_model("org/a") as model:
        assert (model.tensors["w"].shape, model.origin) == ((3,), None)
    assert hub.requests == []


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: Hub) -> None:
    def commit(size: int, branch: str) -> str:
        return hub.add(
            "org/a", save_model(Path(str(size)), {"w": ("F32", np.zeros(size, np.float32))}, {}), branch
        )

    commits = {"main": commit(1, "main"), "v2": commit(2, "v2"), "refs/pr/3": commit(3, "refs/pr/3")}
    for revision, size in (("main", 1), ("v2", 2), ("refs/pr/3", 3), (commits["v2"], 2)):
        for offline in (False, True):
            with alnico.open_model(f"org/a@{revision}", offline=offline) as model:
                assert model.tensors["w"].shape == (size,)
                model.read("w")


def test_a_merge_is_repeated_from_the_commits_it_noted(hub: Hub, run: Run) -> None:
    models(hub)
    Path("r.yml").write_text(TIES.format(*NAMES) + "# org/one\n")
    assert run("merge", "r.yml", "out")[0] == 0
    commits = {name: hub.repos[name].refs["main"] for name in NAMES}
    lock = json.loads(Path("out/alnico.lock.json").read_text())
    assert {i["repository"]: i["commit"] for i in lock["inputs"]} == commits
    pinned = Path("out/mergekit_config.yml").read_text()
    assert pinned == TIES.format(*(f"{name}@{commits[name]}" for name in NAMES)) + "# org/one\n"
    assert all(f"{name}@{commit}" in Path("out/README.md").read_text() for name, commit in commits.items())
    hub.add("org/one", family(Path("newer"), 1, seed=7)[1][0])
    assert run("merge", "out/mergekit_config.yml", "again")[0] == 0
    assert weights("again") == weights("out")
    assert run("merge", "r.yml", "newer-out")[0] == 0
    assert weights("newer-out") != weights("out")


def test_an_unfinished_merge_is_not_taken_up_when_the_branch_has_moved(
    hub: Hub, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alnico.output.staging import PartDirectory

    models(hub, shards=1)
    Path("r.yml").write_text(TIES.format(*NAMES))
    with monkeypatch.context() as patch:
        patch.setattr(PartDirectory, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run("merge", "r.yml", "out")[0] == 130
    hub.add("org/one", family(Path("newer"), 1, seed=7)[1][0])
    code, _, stderr = run("merge", "r.yml", "out")
    assert code == 8
    assert (
        "changed since it began: an input file (org/one: model.safetensors; its size, time, commit or header)"
        in stderr
    )


def test_a_bare_name_is_taken_for_a_path_and_the_message_says_how_to_write_an_id(hub: Hub) -> None:
    assert told(lambda: alnico.open_model("gpt2"), ModelError) == (
        "model 'gpt2': no such directory or file; expected a directory with safetensors files, one such file, or a "
        "model on the hub as owner/name or owner/name@revision. Check the path, or write the hub id with its owner."
    )
    assert hub.requests == []


@pytest.mark.parametrize(
    ("reference", "why"),
    [
        ("org/..a", None),
        ("org/a..b", "Cannot have -- or .. in repo_id"),
        ("org/a--b", "Cannot have -- or .. in repo_id"),
        ("org/a.git", "Repo_id cannot end by '.git'"),
        ("org/a b", "Repo id must use alphanumeric chars"),
        ("../org", None),
        ("org/a@../../../x", "'../../../x' is not a revision"),
        ("org/a@/etc/passwd", "'/etc/passwd' is not a revision"),
        ("org/a@", "'' is not a revision"),
        ("org/a@-x", "'-x' is not a revision"),
        ("org/a@.", "'.' is not a revision"),
        ("org/a@x/./y", "'x/./y' is not a revision"),
    ],
)
def test_a_name_cannot_lead_out_of_the_cache(hub: Hub, reference: str, why: str | None) -> None:
    message = told(lambda: alnico.open_model(reference), ModelError)
    assert message.startswith(f"model {reference!r}: ")
    assert why is None or why in message
    assert hub.requests == []


@pytest.mark.parametrize("file", ["../../evil.json", "/etc/evil.json", "a/../../evil.json"])
def test_a_file_name_cannot_lead_out_of_the_cache(hub: Hub, file: str) -> None:
    hub.add("org/a", {file: b"{}", "model.safetensors": b""})
    assert told(lambda: alnico.open_model("org/a")) == (
        f"org/a: the hub's answer has file {file!r} without a size or outside the model. Check HF_ENDPOINT; do not use this model."
    )


# ---- offline ----------------------------------------------------------------------------------------------------------


def test_offline_merges_what_the_cache_holds_and_asks_nobody(
    hub: Hub, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    models(hub)
    Path("r.yml").write_text(TIES.format(*NAMES))
    assert run("merge", "r.yml", "out")[0] == 0
    hub.requests.clear()
    assert run("merge", "r.yml", "out2", "--offline")[0] == 0
    assert run("plan", "r.yml", "--offline")[0] == 0
    assert run("inspect", "org/one", "--offline")[0] == 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert run("merge", "r.yml", "out3")[0] == 0
    assert hub.requests == []
    assert model_bytes(Path("out2")) == model_bytes(Path("out3")) == model_bytes(Path("out"))


@pytest.mark.parametrize("by_environment", [False, True])
def test_offline_says_what_is_missing(
    hub: Hub, by_environment: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    models(hub)
    cache = Path(constants.HF_HUB_CACHE) / "models--org--one"
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", by_environment)
        assert told(lambda: alnico.open_model("org/one", offline=not by_environment)) == (
            f"org/one: revision 'main' is not in the cache ({cache}), and alnico is offline; expected a model that was "
            "downloaded before. Run once online (without --offline and HF_HUB_OFFLINE), or give a path."
        )
    assert hub.requests == []
    alnico.open_model("org/one").close()
    commit = hub.repos["org/one"].refs["main"]
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", by_environment)
        index = cache / "snapshots" / commit / "model.safetensors.index.json"
        assert told(lambda: alnico.open_model("org/one", offline=not by_environment)) == (
            f"org/one: the cache ({index.parent}) does not hold the whole model, and alnico is offline: {index}: lists "
            "model-00001-of-00002.safetensors, which does not exist. Complete the download. "
            "Run once online (without --offline and HF_HUB_OFFLINE)."
        )


# ---- what goes wrong --------------------------------------------------------------------------------------------------


def test_every_refusal_of_the_hub_has_a_message_and_the_exit_code(hub: Hub, run: Run) -> None:
    base, *_ = models(hub)
    hub.add("org/gated", base)
    hub.repos["org/gated"].gated = True
    login = "log in with `hf auth login`, or set HF_TOKEN"
    for reference, message in (
        (
            "org/none",
            f"org/none: no such path here, and {hub.url} has no such model, or it is private. Check the name; for a private "
            f"model {login}.",
        ),
        (
            "org/one@v9",
            f"org/one@v9: {hub.url} has no revision 'v9' of it; expected a branch, a tag or a commit. See {hub.url}/org/one/tree/main.",
        ),
        (
            "org/gated",
            f"org/gated: is gated, and you have no access to it; expected a model you may read. Accept its licence at "
            f"{hub.url}/org/gated and {login}.",
        ),
    ):
        assert run("inspect", reference) == (13, "", f"alnico: {message}\n")


def test_a_private_model_is_found_with_a_token_only(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    models(hub)
    hub.repos["org/one"].private = True
    alnico.open_model("org/one").close()
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "or it is private" in told(lambda: alnico.open_model("org/one"))


def test_the_token_goes_to_the_hub_alone_and_is_never_shown(hub: Hub, run: Run) -> None:
    models(hub)
    Path("r.yml").write_text(TIES.format(*NAMES))
    shown = run("merge", "r.yml", "out", "-v")
    assert shown[0] == 0
    assert {r.token for r in hub.requests if r.host == "store"} == {None}
    assert {r.token for r in hub.requests if r.host == "hub" and r.range} == {"Bearer hf_secret"}
    assert "hf_secret" not in str(shown)


def test_a_hub_that_is_not_reached_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with serving(tmp_path, monkeypatch) as hub:
        hub.add("org/a", {})
    message = told(lambda: alnico.open_model("org/a"))
    assert message.startswith(
        f"org/a: no such path here, and {hub.url} could not be reached or cut off the connection (ConnectError: "
    )
    assert message.endswith("Check the connection and try again; --offline uses only the cache.")


def test_a_repository_of_pickles_is_refused(hub: Hub) -> None:
    hub.add("org/old", {"pytorch_model.bin": b"x", "config.json": b"{}"})
    assert told(lambda: alnico.open_model("org/old"), ModelError) == (
        "org/old: its weights are a pickle (pytorch_model.bin), expected .safetensors; alnico does not download pickles. "
        "Download the model yourself, and give its path."
    )
    assert not any(r.path.endswith(".bin") for r in hub.requests)


def test_a_module_that_is_a_pickle_is_refused_before_weights_come(hub: Hub) -> None:
    files = {
        "modules.json": json.dumps([{"path": "2_Dense"}]).encode(),
        "2_Dense/pytorch_model.bin": b"x",
        "2_Dense/config.json": b"{}",
    }
    (local,) = models(hub)[:1]
    hub.add("org/st", {p.name: p.read_bytes() for p in local.iterdir()} | files)
    assert told(
        lambda: alnico.merge({"merge_method": "linear", "models": ["org/st", "org/one"]}, "out"), ModelError
    ) == (
        "org/st: its weights are a pickle (2_Dense/pytorch_model.bin), expected .safetensors; alnico does not download pickles. "
        "Download the model yourself, and give its path."
    )
    assert not any(r.path.endswith(".bin") for r in hub.requests)


def test_the_weights_of_modules_come_from_the_hub_and_are_merged(hub: Hub) -> None:
    folders = []
    for i, local in enumerate(models(hub)[1:]):
        dense = {"linear.weight": ("F32", np.full((2, 2), float(i), np.float32))}
        save_file(local / "2_Dense" / "model.safetensors", dense)
        (local / "2_Dense" / "pytorch_model.bin").write_bytes(b"a pickle")
        (local / "2_Dense" / "config.json").write_text("{}")
        (local / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "2_Dense"}]))
        inside = {p.relative_to(local).as_posix(): p.read_bytes() for p in local.rglob("*") if p.is_file()}
        hub.add(f"org/st{i}", inside)
        folders.append(local)
    recipe = {"merge_method": "linear", "models": ["org/st0", "org/st1"], "unrelated": "allow"}
    plan = alnico.plan(recipe)
    assert (
        "org/st0: other weight files are ignored, neither merged nor copied to the output: 2_Dense/pytorch_model.bin."
        in plan.notes
    )
    assert not any(r.path.endswith("2_Dense/model.safetensors") and not r.range for r in hub.requests)
    alnico.merge(recipe, "out")
    alnico.merge({**recipe, "models": [str(f) for f in folders]}, "local-out")
    assert weights("out") == weights("local-out")
    found = Path("out/2_Dense/model.safetensors").read_bytes()
    assert found == Path("local-out/2_Dense/model.safetensors").read_bytes()
    with alnico.open_model("out") as out:
        assert out.read("2_Dense/linear.weight").tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert not any(r.path.endswith(".bin") for r in hub.requests)


def test_a_pipeline_comes_from_the_hub_without_the_checkpoint_beside_its_parts(hub: Hub) -> None:
    for i in range(2):
        local = Path(pipeline(Path(f"p{i}"), i))
        save_file(local / "v1-5.safetensors", {"w": ("F32", np.zeros((2, 2), np.float32))})
        hub.add(
            f"org/p{i}",
            {p.relative_to(local).as_posix(): p.read_bytes() for p in local.rglob("*") if p.is_file()},
        )
    recipe = {"merge_method": "linear", "models": ["org/p0", "org/p1"], "unrelated": "allow"}
    alnico.merge(recipe, "out")
    alnico.merge({**recipe, "models": ["p0", "p1"]}, "local-out")
    for path in Path("local-out").rglob("*"):
        if path.is_file() and path.name not in ("README.md", "alnico.lock.json", "mergekit_config.yml"):
            assert path.read_bytes() == (Path("out") / path.relative_to("local-out")).read_bytes()
    assert not any(r.path.endswith("v1-5.safetensors") for r in hub.requests)


@pytest.mark.parametrize("length", [1 << 62, 1 << 30, 100])
def test_a_header_that_claims_too_much_is_refused_unread(hub: Hub, length: int) -> None:
    if length > 100:
        hub.size_lies["model.safetensors"] = length * 2
    hub.add("org/bad", {"model.safetensors": length.to_bytes(8, "little") + b"{}", "config.json": b"{}"})
    assert told(lambda: alnico.open_model("org/bad"), ModelError).startswith(
        f"org/bad: model.safetensors: the header claims {length} bytes"
    )
    assert sum(r.sent for r in hub.requests if r.host == "store") == 8


def test_a_file_without_bytes_is_refused(hub: Hub) -> None:
    hub.add("org/bad", {"model.safetensors": b"", "config.json": b"{}"})
    assert told(lambda: alnico.open_model("org/bad"), ModelError).startswith(
        "org/bad: model.safetensors: is empty (0 bytes); expected safetensors."
    )
    assert not any(r.range for r in hub.requests)


def test_a_hub_that_lies_about_a_size_is_found_out(hub: Hub) -> None:
    local = models(hub, shards=1)
    hub.size_lies["model.safetensors"] = (local[0] / "model.safetensors").stat().st_size + 2
    assert "the tensors end at byte" in told(lambda: alnico.open_model("org/base"), ModelError)


def test_weights_that_are_not_what_was_planned_with_are_refused(hub: Hub) -> None:
    models(hub, shards=1)
    planned = hub.files("org/base")["model.safetensors"]
    other = planned.replace(b"BF16", b"F16 ").replace(b'"F16 "', b'"F16" ')
    longer = (
        save_model(Path("x"), {"w": ("F32", np.zeros(9, np.float32))})
        .joinpath("model.safetensors")
        .read_bytes()
    )
    with alnico.open_model("org/base") as model:
        hub.files("org/base")["model.safetensors"] = longer
        message = told(lambda: model.read("model.norm.weight"))
        assert f"size '{len(longer)}' (X-Linked-Size); its list of files states {len(planned)}" in message
        hub.files("org/base")["model.safetensors"] = other
        message = told(lambda: model.read("model.norm.weight"))
    assert message.startswith("org/base: model.safetensors arrived with a different header (")


def test_an_index_that_leads_outside_is_refused(hub: Hub) -> None:
    index = json.dumps({"weight_map": {"w": "../../../x.safetensors"}}).encode()
    hub.add("org/bad", {"model.safetensors.index.json": index, "model.safetensors": b""})
    assert "outside the model's directory" in told(lambda: alnico.open_model("org/bad"), ModelError)


def test_quiet_says_nothing_about_downloads(hub: Hub, run: Run) -> None:
    models(hub)
    Path("r.yml").write_text(TIES.format(*NAMES))
    assert run("merge", "r.yml", "out", "--quiet") == (0, "", "")


def test_watching_counts_the_bytes_that_come(hub: Hub) -> None:
    models(hub)
    seen: list[Event] = []
    alnico.merge({"merge_method": "linear", "models": list(NAMES)}, "out", watch=seen.append)
    (begin,) = [e for e in seen if isinstance(e, Fetching)]
    assert begin.total_bytes == sum(e.bytes_done for e in seen if isinstance(e, Fetched)) > 40_000


@pytest.mark.before_each_merge
def test_the_program_as_people_run_it(hub: Hub) -> None:
    local = models(hub)
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": "house",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }

    def run(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "alnico", *words]
        return subprocess.run(
            command, env={**environment, **more}, capture_output=True, text=True, check=False
        )

    Path("r.yml").write_text("merge_method: linear\nmodels: [org/one, org/two]\n")
    Path("local.yml").write_text(f"merge_method: linear\nmodels: [{local[1]}, {local[2]}]\n")
    done = run("merge", "r.yml", "out")
    assert (done.returncode, without_compiling(done.stderr)) == (
        0,
        "fetching 4 files of org/one, org/two, 31.0 kB\n",
    )
    assert run("merge", "local.yml", "expected").returncode == 0
    assert weights("out") == weights("expected")
    assert Path("house/hub/models--org--one/refs/main").read_text() == hub.repos["org/one"].refs["main"]
    assert run("merge", "r.yml", "out2", HF_HUB_OFFLINE="1").returncode == 0
    assert run("inspect", "org/base", HF_HUB_OFFLINE="1").returncode == 13
    pushed = run("push", "out", "me/merged")
    assert (pushed.returncode, pushed.stdout) == (0, f"{hub.url}/me/merged\n")


# ---- paths that are misspelt -----------------------------------------------------------------------------------------


def test_a_misspelt_path_is_answered_before_anything_is_requested(hub: Hub) -> None:
    local = models(hub)
    wrong = str(local[0]).replace("base", "basee")
    expected = (
        f"model '{wrong}': no such directory or file; {local[0]} is there. Did you mean {local[0]}? "
        f"If you mean the model on the hub, write {wrong}@main."
    )
    assert told(lambda: alnico.open_model(wrong), ModelError) == expected
    assert told(lambda: alnico.open_model(wrong, offline=True), ModelError) == expected
    assert told(lambda: alnico.open_model(f"{local[0]}+{wrong}"), ModelError) == expected
    assert hub.requests == []


def test_a_model_of_the_hub_with_a_similar_name_here_is_opened_with_its_revision(hub: Hub) -> None:
    local = models(hub)
    hub.add("local/bass", local[0])
    assert "Did you mean local/base?" in told(lambda: alnico.open_model("local/bass"), ModelError)
    alnico.open_model("local/bass@main").close()
    alnico.open_model("local/bass").close()  # the cache has it now


def test_an_error_of_the_hub_names_a_similar_path_first(hub: Hub) -> None:
    models(hub)
    assert told(lambda: alnico.open_model("local/tuned-7")) == (
        f"local/tuned-7: no such path here. Did you mean local/tuned-1? {hub.url} has no such model, or it is private. "
        "Check the name; for a private model log in with `hf auth login`, or set HF_TOKEN."
    )
    assert "Did you mean" not in told(lambda: alnico.open_model("org/none"))
    Path("local/tuned-0").rename("local/tuned-8")
    hub.add("local/tuned-7", Path("local/tuned-1"))
    alnico.open_model("local/tuned-7").close()  # another number is another model


def test_a_model_of_another_format_on_the_hub_is_named(hub: Hub) -> None:
    hub.add("org/quantised", {"m.Q4_K_M.gguf": b"GGUF", "config.json": b"{}"})
    assert (
        "It has m.Q4_K_M.gguf, a GGUF file (llama.cpp's format). Give the path or the URL of a file whose name ends in .gguf."
        in (told(lambda: alnico.open_model("org/quantised"), ModelError))
    )
    for content, what in (
        (b"GGUF\x03\0\0\0" + b"\1" * 90, "is a GGUF file (llama.cpp's format)"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer, not the file itself"),
    ):
        hub.add(f"org/{content[:1].hex()}", {"model.safetensors": content, "config.json": b"{}"})
        assert what in told(lambda content=content: alnico.open_model(f"org/{content[:1].hex()}"), ModelError)
