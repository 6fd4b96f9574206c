"""A merge into a URL that is killed before any operation there leaves the old model, none, or the new one, and goes on."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

import alnico
from alnico.errors import HubError
from alnico.output import publish_remote, remote_target, shard_uploads
from disk_folder import DiskStore
from killing import is_killed
from small_merges import everything, made_recipe, merged

URL = "s3://bucket/models/out"


class Place:
    """A store, and what a merge gives there."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ALNICO_CACHE_DIR", str(tmp_path / "cache"))
        monkeypatch.setattr(shard_uploads, "PART_BYTES", 128)
        monkeypatch.setattr(publish_remote, "MOST_PUT_BYTES", 1500)
        self.tmp_path = tmp_path
        self.recipe = made_recipe(tmp_path)
        self.store = DiskStore(tmp_path / "store")
        self.out = tmp_path / "store" / "models" / "out"
        monkeypatch.setattr(remote_target, "open_remote_folder", self.store.open)
        merged(self.recipe, tmp_path / "whole")
        self.expected = everything(tmp_path / "whole")
        self.old: dict[str, bytes] = {}

    def has_old_model(self) -> None:
        """An older output, with other weights in more files, which the new one replaces."""
        text = self.recipe.read_text()
        self.recipe.write_text(text.replace("density: 0.5", "density: 0.9"))
        alnico.merge(self.recipe, self.tmp_path / "old", max_shard_size=100)
        self.recipe.write_text(text)
        self.old = everything(self.tmp_path / "old")
        self.begins_again()

    def begins_again(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        if self.old:
            shutil.copytree(self.tmp_path / "old", self.out)

    def operations(self) -> list[tuple[str, str]]:
        """The operations of a merge that nothing ends."""
        self.store.done.clear()
        merged(self.recipe, URL, overwrite=True)
        assert everything(self.out) == self.expected
        done = list(self.store.done)
        self.begins_again()
        return done

    def is_killed_before(self, number: int, url: str = URL) -> bool:
        def merge() -> None:
            count = 0

            def before(*_: str) -> None:
                nonlocal count
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)

            self.store.before = before
            merged(self.recipe, url, overwrite=True)

        return is_killed(merge)

    def check_what_is_there(self) -> str:
        """No half model: with a config, everything is of one of the models; the mark of a publication may be there, too."""
        found = everything(self.out)
        is_marked = found.pop(remote_target.MARKER, None) is not None
        if "config.json" not in found:
            assert is_marked or not found
            return "no model"
        if found == self.old:
            return "the old model"
        assert found == self.expected
        return "the new model"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(tmp_path, monkeypatch)


def goes_on(place: Place, **options: object) -> int:
    result = merged(place.recipe, URL, **options)
    assert everything(place.out) == place.expected
    # One that was begun a moment before the kill is in no journal, and has no parts.
    assert not any(list(upload.iterdir()) for upload in place.store.uploads() if upload.is_dir())
    assert not list((place.tmp_path / "cache" / "uploads").iterdir())
    return result.resumed


@pytest.mark.slow
@pytest.mark.parametrize(
    "has_old", [pytest.param(False, marks=pytest.mark.nightly, id="free"), pytest.param(True, id="overwrite")]
)
def test_a_kill_before_any_operation_leaves_no_half_model_and_is_taken_up(
    place: Place, has_old: bool
) -> None:
    if has_old:
        place.has_old_model()
    seen: dict[str, int] = {}
    operations = place.operations()
    assert {kind for kind, _ in operations} >= {"put", "delete", "start", "part", "complete"}
    for number in range(1, len(operations) + 1):
        assert place.is_killed_before(number)
        state = place.check_what_is_there()
        seen[state] = seen.get(state, 0) + 1
        is_publishing = remote_target.MARKER in everything(place.out)
        resumed = goes_on(place, overwrite=has_old and not is_publishing)
        assert resumed == 5 or not is_publishing
        place.begins_again()
        shutil.rmtree(place.tmp_path / "store" / ".uploads")
        (place.tmp_path / "store" / ".uploads").mkdir()
    print(len(operations), "kills:", seen)
    assert seen["no model"] > 5
    assert seen.get("the old model", 0) > 5 or not has_old
    assert seen["the new model"] >= 1


@pytest.mark.slow
def test_a_kill_leaves_a_file_whole_or_absent(place: Place) -> None:
    url, out = "s3://bucket/models/one.safetensors", place.tmp_path / "store" / "models" / "one.safetensors"
    place.store.done.clear()
    merged(place.recipe, url)
    expected = out.read_bytes()
    for number in range(1, len(place.store.done) + 1):
        out.unlink()
        assert place.is_killed_before(number, url)
        assert not out.exists()  # its completion is the last operation
        merged(place.recipe, url)
        assert out.read_bytes() == expected


def test_a_resumed_merge_sends_no_part_again(place: Place) -> None:
    def before(operation: str, _name: str) -> None:
        if operation == "put":
            raise HubError("the network is gone.")

    place.store.before = before
    with pytest.raises(HubError, match="the network is gone"):
        merged(place.recipe, URL)
    sent = [name for operation, name in place.store.done if operation == "part"]
    assert len(sent) > 3
    place.store.before = None
    place.store.done.clear()
    assert goes_on(place) == 5
    again = [name for operation, name in place.store.done if operation in ("part", "start")]
    assert not any(name.endswith(".safetensors") for name in again)
