"""Bad input gets one clear message on stderr, its exit code, and leaves nothing behind."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from made import save_file, save_model

MATRIX = np.arange(1, 9, dtype=np.float32).reshape(4, 2)
LINEAR = "merge_method: linear\nmodels: [a, b]\n"
TIES = "merge_method: ties\nbase_model: base\nmodels: [a, b]\nparameters: {density: 0.5}\n"


@pytest.fixture(autouse=True)
def _models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three good models; each test breaks something."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "base"):
        save_model(Path(name), {"w": ("F32", MATRIX), "v": ("F32", MATRIX[0])}, {"model_type": "x"})
    Path("linear.yml").write_text(LINEAR)
    Path("ties.yml").write_text(TIES)


Run = Callable[..., tuple[int, str, str]]


def state() -> dict[str, bytes | None]:
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(Path().rglob("*"))}


def refused(run: Run, code: int, *words: str, recipe: str = "linear.yml", out: str = "out") -> str:
    """Run a merge that must be refused; return its message without the program's name."""
    before = state()
    found, stdout, stderr = run("merge", recipe, out, "--threads", "2", *words)
    assert (found, stdout) == (code, ""), stderr
    assert stderr.startswith("alnico: ")
    assert "Traceback" not in stderr
    assert state() == before, "something was left behind"
    return stderr.removeprefix("alnico: ").removesuffix("\n")


def write_header(path: Path, header: object, data: bytes = b"\0" * 64) -> None:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


# ---- files ------------------------------------------------------------------------------------------------------------


def test_a_recipe_that_is_not_there(run: Run) -> None:
    assert refused(run, 3, recipe="nowhere.yml") == (
        "nowhere.yml: cannot be read (No such file or directory). Check the path of the recipe."
    )


def test_a_model_that_is_not_there(run: Run) -> None:
    shutil.rmtree("b")
    assert refused(run, 4) == (
        "model 'b': no such directory or file; expected a directory with safetensors files, one such file, or a model on the hub "
        "as owner/name or owner/name@revision. Check the path, or write the hub id with its owner."
    )


def test_a_model_directory_without_weights(run: Run) -> None:
    Path("b/model.safetensors").unlink()
    assert refused(run, 4).startswith("b: has no .safetensors or .bin file, expected a model.")


@pytest.mark.parametrize("size", [1, 7, 40, -1])
def test_a_truncated_file(run: Run, size: int) -> None:
    path = Path("b/model.safetensors")
    path.write_bytes(path.read_bytes()[:size])
    told = refused(run, 4)
    assert told.startswith("b/model.safetensors: ")
    assert "truncated" in told
    assert len(told.splitlines()) == 1


def test_a_truncated_shard_of_several(run: Run) -> None:
    shutil.rmtree("b")
    save_model(Path("b"), {"w": ("F32", MATRIX), "v": ("F32", MATRIX[0])}, {}, shards=2)
    path = Path("b/model-00002-of-00002.safetensors")
    path.write_bytes(path.read_bytes()[:-4])
    told = refused(run, 4)
    assert told.startswith("b/model-00002-of-00002.safetensors: ")
    assert "truncated" in told


def test_a_shard_that_is_not_there(run: Run) -> None:
    shutil.rmtree("b")
    save_model(Path("b"), {"w": ("F32", MATRIX), "v": ("F32", MATRIX[0])}, {}, shards=2)
    Path("b/model-00001-of-00002.safetensors").unlink()
    assert refused(run, 4) == (
        "b/model.safetensors.index.json: lists model-00001-of-00002.safetensors, which does not exist. Complete the download."
    )


