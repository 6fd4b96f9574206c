"""Options of other programs: the answer names ours, or says where the value belongs."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from alnico.cli.main import load_command
from alnico.cli.other_options import OTHER_NAMES, WORDS
from alnico.cli.summaries import SUMMARIES

Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("merge --base-model", "Did you mean --base?"),
        ("merge --merge-method", "Did you mean --method?"),
        ("merge -m", "Did you mean --method?"),
        ("merge --output", "Did you mean --out or -o?"),
        ("merge --output_dir=x", "Did you mean --out or -o?"),
        ("merge --force", "Did you mean --overwrite?"),
        ("merge --weight", "Did you mean --weights?"),
        ("merge --t", "Did you mean -t?"),
        ("merge --config", "It is a word without an option here. Write: alnico merge RECIPE OUT | MODEL MODEL... OUT."),
        ("merge --models-dir", ""),
        ("merge --lambda", "Options of a merge method are written as --set lambda=VALUE."),
        ("lora combine --density", "Options of a merge method are written as --set density=VALUE."),
        ("lora fold --out", "It is a word without an option here. Write: alnico lora fold BASE ADAPTER... OUT."),
        ("lora fold --base", "It is a word without an option here. Write: alnico lora fold BASE ADAPTER... OUT."),
        ("lora extract --model", "It is a word without an option here. Write: alnico lora extract FINETUNED BASE OUT."),
        ("lora extract --base-model", "It is a word without an option here. Write: alnico lora extract FINETUNED BASE OUT."),
        ("lora extract --out-path", "It is a word without an option here. Write: alnico lora extract FINETUNED BASE OUT."),
        ("lora extract --ranks", "Did you mean --rank or --max-rank?"),
        ("verify --against-input", "Did you mean --against-inputs?"),
        ("inspect --fast", ""),
    ],
)  # fmt: skip
def test_an_option_of_another_program_is_answered(run: Run, words: str, answer: str) -> None:
    code, stdout, stderr = run(*words.split(), "0.5")
    option = words.split()[-1].partition("=")[0]
    assert (code, stdout) == (2, "")
    assert stderr.endswith(f"Error: No such option: {option}.{answer and ' ' + answer}\n")


def test_every_name_leads_to_a_parameter_of_some_command() -> None:
    parameters = {p.name for name in SUMMARIES for p in load_command(name).parameters}
    assert set(OTHER_NAMES.values()) <= parameters | set(WORDS)
    assert {name for names in WORDS.values() for name in names} <= parameters


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("lora fold base adapter", "Missing argument 'ADAPTER'. Write: alnico lora fold BASE ADAPTER... OUT."),
        ("lora extract tuned base", "Missing argument 'OUT'. Write: alnico lora extract FINETUNED BASE OUT."),
        ("compare merged", "Missing argument 'PARENT'. Write: alnico compare PARENT... MERGED."),
        ("merge", "Missing argument 'RECIPE or MODELS'. Write: alnico merge RECIPE OUT | MODEL MODEL... OUT."),
        ("analyze a b", "Missing option '--base'. Give --base: the model that the others were tuned from."),
        ("evaluate a", "Missing option '--tasks' / '-t'. Give --tasks: YAML file of the tasks."),
    ],
)  # fmt: skip
def test_what_is_missing_is_named_with_its_place(run: Run, words: str, answer: str) -> None:
    code, stdout, stderr = run(*words.split())
    assert (code, stdout) == (2, "")
    assert stderr.endswith(f"Error: {answer}\n")
