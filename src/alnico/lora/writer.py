"""Writes adapters in PEFT's format or as a file without a config, and renames them when complete."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import yaml

from alnico._version import __version__
from alnico.checkpoint.durable import sync_tree, write_file
from alnico.checkpoint.file_model import open_shard
from alnico.checkpoint.lineage import CARD, LOCK
from alnico.checkpoint.lora_adapter import CONFIG, PREFIX, SAFE_WEIGHTS
from alnico.checkpoint.shards import OutputShard, split_into_shards
from alnico.checkpoint.writer import OutputFiles
from alnico.engine.matrix import rounding_kernel
from alnico.errors import NonFiniteError, RunError
from alnico.folders import make_folder
from alnico.kernels.choice import kernel_for
from alnico.kernels.constants import ARITHMETIC, CODES
from alnico.numerics.digest import HASH, PieceHasher, TensorDigest
from alnico.numerics.dtypes import DTYPES
from alnico.output.lock import describe_files, format_json
from alnico.output.staging import PartDirectory

ModuleKind = Literal["linear", "embedding", "convolution", "parameter"]

BLOCK = 262_144
"""Number of elements rounded at a time."""


@dataclass(frozen=True)
class SpelledFactors:
    """The names of the tensors of a module in a LoRA file without a config; '' for an alpha that the file does not have."""

    left: str
    right: str
    alpha: str
    bias: str


@dataclass(frozen=True)
class OutputTensor:
    """A tensor of a LoRA file without a config: its name, its shape and its values. ``dtype`` is '' for that of the file."""

    name: str
    shape: tuple[int, ...]
    values: Callable[[], np.ndarray]
    dtype: str = ""


@dataclass(frozen=True)
class OutputModule:
    """One update of an adapter to write. ``left_shape`` and ``right_shape`` are the shapes of B and A, as PEFT stores them.

    The factors ``left`` (out, r) and ``right`` (r, in) include all scales: alpha is the rank unless ``alpha`` is given.
    ``depth`` is :attr:`alnico.checkpoint.lora_adapter.Update.depth`; ``bias`` says whether ``lora_B`` has one.
    """

    module: str
    kind: ModuleKind
    rank: int
    left_shape: tuple[int, ...]
    right_shape: tuple[int, ...]
    alpha: float | None = None
    depth: int = 0
    bias: bool = False
    parameter: str = ""
    """The parameter, if it is not the weight: PEFT then also looks up its rank and alpha under this name."""
    spelled: SpelledFactors | None = None
    """The names in a file without a config; None for PEFT's."""
    kept: tuple[OutputTensor, ...] = ()
    """What is written in place of factors, for a module that keeps the form that a file has."""

    @property
    def target(self) -> str:
        """The name that PEFT compares with the keys of its patterns."""
        return f"{self.module}.{self.parameter}" if self.parameter else self.module

    @property
    def names(self) -> tuple[str, str]:
        """The names of the tensors of B and of A."""
        if self.spelled is not None:
            return self.spelled.left, self.spelled.right
        at = PREFIX + self.module + ".base_layer" * self.depth
        if self.kind == "embedding":
            return f"{at}.lora_embedding_B", f"{at}.lora_embedding_A"
        return f"{at}.lora_B.weight", f"{at}.lora_A.weight"

    @property
    def bias_name(self) -> str:
        return self.spelled.bias if self.spelled is not None else f"{PREFIX}{self.module}.lora_B.bias"


