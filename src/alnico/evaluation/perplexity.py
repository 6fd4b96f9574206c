"""Computes the perplexity of a text under a causal language model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from alnico.errors import EvaluationError
from alnico.evaluation.batches import Batches, input_device
from alnico.evaluation.extras import Precision, computing_in
from alnico.evaluation.tasks import EvaluatedModel, Goal, ModelKind, Score, pool
from alnico.evaluation.tokens import ForEachTokenizer
from alnico.installation import import_extra

if TYPE_CHECKING:
    import torch

SHORTEST_LINE = 40
"""The shortest line used to identify a text: shorter lines, such as headings, occur in many texts."""


class Perplexity:
    """``exp`` of the mean negative log-likelihood of a text's tokens, except the first; lower is better.

    The text is tokenised as a whole, once per tokenizer. Window i predicts tokens ``1 + i stride .. (i + 1) stride`` from
    at most ``window`` preceding tokens, so every token is predicted once and all windows predict the same number. Tokens
    at the end that do not fill a window are dropped; a text shorter than a window is a single window.

    Options:
        window: the most tokens that the model sees at once.
        stride: tokens that a window predicts; below ``window``, each has context. Default ``window``.
        limit: score only the first windows. With it a search can use a part of them; the text must have that many.
        batch_size: windows in one pass of the model. Out of memory halves it; on a GPU it doubles while the memory
            allows it.
        precision: float32, or bfloat16 by autocast; a module in another dtype computes in its own.
        weight: of the task; not used in a mean over tasks, because lower is better.
    Perplexities of models with different tokenizers are not comparable: they count different tokens. Errors:
    EvaluationError.
    """

    goal: Goal = "min"
    metric = "perplexity"
    counted = "windows"
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
        self._sizes = Batches(name, batch_size, rows="windows", advice="Lower window. ")
        self._precision = precision
        self._tokens = ForEachTokenizer(self._tokenised)
        if not text.strip():
            raise EvaluationError(f"{name}: the text is empty; expected some words. Give another.")
        if self._stride > window:
            raise EvaluationError(
                f"{name}: stride is {self._stride}, window {window}; a larger stride would skip tokens. Choose at most {window}."
            )

    def evaluate(self, subject: EvaluatedModel, examples: Sequence[int] | None = None) -> Score:
        """Compute the perplexity of the text or of some windows; ``examples`` are the means over a window's tokens."""
        import_extra("torch", self.name, "eval")
        import torch

        module = subject.module("causal")
        device = input_device(module)
        tokens = self._tokens.of(subject.tokenizer(), f"{self.name}: {subject.label}")
        stride = min(self._stride, len(tokens) - 1)
        count = (len(tokens) - 1) // stride
        if count < self.size or (examples is not None and not self.size):
            raise EvaluationError(
                f"{self.name}: has {count} windows of {stride} tokens, and limit is {self.size or 'not given'}; "
                "expected a limit of at most the number of windows. Lower it, or give more text."
            )
        chosen = range(self.size or count) if examples is None else examples
        losses_by_window = np.empty(len(chosen))
        with torch.inference_mode(), computing_in(self._precision, device):
            for length, windows in self._by_length(chosen, stride).items():
                losses_of = _LossOfWindows(module, tokens, length, stride, device)
                for part, losses in self._sizes.each(windows, losses_of, subject, device):
                    losses_by_window[[place for place, _ in part]] = losses
        mean = float(losses_by_window.mean())
        if not mean < math.log(np.finfo(np.float64).max):
            raise EvaluationError(
                f"{self.name}: {subject.label} gives a perplexity that is not finite. Check the model for NaN: `alnico inspect`."
            )
        return Score(math.exp(mean), losses_by_window, "exp")

    def pooled(self, scores: Sequence[Score]) -> Score:
        """Combine scores of different windows."""
        return pool(scores)

    def digests(self) -> frozenset[str]:
        """Return hashes of the text's longer lines, or of the whole text if it has none."""
        lines = [line.strip() for line in self._text.splitlines()]
        long_lines = [line for line in lines if len(line) >= SHORTEST_LINE] or [self._text]
        return frozenset(xxhash.xxh3_128_hexdigest(line.encode()) for line in long_lines)

    def _tokenised(self, tokenizer: Any) -> torch.Tensor:
        import torch

        tokens = tokenizer(self._text, verbose=False)["input_ids"]
        if len(tokens) < 2:
            raise EvaluationError(
                f"{self.name}: the text has {len(tokens)} tokens; expected at least two. Give more text."
            )
        return torch.tensor(tokens)

    def _by_length(self, chosen: Sequence[int], stride: int) -> dict[int, list[tuple[int, int]]]:
        """Return the chosen windows by their length: their places among the chosen, and the tokens that they end at."""
        by_length: dict[int, list[tuple[int, int]]] = {}
        for place, index in enumerate(chosen):
            end = (index + 1) * stride
            by_length.setdefault(min(self._window, end), []).append((place, end))
        return by_length


@dataclass(frozen=True, eq=False)
class _LossOfWindows:
    """Computes the losses of windows of one length, (windows,) float64."""

    module: Any
    tokens: torch.Tensor
    length: int
    stride: int
    device: Any

    def __call__(self, windows: Sequence[tuple[int, int]]) -> np.ndarray:
        import torch

        batch = torch.stack([self.tokens[end - self.length : end + 1] for _, end in windows])
        losses: np.ndarray = _mean_loss(self.module, batch.to(self.device), self.stride).cpu().numpy()
        return losses


def _mean_loss(module: Any, batch: torch.Tensor, count: int) -> torch.Tensor:
    """Return the mean negative log-likelihood (windows,) float64 of the last ``count`` tokens of each window."""
    import torch

    logits = module(input_ids=batch[:, :-1]).logits[:, -count:].float()
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch[:, -count:].flatten(), reduction="none"
    )
    return losses.view(len(batch), count).double().mean(1)
