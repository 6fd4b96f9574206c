"""Extraction: PEFT loads what is written, nothing is lost without a word, and only the options decide the bits."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import made
from alnico.checkpoint.open_model import open_model
from alnico.errors import MismatchError, NonFiniteError, OutputError, RecipeError, ResourceError
from alnico.lora import extract

Pair = tuple[Path, Path]


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    """A base and a fine-tune of it, in float32, large enough for random directions."""
    base, tuned = made.family(tmp_path, 1, dtype="F32", hidden=160, vocabulary=200, tied=False)
    return tuned[0], base


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def folded(base: Path, adapter: Path) -> dict[str, np.ndarray]:
    with open_model(f"{base}+{adapter}") as model:
        return {name: model.read(name) for name in model.tensors}


def difference(pair: Pair) -> dict[str, np.ndarray]:
    tuned, base = (made.read_model(folder) for folder in pair)
    return {name: tuned[name].astype(np.float64) - base[name] for name in base}


def change(folder: Path, name: str, into: Callable[[np.ndarray], np.ndarray] | None) -> None:
    """Write a model again with one tensor changed, or without it."""
    tensors = made.read_file(folder / "model.safetensors")
    dtype, values = tensors.pop(name) if name in tensors else ("F32", np.zeros(0))
    if into is not None:
        tensors[name] = (dtype, into(values.copy()))
    made.save_file(folder / "model.safetensors", tensors)


def test_the_error_of_each_tensor_is_that_of_numpys_best_of_its_rank(pair: Pair, tmp_path: Path) -> None:
    found = extract(*pair, tmp_path / "out", rank=12)
    deltas, base, result = difference(pair), made.read_model(pair[1]), folded(pair[1], tmp_path / "out")
    for tensor in found.tensors:
        delta = deltas[tensor.name]
        left = np.linalg.norm(result[tensor.name] - base[tensor.name].astype(np.float64) - delta)
        assert tensor.measured == pytest.approx(left, rel=1e-5, abs=1e-6)
        if tensor.treatment == "factors":
            values = np.linalg.svd(delta, compute_uv=False)
            assert tensor.rank == 12
            assert left <= 1.01 * np.sqrt(np.sum(values[12:] ** 2))
            assert tensor.change == pytest.approx(np.linalg.norm(delta))
        else:
            assert tensor.treatment == "saved"
            assert left <= 1e-6 * np.linalg.norm(delta)
    lost = np.sqrt(sum(t.left**2 for t in found.tensors) / sum(np.sum(d**2) for d in deltas.values()))
    assert found.error == pytest.approx(lost)


def test_norms_are_modules_to_save(pair: Pair, tmp_path: Path) -> None:
    extract(*pair, tmp_path / "out", rank=4)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["input_layernorm", "norm", "post_attention_layernorm"]
    assert config["target_modules"] == [
        "down_proj", "embed_tokens", "gate_proj", "k_proj", "lm_head", "o_proj", "q_proj", "up_proj", "v_proj",
    ]  # fmt: skip


def test_a_saved_module_has_a_name_that_no_other_ends_with(pair: Pair, tmp_path: Path) -> None:
    base = made.read_model(pair[1])
    for name in base:
        if "layernorm" in name:
            change(pair[0], name, lambda _, name=name: base[name])  # type: ignore[misc]
    extract(*pair, tmp_path / "out", rank=4)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == [
        "model.norm"
    ]  # PEFT takes what ends with a name: "norm" would be all


def test_exact_vectors_at_full_rank_give_the_fine_tune_back(pair: Pair, tmp_path: Path) -> None:
    found = extract(*pair, tmp_path / "out", rank=1000, exact=True)
    tuned, result = made.read_model(pair[0]), folded(pair[1], tmp_path / "out")
    for name, values in tuned.items():
        assert np.abs(result[name] - values).max() <= 1e-6 * np.abs(values).max(), name
    assert found.error < 1e-5


def test_the_energy_asked_for_is_kept_by_the_least_rank(pair: Pair, tmp_path: Path) -> None:
    found = extract(*pair, tmp_path / "out", energy=0.6, exact=True)
    for tensor in found.of("factors"):
        shares = np.cumsum(np.linalg.svd(difference(pair)[tensor.name], compute_uv=False) ** 2)
        assert tensor.rank == int(np.flatnonzero(shares >= 0.6 * shares[-1])[0]) + 1
    nearly = extract(*pair, tmp_path / "nearly", energy=0.6)
    for tensor, best in zip(nearly.of("factors"), found.of("factors"), strict=True):
        assert tensor.energy >= 0.6 - 1e-6
        assert best.rank <= tensor.rank <= best.rank + 2


def test_bytes_are_spent_up_to_the_size_and_no_further(pair: Pair, tmp_path: Path) -> None:
    found = extract(*pair, tmp_path / "out", size=150_000)
    written = (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
    assert written == found.byte_size
    assert 130_000 < written <= 150_000
    assert len({t.rank for t in found.of("factors")}) > 1
    assert [t.why for t in found.of("left out")] == ["the size keeps more energy elsewhere"] * len(
        found.of("left out")
    )


def test_what_did_not_change_is_left_out_and_said(pair: Pair, tmp_path: Path) -> None:
    base = made.read_model(pair[1])
    same = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight"]
    for name in same:
        change(pair[0], name, lambda _, name=name: base[name])  # type: ignore[misc]
    found = extract(*pair, tmp_path / "out", rank=4)
    assert [t.name for t in found.of("unchanged")] == same
    keys = made.read_file(tmp_path / "out" / "adapter_model.safetensors")
    assert not [key for key in keys if any(name.rpartition(".")[0] in key for name in same)]


def test_filters_and_choices_leave_out_by_name(pair: Pair, tmp_path: Path) -> None:
    found = extract(
        *pair,
        tmp_path / "out",
        rank=4,
        include=["self_attn", "norm"],
        exclude=["v_proj"],
        others="leave",
        embeddings="leave",
    )
    assert {t.name.split(".")[-2] for t in found.of("factors")} == {"q_proj", "k_proj", "o_proj"}
    whys = {t.name: t.why for t in found.of("left out")}
    assert whys["model.layers.0.self_attn.v_proj.weight"] == "excluded by the filters"
    assert whys["model.norm.weight"] == "not a matrix, left out (others: leave)"
    kept = extract(*pair, tmp_path / "kept", rank=4, embeddings="leave")
    assert {t.name for t in kept.of("left out")} == {"model.embed_tokens.weight", "lm_head.weight"}
    assert kept.share(kept.of("left out")[0]) > 0


def test_tensors_without_a_counterpart_are_named(pair: Pair, tmp_path: Path) -> None:
    change(pair[0], "lm_head.weight", lambda values: np.concatenate([values, values[:8]]))
    change(pair[0], "score.weight", lambda _: np.ones((2, 160), np.float32))
    change(pair[0], "model.norm.weight", None)
    found = extract(*pair, tmp_path / "out", rank=4)
    assert found.unmatched == (
        ("lm_head.weight", f"is (208, 160) in {pair[0]} and (200, 160) in {pair[1]}"),
        ("model.norm.weight", f"{pair[0]} has no such tensor"),
        ("score.weight", f"{pair[1]} has no such tensor"),
    )


def test_threads_and_budgets_change_no_bit(pair: Pair, tmp_path: Path) -> None:
    outputs = []
    for i, (threads, memory) in enumerate(((1, "2GiB"), (3, "2GiB"), (1, "430MiB"), (2, 500 << 20))):
        extract(*pair, tmp_path / f"out{i}", rank=20, threads=threads, memory=memory)
        outputs.append(files_of(tmp_path / f"out{i}"))
    assert set(outputs[0]) == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "alnico.lock.json",
        "extraction.json",
    }
    assert outputs.count(outputs[0]) == len(outputs)


def test_what_is_held_and_what_is_read_again_have_the_same_bits(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alnico.lora.extract_deltas import ExtractMemory

    for options in ({"rank": 20}, {"rank": 20, "exact": True}):
        outputs = []
        for is_held in (True, False):
            monkeypatch.setattr(ExtractMemory, "holds", lambda *_, is_held=is_held: is_held)
            extract(*pair, tmp_path / "out", overwrite=True, **options)  # type: ignore[arg-type]
            outputs.append(files_of(tmp_path / "out"))
        assert outputs[0] == outputs[1]


KILLED = """
import os, signal, sys, time
from pathlib import Path
from alnico.events import Advanced
from alnico.lora import extract

