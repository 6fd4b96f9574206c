"""Pipes, sockets, devices, folders and links under the names of files: refused at once by every command, and by a plan as by its merge."""

from __future__ import annotations

import ast
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

import alnico
from alnico.checkpoint import sidecars
from alnico.checkpoint.durable import copy_file
from alnico.checkpoint.files import NotAFileError, open_binary, open_named, open_regular
from alnico.errors import AlnicoError, EvaluationError, ModelError, RecipeError, RunError, VerificationError
from hostile.malformed import save_json
from made import save_model
from test_house import SOURCE

NAMES = (
    "LICENSE", "README.md", "modules.json", "config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "preprocessor_config.json",
    "adapter_config.json", "model.safetensors.index.json", "model.safetensors", "model.sig", "alnico.lock.json", "mergekit_config.yml",
    "modeling_x.py", "picture.png", "1_Pooling/config.json",
)  # fmt: skip


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        here = os.getcwd()
        os.chdir(path.parent)  # the name of a socket is short
        try:
            made.bind(path.name)
        finally:
            os.chdir(here)


def a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_folder(path: Path) -> None:
    path.mkdir()


def a_loop(path: Path) -> None:
    path.symlink_to(path.name)


def a_link_to_nowhere(path: Path) -> None:
    path.symlink_to("nowhere")


KINDS: tuple[Callable[[Path], None], ...] = (a_pipe, a_socket, a_device, a_folder, a_loop, a_link_to_nowhere)
WAITING = (a_pipe, a_socket, a_device)


def model(folder: Path, value: float = 1.0) -> Path:
    values = {
        "model.embed_tokens.weight": ("F32", np.full((4, 4), value, np.float32)),
        "w": ("F32", np.full(3, value, np.float32)),
    }
    return save_model(folder, values, {"model_type": "llama", "vocab_size": 4})


def put(path: Path, kind: Callable[[Path], None]) -> None:
    if path.parent.name == "1_Pooling":
        save_json(path.parent.parent / "modules.json", [{"path": ""}, {"path": "1_Pooling"}])
        path.parent.mkdir()
    path.unlink(missing_ok=True)
    kind(path)


def outcome(call: Callable[[], object]) -> str:
    try:
        call()
    except AlnicoError as error:
        return f"{type(error).__name__} {error.exit_code}"
    return "done"


COMMANDS = ("plan", "merge", "inspect", "diff", "analyze", "extract", "verify")
FEW = ("LICENSE", "modules.json", "generation_config.json", "tokenizer_config.json")


def sweep(folder: Path, names: Sequence[str], kinds: Sequence[Callable[[Path], None]]) -> None:
    """All names, kinds and commands; printed as it goes, so that the last line tells what hangs."""
    for name in names:
        for kind in kinds:
            place = folder / f"{NAMES.index(name)}-{kind.__name__}"
            good, bad = model(place / "good"), model(place / "bad", 1.5)
            put(bad / name, kind)
            recipe = {"merge_method": "linear", "models": [str(bad), str(good)], "dtype": "float32"}
            calls: dict[str, Callable[[], object]] = {
                "plan": lambda r=recipe: alnico.plan(r),
                "merge": lambda r=recipe, p=place: alnico.merge(r, p / "out", memory="1GiB"),
                "inspect": lambda b=bad: alnico.open_model(b).close(),
                "diff": lambda b=bad, g=good: alnico.diff(b, g),
                "analyze": lambda b=bad, g=good: alnico.analyze([b], base=g),
                "extract": lambda b=bad, g=good, p=place: alnico.lora.extract(g, b, p / "adapter", rank=1),
                "verify": lambda b=bad: alnico.verify(b),
            }
            for command in COMMANDS if kind is a_pipe else COMMANDS[:2]:
                print(json.dumps([name, kind.__name__, command]), end=" ", flush=True)
                print(outcome(calls[command]), flush=True)


