"""Summarizes a model or a LoRA adapter from its headers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal

from alnico.checkpoint.lora_adapter import CONFIG, Adapter
from alnico.checkpoint.open_adapter import is_lora_file, open_adapter
from alnico.checkpoint.reference import is_hub_reference
from alnico.checkpoint.remote.open_remote_model import is_adapter_at_url
from alnico.checkpoint.source import Source, unwrap
from alnico.checkpoint.task_vector_file import base_in_header, is_task_vector_file
from alnico.errors import ModelError
from alnico.models.open_models import AnyModel, name_model, open_source, path_of
from alnico.notebook import ResultTable, figure_text, name_text, never_fails, result_html, result_line
from alnico.numerics.arithmetic import ieee_arithmetic
from alnico.numerics.sizes import format_size
from alnico.run_options import Access
from alnico.vocabulary.compare import read_vocabulary


@dataclass(frozen=True)
class Inspection:
    """The summary of a model's or an adapter's headers; ``summary`` is plain data."""

    kind: Literal["model", "adapter"]
    summary: Mapping[str, Any]

    def data(self) -> dict[str, Any]:
        """Return the summary as plain data, for ``--json``."""
        return dict(self.summary)

    def __repr__(self) -> str:
        return result_line(
            f"{self.kind} {name_text(self.summary.get(self.kind))}",
            *(f"{name} {name_text(figure_text(value))}" for name, value in self._facts()),
        )

    def _facts(self) -> list[tuple[str, Any]]:
        """The summary without its lists, for people."""
        summary = self.summary
        dtypes = summary.get("dtypes") or ()
        facts = [
            ("architecture", ", ".join(map(str, summary.get("architectures") or ()))),
            ("base", summary.get("base")),
            ("dialect", summary.get("dialect")),
            ("task vector of", summary.get("task_vector_of")),
            ("layers", summary.get("layers")),
            ("tensors", len(summary["tensors"]) if "tensors" in summary else None),
            ("modules", len(summary["updates"]) if "updates" in summary else None),
            ("parameters", summary.get("parameters")),
            ("size", format_size(summary["bytes"]) if "bytes" in summary else None),
            ("dtypes", ", ".join(map(str, dtypes))),
        ]
        return [(name, value) for name, value in facts if value not in (None, "")]

    @never_fails
    def _repr_html_(self) -> str:
        summary = self.summary
        if self.kind == "adapter":
            rows = [
                [u["module"], u["kind"], u["rank"], u["scale"], "x".join(map(str, u["shape"]))]
                for u in summary["updates"]
            ]
            table = ResultTable(("module", "kind", "rank", "scale", "shape"), rows)
        else:
            rows = [
                [t["name"], t["dtype"], "x".join(map(str, t["shape"])), format_size(t["bytes"])]
                for t in summary["tensors"]
            ]
            table = ResultTable(("tensor", "dtype", "shape", "size"), rows)
        return result_html(
            f"{self.kind.capitalize()} {name_text(summary.get(self.kind))}", table, facts=self._facts()
        )


@ieee_arithmetic()
def inspect(model: AnyModel, *, offline: bool = False) -> Inspection:
    """Summarize a model or a LoRA adapter from its headers.

    Of a model: tensors, dtypes, sizes, architecture and vocabulary. Of an adapter: kinds, ranks, scales and modules; of a LoRA file
    without a config (kohya, ComfyUI, diffusers, ...) also its dialect, its alphas, the parts of the model that it changes, and its header.
    Of a model in memory: tensors, dtypes and sizes.

    Options:
        model: A model or an adapter: a directory, a .safetensors file, a URL, or owner/name@revision on the hub.
    Errors: ModelError, HubError.
    """
    label, path, access = name_model(model, "model"), path_of(model), Access(offline)
    if path is not None and (_is_adapter(path) or is_adapter_at_url(path, access)):
        with open_adapter(path, access=access) as adapter:
            return Inspection("adapter", _adapter_data(adapter))
    try:
        opened = open_source(model, label, access=access, may_be_adapter=True)
    except ModelError:
        if path is None or not is_hub_reference(path):
            raise
        data = _adapter_on_hub(path, access)
        if data is None:
            raise
        return Inspection("adapter", data)
    with closing(opened):
        if not is_lora_file(opened.tensors):
            return Inspection("model", _model_data(opened))
        try:
            return Inspection("adapter", _lora_data(opened, path, access))
        except ModelError as error:
            return Inspection("model", {**_model_data(opened), "not_read_as_adapter": str(error)})


def _is_adapter(reference: str) -> bool:
    """Is a path the directory of an adapter, without a whole model in it?"""
    folder = os.path.expanduser(reference)
    return os.path.isfile(os.path.join(folder, CONFIG)) and not os.path.isfile(
        os.path.join(folder, "config.json")
    )


def _adapter_on_hub(reference: str, access: Access) -> dict[str, Any] | None:
    """Summarize a repository that is no model; None if it is no adapter either. Errors: HubError."""
    try:
        with open_adapter(reference, access=access) as adapter:
            return _adapter_data(adapter)
    except ModelError:
        return None


def _lora_data(opened: Any, path: str | None, access: Access) -> dict[str, Any]:
    """Summarize a file of factors, or a dict of them, without a config. Errors: ModelError, HubError."""
    if path is None:
        from alnico.checkpoint.lora_dialects.dialect_adapter import adapter_without_config

        return _adapter_data(adapter_without_config(opened))
    with open_adapter(path, access=access) as adapter:
        return _adapter_data(adapter)


def _adapter_data(adapter: Adapter) -> dict[str, Any]:
    """Summarize an adapter as plain data."""
    tensors = unwrap(adapter.files).tensors
    return {
        "adapter": adapter.label,
        "base": adapter.trained_on
        or (adapter.dialect.trained_for if adapter.dialect is not None else "")
        or None,
        **_dialect_data(adapter),
        "parameters": sum(t.elements for t in tensors.values()),
        "bytes": sum(t.byte_size for t in tensors.values()),
        "dtypes": sorted({t.dtype for t in tensors.values()}),
        "updates": [
            {
                "module": update.module,
                "rank": update.rank,
                "scale": update.scale,
                "shape": list(adapter.shape(update)),
                **({"experts": update.experts} if update.experts > 1 else {}),
                **({"parameters": list(update.parameters)} if update.parameters != ("weight",) else {}),
                "kind": "DoRA" if update.magnitude else "embedding" if update.is_embedding else "LoRA",
                **({"bias": True} if update.bias else {}),
                **_stored_data(adapter, key),
            }
            for key, update in adapter.updates.items()
        ],
        "replaced": list(adapter.replaced),
    }


def _dialect_data(adapter: Adapter) -> dict[str, Any]:
    """What only a LoRA file without a config has: a dialect, parts of an image model, differences of vectors, a header of its trainer."""
    dialect = adapter.dialect
    if dialect is None:
        return {}
    from alnico.checkpoint.lora_dialects.description import parts_of_model, program_of

    return {
        "dialect": program_of(dialect),
        "parts": parts_of_model(list(dialect.modules)),
        "vectors": [vector.name for vector in adapter.vectors.values()],
        "metadata": dict(dialect.metadata),
    }


def _stored_data(adapter: Adapter, key: str) -> dict[str, Any]:
    """How a LoRA file without a config stores an update: its kind, the rank of its factors (None where they have none) and its alpha."""
    if adapter.dialect is None:
        return {}
    from alnico.checkpoint.lora_dialects.description import kind_of

    stored = adapter.dialect.modules[key]
    return {
        "kind": kind_of(stored, has_magnitude=bool(adapter.updates[key].magnitude)),
        "rank": stored.rank or None,
        **({"alpha": stored.alpha} if stored.alpha is not None else {}),
    }


def _model_data(model: Source) -> dict[str, Any]:
    """Summarize a model as plain data."""
    dtypes: dict[str, dict[str, int]] = {}
    for tensor in model.tensors.values():
        entry = dtypes.setdefault(tensor.dtype, {"tensors": 0, "parameters": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["parameters"] += tensor.elements
        entry["bytes"] += tensor.byte_size
    vocabulary = read_vocabulary(model.directory)
    return {
        "model": model.label,
        **({"task_vector_of": base_in_header(model)} if is_task_vector_file(model) else {}),
        **({"commit": model.origin.commit} if model.origin is not None else {}),
        "architectures": model.config.get("architectures"),
        "model_type": model.config.get("model_type"),
        "layers": model.config.get("num_hidden_layers"),
        "hidden_size": model.config.get("hidden_size"),
        "tied_embeddings": model.config.get("tie_word_embeddings"),
        "vocabulary": {
            "config": model.config.get("vocab_size"),
            "tokens": vocabulary and len(set(vocabulary.tokens.values()) | set(vocabulary.added.values())),
        },
        "files": [
            {"name": s.name, "bytes": s.size, "tensors": len(s.header.tensors)}
            for s in getattr(model, "shards", ())
        ],
        "dtypes": dtypes,
        "parameters": sum(t.elements for t in model.tensors.values()),
        "bytes": sum(t.byte_size for t in model.tensors.values()),
        "tensors": [
            {"name": n, "dtype": t.dtype, "shape": list(t.shape), "bytes": t.byte_size}
            for n, t in model.tensors.items()
        ],
    }