@dataclass(frozen=True)
class OutputAdapter:
    """The contents of an adapter: its ``modules``, and the tensors that replace the base's (``saved``: name to shape)."""

    modules: Sequence[OutputModule]
    saved: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    dtype: str = "F32"
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the config other than ranks and alphas: target_modules, modules_to_save, bias, base_model_name_or_path, task_type, ..."""
    metadata: Mapping[str, str] | None = None
    """The header's metadata of a file without a config; None for PEFT's folder."""
    file: str = SAFE_WEIGHTS

    @property
    def prefix(self) -> str:
        """What stands before the names of ``saved`` in the file."""
        return PREFIX if self.metadata is None else ""

    def tensors(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """Return name, dtype and shape of every tensor, in order."""
        tensors: list[tuple[str, str, tuple[int, ...]]] = []
        for module in self.modules:
            if module.kept:
                tensors += [(t.name, t.dtype or self.dtype, t.shape) for t in module.kept]
                continue
            left, right = module.names
            tensors += [(right, self.dtype, module.right_shape), (left, self.dtype, module.left_shape)]
            if module.bias:
                tensors.append((module.bias_name, self.dtype, (module.left_shape[0],)))
            if module.spelled is not None and module.spelled.alpha:
                tensors.append((module.spelled.alpha, "F32", ()))
        return tensors + [(self.prefix + name, self.dtype, shape) for name, shape in self.saved.items()]

    def config(self) -> dict[str, Any]:
        """Return the config: the most common rank and alpha for all modules, and patterns for the others."""
        ranks = Counter(m.rank for m in self.modules)
        rank = ranks.most_common(1)[0][0] if ranks else 1
        alphas = {m.target: _number(m.rank if m.alpha is None else m.alpha) for m in self.modules}
        of_rank = Counter(alphas[m.target] for m in self.modules if m.rank == rank)
        alpha = of_rank.most_common(1)[0][0] if of_rank else rank
        return {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": None,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "lora_bias": any(m.bias for m in self.modules),
            "fan_in_fan_out": False,
            "use_rslora": False,
            "use_dora": False,
            "init_lora_weights": True,
            "modules_to_save": None,
            "target_modules": sorted({m.module for m in self.modules if m.kind != "parameter"}),
            "rank_pattern": {_pattern(m.target, alphas): m.rank for m in self.modules if m.rank != rank},
            "alpha_pattern": {_pattern(name, alphas): a for name, a in alphas.items() if a != alpha},
            **self.settings,
        }


class AdapterFiles:
    """The open files of an adapter, in the model directory of a :class:`PartDirectory`.

    Tensors are written in any order. :meth:`finish` checks that none is missing, and writes config and card;
    :meth:`lock` comes last.
    """

    def __init__(self, part: PartDirectory, adapter: OutputAdapter) -> None:
        self.adapter = adapter
        self._part = part
        self._tensors = {name: (dtype, shape) for name, dtype, shape in adapter.tensors()}
        metadata = {"format": "pt"} if adapter.metadata is None else adapter.metadata
        self._shard: OutputShard = split_into_shards(adapter.tensors(), 1, adapter.file, metadata=metadata)[0]
        self.digests: dict[str, str] = {}
        try:
            make_folder(part.model, part.folder)
        except OSError as error:
            raise RunError(
                f"{part.model}: cannot be created ({error.strerror}). Choose another output."
            ) from None
        self._files = OutputFiles(part.model, [self._shard], part.folder)

    @property
    def byte_size(self) -> int:
        return self._shard.byte_size

    def write(self, name: str, values: np.ndarray) -> None:
        """Round ``values`` once to the adapter's dtype and write them; they may be flattened.

        Errors: NonFiniteError naming the tensor and index of a result that is NaN or infinite in that dtype; RunError.
        """
        dtype, shape = self._tensors[name]
        assert values.size == math.prod(shape), f"{name}: {values.shape} for {shape}"
        raw = encoded(np.asarray(values).reshape(-1), dtype, name)
        digest = TensorDigest(dtype, shape, raw.nbytes)
        hasher = PieceHasher(digest, 0)
        hasher.update(memoryview(raw))
        hasher.finish()
        self._files.write(name, 0, memoryview(raw))
        self.digests[name] = digest.result()

    def finish(self, card: Mapping[str, Any], text: str) -> None:
        """Write the config, if the adapter has one, and the card: its front matter, then ``text``."""
        absent = [name for name in self._tensors if name not in self.digests]
        assert not absent, f"{absent[0]} was not written"
        self._files.sync()
        self._files.finish()
        front = yaml.safe_dump(dict(card), sort_keys=False, allow_unicode=True)
        if self.adapter.metadata is None:
            self._put(CONFIG, json.dumps(self.adapter.config(), indent=2, sort_keys=True) + "\n")
        self._put(CARD, f"---\n{front}---\n\n{text.rstrip()}\n")

    def lock(self, done: Mapping[str, Any]) -> None:
        """Write the lock after all other files: how the adapter was made (``done``), and the hashes of tensors and files."""
        output = {
            name: {"dtype": dtype, "shape": list(shape), "digest": self.digests[name]}
            for name, (dtype, shape) in self._tensors.items()
        }
        files = describe_files(self._part.model, [open_shard(self._part.model / self.adapter.file)])
        whole = {
            "alnico": __version__,
            "arithmetic": ARITHMETIC,
            "hash": HASH,
            **done,
            "output": output,
            "files": files,
        }
        self._put(LOCK, format_json(whole) + "\n")
        sync_tree(self._part.model, self._part.folder)

    def _put(self, name: str, text: str) -> None:
        try:
            write_file(self._part.model / name, text, self._part.folder)
        except OSError as error:
            raise RunError(
                f"{self._part.model / name}: cannot be written ({error.strerror}). Make room or check the "
                "disk."
            ) from None

    def close(self) -> None:
        self._files.close()

    def __enter__(self) -> AdapterFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def encoded(values: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """Encode numbers as ``dtype``, each rounded once. Errors: NonFiniteError naming the tensor ``name`` and the index."""
    width = DTYPES[dtype].bytes
    out = np.empty(values.size * width, np.uint8)
    kernel, no_base, weight = kernel_for(rounding_kernel(), values.size), np.empty(0, np.uint8), np.ones(1)
    codes = np.array([CODES["F64"]], np.int64)
    for first in range(0, values.size, BLOCK):
        part = np.ascontiguousarray(values[first : first + BLOCK], np.float64)
        bytes_of = out[first * width : (first + part.size) * width]
        if (
            kernel((part.view(np.uint8),), codes, no_base, 0, bytes_of, CODES[dtype], first, True, weight)
            >= 0
        ):
            raise NonFiniteError(
                f"{name}: holds a NaN, an infinity or a number too large for {dtype}; expected finite "
                "numbers. Check the inputs, or choose a wider dtype."
            )
    return out


def target_modules(modules: Sequence[str], others: Sequence[str] = ()) -> list[str]:
    """Return names for ``target_modules``: last components where they match only ``modules``, else whole names.

    ``others`` are the base's other modules.

    >>> target_modules(["layers.0.q_proj", "layers.1.q_proj"], ["layers.0.k_proj"])
    ['q_proj']
    >>> target_modules(["layers.0.q_proj"], ["layers.1.q_proj"])
    ['layers.0.q_proj']
    """
    last = {name.rpartition(".")[2] for name in modules}
    ambiguous = last & {name.rpartition(".")[2] for name in others}
    return sorted(
        {name if name.rpartition(".")[2] in ambiguous else name.rpartition(".")[2] for name in modules}
    )


def _pattern(name: str, names: Collection[str]) -> str:
    """Return a pattern that matches only ``name``; PEFT also matches the end of a name."""
    return f"^{name}" if any(other.endswith(f".{name}") for other in names) else name


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else float(value)
