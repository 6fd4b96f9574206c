"""Finished merges go to the hub whole, and nothing else does."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import alnico
from alnico.errors import HubError
from hub.stub import Hub, serving
from made import family

# huggingface_hub itself hands files to httpx in a way that httpx discourages.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    with serving(tmp_path / "home", monkeypatch) as running:
        yield running


@pytest.fixture
def out() -> Path:
    """A finished merge of two local models, in two shards."""
    family(Path(), 2)
    alnico.merge({"merge_method": "linear", "models": ["tuned-0", "tuned-1"]}, "out", max_shard_size="8kB")
    return Path("out")


def contents(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def test_a_push_makes_the_model_and_prints_its_address(hub: Hub, out: Path, run: Run) -> None:
    (out / "1_Pooling").mkdir()
    (out / "1_Pooling/config.json").write_text("{}")
    assert run("push", "out", "me/merged") == (0, f"{hub.url}/me/merged\n", "")
    assert {n: d for n, d in hub.files("me/merged").items() if n != ".gitattributes"} == contents(out)
    assert (hub.repos["me/merged"].private, hub.repos["me/merged"].messages) == (
        False,
        ["Merge with alnico: out"],
    )
    with alnico.open_model("me/merged") as model:
        assert len(model.tensors) == 20


def test_a_private_push_to_a_branch_with_a_message(hub: Hub, out: Path, run: Run) -> None:
    words = ("--private", "--branch", "v2", "--message", "Half of each", "--json")
    code, stdout, stderr = run("push", "out", "me/merged", *words)
    assert (code, json.loads(stdout), stderr) == (0, {"url": f"{hub.url}/me/merged/tree/v2"}, "")
    assert hub.repos["me/merged"].private
    assert list(hub.files("me/merged")) == [".gitattributes"]
    assert set(hub.files("me/merged", "v2")) == {".gitattributes", *contents(out)}
    assert hub.repos["me/merged"].messages == ["Half of each"]


@pytest.mark.usefixtures("out")
def test_a_private_push_to_a_public_model_uploads_nothing(hub: Hub, run: Run) -> None:
    hub.add("me/merged", {"README.md": b"public"})
    code, stdout, stderr = run("push", "out", "me/merged", "--private")
    assert (code, stdout) == (13, "")
    assert stderr == (
        f"alnico: {hub.url}/me/merged: is public, but --private was used; nothing was uploaded. Make it private on the hub, or "
        "choose another name.\n"
    )
    assert list(hub.files("me/merged")) == ["README.md"]


def test_a_push_replaces_the_weights_of_another_model_in_one_commit(hub: Hub, out: Path, run: Run) -> None:
    old = {
        "model-00003-of-00003.safetensors": b"old",
        "model.safetensors": b"old",
        "notes.md": b"kept",
        "x/model.safetensors": b"kept",
    }
    hub.add("me/merged", old)
    assert run("push", "out", "me/merged")[0] == 0
    assert set(hub.files("me/merged")) == {"notes.md", "x/model.safetensors", *contents(out)}
    assert len(hub.repos["me/merged"].commits) == 2


def test_hidden_files_are_not_uploaded(hub: Hub, out: Path, run: Run) -> None:
    (out / ".env").write_text("secret")
    (out / ".git").mkdir()
    (out / ".git/config").write_text("secret")
    assert run("push", "out", "me/merged")[0] == 0
    assert not any(".env" in name or ".git/" in name for name in hub.files("me/merged"))


def test_paths_of_this_disk_are_noted(run: Run) -> None:
    _, tuned = family(Path("sub"), 2)
    alnico.merge({"merge_method": "linear", "models": [str(t) for t in tuned]}, "out")
    code, _, stderr = run("push", "out", "me/merged")
    assert code == 0
    assert stderr == "".join(
        f"note: the lock and the recipe name {path}, which everyone who sees the model can read.\n"
        for path in tuned
    )


def broken(out: Path, how: str) -> None:
    lock = out / "alnico.lock.json"
    if how == "not there":
        out.rename("elsewhere")
    elif how == "unfinished":
        out.rename("elsewhere")
        Path(".out.alnico-part").mkdir()
    elif how == "no lock":
        lock.unlink()
    elif how == "no weights":
        for path in out.glob("model*"):
            path.unlink()
    elif how == "a shard is missing":
        (out / "model-00002-of-00002.safetensors").unlink()
    elif how == "a shard is cut":
        path = out / "model-00002-of-00002.safetensors"
        path.write_bytes(path.read_bytes()[:-2])
    elif how == "another lock":
        text = json.loads(lock.read_text())
        text["output"]["model.norm.weight"]["shape"] = [17]
        lock.write_text(json.dumps(text))
    else:
        lock.write_text("{}")


BROKEN = {
    "not there": (8, "out: no such directory; expected the output of `alnico merge`. Check the path."),
    "unfinished": (
        8,
        "out: the merge is unfinished, expected a finished one. Run the same `alnico merge` again first.",
    ),
    "no lock": (8, "out: has no alnico.lock.json, expected the output of `alnico merge`. Check the path."),
    "no weights": (
        4,
        "out: has no .safetensors or .bin file, expected a model. It has config.json, but the weights are not there.",
    ),
    "a shard is missing": (
        4,
        "out/model.safetensors.index.json: lists model-00002-of-00002.safetensors, which does not exist. Complete the download.",
    ),
    "a shard is cut": (4, "out/model-00002-of-00002.safetensors: "),
    "another lock": (
        8,
        "out: model.norm.weight is BF16 [16] in the weights and BF16 [17] in alnico.lock.json; they must be of one merge. Merge again.",
    ),
    "no lock's text": (4, "out/alnico.lock.json: is no lock of alnico ('output'). Merge again."),
}


@pytest.mark.parametrize("how", BROKEN)
def test_what_is_no_finished_merge_is_not_pushed(hub: Hub, out: Path, run: Run, how: str) -> None:
    broken(out, how)
    code, stdout, stderr = run("push", "out", "me/merged")
    assert (code, stdout) == (BROKEN[how][0], "")
    assert stderr.startswith(f"alnico: {BROKEN[how][1]}")
    assert hub.requests == []


@pytest.mark.usefixtures("out")
def test_a_push_without_access_says_so(
    hub: Hub, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    code, _, stderr = run("push", "out", "stranger/merged")
    assert (code, stderr) == (
        13,
        f"alnico: stranger/merged: {hub.url} refuses access (status 403); expected a token that may write it. Log in with "
        "`hf auth login`, or set HF_TOKEN.\n",
    )
    assert "hf_secret" not in stderr
    assert run("push", "out", "ghost/merged") == (
        13,
        "",
        f"alnico: ghost/merged: {hub.url} does not let you write there. Check the name; log in with `hf auth login`, or set "
        "HF_TOKEN with a token that may write.\n",
    )
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    code, _, stderr = run("push", "out", "me/merged")
    assert code == 13
    assert "expected a token that may write" in stderr
    assert hub.uploads == {}


@pytest.mark.usefixtures("out")
def test_a_push_offline_or_to_no_name_is_refused(hub: Hub, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    assert run("push", "out", "merged")[0] == 4
    assert run("push", "out", "me/merged", "--branch", "../x")[0] == 13
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"^me/merged: HF_HUB_OFFLINE is set, but a push needs the network"):
        alnico.push("out", "me/merged")
    assert hub.requests == []


# ---- a hub that is none -----------------------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALNICO_HUB_WAIT", "0.01")
    monkeypatch.setattr("time.sleep", lambda _: None)  # huggingface_hub's, between its tries


def posted(request: Any, part: str) -> bool:
    return bool(request.command in ("POST", "PUT") and part in request.path)


def lfs_batch(request: Any, **actions: dict[str, str]) -> None:
    objects = [
        {"oid": o["oid"], "size": o["size"], "actions": actions}
        for o in json.loads(request.body())["objects"]
    ]
    request.say({"transfer": "basic", "objects": objects})


@pytest.mark.parametrize("what", ["verify", "upload", "create", "commit"])
def test_a_push_sends_the_token_to_no_other_host(hub: Hub, out: Path, run: Run, what: str) -> None:
    def tamper(request: Any) -> bool:
        place = {"href": f"{hub.store}/upload/x"}
        if what == "verify" and posted(request, "objects/batch"):
            lfs_batch(request, upload=place, verify={"href": f"{hub.store}/verify"})
        elif what == "upload" and posted(request, "objects/batch"):
            lfs_batch(request, upload=place | {"header": {"chunk_size": "100", "1": place["href"]}})
        elif what in ("create", "commit") and posted(request, f"/{what}") and request.host == "hub":
            request.body()
            request.answer(307, b"", {"Location": f"{hub.store}{request.path}"})
        else:
            return False
        return True

    hub.tamper = tamper
    code, stdout, stderr = run("push", str(out), "me/merged")
    assert (code, stdout) == (13, "")
    assert stderr.startswith("alnico: me/merged: ")
    assert "hf_secret" not in stderr
    assert {r.token for r in hub.requests if r.host == "store"} <= {None}
    assert "me/merged" not in hub.repos or set(hub.files("me/merged")) == {".gitattributes"}


@pytest.mark.usefixtures("impatient")
def test_odd_answers_to_a_push_are_errors_of_the_hub(hub: Hub, out: Path, run: Run) -> None:
    wholes: dict[str, Any] = {
        "repos/create": {"url": "x", "name": "me/merged"},
        "validate-yaml": {"errors": [{"message": "m"}], "warnings": [{"message": "w"}]},
        "/preupload/": {"files": [{"path": "README.md", "uploadMode": "regular", "shouldIgnore": False}]},
        "objects/batch": {"transfer": "basic", "objects": [{"oid": "0", "size": 1, "actions": {"upload": {"href": "x", "header": {"chunk_size": 1}}}}]},
        "/commit/": {"commitUrl": "x", "commitOid": "x"},
    }  # fmt: skip
    hub.add("me/merged", {"README.md": b""})
    for part, whole in wholes.items():
        for key in (None, *whole):
            for odd in (None, [7]):
                answer = odd if key is None else whole | {key: odd}

                def tamper(request: Any, part: str = part, answer: Any = answer) -> bool:
                    return posted(request, part) and (request.body(), request.say(answer)) != ()

                hub.tamper = tamper
                code, _, stderr = run("push", str(out), "me/merged")
                assert code in (0, 13), (part, answer, stderr)
                assert code or part in ("repos/create", "validate-yaml"), (part, answer)
                assert "Traceback" not in stderr


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("part", ["/preupload/", "objects/batch", "/upload/", "/commit/"])
@pytest.mark.parametrize("status", [500, 413])
def test_a_push_that_fails_in_the_middle_shows_nobody_half_a_model(
    hub: Hub, out: Path, run: Run, part: str, status: int
) -> None:
    hub.add("me/merged", {"model.safetensors": b"old", "README.md": b"old"})
    hub.tamper = lambda request: (
        posted(request, part)
        and (request.body(), request.answer(status, b"[]", {"Retry-After": "9" * 40})) != ()
    )
    code, stdout, stderr = run("push", str(out), "me/merged")
    assert (code, stdout) == (13, "")
    assert stderr.startswith("alnico: me/merged: ")
    assert dict(hub.files("me/merged")) == {"model.safetensors": b"old", "README.md": b"old"}
    hub.tamper = None
    assert run("push", str(out), "me/merged")[0] == 0


def test_a_push_of_which_the_hub_leaves_files_out_is_no_success(hub: Hub, out: Path, run: Run) -> None:
    def tamper(request: Any) -> bool:
        if not posted(request, "/preupload/"):
            return False
        paths = [f["path"] for f in json.loads(request.body())["files"]]
        mode = {True: "lfs", False: "regular"}
        request.say(
            {
                "files": [
                    {
                        "path": p,
                        "uploadMode": mode[p.endswith(".safetensors")],
                        "shouldIgnore": "model-00002" in p,
                    }
                    for p in paths
                ]
            }
        )
        return True

    hub.tamper = tamper
    code, stdout, stderr = run("push", str(out), "me/merged")
    assert (code, stdout) == (13, "")
    assert (
        "after the upload, 'model-00002-of-00002.safetensors' on the hub is not the file of this folder (1 such)"
        in stderr
    )


@pytest.mark.usefixtures("out")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"id": "other/repo"}, "answers for 'other/repo'"),
        ({"private": "true"}, "is public, but --private was used"),
    ],
)
def test_a_push_to_what_is_not_as_it_was_asked_uploads_nothing(
    hub: Hub, run: Run, change: dict[str, str], words: str
) -> None:
    def tamper(request: Any) -> bool:
        if request.command != "GET" or "/api/models/" not in request.path:
            return False
        repo = hub.repos["me/merged"]
        request.say({"id": "me/merged", "sha": repo.refs["main"], "siblings": [], "private": True} | change)
        return True

    hub.tamper = tamper
    code, _, stderr = run("push", "out", "me/merged", "--private")
    assert code == 13
    assert words in stderr
    assert "nothing was uploaded" in stderr
    assert hub.uploads == {}


def test_a_link_out_of_the_folder_is_not_uploaded(hub: Hub, out: Path, run: Run) -> None:
    Path("key").write_text("mine")
    (out / "notes.txt").symlink_to(Path("key").resolve())
    code, _, stderr = run("push", "out", "me/merged")
    assert code == 4
    assert stderr.startswith("alnico: out/notes.txt: ")
    assert "link" in stderr
    assert hub.requests == []


@pytest.mark.usefixtures("out")
@pytest.mark.parametrize(
    ("part", "does_trickle"),
    [("repos/create", True), pytest.param("/preupload/", False, marks=pytest.mark.slow), ("/commit/", False)],
)
def test_a_push_to_a_hub_that_does_not_answer_ends(
    hub: Hub, run: Run, monkeypatch: pytest.MonkeyPatch, part: str, does_trickle: bool
) -> None:
    monkeypatch.setenv("ALNICO_HUB_TIMEOUT", "0.3")
    over = threading.Event()

    def tamper(request: Any) -> bool:
        if not posted(request, part):
            return False
        try:
            request.wfile.write(b"HTTP/1.1 200 OK\r\nX-A: ")
            while not over.wait(0.05) and does_trickle:
                request.wfile.write(b"a")
            over.wait(20)
        except OSError:
            pass
        request.close_connection = True
        return True

    hub.tamper = tamper
    monkeypatch.setattr("time.sleep", lambda _: None)
    code, _, stderr = run("push", "out", "me/merged")
    over.set()
    assert code == 13
    assert stderr.startswith("alnico: me/merged: ")
