"""What the commands print, and where."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from alnico.methods import registry
from made import family, read_model, save_file, save_model

MATRIX = np.arange(1, 9, dtype=np.float32).reshape(4, 2)
MEAN = MATRIX * 1.5
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models whose mean is 1.5 times the first, exactly."""
    monkeypatch.chdir(tmp_path)
    save_model(
        Path("a"),
        {"w": ("F32", MATRIX), "v": ("F32", MATRIX[0])},
        {"architectures": ["XModel"], "vocab_size": 4},
    )
    save_model(Path("b"), {"w": ("F32", 2 * MATRIX), "v": ("F32", 2 * MATRIX[0])})
    Path("r.yml").write_text("merge_method: linear\nmodels: [a, b]\n")


def merged(path: str = "out") -> np.ndarray:
    return read_model(Path(path))["w"]


def names() -> set[str]:
    return {p.name for p in Path().iterdir()}


def test_merge_prints_one_line_and_leaves_the_model_only(run: Run) -> None:
    code, stdout, stderr = run("merge", "r.yml", "out", "-j", "2")
    assert (code, stderr) == (0, "")
    assert stdout.startswith("out: 2 tensors, 10 parameters, ")
    assert len(stdout.splitlines()) == 1
    assert names() == {"a", "b", "r.yml", "out"}
    np.testing.assert_array_equal(merged(), MEAN)


def test_quiet_prints_nothing(run: Run) -> None:
    assert run("merge", "r.yml", "out", "--quiet", "--allow-crimes") == (0, "", "")
    np.testing.assert_array_equal(merged(), MEAN)


def test_verbose_prints_every_tensor_to_stderr(run: Run) -> None:
    code, stdout, stderr = run("merge", "r.yml", "out", "-v")
    assert (code, len(stdout.splitlines())) == (0, 1)
    assert sorted(line.split("  ")[1] for line in stderr.splitlines()) == ["v", "w"]


def test_json_of_a_merge_is_data_on_stdout(run: Run) -> None:
    code, stdout, stderr = run("merge", "r.yml", "out", "--json")
    data = json.loads(stdout)
    assert (code, stderr) == (0, "")
    assert (data["path"], data["parameters"], data["bytes_read"], data["resumed_tensors"]) == (
        "out",
        10,
        80,
        0,
    )
    assert set(data["digests"]) == {"w", "v"}


def test_a_recipe_may_come_from_standard_input(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path("r.yml").read_bytes())))
    assert run("merge", "-", "out")[0] == 0
    np.testing.assert_array_equal(merged(), MEAN)


def test_mistakes_of_standard_input_have_lines_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"merge_method: linear\nmodels: 3\n")))
    code, _, stderr = run("plan", "-")
    assert (code, stderr) == (
        3,
        "alnico: standard input:2: models is 3; expected a list of 1 to 1000 models.\n",
    )


def test_a_dry_run_is_the_plan_and_writes_nothing(run: Run) -> None:
    dry = run("merge", "r.yml", "out", "--dry-run", "--threads", "1")
    plan = run("plan", "r.yml", "--out", "out", "--threads", "1")
    without_disk = [
        [line for line in text.splitlines() if not line.startswith("disk")] for _, text, _ in (dry, plan)
    ]
    assert without_disk[0] == without_disk[1]
    assert any(
        line.startswith("disk      ") and line.endswith(f" free at {Path.cwd()}")
        for line in dry[1].splitlines()
    )
    assert dry[0] == plan[0] == 0
    assert json.loads(run("merge", "r.yml", "out", "--dry-run", "--json")[1]) == json.loads(
        run("plan", "r.yml", "--json")[1]
    )
    assert names() == {"a", "b", "r.yml"}


def test_the_plan_names_models_tensors_bytes_and_memory(run: Run) -> None:
    code, stdout, stderr = run("plan", "r.yml", "-v")
    assert (code, stderr) == (0, "")
    assert "method    linear, seed 0" in stdout
    assert "model     a (gives config and tokenizer)" in stdout
    assert "  merged  2: " in stdout
    assert "memory    at most " in stdout