def swept(folder: Path, names: str, kinds: str) -> dict[tuple[str, str, str], str]:
    """What came of each, in a process that is ended if it waits."""
    code = f"from pathlib import Path; from hostile.test_special_files import *; sweep(Path({str(folder)!r}), {names}, {kinds})"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(SOURCE.parent), str(Path(__file__).parent.parent))),
    }
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240, env=environment
    )
    assert ran.returncode == 0, ran.stdout[-300:] + ran.stderr[-3000:]
    lines = [line.partition("] ") for line in ran.stdout.splitlines()]
    return {tuple(json.loads(key + "]")): came for key, _, came in lines}  # type: ignore[misc]


def test_a_pipe_beside_a_model_is_refused_by_the_plan_and_by_the_merge(tmp_path: Path) -> None:
    found = swept(tmp_path, "FEW", "[a_pipe]")
    assert {v for (_, _, command), v in found.items() if command != "verify"} == {"ModelError 4"}
    assert len(found) == len(FEW) * len(COMMANDS)


@pytest.mark.slow
def test_a_plan_and_its_merge_agree_on_what_is_no_file_and_no_command_waits(tmp_path: Path) -> None:
    found = swept(tmp_path, "NAMES", "KINDS")
    assert len(found) == len(NAMES) * (2 * len(KINDS) + len(COMMANDS) - 2)
    for name in NAMES:
        for kind in KINDS:
            planned, merged = found[name, kind.__name__, "plan"], found[name, kind.__name__, "merge"]
            assert planned == merged, (name, kind)
            assert planned == "ModelError 4" if kind in WAITING else planned in ("done", "ModelError 4"), (
                name,
                kind,
            )
    assert {v for (_, _, command), v in found.items() if command != "verify"} == {"done", "ModelError 4"}
    assert {v for (_, _, command), v in found.items() if command == "verify"} <= {
        "ModelError 4",
        "UncheckedError 11",
        "VerificationError 10",
    }


@pytest.mark.parametrize("kind", WAITING, ids=lambda kind: kind.__name__)
def test_a_finished_merge_in_which_a_file_became_another_thing_is_damaged(
    tmp_path: Path, kind: Callable[[Path], None]
) -> None:
    a, b = model(tmp_path / "a"), model(tmp_path / "b", 1.5)
    (a / "LICENSE").write_text("free")
    alnico.merge({"merge_method": "linear", "models": [str(a), str(b)]}, tmp_path / "out")
    (tmp_path / "out" / "LICENSE").unlink()
    kind(tmp_path / "out" / "LICENSE")
    with pytest.raises(VerificationError, match="LICENSE"):
        alnico.verify(tmp_path / "out")


@pytest.mark.parametrize("kind", WAITING, ids=lambda kind: kind.__name__)
def test_files_that_recipes_and_tasks_name_are_not_waited_for(
    tmp_path: Path, kind: Callable[[Path], None]
) -> None:
    put(tmp_path / "x.yml", kind)
    put(tmp_path / "x.jsonl", kind)
    put(tmp_path / "x.csv", kind)
    from alnico.analysis.scores import read_scores
    from alnico.evaluation.examples import read_examples, read_text
    from alnico.evaluation.task_file import read_tasks

    with pytest.raises(RecipeError, match=r"x\.yml: cannot be read"):
        alnico.plan(tmp_path / "x.yml")
    with pytest.raises(EvaluationError, match=r"x\.yml: cannot be read"):
        read_tasks(tmp_path / "x.yml")
    for read in (read_text, read_examples):
        with pytest.raises(EvaluationError, match=r"x\.jsonl: "):
            read(tmp_path / "x.jsonl")
    with pytest.raises(ModelError, match=r"x\.csv: cannot be read"):
        read_scores([tmp_path / "x.csv"])


