"""The place of an output: one that cannot be published is refused before the merge, with a place that works."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import alnico
from alnico.checkpoint import durable, quota
from alnico.errors import OutputError
from made import save_model
from small_merges import made_recipe

Run = Callable[..., tuple[int, str, str]]
MATRIX = np.arange(1, 9, dtype=np.float32).reshape(4, 2)
RECIPE = "merge_method: linear\nmodels: [{root}/models/a, {root}/models/b]\n"
is_root = hasattr(os, "geteuid") and os.geteuid() == 0


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models and a recipe; the working directory is an empty folder beside them."""
    for name in ("a", "b"):
        save_model(
            tmp_path / "models" / name, {"w": ("F32", MATRIX), "v": ("F32", MATRIX[0])}, {"model_type": "x"}
        )
    (tmp_path / "r.yml").write_text(RECIPE.format(root=tmp_path))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@contextmanager
def mounted(*words: str, at: Path) -> Iterator[None]:
    """Mount something for a test; without the right to, the test is skipped."""
    if (
        not is_root
        or not sys.platform.startswith("linux")
        or subprocess.run(["mount", *words, str(at)], capture_output=True).returncode
    ):
        pytest.skip("needs the right to mount")
    try:
        yield
    finally:
        subprocess.run(["umount", str(at)], check=True)


def everything(root: Path) -> dict[str, Any]:
    return {
        str(p.relative_to(root)): os.readlink(p)
        if p.is_symlink()
        else p.read_bytes()
        if p.is_file()
        else None
        for p in sorted(root.rglob("*"))
    }


def refused(run: Run, out: str, *words: str, code: int = 8, recipe: str = "../r.yml") -> str:
    """Merge to a place that must be refused before anything is read; returns the message."""
    root = Path.cwd().parent
    before = everything(root)

    def read(*_: Any) -> None:
        raise AssertionError("a tensor was read")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("alnico.checkpoint.file_model.FileModel.read_into", read)
        found, stdout, stderr = run("merge", recipe, out, *words)
    assert (found, stdout) == (code, ""), stderr
    assert stderr.startswith("alnico: ")
    assert everything(root) == before
    return stderr


def suggested(message: str) -> str:
    """The place that a message says works."""
    return message.rpartition("such as ")[2].rstrip().removesuffix(".")


@pytest.mark.parametrize("words", [(), ("--overwrite",), ("--overwrite-anything",)])
@pytest.mark.parametrize("out", [".", "./", "", "{here}", "..", "{root}", "/", "//", "sub/.."])
def test_the_working_directory_its_parents_and_the_root_are_no_place(
    out: str, words: tuple[str, ...], run: Run, tmp_path: Path
) -> None:
    Path("sub").mkdir()
    told = refused(run, out.format(here=Path.cwd(), root=tmp_path), *words)
    expected = (
        "is the root"
        if out.startswith("/")
        else "contains the working directory"
        if out in ("..", "{root}")
        else "is the working"
    )
    assert expected in told
    there = suggested(told)
    assert run("merge", "../r.yml", there)[0] == 0
    assert alnico.verify(there).tensors == 2


@pytest.mark.parametrize("words", [(), ("--overwrite",), ("--overwrite-anything",)])
@pytest.mark.parametrize("to", ["empty", "full", "nowhere", "."])
def test_a_link_is_no_place_and_what_it_leads_to_is_named(to: str, words: tuple[str, ...], run: Run) -> None:
    Path("empty").mkdir()
    save_model(Path("full"), {"old": ("F32", MATRIX)})
    Path("out").symlink_to(to)
    told = refused(run, "out", *words)
    if to == ".":
        assert "is the working directory" in told
    else:
        assert f"is a link to {Path.cwd() / to}" in told
    if to in ("empty", "nowhere"):
        assert f"Use the folder itself: {Path.cwd() / to}." in told
        assert run("merge", "../r.yml", str(Path.cwd() / to))[0] == 0