@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("--copy-tokenizer", "the tokenizer is always carried over"),
        ("--no-copy-tokenizer", "the tokenizer is always carried over"),
        ("--write-model-card", "the model card is always written"),
        ("--no-write-model-card", "the model card is always written"),
        ("--lazy-unpickle", "files are always read in part"),
        ("--no-lazy-unpickle", "files are always read in part"),
        ("--low-cpu-memory", "--memory is the limit that holds"),
        ("--no-low-cpu-memory", "--memory is the limit that holds"),
        ("--clone-tensors", "no output shares memory with an input"),
        ("--read-to-gpu", "on a GPU, tensors are always read while others are copied there and computed"),
        ("--async-write", "tensors are always written while others are read"),
        ("--write-threads=4", "--threads is the number of all threads"),
        ("--lora-merge-cache=cache", "an adapter is applied while its base is read"),
        ("--lora-merge-dtype=bfloat16", "an adapter is applied in float32, or in float64 where a model is"),
        ("--transformers-cache=cache", "models of the hub are kept where HF_HOME says"),
    ],
)
def test_mergekits_options_are_accepted_with_a_note(run: Run, word: str, why: str) -> None:
    code, _, stderr = run("merge", "r.yml", "out", "--dry-run", word)
    assert (code, stderr) == (0, f"note: {word.partition('=')[0]} has no effect: {why}.\n")


@pytest.mark.parametrize(
    "words",
    [
        ("--device", "cpu"),
        ("--no-cuda",),
        ("--no-trust-remote-code",),
        ("--num-threads", "3"),
        ("--safe-serialization",),
        ("--no-unsafe-truncate-embeddings",),
    ],
)
def test_mergekits_options_that_ask_for_what_is_so_are_accepted(run: Run, words: tuple[str, ...]) -> None:
    code, _, stderr = run("merge", "r.yml", "out", "--dry-run", *words)
    assert (code, stderr) == (0, "")


def test_random_seed_is_the_seed(run: Run) -> None:
    assert "seed 7" in run("plan", "r.yml", "--random-seed", "7")[1]
    assert "seed 8" in run("merge", "r.yml", "out", "--dry-run", "--seed", "8")[1]
    assert run("merge", "r.yml", "out", "--seed", "9")[0] == 0
    assert json.loads(Path("out/alnico.lock.json").read_text())["seed"] == 9


@pytest.mark.parametrize(
    ("words", "shards"),
    [
        ((), 1),
        (("--max-shard-size", "32B"), 2),
        (("--max-shard-size", "39"), 2),
        (("--max-shard-size", "40"), 1),
        (("--out-shard-size", "5B"), 1),
        (("--out-shard-size", "5b"), 1),
        (("--out-shard-size", "1K"), 1),
        (("--out-shard-size", "32"), 2),
    ],
)
def test_shard_sizes_are_bytes_and_mergekits_b_is_a_billion(
    run: Run, words: tuple[str, ...], shards: int
) -> None:
    code, stdout, _ = run("plan", "r.yml", "--json", *words)
    assert (code, len(json.loads(stdout)["shards"])) == (0, shards)


