"""Token ids and embeddings of the demo, held against the tokenizers library and transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import alnico
from alnico.demo.encoder import SentenceEncoder, gelu
from alnico.demo.questions import CHANCE_RANK, PAIRS, answer
from alnico.demo.wordpiece import WordPiece
from alnico.errors import ModelError
from made import family
from real import BASE, TUNED, installed

TEXTS = [text for pair in PAIRS for text in pair]

ODD = [
    "",
    "   \t\n ",
    "Naïve café, ÀÉÎÕÜ straße İstanbul ΣΊΣΥΦΟΣ",
    "don't stop: it's 3.14% of $1,000 (or £2)!?",
    "exit-code_137 /var/log/*.gz `kubectl get pods` <tag> a|b ~^=+",
    "模型合并 and 日本語のテキスト, 한국어",
    "zero\u200bwidth \u202eright to left\ufffd \x00 \x7f soft\xadhyphen no\xa0break\u3000wide",
    "emoji 🤗 and combining e\u0301 a\u0308",
    "x" * 99 + " " + "y" * 101,
    "word " * 400,
    "«guillemets» „low“ \u2013 dash — … ¿qué? ·",
    "unaffable supercalifragilisticexpialidocious antidisestablishmentarianism",
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", [BASE, TUNED], ids=["base", "tuned"])
def test_ids_are_those_of_the_tokenizers_library(place: tuple[str, str]) -> None:
    from tokenizers import Tokenizer

    folder = installed(*place)
    pieces = WordPiece.of(folder / "vocab.txt")
    reference = Tokenizer.from_file(str(folder / "tokenizer.json"))
    reference.no_padding()
    reference.enable_truncation(256)
    for text in (*TEXTS, *ODD):
        assert pieces.ids(text) == reference.encode(text).ids, text


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", [BASE, TUNED], ids=["base", "tuned"])
def test_embeddings_are_those_of_transformers(place: tuple[str, str]) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = installed(*place)
    texts = [*TEXTS[:8], *ODD[2:6]]
    tokenizer, module = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        hidden = module(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    expected = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1)).numpy()
    with alnico.open_model(folder) as model:
        assert np.abs(SentenceEncoder.of(model).embed(texts) - expected).max() < 1e-5


def test_gelu_is_that_of_torch() -> None:
    import torch

    values = np.linspace(-12, 12, 100_001, dtype=np.float32)
    expected = torch.nn.functional.gelu(torch.from_numpy(values)).numpy()
    assert (np.abs(gelu(values) - expected) / np.maximum(1, np.abs(values))).max() < 1e-6


class Stub:
    """Embeds a text as the place of its pair, so that each question finds its answer."""

    def __init__(self, turn: int) -> None:
        self.turn = turn

    def embed(self, texts: list[str]) -> np.ndarray:
        is_answer = texts[0] == PAIRS[0][1]
        return np.roll(np.eye(len(texts)), self.turn if is_answer else 0, axis=0)


def test_the_rank_of_an_answer_counts_those_before_it() -> None:
    right = answer(Stub(0))  # type: ignore[arg-type]
    assert (right.first, right.mean_rank, right.questions) == (40, 1.0, 40)
    wrong = answer(Stub(1))  # type: ignore[arg-type]
    assert (wrong.first, wrong.mean_rank) == (
        0,
        40.0,
    )  # all others have the same cosine, which counts against it
    assert CHANCE_RANK == 20.5


def test_the_pairs_are_different_and_share_few_words() -> None:
    assert len({q for q, _ in PAIRS}) == len({a for _, a in PAIRS}) == 40
    shared = [len(set(q.split()) & set(a.split())) / len(set(a.split())) for q, a in PAIRS]
    assert np.mean(shared) < 0.1


def test_a_model_that_is_no_encoder_is_refused(tmp_path: Path) -> None:
    base, _ = family(tmp_path, 1)
    with (
        alnico.open_model(base) as model,
        pytest.raises(ModelError, match=r"expected a folder with a BERT encoder\. Score other"),
    ):
        SentenceEncoder.of(model)
