"""What becomes of standard input, output and error decides neither a merge nor any other command that makes something."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from alnico.cli.printing import recipe_page, show_result
from alnico.cli.streams import Descriptor
from compiling import without_compiling
from made import read_model, save_file, save_model

MATRIX = np.arange(1, 9, dtype=np.float32).reshape(4, 2)
ALNICO = [sys.executable, "-m", "alnico"]
FULL = "/dev/full"
CLOSED = None
NAMES = ["w.weight", "v", "naïve → × · ━ 🤗", "模型.weight"]  # noqa: RUF001

pytestmark = pytest.mark.skipif(not Path(FULL).exists(), reason="the system has no /dev/full")

Outcome = tuple[int, str, str]
Run = Callable[..., Outcome]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, recipes and a finished merge, for all tests of this file."""
    folder = tmp_path_factory.mktemp("streams")
    for name, factor in (("a", 1), ("b", 2), ("modèle 🤗", 2)):
        save_model(
            folder / name,
            dict.fromkeys(NAMES, ("F32", factor * MATRIX)),
            {"architectures": ["X"], "model_type": "x"},
        )
    (folder / "r.yml").write_text("merge_method: linear\nmodels: [a, b]\n")
    (folder / "é.yml").write_text("merge_method: linear\nmodels: [a, modèle 🤗]\n", "utf-8")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1})
    )
    factors = {
        f"base_model.model.w.lora_{x}.weight": ("F32", np.ones(s, np.float32))
        for x, s in (("A", (1, 2)), ("B", (4, 1)))
    }
    save_file(folder / "adapter" / "adapter_model.safetensors", factors)
    return folder


