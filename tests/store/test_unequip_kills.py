"""`unequip` killed at any call of the system: the model has the vector or not, and the same call works afterwards."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

import alnico
import made
import made_vectors
from alnico.errors import AlnicoError, ModelError
from os_calls import Counting, watched


def tensors_of(folder: Path) -> dict[str, bytes]:
    found = made.read_file(folder / "model.safetensors")
    return {name: made.encoded(dtype, values) for name, (dtype, values) in found.items()}


def killed_at(out: Path, number: int) -> int:
    """Take the vector off in a process that is killed at a call; returns its exit status."""

    def dies(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        code = 1
        try:
            with watched(out.parent, Counting(number, dies)):
                alnico.unequip(out, "sql", threads=1)
            code = 0
        except AlnicoError:
            code = 2
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.slow
@pytest.mark.parametrize("places", [12, pytest.param(60, marks=pytest.mark.nightly)])
def test_a_kill_leaves_the_model_with_the_vector_or_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, places: int
) -> None:
    base, (tuned,) = made.family(tmp_path / "models", 1, layers=1)
    monkeypatch.setenv("ALNICO_STORE", str(tmp_path / "store"))
    start, after = (made.read_file(p / "model.safetensors") for p in (base, tuned))
    made_vectors.write_vector(
        tmp_path / "store" / "vectors" / "sql" / "1", start, after, dict.fromkeys(after, "sparse"), name="sql"
    )
    equipped = tmp_path / "equipped"
    alnico.equip(base, ["sql:0.5"], equipped)
    work = tmp_path / "work"
    out = work / "out"

    def fresh() -> None:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(equipped, out)

    fresh()
    with watched(work, counting := Counting(-1, lambda _call, make: make())):
        alnico.unequip(out, "sql", threads=1)
    old, new = tensors_of(equipped), tensors_of(out)
    assert new == tensors_of(base) != old
    states = set()
    for number in range(0, counting.calls, max(counting.calls // places, 1)):
        fresh()
        assert killed_at(out, number) == -signal.SIGKILL, f"call {number}"
        found = tensors_of(out)
        assert found in (old, new), f"call {number}"
        alnico.verify(out)
        states.add(found == new)
        if found == old:
            alnico.unequip(out, "sql")
        else:
            with pytest.raises(ModelError, match="has no task vector 'sql'"):
                alnico.unequip(out, "sql")
        assert tensors_of(out) == new
        assert [path.name for path in work.iterdir()] == ["out"] or found == new, f"call {number}"
    assert states == {True, False}
