"""No text of a stranger reaches the terminal as it is: escape sequences and newlines of names and values are escaped, by every command."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

import alnico
from alnico.cli.printing import json_page
from alnico.errors import AlnicoError, visible
from alnico.events import Advanced, Fetching
from made import save_file, save_model

EVIL = "e\x1b[2J\x1b]0;t\x07\nFORGED line\r\x9b31m\x7f\u202e\u2066\u200b\u2028[red]m[link=x]\t"
"""What each name and value holds."""

MATRIX = np.arange(1, 9, dtype=np.float32).reshape(4, 2)
Run = Callable[..., tuple[int, str, str]]


def evil(name: str) -> str:
    return f"{name}{EVIL}"


def one_line(name: str) -> str:
    """A name of a file: text with a newline is taken for a recipe."""
    return evil(name).replace("\n", "").replace("\u2028", "").strip()


CONFIG = {
    "architectures": [evil("Arch"), evil("Brch")], "model_type": evil("type"), "vocab_size": 4, "hidden_act": evil("act"),
    "num_hidden_layers": evil("3"), evil("key"): evil("value"), "torch_dtype": evil("dtype"), "_name_or_path": evil("path"),
    "rope_scaling": {evil("rope"): evil("scale")}, "transformers_version": evil("5"),
}  # fmt: skip
TOKENIZER = {
    "model": {"type": "WordLevel", "vocab": {evil("token"): 0, "b": 1, "c": 2, "d": 3}, "unk_token": "b"},
    "added_tokens": [
        {"id": 1, "content": "b", "special": True},
        {"id": 3, "content": evil("added"), "special": True},
    ],
}
CARD = f"---\nlicense: {json.dumps(evil('lic'))}\nlicense_name: {json.dumps(evil('name'))}\nbase_model: {json.dumps(evil('b/m'))}\n---\n"


def make(folder: Path, factor: float = 1, suffix: str = "", **config: object) -> None:
    tensors = {
        evil("embed_tokens") + ".weight": ("F32", factor * MATRIX),
        f"layers.0.{evil('proj')}{suffix}.weight": ("F32", factor * MATRIX + 0.1),
        evil("norm"): ("F32", factor * MATRIX[0]),
        evil("ids"): ("I64", np.arange(3)),
    }
    save_model(folder, tensors, {**CONFIG, **config})
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": evil("T"), "chat_template": evil("{{ x }}")})
    )
    (folder / "generation_config.json").write_text(json.dumps({evil("gen"): evil("x"), "top_p": factor}))
    (folder / "README.md").write_text(CARD)
    (folder / evil("side.json")).write_text("{}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("terminal")
    make(folder / "a")
    make(folder / "b", 1.5, model_type=evil("other"))
    make(folder / "other", 2, suffix=evil("x"))
    nan = folder / "nan"
    make(nan)
    save_model(nan, {evil("n"): ("F32", np.array([1, np.nan], np.float32))}, CONFIG)
    small = folder / "small"
    make(small)
    save_model(small, {evil("embed_tokens") + ".weight": ("F32", MATRIX[:2])}, CONFIG)
    broken = folder / "broken"
    make(broken)
    (broken / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {evil("w"): evil("shard")}})
    )
    for i, text in enumerate(
        (
            json.dumps({evil("w"): {"dtype": evil("F9"), "shape": [1], "data_offsets": [0, 4]}}),
            "{" + evil("x"),
        )
    ):
        (folder / evil(f"header{i}.safetensors")).write_bytes(
            len(text.encode()).to_bytes(8, "little") + text.encode() + b"1234"
        )
    adapter = folder / "adapter"
    adapter.mkdir()
    said = {
        "peft_type": "LORA",
        "r": 1,
        "lora_alpha": 1,
        "base_model_name_or_path": evil("base"),
        "target_modules": [evil("m"), evil("proj")],
    }
    (adapter / "adapter_config.json").write_text(json.dumps(said))
    factors = {
        f"base_model.model.layers.0.{evil('proj')}.lora_{x}.weight": ("F32", np.ones(s, np.float32))
        for x, s in (("A", (1, 2)), ("B", (4, 1)))
    }
    save_file(adapter / "adapter_model.safetensors", factors)
    other = folder / "adapter2"
    other.mkdir()
    (other / "adapter_config.json").write_text(
        json.dumps(
            {
                **said,
                "base_model_name_or_path": evil("other"),
                "peft_type": evil("LOHA"),
                evil("k"): evil("v"),
            }
        )
    )
    save_file(other / "adapter_model.safetensors", factors)
    recipes = {
        "good": {"merge_method": "linear", "models": ["a", "b"], "unrelated": "allow"},
        "ties": {"merge_method": "ties", "base_model": "a", "models": ["b"], "parameters": {"density": 0.5, "weight": {"from": "l2_norm", "mode": "exp"}}, "unrelated": "allow"},
        "misfit": {"merge_method": "linear", "models": ["a", "other"]},
        "drop": {"merge_method": "linear", "models": ["a", "other"], "missing": "drop", "unrelated": "allow"},
        "small": {"merge_method": "linear", "models": ["a", "small"]},
        "nan": {"merge_method": "linear", "models": ["nan", "nan"]},
        "broken": {"merge_method": "linear", "models": ["a", "broken"]},
        "nowhere": {"merge_method": "linear", "models": ["a", "nowhere"]},
        "unknown": {"merge_method": evil("linear"), "models": ["a"], evil("key"): evil("v"), "parameters": {evil("o"): evil("x")}, "dtype": evil("f")},
        "filters": {"merge_method": "linear", "models": ["a", "b"], "unrelated": "allow", "parameters": {"weight": [{"filter": evil("no"), "value": 1}, {"filter": "re:" + evil("("), "value": 1}, {"filter": "=" + evil("no"), "value": 1}, {"value": 1}]}},
        "idle": {"merge_method": "linear", "models": ["a", "b"], "unrelated": "allow", "parameters": {"weight": [{"filter": evil("no"), "value": 1}, {"value": 1}]}},
        "tokens": {"merge_method": "linear", "models": ["a", "b"], "tokenizer": {"source": evil("c"), "tokens": {evil("t"): {"source": evil("x")}}}},
        "tokens2": {"merge_method": "linear", "models": ["a", "b"], "unrelated": "allow", "tokenizer": {"source": "union", "tokens": {evil("t"): {"source": "a"}, evil("token"): {"source": evil("zz")}}}},
        "template": {"merge_method": "linear", "models": ["a", "b"], "unrelated": "allow", "chat_template": evil("chatml")},
        "stage": {"name": "stage", "merge_method": "linear", "models": ["a", "b"], "unrelated": "allow"},
        "slices": {"merge_method": "passthrough", "slices": [{"sources": [{"model": "a", "layer_range": [0, 9]}]}]},
        "modules": {"merge_method": "linear", "modules": {evil("m"): {"slices": [{"sources": [{"model": "a", "layer_range": [0, 1]}]}]}}},
        "lora": {"merge_method": "linear", "models": ["a+adapter", "a"], "unrelated": "allow"},
        "hub": {"merge_method": "linear", "models": ["own/name@rev", "o/n"]},
        "statistics": {"merge_method": "fisher", "models": [{"model": "a", "parameters": {"fisher": "f"}}, {"model": "b", "parameters": {"fisher": "g"}}]},
        "names": {"name": evil("stage"), "merge_method": "linear", "models": [evil("a"), f"{evil('own')}/{evil('name')}@{evil('rev')}", f"{evil('a')}+{evil('adapter')}"]},
    }  # fmt: skip
    for name, recipe in recipes.items():
        (folder / f"{name}.yml").write_text(yaml.safe_dump(recipe))
    (folder / one_line("r.yml")).write_text(yaml.safe_dump(recipes["good"]))
    (folder / "raw.yml").write_text(f"merge_method: {EVIL.replace(chr(9), ' ')}\nmodels: [a]\n", "utf-8")
    (folder / "tasks.yml").write_text(
        yaml.safe_dump(
            {
                "tasks": [
                    {"name": evil("task"), "type": evil("accuracy"), evil("k"): 1, "data": evil("d.jsonl")}
                ]
            }
        )
    )
    (folder / "tasks2.yml").write_text(
        yaml.safe_dump({"tasks": [{"name": evil("task"), "type": "perplexity", "data": evil("d.jsonl")}]})
    )
    (folder / "scores.csv").write_text(
        f"task,model,score\n{evil('t').replace(chr(10), '')},{evil('m').replace(chr(10), '')},x\n"
    )
    (folder / "scores.json").write_text(json.dumps({evil("t"): {evil("b"): evil("x")}}))
    (folder / "scores2.json").write_text(json.dumps({evil("t"): {evil("a"): 0.5, evil("b"): 0.6}}))
    (folder / "search.yml").write_text(
        yaml.safe_dump(
            {
                "merge_method": "linear",
                "models": ["a", "b"],
                "parameters": {"weight": {"search": [evil("x"), 1]}},
                "search": {evil("k"): evil("v"), "tasks": evil("t.yml")},
            }
        )
    )
    (folder / evil("key.pem")).write_text(evil("key"))
    for name in ("a", "b", "other", "small", "nan", "broken", "adapter", "adapter2"):
        (folder / evil(name)).symlink_to(folder / name)
    return folder


def a(name: str) -> str:
    return evil(name)


COMMANDS: list[list[str]] = [
    *(["plan", f"{name}.yml", *more] for name in (
        "good", "ties", "misfit", "drop", "small", "nan", "broken", "nowhere", "unknown", "filters", "idle", "tokens", "tokens2", "template",
        "stage", "slices", "modules", "lora", "hub", "statistics", "raw",
    ) for more in [["-v"]]),
    ["plan", "good.yml", "--json"], ["plan", "good.yml", "--out", a("o")], ["plan", "good.yml", "--strict-license"], ["plan", one_line("r.yml")], ["plan", one_line("none.yml")], ["plan", a("none.yml")], ["plan", "names.yml"],
    *(["merge", f"{name}.yml", f"OUT/{a(name)}", *more] for name in ("good", "ties", "drop", "nan", "lora", "stage", "template", "idle", "tokens2") for more in [["-v"]]),
    ["merge", "good.yml", f"OUT/{a('good')}"], ["merge", "good.yml", f"OUT/{a('good')}", "--json"], ["merge", "good.yml", f"OUT/{a('j')}", "--json"],
    ["merge", "good.yml", "OUT/one.safetensors", "--memory", a("1")], ["merge", "good.yml", f"OUT/{a('none')}/x"], ["merge", "good.yml", "OUT/k", "--verify-inputs", a("key.pem")],
    ["verify", f"OUT/{a('good')}"], ["verify", f"OUT/{a('good')}", "--against-inputs"], ["verify", f"OUT/{a('good')}", "--key", a("key.pem")], ["verify", a("a")], ["verify", a("none")],
    ["verify", f"OUT/{a('good')}", "--against-inputs", "--input", f"{a('x')}={a('y')}"],
    ["reproduce", f"OUT/{a('good')}"], ["reproduce", f"OUT/{a('good')}", f"OUT/{a('again')}"], ["sign", f"OUT/{a('good')}", "--key", a("key.pem")],
    *([*("inspect", a(name)), *more] for name in ("a", "b", "nan", "broken", "header0.safetensors", "header1.safetensors", "adapter", "adapter2", "none") for more in [["-v"]]),
    ["inspect", a("a"), "--json"], ["inspect", a("adapter"), "--json"],
    *(["diff", a("a"), a(name), *more] for name in ("b", "other", "small", "nan", "broken") for more in ([], ["-v"], ["--json"])),
    ["diff", a("adapter"), a("adapter")],
    ["compare", a("a"), a("b"), f"OUT/{a('good')}", "-v"], ["compare", a("a"), a("b"), f"OUT/{a('good')}", "--out", f"OUT/{a('kept')}", "--scores", "scores2.json"],
    ["compare", a("a"), f"OUT/{a('good')}", "--scores", "scores.csv"], ["compare", a("a"), f"OUT/{a('good')}", "--scores", "scores.json"], ["compare", a("a"), a("b"), "--scores", a("t:m=x")],
    ["compare", a("a"), a("b"), "--json"],
    ["analyze", "--base", a("a"), a("b"), a("other"), "-v", "--out", f"OUT/{a('analysis')}"], ["analyze", "--base", a("a"), a("nan")], ["analyze", "--base", a("a"), a("b"), "--json"],
    ["suggest", "--base", a("a"), a("b"), a("other")], ["suggest", "--base", a("a"), a("b")], ["suggest", "--base", a("a"), a("b"), a("adapter")], ["suggest", "--analysis", f"OUT/{a('analysis')}"], ["suggest", "--analysis", a("a")],
    ["norm-weights", "--base", a("a"), a("b"), a("other")], ["norm-weights", "--base", a("a"), a("b"), a("b"), "--per", "tensor"], ["norm-weights", "--base", a("a"), a("b"), "--mode", a("x")],
    ["lora", "extract", a("b"), a("a"), f"OUT/{a('lora')}", "--rank", "1", "-v"], ["lora", "extract", a("b"), a("small"), f"OUT/{a('lora3')}", "--rank", "1", "--include", a("no")],
    ["lora", "fold", a("a"), a("adapter"), f"OUT/{a('folded')}", "-v"], ["lora", "fold", a("small"), a("adapter2"), f"OUT/{a('f2')}"], ["lora", "fold", a("b"), a("adapter"), f"OUT/{a('f3')}", "--dtype", a("f32")],
    ["lora", "combine", a("adapter"), a("adapter"), f"OUT/{a('c')}", "-v"], ["lora", "combine", a("adapter"), a("adapter2"), f"OUT/{a('c2')}"], ["lora", "combine", a("adapter"), f"OUT/{a('c')}", "--method", a("m")],
    ["lora", "combine", a("adapter"), a("adapter"), f"OUT/{a('c4')}", "--set", f"{a('x')}=1"],
    ["evaluate", a("a"), "--tasks", "tasks.yml"], ["evaluate", a("a"), "--tasks", "tasks2.yml"], ["evaluate", a("a"), "--tasks", a("tasks.yml")], ["soup", a("a"), a("b"), "--tasks", "tasks.yml", "--order", a("x")],
    ["adamerge", "--base", a("a"), a("b"), "--tasks", "tasks.yml"], ["statistics", "fisher", a("a"), "--tasks", "tasks.yml", "--out", f"OUT/{a('s')}"], ["statistics", a("fisher"), a("a"), "--tasks", "t", "--out", "o"],
    ["search", "search.yml"], ["search", a("search.yml")], ["methods", a("ties")], ["push", a("a"), a("o/n")], ["push", f"OUT/{a('good')}", a("o/n")], [a("verb")],
    ["merge", "good.yml", f"OUT/{a('d')}", "--dry-run", "--seed", a("1")],
]  # fmt: skip


def check(text: str, words: list[str]) -> None:
    for line in text.split("\n"):
        assert not line.lstrip(" #'-|").startswith("FORGED"), (
            f"{words[:2]}: a name has made a line: {visible(line)!r}\n{visible(text)}"
        )
        assert line == visible(line), f"{words[:2]}: {visible(line)}"


QUICK = [
    ["plan", "ties.yml", "-v"], ["plan", "misfit.yml"], ["plan", "unknown.yml"], ["plan", "modules.yml"], ["plan", "good.yml", "--json"],
    ["merge", "good.yml", f"OUT/{a('good')}", "-v"], ["verify", f"OUT/{a('good')}"], ["inspect", a("a"), "-v"], ["inspect", a("adapter"), "-v"],
    ["inspect", a("header0.safetensors")], ["inspect", a("broken")], ["diff", a("a"), a("b"), "-v"], ["evaluate", a("a"), "--tasks", "tasks.yml"],
]  # fmt: skip


@pytest.mark.parametrize(
    "commands", [QUICK, pytest.param(COMMANDS, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_no_command_prints_what_a_terminal_obeys(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commands: list[list[str]]
) -> None:
    monkeypatch.chdir(folder)
    for words in commands:
        _, stdout, stderr = run(*(w.replace("OUT/", f"{tmp_path}/") for w in words))
        assert stdout or stderr
        check(stdout, words)
        check(stderr, words)


def test_errors_and_warnings_in_python_have_no_line_of_a_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    for recipe in ("misfit.yml", "small.yml", "broken.yml", "unknown.yml", "modules.yml"):
        with pytest.raises(AlnicoError) as refused:
            alnico.plan(recipe)
        check(str(refused.value), [recipe])
    tensors = {evil("w"): np.array([1.0, np.nan], np.float32)}
    with pytest.raises(AlnicoError) as refused:
        alnico.merge_state_dicts([tensors, tensors], method="linear")
    check(str(refused.value), ["nan"])


class Stream(io.StringIO):
    """A terminal of 60 columns."""

    def isatty(self) -> bool:
        return True


def test_the_bar_shows_names_escaped(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> None:
    """Nothing of rich's markup is obeyed in them either."""
    from alnico.cli import progress

    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "400")
    stream = Stream()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress.bar(False, 0) as watch:
        assert watch is not None
        alnico.merge("good.yml", tmp_path / "out", watch=watch)
        watch(Advanced(evil("w"), 1))
        watch(Fetching((evil("m"),), 1, 10))
    drawn = stream.getvalue()
    assert "FORGED" in drawn
    assert not any(bad in drawn for bad in ("\nFORGED", "\x1b[2J\x1b]0", "\x9b", "\u202e", "\x07"))
    assert "[red]m[link=x]" in drawn