def test_a_trailing_slash_and_a_folder_above_that_is_a_link_work(run: Run) -> None:
    Path("disk").mkdir()
    Path("link").symlink_to("disk")
    assert run("merge", "../r.yml", "link/out/")[0] == 0
    assert Path("disk/out/model.safetensors").is_file()


def test_a_folder_above_that_leads_nowhere(run: Run) -> None:
    Path("link").symlink_to("nowhere")
    assert f"{Path.cwd() / 'link'} is a link to nowhere, which does not exist" in refused(run, "link/out")


@pytest.mark.parametrize("words", [(), ("--overwrite-anything",)])
@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_a_special_file_is_no_place(kind: str, words: tuple[str, ...], run: Run) -> None:
    if kind == "pipe":
        os.mkfifo("out")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind("out")
    told = refused(run, "/dev/null" if kind == "device" else "out", *words)
    assert "is a device, a pipe or a socket, which is never replaced" in told


def test_a_mount_point_is_no_place_and_a_folder_in_it_is(run: Run) -> None:
    Path("out").mkdir()
    with mounted("-t", "tmpfs", "none", at=Path("out")):
        for words in ((), ("--overwrite",), ("--overwrite-anything",)):
            told = refused(run, "out", *words)
            assert "out: is a mount point" in told
        assert run("merge", "../r.yml", suggested(told))[0] == 0


def test_a_folder_of_the_same_disk_that_is_mounted_twice_is_no_place(run: Run) -> None:
    Path("out with\ttab").mkdir()
    Path("elsewhere").mkdir()
    with mounted("--bind", "elsewhere", at=Path("out with\ttab")):
        assert "is a mount point" in refused(run, "out with\ttab", "--overwrite-anything")


def test_a_mount_inside_what_is_replaced_is_never_removed(run: Run) -> None:
    save_model(Path("out"), {"old": ("F32", MATRIX)})
    Path("out/assets").mkdir()
    Path("kept").mkdir()
    Path("kept/picture.png").write_bytes(b"kept")
    with mounted("--bind", "kept", at=Path("out/assets")):
        for words in ("--overwrite", "--overwrite-anything"):
            assert "contains a mount point, which is never removed" in refused(run, "out", words)
    assert Path("kept/picture.png").read_bytes() == b"kept"


def test_a_folder_of_a_lower_overlay_layer_is_refused_where_it_cannot_be_renamed(
    run: Run, tmp_path: Path
) -> None:
    Path("all").mkdir()
    with mounted(
        "-t", "tmpfs", "none", at=Path("all")
    ):  # an overlay's upper layer cannot lie on another overlay
        for name in ("lower/empty", "upper", "work"):
            Path("all", name).mkdir(parents=True)
        save_model(Path("all/lower/out"), {"old": ("F32", MATRIX)})
        Path("merged").mkdir()
        options = f"lowerdir={tmp_path}/here/all/lower,upperdir={tmp_path}/here/all/upper,workdir={tmp_path}/here/all/work,redirect_dir=off"
        with mounted("-t", "overlay", "overlay", "-o", options, at=Path("merged")):
            told = refused(run, "merged/out", "--overwrite")
            assert "merged/out: its file system cannot rename this folder (Invalid cross-device link)" in told
            assert run("merge", "../r.yml", "merged/empty")[0] == 0
            assert run("merge", "../r.yml", suggested(told))[0] == 0
            assert run("merge", "../r.yml", suggested(told), "--overwrite")[0] == 0


@pytest.mark.parametrize(
    "out", ["x" * 239, "é" * 119 + "x", "x" * 240 + ".safetensors", "x" * 300, f"{'x' * 256}/out"]
)
def test_a_name_that_is_too_long_for_what_is_made_beside_it(out: str, run: Run) -> None:
    told = refused(run, out)
    assert (
        "a name in it has" in told
        or "nothing of that name can be created" in told
        or "File name too long" in told
    )


