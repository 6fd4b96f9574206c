"""Perplexity, functions of the user's, and the harness: held against torch and transformers alone."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
import torch
import yaml
from tokenizers import processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from alnico.errors import AlnicoError, EvaluationError
from alnico.evaluation.loaded_model import ModuleSubject, open_subject
from alnico.evaluation.perplexity import Perplexity
from alnico.evaluation.task_file import read_tasks
from alnico.evaluation.tasks import Score
from alnico.evaluation.user_function import UserFunction, find_function
from alnico.installation import import_extra, install_hint
from made_tasks import NOISE, save_tokenizer

WORDS = " ".join(np.random.default_rng(0).choice(NOISE, 60))


@pytest.fixture(scope="session")
def causal(tmp_path_factory):
    """A Llama of random weights, on disk."""
    folder = tmp_path_factory.mktemp("causal")
    tokenizer = save_tokenizer(folder)
    tokenizer.eos_token = "[SEP]"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.5, **sizes)).save_pretrained(
        folder
    )
    return folder


def surprise_of(folder, window, stride):
    """The mean negative log-likelihood of each window, token by token."""
    model, tokenizer = (
        LlamaForCausalLM.from_pretrained(folder).eval(),
        PreTrainedTokenizerFast.from_pretrained(folder),
    )
    tokens = torch.tensor(tokenizer(WORDS)["input_ids"])
    found = []
    for index in range((len(tokens) - 1) // stride):
        end = (index + 1) * stride
        with torch.no_grad():
            chances = model(tokens[None, max(0, end - window) : end]).logits[0].log_softmax(1)
        found.append(
            -sum(chances[-stride + i, tokens[end - stride + 1 + i]].item() for i in range(stride)) / stride
        )
    return found


@pytest.mark.parametrize(("window", "stride"), [(8, 8), (16, 4)])
def test_a_perplexity_is_that_of_every_token_after_the_first(causal, window, stride):
    expected = surprise_of(causal, window, stride)
    score = Perplexity("noise", WORDS, window=window, stride=stride).evaluate(open_subject(causal))
    assert score.examples == pytest.approx(expected, abs=1e-5)
    assert score.value == pytest.approx(math.exp(np.mean(expected)), rel=1e-5)


def test_a_text_shorter_than_a_window_is_one(causal):
    found = Perplexity("noise", WORDS).evaluate(open_subject(causal))
    assert found.examples == pytest.approx(surprise_of(causal, 59, 59), abs=1e-5)


def test_a_limit_makes_windows_known_and_parts_pool(causal):
    subject = open_subject(causal)
    task = Perplexity("noise", WORDS, window=8, limit=6)
    whole = task.evaluate(subject)
    assert (task.size, len(whole.examples), task.goal) == (6, 6, "min")
    parts = [task.evaluate(subject, [4, 1]), task.evaluate(subject, [0, 2, 3, 5])]
    assert parts[0].examples == pytest.approx(whole.examples[[4, 1]], abs=1e-6)
    assert task.pooled(parts).value == pytest.approx(whole.value, rel=1e-6)
    for task, part in (
        (Perplexity("noise", WORDS, window=8, limit=8), None),
        (Perplexity("noise", WORDS, window=8), range(2)),
    ):
        with pytest.raises(EvaluationError) as caught:
            task.evaluate(subject, part)
        assert str(caught.value) == (
            f"noise: has 7 windows of 8 tokens, and limit is {task.size or 'not given'}; "
            "expected a limit of at most the number of windows. Lower it, or give more text."
        )


def test_a_text_that_says_nothing_is_told(causal, tmp_path):
    (tmp_path / "t.txt").write_text(" \n")
    tasks = [{"name": "wiki", "type": "perplexity", "data": data} for data in ("t.txt", "none.txt")]
    with pytest.raises(EvaluationError) as caught:
        read_tasks(
            {
                "tasks": [
                    *tasks,
                    {"name": "b", "type": "perplexity", "data": "t.txt", "window": 4, "stride": 5},
                ]
            },
            tmp_path,
        )
    assert str(caught.value).splitlines()[:2] == [
        "tasks: tasks[0]: wiki: the text is empty; expected some words. Give another.",
        "tasks: tasks[1].name is 'wiki', like tasks[0].name; expected different names.",
    ]
    with pytest.raises(
        EvaluationError,
        match=r"^b: stride is 5, window 4; a larger stride would skip tokens\. Choose at most 4\.$",
    ):
        Perplexity("b", WORDS, window=4, stride=5)
    module = LlamaForCausalLM.from_pretrained(causal).eval()
    module.lm_head.weight.data[0] = 3e38  # finite, and its products are not
    with pytest.raises(EvaluationError) as caught:
        Perplexity("b", WORDS).evaluate(ModuleSubject("merged", module, open_subject(causal).tokenizer()))
    assert (
        str(caught.value)
        == "b: merged gives a perplexity that is not finite. Check the model for NaN: `alnico inspect`."
    )


def test_texts_that_share_a_long_line_share_an_example():
    long, other = (f"{word} " * 20 for word in ("one", "two"))
    tasks = [
        Perplexity("t", text)
        for text in (f"= Title =\n{long}\n", f"= Title =\n {long}\n{other}", other, "= Title =")
    ]
    shared = [bool(tasks[0].digests() & task.digests()) for task in tasks[1:]]
    assert shared == [True, False, False]


SCORING = """
from dataclasses import dataclass
from scoring_parts import FACTOR