@pytest.mark.parametrize("kind", [a_pipe, a_device, a_folder], ids=lambda kind: kind.__name__)
def test_what_is_no_file_is_not_even_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Callable[[Path], None]
) -> None:
    """To open a device can do something: rewind a tape, reset a line."""
    kind(tmp_path / "it")
    monkeypatch.setattr(os, "open", lambda *_, **__: pytest.fail("it was opened"))
    with pytest.raises(NotAFileError):
        open_regular(tmp_path / "it")


def test_what_became_another_thing_before_it_was_opened_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    was = os.stat(tmp_path / "file")
    (tmp_path / "file").unlink()
    os.mkfifo(tmp_path / "file")
    monkeypatch.setattr(os, "stat", lambda *_, **__: was)
    came: list[str] = []
    opening = threading.Thread(target=lambda: came.append(outcome_of_opening(tmp_path / "file")), daemon=True)
    opening.start()
    opening.join(20)
    assert came == ["refused"]


def outcome_of_opening(path: Path) -> str:
    try:
        os.close(open_regular(path))
    except NotAFileError:
        return "refused"
    return "opened"


def test_a_pipe_of_the_shell_is_read(tmp_path: Path) -> None:
    ends = os.pipe()
    os.write(ends[1], b"merge_method: linear\nmodels: [a, b]\n")
    os.close(ends[1])
    try:
        with open_named(f"/dev/fd/{ends[0]}") as file:
            assert file.read() == b"merge_method: linear\nmodels: [a, b]\n"
    finally:
        os.close(ends[0])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="it is a pipe"):
        open_named(tmp_path / "pipe")


def test_a_file_that_becomes_a_pipe_after_the_plan_ends_the_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = model(tmp_path / "a"), model(tmp_path / "b", 1.5)
    (a / "LICENSE").write_text("free")
    before = sidecars.copy_file

    def swapped(source: Path, *arguments: object) -> None:
        if source.name == "LICENSE":
            source.unlink()
            os.mkfifo(source)
        before(source, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(sidecars, "copy_file", swapped)
    with pytest.raises(
        RunError, match=r"LICENSE: could not be copied to the output \(it is a pipe, a socket or a device"
    ):
        alnico.merge({"merge_method": "linear", "models": [str(a), str(b)]}, tmp_path / "out")


def test_a_file_that_grows_is_copied_as_long_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "log").write_bytes(b"x" * 10)
    read = os.read

    def growing(descriptor: int, size: int) -> bytes:
        with (tmp_path / "log").open("ab") as file:
            file.write(b"y" * 100)
        return read(descriptor, size)

    monkeypatch.setattr(os, "read", growing)
    copy_file(tmp_path / "log", tmp_path / "copy")
    monkeypatch.undo()
    assert (tmp_path / "copy").read_bytes() == b"x" * 10


def test_a_card_of_ten_gigabytes_is_read_as_far_as_a_card_goes(tmp_path: Path) -> None:
    a, b = model(tmp_path / "a"), model(tmp_path / "b", 1.5)
    with (a / "README.md").open("wb") as file:
        file.truncate(10 << 30)
    alnico.plan({"merge_method": "linear", "models": [str(b), str(a)]})
    with pytest.raises(OSError, match="Is a directory"):
        open_binary(tmp_path)


def test_a_folder_of_very_many_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = model(tmp_path / "a")
    monkeypatch.setattr(sidecars, "MAX_ENTRIES", 4)
    for i in range(4):
        (a / f"{i}.txt").touch()
    with pytest.raises(ModelError, match="holds more than 4 files and folders"):
        alnico.open_model(a)


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user in a process of its own")
def test_a_donors_file_that_may_not_be_read_is_refused_by_the_plan() -> None:
    with tempfile.TemporaryDirectory() as name:  # the folders of pytest are for its own user
        Path(name).chmod(0o755)
        refused_to_another_user(Path(name))