@pytest.mark.parametrize(
    "out", ["x" * 237, "é" * 118, "x" * 225 + ".safetensors", "two\nlines", "-", "a b;c'\"", "\udcff\udcfe"]
)
def test_every_other_name_works(out: str, tmp_path: Path) -> None:
    result = alnico.merge(tmp_path / "r.yml", out)
    assert result.path == Path(out)
    assert os.listdir() == [out]
    alnico.merge(tmp_path / "r.yml", out, overwrite=True, seed=1)
    assert os.listdir() == [out]


def test_a_stage_with_a_name_that_is_too_long(run: Run, tmp_path: Path) -> None:
    name = "n" * 240
    text = RECIPE.format(root=tmp_path)
    for second in (f"merge_method: linear\nmodels: [{name}, {tmp_path}/models/b]\n", f"name: two\n{text}"):
        (tmp_path / "r.yml").write_text(f"name: {name}\n{text}---\n{second}")
        assert "a name in it has 240 bytes; at most 237 are allowed here" in refused(run, "out")


def test_a_file_beside_an_inputs_weights_is_an_input(run: Run, tmp_path: Path) -> None:
    (tmp_path / "models/a/notes.txt").write_text("mine")
    for name in ("config.json", "notes.txt"):
        assert "is one of the inputs" in refused(run, f"../models/a/{name}", "--overwrite-anything")
    assert run("merge", "../r.yml", "../models/a/inside")[0] == 0
    assert run("merge", "../r.yml", "../models/a/inside", "--overwrite")[0] == 0


def test_a_working_directory_that_is_gone(run: Run, tmp_path: Path) -> None:
    Path("gone").mkdir()
    os.chdir("gone")
    (tmp_path / "here" / "gone").rmdir()
    code, _, stderr = run("merge", str(tmp_path / "r.yml"), "out")
    assert (code, "Traceback" in stderr) == (8, False)
    assert stderr.startswith("alnico: out: cannot be accessed (No such file or directory)")


@pytest.mark.parametrize("flag", ["i", "a"])
@pytest.mark.parametrize(
    "marked", ["out", "out/model.safetensors", "out/assets", "empty", ".", "out.safetensors"]
)
def test_what_the_file_system_keeps_from_being_removed_is_refused(marked: str, flag: str, run: Run) -> None:
    old_model()
    Path("out/assets").mkdir()
    Path("empty").mkdir()
    shutil.copy("out/model.safetensors", "out.safetensors")
    if subprocess.run(["chattr", f"+{flag}", marked], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mark files, on a file system that can")
    try:
        told = refused(run, {".": "new"}.get(marked, marked.split("/")[0]), "--overwrite-anything")
    finally:
        subprocess.run(["chattr", f"-{flag}", marked], check=True)
    assert "is marked immutable" in told or "is marked append-only" in told or "cannot be written to" in told


def test_a_name_with_a_zero_byte(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="contains a zero byte"):
        alnico.merge(tmp_path / "r.yml", "a\0b")


@pytest.mark.parametrize("out", ["file/out", "file/deep/out"])
def test_a_parent_that_is_a_file(out: str, run: Run) -> None:
    Path("file").write_text("mine")
    assert "file is not a directory. Choose another output." in refused(run, out)


def test_a_name_of_what_is_not_finished(run: Run) -> None:
    assert "is a name that alnico uses for unfinished outputs" in refused(run, ".out.alnico-part")


def test_the_home_directory_is_no_place(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "homes" / "me").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "homes" / "me"))
    monkeypatch.setenv("ALNICO_CACHE_DIR", str(tmp_path / "cache"))
    for out in ("me", ""):
        told = refused(run, str(tmp_path / "homes" / out), "--overwrite-anything")
        assert "your home directory, which is never replaced" in told


