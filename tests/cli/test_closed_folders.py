"""A folder of another user that cannot be looked into, and a working directory that is gone, are named by every command."""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
from pathlib import Path

import pytest

import alnico
from alnico.cli.main import main
from made import family

COMMANDS = {
    "inspect {0}/base": 4,
    "diff {0}/base {0}/base": 4,
    "plan {0}/r.yml": 3,
    "verify {0}/out": 11,
    "reproduce {0}/out": 11,
    "sign {0}/out --key k": 11,
    "push {0}/out a/b": 8,
    "analyze {1}/base --base {1}/tuned-0 --out {0}/report": 8,
    "lora fold {1}/base {0}/adapter mine/out": 8,
    "merge {1}/r.yml {0}/out": 3,
}


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become another user"
)
def test_a_folder_of_another_user_is_named_by_every_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in pkgutil.walk_packages(
        alnico.__path__, "alnico."
    ):  # the other user may not be able to read them
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    closed, read = tmp_path / "closed", tmp_path / "open"
    family(read, 1, dtype="F32")
    (read / "r.yml").write_text("merge_method: linear\nmodels: [base, tuned-0]\n")
    closed.mkdir(mode=0o700)
    (tmp_path / "mine").mkdir()
    os.chown(tmp_path / "mine", 65534, 65534)
    keep = os.open("/", os.O_RDONLY)
    os.chdir(tmp_path)  # reached by a descriptor, as the folders above are closed too
    try:
        for once in ("plan open/r.yml", "inspect open/base"):  # what is imported late
            monkeypatch.setattr(sys, "argv", ["alnico", *once.split()])
            with pytest.raises(SystemExit):
                main()
        found = {command: _as_another(command.format("closed", "open").split()) for command in COMMANDS}
    finally:
        os.fchdir(keep)
        os.close(keep)
    assert {command: code for command, (code, _) in found.items()} == COMMANDS
    for command, (_, text) in found.items():
        assert "Permission denied" in text, command
        assert "Traceback" not in text, command


def test_a_plan_needs_no_working_directory(tmp_path: Path) -> None:
    family(tmp_path, 1, dtype="F32")
    (tmp_path / "r.yml").write_text(f"merge_method: linear\nmodels: [{tmp_path}/base, {tmp_path}/tuned-0]\n")
    keep = os.open(".", os.O_RDONLY)
    (tmp_path / "gone").mkdir()
    os.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    try:
        code, text = _forked(["plan", str(tmp_path / "r.yml")])
    finally:
        os.fchdir(keep)
        os.close(keep)
    assert (code, "Traceback" in text) == (0, False), text


def _as_another(arguments: list[str]) -> tuple[int, str]:
    return _forked(arguments, 65534)


def _forked(arguments: list[str], user: int | None = None) -> tuple[int, str]:
    """Run a command in a process of its own; returns its exit code and what it printed."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        code = 99
        try:
            os.dup2(write, 1)
            os.dup2(write, 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
            if user is not None:
                os.setgroups([])
                os.setgid(user)
                os.setuid(user)
            sys.argv = ["alnico", *arguments]
            main()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 98
        except BaseException as error:
            print("Traceback", repr(error))
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(write)
    with open(read, encoding="utf-8") as file:
        text = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text