def refused_to_another_user(folder: Path) -> None:
    a, b = model(folder / "a"), model(folder / "b", 1.5)
    (a / "LICENSE").write_text("mine")
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    (a / "LICENSE").chmod(0)
    recipe = {"merge_method": "linear", "models": [str(a), str(b)]}
    code = (
        "import os, sys, alnico; from alnico.errors import ModelError; import alnico.plan.build\n"
        f"alnico.plan({ {**recipe, 'models': [str(b), str(b) + '/.']}!r})  # loads what it needs\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "try:\n"
        f"    alnico.plan({recipe!r})\n"
        "except ModelError as error:\n"
        "    sys.exit(str(error))\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert f"{a / 'LICENSE'}: cannot be opened (Permission denied)" in ran.stderr


OPENERS = {
    "open",
    "read_text",
    "read_bytes",
    "fdopen",
    "memmap",
    "load",
    "fromfile",
    "copyfile",
    "copy",
    "copy2",
    "copytree",
    "ZipFile",
}
GUARDED = {"checkpoint/files.py"}
"""Where the guard itself is."""
OTHERS = {
    "folders.py", "checkpoint/durable.py", "checkpoint/quota.py", "kernels/cache.py", "kernels/build.py",  # of our own, opened without following a link
    "vocabulary/chat_template.py", "analysis/page.py",  # files of the package
    "cli/streams.py",  # /dev/null
    "checkpoint/remote/download_cache.py", "checkpoint/remote/remote_weights.py", "checkpoint/remote/fsspec_folder.py",  # new files in private folders
    "verification/output_at_url.py", "output/publish_remote.py",  # of the unfinished output and a temporary folder, which are ours alone
    "cluster/nodes.py",  # of /proc
    "cli/completion.py",  # of /proc, and what the user's own shell reads when it starts
    "installation.py",  # what pip recorded, and the checkout that alnico was installed from
    "engine/factor_cache.py",  # of a folder of ours: no link is followed, no pipe waited for
    "demo/models.py",  # a wheel in a folder of ours, whose hash was compared
    "tune/search/study.py", "checkpoint/output_path.py", "checkpoint/page_cache.py",  # of /proc and /sys
    "lora/combine.py",  # of the unfinished output, which is ours alone
    "testing/checks.py", "testing/small_models.py",  # models that the tests of a method make themselves
}  # fmt: skip
"""Files of the source that open no file of a stranger by themselves."""


def opened_in(path: Path) -> list[str]:
    """Calls that open a file by its name, but those of the guard and of what it opened."""
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call):
            text = ast.unparse(node.func)
            name = text.rpartition(".")[2]
            whose = text.rpartition(".")[0]
            if name == "read_text" and not whose:  # of evaluation/examples.py
                continue
            if name in OPENERS and whose in ("json", "yaml", "copy", "threading", "api", "dataclasses"):
                continue
            if (
                (name == "open" and whose in ("", "os", "io"))
                or (name == "open" and whose not in ("", "os", "io", "archive", "alnico"))
            ) or (
                name in OPENERS - {"open", "copy", "load"}
                or (name == "load" and whose == "np")
                or (name == "copy" and whose == "shutil")
            ):
                found.append(ast.unparse(node))
    return found


GUARDS = (
    "open_to_read(",
    "open_to_write(",  # follows no link, waits for no pipe
    "open_regular(",
    "np.load(packed",
    "ZipFile(packed",
    "ZipFile(file)",
    "part_of_file(",  # of a file that the guard opened
    "np.memmap(file",
    "np.load(io.",
    "self.open(",
    "models.open(",  # of cluster/node_models.py, which opens models
)


@pytest.mark.parametrize(
    "path", sorted(SOURCE.rglob("*.py")), ids=lambda path: path.relative_to(SOURCE).as_posix()
)
def test_every_file_that_is_opened_goes_through_the_guard(path: Path) -> None:
    """A call here waits for a pipe: open with `open_binary`, `read_small` or `open_to_read` of checkpoint/files.py, or say why not above."""
    name = path.relative_to(SOURCE).as_posix()
    unguarded = [call for call in opened_in(path) if not any(guard in call for guard in GUARDS)]
    assert name in GUARDED | OTHERS or unguarded == []