tuned, base, out, after = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
journal = out.parent / f".{out.name}.alnico-part" / "journal.jsonl"
done = 0

def watch(event):
    global done
    if isinstance(event, Advanced):
        done += 1
        if done == after:
            while journal.read_text().count("digest") < after:  # the lines of a batch come after the data is synced
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

extract(tuned, base, out, rank=8, threads=1, watch=watch)
"""


def kill(pair: Pair, out: Path, after: int) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, pair), str(out), str(after)],
        capture_output=True,
        timeout=300,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()


def test_a_killed_extraction_is_taken_up_and_gives_the_same_bytes(pair: Pair, tmp_path: Path) -> None:
    extract(*pair, tmp_path / "whole", rank=8)
    kill(pair, tmp_path / "out", 7)
    assert not (tmp_path / "out").exists()
    with pytest.raises(OutputError, match=r"changed since it began: --rank\. Undo"):
        extract(*pair, tmp_path / "out", rank=9)
    assert not (tmp_path / "out").exists()
    found = extract(*pair, tmp_path / "out", rank=8)
    assert found.resumed == 7
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))


def test_what_a_kill_left_damaged_is_made_again(pair: Pair, tmp_path: Path) -> None:
    extract(*pair, tmp_path / "whole", rank=8)
    kill(pair, tmp_path / "out", 5)
    spool = tmp_path / ".out.alnico-part" / "factors.spool"
    data = bytearray(spool.read_bytes())
    data[100] ^= 1
    spool.write_bytes(data)
    assert extract(*pair, tmp_path / "out", rank=8).resumed == 4
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_restart_forgets_and_a_changed_input_is_named(pair: Pair, tmp_path: Path) -> None:
    kill(pair, tmp_path / "out", 5)
    change(pair[0], "lm_head.weight", lambda values: values + 1)
    with pytest.raises(
        OutputError, match="holds an unfinished extraction; changed since it began: an input file"
    ):
        extract(*pair, tmp_path / "out", rank=8)
    assert extract(*pair, tmp_path / "out", rank=8, restart=True).resumed == 0


MEASURED = """
import json, sys
from alnico.lora import extract
extract(*sys.argv[1:4], rank=4, memory=int(sys.argv[4]), threads=2)
status = open("/proc/self/status").read()  # ru_maxrss would count the parent's size at the fork
print(int(status.split("VmHWM:")[1].split()[0]) * 1024)
"""


@pytest.mark.slow
def test_a_tensor_larger_than_the_budget_is_extracted_inside_it(tmp_path: Path) -> None:
    budget = 500 << 20
    random = np.random.default_rng(0)
    block = (random.standard_normal((1000, 6000)) * 0.02).astype(np.float32)
    for name, size in (("base", 0.0), ("tuned", 0.001)):
        values = np.tile(block, (23, 1))
        values += size * np.outer(np.sin(np.arange(23_000)), np.cos(np.arange(6_000))).astype(np.float32)
        made.save_model(
            tmp_path / name, {"w.weight": ("BF16", values), "n.weight": ("BF16", block[:100])}, {}
        )
    command = [
        sys.executable,
        "-c",
        MEASURED,
        *(str(tmp_path / n) for n in ("tuned", "base", "out")),
        str(budget),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) <= budget < 4 * 23_000 * 6_000


def refuses(kind: type[Exception], message: str, pair: Pair, out: Path, **options: Any) -> None:
    """The call fails with exactly this message, and leaves nothing behind."""
    with pytest.raises(kind) as caught:
        extract(*pair, out, **options)
    assert str(caught.value) == message
    assert not out.exists()
    assert not list(out.parent.glob(".*"))


def test_equal_models_have_nothing_to_extract(pair: Pair, tmp_path: Path) -> None:
    refuses(
        MismatchError,
        f"{pair[1]} equals {pair[1]} in all 21 tensors, so there is nothing to extract; expected a fine-tune and its base. Check the two "
        "paths.",
        (pair[1], pair[1]),
        tmp_path / "out",
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", [0, 1], ids=["fine-tune", "base"])
def test_what_is_no_number_is_named_with_its_place(
    pair: Pair, tmp_path: Path, which: int, value: float
) -> None:
    def spoilt(values: np.ndarray) -> np.ndarray:
        values[3, 5] = value
        return values

    change(pair[which], "model.layers.1.mlp.down_proj.weight", spoilt)
    refuses(
        NonFiniteError,
        f"model.layers.1.mlp.down_proj.weight[3, 5] is {value} in {pair[which]}; expected finite numbers. Repair that model.",
        pair,
        tmp_path / "out",
    )


def test_unrelated_models_are_refused(tmp_path: Path) -> None:
    one, _ = made.family(tmp_path / "a", 0, seed=1, dtype="F32", hidden=80)
    other, _ = made.family(tmp_path / "b", 0, seed=2, dtype="F32", hidden=80)
    with pytest.raises(MismatchError) as caught:
        extract(one, other, tmp_path / "out")
    text = str(caught.value)
    assert text.startswith(f"{one} was not tuned from {other}: 10 of 10 compared matrices are unrelated: ")
    assert text.endswith("; expected cosines near 1. Give the base that it was tuned from.")


def test_models_of_other_sizes_are_refused(pair: Pair, tmp_path: Path) -> None:
    other, _ = made.family(tmp_path / "b", 0, dtype="F32", hidden=16, vocabulary=200, tied=False)
    refuses(
        MismatchError,
        f"{other} and {pair[0]} are models of different sizes: hidden size 16 and 160, intermediate size 48 and 480; expected one architecture and "
        "size. Give a fine-tune and its own base.",
        (pair[0], other),
        tmp_path / "out",
    )


OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"rank": 0}, "extract: rank is 0; expected at least 1. Choose a larger one."),
    (
        {"energy": 1.5},
        "extract: energy is 1.5; expected the share of squares to keep, in (0, 1]. Choose 0.9, for example.",
    ),
    (
        {"rank": 4, "energy": 0.9},
        "extract: rank and energy both set the ranks; expected one of them. Remove one.",
    ),
    (
        {"rank": 4, "max_rank": 8},
        "extract: max_rank limits energy or size, but rank is set; expected one of the two. Remove one.",
    ),
    ({"others": "drop"}, "extract: others is 'drop'; expected save or leave. Choose one of them."),
    (
        {"dtype": "int8"},
        "extract: dtype is 'int8'; expected float32, bfloat16 or float16. Choose one of them.",
    ),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=[m for _, m in OPTIONS])
def test_an_option_out_of_its_range_is_refused(
    pair: Pair, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    refuses(RecipeError, message, pair, tmp_path / "out", **options)


def test_a_filter_that_fits_nothing_is_refused(pair: Pair, tmp_path: Path) -> None:
    refuses(
        RecipeError,
        f"include is 'no_such', which matches no tensor of {pair[1]}; an example of a name is lm_head.weight. Correct the filter, or remove it.",
        pair,
        tmp_path / "out",
        include=["no_such"],
    )


def test_too_small_a_budget_is_refused_before_anything_is_read(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(
        ResourceError,
        match=r"^extract: .* needs .* in addition to .* for the rest; the budget is 104.9 MB. Raise --memory to \d+MiB, ",
    ):
        extract(*pair, tmp_path / "out", memory="100MiB")
    refuses(
        ResourceError,
        "extract: the tensors saved whole need 9.2 kB, but the size is 5.0 kB. Raise --size, or leave out tensors that are not matrices "
        "(--others leave).",
        pair,
        tmp_path / "out",
        size=5000,
    )


def test_an_output_that_stands_is_refused_and_replaced_when_asked(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("x")
    with pytest.raises(OutputError, match="exists and is not empty"):
        extract(*pair, out, rank=2)
    with pytest.raises(OutputError, match="holds mine, not part of a model"):
        extract(*pair, out, rank=2, overwrite=True)
    extract(*pair, out, rank=2, overwrite_anything=True)
    assert not (out / "mine").exists()
    extract(*pair, out, rank=2, overwrite=True)
    with pytest.raises(OutputError, match="is the working directory"):
        extract(*pair, ".", rank=2)


def test_the_command_prints_what_is_lost_where(
    pair: Pair, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    code, text, _ = run(
        "lora", "extract", *map(str, pair), str(tmp_path / "out"), "--rank", "4", "--embeddings", "leave"
    )
    assert code == 0
    assert "14 matrices as factors of rank 4" in text
    assert "model.embed_tokens.weight (embeddings and heads are left out (embeddings: leave))" in text
    code, text, _ = run(
        "lora", "extract", *map(str, pair), str(tmp_path / "as_json"), "--energy", "0.5", "--json"
    )
    data = json.loads(text)
    assert code == 0
    assert data["is_verified"]
    assert {t["treatment"] for t in data["tensors"]} == {"factors", "saved"}
    assert run("lora", "extract", *map(str, pair), str(tmp_path / "out"))[0] == OutputError.exit_code
