"""Unfinished work beside an output is taken up only where it is ours alone: what a stranger left there is refused, and no link in it is followed."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import alnico
from alnico.engine import stages
from alnico.errors import OutputError
from alnico.events import Event, TensorDone
from alnico.lora.combine import combine
from alnico.lora.extract import extract
from alnico.lora.fold import fold
from alnico.output.staging import PartDirectory
from lora import made_adapters
from made import family
from small_merges import everything, interrupted, made_recipe, merged

STRANGER = 65534
as_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can make files of another user"
)
pytestmark = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="this system has no owners")

CHAIN = """\
name: first
merge_method: linear
models: [{0}/tuned-0, {0}/tuned-1]
---
merge_method: linear
models: [first, {0}/base]
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, adapters and recipes."""
    root = tmp_path_factory.mktemp("models")
    family(root, 2, dtype="F32", hidden=16)
    made_recipe(root / "small")
    (root / "chain.yml").write_text(CHAIN.format(root))
    for i in range(2):
        tensors = made_adapters.factors("model.layers.0.self_attn.q_proj", 16, 16, 2, i)
        made_adapters.save(root / f"adapter-{i}", tensors, r=2, lora_alpha=2, target_modules=["q_proj"])
    return root


COMMANDS: dict[str, tuple[str, Callable[[Path, Path], Any]]] = {
    "merge": ("part", lambda models, out: merged(models / "small" / "recipe.yml", out)),
    "stages": ("stages", lambda models, out: alnico.merge_documents(models / "chain.yml", out)),
    "fold": ("part", lambda models, out: fold(models / "base", [models / "adapter-0"], out)),
    "combine": ("part", lambda models, out: combine([models / "adapter-0", models / "adapter-1"], out)),
    "extract": ("part", lambda models, out: extract(models / "tuned-0", models / "base", out, rank=2)),
    "analyze": (
        "analysis",
        lambda models, out: alnico.analyze([models / "tuned-0"], base=models / "base", out=out),
    ),
}


def a_folder_that_all_write(place: Path, _: Path) -> str:
    place.mkdir()
    place.chmod(0o777)
    return f"{place} can be written by others (its mode is 0777)"


def a_link(place: Path, victim: Path) -> str:
    place.symlink_to(victim)
    return f"{place} is a link"


def a_lock_that_is_a_link(place: Path, victim: Path) -> str:
    place.mkdir(0o700)
    (place / "lock").symlink_to(victim / "precious")
    return f"{place}/lock is a link"


def a_journal_that_is_a_link(place: Path, victim: Path) -> str:
    place.mkdir(0o700)
    (place / "journal.jsonl.tmp").symlink_to(victim / "precious")
    return f"{place}/journal.jsonl.tmp is a link"


def a_model_that_is_a_link(place: Path, victim: Path) -> str:
    place.mkdir(0o700)
    (place / "model").symlink_to(victim)
    return f"{place}/model is a link"


def a_pipe(place: Path, _: Path) -> str:
    place.mkdir(0o700)
    (place / "model").mkdir()
    os.mkfifo(place / "model" / "config.json")
    return f"{place}/model/config.json is a pipe or a device"


def a_file_that_all_write(place: Path, _: Path) -> str:
    place.mkdir(0o755)
    (place / "journal.jsonl").write_text("")
    (place / "journal.jsonl").chmod(0o666)
    return f"{place}/journal.jsonl can be written by others (its mode is 0666)"


def a_folder_of_another(place: Path, _: Path) -> str:
    place.mkdir(0o755)
    os.chown(place, STRANGER, STRANGER)
    return f"{place} belongs to the user nobody ({STRANGER})"


def a_file_of_another(place: Path, _: Path) -> str:
    place.mkdir(0o700)
    (place / "journal.jsonl").write_text("")
    os.chown(place / "journal.jsonl", STRANGER, STRANGER)
    return f"{place}/journal.jsonl belongs to the user nobody ({STRANGER})"


PLANTED = [
    a_folder_that_all_write, a_link, a_lock_that_is_a_link, a_journal_that_is_a_link, a_model_that_is_a_link, a_pipe, a_file_that_all_write,
    pytest.param(a_folder_of_another, marks=as_root), pytest.param(a_file_of_another, marks=as_root),
]  # fmt: skip


@pytest.mark.parametrize("plant", PLANTED)
@pytest.mark.parametrize("command", COMMANDS)
def test_what_another_user_may_have_planted_is_refused_and_no_link_is_followed(
    command: str, plant: Callable[[Path, Path], str], models: Path, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").write_text("mine")
    out = tmp_path / "out"
    kind, run = COMMANDS[command]
    place = tmp_path / f".out.alnico-{kind}"
    fault = plant(place, victim)
    before = sorted(os.walk(place))
    with pytest.raises(OutputError) as caught:
        run(models, out)
    assert caught.value.exit_code == 8
    chmod = f"run `chmod -R go-w {place}` or " if "written by others" in fault else ""
    assert str(caught.value) == (
        f"{out}: the unfinished work next to it cannot be resumed: {fault}; expected files and folders of yours that nobody else can "
        f"write. Choose another output, or, if you know what it is, {chmod}remove {place}."
    )
    assert everything(victim) == {"precious": b"mine"}
    assert sorted(os.walk(place)) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [place.name, "victim"]


@as_root
@pytest.mark.parametrize("restart", [False, True])
def test_a_strangers_finished_tensors_are_not_published(restart: bool, models: Path, tmp_path: Path) -> None:
    part = interrupted(models / "small" / "recipe.yml", tmp_path / "out")
    for path in (part, *part.rglob("*")):
        os.chown(path, STRANGER, STRANGER)
    with pytest.raises(OutputError, match=r"belongs to the user nobody \(65534\)"):
        merged(models / "small" / "recipe.yml", tmp_path / "out", restart=restart)
    assert not (tmp_path / "out").exists()


def test_another_user_is_told_by_the_effective_id(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alnico import folders

    part = interrupted(models / "small" / "recipe.yml", tmp_path / "out")
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    monkeypatch.setattr(folders, "_sample_file", lambda *_: None)
    with pytest.raises(OutputError, match=f"{part} belongs to"):
        merged(models / "small" / "recipe.yml", tmp_path / "out")


def test_a_file_system_without_owners_or_modes_is_worked_on(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As FAT, or a network disk that gives all files to one user: what is made there looks like that, too."""
    real_fstat, real_stat = os.fstat, os.stat

    def of_another(status: os.stat_result) -> SimpleNamespace:
        fields = {name: getattr(status, name) for name in dir(status) if name.startswith("st_")}
        return SimpleNamespace(**{**fields, "st_mode": status.st_mode | 0o777, "st_uid": status.st_uid + 7})

    monkeypatch.setattr(os, "fstat", lambda *a, **k: of_another(real_fstat(*a, **k)))
    monkeypatch.setattr(os, "stat", lambda *a, **k: of_another(real_stat(*a, **k)))
    interrupted(models / "small" / "recipe.yml", tmp_path / "out")
    assert merged(models / "small" / "recipe.yml", tmp_path / "out").resumed == 2
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_unfinished_work_is_closed_to_others_and_the_output_has_the_modes_of_the_umask(
    umask: int, name: str, models: Path, tmp_path: Path
) -> None:
    modes: set[int] = set()
    part = tmp_path / f".{name}.alnico-part"

    def seen(event: Event) -> None:
        if isinstance(event, TensorDone):
            modes.add(part.stat().st_mode & 0o777)

    before = os.umask(umask)
    try:
        merged(models / "small" / "recipe.yml", tmp_path / name, watch=seen)
        assert modes == {0o700}
        interrupted(models / "small" / "recipe.yml", tmp_path / f"again-{name}")
        assert merged(models / "small" / "recipe.yml", tmp_path / f"again-{name}").resumed == 2
    finally:
        os.umask(before)
    for out in (tmp_path / name, tmp_path / f"again-{name}"):
        files = [p for p in (out, *out.rglob("*")) if p.is_file()]
        assert {p.stat().st_mode & 0o777 for p in files} == {0o666 & ~umask}
        if name == "out":
            assert out.stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_folder_that_gives_its_group_to_what_is_in_it_gives_it_to_the_output(
    models: Path, tmp_path: Path
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o2775)
    merged(models / "small" / "recipe.yml", shared / "out")
    assert (shared / "out").stat().st_mode & stat.S_ISGID