def test_the_list_of_others_is_true() -> None:
    assert [name for name in sorted(OTHERS) if not opened_in(SOURCE / name)] == []


def test_a_folder_of_a_module_that_is_a_link_out_of_the_model_is_not_looked_into(tmp_path: Path) -> None:
    """It may lead to the root of the file system, where to look takes minutes."""
    a = model(tmp_path / "a")
    save_json(a / "modules.json", [{"path": ""}, {"path": "sub"}])
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret").mkdir(mode=0)
    (a / "sub").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=r"sub: is a link to .*elsewhere, outside the model's directory"):
        alnico.open_model(a)
    (a / "sub").unlink()
    (a / "inside").mkdir()
    (a / "sub").symlink_to("inside")
    alnico.open_model(a).close()


def nested(folder: Path, depth: int) -> None:
    """Folders inside one another, deeper than a path may be long."""
    here = os.open(folder, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)


def remove(folder: Path) -> None:
    subprocess.run(["rm", "-rf", str(folder)], check=True)


def test_folders_nested_very_deep_are_refused(tmp_path: Path) -> None:
    a, b, out = model(tmp_path / "a"), model(tmp_path / "b", 1.5), tmp_path / "out"
    recipe = {"merge_method": "linear", "models": [str(a), str(b)]}
    alnico.merge(recipe, out)
    (out / "onnx").mkdir()
    nested(out / "onnx", 1100)
    try:
        for call in (lambda: alnico.verify(out), lambda: alnico.reproduce(out)):
            with pytest.raises(AlnicoError, match="nested deeper than 100"):
                call()
        for options in ({"overwrite": True}, {"overwrite_anything": True}):
            with pytest.raises(AlnicoError, match="nested deeper than 100") as caught:
                alnico.merge(recipe, out, **options)
            assert caught.value.exit_code == 8
    finally:
        remove(out)
    save_json(a / "modules.json", [{"path": ""}, {"path": "sub"}])
    (a / "sub").mkdir()
    nested(a / "sub", 1100)
    try:
        with pytest.raises(ModelError, match="nested deeper than 100"):
            alnico.plan(recipe)
    finally:
        remove(a)


def test_a_side_file_whose_name_is_no_text_is_refused_by_the_plan(tmp_path: Path) -> None:
    """The lock, which is JSON, cannot name it."""
    a, b = model(tmp_path / "a"), model(tmp_path / "b", 1.5)
    name = os.fsdecode(b"notes\xff.txt")
    (a / name).write_text("x")
    recipe = {"merge_method": "linear", "models": [str(a), str(b)]}
    for call in (lambda: alnico.plan(recipe), lambda: alnico.merge(recipe, tmp_path / "out")):
        with pytest.raises(ModelError, match="its name is not UTF-8"):
            call()
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
    (a / name).unlink()
    save_json(a / "modules.json", '[{"path": "\\ud800"}, {"path": ""}]')
    alnico.merge(recipe, tmp_path / "out")


def test_hidden_files_hold_no_weights(tmp_path: Path) -> None:
    """As macOS leaves them (``._model.safetensors``); and no loader of others reads them, so that nobody can hide weights there."""
    a = model(tmp_path / "a")
    (a / "model.safetensors").rename(a / "other.safetensors")
    (a / "._other.safetensors").write_bytes(b"\0\5\x16\7" + bytes(100))
    save_model(tmp_path / "b", {"evil": ("F32", np.ones(3, np.float32))})
    (tmp_path / "b" / "model.safetensors").rename(a / ".git.safetensors")
    with alnico.open_model(a) as opened:
        assert [path.name for path in opened.paths()] == ["other.safetensors"]
