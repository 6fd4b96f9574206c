"""Computes embeddings of sentences by a BERT encoder in numpy: its layers, the mean over tokens, unit length.

Reads tensors as every command does, so it takes any model that alnico opens. torch would give the same embeddings
to 1e-6, after 750 MB of installation.
Source: Devlin et al. 2018, https://arxiv.org/abs/1810.04805; Reimers & Gurevych 2019, https://arxiv.org/abs/1908.10084.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alnico.checkpoint.source import Model
from alnico.demo.wordpiece import WordPiece
from alnico.errors import ModelError
from alnico.numerics.blas import one_blas_thread

Array = np.ndarray[Any, np.dtype[Any]]
"""Tokens in rows (of all sentences, one after another), features in columns; float32."""


@dataclass(frozen=True)
class SentenceEncoder:
    """The tensors of an encoder, and its tokens."""

    tensors: dict[str, Array]
    pieces: WordPiece
    layers: int
    heads: int
    epsilon: float

    @classmethod
    def of(cls, model: Model) -> SentenceEncoder:
        """Read a model's tensors and vocabulary. Errors: ModelError for another architecture."""
        config = model.config
        if (
            config.get("model_type") != "bert"
            or config.get("hidden_act") != "gelu"
            or model.directory is None
        ):
            raise ModelError(
                f"{model.label}: is of the type {config.get('model_type')!r}; expected a folder with a BERT encoder. "
                "Score other models with alnico evaluate."
            )
        tensors = {
            n: model.read(n).astype(np.float32, copy=False)
            for n, t in model.tensors.items()
            if t.dtype != "I64"
        }
        return cls(
            tensors,
            WordPiece.of(model.directory / "vocab.txt"),
            int(config["num_hidden_layers"]),
            int(config["num_attention_heads"]),
            float(config["layer_norm_eps"]),
        )

    def embed(self, texts: Sequence[str]) -> Array:
        """Return the embeddings of texts, (texts, features), each of length 1."""
        with one_blas_thread():
            return self._embed(texts)

    def _embed(self, texts: Sequence[str]) -> Array:
        tokens = [self.pieces.ids(text) for text in texts]
        ends = np.cumsum([0, *map(len, tokens)])
        spans = [slice(int(a), int(b)) for a, b in itertools.pairwise(ends)]
        hidden = self._embedded(tokens)
        for layer in range(self.layers):
            hidden = self._layer(f"encoder.layer.{layer}", hidden, spans)
        means = np.stack([hidden[span].mean(0) for span in spans])
        embeddings: Array = means / np.linalg.norm(means, axis=1, keepdims=True)
        return embeddings

    def _embedded(self, tokens: Sequence[Sequence[int]]) -> Array:
        table = "embeddings.{}_embeddings.weight"
        words = self.tensors[table.format("word")][np.concatenate(tokens)]
        places = self.tensors[table.format("position")][np.concatenate([np.arange(len(t)) for t in tokens])]
        return self._norm(
            "embeddings.LayerNorm", words + places + self.tensors[table.format("token_type")][0]
        )

    def _layer(self, name: str, hidden: Array, spans: Sequence[slice]) -> Array:
        """Attention inside each sentence, then the MLP, each with its residual and norm."""
        query, key, value = (
            self._linear(f"{name}.attention.self.{part}", hidden).reshape(len(hidden), self.heads, -1)
            for part in ("query", "key", "value")
        )
        mixed = np.empty_like(value)
        for span in spans:
            q, k, v = (
                part[span].transpose(1, 0, 2) for part in (query, key, value)
            )  # (heads, tokens, features)
            scores = q @ k.transpose(0, 2, 1) / np.float32(math.sqrt(q.shape[-1]))
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            mixed[span] = (weights / weights.sum(-1, keepdims=True) @ v).transpose(1, 0, 2)
        attended = self._linear(f"{name}.attention.output.dense", mixed.reshape(hidden.shape))
        hidden = self._norm(f"{name}.attention.output.LayerNorm", hidden + attended)
        inner = gelu(self._linear(f"{name}.intermediate.dense", hidden))
        return self._norm(f"{name}.output.LayerNorm", hidden + self._linear(f"{name}.output.dense", inner))

    def _linear(self, name: str, values: Array) -> Array:
        return values @ self.tensors[f"{name}.weight"].T + self.tensors[f"{name}.bias"]

    def _norm(self, name: str, values: Array) -> Array:
        centred = values - values.mean(-1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + np.float32(self.epsilon))
        normed: Array = centred / deviation * self.tensors[f"{name}.weight"] + self.tensors[f"{name}.bias"]
        return normed


def gelu(values: Array) -> Array:
    """Return ``x * Phi(x)``, by an approximation of erf that is wrong by 1.5e-7 before rounding: numpy has no erf.

    Source: Abramowitz & Stegun 1964, formula 7.1.26.

    >>> gelu(np.float32([-1, 0, 1])).round(5).tolist() == np.float32([-0.15866, 0, 0.84134]).tolist()
    True
    """
    x = np.abs(values) * np.float32(math.sqrt(0.5))
    t = 1 / (1 + np.float32(0.3275911) * x)
    series = np.zeros_like(t)
    for coefficient in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = (series + np.float32(coefficient)) * t
    tail = 0.5 * series * np.exp(-x * x)  # 1 - Phi(|x|)
    result: Array = values * np.where(values < 0, tail, 1 - tail)
    return result
