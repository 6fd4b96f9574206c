"""Chat templates: which one an output has, where it stands, and what the built-in ones render."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from alnico.checkpoint.open_model import open_model
from alnico.checkpoint.source import Model
from alnico.errors import RecipeError
from alnico.vocabulary.chat_template import NAMES, check_setting, plan_chat_template
from alnico.vocabulary.output_vocabulary import VocabularyPlan
from made_tokenizers import save_matrices

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi?"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye?"},
]


def rendered(template: str, messages: list[dict[str, str]], prompt: bool) -> str:
    """As transformers renders templates."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def refuse(message: str) -> None:
        raise ValueError(message)

    environment.globals["raise_exception"] = refuse
    return environment.from_string(template).render(
        messages=messages, bos_token="<s>", eos_token="</s>", add_generation_prompt=prompt
    )


def model(folder: Path, template: Any = None, file: str | None = None, **files: Any) -> Model:
    save_matrices(folder, 0, 4)
    settings = {"tokenizer_class": "X", **({"chat_template": template} if template is not None else {})}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if file is not None:
        (folder / "chat_template.jinja").write_text(file)
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return open_model(folder)


@pytest.mark.parametrize(
    ("name", "whole", "open_end"),
    [
        (
            "alpaca",
            "Be brief.\n\n### Instruction:\nHi?\n\n### Response:\nHello.",
            "### Instruction:\nHi?\n\n### Response:\nHello.\n\n### Instruction:\nBye?\n\n### Response:\n",
        ),
        (
            "chatml",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n",
            "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nBye?<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        (
            "exaone",
            "[|system|]Be brief.[|endofturn|]\n[|user|]Hi?\n[|assistant|]Hello.[|endofturn|]\n",
            "[|system|][|endofturn|]\n[|user|]Hi?\n[|assistant|]Hello.[|endofturn|]\n[|user|]Bye?\n[|assistant|]",
        ),
        (
            "llama3",
            "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
            "Hi?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>",
            "<s><|start_header_id|>user<|end_header_id|>\n\nHi?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
            "Hello.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nBye?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (
            "mistral",
            "<s> [INST] Be brief.\n\nHi? [/INST] Hello.</s>",
            "<s> [INST] Hi? [/INST] Hello.</s> [INST] Bye? [/INST]",
        ),
    ],
)
def test_a_built_in_template_renders_the_public_format(name: str, whole: str, open_end: str) -> None:
    template = check_setting(name)
    assert template is not None
    assert rendered(template, TALK[:3], False) == whole
    assert rendered(template, TALK[1:], True) == open_end


def test_the_mistral_template_refuses_roles_out_of_turn() -> None:
    template = check_setting("mistral")
    assert template is not None
    for talk in (TALK[2:], [TALK[1], TALK[3]], [TALK[1], TALK[0]]):
        with pytest.raises(ValueError, match="must take turns"):
            rendered(template, talk, False)


@pytest.mark.parametrize(
    ("setting", "end"),
    [
        ("chatlm", "Did you mean 'chatml'?"),
        ("{{ messages }}", "Write one of them."),
        ("one text without any braces", "Write one of them."),
    ],
)
def test_what_is_no_template_is_refused_before_anything_is_read(setting: str, end: str) -> None:
    with pytest.raises(RecipeError) as caught:
        plan_chat_template(setting, [], 0)
    assert str(caught.value) == (
        f"chat_template: {setting!r} is not a known template; expected auto, {', '.join(NAMES)} or the text of a Jinja template "
        f"(at least 20 characters, with a '{{'). {end}"
    )


LITERAL = "{{ messages[0]['content'] }}"


def test_a_template_stands_where_the_donor_keeps_its_own_and_nowhere_else(tmp_path: Path) -> None:
    in_file = plan_chat_template(LITERAL, [model(tmp_path / "file", None, "old")], 0)
    assert in_file.files == {"chat_template.jinja": LITERAL.encode()}
    in_config = plan_chat_template(LITERAL, [model(tmp_path / "config", "old")], 0)
    assert {n: json.loads(d) for n, d in in_config.files.items()} == {
        "tokenizer_config.json": {"tokenizer_class": "X", "chat_template": LITERAL}
    }
    in_both = plan_chat_template(LITERAL, [model(tmp_path / "both", "old", "older")], 0)
    assert in_both.files["chat_template.jinja"] == LITERAL.encode()
    assert json.loads(in_both.files["tokenizer_config.json"]) == {"tokenizer_class": "X"}
    nowhere = plan_chat_template(LITERAL, [model(tmp_path / "none")], 0)
    assert nowhere.files == {"chat_template.jinja": LITERAL.encode()}


def test_a_processors_template_follows(tmp_path: Path) -> None:
    found = plan_chat_template(
        LITERAL, [model(tmp_path / "a", None, "old", chat_template={"chat_template": "old", "x": 1})], 0
    )
    assert json.loads(found.files["chat_template.json"]) == {"chat_template": LITERAL, "x": 1}


def test_the_files_of_a_planned_vocabulary_are_what_is_changed(tmp_path: Path) -> None:
    donor = model(tmp_path / "a", None, "old")
    plan = VocabularyPlan(
        4,
        (),
        {"tokenizer_config.json": b'{"chat_template": "of another", "y": 2}'},
        frozenset(["chat_template.jinja"]),
        {},
        (),
        (),
    )
    found = plan_chat_template(LITERAL, [donor], 0, plan)
    assert {n: json.loads(d) for n, d in found.files.items()} == {
        "tokenizer_config.json": {"y": 2, "chat_template": LITERAL}
    }


def test_auto_takes_the_most_common_template_and_of_equals_the_first(tmp_path: Path) -> None:
    one, two = "{{ 'the first template' }}", "{{ 'the second template' }}"
    a, b = (
        model(tmp_path / "a", None, one),
        model(tmp_path / "b", [{"name": "tool", "template": "x"}, {"name": "default", "template": two}]),
    )
    c, d = model(tmp_path / "c", two + "\n"), model(tmp_path / "d")
    most = plan_chat_template("auto", [a, b, c, d], 0)
    assert most.files == {"chat_template.jinja": two.encode()}
    assert most.notes == (f"the chat template is that of {b.label}, shared by 2 of 4 models.",)
    assert plan_chat_template("auto", [a, c], 0).files == {"chat_template.jinja": one.encode()}
    assert plan_chat_template("auto", [d], 0).files == {}
    assert plan_chat_template("auto", [d], 0).notes == (
        "chat_template: no model has a chat template; the output has none.",
    )
