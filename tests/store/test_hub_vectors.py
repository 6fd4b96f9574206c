"""Task vectors on the hub: pushed as one commit with a card, found by their base, pulled; adapters are taken in as they are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from alnico.checkpoint.task_vectors.manifest import read_manifest
from alnico.errors import HubError, ModelError
from alnico.store.pull import pull_vector
from alnico.store.push import push_vector
from alnico.store.search_hub import base_news, search_hub
from hub.stub import Hub, serving
from store.made_artifacts import contents, made_entry, make_artifact

# huggingface_hub itself hands files to httpx in a way that httpx discourages.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("ALNICO_STORE", str(tmp_path / "own"))
    with serving(tmp_path / "home", monkeypatch) as running:
        yield running


def adapter(folder: Path, base: str = "org/base") -> Path:
    """An adapter as PEFT writes it."""
    folder.mkdir(parents=True)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    random = np.random.default_rng(0)
    factors = {"A": random.standard_normal((2, 8)), "B": random.standard_normal((8, 2))}
    save_file(
        {name.format(k): v.astype(np.float32) for k, v in factors.items()},
        folder / "adapter_model.safetensors",
        {"format": "pt"},
    )
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": base,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text(
        f"---\nbase_model: {base}\nbase_model_relation: adapter\nlicense: mit\nlibrary_name: peft\ntags: [lora]\n---\nMine.\n"
    )
    return folder


def front_matter(hub: Hub, name: str) -> dict[str, object]:
    return dict(yaml.safe_load(hub.files(name)["README.md"].decode().split("---")[1]))


def test_a_push_to_the_hub_is_one_commit_with_a_card_that_is_found(hub: Hub) -> None:
    folder = make_artifact(
        Path("a"), tasks=["sql"], languages=["en"], licence="mit", description="Tables | joins"
    )
    assert push_vector(folder, made_entry(folder), "me/sql") == f"{hub.url}/me/sql"
    assert hub.repos["me/sql"].messages == ["Task vector sql, version 1"]
    assert {
        n: d for n, d in hub.files("me/sql").items() if n not in (".gitattributes", "README.md")
    } == contents(folder)
    assert front_matter(hub, "me/sql") == {
        "base_model": "org/base",
        "base_model_relation": "finetune",
        "tags": ["task-vector", "alnico", "sql"],
        "language": ["en"],
        "license": "mit",
    }
    (found,) = search_hub("org/base")
    assert found.reference == f"me/sql@{hub.repos['me/sql'].refs['main']}"
    assert (found.entry.name, found.entry.tasks, found.entry.licence) == ("sql", ("sql",), "mit")
    assert contents(pull_vector("me/sql", Path("b"))) == contents(folder)
    assert contents(pull_vector(f"hf:{found.reference}", Path("c"), offline=True)) == contents(folder)


def test_a_new_version_replaces_all_files_and_the_old_commit_is_still_had(hub: Hub) -> None:
    old = make_artifact(Path("a"))
    (old / "model.sig").write_text("{}")
    push_vector(old, made_entry(old), "me/sql")
    commit = hub.repos["me/sql"].refs["main"]
    hub.add("me/sql", {**hub.files("me/sql"), "taskvector.safetensors.index.json": b"{}"})
    new = make_artifact(Path("b"), seed=1)
    push_vector(new, made_entry(new, 2), "hf:me/sql", message="Better")
    assert hub.repos["me/sql"].messages[-1] == "Better"
    assert {*hub.files("me/sql")} == {".gitattributes", "README.md", *contents(new)}
    assert contents(pull_vector("me/sql", Path("c"))) == contents(new)
    assert contents(pull_vector(f"me/sql@{commit}", Path("d"))) == contents(old)


def test_a_private_push_is_private(hub: Hub) -> None:
    folder = make_artifact(Path("a"))
    push_vector(folder, made_entry(folder), "me/sql", private=True)
    assert hub.repos["me/sql"].private
    assert search_hub("org/base") == []


def test_adapters_of_a_base_are_found_and_taken_in_as_they_are(hub: Hub) -> None:
    made = adapter(Path("lora"))
    commit = hub.add("you/sql-lora", made)
    hub.add("you/other", adapter(Path("other"), "org/other"))
    hub.downloads = {"you/sql-lora": 1234}
    (found,) = search_hub("org/base")
    assert (found.reference, found.entry.kind, found.entry.licence) == (
        f"you/sql-lora@{commit}",
        "adapter",
        "mit",
    )
    assert found.note == "1,234 downloads, 0 likes"
    pulled = pull_vector(found.reference, Path("b"))
    manifest = read_manifest(pulled)
    assert (manifest.kind, manifest.name, manifest.base.id, manifest.licence) == (
        "adapter",
        "sql-lora",
        "org/base",
        "mit",
    )
    kept = {n: d for n, d in contents(made).items() if n != "README.md"}
    assert {n: d for n, d in contents(pulled).items() if n != "taskvector.json"} == kept
    again = pull_vector(found.reference, Path("c"), offline=True)
    assert contents(again) == contents(pulled)


def test_a_search_goes_through_all_pages_up_to_its_limit(hub: Hub) -> None:
    made = contents(adapter(Path("lora")))
    for i in range(250):
        hub.add(f"org{i % 7}/lora-{i:03}", made)
        hub.downloads[f"org{i % 7}/lora-{i:03}"] = 1000 - i
    names = [one.reference.partition("@")[0] for one in search_hub("org/base", limit=230)]
    assert names == [f"org{i % 7}/lora-{i:03}" for i in range(230)]
    assert len(search_hub("org/base", limit=10_000)) == 250
    assert len(search_hub("org/base", "lora-00", limit=10_000)) == 10
    assert search_hub("org/base", task="no such tag") == []


def test_a_pickled_adapter_and_a_model_are_refused(hub: Hub) -> None:
    hub.add("you/old", {"adapter_config.json": b"{}", "adapter_model.bin": b"pickle"})
    hub.add("you/model", {"config.json": b"{}", "model.safetensors": b"12345678{}"})
    with pytest.raises(ModelError, match=r"no adapter_model\.safetensors; expected .* pickles"):
        pull_vector("you/old", Path("b"))
    with pytest.raises(ModelError, match=r"neither taskvector\.json nor adapter_config\.json"):
        pull_vector("you/model", Path("b"))
    with pytest.raises(HubError, match="no such model"):
        pull_vector("you/nothing", Path("b"))
    assert not Path("b").exists()


def test_news_of_a_base_are_told(hub: Hub) -> None:
    first = hub.add("org/base", {"config.json": b"{}"})
    assert base_news("org/base", first) is None
    second = hub.add("org/base", {"config.json": b"{} "})
    assert str(base_news("org/base", first)).startswith(f"org/base is at revision {second[:12]} now")
    assert base_news(None, first) is None
    assert base_news("my-base", first) is None


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        (
            lambda m: m["files"]["taskvector.safetensors"].update(size=1),
            r"has 1 bytes; the repository has \d+",
        ),
        (lambda m: m["files"]["taskvector.safetensors"].update(size=1 << 50), "Nothing was downloaded"),
        (lambda m: m["files"]["taskvector.safetensors"].update(sha256="0" * 64), "its manifest says 0000"),
        (
            lambda m: m["files"].update({"../x": {"size": 1, "sha256": "0" * 64}}),
            "the name of a file in its folder",
        ),
        (
            lambda m: m["files"].update({"other": {"size": 1, "sha256": "0" * 64}}),
            "the repository has no such file",
        ),
        (lambda m: m.update(name=".."), "without '..'"),
    ],
)
def test_a_manifest_that_lies_is_one_clear_error(hub: Hub, lie: object, message: str) -> None:
    folder = make_artifact(Path("a"))
    manifest = json.loads((folder / "taskvector.json").read_text())
    lie(manifest)  # type: ignore[operator]
    (folder / "taskvector.json").write_text(json.dumps(manifest))
    hub.add("me/sql", folder)
    with pytest.raises((ModelError, HubError), match=message):
        pull_vector("me/sql", Path("b"))
    assert not Path("b").exists()
    assert not [p for p in Path().rglob("*") if "part" in p.name]


def test_a_signature_is_valid_after_a_push_and_a_pull(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    from alnico.checkpoint.signatures import check_signature, sign

    key = ec.generate_private_key(ec.SECP256R1())
    form = serialization.Encoding.PEM
    secret, public = tmp_path / "key.pem", tmp_path / "public.pem"
    secret.write_bytes(
        key.private_bytes(form, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    public.write_bytes(key.public_key().public_bytes(form, serialization.PublicFormat.SubjectPublicKeyInfo))
    plain, with_card = make_artifact(Path("a")), make_artifact(Path("b"), "carded", 1)
    (with_card / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    for folder, name in ((plain, "sql"), (with_card, "carded")):
        sign(folder, secret)
        push_vector(folder, made_entry(folder), f"me/{name}")
        push_vector(folder, made_entry(folder), "remote")
        assert check_signature(pull_vector(f"me/{name}", Path(f"hub-{name}")), [public]) == public
        assert contents(Path(f"hub-{name}")) == contents(folder)
        assert check_signature(pull_vector(name, Path(f"folder-{name}"), source="remote"), [public]) == public