def entry(dtype: object = "F32", shape: object = (16,), offsets: object = (0, 64)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


LIES = {
    "length beyond the file": lambda p: p.write_bytes((1 << 20).to_bytes(8, "little") + b"{}"),
    "length beyond reason": lambda p: p.write_bytes((1 << 62).to_bytes(8, "little") + b"{}"),
    "no JSON": lambda p: write_header(p, b"{ not json"),
    "no object": lambda p: write_header(p, [1]),
    "nested": lambda p: write_header(p, b'{"a":' * 5000),
    "no entry": lambda p: write_header(p, {"w": 3}),
    "keys": lambda p: write_header(p, {"w": {"dtype": "F32"}}),
    "unknown dtype": lambda p: write_header(p, {"w": entry(dtype="F99")}),
    "dtype a list": lambda p: write_header(p, {"w": entry(dtype=[])}),
    "negative shape": lambda p: write_header(p, {"w": entry(shape=[-16])}),
    "huge shape": lambda p: write_header(p, {"w": entry(shape=[1 << 40, 1 << 40])}),
    "wrong size": lambda p: write_header(p, {"w": entry(shape=[15])}),
    "past the end": lambda p: write_header(p, {"w": entry(shape=[32], offsets=[0, 128])}),
    "backwards": lambda p: write_header(p, {"w": entry(offsets=[64, 0])}),
    "overlap": lambda p: write_header(p, {"w": entry(), "v": entry(shape=[8], offsets=[32, 64])}),
    "gap": lambda p: write_header(p, {"w": entry(shape=[8], offsets=[32, 64])}),
    "bytes to spare": lambda p: write_header(p, {"w": entry(shape=[8], offsets=[0, 32])}),
    "twice": lambda p: write_header(
        p, json.dumps({"w": entry(), "x": entry()}).replace('"x"', '"w"').encode()
    ),
    "metadata": lambda p: write_header(p, {"__metadata__": {"a": 1}, "w": entry()}),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_a_header_that_lies(run: Run, lie: Callable[[Path], None]) -> None:
    lie(Path("b/model.safetensors"))
    told = refused(run, 4)
    assert told.startswith("b/model.safetensors: ")
    assert len(told.splitlines()) == 1
    assert len(told) < 500


@pytest.mark.parametrize(
    "place", ["../a/model.safetensors", "/etc/passwd", "x/../../a/model.safetensors", "..", ""]
)
def test_an_index_that_points_outside_the_directory(run: Run, place: str) -> None:
    Path("b/model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"w": place, "v": "model.safetensors"}})
    )
    assert refused(run, 4) == (
        f"b/model.safetensors.index.json: places tensor 'w' in {place!r}, outside the model's directory; "
        "expected a file inside it. Do not use this model: its index is hostile or damaged."
    )


def test_a_pickle_checkpoint(run: Run) -> None:
    Path("b/model.safetensors").rename("b/pytorch_model.bin")
    told = "b/pytorch_model.bin: is a safetensors file; expected a torch checkpoint. Rename it to end in .safetensors."
    assert refused(run, 4).startswith(told)
    Path("file.yml").write_text("merge_method: linear\nmodels: [a, b/pytorch_model.bin]\n")
    assert refused(run, 4, recipe="file.yml").startswith(told)


def test_a_quantised_model(run: Run) -> None:
    Path("b/config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
    assert refused(run, 4) == (
        "b: its weights are quantised (config.json says 'gptq') in a way that is not read; expected one of those in "
        "docs/formats.md. Use the full-precision model."
    )


def test_a_damaged_config(run: Run) -> None:
    Path("a/config.json").write_text("{")
    assert refused(run, 4).startswith("a/config.json: is not JSON")


# ---- models that do not fit -------------------------------------------------------------------------------------------


def test_shapes_that_differ(run: Run) -> None:
    save_model(Path("b"), {"w": ("F32", MATRIX.T), "v": ("F32", MATRIX[0])})
    assert (
        refused(run, 5)
        == "w: a is (4, 2), b is (2, 4); expected one shape. Use models of one architecture and size."
    )


def test_a_float_tensor_that_one_model_lacks(run: Run) -> None:
    save_model(Path("b"), {"w": ("F32", MATRIX)})
    assert refused(run, 5) == (
        "v: a has it, b lacks it; expected it in all models. "
        "Use models of one architecture, or set missing: copy or missing: drop in the recipe."
    )


def test_vocabularies_that_differ(run: Run) -> None:
    for name, token in (("a", "x"), ("b", "y")):
        Path(name, "tokenizer.json").write_text(json.dumps({"model": {"vocab": {token: 0}}}))
    assert refused(run, 5).startswith(
        "a and b have different vocabularies: 1 of 1 tokens differ, such as 'x' at row 0; "
    )


def test_buffers_that_differ(run: Run) -> None:
    for name, last in (("a", 2), ("b", 3)):
        save_model(Path(name), {"w": ("F32", MATRIX), "ids": ("I64", np.array([0, 1, last]))})
    assert refused(run, 5) == (
        "ids[2]: a and b differ; tensors of I64 are copied and must be equal. Use models that agree on it."
    )


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("recipe", ["linear.yml", "ties.yml"])
def test_a_number_that_is_none_in_an_input(run: Run, value: str, recipe: str) -> None:
    bad = MATRIX.copy()
    bad[2, 1] = float(value)
    save_model(Path("b"), {"w": ("F32", bad), "v": ("F32", MATRIX[0])})
    told = refused(run, 6, recipe=recipe)
    assert told.startswith("w[2, 1]: b has ")
    assert told.endswith("; expected finite numbers. Repair or exclude this model.")


# ---- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("merge_method: tise\nmodels: [a, b]\n", "r.yml:1: unknown merge method 'tise'; expected one of "),
        (
            "merge_method: linear\nmodels: [a, b]\nparameters: {wieght: 1}\n",
            "r.yml:3: parameters.wieght is not an option of linear.",
        ),
        (TIES.replace("0.5", "1.4"), "r.yml:4: parameters.density is 1.4; density is "),
        (
            "merge_method: linear\nmodels: [a, b]\nparameters: {weight: 0}\n",
            "r.yml:2: the weights of linear sum to 0 (0, 0), ",
        ),
        ("merge_method: linear\nslices: []\n", "r.yml:2: slices is a list of 0; expected "),
        ("", "r.yml:1: is empty; "),
        ("[", "r.yml:1: is not YAML "),
        ("merge_method: !!python/object/apply:os.mkdir [x]\n", "r.yml:1: a value is YAML of the type "),
    ],
)
def test_a_recipe_that_is_wrong(run: Run, recipe: str, expected: str) -> None:
    Path("r.yml").write_text(recipe)
    told = refused(run, 3, recipe="r.yml")
    assert told.startswith(expected)
    assert len(told.splitlines()) == 1


def test_all_mistakes_of_a_recipe_are_told_at_once(run: Run) -> None:
    Path("r.yml").write_text("merge_method: ties\nmodels: 3\nseed: x\nparameters: {density: 2}\n")
    assert [line.split(":")[1] for line in refused(run, 3, recipe="r.yml").splitlines()] == [
        "1",
        "2",
        "3",
        "4",
    ]


def test_standard_input_that_is_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path.cwd())
    done = subprocess.run(
        [sys.executable, "-m", "alnico", "merge", "-", "out"],
        input=b"\xff\xfe",
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (3, b"")
    assert done.stderr.decode() == (
        "alnico: standard input: is text in UTF-16; expected a recipe. Save it as UTF-8; PowerShell's > writes UTF-16.\n"
    )
    assert not Path("out").exists()


# ---- the output -------------------------------------------------------------------------------------------------------


def test_an_output_directory_that_holds_something(run: Run) -> None:
    Path("out").mkdir()
    Path("out/mine.txt").write_text("mine")
    assert refused(run, 8) == (
        "out: exists and is not empty; expected a new or empty directory. Choose another output, or use --overwrite (in Python overwrite=True)."
    )


def test_an_output_that_is_a_file(run: Run) -> None:
    Path("out").write_text("mine")
    assert refused(run, 8).startswith("out: exists and is not empty; ")


def test_an_output_under_a_file(run: Run) -> None:
    Path("file").write_text("mine")
    assert refused(run, 8, out="file/out").startswith("file/out: ")


@pytest.mark.parametrize("out", ["a", "./a", "../{}/a", "a/../a"])
@pytest.mark.parametrize("words", [(), ("--overwrite",)])
def test_an_output_that_is_an_input(run: Run, out: str, words: tuple[str, ...]) -> None:
    assert "is one of the inputs or contains it" in refused(run, 8, *words, out=out.format(Path.cwd().name))


def test_an_output_that_is_a_file_of_an_input(run: Run) -> None:
    assert "is one of the inputs or contains it" in refused(run, 8, "--overwrite", out="a/model.safetensors")


def test_an_output_that_holds_the_inputs(run: Run) -> None:
    Path("all").mkdir()
    Path("a").rename("all/a")
    Path("linear.yml").write_text(LINEAR.replace("[a, b]", "[all/a, b]"))
    assert "is one of the inputs or contains it" in refused(run, 8, "--overwrite", out="all")


def test_a_disk_that_is_too_small(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    code, stdout, told = run("merge", "linear.yml", "out")
    assert (code, stdout) == (7, "")
    assert told.startswith(f"alnico: {Path.cwd()}: the output needs ")
    assert told.endswith(", 1.0 kB are free. Make room, choose another disk, or a smaller dtype.\n")
    code, stdout, stderr = run("plan", "linear.yml", "--out", "out")
    assert (code, stdout) == (7, "")
    assert "are free" in stderr


def test_a_disk_that_is_too_small_keeps_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    refused(run, 7)


@pytest.mark.parametrize("recipe", ["linear.yml", "ties.yml"])
def test_a_budget_that_is_too_small(run: Run, recipe: str) -> None:
    told = refused(run, 7, "--memory", "64MiB", recipe=recipe)
    assert told.startswith("plan: the merge needs at least ")
    enough = told.rpartition("Raise --memory to ")[2].rstrip(".")
    code, stdout, _ = run("plan", recipe, "--memory", enough)
    assert code == 0
    assert "memory " in stdout


# ---- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ("--trust-remote-code",),
            "--trust-remote-code: alnico runs no code of a model. Leave the option out.",
        ),
        (
            ("--unsafe-truncate-embeddings",),
            "--unsafe-truncate-embeddings: alnico cuts no vocabulary without saying which tokens go. "
            "Write tokenizer_source: base in the recipe.",
        ),
        (
            ("--no-safe-serialization",),
            "--no-safe-serialization: alnico writes safetensors only. Leave the option out.",
        ),
        (
            ("--device", "gpu"),
            "--device is 'gpu'; expected auto, cpu, cuda, cuda:N with the number of a GPU, or cuda:all.",
        ),
        (
            ("--cuda", "--device", "cpu"),
            "--cuda means --device cuda, and --device cpu is given. Leave one out.",
        ),
        (
            ("--cuda", "--multi-gpu", "--device", "cuda:1"),
            "--cuda and --multi-gpu mean --device cuda:all, and --device cuda:1 is given. Leave one out.",
        ),
        (
            ("--memory", "lots"),
            "--memory: 'lots' is not a size; expected a number with a unit, such as 5GB or 2GiB.",
        ),
        (
            ("--memory", "0"),
            "--memory: '0' is not a size; expected a number with a unit, such as 5GB or 2GiB.",
        ),
        (
            ("--memory", "-2GB"),
            "--memory: '-2GB' is not a size; expected a number with a unit, such as 5GB or 2GiB.",
        ),
        (
            ("--max-shard-size", "5XB"),
            "--max-shard-size: '5XB' is not a size; expected a number with a unit, such as 5GB or 2GiB.",
        ),
        (
            ("--out-shard-size", "big"),
            "--out-shard-size: 'big' is not a size; expected a number with a unit, such as 5GB or 2GiB.",
        ),
        (
            ("--out-shard-size", "5B", "--max-shard-size", "5GB"),
            "--max-shard-size and --out-shard-size are one option. Leave one out.",
        ),
        (("--seed", str(1 << 63)), "9223372036854775808 has more than 64 bits. Choose a smaller seed."),
        (("--seed", "lucky"), "'--seed'"),
        (("--threads", "0"), "'--threads'"),
        (("--fast",), "No such option: --fast"),
        (("third",), "linear.yml is a recipe, and out is given, too"),
    ],
)
@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_a_command_line_that_is_wrong(
    run: Run, words: tuple[str, ...], expected: str, more: tuple[str, ...]
) -> None:
    before = state()
    code, stdout, stderr = run("merge", "linear.yml", "out", *more, *words)
    assert (code, stdout) == (2, "")
    assert expected in stderr
    assert "Traceback" not in stderr
    assert state() == before


