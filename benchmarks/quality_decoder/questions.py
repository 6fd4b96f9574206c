"""Tasks as questions to a language model: a text, a cue, and one word as the answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alnico.errors import EvaluationError
from quality.parse import CORPORA

TEXT_TOKENS = 32
"""The most tokens of a text that are read."""


@dataclass(frozen=True)
class Question:
    """One task of ``quality.parse``: what stands below the text, and each class's answer, which is one token."""

    task: str
    cue: str
    answers: Mapping[str, str]


@dataclass(frozen=True)
class Rows:
    """Examples as tokens: prompts, the class of each, and the token of each class's answer."""

    prompts: Sequence[Sequence[int]]
    classes: Sequence[int]
    answers: Sequence[int]


QUESTIONS = {
    question.task: question
    for question in (
        Question("bbc", "\n\nTopic:", CORPORA["bbc"].words),
        Question("senti", "\n\nSentiment:", CORPORA["senti"].words),
        Question("wnlex", "\n\nKind:", CORPORA["wnlex"].words),
        Question(
            "langid",
            "\n\nLanguage:",
            {
                "cs": "Czech",
                "de": "German",
                "en": "English",
                "es": "Spanish",
                "it": "Italian",
                "pl": "Polish",
                "pt": "Portuguese",
            },
        ),
    )
}


def read_rows(question: Question, data: Path, limit: int, tokenizer: Any) -> Rows:
    """Read the first ``limit`` rows of a file of texts and labels as prompts.

    A prompt is the text's first tokens, the cue, and nothing else. Errors: EvaluationError for an answer of several tokens.
    """
    answers = []
    for name, word in question.answers.items():
        token = tokenizer(" " + word, add_special_tokens=False)["input_ids"]
        if len(token) != 1:
            raise EvaluationError(
                f"{question.task}: the answer {word!r} of class {name} has {len(token)} tokens, expected 1. Choose another word."
            )
        answers += token
    cue = tokenizer(question.cue, add_special_tokens=False)["input_ids"]
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()[:limit]]
    texts = tokenizer([row["text"].strip() for row in rows], add_special_tokens=False)["input_ids"]
    order = list(question.answers)
    return Rows(
        [[*text[:TEXT_TOKENS], *cue] for text in texts], [order.index(row["label"]) for row in rows], answers
    )
