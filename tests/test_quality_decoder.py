"""The benchmark of the decoder in small: prompts, scores, variants and tables on a made model; nothing is fetched or trained for it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from alnico.errors import EvaluationError  # noqa: E402


class Words:
    """A tokenizer of words, which knows the words of a line; any other word has two tokens."""

    def __init__(self, known: str) -> None:
        self.number = {word: i for i, word in enumerate(known.split())}

    def __call__(self, text: str | list[str], add_special_tokens: bool) -> dict[str, Any]:
        assert not add_special_tokens
        if isinstance(text, list):
            return {"input_ids": [self(one, False)["input_ids"] for one in text]}
        return {
            "input_ids": [
                t for word in text.split() for t in ([self.number[word]] if word in self.number else [0, 1])
            ]
        }


@pytest.fixture(scope="module")
def decoder() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def question(answers: dict[str, str]) -> Any:
    from quality_decoder.questions import Question

    return Question("made", "\n\nKind:", answers)


def test_a_prompt_is_the_beginning_of_the_text_and_the_cue(tmp_path: Path) -> None:
    from quality_decoder.questions import TEXT_TOKENS, read_rows

    file = tmp_path / "made.jsonl"
    texts = ["a b", " ".join("b" * (TEXT_TOKENS + 9)), "not read"]
    file.write_text("".join(json.dumps({"text": text, "label": "two"}) + "\n" for text in texts))
    rows = read_rows(question({"one": "a", "two": "b"}), file, 2, Words("x y Kind: a b"))
    assert rows.prompts == [[3, 4, 2], [4] * TEXT_TOKENS + [2]]
    assert rows.classes == [1, 1]
    assert rows.answers == [3, 4]


def test_an_answer_of_two_tokens_is_refused(tmp_path: Path) -> None:
    from quality_decoder.questions import read_rows

    with pytest.raises(EvaluationError) as caught:
        read_rows(question({"one": "strange"}), tmp_path / "no", 1, Words("x y Kind:"))
    assert caught.value.args == (
        "made: the answer 'strange' of class one has 2 tokens, expected 1. Choose another word.",
    )


def test_padding_changes_no_score(decoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from quality_decoder import bench, language_model
    from quality_decoder.questions import Rows

    monkeypatch.setattr(language_model, "precision", lambda: "float32")
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15]]
    right, losses = bench.measure(decoder, Rows(prompts, [0, 1, 1, 0], [20, 30]))
    for i, (prompt, label) in enumerate(zip(prompts, [0, 1, 1, 0], strict=True)):
        with torch.inference_mode():
            logits = decoder(torch.tensor([prompt])).logits[0, -1].double()
        of_answers = logits[[20, 30]]
        assert losses[i] == pytest.approx(float(logits.logsumexp(0) - of_answers[label]), abs=1e-5)
        assert right[i] == float(of_answers[label] > of_answers[1 - label])


def test_a_batch_has_similar_lengths_and_a_limit_of_tokens() -> None:
    from quality_decoder.language_model import BATCH_TOKENS, batches_by_length

    lengths = [BATCH_TOKENS // 2, 3, BATCH_TOKENS // 2 - 1, 1, 2]
    assert batches_by_length([[0] * length for length in lengths]) == [[0, 2], [1, 4, 3]]


def test_the_nearest_matrix_of_a_rank_is_that_of_the_svd() -> None:
    from quality_decoder.variants import nearest

    matrix = torch.from_numpy(np.random.default_rng(0).normal(size=(9, 6))).float()
    left, values, right = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    expected = (left[:, :2] * values[:2]) @ right[:2]
    for given, wanted in ((matrix, expected), (matrix.T, expected.T)):
        assert nearest(given, 2).numpy() == pytest.approx(wanted, abs=1e-6)


def row(name: str, right: list[float], losses: list[float], setting: str = "") -> Any:
    from quality_decoder.bench import Measured
    from quality_decoder.ways import Row

    return Row(name, setting, Measured({"t": np.array(right)}, {"t": np.array(losses)}, 1.0), 0, {})


def test_differences_are_paired_row_by_row() -> None:
    from quality_decoder.tables import results_table

    half = [0.0, 1.0] * 100
    rows = [
        row("specialists", [1.0] * 200, [0.1] * 200),
        row("base", [0.0] * 200, [2.0] * 200),
        row("task arithmetic", half, [1.0, 0.5] * 100, "scale 0.6"),
        row("tsv", half, [0.9, 0.4] * 100),
    ]
    cells = [line.split(" | ") for line in results_table({r.name: r for r in rows}).splitlines()[2:]]
    assert [line[4] for line in cells] == ["100 %", "0 %", "50 %", "50 %"]
    assert cells[3][3] == "+0.0 [+0.0, +0.0]"
    assert cells[3][6] == "-0.10 [-0.10, -0.10]"
    assert cells[2][3] == cells[2][6] == ""
    assert math.isclose(float(cells[2][5]), 0.75)


def test_the_best_on_validation_is_taken_and_measured_on_test(monkeypatch: pytest.MonkeyPatch) -> None:
    from quality_decoder import ways

    class Kept:
        def recipe(self, _models: Any, method: str, **parameters: Any) -> dict[str, Any]:
            return {"merge_method": method, **parameters}

        def score(self, recipe: Any, part: str, _models: Any) -> Any:
            best = 0.6 if part == "validation" else 0.9
            return row("", [1 - abs(recipe["scale"] - best)], [0.0]).measured

    monkeypatch.setattr(ways, "say", lambda _: None)
    taken = ways.take(Kept(), ways.Models(("t",)), ways.ARITHMETIC)  # type: ignore[arg-type]
    assert taken.setting == "scale 0.6"
    assert taken.measured.mean == pytest.approx(0.7)
    assert taken.tried == 5