@pytest.fixture(scope="module")
def forks(folder: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(Path(__file__).with_name("forking.py"))]
    with subprocess.Popen(
        command, cwd=folder, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as server:
        yield server


@pytest.fixture
def alnico(forks: subprocess.Popen[str], tmp_path: Path) -> Run:
    """Run a command with descriptors; gives its exit code, and what came out where it is not opened on something else."""

    def call(
        *words: object, stdin: str | None = os.devnull, stdout: Any = ..., stderr: Any = ..., **more: Any
    ) -> Outcome:
        paths = [tmp_path / "stdout", tmp_path / "stderr"]
        for path in paths:
            path.unlink(missing_ok=True)
        fds = [
            stdin,
            *(str(p) if asked is ... else asked for p, asked in zip(paths, (stdout, stderr), strict=True)),
        ]
        order = {"words": [str(w) for w in words], "fds": fds, "encoding": "utf-8", "signal": None, **more}
        assert forks.stdin is not None
        assert forks.stdout is not None
        forks.stdin.write(json.dumps(order) + "\n")
        forks.stdin.flush()
        code = int(forks.stdout.readline())
        said = [path.read_text(order["encoding"]) if path.exists() else "" for path in paths]
        assert "Traceback" not in said[0] + said[1]
        assert "Exception ignored" not in said[1]
        return code, without_compiling(said[0]), without_compiling(said[1])

    return call


BROKEN = [
    {"stdout": CLOSED}, {"stdout": FULL}, {"stderr": CLOSED}, {"stderr": FULL}, {"stdin": CLOSED},
    {"stdout": FULL, "stderr": FULL}, {"stdin": CLOSED, "stdout": CLOSED, "stderr": CLOSED}, {"stdout": CLOSED, "stderr": FULL},
    {"encoding": "ascii"}, {"encoding": "latin-1"}, {"encoding": "cp1252", "stdout": FULL},
]  # fmt: skip
IDS = [", ".join(f"{k} {'closed' if v is None else v}" for k, v in broken.items()) for broken in BROKEN]


@pytest.mark.parametrize("broken", BROKEN, ids=IDS)
def test_no_stream_ends_a_merge(alnico: Run, tmp_path: Path, broken: dict[str, Any]) -> None:
    code, _, _ = alnico("merge", "é.yml", tmp_path / "out", "-v", **broken)
    assert code == 0
    tensors = read_model(tmp_path / "out")
    assert set(tensors) == set(NAMES)
    np.testing.assert_array_equal(tensors["w.weight"], 1.5 * MATRIX)


MAKES = {
    "merge --json": ["merge", "r.yml", "OUT", "--json"],
    "analyze": ["analyze", "--base", "a", "b", "--out", "OUT"],
    "extract": ["lora", "extract", "b", "a", "OUT", "--rank", "1"],
    "fold": ["lora", "fold", "a", "adapter", "OUT", "-v"],
    "combine": ["lora", "combine", "adapter", "adapter", "OUT", "-v"],
    "suggest": ["suggest", "--base", "a", "b", "modèle 🤗", "--out", "OUT"],
}


@pytest.mark.parametrize("words", MAKES.values(), ids=list(MAKES))
def test_what_makes_something_makes_it_whatever_the_streams_are(
    alnico: Run, tmp_path: Path, words: list[str]
) -> None:
    for i, broken in enumerate(
        ({"stdout": CLOSED, "stderr": CLOSED, "stdin": CLOSED}, {"stdout": FULL, "encoding": "ascii"})
    ):
        out = tmp_path / f"out{i}"
        code, _, stderr = alnico(*(str(out) if w == "OUT" else w for w in words), **broken)
        assert code == 0, stderr
        assert out.exists()


@pytest.mark.parametrize("fds", [("stdin", "stdout", "stderr"), ("stderr",)], ids="+".join)
def test_what_is_printed_does_not_go_into_the_model(
    alnico: Run, tmp_path: Path, fds: tuple[str, ...]
) -> None:
    """A file that is opened gets the lowest free number: 1 or 2, where these are closed."""
    assert alnico("merge", "r.yml", tmp_path / "whole")[0] == 0
    assert alnico("merge", "r.yml", tmp_path / "out", "-v", **dict.fromkeys(fds))[0] == 0
    for path in (tmp_path / "whole").glob("*.safetensors*"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


PRINTS = {
    "plan": ["plan", "é.yml"],
    "plan --json": ["plan", "é.yml", "--json"],
    "inspect": ["inspect", "modèle 🤗", "-v"],
    "diff": ["diff", "a", "b"],
    "norm-weights": ["norm-weights", "--base", "a", "b", "modèle 🤗"],
    "suggest": ["suggest", "--base", "a", "b", "modèle 🤗"],
    "methods": ["methods"],
    "schema": ["schema"],
    "--help": ["merge", "--help"],
    "--version": ["--version"],
}


@pytest.mark.parametrize("words", PRINTS.values(), ids=list(PRINTS))
def test_a_result_that_is_printed_alone_is_an_error_where_it_cannot_be(alnico: Run, words: list[str]) -> None:
    code, _, stderr = alnico(*words, stdout=FULL)
    assert code == 9
    assert stderr.endswith(
        "alnico: standard output: cannot be written (No space left on device); expected a file, a pipe or a terminal that takes all of "
        "the result. Free space, or send it elsewhere.\n"
    )
    code, _, stderr = alnico(*words, stdout=CLOSED)
    assert code == 9
    assert "standard output: cannot be written (it is closed)" in stderr


@pytest.mark.parametrize(
    ("words", "encoding"),
    [
        *((words, "ascii") for words in PRINTS.values()),
        (PRINTS["inspect"], "cp1252"),
        (PRINTS["plan"], "latin-1"),
    ],
)
def test_what_an_encoding_does_not_have_is_escaped(alnico: Run, words: list[str], encoding: str) -> None:
    code, stdout, _ = alnico(*words, encoding=encoding)
    assert code == 0
    assert stdout.encode(encoding)
    if words[0] == "inspect" and encoding == "ascii":
        assert "na\\xefve \\u2192 \\xd7 \\xb7 \\u2501 \\U0001f917" in stdout
    if "--json" in words or words == ["schema"]:
        assert json.loads(stdout)


def test_verdicts_stay_where_they_cannot_be_printed(alnico: Run, tmp_path: Path) -> None:
    assert alnico("merge", "r.yml", tmp_path / "out")[0] == 0
    assert [alnico("diff", "a", b, "--exit-code", stdout=FULL)[0] for b in ("a", "b")] == [0, 14]
    assert alnico("verify", tmp_path / "out", stdout=FULL)[0] == 0
    raw = next((tmp_path / "out").glob("*.safetensors"))
    raw.write_bytes(raw.read_bytes()[:-1] + b"\xff")
    assert alnico("verify", tmp_path / "out", stdout=CLOSED, stderr=FULL)[0] == 10
    assert alnico("merge", "nowhere.yml", tmp_path / "new", stdout=FULL, stderr=CLOSED)[0] == 3
    assert alnico("merge", "--nonsense", stderr=FULL)[0] == 2


def test_quiet_commands_need_no_stdout(alnico: Run, tmp_path: Path) -> None:
    assert alnico("merge", "r.yml", tmp_path / "out", "-q", stdout=CLOSED) == (0, "", "")


@pytest.mark.parametrize("stdin", [CLOSED, os.devnull])
def test_a_recipe_from_no_standard_input_is_an_error_of_the_recipe(
    alnico: Run, tmp_path: Path, stdin: str | None
) -> None:
    code, _, stderr = alnico("merge", "-", tmp_path / "out", stdin=stdin)
    assert code == 3
    assert stderr.startswith("alnico: standard input")
    assert "NoneType" not in stderr


@pytest.mark.parametrize(
    ("number", "kind", "times"),
    [
        (signal.SIGINT, "Compiling", 1),
        (signal.SIGINT, "TensorDone", 3),
        (signal.SIGTERM, "Started", 3),
        (signal.SIGTERM, "TensorDone", 1),
        (signal.SIGHUP, "Started", 1),
    ],
)
def test_a_signal_ends_a_merge_as_ctrl_c_does(
    alnico: Run, tmp_path: Path, number: int, kind: str, times: int
) -> None:
    code, _, stderr = alnico("merge", "r.yml", tmp_path / "out", signal=[int(number), kind, times])
    assert (code, stderr) == (
        128 + number,
        "alnico: interrupted. The same command resumes the merge.\n",
    )
    assert not (tmp_path / "out").exists()
    assert alnico("merge", "r.yml", tmp_path / "out")[0] == 0
    np.testing.assert_array_equal(read_model(tmp_path / "out")["w.weight"], 1.5 * MATRIX)


@pytest.mark.slow
def test_an_ignored_hangup_stays_ignored(folder: Path, tmp_path: Path) -> None:
    """As nohup has it."""
    begun = subprocess.Popen(
        [*ALNICO, "merge", "r.yml", str(tmp_path / "out")],
        cwd=folder,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    for _ in range(20):
        time.sleep(0.02)
        begun.send_signal(signal.SIGHUP)
    assert begun.wait(120) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [["merge", "r.yml", "OUT"], ["plan", "r.yml"], ["--help"]], ids=lambda words: words[0]
)
def test_ctrl_c_at_any_moment_of_the_start_is_quiet(folder: Path, tmp_path: Path, words: list[str]) -> None:
    """From the moment when the entry point runs: until then it is Python that answers."""
    for i in range(10):
        command = [w if w != "OUT" else str(tmp_path / f"out{i}") for w in words]
        program = (
            f"from alnico.cli import entry, signals; signals.guard(); import signal, sys; sys.argv = ['alnico', *{command!r}]; "
            "signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT)); "
            f"signal.setitimer(signal.ITIMER_REAL, 0.001 + 0.05 * {i}); entry.command()"
        )
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert "Traceback" not in done.stderr
        assert done.returncode in (0, 130)
        assert done.returncode == 0 or done.stderr.startswith("alnico: interrupted.")


def test_names_are_opened_in_a_locale_without_them(folder: Path, tmp_path: Path) -> None:
    """With Python's UTF-8 mode off, names of files would be ASCII."""
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [*ALNICO, "merge", "é.yml", str(tmp_path / "oüt"), "-v"],
        cwd=folder,
        env=environment,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0
    assert done.stderr.isascii()
    assert done.stdout.startswith(f"{tmp_path}/o\\xfct: 4 tensors".encode())
    assert set(read_model(tmp_path / "oüt")) == set(NAMES)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_printed_recipe_names_the_same_models(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = "# nach Maß: modèle\nmerge_method: ties  # ü\nbase_model: modèle 🤗\nmodels:\n- {model: b, parameters: {density: 0.2}}\n"
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="backslashreplace")
    monkeypatch.setattr(sys, "stdout", stream)
    show_result(recipe_page(recipe))
    printed = stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert printed.startswith("# nach Ma")
    assert yaml.safe_load(printed) == yaml.safe_load(recipe)
    assert (printed == recipe) == (encoding == "utf-8")
    assert yaml.safe_load(recipe_page('base_model: "a\\u200bb"\n'.replace("\\u200b", "\u200b"))) == {
        "base_model": "a\u200bb"
    }


def test_a_suggestion_in_a_locale_without_the_names_of_its_models(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((40, 20)).astype(np.float32)
    for i, name in enumerate(("modèle 🤗", "a", "b")):
        save_model(
            tmp_path / name,
            {"layers.0.mlp.weight": ("F32", values * np.float32(1 + i / 100))},
            {"architectures": ["X"], "model_type": "x"},
        )
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [*ALNICO, "suggest", "a", "b", "--base", "modèle 🤗"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout.decode("ascii"))["base_model"] == "modèle 🤗"


def test_a_reader_that_leaves_is_no_error(folder: Path, tmp_path: Path) -> None:
    code = f"{' '.join(ALNICO)} merge r.yml {tmp_path}/out -v 2>&1 | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert (done.stderr, done.stdout.splitlines()[1:]) == ("", ["0"])
    assert set(read_model(tmp_path / "out")) == set(NAMES)


def test_a_descriptor_that_failed_takes_everything_from_then_on() -> None:
    """Of processes that are started, too."""
    gone, number = os.pipe()
    os.close(gone)
    with Descriptor(number, "wb") as descriptor:
        assert descriptor.write(b"lost") == 4
        assert isinstance(descriptor.failure, BrokenPipeError)
        assert os.write(number, b"by another") == 10
