"""The list of commands, and words that are none: each leads to what does it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import alnico
from alnico.cli.main import load_command
from alnico.cli.sections import SECTIONS, START
from alnico.cli.summaries import SUMMARIES
from alnico.errors import MethodError, RecipeError
from alnico.methods import registry
from alnico.methods.shared.other_words import OTHER_WORDS, find_word, plain_word
from made import save_model

ROOT = Path(__file__).parents[2]
Run = Callable[..., tuple[int, str, str]]


def test_every_command_is_in_one_group_of_the_help() -> None:
    listed = [name for names in SECTIONS.values() for name in names]
    assert sorted(listed) == sorted(SUMMARIES)


def test_the_help_has_whole_sentences_under_the_titles_of_groups(run: Run) -> None:
    code, text, _ = run("--help")
    assert code == 0
    plain = " ".join(text.split())
    for title, names in SECTIONS.items():
        assert f"\n{title}:\n" in text
        for name in names:
            sentence = SUMMARIES[name].partition(". ")[0].removesuffix(".") + "."
            assert f" {name} {sentence} " in f"{plain} "


def test_the_help_says_where_to_begin(run: Run) -> None:
    text = run("--help")[1]
    assert "Begin with one of these:\n    alnico demo " in text
    assert (ROOT / re.search(r"docs/[\w/-]+\.md", START)[0]).exists()  # type: ignore[index]


def test_a_group_lists_its_commands(run: Run) -> None:
    text = run("lora", "--help")[1]
    assert re.findall(r"^  (fold|combine|extract) ", text, re.MULTILINE) == ["fold", "combine", "extract"]


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("frankenmerge", "Write a recipe with slices and merge_method: passthrough, and give it to `alnico merge`. See docs/how-to/stack-layers.md."),
        ("slerp", "It is a merge method: alnico merge MODEL MODEL... OUT --method slerp. `alnico methods slerp` describes it."),
        ("Average", "It is the merge method linear; `alnico average RUN OUT` averages the checkpoints of a training run."),
        ("merge_lora", "`alnico lora fold BASE ADAPTER... OUT` merges adapters into their base. See docs/how-to/merge-a-lora.md."),
        ("help", "`alnico --help` lists the commands, `alnico COMMAND --help` describes one."),
        ("train", "alnico trains nothing. `alnico merge` combines models that are trained; `alnico adamerge` learns their coefficients. See docs/tuning.md."),
        ("finetune", "alnico trains nothing. `alnico merge` combines models that are trained; `alnico adamerge` learns their coefficients. See docs/tuning.md."),
        ("run", "`alnico merge RECIPE OUT` merges by a recipe, `alnico merge MODEL MODEL... OUT` without one. See docs/first-merge.md."),
        ("trainer", "Did you mean train? alnico trains nothing. `alnico merge` combines models that are trained; `alnico adamerge` learns their coefficients. See docs/tuning.md."),
        ("card", "`alnico --help` lists the commands."),
        ("mrge", "Did you mean merge?"),
        ("slerpp", "Did you mean slerp? It is a merge method: alnico merge MODEL MODEL... OUT --method slerp. `alnico methods slerp` describes it."),
        ("xyzzy", "`alnico --help` lists the commands."),
    ],
)  # fmt: skip
def test_a_word_that_is_no_command_leads_somewhere(run: Run, word: str, answer: str) -> None:
    code, stdout, stderr = run(word, "a", "--option")
    assert (code, stdout) == (2, "")
    assert stderr.endswith(f"Error: {word!r} is not a command. {answer}\n")


WORDS = (
    "frankenmerge slerp ties dare passthrough average mean extract fold mergekit-yaml mergekit-extract-lora fingerprint merge-lora validate "
    "check stats info convert upload gui help"
)  # fmt: skip


@pytest.mark.parametrize("word", [*WORDS.split(), *registry()])
def test_a_word_that_people_search_for_has_an_answer(run: Run, word: str) -> None:
    stderr = run(word)[2]
    assert "Did you mean" not in stderr
    assert "lists the commands.\n" not in stderr.replace("`alnico --help` lists the commands, `", "")


def test_words_of_a_group_of_commands_are_answered_there(run: Run) -> None:
    assert (
        "'lora merge' is not a command. `alnico lora fold BASE ADAPTER... OUT` merges"
        in run("lora", "merge")[2]
    )
    assert "'lora extrct' is not a command. Did you mean lora extract?" in run("lora", "extrct")[2]


def test_answers_name_commands_options_and_pages_that_exist() -> None:
    for entry in OTHER_WORDS:
        for command in re.findall(r"alnico ([a-z][\w -]*?)(?= [A-Z-]|`|$)", entry.answer):
            name = next((n for n in SUMMARIES if command == n or command.startswith(f"{n} ")), None)
            assert name is not None, entry.answer
            options = {o for p in load_command(name).parameters for n in p.names for o in n.split("/")}
            found = re.findall(rf"alnico {name} [^`;]*", entry.answer)
            assert {o for text in found for o in re.findall(r"(?<= )--?[a-z][\w-]*", text)} <= options, entry
        assert not entry.page or entry.page == "docs/how-to/from-mergekit.md" or (ROOT / entry.page).exists()
        assert not entry.method or entry.method.split()[0].strip(",") in registry()


def test_a_word_means_one_thing() -> None:
    words = [word for entry in OTHER_WORDS for word in entry.words]
    assert len(words) == len(set(map(plain_word, words)))
    assert not set(words) & {n for n in SUMMARIES if n not in ("soup", "average")}
    assert set(words) & set(registry()) == {"passthrough"}


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("frankenmerge", "passthrough, with `slices`"),
        ("soup", "linear"),
        ("mean", "linear"),
        ("drop-and-rescale", "dare_ties or dare_linear"),
    ],
)
def test_a_method_of_another_name_is_named(run: Run, name: str, meant: str) -> None:
    assert find_word(name) is not None
    with pytest.raises(MethodError, match=rf"Did you mean {meant}\?$"):
        alnico.methods(name)
    with pytest.raises(RecipeError, match=rf"unknown merge method '{name}'; .* Did you mean {meant}\?$"):
        alnico.load_recipe({"merge_method": name, "models": ["a"]})
    assert f"Did you mean {meant}?" in run("methods", name)[2]


def test_models_and_recipes_need_no_command(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("a", "slerp")):
        save_model(
            Path(name), {"w": ("F32", np.full((1, 1), number, np.float32))}, {"architectures": ["XModel"]}
        )
    assert run("a", "slerp", "-o", "out")[0] == 0
    shutil.copytree("a", "folder/b")
    assert run("folder/b", "a", "two", "--weights", "1,3")[0] == 0
    assert run("slerp", "a", "three")[0] == 0
    Path("r.yml").write_text("merge_method: linear\nmodels: [a, folder/b]\n")
    assert run("r.yml", "four")[0] == 0
    assert run("a", "slerp")[0] == 2
    code, _, stderr = run("folder/c", "a", "five")
    assert code in (4, 13)  # it could be on the hub
    assert "folder/c" in stderr


def test_a_word_is_answered_without_numba() -> None:
    code = (
        "import sys; from alnico.cli.main import app\n"
        "try: app(['frankenmerge'])\n"
        "except SystemExit: pass\n"
        "print('numba' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