def test_the_cache_of_kernels_is_no_place(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALNICO_CACHE_DIR", str(tmp_path / "all" / "cache"))
    for out in ("all", "all/cache", "all/cache/kernels", "all/cache/hashes"):
        assert "is alnico's cache or contains it" in refused(run, str(tmp_path / out))


def test_a_parent_that_cannot_be_written_to() -> None:
    """As another user: root may write everywhere."""
    script = (
        "import fcntl, os, pathlib, sys\n"
        "from alnico.checkpoint.output_path import check_place, check_publishable\n"
        "from alnico.errors import OutputError\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "for check in (check_publishable, lambda out: check_place(out, (), True)):\n"
        "    for name in sys.argv[1:]:\n"
        "        try: check(pathlib.Path(name))\n"
        "        except OutputError as error: print(error)\n"
        "        else: print('taken')\n"
    )
    folder = Path.cwd()
    for path in (folder, *folder.parents[:-2]):  # but the disk's root and the place of temporary folders
        path.chmod(0o755)
    Path("closed").mkdir(mode=0o555)
    Path("secret").mkdir(mode=0o700)
    Path("open").mkdir()
    Path("open").chmod(0o777)
    save_model(Path("open/theirs"), {"old": ("F32", MATRIX)})
    Path("open/theirs").chmod(0o777)
    Path("open/theirs/assets").mkdir(mode=0o755)
    if not is_root:
        pytest.skip("needs another user")
    Path("closed").chmod(0o755)
    names = ["closed/out", "secret/out", "open/out", "open/theirs"]
    made = subprocess.run([sys.executable, "-c", script, *names], capture_output=True, text=True, check=True)
    lines = made.stdout.splitlines()
    assert (
        lines[0]
        == f"closed/out: {folder}/closed cannot be written to (Permission denied). Choose another output."
    )
    assert "Permission denied" in lines[1]
    assert lines[2:4] == ["taken", "taken"]
    assert lines[6] == "taken"
    assert lines[7].startswith(
        "open/theirs: cannot be replaced: open/theirs/assets cannot be written to (Permission denied)."
    )


def test_a_read_only_disk(run: Run) -> None:
    Path("disk").mkdir()
    with mounted("-t", "tmpfs", "-o", "ro", "none", at=Path("disk")):
        assert f"disk/out: {Path.cwd() / 'disk'} is on a read-only disk. Choose another output." in refused(
            run, "disk/out"
        )
        assert "is on a read-only disk" in refused(run, "disk/deep/out")
        code, _, stderr = run("plan", "../r.yml", "--out", "disk/out")
        assert (code, "is on a read-only disk" in stderr) == (8, True)


def test_a_disk_without_inodes(run: Run) -> None:
    Path("disk").mkdir()
    with mounted("-t", "tmpfs", "-o", "nr_inodes=20,size=100M", "none", at=Path("disk")):
        assert "inodes, " in refused(run, "disk/out", code=7)


def test_a_full_quota_is_known_before_the_merge(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def left(_folder: Path, kind: int, identity: int) -> int | None:
        return {0: 2_000_000, 1: 1_000_000}[kind] if identity in (os.geteuid(), os.getegid()) else None

    monkeypatch.setattr(quota, "_left", left)
    told = refused(run, "out", code=7)
    assert "1.0 MB are left of the quota. Make room, choose another disk, or a smaller dtype." in told


def test_a_disk_without_quotas_has_none() -> None:
    assert quota.quota_left(Path("/proc")) is None


@pytest.mark.parametrize("code", [errno.EDQUOT, errno.ENOSPC])
def test_a_disk_on_which_nothing_can_be_made(code: int, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_path: Path, *_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "mkdir", full)
    assert f"nothing can be created there ({os.strerror(code)})" in refused(run, "out", code=7)


def test_a_quota_that_is_full_during_the_merge_ends_it_and_the_same_command_goes_on(run: Run) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        code, _, stderr = run("merge", "../r.yml", "out")
    assert (code, os.strerror(errno.EDQUOT) in stderr) == (9, True)
    assert not Path("out").exists()
    assert run("merge", "../r.yml", "out")[0] == 0


def test_a_limit_on_the_size_of_files(run: Run) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        told = refused(run, "out", code=7)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "this process may write 100 B into one (ulimit -f)" in told
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))  # enough for the weights, not for the lock
    try:
        refused(run, "out", code=7)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_side_files_are_part_of_what_the_disk_must_hold(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    (tmp_path / "models/a/notes.txt").write_bytes(bytes(50_000_000))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, (16 << 20) + 40_000_000))
    assert "the output needs 66." in refused(run, "out", code=7)
    assert run("plan", "../r.yml", "--out", "out")[0] == 7
    (tmp_path / "two.yml").write_text(
        f"name: first\n{RECIPE.format(root=tmp_path)}---\nmerge_method: linear\nmodels: [first, {tmp_path}/models/b]\n"
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, (16 << 20) + 90_000_000))
    assert "the outputs of all 2 merges need" in refused(run, "out", code=7, recipe="../two.yml")
    assert run("merge", "../r.yml", "out")[0] == 0


