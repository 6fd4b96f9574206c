"""What verify, reproduce and sign print, word for word, and their exit codes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import alnico
from checkpoint.test_signatures import keys
from made import family
from verification.test_verify import TIES, edit_lock, flip, hashes

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    family(tmp_path, 2, layers=1)
    alnico.merge(TIES, "out")


PASSED = "out: 11 tensors (7.3 kB) and 3 files as the lock says\n"


def test_verify_prints_a_line_for_each_thing_that_passed(run: Run) -> None:
    assert run("verify", "out") == (0, PASSED, "")
    private, _ = keys("k")
    assert run("sign", "out", "--key", str(private)) == (
        0,
        "out/model.sig: signs all files in its folder\n",
        "",
    )
    code, stdout, stderr = run("verify", "out", "--against-inputs", "--sample", "0.001", "--key", "k.pub")
    assert (code, stderr) == (0, "")
    assert re.fullmatch(
        re.escape(PASSED)
        + r"out: 1 block of 1 tensor \(\d+\.\d{3}% of the bytes\) made again from the inputs, the same bits\n"
        r"out: the signature holds with k\.pub\n",
        stdout,
    )
    assert run("verify", "out", "--against-inputs", "-q") == (0, "", "")


def test_json_says_what_passed_also_where_something_could_not_be_checked(run: Run) -> None:
    code, stdout, _ = run("verify", "out", "--against-inputs", "--json")
    data = json.loads(stdout)
    assert (code, data["is_verified"], data["tensors"], data["files"], data["unchecked"]) == (
        0,
        True,
        11,
        3,
        [],
    )
    assert data["recomputed"] == {
        "blocks": 11,
        "tensors": 11,
        "byte_size": data["byte_size"],
        "total_bytes": data["byte_size"],
        "device": "cpu",
        "tolerance": 0,
        "elements_differ": 0,
    }
    edit_lock(lambda lock: lock.pop("files"))
    code, stdout, stderr = run("verify", "out", "--json")
    assert (code, json.loads(stdout)["is_verified"]) == (11, False)
    assert stderr == f"alnico: {json.loads(stdout)['unchecked'][0]}\n"


def test_what_could_not_be_checked_exits_with_11_after_what_passed(run: Run) -> None:
    Path("tuned-1").rename("moved")
    assert run("verify", "out", "--against-inputs") == (
        11,
        PASSED,
        "alnico: out: could not check against its inputs: tuned-1 is neither here nor next to it; expected the inputs of the merge. Say where with "
        "--input tuned-1=PATH.\n",
    )
    assert run("verify", "out", "--against-inputs", "--input", "tuned-1=moved")[0] == 0
    assert run("reproduce", "out")[0] == 11
    assert run("reproduce", "out", "--input", "tuned-1=moved")[0] == 0
    assert run("verify", "out", "--against-inputs", "--input", "tuned-1") == (
        4,
        "",
        "alnico: --input 'tuned-1': expected NAME=PATH: the name in the lock, and the path where it is now.\n",
    )


def test_a_difference_exits_with_10(run: Run) -> None:
    said = hashes(Path("out"))
    size = Path("out/model.safetensors").stat().st_size
    flip(Path("out/model.safetensors"), size - 1)
    name = next(n for n, h in hashes(Path("out")).items() if h != said[n])
    assert run("verify", "out") == (
        10,
        "",
        f"alnico: out: {name} has the hash {hashes(Path('out'))[name]}, alnico.lock.json says {said[name]}; expected the bytes that the merge "
        "wrote. Merge again, or get a new copy of the output; --against-inputs names the first element that differs.\n",
    )
    assert run("reproduce", "out")[0] == 10


def test_reproduce_says_what_is_the_same_and_where_the_second_is(run: Run) -> None:
    code, stdout, stderr = run("reproduce", "out")
    assert (code, stderr) == (0, "")
    size = sum(Path("out", n).stat().st_size for n in ("model.safetensors", "config.json"))
    told = f"the same bytes: 11 tensors in 2 files \\({size / 1000:.1f} kB\\), by alnico {re.escape(alnico.__version__)}"
    assert re.fullmatch(rf"out: merged again in \d+\.\d\d s, {told}\n", stdout)
    code, stdout, _ = run("reproduce", "out", "new")
    assert re.fullmatch(rf"out: merged again in \d+\.\d\d s, {told}; the second is new\n", stdout)
    edit_lock(lambda lock: lock.update(alnico="0.0.9"))
    assert json.loads(run("reproduce", "out", "--json")[1])["versions"] == ["0.0.9", alnico.__version__]
    assert f", by alnico 0.0.9, and again by {alnico.__version__}" in run("reproduce", "out")[1]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--sample", "0.1"), "--sample is for --against-inputs. Give both."),
        (("--input", "a=b"), "--input is for --against-inputs. Give both."),
        (
            ("--against-inputs", "--sample", "0"),
            "--sample: 0 is not a share in (0, 1]. Give 0.01 for a hundredth of the blocks.",
        ),
        (("--against-inputs", "--sample", "1.5"), "--sample: 1.5 is not a share in (0, 1]."),
    ],
)
def test_words_that_go_with_nothing_are_refused(words: tuple[str, ...], told: str, run: Run) -> None:
    code, _, stderr = run("verify", "out", *words)
    assert code == 2
    assert told in " ".join(stderr.split())