@pytest.mark.parametrize("command", ["merge", "combine"])
def test_a_folder_put_in_the_place_of_the_unfinished_one_is_not_written_nor_removed(
    command: str, models: Path, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    for name in (
        "model/config.json",
        "model/mine.txt",
        "factors/0.npz",
        "factors/1.npz",
        "journal.jsonl",
        "published.json",
    ):
        (victim / name).parent.mkdir(parents=True, exist_ok=True)
        (victim / name).write_text("mine")
    part = tmp_path / ".out.alnico-part"
    before = everything(victim)

    def swap() -> None:
        if not part.is_symlink():
            part.rename(tmp_path / "moved")
            part.symlink_to(victim)

    def watch(event: Event) -> None:
        if isinstance(event, TensorDone):
            swap()

    def run() -> None:
        if command == "merge":
            merged(models / "small" / "recipe.yml", tmp_path / "out", watch=watch)
        else:
            combine([models / "adapter-0", models / "adapter-1"], tmp_path / "out", watch=lambda *_: swap())

    with pytest.raises(alnico.errors.AlnicoError):
        run()
    assert everything(victim) == before
    assert part.is_symlink()
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_replaced_while_its_lock_is_taken_is_not_worked_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link to the folder that was checked leads to the same lock, for now."""
    fcntl = pytest.importorskip("fcntl")
    part = tmp_path / ".out.alnico-part"
    lock = fcntl.flock

    def replaced(descriptor: int, how: int) -> None:
        lock(descriptor, how)
        part.rename(tmp_path / "moved")
        part.symlink_to(tmp_path / "moved")

    monkeypatch.setattr(fcntl, "flock", replaced)
    with pytest.raises(OutputError, match="is a link"), PartDirectory(tmp_path / "out"):
        pass


def test_what_was_replaced_is_not_published(tmp_path: Path) -> None:
    with PartDirectory(tmp_path / "out") as part:
        part.path.rename(tmp_path / "moved")
        (part.path / "model").mkdir(parents=True)
        (tmp_path / "moved" / "model").mkdir()
        with pytest.raises(OutputError, match="was renamed or replaced by another process"):
            part.publish(None, False)
    assert not (tmp_path / "out").exists()


def test_a_lock_cannot_be_opened_by_others_where_the_folder_can(tmp_path: Path) -> None:
    """Versions before made the folder with the mode of the umask; it is taken up."""
    (tmp_path / ".out.alnico-part").mkdir(0o755)
    before = os.umask(0)
    try:
        with PartDirectory(tmp_path / "out") as part:
            assert (part.path / "lock").stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(before)


def test_the_folder_of_stages_is_checked_before_anything_in_it_is_looked_at(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "_check_disk", lambda *_: pytest.fail("the files of a stranger were counted"))
    (tmp_path / ".out.alnico-stages").symlink_to(models)
    with pytest.raises(OutputError, match="is a link"):
        alnico.merge_documents(models / "chain.yml", tmp_path / "out")


@pytest.mark.parametrize("what", ["link", "another's"])
def test_an_old_model_that_no_run_of_ours_set_aside_is_neither_removed_nor_renamed(
    what: str, models: Path, tmp_path: Path
) -> None:
    if what == "another's" and os.geteuid() != 0:
        pytest.skip("only root can make files of another user")
    interrupted(models / "small" / "recipe.yml", tmp_path / "out")
    old, victim = tmp_path / ".out.alnico-old", tmp_path / "victim"
    victim.mkdir()
    (victim / "config.json").write_text("mine")
    if what == "link":
        old.symlink_to(victim)
    else:
        shutil.copytree(victim, old)
        os.chown(old, STRANGER, STRANGER)
    with pytest.raises(OutputError, match=r"\.alnico-old .*(belongs to the user nobody|is a link)"):
        merged(models / "small" / "recipe.yml", tmp_path / "out")
    with pytest.raises(OutputError, match=r"\.alnico-old "):
        PartDirectory(tmp_path / "out").check()
    assert not (tmp_path / "out").exists()
    assert everything(victim) == {"config.json": b"mine"}
    assert os.path.lexists(old)


@as_root
def test_a_second_merge_of_a_stranger_is_not_compared(models: Path, tmp_path: Path) -> None:
    merged(models / "small" / "recipe.yml", tmp_path / "out")
    again = tmp_path / ".out.alnico-again"
    shutil.copytree(tmp_path / "out", again)
    os.chown(again, STRANGER, STRANGER)
    with pytest.raises(OutputError, match=r"\.out\.alnico-again.*belongs to the user nobody"):
        alnico.reproduce(tmp_path / "out")
    assert again.exists()


@contextmanager
def as_user(user: int) -> Iterator[None]:
    """Act as another user, in this process."""
    os.setegid(user)
    os.seteuid(user)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder like /tmp, which every user reaches."""
    with tempfile.TemporaryDirectory(prefix="alnico-test-", dir="/tmp") as folder:
        Path(folder).chmod(0o1777)
        yield Path(folder)


def read_by_all(recipe: Path) -> Path:
    for path in recipe.parent.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return recipe


@as_root
def test_in_a_sticky_folder_an_output_of_another_user_is_refused_before_the_merge(shared: Path) -> None:
    recipe = read_by_all(made_recipe(shared))
    merged(recipe, shared / "out")  # and kernels are compiled
    before = everything(shared / "out")
    with as_user(STRANGER):
        begun: list[Event] = []
        with pytest.raises(OutputError) as caught:
            merged(recipe, shared / "out", overwrite=True, watch=begun.append)
        assert str(caught.value) == (
            f"{shared}/out: exists and belongs to the user root (0); in {shared}, which has the sticky bit, only they can "
            "rename it. Choose another output."
        )
        assert not begun
        merged(recipe, shared / "mine")
        merged(recipe, shared / "mine", overwrite=True)
    assert everything(shared / "out") == before
    assert (shared / "mine").stat().st_uid == STRANGER
    assert not list(shared.glob(".*"))


@as_root
def test_an_output_that_we_may_not_write_is_refused_before_the_merge(shared: Path) -> None:
    recipe = read_by_all(made_recipe(shared))
    with as_user(STRANGER):
        (shared / "own").mkdir()
        merged(recipe, shared / "own" / "out")
        (shared / "own" / "out").chmod(0o555)
        with pytest.raises(
            OutputError, match=r"you cannot write into it \(its mode is 0555\), so it cannot be replaced"
        ):
            merged(recipe, shared / "own" / "out", overwrite=True)
        (shared / "own" / "out").chmod(0o755)
        merged(recipe, shared / "own" / "out", overwrite=True)


@as_root
def test_unfinished_work_of_another_user_that_we_may_not_look_into_is_told_by_its_owner(shared: Path) -> None:
    recipe = read_by_all(made_recipe(shared))
    (shared / ".out.alnico-part").mkdir(0o700)
    (shared / ".other.alnico-part-gone").mkdir(0o700)
    with as_user(STRANGER):
        with pytest.raises(OutputError, match=r"part belongs to the user root \(0\)"):
            merged(recipe, shared / "out")
        merged(recipe, shared / "other")
    assert sorted(p.name for p in shared.glob(".*")) == [".other.alnico-part-gone", ".out.alnico-part"]


@as_root
def test_a_replaced_model_of_another_user_that_was_not_removed_is_removed(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = models / "small" / "recipe.yml"
    merged(recipe, tmp_path / "out")
    (tmp_path / "out" / "link").symlink_to("config.json")
    for path in (tmp_path / "out", *(tmp_path / "out").iterdir()):
        os.chown(path, STRANGER, STRANGER, follow_symlinks=False)

    def killed(_part: PartDirectory) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PartDirectory, "remove", killed)
        with pytest.raises(KeyboardInterrupt):
            merged(recipe, tmp_path / "out", overwrite="anything")
    assert (tmp_path / ".out.alnico-part" / "model" / "link").is_symlink()
    merged(recipe, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").stat().st_uid == 0
    assert not list(tmp_path.glob(".*"))


def test_every_output_of_a_file_is_looked_at_before_the_first_is_made(models: Path, tmp_path: Path) -> None:
    pair = tmp_path / "pair.yml"
    pair.write_text(
        "".join(
            f"---\nname: {n}\nmerge_method: linear\nmodels: [{models}/tuned-0, {models}/base]\n"
            for n in ("one", "two")
        )
    )
    (tmp_path / ".out.alnico-stages").mkdir(0o700)  # of a run that was killed
    (tmp_path / "out" / ".two.alnico-part").mkdir(parents=True)
    (tmp_path / "out" / ".two.alnico-part").chmod(0o777)
    with pytest.raises(OutputError, match=r"\.two\.alnico-part can be written by others"):
        alnico.merge_documents(pair, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [".two.alnico-part"]


@as_root
def test_another_user_cannot_hold_our_lock(shared: Path) -> None:
    recipe = read_by_all(made_recipe(shared))
    seen: list[str] = []

    def watch(event: Event) -> None:
        if isinstance(event, TensorDone):
            with as_user(STRANGER):
                try:
                    os.close(os.open(shared / ".out.alnico-part" / "lock", os.O_RDONLY))
                except PermissionError:
                    seen.append("refused")

    merged(recipe, shared / "out", watch=watch)
    assert seen


@as_root
def test_an_ordinary_user_without_a_home_merges_verifies_and_analyzes(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = read_by_all(made_recipe(shared))
    models = [shared / "tuned-0"], shared / "base"
    monkeypatch.setattr("alnico.analysis.report.has_report", lambda: False)  # pictures take seconds
    merged(recipe, shared / "by-root")
    alnico.verify(
        shared / "by-root", against_inputs=True
    )  # kernels are compiled and modules imported, which only root may reach
    alnico.reproduce(shared / "by-root")
    alnico.analyze(models[0], base=models[1], out=shared / "report-by-root")
    for name in ("ALNICO_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/nonexistent")
    with as_user(STRANGER):
        merged(recipe, shared / "out")
        alnico.verify(shared / "out", against_inputs=True)
        alnico.verify(shared / "by-root")
        alnico.reproduce(shared / "out")
        alnico.analyze(models[0], base=models[1], out=shared / "report")
        with pytest.raises(OutputError, match="base cannot be written to"):
            merged(recipe, shared / "base" / "out")
    assert not list(shared.glob(".*"))
    assert everything(shared / "out").keys() == everything(shared / "by-root").keys()
    assert not Path("/nonexistent").exists()


def test_where_folders_cannot_be_opened_and_have_no_owners_names_are_worked_with(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows."""
    from alnico import folders
    from alnico.checkpoint import durable
    from alnico.output import staging

    for place in (folders, staging):
        monkeypatch.setattr(place, "HAS_DESCRIPTORS", False)
        monkeypatch.setattr(place, "user_id", lambda: None)
    monkeypatch.setattr(durable, "_renameat2", lambda: None)
    interrupted(models / "small" / "recipe.yml", tmp_path / "out")
    assert merged(models / "small" / "recipe.yml", tmp_path / "out").resumed == 2
    merged(models / "small" / "recipe.yml", tmp_path / "out", overwrite=True)
    combine([models / "adapter-0", models / "adapter-1"], tmp_path / "combined")
    alnico.reproduce(tmp_path / "out")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("command", ["merge", "analyze"])
def test_unfinished_work_of_an_archive_is_not_taken_up(models: Path, tmp_path: Path, command: str) -> None:
    """An archive of a stranger gives the files to who unpacks it, with any modes and times."""
    kind, run = COMMANDS[command]
    (tmp_path / "theirs").mkdir()
    out, place = tmp_path / "out", tmp_path / f".out.alnico-{kind}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "alnico.engine.run.complete_output"
            if kind == "part"
            else "alnico.analysis.analyze.write_analysis",
            _interrupted,
        )
        with pytest.raises(KeyboardInterrupt):
            run(models, out)
    assert len((place / "journal.jsonl").read_text().splitlines()) > 1
    shutil.copytree(place, tmp_path / "copy", copy_function=shutil.copy2)
    shutil.rmtree(place)
    os.rename(tmp_path / "copy", place)
    with pytest.raises(
        OutputError,
        match=rf"{place}: holds an unfinished {'merge' if kind == 'part' else 'analysis'} that was not started here",
    ):
        run(models, out)
    assert not out.exists() or not any(out.iterdir())


def _interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_no_other_process(
    code: int, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lustre, some disks of networks and FUSE have no flock; some have no locks at all."""

    def none(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", none)
    merged(models / "small" / "recipe.yml", tmp_path / "out")
    with PartDirectory(tmp_path / "locked"):
        held = f"import fcntl; fcntl.lockf(open({str(tmp_path / '.locked.alnico-part/lock')!r}, 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        assert b"BlockingIOError" in subprocess.run([sys.executable, "-c", held], capture_output=True).stderr
    monkeypatch.setattr(fcntl, "lockf", none)
    assert (
        everything(merged(models / "small" / "recipe.yml", tmp_path / "again").path).keys()
        == everything(tmp_path / "out").keys()
    )


def test_an_old_model_that_a_crash_set_aside_is_not_removed_without_a_word(
    models: Path, tmp_path: Path
) -> None:
    """Between two renames a crash leaves the old model beside its name; somebody has removed what was unfinished since then."""
    shutil.copytree(models / "base", tmp_path / ".out.alnico-old")
    with pytest.raises(OutputError, match="exists and is not empty"):
        merged(models / "small" / "recipe.yml", tmp_path / "out")
    assert everything(tmp_path / "out") == everything(models / "base")


@as_root
def test_an_output_may_go_into_a_folder_that_may_not_be_read() -> None:
    """A drop box: mode 0333. The capability by which root reads everything is given up for the test."""
    code = (
        "import os, sys, alnico; from small_merges import merged; from pathlib import Path\n"
        "merged(Path(sys.argv[1]), Path('warm')); os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "merged(Path('small/recipe.yml'), Path('box/out'))"
    )
    place = Path(tempfile.mkdtemp(prefix="alnico-box-"))
    try:
        place.chmod(0o755)
        made_recipe(place / "small")
        for path in place.rglob("*"):
            path.chmod(0o755)
        (place / "box").mkdir()
        os.chown(place / "box", STRANGER, STRANGER)
        (place / "box").chmod(0o333)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", code, place / "small/recipe.yml"],
            cwd=place,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert (place / "box/out/alnico.lock.json").exists()
    finally:
        shutil.rmtree(place)