@dataclass
class Found:
    value: "int"

def of_directory(path):
    return FACTOR * len(list(path.iterdir()))

def of_module(encoder, tokenizer, power=1):
    return {"score": sum(p.numel() for p in encoder.parameters()), "tokens": len(tokenizer)}

number = 3
"""


def test_a_function_beside_the_tasks_scores_a_directory_or_a_module(made, tmp_path):
    (tmp_path / "scoring.py").write_text(SCORING)
    (tmp_path / "scoring_parts.py").write_text("FACTOR = 2\n")
    calls = [
        {"function": "scoring:of_directory", "goal": "min"},
        {"function": "scoring:of_module"},
        {"function": "scoring:of_module", "metric": "tokens"},
    ]
    tasks = read_tasks(
        {"tasks": [{"name": f"t{i}", "type": "call", **call} for i, call in enumerate(calls)]},
        tmp_path,
        allow_code=True,
    )
    subject = open_subject(made.base)
    values = [task.evaluate(subject).value for task in tasks]
    module = subject.module("encoder")
    assert values == [
        2 * len(list(made.base.iterdir())),
        sum(p.numel() for p in module.parameters()),
        len(subject.tokenizer()),
    ]
    assert [task.goal for task in tasks] == ["min", "max", "max"]
    assert str(tmp_path) not in sys.path
    in_memory = ModuleSubject("merged", module, subject.tokenizer())
    assert tasks[0].evaluate(in_memory).value == 2 * len(list(in_memory.directory.iterdir()))


def test_a_function_may_tell_its_examples(made):
    task = UserFunction("mine", lambda _: Score(0.5, np.array([0.0, 1.0])))
    assert task.evaluate(open_subject(made.base)).examples.tolist() == [0, 1]
    assert UserFunction("mine", lambda _: np.float32(0.5)).evaluate(open_subject(made.base)).value == 0.5
    assert UserFunction("mine", lambda _: torch.tensor(0.5)).evaluate(open_subject(made.base)).value == 0.5


def broken(*_):
    raise ZeroDivisionError("division by zero")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda _: broken(), "the evaluation raised ZeroDivisionError: division by zero; expected a score. Correct the called code, or the data."),
        (lambda _: sys.exit("out"), "the evaluation raised SystemExit: out; expected a score. Correct the called code, or the data."),
        (lambda _: math.nan, "the evaluation returned nan; expected a finite number. Check the model for NaN, or correct the called code."),
        (lambda _: "0.5", "the evaluation returned a str; expected a finite number. Correct the called code."),
        (lambda _: None, "the evaluation returned a NoneType; expected a finite number. Correct the called code."),
        (lambda _: True, "the evaluation returned a bool; expected a finite number. Correct the called code."),
        (lambda _: np.zeros(2), "the evaluation returned a ndarray that is not a number; expected a finite number. Correct the called code."),
        (lambda _: {"a": 1, "b": 2}, "the evaluation returned a, b but no score; expected one score. Name the score with `metric`."),
        (lambda _: {"a": -math.inf}, "the evaluation returned -inf; expected a finite number. Check the model for NaN, or correct the called code."),
        (lambda _: Score(math.nan), "the evaluation returned nan; expected a finite number. Check the model for NaN, or correct the called code."),
    ],
)  # fmt: skip
def test_what_is_no_score_is_told(made, function, message):
    with pytest.raises(EvaluationError) as caught:
        UserFunction("mine", function).evaluate(open_subject(made.base))
    assert str(caught.value) == f"mine of {made.base}: {message}"


def test_functions_that_cannot_be_called_are_told(tmp_path):
    (tmp_path / "scoring.py").write_text("number = 3\n")
    (tmp_path / "failing.py").write_text("1 / 0\n")
    for reference, message in [
        ("scoring", "'scoring': is not a function; expected module:function, for example scoring:accuracy."),
        ("scoring:accuracy", "scoring:accuracy: the module has no accuracy; expected a function. Check the name."),
        ("scoring:number", "scoring:number: the module has no function number; expected a function. Check the name."),
        ("nowhere:f", f"nowhere:f: {tmp_path}/nowhere.py does not exist, and Python finds no module nowhere; expected one of them. Check the name."),
        ("failing:f", "failing:f: the evaluation raised ZeroDivisionError: division by zero; expected a score. Correct the called code, or the data."),
    ]:  # fmt: skip
        with pytest.raises(EvaluationError) as caught:
            find_function(reference, tmp_path)
        assert str(caught.value) == message
    with pytest.raises(EvaluationError) as caught:
        UserFunction("mine", lambda model, data: (model, data))
    assert str(caught.value) == (
        "mine: the function takes (model, data); expected a model: one of model_dir, path or the module's name, and tokenizer. "
        "Give the others a default."
    )


def test_a_missing_package_is_told_with_what_to_say(monkeypatch, causal):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(AlnicoError) as caught:
        import_extra("lm_eval", "arc", "eval")
    assert str(caught.value) == f"arc needs lm_eval, which is not installed. {install_hint('eval')}"
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(AlnicoError) as caught:
        Perplexity("wiki", WORDS).evaluate(open_subject(causal))
    assert (
        str(caught.value)
        == f"a transformers checkpoint needs transformers, which is not installed. {install_hint('eval')}"
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_local_task_of_the_harness_scores_as_transformers_do(causal, tmp_path):
    rows = [
        {"question": f"{NOISE[i]} {NOISE[i + 1]}", "choices": [NOISE[i + 2], NOISE[i + 3]], "answer": i % 2}
        for i in range(8)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "local.yaml").write_text(
        yaml.safe_dump(
            {
                "task": "alnico_local", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
                "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path / "cache")},
                "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "answer",
                "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}], "metadata": {"version": 1},
            }
        )
    )  # fmt: skip
    entry = {"name": "local", "type": "lm_eval", "tasks": ["alnico_local"], "include_path": ".", "limit": 8}
    (task,) = read_tasks({"tasks": [{**entry, "metric": "acc,none"}]}, tmp_path, allow_code=True)
    subject = open_subject(causal)
    model, tokenizer = subject.module("causal"), subject.tokenizer()

    def chance(row, choice):
        context, whole = (
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (row["question"], f"{row['question']} {choice}")
        )
        with torch.no_grad():
            told = model(torch.tensor([whole])).logits[0].log_softmax(1)
        return sum(told[i - 1, whole[i]].item() for i in range(len(context), len(whole)))

    expected = [
        float(chance(r, r["choices"][r["answer"]]) > chance(r, r["choices"][1 - r["answer"]])) for r in rows
    ]
    score = task.evaluate(subject)
    assert score.value == pytest.approx(np.mean(expected))
    assert score.examples.tolist() == expected
    part = task.evaluate(subject, [4, 0, 3])
    assert part.examples.tolist() == [expected[4], expected[0], expected[3]]
    (wrong,) = read_tasks({"tasks": [{**entry, "metric": "f1"}]}, tmp_path, allow_code=True)
    with pytest.raises(EvaluationError) as caught:
        wrong.evaluate(subject)
    assert (
        str(caught.value)
        == f"local: {causal}: alnico_local has no metric 'f1'; found acc,none. Choose one of these."
    )
