"""The journal: its lines are checked, what changed is named, and an output that was published is known again."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

import alnico
from alnico.checkpoint import durable
from alnico.checkpoint.file_model import FileModel
from alnico.errors import OutputError, RunError
from alnico.events import Event, TensorDone
from alnico.output.journal import JournalLines, read_lines
from alnico.output.staging import PartDirectory
from os_calls import watched
from small_merges import everything, interrupted, made_recipe, merged


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return made_recipe(tmp_path)


def journal_of(recipe: Path, out: Path) -> Path:
    """The journal of a merge that was interrupted after its second tensor."""
    return interrupted(recipe, out) / "journal.jsonl"


@pytest.mark.parametrize(
    ("damage", "left"),
    [
        (lambda text: text[:-9], 1),  # cut off by a crash
        (lambda text: text + "\0" * 300, 2),  # a page that was made and never written
        (lambda text: text.replace('"digest": "', '"digest": "0', 1), 0),  # a bit that is not what it was
        (lambda text: text + '{"tensor": "second"}\n', 2),
    ],
)
def test_a_line_that_is_not_what_was_written_ends_what_is_known(
    damage, left: int, recipe: Path, tmp_path: Path
) -> None:
    journal = journal_of(recipe, tmp_path / "out")
    journal.write_text(damage(journal.read_text()))
    assert merged(recipe, tmp_path / "out").resumed == left
    assert everything(tmp_path / "out") == everything(merged(recipe, tmp_path / "whole").path)


@pytest.mark.parametrize(
    "first", ["", "no JSON", "[]", '{"fingerprint": {}}', '{"journal": 3, "fingerprint": {}, "check": "0"}']
)
def test_a_journal_that_is_damaged_or_of_another_form_is_refused_and_begun_anew_on_demand(
    first: str, recipe: Path, tmp_path: Path
) -> None:
    journal = journal_of(recipe, tmp_path / "out")
    journal.write_text("\n".join([first, *journal.read_text().split("\n")[1:]]))
    with pytest.raises(OutputError) as caught:
        merged(recipe, tmp_path / "out")
    if first == '{"fingerprint": {}}':  # as the versions before wrote it
        assert str(caught.value) == (
            f"{journal}: is a journal of form 1, this version of alnico writes form 3. "
            "Finish with the version that began it, or pass --restart to start over."
        )
    else:
        assert str(caught.value) == (
            f"{journal}: is damaged; expected the journal of an unfinished merge. Pass --restart to start over."
        )
    assert merged(recipe, tmp_path / "out", restart=True).resumed == 0


def test_a_journal_that_cannot_be_read_is_an_error_that_names_it(recipe: Path, tmp_path: Path) -> None:
    journal = journal_of(recipe, tmp_path / "out")

    def fails(call, make):
        if call.name == "open" and call.path == journal:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return make()

    with watched(tmp_path, fails), pytest.raises(RunError) as caught:
        merged(recipe, tmp_path / "out")
    assert str(caught.value) == (
        f"{journal}: cannot be read (Input/output error). Check the disk, or pass --restart to start over."
    )
    assert merged(recipe, tmp_path / "out").resumed == 2


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        ({"recipe": {"seed": 1, "x": 1}}, {"recipe": {"seed": 2, "x": 1}}, "the seed (it was 1, now it is 2)"),
        ({"recipe": {"seed": 1, "x": 1}}, {"recipe": {"seed": 2, "x": 2}}, "the recipe, the seed (it was 1, now it is 2)"),
        ({"alnico": "0.1"}, {"alnico": "0.2"}, "the version of alnico (0.1 began it, this is 0.2)"),
        ({"arithmetic": 1}, {"arithmetic": 2}, "the version of alnico's arithmetic"),
        (
            {"inputs": [{"model": "a", "files": [{"file": "x", "size": 1}, {"file": "y", "size": 1}]}]},
            {"inputs": [{"model": "a", "files": [{"file": "x", "size": 1}, {"file": "y", "size": 2}]}]},
            "an input file (a: y; its size, time, commit or header)",
        ),
        ({"inputs": [{"model": "a", "files": []}]}, {"inputs": [{"model": "b", "files": []}]}, "an input file (size, time or header)"),
        ({"plan": "x"}, {"plan": "y"}, "the plan (tensors or shard sizes)"),
    ],
)  # fmt: skip
def test_what_changed_since_is_named(before: dict, now: dict, words: str, tmp_path: Path) -> None:
    JournalLines(tmp_path / "journal.jsonl", before).close()
    assert read_lines(tmp_path / "journal.jsonl", before, "merge") == []
    with pytest.raises(OutputError) as caught:
        read_lines(tmp_path / "journal.jsonl", now, "merge")
    assert str(caught.value) == (
        f"{tmp_path}: holds an unfinished merge; changed since it began: {words}. "
        "Undo the change to resume it, or pass --restart to start over."
    )


def test_another_seed_or_version_is_noticed_by_the_merge(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(recipe, tmp_path / "out")
    with pytest.raises(OutputError, match=r"changed since it began: the seed \(it was 0, now it is 3\)\."):
        merged(recipe, tmp_path / "out", seed=3)
    version = alnico.__version__
    monkeypatch.setattr(sys.modules["alnico.plan.job"], "__version__", "99")
    with pytest.raises(
        OutputError,
        match=rf"changed since it began: the version of alnico \({version} began it, this is 99\)\.",
    ):
        merged(recipe, tmp_path / "out")


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_a_merge_killed_after_its_output_got_its_name_is_done_when_the_command_is_given_again(
    name: str, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(_part: PartDirectory) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PartDirectory, "remove", killed)
        with pytest.raises(KeyboardInterrupt):
            alnico.merge(recipe, tmp_path / name)
    with monkeypatch.context() as patch:
        patch.setattr(FileModel, "read_into", lambda *_: pytest.fail("a tensor was read again"))
        result = alnico.merge(recipe, tmp_path / name)
    assert result.resumed == len(result.digests) == len(result.plan.jobs)
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(OutputError, match="exists and is not empty"):
        alnico.merge(recipe, tmp_path / name)
    assert result.digests == alnico.merge(recipe, tmp_path / f"again-{name}").digests


@pytest.mark.parametrize("can_exchange", [True, False])
@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_an_old_model_is_replaced_whole_and_its_files_go_with_it(
    can_exchange: bool, name: str, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_exchange:
        monkeypatch.setattr(durable, "_renameat2", lambda: None)
    alnico.merge(recipe, tmp_path / f"whole-{name}", seed=1)
    alnico.merge(recipe, tmp_path / name)
    if name == "out":
        (tmp_path / "out" / "LICENSE-of-the-old.txt").write_text("goes")
    alnico.merge(recipe, tmp_path / name, seed=1, overwrite=True)
    assert alnico.diff(tmp_path / name, tmp_path / f"whole-{name}").is_equal
    assert not (tmp_path / "out" / "LICENSE-of-the-old.txt").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_crash_between_two_renames_gives_the_old_model_its_name_back(recipe: Path, tmp_path: Path) -> None:
    before = everything(merged(recipe, tmp_path / "out").path)
    interrupted(recipe, tmp_path / "other")
    (tmp_path / ".other.alnico-part").rename(tmp_path / ".out.alnico-part")
    (tmp_path / "out").rename(tmp_path / ".out.alnico-old")
    with pytest.raises(OutputError, match="exists and is not empty"):
        merged(recipe, tmp_path / "out")
    assert everything(tmp_path / "out") == before
    assert merged(recipe, tmp_path / "out", overwrite=True).resumed == 2


def test_what_came_to_stand_under_the_outputs_name_is_not_replaced(recipe: Path, tmp_path: Path) -> None:
    for name in ("out", "out.safetensors"):

        def watch(event: Event, name: str = name) -> None:
            if isinstance(event, TensorDone) and not (tmp_path / name).exists():
                (tmp_path / name).write_text("mine")

        with pytest.raises(
            OutputError,
            match=f"{name}: was created while merging. The finished model is in .*; move it yourself",
        ):
            alnico.merge(recipe, tmp_path / name, watch=watch)
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
        assert alnico.merge(recipe, tmp_path / name).resumed == 5


def test_side_files_of_an_earlier_run_are_not_carried(recipe: Path, tmp_path: Path) -> None:
    """The first run was stopped after its side files; meanwhile the base has lost one."""
    extra = tmp_path / "base" / "notes.txt"
    extra.write_text("gone soon")

    def fails(call, make):
        if call.name == "replace" and call.path.suffix == ".unfinished":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return make()

    with watched(tmp_path, fails), pytest.raises(RunError):
        merged(recipe, tmp_path / "out")
    extra.unlink()
    assert merged(recipe, tmp_path / "out").resumed == 5
    assert not (tmp_path / "out" / "notes.txt").exists()


def test_nothing_has_a_header_before_it_is_whole(recipe: Path, tmp_path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    interrupted(recipe, tmp_path / "out")
    files = list((tmp_path / ".out.alnico-part" / "model").iterdir())
    assert {file.suffix for file in files} == {".unfinished"}
    for file in files:
        with pytest.raises(SafetensorError):
            load_file(file)
        with pytest.raises(alnico.errors.ModelError):
            alnico.open_model(file)


def test_a_stage_killed_between_its_output_and_its_mark_is_not_made_again(
    recipe: Path, tmp_path: Path
) -> None:
    chain = recipe.with_name("chain.yml")
    chain.write_text(
        f"name: one\nmerge_method: linear\nmodels: [{tmp_path}/tuned-0, {tmp_path}/tuned-1]\nunrelated: allow\n---\n"
        f"merge_method: linear\nmodels: [one, {tmp_path}/base]\nunrelated: allow\n"
    )
    alnico.merge_documents(chain, tmp_path / "whole")

    def watch(event: Event) -> None:
        if isinstance(event, alnico.events.Finished):
            raise KeyboardInterrupt

    begun = []
    with pytest.raises(KeyboardInterrupt):
        alnico.merge_documents(chain, tmp_path / "out", watch=watch)
    alnico.merge_documents(
        chain,
        tmp_path / "out",
        watch=lambda e: begun.append(e) if isinstance(e, alnico.events.Started) else None,
    )
    assert len(begun) == 1
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")
    shutil.rmtree(tmp_path / "out")


def test_the_journal_is_json_lines_that_a_person_can_read(recipe: Path, tmp_path: Path) -> None:
    first, *lines = map(json.loads, journal_of(recipe, tmp_path / "out").read_text().splitlines())
    assert first["journal"] == 3
    assert {"recipe", "alnico", "arithmetic", "plan", "inputs"} <= first["fingerprint"].keys()
    assert [sorted(line) for line in lines if "tensor" in line] == [
        ["check", "digest", "inputs", "tensor"]
    ] * 2
