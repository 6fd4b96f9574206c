"""Classifies texts and images with the checkpoint's head, or with a frozen head made from class names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xxhash

from alnico.errors import EvaluationError
from alnico.evaluation.batches import Batches, input_device, on_device
from alnico.evaluation.extras import Precision, computing_in
from alnico.evaluation.tasks import EvaluatedModel, Goal, ModelKind, Score, pool
from alnico.evaluation.tokens import ForEachTokenizer, named_failures
from alnico.installation import import_extra

if TYPE_CHECKING:
    import torch

Head = Literal["names", "own"]
Pooling = Literal["mean", "cls"]


@dataclass(frozen=True, eq=False)
class _Encoded:
    """Tokenised texts: ``ids`` (n, longest) int64, padded on the right; ``lengths`` (n,) int64."""

    ids: torch.Tensor
    lengths: torch.Tensor


class Classification:
    """The accuracy of a model in classifying texts or images.

    ``inputs`` are texts, or preprocessed images (n, channels, height, width) float32; ``labels`` are the names of their
    classes, or None if only logits are needed. ``head`` selects what scores the classes:

    own: the classifier of the checkpoint. ``classes`` are in its order; default its config's ``id2label``.
    names: a frozen head, ``logits = logit_scale * unit(embedding) @ head.T``. Its rows are the pooled embeddings by
    ``encoder`` of the words of ``classes`` (name to words), normalised, centred, and normalised again. ``encoder`` is the
    base of the merges, so that all merges share one head; the words are embedded once. The encoder of a tasks file runs
    on the processor in float32, so that the head is the same on every device.

    Options:
        pooling: embedding of a text: the ``mean`` of the last hidden states over its tokens, or the first (``cls``).
        max_length: the most tokens of a text that are read.
        batch_size: examples in one pass of the model; examples of similar length are batched together. Out of memory
            halves it; on a GPU it doubles while the memory allows it.
        precision: float32, or bfloat16 by autocast; a module in another dtype computes in its own.
        weight: of the task in a mean over tasks.
    Texts are tokenised once per tokenizer. Errors: EvaluationError.
    """

    goal: Goal = "max"
    metric = "accuracy"

    def __init__(
        self,
        name: str,
        inputs: Sequence[str] | np.ndarray,
        labels: Sequence[str] | None,
        *,
        classes: Mapping[str, str] | Sequence[str] | None = None,
        head: Head = "own",
        encoder: EvaluatedModel | None = None,
        pooling: Pooling = "mean",
        logit_scale: float = 20.0,
        max_length: int = 128,
        batch_size: int = 32,
        precision: Precision = "float32",
        weight: float = 1.0,
        places: Sequence[str] | None = None,
    ) -> None:
        self.name = name
        self.weight = weight
        self.kind: ModelKind = "encoder" if head == "names" else "classifier"
        self.size = len(inputs)
        self.batch_size = batch_size
        self._sizes = Batches(
            name, batch_size, advice="Lower max_length. " if not isinstance(inputs, np.ndarray) else ""
        )
        self.classes = None if classes is None else tuple(classes)
        self._inputs = inputs
        self._labels = None if labels is None else tuple(labels)
        self._places = places or tuple(f"example {i}" for i in range(len(inputs)))
        self._words = tuple(classes.values()) if isinstance(classes, Mapping) else self.classes
        self._encoder = encoder
        self._pooling = pooling
        self._logit_scale = logit_scale
        self._max_length = max_length
        self._precision = precision
        self._head: torch.Tensor | None = None
        self._encoded = ForEachTokenizer(lambda tokenizer: self._tokenised(tokenizer, self._inputs))
        if head == "names" and (encoder is None or self._words is None or isinstance(inputs, np.ndarray)):
            raise EvaluationError(
                f"{name}: a head of names needs texts, classes and an encoder. Give them, or use head: own."
            )
        if self._words is not None and len(self._words) < 2:
            raise EvaluationError(
                f"{name}: has {len(self._words)} class; expected at least two. Name all classes."
            )
        if self.classes is not None and self._labels is not None:
            self._targets(self._labels, self.classes)

    def evaluate(self, subject: EvaluatedModel, examples: Sequence[int] | None = None) -> Score:
        """Compute the accuracy; ``examples`` are 1 for correct classes. Unknown labels and non-finite logits are errors."""
        import_extra("torch", self.name, "eval")
        import torch

        chosen = range(self.size) if examples is None else examples
        if self._labels is None:
            raise EvaluationError(
                f"{self.name}: has no labels, which a score needs. Name the field of the labels."
            )
        targets = self._targets(self._labels, self.classes or self._of_config(subject))[list(chosen)]
        with torch.inference_mode():
            logits = self.logits(subject, chosen)
        self._check(logits, subject, targets)
        is_correct = (logits.argmax(1).cpu().numpy() == targets).astype(np.float64)
        return Score(float(is_correct.mean()), is_correct)

    def logits(self, subject: EvaluatedModel, examples: Sequence[int]) -> torch.Tensor:
        """Return (n, classes) float32 on the device of the module. Labels are never read."""
        import torch

        module = subject.module(self.kind)
        device = input_device(module)
        if self.kind == "encoder" and self._head is None:
            self._head = self._build_head()
        order, inputs_of = self._ordered(subject, list(examples))
        with computing_in(self._precision, device):
            parts = [
                logits
                for _, logits in self._sizes.each(
                    order,
                    lambda rows: self._classified(module, on_device(inputs_of(rows), module)).float(),
                    subject,
                    device,
                    halves=not torch.is_grad_enabled(),
                )
            ]
        joined = torch.cat(parts)
        places = torch.empty(len(order), dtype=torch.int64)
        places[torch.tensor(order)] = torch.arange(len(order))
        return joined[places.to(joined.device)]

    def pooled(self, scores: Sequence[Score]) -> Score:
        """Combine scores on different examples."""
        return pool(scores)

    def digests(self) -> frozenset[str]:
        """Return hashes of the texts or pixels."""
        return frozenset(self.known_by())

    def known_by(self) -> tuple[str, ...]:
        """Return the hash of each example, in order."""
        values = (
            x.encode() if isinstance(x, str) else np.ascontiguousarray(x).tobytes() for x in self._inputs
        )
        return tuple(xxhash.xxh3_128_hexdigest(value) for value in values)

    def _classified(self, module: Any, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if self._head is None:
            logits: torch.Tensor = module(**given).logits
            return logits
        embedded = self._embedded(module, given)
        return self._logit_scale * embedded @ self._head.to(embedded.device).T

    def _embedded(self, module: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        import torch

        hidden = module(**batch).last_hidden_state.float()
        if self._pooling == "cls":
            pooled = hidden[:, 0]
        else:
            mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
            pooled = (hidden * mask).sum(1) / mask.sum(1)
        unit: torch.Tensor = torch.nn.functional.normalize(pooled, dim=-1)
        return unit

    def _build_head(self) -> torch.Tensor:
        import torch

        assert self._encoder is not None  # checked at the beginning
        assert self._words is not None
        module = self._encoder.module("encoder")
        device = input_device(module)
        tokenizer = self._encoder.tokenizer()
        with (
            named_failures(f"{self.name}: {self._encoder.label}"),
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
        ):
            words = self._tokenised(tokenizer, self._words)
            batch = {
                key: value.to(device) for key, value in _batch(words, list(range(len(self._words)))).items()
            }
            rows = self._embedded(module, batch)
            head: torch.Tensor = torch.nn.functional.normalize(rows - rows.mean(0), dim=-1)
        self._encoder = None  # and the module, where no other task needs it
        return head

    def _ordered(
        self, subject: EvaluatedModel, chosen: list[int]
    ) -> tuple[list[int], Callable[[Sequence[int]], Mapping[str, torch.Tensor]]]:
        """Return places among the ``chosen`` examples in the order of batches, and what gives the model's inputs for some."""
        import torch

        pixels = self._inputs
        if isinstance(pixels, np.ndarray):
            images = pixels
            return list(range(len(chosen))), lambda rows: {
                "pixel_values": torch.from_numpy(images[[chosen[row] for row in rows]])
            }
        encoded = self._encoded.of(subject.tokenizer(), f"{self.name}: {subject.label}")
        order = torch.argsort(encoded.lengths[chosen], stable=True).tolist()
        return order, lambda rows: _batch(encoded, [chosen[row] for row in rows])

    def _tokenised(self, tokenizer: Any, texts: Sequence[str] | np.ndarray) -> _Encoded:
        import torch

        longest = int(min(self._max_length, tokenizer.model_max_length))
        filler = tokenizer.pad_token_id or 0
        rows = [
            row or [filler]
            for row in tokenizer(list(texts), truncation=True, max_length=longest)["input_ids"]
        ]
        lengths = np.array([len(row) for row in rows])
        ids = np.full((len(rows), lengths.max()), filler, np.int64)
        for row, cut in zip(ids, rows, strict=True):
            row[: len(cut)] = cut
        return _Encoded(torch.from_numpy(ids), torch.from_numpy(lengths))

    def _of_config(self, subject: EvaluatedModel) -> tuple[str, ...]:
        names = getattr(getattr(subject.module(self.kind), "config", None), "id2label", None)
        if not names:
            raise EvaluationError(
                f"{self.name}: {subject.label} does not name its classes; expected id2label in its config. List them under labels."
            )
        return tuple(str(names[i]) for i in range(len(names)))

    def _targets(self, labels: Sequence[str], classes: Sequence[str]) -> np.ndarray:
        """Return the class of each example; in a task without ``classes``, labels may also be row numbers of the head."""
        places = {name: i for i, name in enumerate(classes)}
        if self.classes is None:
            places = {str(i): i for i in range(len(classes))} | places
        for label, place in zip(labels, self._places, strict=True):
            if label not in places:
                raise EvaluationError(
                    f"{self.name}: {place}: the label is {label!r}; expected a class of the head: {_listed(classes)}. "
                    "Add it to labels, or remove the example."
                )
        return np.array([places[label] for label in labels])

    def _check(self, logits: torch.Tensor, subject: EvaluatedModel, targets: np.ndarray) -> None:
        classes = logits.shape[1]
        if self.classes is not None and classes != len(self.classes):
            raise EvaluationError(
                f"{self.name}: the head of {subject.label} has {classes} classes, labels has {len(self.classes)}; expected the same number. "
                "Name the head's classes in its order."
            )
        if not bool(logits.isfinite().all()):
            raise EvaluationError(
                f"{self.name}: {subject.label} gives logits that are not finite. Check the model for NaN: `alnico inspect`."
            )


def _batch(encoded: _Encoded, rows: list[int]) -> dict[str, torch.Tensor]:
    lengths = encoded.lengths[rows]
    width = int(lengths.max())
    mask = lengths.new_ones(len(rows), width).cumsum(1) <= lengths[:, None]
    return {"input_ids": encoded.ids[rows, :width], "attention_mask": mask.long()}


def _listed(classes: Sequence[str]) -> str:
    shown = ", ".join(classes[:8])
    return shown if len(classes) <= 8 else f"{shown}, ... ({len(classes)} in all)"