def test_what_the_plan_counts_is_what_the_output_holds(tmp_path: Path) -> None:
    from alnico.output.disk_space import bytes_on_disk

    (tmp_path / "models/a/notes.txt").write_bytes(bytes(70_000))
    plan = alnico.plan(tmp_path / "r.yml", max_shard_size=16)
    made = alnico.merge(tmp_path / "r.yml", "out", max_shard_size=16).path
    size = sum(p.stat().st_size for p in made.rglob("*") if p.is_file() and p.name != "README.md")
    assert size <= bytes_on_disk(plan, made) <= size + 4_000


# ---- --overwrite ------------------------------------------------------------------------------------------------------


def old_model(path: Path = Path("out")) -> Path:
    return save_model(path, {"old": ("F32", MATRIX)}, {"model_type": "x"})


@pytest.mark.parametrize(
    "name",
    [
        ".git/HEAD",
        "main.py",
        "thesis.docx",
        "data/train.csv",
        "notes.txt",
        ".env",
        "checkpoint-10/x.bin",
        "deep/a/b.txt",
    ],
)
def test_a_folder_that_is_no_model_is_replaced_with_a_second_option_alone(name: str, run: Run) -> None:
    old_model()
    Path("out", name).parent.mkdir(parents=True, exist_ok=True)
    Path("out", name).write_text("mine")
    told = refused(run, "out", "--overwrite")
    assert f"out: holds {name.split('/')[0]}, not part of a model" in told
    assert "--overwrite-anything" in told
    assert run("merge", "../r.yml", "out", "--overwrite-anything")[0] == 0
    assert alnico.verify("out").tensors == 2


def test_the_first_entries_that_are_no_models_are_named(run: Run) -> None:
    Path("out").mkdir()
    for name in ("a.py", "b.py", "c.py", "d.py", "README.md"):
        Path("out", name).write_text("mine")
    assert "holds a.py, b.py, c.py and 1 more, not part" in refused(run, "out", "--overwrite")


@pytest.mark.parametrize("text", ["mine", "", '{"a": 1}', "\0" * 20])
def test_a_file_without_weights_is_not_replaced(text: str, run: Run) -> None:
    Path("out.safetensors").write_text(text)
    if text:
        assert "out.safetensors: is a file that is not part of a model" in refused(
            run, "out.safetensors", "--overwrite"
        )
        assert run("merge", "../r.yml", "out.safetensors", "--overwrite-anything")[0] == 0
    else:
        assert run("merge", "../r.yml", "out.safetensors", "--overwrite")[0] == 0
    Path("notes").write_text("mine")
    assert "notes: is a file that is not part of a model" in refused(run, "notes", "--overwrite")


