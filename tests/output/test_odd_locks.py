"""Files that alnico wrote and somebody changed: each odd value is an error of its class, in every command that reads the file."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import alnico
from alnico.checkpoint.lineage import LOCK, lineage_of
from alnico.checkpoint.open_model import open_model
from alnico.errors import AlnicoError, ModelError, UncheckedError
from alnico.output.lock import read_lock
from alnico.output.staging import is_published
from alnico.output.validate import check_finished, local_paths
from made import family

Place = tuple[str | int, ...]
RAW = (
    "Infinity",
    "-Infinity",
    "NaN",
    "1e400",
    "1" + "0" * 5_000,
    '{"a": 1, "a": 2}',
    "[" * 98 + "]" * 98,
    "[" * 100_000,
)
ODD = (
    10**400,
    -1,
    True,
    None,
    "",
    "x" * 5_000,
    "../../x",
    "\ud800",
    "\x1b[31m",
    [],
    {},
    [None],
    {"a": None},
    1.5,
    2**63,
    "nan",
    "Infinity",
)
HERE = "@here@"


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge, with a stage that leads to it."""
    folder = tmp_path_factory.mktemp("locks")
    base, (one, two) = family(folder, 2, layers=1)
    text = f"name: first\nmerge_method: linear\nmodels: [{one}, {two}]\n---\nmerge_method: linear\nmodels: [first, {base}]\n"
    alnico.merge_documents(text, folder / "out")
    return folder / "out"


def places(value: Any, above: Place = ()) -> Iterator[Place]:
    """All places in a JSON value, of many equal ones two."""
    yield above
    inner = (
        list(value.items())[:16]
        if isinstance(value, dict)
        else list(enumerate(value))[:2]
        if isinstance(value, list)
        else []
    )
    if above and above[-1] in ("output", "tensors", "files"):
        inner = inner[:2]
    for key, held in inner:
        yield from places(held, (*above, key))


def changed(value: Any, place: Place, new: Any) -> Any:
    if not place:
        return new
    found = copy.deepcopy(value)
    inside = found
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = new
    return found


def texts(value: Any) -> Iterator[tuple[Place, str]]:
    """The value with some odd ones at each place: all of them over all places."""
    for i, place in enumerate(places(value)):
        for odd in (ODD[i % len(ODD)], ODD[(i + 5) % len(ODD)]):
            yield place, json.dumps(changed(value, place, odd))
        yield place, json.dumps(changed(value, place, HERE)).replace(f'"{HERE}"', RAW[i % len(RAW)])


def outcome(call: Callable[[], object]) -> AlnicoError | None:
    try:
        call()
    except AlnicoError as error:
        return error
    return None


def test_a_lock_with_an_odd_value_anywhere_is_read_or_refused(merged: Path, tmp_path: Path) -> None:
    whole = json.loads((merged / LOCK).read_text())
    count = 0
    for place, text in texts(whole):
        (tmp_path / LOCK).write_text(text)
        for call in (lambda: read_lock(tmp_path), lambda: local_paths(tmp_path)):
            found = outcome(call)
            assert found is None or isinstance(found, (ModelError, UncheckedError)), place
        count += 1
    assert count > 200


@pytest.mark.parametrize("raw", RAW, ids=lambda raw: raw[:9])
@pytest.mark.parametrize("key", ["arithmetic", "seed", "recipe", "inputs", "output", "files"])
def test_a_number_that_is_none_in_a_lock_is_refused(merged: Path, tmp_path: Path, key: str, raw: str) -> None:
    whole = json.loads((merged / LOCK).read_text())
    (tmp_path / LOCK).write_text(json.dumps(changed(whole, (key,), HERE)).replace(f'"{HERE}"', raw))
    assert isinstance(outcome(lambda: read_lock(tmp_path)), ModelError)


CHANGES: list[tuple[Place, Any]] = [
    (("arithmetic",), True), (("seed",), -(2**70)), (("output", 0, "shape"), [-16, 16]), (("output", 0, "shape"), "16"),
    (("output", 0, "digest"), None), (("files", 0, "size"), -1), (("files", 0, "size"), True), (("files", 0), "../../etc/passwd"),
    (("files",), {"../up": {"size": 1, "digest": "0"}}), (("files",), {"/etc/passwd": {"size": 1, "digest": "0"}}),
    (("inputs", 0, "lock", "seed"), None), (("inputs", 0, "lock", "inputs"), 5), (("inputs", 1, "repositories"), 5),
    (("inputs", 1, "repositories"), [{"repository": "other/model", "commit": 40 * "a"}]),
    (("inputs", 1, "repositories"), [{"repository": "../x", "commit": 40 * "a"}]),
    (("inputs", 1, "tensors"), [1]), (("recipe", "models"), [1e308]), (("recipe", "merge_method"), ["linear"]), (("hash",), {"a": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("place", "new"), CHANGES, ids=range(len(CHANGES)))
def test_every_command_says_that_a_lock_is_damaged(
    merged: Path, tmp_path: Path, place: Place, new: Any
) -> None:
    out = tmp_path / "out"
    shutil.copytree(merged, out)
    whole = json.loads((out / LOCK).read_text())
    named = tuple(
        next(iter(whole[place[0]])) if i == 1 and key == 0 and isinstance(whole[place[0]], dict) else key
        for i, key in enumerate(place)
    )
    (out / LOCK).write_text(json.dumps(changed(whole, named, new)))
    calls: dict[str, Callable[[], object]] = {
        "verify": lambda: alnico.verify(out, against_inputs=True),
        "reproduce": lambda: alnico.reproduce(out),
        "push": lambda: (check_finished(out), local_paths(out)),
        "sign": lambda: alnico.sign(out, "nowhere.pem"),
    }
    found = {name: outcome(call) for name, call in calls.items()}
    for name in ("verify", "reproduce"):
        assert isinstance(found[name], (ModelError, UncheckedError)), name
    assert found["sign"] is not None  # there is no such key
    with open_model(out) as opened:
        lineage_of(opened)  # what a lock says of licences is taken or left
    alnico.plan(
        {"merge_method": "linear", "models": [str(out), str(out / "model.safetensors")], "unrelated": "allow"}
    )


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "5", "{}", '{"witness": 1e400}', '{"witness": NaN}', "[" * 100_000, "1" * 5_000, "\x00"],
)
def test_a_note_of_what_was_published_that_is_none_is_no_note(
    merged: Path, tmp_path: Path, text: str
) -> None:
    (tmp_path / "published.json").write_text(text)
    assert not is_published(merged, tmp_path / "published.json")