@pytest.mark.parametrize(
    "gone", [OSError(5, "Input/output error"), ValueError("I/O operation on closed file")]
)
def test_a_terminal_that_is_gone_ends_the_bar_alone(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path, gone: Exception
) -> None:
    from alnico.cli import progress

    class Gone(Stream):
        def write(self, text: str) -> int:
            raise gone

    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "stderr", Gone())
    with progress.bar(False, 0) as watch:
        alnico.merge("good.yml", tmp_path / "out", watch=watch)
    assert (tmp_path / "out" / "alnico.lock.json").exists()


def test_del_is_an_escape_in_json_too() -> None:
    text = json_page({"\x7f": ["\x7f", "\x1b"]})
    assert text.replace("\n", "").isprintable()
    assert json.loads(text) == {"\x7f": ["\x7f", "\x1b"]}


def test_text_of_libraries_is_escaped_too() -> None:
    """Whatever is printed to the streams of the command: warnings, tracebacks, the parser's messages."""
    from alnico.cli.streams import Text

    read, write = os.pipe()
    stream = Text(write, None)
    print(f"warning: {EVIL}", file=stream, flush=True)
    stream.write("\rmoves 50%|##  |")
    stream.write("\n")
    stream.flush()
    os.close(write)
    with os.fdopen(read, "rb") as file:
        said = file.read().decode()
    assert said.replace("\rmoves 50%|##  |\n", "").replace("\nFORGED", "").replace("\n", "").isprintable()


class Odd:
    """What a notebook or a GUI may put in a stream's place."""

    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")


@pytest.mark.parametrize("stream", [None, Odd(), object()], ids=["None", "raises", "no file"])
def test_streams_in_python_may_be_none_or_anything(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: object
) -> None:
    from alnico.cli.main import main

    monkeypatch.chdir(folder)
    codes = []
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", stream)
        patched.setattr(sys, "stderr", stream)
        alnico.merge("good.yml", tmp_path / "out")
        for words in (
            ["merge", "good.yml", str(tmp_path / "again")],
            ["plan", "good.yml"],
            ["plan", "misfit.yml"],
        ):
            patched.setattr(sys, "argv", ["alnico", *words])
            try:
                main()
            except SystemExit as ended:
                codes.append(ended.code)
    assert codes == [0, 9, 5]
    assert (tmp_path / "again" / "alnico.lock.json").exists()