def test_a_folder_that_holds_an_input_is_never_replaced(run: Run, tmp_path: Path) -> None:
    old_model()
    adapter = Path("out/recipe.yml")
    adapter.write_text(RECIPE.format(root=tmp_path))
    assert "is one of the inputs or contains it" in refused(
        run, "out", "--overwrite-anything", recipe="out/recipe.yml"
    )
    (tmp_path / "models/a").rename("moved")
    old_model(Path("all"))
    Path("moved").rename("all/a")
    (tmp_path / "r.yml").write_text(f"merge_method: linear\nmodels: [all/a, {tmp_path}/models/b]\n")
    assert "is one of the inputs or contains it" in refused(run, "all", "--overwrite-anything")
    Path("link").symlink_to("all/a")
    (tmp_path / "r.yml").write_text(f"merge_method: linear\nmodels: [link, {tmp_path}/models/b]\n")
    assert "is one of the inputs or contains it" in refused(run, "all", "--overwrite-anything")
    old_model(Path("links"))
    Path("links/b").symlink_to(tmp_path / "models/b")
    (tmp_path / "r.yml").write_text("merge_method: linear\nmodels: [all/a, links/b]\n")
    assert "is one of the inputs or contains it" in refused(run, "links", "--overwrite-anything")


def test_an_input_is_known_by_another_path_too(run: Run, tmp_path: Path) -> None:
    Path("twice").mkdir()
    with mounted("--bind", str(tmp_path / "models"), at=Path("twice")):
        assert "is one of the inputs or contains it" in refused(run, "twice/a", "--overwrite-anything")


def test_the_check_is_made_again_before_the_old_output_goes(tmp_path: Path) -> None:
    from alnico.events import Event, TensorDone

    old_model()

    def watch(event: Event) -> None:
        if isinstance(event, TensorDone):
            Path("out/mine.txt").write_text("mine")

    with pytest.raises(
        OutputError, match=r"out: was created while merging\. The finished model is in .*; move it yourself"
    ):
        alnico.merge(tmp_path / "r.yml", "out", overwrite=True, watch=watch)
    assert Path("out/mine.txt").read_text() == "mine"


def test_an_output_of_alnico_is_replaced_with_all_that_its_lock_lists(run: Run, tmp_path: Path) -> None:
    (tmp_path / "models/a/anything.txt").write_text("carried")
    assert run("merge", "../r.yml", "out")[0] == 0
    assert Path("out/anything.txt").exists()
    assert run("merge", "../r.yml", "out", "--overwrite")[0] == 0
    Path("out/own.txt").write_text("mine")
    assert "holds own.txt" in refused(run, "out", "--overwrite")


def test_in_python_the_second_option_implies_the_first(tmp_path: Path) -> None:
    Path("out").mkdir()
    Path("out/mine.txt").write_text("mine")
    for options in ({}, {"overwrite": True}):
        with pytest.raises(OutputError):
            alnico.merge(tmp_path / "r.yml", "out", **options)
    alnico.merge(tmp_path / "r.yml", "out", overwrite_anything=True)
    base, tuned = ({"w": MATRIX * i} for i in (1, 2))
    model = base_plus(base, tuned)
    Path("saved").mkdir()
    Path("saved/mine.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds mine\.txt"):
        model.save("saved", overwrite=True)
    model.save("saved", overwrite_anything=True)
    with pytest.raises(OutputError, match="is the working directory"):
        model.save(".")


def base_plus(base: dict[str, np.ndarray], tuned: dict[str, np.ndarray]) -> Any:
    return base + 0.5 * alnico.TaskVector(tuned, base)


