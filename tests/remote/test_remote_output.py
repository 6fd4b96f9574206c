"""Outputs at URLs: the bytes of a merge onto the disk, published at the end; what may be replaced, and what is refused."""

from __future__ import annotations

import json
import math
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import alnico
from alnico.checkpoint.remote.folder import FileVersion
from alnico.engine import cluster_merge
from alnico.errors import (
    AlnicoError,
    HubError,
    ModelError,
    OutputError,
    ResourceError,
    UncheckedError,
    VerificationError,
)
from alnico.events import Event, Fetched, Fetching, TensorDone
from alnico.output import disk_space, remote_target, shard_uploads
from alnico.output.remote_target import MARKER
from disk_folder import DiskFolder, DiskStore
from made import family
from made_cluster import ThreadCluster
from s3_server import SECRET, S3Server
from small_merges import everything, made_recipe, merged

Run = Callable[..., tuple[int, str, str]]

DISK_URL = "s3://bucket/models/out"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ALNICO_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "uploads"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return made_recipe(tmp_path)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DiskStore:
    """A store on the disk, to which parts may be small."""
    made = DiskStore(tmp_path / "store")
    monkeypatch.setattr(remote_target, "open_remote_folder", made.open)
    monkeypatch.setattr(shard_uploads, "PART_BYTES", 128)
    return made


def there(server: S3Server, folder: str) -> dict[str, bytes]:
    """Every object of a folder, as boto3 sees it."""
    return {name.removeprefix(f"{folder}/"): server.read(name) for name in server.names(f"{folder}/")}


def left_in(cache: Path) -> list[Path]:
    return list(cache.iterdir()) if cache.exists() else []


def test_an_output_at_a_url_is_the_one_on_the_disk(
    s3_server: S3Server, recipe: Path, tmp_path: Path, cache: Path
) -> None:
    merged(recipe, tmp_path / "out")
    result = merged(recipe, f"{s3_server.url}/models/out/")
    assert there(s3_server, "models/out") == everything(tmp_path / "out")
    assert result.path == f"{s3_server.url}/models/out"
    assert s3_server.uploads() == []
    assert left_in(cache) == []


def test_a_file_at_a_url_is_the_one_on_the_disk_but_for_the_hashes_of_its_models(
    s3_server: S3Server, recipe: Path, tmp_path: Path, cache: Path
) -> None:
    merged(recipe, tmp_path / "one.safetensors")
    merged(recipe, f"{s3_server.url}/models/one.safetensors")
    (sent,), here = there(s3_server, "models").values(), (tmp_path / "one.safetensors").read_bytes()
    headers = [json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]) for data in (sent, here)]
    inputs = [json.loads(header["__metadata__"].pop("alnico.inputs")) for header in headers]
    assert headers[0] == headers[1]
    assert inputs[0] == [{"model": entry["model"]} for entry in inputs[1]]
    data = [d[8 + int.from_bytes(d[:8], "little") :] for d in (sent, here)]
    assert data[0] == data[1]
    with pytest.raises(OutputError, match="exists and is not empty"):
        merged(recipe, f"{s3_server.url}/models/one.safetensors")
    merged(recipe, f"{s3_server.url}/models/one.safetensors", overwrite=True)
    s3_server.put("models/one.safetensors", b"my diary, which is no model")
    with pytest.raises(OutputError, match="is a file that is not part of a model"):
        merged(recipe, f"{s3_server.url}/models/one.safetensors", overwrite=True)
    assert left_in(cache) == []


def test_other_schemes_are_written_by_fsspec(recipe: Path, tmp_path: Path, cache: Path) -> None:
    import fsspec

    merged(recipe, tmp_path / "out")
    place = f"/{tmp_path.parent.name}/{tmp_path.name}/out"
    merged(recipe, f"memory:/{place}")
    memory = fsspec.filesystem("memory")
    found = {path.removeprefix(f"{place}/"): memory.cat(path) for path in memory.find(place)}
    assert found == everything(tmp_path / "out")
    assert left_in(cache) == []