def test_shards_are_written_with_an_index(run: Run) -> None:
    assert run("merge", "r.yml", "out", "--max-shard-size", "32B")[0] == 0
    assert len(list(Path("out").glob("model-0000?-of-00002.safetensors"))) == 2
    index = json.loads(Path("out/model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == {"w", "v"}
    np.testing.assert_array_equal(merged(), MEAN)


def test_overwrite_replaces_the_old_output_and_removes_it(run: Run) -> None:
    save_model(Path("out"), {"old": ("F32", MATRIX)})
    Path("out/assets").mkdir()
    Path("out/assets/old.png").write_bytes(b"old")
    assert run("merge", "r.yml", "out", "--overwrite")[0] == 0
    assert names() == {"a", "b", "r.yml", "out"}
    assert not Path("out/assets").exists()
    np.testing.assert_array_equal(merged(), MEAN)


def test_overwrite_keeps_the_old_output_when_the_merge_fails(run: Run) -> None:
    save_file(Path("out/model.safetensors"), {"old": ("F32", MATRIX)})
    bad = MATRIX.copy()
    bad[0, 0] = np.nan
    save_model(Path("b"), {"w": ("F32", bad), "v": ("F32", MATRIX[0])})
    assert run("merge", "r.yml", "out", "--overwrite")[0] == 6
    assert [p.name for p in Path("out").iterdir()] == ["model.safetensors"]
    assert names() == {"a", "b", "r.yml", "out"}


def test_an_empty_directory_is_a_place_for_an_output(run: Run) -> None:
    Path("out").mkdir()
    assert run("merge", "r.yml", "out")[0] == 0
    np.testing.assert_array_equal(merged(), MEAN)


def test_an_output_that_ends_in_safetensors_is_one_file(run: Run) -> None:
    assert run("merge", "r.yml", "out.safetensors", "--max-shard-size", "8B")[0] == 0
    assert names() == {"a", "b", "r.yml", "out.safetensors"}
    assert Path("out.safetensors").is_file()
    np.testing.assert_array_equal(merged("out.safetensors"), MEAN)


def test_one_file_is_replaced_only_when_asked(run: Run) -> None:
    save_file(Path("out.safetensors"), {"old": ("F32", MATRIX)})
    old = Path("out.safetensors").read_bytes()
    assert run("merge", "r.yml", "out.safetensors")[0] == 8
    assert Path("out.safetensors").read_bytes() == old
    assert run("merge", "r.yml", "out.safetensors", "--overwrite")[0] == 0
    np.testing.assert_array_equal(merged("out.safetensors"), MEAN)
    assert names() == {"a", "b", "r.yml", "out.safetensors"}


def test_a_single_file_is_a_model_for_recipes(run: Run) -> None:
    save_file(Path("b.safetensors"), {"w": ("F32", 2 * MATRIX), "v": ("F32", 2 * MATRIX[0])})
    Path("r.yml").write_text("merge_method: linear\nmodels: [a, b.safetensors]\n")
    assert run("merge", "r.yml", "out")[0] == 0
    np.testing.assert_array_equal(merged(), MEAN)


def test_notes_of_the_recipe_go_to_stderr(run: Run) -> None:
    Path("r.yml").write_text("merge_method: linear\nmodels: [a, b]\nparameters: {int8_mask: true}\n")
    code, stdout, stderr = run("merge", "r.yml", "out")
    assert (code, len(stdout.splitlines())) == (0, 1)
    assert (
        stderr
        == "note: r.yml:3: int8_mask has no effect: it only changes the dtype of a temporary tensor in mergekit.\n"
    )


def test_methods_lists_every_method(run: Run) -> None:
    code, stdout, stderr = run("methods")
    assert (code, stderr) == (0, "")
    first = [line.split()[0] for line in stdout.splitlines() if line]
    assert sorted(name for name in first if name in registry()) == sorted(registry())
    assert "\nties              base + 1 or more    Trim each task vector, elect a sign " in stdout
    assert (
        stdout.index("\nlinear ") < stdout.index("\nOf task vectors (model - base)") < stdout.index("\nties ")
    )
    assert {m["name"] for m in json.loads(run("methods", "--json")[1])} == set(registry())


def test_a_method_is_shown_in_full(run: Run) -> None:
    code, stdout, _ = run("methods", "ties")
    assert code == 0
    assert stdout.startswith("ties\n====\n\nTrim each task vector, ")
    assert "https://arxiv.org/abs/2306.01708" in stdout
    assert (
        "  density: (0, 1]; one per model; default 1\n      the share of each tensor's entries that is kept"
        in stdout
    )
    assert "use when    models of different tasks disagree in sign" in stdout
    assert "\n  merge_method: ties\n  base_model: path/to/base\n" in stdout
    assert max(map(len, stdout.splitlines())) <= 100
    data = json.loads(run("methods", "ties", "--json")[1])
    assert (data["name"], data["space"], data["base"], data["models"]) == (
        "ties",
        "delta",
        "required",
        [1, None],
    )
    assert data["options"]["elect"] == "weighted | mass | count; default weighted"


def test_weights_prints_norms_weights_and_the_line_of_a_recipe(run: Run, tmp_path: Path) -> None:
    base, models = family(tmp_path, count=2)
    code, stdout, stderr = run(
        "norm-weights", *map(str, models), "--base", str(base), "--mode", "power", "--scale", "0.5"
    )
    assert (code, stderr) == (0, "")
    data = json.loads(
        run(
            "norm-weights",
            *map(str, models),
            "--base",
            str(base),
            "--mode",
            "power",
            "--scale",
            "0.5",
            "--json",
        )[1]
    )
    (part,) = data["parts"]
    rows = [
        f"{n:14.4g}  {w:10.4f}  {m}"
        for n, w, m in zip(part["l2_norms"], part["weights"], models, strict=True)
    ]
    assert stdout.splitlines() == [
        f"task vectors from {base}",
        "",
        "       L2 norm      weight  model",
        *rows,
        "",
        "in a recipe, under parameters:",
        "  weight: {from: l2_norm, mode: power, alpha: 1.5, scale: 0.5, per: model}",
    ]
    code, _, stderr = run("norm-weights", str(models[0]), "--base", str(base))
    assert code == 3
    assert "expected two models or more" in stderr


def test_plan_and_merge_say_what_weights_follow_from(run: Run, tmp_path: Path) -> None:
    base, models = family(tmp_path, count=2)
    text = f"merge_method: linear\nbase_model: {base}\nmodels: [{models[0]}, {models[1]}]\nparameters: {{weight: {{from: l2_norm, per: PER}}}}\n"
    (tmp_path / "whole.yml").write_text(text.replace("PER", "model"))
    (tmp_path / "layers.yml").write_text(text.replace("PER", "layer"))
    planned = run("plan", str(tmp_path / "layers.yml"))[1]
    assert (
        "weights   exp (beta 1, scale 1) of the L2 norms of 20 tensors, by layer in 3 groups, measured before the merge\n"
        f"weights     {models[0]}, {models[1]}\n"
    ) in planned
    code, _, stderr = run("merge", str(tmp_path / "whole.yml"), str(tmp_path / "out"))
    assert code == 0
    assert (
        "weights: exp (beta 1, scale 1) of the L2 norms of 20 tensors, measured before the merge\n" in stderr
    )
    assert (
        len(
            [line for line in stderr.splitlines() if line.startswith("weights:   0.") and "(L2 norm " in line]
        )
        == 2
    )


def test_schema_prints_a_json_schema_of_recipes(run: Run) -> None:
    code, stdout, stderr = run("schema")
    assert (code, stderr) == (0, "")
    assert json.loads(stdout)["$schema"] == "https://json-schema.org/draft/2020-12/schema"


def test_inspect_shows_a_model(run: Run, tmp_path: Path) -> None:
    base, _ = family(tmp_path / "llama", count=0, shards=2)
    code, stdout, stderr = run("inspect", str(base))
    assert (code, stderr) == (0, "")
    assert "architecture  LlamaForCausalLM, 2 layers, 16 wide" in stdout
    assert "    2 x  BF16  (48, 16)             model.layers.*.mlp.gate_proj.weight" in stdout
    assert "model-00001-of-00002.safetensors: " in stdout
    data = json.loads(run("inspect", str(base), "--json")[1])
    assert (data["model_type"], data["tied_embeddings"], data["vocabulary"]) == (
        "llama",
        True,
        {"config": 32, "tokens": None},
    )
    assert len(data["tensors"]) == 20
    assert data["dtypes"]["BF16"]["bytes"] == data["bytes"] == 2 * data["parameters"]


def test_inspect_shows_one_file_and_every_tensor(run: Run) -> None:
    save_file(
        Path("one.safetensors"),
        {"layers.0.w": ("F32", MATRIX), "layers.1.w": ("F32", MATRIX), "ids": ("I64", np.arange(3))},
    )
    code, stdout, _ = run("inspect", "one.safetensors")
    assert code == 0
    assert "architecture  unknown" in stdout
    assert "    2 x  F32   (4, 2)               layers.*.w" in stdout
    assert "    1 x  F32   (4, 2)               layers.1.w" in run("inspect", "one.safetensors", "-v")[1]


@pytest.mark.parametrize("architectures", ["XModel", ["XModel"], [None, "XModel"], {"XModel": 1}])
def test_inspect_takes_a_config_as_it_is(run: Run, architectures: object) -> None:
    Path("a/config.json").write_text(json.dumps({"architectures": architectures}))
    code, stdout, _ = run("inspect", "a")
    assert code == 0
    assert "XModel" in stdout


def test_help_and_version_answer(run: Run) -> None:
    from alnico import __version__

    assert run("--version") == (0, f"alnico {__version__}\n", "")
    code, stdout, stderr = run("merge", "--help")
    assert (code, stderr) == (0, "")
    assert "--overwrite" in stdout
    assert "--allow-crimes" not in stdout


def test_the_program_runs_from_a_shell() -> None:
    command = [sys.executable, "-m", "alnico"]
    done = subprocess.run(
        [*command, "merge", "-", "out"], input=Path("r.yml").read_bytes(), capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
    np.testing.assert_array_equal(merged(), MEAN)
    done = subprocess.run([*command, "merge", "nowhere.yml", "out2"], capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (3, b"")


def test_a_reader_that_leaves_early_is_no_error() -> None:
    tensors = {f"layers.{i}.{'x' * 90}": ("F32", MATRIX[0]) for i in range(2000)}
    save_model(Path("many"), tensors)
    code = f"{sys.executable} -m alnico inspect many -v | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.splitlines()[1:] == ["0"]


def test_an_analysis_shows_the_names_of_models_that_begin_alike(run: Run, tmp_path: Path) -> None:
    base, tuned = family(tmp_path / "analyzed", 2)
    named = [
        path.rename(path.with_name(f"encoder-for-{task}"))
        for path, task in zip(tuned, ("law", "news"), strict=True)
    ]
    code, out, _ = run("analyze", "--base", str(base), *map(str, named))
    assert code == 0
    (head,) = (line for line in out.splitlines() if line.startswith("relative change by group"))
    assert head.split()[-2:] == ["encoder-for-law", "encoder-for-news"]
    rows = out.splitlines()[out.splitlines().index(head) + 1 :]
    assert {len(row) for row in rows[:2]} == {len(head)}