def test_several_outputs_of_one_file_are_each_replaced_by_what_they_are(run: Run, tmp_path: Path) -> None:
    text = RECIPE.format(root=tmp_path)
    (tmp_path / "r.yml").write_text(f"name: one\n{text}---\nname: two\n{text}")
    assert run("merge", "../r.yml", "out")[0] == 0
    Path("out/mine.txt").write_text("mine")
    assert run("merge", "../r.yml", "out", "--overwrite")[0] == 0
    assert Path("out/mine.txt").read_text() == "mine"
    Path("out/two/mine.txt").write_text("mine")
    assert "out/two: holds mine.txt" in refused(run, "out", "--overwrite")


# ---- a reader while --overwrite publishes -----------------------------------------------------------------------------


def test_a_reader_sees_a_whole_model_at_every_moment(tmp_path: Path) -> None:
    """The name is never without a model, and a folder that a reader opened is all of one model until it is removed."""
    if durable._renameat2() is None:
        pytest.skip("the system has no renameat2")
    for seed in (0, 1):
        save_model(
            tmp_path / f"models/c{seed}",
            {"w": ("F32", MATRIX + seed), "v": ("F32", MATRIX[0] + seed)},
            {"model_type": "x"},
        )
        (tmp_path / f"r{seed}.yml").write_text(
            f"merge_method: passthrough\nmodels: [{tmp_path}/models/c{seed}]\n"
        )
    alnico.merge(tmp_path / "r0.yml", "out")
    script = (
        "import os, sys, json\n"
        "seen = set()\n"
        "print('ready', flush=True)\n"
        "while not os.path.exists('stop'):\n"
        "    folder = os.open('out', os.O_RDONLY)\n"  # fails if there is no out
        "    try:\n"
        "        lock, weights = (os.open(n, os.O_RDONLY, dir_fd=folder) for n in ('alnico.lock.json', 'model.safetensors'))\n"
        "        listed = sorted(os.listdir(folder))\n"
        "    except FileNotFoundError:\n"
        "        os.close(folder); continue\n"  # the old model, opened before it was replaced and removed since
        "    told = json.loads(open(lock).read()); data = open(weights, 'rb').read()\n"
        "    assert len(data) == told['files']['model.safetensors']['size'], 'half'\n"
        "    seen.add((told['output']['w']['digest'], data[-4:].hex()))\n"
        "    os.close(folder)\n"
        "print(json.dumps(sorted(seen)))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "ready\n"
        for number in range(20):
            alnico.merge(tmp_path / f"r{number % 2}.yml", "out", overwrite=True)
        Path("stop").touch()
        out, told = reader.communicate(timeout=60)
    assert reader.returncode == 0, told
    assert 1 <= out.count("[") - 1 <= 2


@pytest.mark.parametrize(
    "twin",
    [
        "alnico-part/model",
        "alnico-part-gone/x",
        "alnico-old",
        "alnico-stages/x",
        "alnico-again",
        "alnico-analysis",
    ],
)
def test_inputs_in_what_is_made_beside_an_output_are_never_removed(
    twin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made_recipe(tmp_path)
    given = Path(f".out.{twin}")
    given.parent.mkdir(0o700, exist_ok=True)
    shutil.copytree("base", given)
    given.chmod(0o700)
    before = everything(given)
    one = f"merge_method: linear\nmodels: [{given}, base]\n"
    Path("r.yml").write_text(
        f"name: first\n{one}---\nmerge_method: linear\nmodels: [first, base]\n" if "stages" in twin else one
    )
    if "analysis" in twin:
        with pytest.raises(OutputError, match=f"one of the inputs is in .out.{twin}"):
            alnico.analyze(["base"], base=str(given), out="out")
    elif "again" in twin:
        alnico.merge("r.yml", "out")
        with pytest.raises(OutputError, match=f"one of the inputs is in .*.out.{twin}"):
            alnico.reproduce("out")
    else:
        with pytest.raises(OutputError, match=f"one of the inputs is in .out.{twin.split('/')[0]}"):
            alnico.merge_documents("r.yml", "out")
    assert everything(given) == before