def test_a_scheme_that_takes_files_whole_needs_room_for_all_shards_in_tmpdir(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    real = disk_space.shutil.disk_usage
    free = disk_space.DISK_MARGIN_BYTES + alnico.plan(recipe).bytes_to_write

    def usage(folder: Path) -> Any:
        return real(tmp_path)._replace(free=free) if folder == tmp_path / "temporary" else real(folder)

    monkeypatch.setattr(disk_space.shutil, "disk_usage", usage)  # the headers do not fit
    with pytest.raises(
        ResourceError, match=r"/temporary: the finished shards, .* or set TMPDIR to another disk"
    ):
        merged(recipe, f"memory:/{tmp_path}/out")
    assert left_in(cache) == []


def test_a_shard_of_several_parts_is_sent_while_others_are_made_and_leaves_the_disk(
    store: DiskStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, (one, other) = family(tmp_path, 2, layers=2, hidden=64)
    recipe = {"merge_method": "ties", "base_model": str(base), "models": [str(one), str(other)], "parameters": {"density": 0.5}}  # fmt: skip
    alnico.merge(recipe, tmp_path / "out", max_shard_size="30KB")
    freed: list[str] = []
    most: list[int] = []
    real = shard_uploads.ShardUploads._free

    def free(self: shard_uploads.ShardUploads, shard: str) -> None:
        with self._changed:
            most.append(len(self._unsent))
        real(self, shard)
        freed.append(shard)

    monkeypatch.setattr(shard_uploads.ShardUploads, "_free", free)
    monkeypatch.setattr(shard_uploads, "PART_BYTES", 4096)
    result = alnico.merge(recipe, DISK_URL, max_shard_size="30KB", threads=2)
    assert everything(tmp_path / "store" / "models" / "out") == everything(tmp_path / "out")
    assert sorted(freed) == [shard.name for shard in result.plan.shards]
    assert len(freed) > shard_uploads.SHARDS_ON_DISK >= max(most)
    parts = [name for operation, name in store.done if operation == "part"]
    assert all(parts.count(s.name) == -(-s.byte_size // 4096) for s in result.plan.shards)
    completed = [i for i, (operation, _) in enumerate(store.done) if operation == "complete"]
    assert completed[0] > max(i for i, (operation, _) in enumerate(store.done) if operation == "part")
    assert store.done[-2 - len(everything(tmp_path / "out"))] == ("put", "config.json")


@pytest.mark.usefixtures("store")
def test_what_nodes_of_a_cluster_make_is_sent_to_a_url(
    recipe: Path, tmp_path: Path, thread_cluster: ThreadCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_merge, "LEAST_UNIT_BYTES", 1)
    merged(recipe, tmp_path / "whole")
    result = merged(recipe, DISK_URL, ray=True)
    assert result.resumed == 0
    assert sum(node.done for node in thread_cluster.nodes) > 1
    assert everything(tmp_path / "store" / "models" / "out") == everything(tmp_path / "whole")


@pytest.mark.usefixtures("store")
def test_stages_and_several_outputs_go_to_a_url(recipe: Path, tmp_path: Path, cache: Path) -> None:
    text = (
        f"name: one\nmerge_method: linear\nmodels: [{tmp_path}/tuned-0, {tmp_path}/tuned-1]\nunrelated: allow\n---\n"
        f"name: two\nmerge_method: slerp\nbase_model: one\nmodels: [one, {tmp_path}/base]\nparameters: {{t: 0.4}}\nunrelated: allow\n"
        f"---\nname: three\nmerge_method: linear\nmodels: [{tmp_path}/tuned-1, {tmp_path}/base]\nunrelated: allow\n"
    )
    recipe.write_text(text)
    alnico.merge_documents(recipe, tmp_path / "out")
    results = alnico.merge_documents(recipe, DISK_URL)
    assert [result.path for result in results] == [f"{DISK_URL}/two", f"{DISK_URL}/three"]
    assert everything(tmp_path / "store" / "models" / "out") == everything(tmp_path / "out")
    assert left_in(cache) == []
    with pytest.raises(OutputError, match="exists and is not empty"):
        alnico.merge_documents(recipe, DISK_URL)
    assert alnico.merge_documents(recipe, DISK_URL, overwrite=True)


@pytest.mark.usefixtures("store")
def test_stages_that_are_interrupted_do_not_make_finished_outputs_again(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(
        f"name: one\nmerge_method: linear\nmodels: [{tmp_path}/tuned-0, {tmp_path}/tuned-1]\nunrelated: allow\n---\n"
        f"name: two\nmerge_method: linear\nmodels: [{tmp_path}/tuned-1, {tmp_path}/base]\nunrelated: allow\n"
    )
    alnico.merge_documents(recipe, tmp_path / "out")
    seen: list[str] = []

    def watch(event: Event) -> None:
        if isinstance(event, TensorDone):
            seen.append(event.tensor)
            if len(seen) == 8:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        alnico.merge_documents(recipe, DISK_URL, watch=watch)
    (second,) = alnico.merge_documents(recipe, DISK_URL)
    assert second.path == f"{DISK_URL}/two"
    assert everything(tmp_path / "store" / "models" / "out") == everything(tmp_path / "out")


@pytest.mark.usefixtures("store")
def test_without_tags_another_model_of_the_same_size_is_not_taken_for_that_of_an_earlier_run(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = DiskFolder.state

    def untagged(self: DiskFolder, name: str) -> FileVersion | None:
        found = real(self, name)
        return None if found is None else FileVersion(found.size, "")

    monkeypatch.setattr(DiskFolder, "state", untagged)
    models = f"[{tmp_path}/tuned-0, {tmp_path}/tuned-1]\nunrelated: allow\n"
    recipe.write_text(
        "---\n".join(f"name: {n}\nmerge_method: linear\nmodels: {models}" for n in ("one", "two"))
    )
    seen: list[str] = []

    def watch(event: Event) -> None:
        if isinstance(event, TensorDone):
            seen.append(event.tensor)
            if len(seen) == 8:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        alnico.merge_documents(recipe, DISK_URL, watch=watch)
    lock = tmp_path / "store" / "models" / "out" / "one" / "alnico.lock.json"
    lock.write_bytes(lock.read_bytes().swapcase())
    with pytest.raises(OutputError, match="exists and is not empty"):
        alnico.merge_documents(recipe, DISK_URL)


def test_overwrite_replaces_models_alone(store: DiskStore, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "store" / "models" / "out"
    merged(recipe, tmp_path / "whole")
    out.mkdir(parents=True)
    (out / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match=f"^{DISK_URL}: exists and is not empty"):
        merged(recipe, DISK_URL)
    with pytest.raises(OutputError, match=f"^{DISK_URL}: holds thesis.tex, not part of a model"):
        merged(recipe, DISK_URL, overwrite=True)
    assert everything(out) == {"thesis.tex": b"mine"}
    merged(recipe, DISK_URL, overwrite_anything=True)
    assert everything(out) == everything(tmp_path / "whole")
    (out / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match=r"holds thesis.tex"):
        merged(recipe, DISK_URL, overwrite=True)
    (out / "thesis.tex").unlink()
    alnico.merge(recipe, DISK_URL, max_shard_size=100, overwrite=True)
    alnico.merge(recipe, tmp_path / "whole", max_shard_size=100, overwrite=True)
    assert everything(out) == everything(tmp_path / "whole")
    assert store.uploads() == []


@pytest.mark.parametrize(
    ("out", "problem"),
    [
        ("https://example.org/models/out", "https:// is read only"),
        ("http://example.org/models/out", "http:// is read only"),
        ("s3://key:s3cr3t@bucket/out", "has a user or a password"),
        ("s3://bucket/out?token=s3cr3t", "has a query or a fragment"),
        ("s3://bucket", "is a whole bucket"),
        ("s3://bucket/out.gguf", "alnico writes safetensors only"),
        ("s3://bucket/a//b", "has an empty part"),
        ("file:///tmp/out", "is a path of this machine as a URL"),
    ],
)
def test_a_url_that_cannot_be_an_output_is_refused_before_anything_is_read(out: str, problem: str) -> None:
    recipe = {"merge_method": "linear", "models": ["nothing/here", "nor/here"]}
    for merge in (alnico.merge, alnico.merge_documents):
        with pytest.raises(OutputError, match=problem) as caught:
            merge(recipe, out)  # type: ignore[operator]
        assert "s3cr3t" not in str(caught.value)


def test_an_output_that_is_or_contains_an_input_is_refused() -> None:
    target = remote_target.RemoteTarget(DISK_URL, Path("nowhere"))
    for inside in (DISK_URL, f"{DISK_URL}/part", "s3://bucket/models", f"org/base+0.5*{DISK_URL}/adapter"):
        with pytest.raises(OutputError, match="is one of the inputs, contains it or lies in it"):
            remote_target.check_inputs_elsewhere(target, [inside])
    remote_target.check_inputs_elsewhere(target, ["s3://bucket/models/output", "org/model", "models/out"])


COMMANDS = [
    "lora extract nowhere none OUT --rank 2",
    "lora combine nowhere none OUT",
    "analyze nowhere none --base none --out OUT",
    "compare nowhere none --out OUT",
    "curve nowhere none --tasks none.yml --out OUT",
    "search nowhere.yml --tasks none.yml --out OUT",
    "evaluate nowhere --tasks none.yml --out OUT",
    "suggest nowhere --base none --out OUT",
    "soup nowhere none --tasks none.yml --out OUT",
    "adamerge nowhere --base none --tasks none.yml --out OUT",
    "statistics gram nowhere --tasks none.yml --out OUT",
    "statistics fisher nowhere --tasks none.yml --out OUT",
    "reproduce nowhere OUT",
    "equip nowhere sql -o OUT",
]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words.partition(" nowhere")[0])
def test_commands_that_write_other_things_refuse_urls(
    words: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, output, error = run(*words.replace("OUT", "s3://bucket/out").split())
    assert (code, output) == (8, "")
    assert error.startswith("alnico: s3://bucket/out: is a URL, and this output must be on this machine")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_adapter_is_folded_into_a_url(s3_server: S3Server, tmp_path: Path) -> None:
    base, (tuned,) = family(tmp_path, 1, layers=1, hidden=16)
    alnico.lora.extract(base, tuned, tmp_path / "adapter", rank=2)
    alnico.lora.fold(base, tmp_path / "adapter", tmp_path / "out")
    alnico.lora.fold(base, tmp_path / "adapter", f"{s3_server.url}/out")
    assert there(s3_server, "out") == everything(tmp_path / "out")


@pytest.mark.usefixtures("store")
def test_a_folder_for_unfinished_work_that_cannot_be_made_is_named(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot be made \(Not a directory\). Choose another --work-dir"):
        alnico.merge(recipe, DISK_URL, work_dir=tmp_path / "file")


def test_what_the_command_prints_names_the_url(s3_server: S3Server, recipe: Path, run: Run) -> None:
    url = f"{s3_server.url}/out"
    code, output, error = run("merge", str(recipe), url)
    assert (code, error.count(SECRET)) == (0, 0)
    assert output.startswith(f"{url}: 5 tensors")
    code, output, error = run("merge", str(recipe), "-o", url)
    assert (code, output) == (8, "")
    assert error.startswith(f"alnico: {url}: exists and is not empty")
    assert run("merge", str(recipe), url, "--overwrite", "--json")[0] == 0
    code, output, _ = run("merge", str(recipe), f"{s3_server.url}/new", "--dry-run")
    assert code == 0
    assert s3_server.names("new") == []


@pytest.mark.usefixtures("impatient")
def test_a_server_that_fails_is_asked_again(s3_server: S3Server, recipe: Path, tmp_path: Path) -> None:
    merged(recipe, tmp_path / "out")
    s3_server.fail("status", "out/*", status=503, methods=("PUT", "POST", "DELETE", "HEAD"), times=3)
    s3_server.fail("reset", "out/*", methods=("PUT",), times=2)
    merged(recipe, f"{s3_server.url}/out")
    assert there(s3_server, "out") == everything(tmp_path / "out")
    assert len(s3_server.failures) == 5
    assert s3_server.uploads() == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "skip"), [("denied", 0), ("expired", 2), ("status", 3), ("denied", 4), ("expired", 6)]
)
@pytest.mark.usefixtures("impatient")
def test_a_server_that_fails_for_good_ends_the_merge_with_one_error_and_the_same_command_resumes(
    s3_server: S3Server, recipe: Path, tmp_path: Path, kind: str, skip: int, cache: Path
) -> None:
    merged(recipe, tmp_path / "out")
    s3_server.fail(kind, "out/*", methods=("PUT", "POST"), times=math.inf, skip=skip, **({"status": 500} if kind == "status" else {}))  # fmt: skip
    with pytest.raises(HubError, match="the same command resumes the merge") as caught:
        merged(recipe, f"{s3_server.url}/out")
    assert SECRET not in str(caught.value)
    assert "config.json" not in there(s3_server, "out")
    s3_server.forget()
    merged(recipe, f"{s3_server.url}/out")
    assert there(s3_server, "out") == everything(tmp_path / "out")
    assert left_in(cache) == []


@pytest.mark.usefixtures("impatient")
def test_a_bucket_without_rights_to_write_is_refused_before_a_tensor_is_merged(
    s3_server: S3Server, recipe: Path
) -> None:
    s3_server.fail("denied", methods=("POST", "PUT"), times=math.inf)
    done: list[Event] = []
    with pytest.raises(HubError, match="s3:PutObject"):
        merged(recipe, f"{s3_server.url}/out", watch=done.append)
    assert not any(isinstance(event, TensorDone) for event in done)


@pytest.mark.usefixtures("store")
def test_a_server_that_lies_about_sizes_is_named_and_publishes_no_config(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = DiskFolder.state

    def lies(self: DiskFolder, name: str) -> Any:
        found = real(self, name)
        is_weights = found is not None and name.endswith(".safetensors")
        return type(found)(found.size + 7, found.tag) if found is not None and is_weights else found

    with monkeypatch.context() as patch:
        patch.setattr(DiskFolder, "state", lies)
        with pytest.raises(
            VerificationError, match=r"model-00001-of-00003.safetensors: has \d+ bytes, \d+ bytes were sent"
        ):
            merged(recipe, DISK_URL)
    assert not (tmp_path / "store" / "models" / "out" / "config.json").exists()
    assert merged(recipe, DISK_URL).resumed == 5
    merged(recipe, tmp_path / "whole")
    assert everything(tmp_path / "store" / "models" / "out") == everything(tmp_path / "whole")


@pytest.mark.usefixtures("store")
def test_a_target_that_another_machine_changes_meanwhile_is_left_alone(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "store" / "models" / "out"

    def watch(event: Event) -> None:
        if isinstance(event, TensorDone):
            out.mkdir(parents=True, exist_ok=True)
            (out / "config.json").write_text("{}")

    with pytest.raises(OutputError, match=f"^{DISK_URL}: was changed while merging"):
        merged(recipe, DISK_URL, watch=watch)
    assert everything(out) == {"config.json": b"{}"}
    (out / "config.json").unlink()
    assert merged(recipe, DISK_URL).resumed == 5


def test_two_machines_that_publish_at_once_do_not_mix_their_models(
    store: DiskStore, recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "store" / "models" / "out"

    def before(operation: str, name: str) -> None:
        if operation == "put" and name == "alnico.lock.json":
            (out / MARKER).write_text("another run")

    store.before = before
    with pytest.raises(OutputError, match="another run began to publish there"):
        merged(recipe, DISK_URL)
    assert "config.json" not in everything(out)
    store.before = None
    with pytest.raises(OutputError, match="has the mark of another run"):
        merged(recipe, DISK_URL)


@pytest.mark.usefixtures("store")
def test_two_processes_of_one_machine_do_not_write_one_url(recipe: Path) -> None:
    begun, may_end = threading.Event(), threading.Event()

    def watch(event: Event) -> None:
        if isinstance(event, TensorDone):
            begun.set()
            may_end.wait(60)

    first = threading.Thread(target=lambda: merged(recipe, DISK_URL, watch=watch))
    first.start()
    assert begun.wait(60)
    try:
        with pytest.raises(OutputError, match=f"^{DISK_URL}: another process is writing it"):
            merged(recipe, DISK_URL)
    finally:
        may_end.set()
        first.join()


def interrupted_at(recipe: Path, tensors: int, **options: Any) -> None:
    seen: list[str] = []

    def watch(event: Event) -> None:
        if isinstance(event, TensorDone):
            seen.append(event.tensor)
            if len(seen) == tensors:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merged(recipe, DISK_URL, watch=watch, **options)


@pytest.mark.slow
def test_restart_and_wrong_inputs_discard_what_was_sent(
    store: DiskStore, recipe: Path, tmp_path: Path, cache: Path
) -> None:
    interrupted_at(recipe, 4)
    assert store.uploads()
    text = recipe.read_text()
    recipe.write_text(text.replace("0.5", "0.6"))
    with pytest.raises(
        OutputError, match=rf"holds an unfinished merge into {DISK_URL}; changed since it began: the recipe"
    ):
        merged(recipe, DISK_URL)
    kept = store.uploads()
    result = merged(recipe, DISK_URL, restart=True)
    assert result.resumed == 0
    assert kept
    assert store.uploads() == []
    recipe.write_text(text)
    interrupted_at(recipe, 4, overwrite=True)
    assert store.uploads()

    def watch(event: Event) -> None:
        if isinstance(event, TensorDone):
            path = tmp_path / "tuned-1" / "model-00001-of-00002.safetensors"
            path.write_bytes(path.read_bytes() + b"1")

    with pytest.raises(AlnicoError, match="changed"):
        merged(recipe, DISK_URL, watch=watch, overwrite=True)
    assert store.uploads() == []
    assert left_in(cache) == []


def test_an_upload_that_vanished_costs_its_shard_alone(
    store: DiskStore, recipe: Path, tmp_path: Path
) -> None:
    merged(recipe, tmp_path / "whole")

    def before(operation: str, _name: str) -> None:
        if operation == "complete":
            raise HubError("the network is gone.")

    store.before = before
    with pytest.raises(HubError, match="the network is gone"):
        merged(recipe, DISK_URL)
    store.before = None
    uploads = sorted(store.uploads())
    assert len(uploads) == 3
    lost = uploads[0]
    (lost / "1").unlink()
    lost.joinpath("2").unlink(missing_ok=True)
    for path in lost.iterdir():
        path.unlink()
    lost.rmdir()
    assert 0 < merged(recipe, DISK_URL).resumed < 5
    assert everything(tmp_path / "store" / "models" / "out") == everything(tmp_path / "whole")


@pytest.mark.usefixtures("store")
def test_the_disk_needs_room_for_the_shards_that_are_made_alone(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe.write_text(
        recipe.read_text()
        .replace("ties", "passthrough")
        .replace(f"models: [{tmp_path}/tuned-0, {tmp_path}/tuned-1]", f"models: [{tmp_path}/tuned-0]")
        .replace("parameters: {density: 0.5, scope: model}\n", "")
    )
    plan = alnico.plan(recipe, max_shard_size=20)
    sizes = sorted((shard.byte_size for shard in plan.shards), reverse=True)
    assert len(sizes) > 3
    least = disk_space.bytes_on_disk_at(plan, tmp_path)
    assert least - sum(sizes[:3]) == disk_space.bytes_on_disk(plan, tmp_path) - plan.bytes_to_write
    free = disk_space.DISK_MARGIN_BYTES + least - 1
    usage = disk_space.shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(
        ResourceError, match=r"the unfinished output \(3 shards at a time\) needs .* --work-dir"
    ):
        alnico.merge(recipe, DISK_URL, max_shard_size=20)


@pytest.mark.usefixtures("store")
def test_sending_counts_in_the_memory_budget(recipe: Path, tmp_path: Path) -> None:
    at_url, on_disk = merged(recipe, DISK_URL), merged(recipe, tmp_path / "whole")
    more = at_url.plan.memory.peak_bytes - on_disk.plan.memory.peak_bytes
    assert more == shard_uploads.UPLOAD_BYTES == 128 << 20


@pytest.mark.usefixtures("store")
def test_unfinished_work_is_kept_in_the_work_folder(recipe: Path, tmp_path: Path) -> None:
    interrupted_at(recipe, 3, work_dir=tmp_path / "scratch")
    (unfinished,) = (tmp_path / "scratch").iterdir()
    assert (unfinished / "journal.jsonl").exists()
    assert unfinished.stat().st_mode & 0o777 == 0o700
    assert merged(recipe, DISK_URL, work_dir=tmp_path / "scratch").resumed >= 2
    assert list((tmp_path / "scratch").iterdir()) == []


def test_an_event_says_what_is_left_to_send(store: DiskStore, recipe: Path) -> None:
    events: list[Event] = []

    def slow(operation: str, _name: str) -> None:
        if operation == "part":
            threading.Event().wait(0.02)

    store.before = slow
    merged(recipe, DISK_URL, watch=events.append)
    (left,) = [event for event in events if isinstance(event, Fetching)]
    assert (left.models, left.is_upload) == ((DISK_URL,), True)
    assert 0 < left.total_bytes <= sum(shard.byte_size for shard in alnico.plan(recipe).shards) + 400
    assert sum(event.bytes_done for event in events if isinstance(event, Fetched)) <= left.total_bytes


@pytest.mark.slow
def test_a_finished_output_at_a_url_is_verified_and_merged_again(s3_server: S3Server, recipe: Path) -> None:
    merged(recipe, f"{s3_server.url}/out")
    checked = alnico.verify(f"{s3_server.url}/out", against_inputs=True)
    assert (checked.tensors, checked.path) == (5, f"{s3_server.url}/out")
    assert checked.files == len(s3_server.names("out/")) - 2  # the lock itself, and the card
    again = {"merge_method": "linear", "models": [f"{s3_server.url}/out", f"{s3_server.url}/out"]}
    merged(again, f"{s3_server.url}/again")
    assert s3_server.read("again/model-00001-of-00003.safetensors")
    with pytest.raises(OutputError, match="is one of the inputs"):
        merged(again, f"{s3_server.url}/out", overwrite=True)


@pytest.mark.slow
def test_a_damaged_output_at_a_url_is_named_by_its_url(s3_server: S3Server, recipe: Path, run: Run) -> None:
    url = f"{s3_server.url}/out"
    merged(recipe, url)
    weights = s3_server.read("out/model-00003-of-00003.safetensors")
    s3_server.put("out/model-00003-of-00003.safetensors", weights[:-1] + bytes([weights[-1] ^ 1]))
    code, _, error = run("verify", url)
    assert code == 10
    assert error.startswith(f"alnico: {url}")
    s3_server.put("out/model-00003-of-00003.safetensors", weights)
    s3_server.put("out/config.json", b"{}")
    with pytest.raises(VerificationError, match=f"^{url}/config.json: has the hash"):
        alnico.verify(url)
    s3_server.client.delete_object(Bucket="bucket", Key=f"{s3_server.prefix}out/alnico.lock.json")
    with pytest.raises(UncheckedError, match=f"^{url}: could not check: it has no alnico.lock.json"):
        alnico.verify(url)
    code, _, error = run("reproduce", url)
    assert (code, "is a URL" in error) == (8, True)


def test_verifying_reads_no_file_that_the_lock_does_not_list(s3_server: S3Server, recipe: Path) -> None:
    url = f"{s3_server.url}/out"
    merged(recipe, url)
    s3_server.put("out/archive.tar", bytes(100_000))
    s3_server.requests.clear()
    with pytest.raises(UncheckedError, match=f"{url}: could not check archive.tar"):
        alnico.verify(url)
    assert not any(method == "GET" and name.endswith("archive.tar") for method, name, _ in s3_server.requests)
    lock = s3_server.read("out/alnico.lock.json")
    s3_server.put("out/alnico.lock.json", lock.replace(b'"files": {', b'"files": 7, "others": {'))
    with pytest.raises(ModelError, match=f"^{url}/alnico.lock.json: "):
        alnico.verify(url)


def fails_before(store: DiskStore, operation: str, name: str) -> None:
    """Let the store fail before an operation, once."""

    def before(*asked: str) -> None:
        if asked == (operation, name):
            store.before = None
            raise HubError("the server is gone.")

    store.before = before


def test_a_file_that_comes_while_a_publication_is_made_again_is_left_alone(
    store: DiskStore, recipe: Path, tmp_path: Path
) -> None:
    fails_before(store, "put", "README.md")
    with pytest.raises(HubError, match="the server is gone"):
        merged(recipe, DISK_URL)
    thesis = tmp_path / "store" / "models" / "out" / "thesis.tex"

    def watch(event: Event) -> None:
        if isinstance(event, TensorDone):
            thesis.write_text("mine")

    with pytest.raises(OutputError, match=r"has thesis\.tex, which came after this merge began to publish"):
        merged(recipe, DISK_URL, restart=True, watch=watch)
    assert thesis.read_text() == "mine"


def test_a_model_that_another_run_published_is_not_mixed_with_the_rest_of_an_interrupted_one(
    store: DiskStore, recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "store" / "models" / "out"
    fails_before(store, "put", "README.md")
    with pytest.raises(HubError, match="the server is gone"):
        merged(recipe, DISK_URL)
    text = recipe.read_text()
    recipe.write_text(text.replace("density: 0.5", "density: 0.9"))
    merged(recipe, tmp_path / "other")
    recipe.write_text(text)
    assert {len(data) for data in everything(out).values()} & {
        len(d) for d in everything(tmp_path / "other").values()
    }
    for name in everything(out):
        (out / name).unlink()
    for name, data in everything(tmp_path / "other").items():
        (out / name).write_bytes(data)
    with pytest.raises(OutputError, match="has a model that another run published after this one began to"):
        merged(recipe, DISK_URL)
    assert everything(out) == everything(tmp_path / "other")


def test_a_shard_that_another_run_replaces_meanwhile_is_noticed(
    store: DiskStore, recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "store" / "models" / "out"

    def before(*asked: str) -> None:
        if asked == ("put", "README.md"):
            (shard, *_) = sorted(out.glob("*.safetensors"))
            data = shard.read_bytes()
            shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    store.before = before
    with pytest.raises(
        OutputError, match=r"model-00001-of-00003.safetensors: was replaced while the model was published"
    ):
        merged(recipe, DISK_URL)
    assert "config.json" not in everything(out)