@pytest.mark.parametrize(
    "words", [("merge",), ("merge", "linear.yml"), ("merj", "linear.yml", "out"), ("plan",), ("inspect",)]
)
def test_a_command_that_is_incomplete_or_unknown(run: Run, words: tuple[str, ...]) -> None:
    code, stdout, stderr = run(*words)
    assert (code, stdout) == (2, "")
    assert stderr.startswith("Usage: ")


def test_an_unknown_method_is_answered_with_the_nearest_name(run: Run) -> None:
    code, stdout, stderr = run("methods", "tise")
    assert (code, stdout) == (3, "")
    assert stderr.startswith("alnico: unknown merge method 'tise'; expected one of ")
    assert stderr.endswith(" Did you mean ties?\n")


def test_a_broken_model_is_not_inspected(run: Run) -> None:
    save_file(Path("b/model.safetensors"), {"w": ("F32", MATRIX)})
    Path("b/model.safetensors").write_bytes(Path("b/model.safetensors").read_bytes()[:-1])
    code, stdout, stderr = run("inspect", "b")
    assert (code, stdout) == (4, "")
    assert stderr.startswith("alnico: b/model.safetensors: ")
    assert run("inspect", "nowhere")[0] == 4


def test_an_interrupt_says_how_to_go_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import alnico

    @functools.wraps(alnico.merge_documents)
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(alnico, "merge_documents", interrupted)
    code, stdout, stderr = run("merge", "linear.yml", "out")
    assert (code, stdout, stderr) == (
        130,
        "",
        "alnico: interrupted. The same command resumes the merge.\n",
    )
