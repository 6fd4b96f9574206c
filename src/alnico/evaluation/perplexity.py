"""Perplexity of a text: how surprised a causal language model is by it, token by token."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from alnico.errors import EvaluationError
from alnico.evaluation.extras import Precision, computing_in, import_extra
from alnico.evaluation.tasks import EvaluatedModel, Goal, ModelKind, Score, evaluation_failed, pool
from alnico.evaluation.tokens import ForEachTokenizer

if TYPE_CHECKING:
    import torch

LEAST_TOLD = 40
"""Characters of a line by which texts are known: shorter ones, headings say, are in many texts."""


class Perplexity:
    """``exp`` of the mean negative log-likelihood of a text's tokens, all but the first; less is better.

    The text is tokenised as a whole, once for each tokenizer. Window i predicts tokens ``1 + i stride .. (i + 1) stride`` from at most
    ``window`` tokens before each last one of them, so that every token is predicted once and all windows predict as many. Tokens at
    the end that fill no window are left out; a text shorter than one is a window of its own.

    Options:
        window: tokens that the model sees at once, at most.
        stride: tokens that a window predicts; below ``window``, each has context. By default ``window``.
        limit: windows that are scored, the first ones. With it a search can take a part of them; the text must have as many.
        batch_size: windows in one pass of the model.
        precision: float32, or bfloat16 by autocast.
        weight: of the task; a mean over tasks leaves it out, as less is better.
    Perplexities of models with different tokenizers cannot be compared: they are over different tokens. Errors: EvaluationError.
    """

    goal: Goal = "min"
    kind: ModelKind = "causal"

    def __init__(
        self,
        name: str,
        text: str,
        *,
        window: int = 512,
        stride: int | None = None,
        limit: int | None = None,
        batch_size: int = 4,
        precision: Precision = "float32",
        weight: float = 1.0,
    ) -> None:
        self.name = name
        self.weight = weight
        self.size = limit or 0
        self._text = text
        self._window = window
        self._stride = window if stride is None else stride
        self._batch_size = batch_size
        self._precision = precision
        self._tokens = ForEachTokenizer(self._tokenised)
        if not text.strip():
            raise EvaluationError(f"{name}: the text is empty; expected some words. Give another.")
        if self._stride > window:
            raise EvaluationError(
                f"{name}: stride is {self._stride}, window {window}; a stride above it leaves tokens out. Choose at most {window}."
            )

    def evaluate(self, subject: EvaluatedModel, examples: Sequence[int] | None = None) -> Score:
        """The perplexity of the text or of some windows; ``examples`` are the means over a window's tokens."""
        import_extra("torch", self.name, "eval")
        import torch

        module = subject.module("causal")
        device = next(module.parameters()).device
        tokens = self._tokens.of(subject.tokenizer(), f"{self.name}: {subject.label}")
        stride = min(self._stride, len(tokens) - 1)
        count = (len(tokens) - 1) // stride
        if count < self.size or (examples is not None and not self.size):
            raise EvaluationError(
                f"{self.name}: has {count} windows of {stride} tokens, and limit is {self.size or 'not given'}; "
                "expected a limit of at most the windows that there are. Lower it, or give more text."
            )
        chosen = range(self.size or count) if examples is None else examples
        surprise = np.empty(len(chosen))
        with torch.inference_mode(), computing_in(self._precision, device):
            for places, batch in self._batches(tokens, chosen, stride):
                try:
                    found = _surprise(module, batch.to(device), stride)
                except Exception as error:
                    raise evaluation_failed(f"{self.name}: {subject.label}", error) from error
                surprise[places] = found.cpu().numpy()
        mean = float(surprise.mean())
        if not mean < math.log(np.finfo(np.float64).max):
            raise EvaluationError(
                f"{self.name}: {subject.label} gives a perplexity that is not finite. Look for NaN in the model: `alnico inspect`."
            )
        return Score(math.exp(mean), surprise, "exp")

    def pooled(self, scores: Sequence[Score]) -> Score:
        """The perplexity of all windows of several scores."""
        return pool(scores)

    def digests(self) -> frozenset[str]:
        """Hashes of the text's longer lines, or of all of it where it has none."""
        lines = [line.strip() for line in self._text.splitlines()]
        told = [line for line in lines if len(line) >= LEAST_TOLD] or [self._text]
        return frozenset(xxhash.xxh3_128_hexdigest(line.encode()) for line in told)

    def _tokenised(self, tokenizer: Any) -> torch.Tensor:
        import torch

        tokens = tokenizer(self._text, verbose=False)["input_ids"]
        if len(tokens) < 2:
            raise EvaluationError(
                f"{self.name}: the text has {len(tokens)} tokens; expected two at least. Give more text."
            )
        return torch.tensor(tokens)

    def _batches(
        self, tokens: torch.Tensor, chosen: Sequence[int], stride: int
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Places among the windows chosen, and their tokens with the one after the last, windows of one length together."""
        import torch

        by_length: dict[int, list[tuple[int, int]]] = {}
        for place, index in enumerate(chosen):
            end = (index + 1) * stride
            by_length.setdefault(min(self._window, end), []).append((place, end))
        for length, windows in by_length.items():
            for begin in range(0, len(windows), self._batch_size):
                part = windows[begin : begin + self._batch_size]
                yield (
                    [place for place, _ in part],
                    torch.stack([tokens[end - length : end + 1] for _, end in part]),
                )


def _surprise(module: Any, batch: torch.Tensor, count: int) -> torch.Tensor:
    """The mean negative log-likelihood, (windows,) float64, of the last ``count`` tokens of each window."""
    import torch

    logits = module(input_ids=batch[:, :-1]).logits[:, -count:].float()
    told = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch[:, -count:].flatten(), reduction="none"
    )
    return told.view(len(batch), count).double().mean(1)
