"""Lays out factors so that PEFT and serving engines load them: which matrices PEFT can hold, and its config."""

from __future__ import annotations

from collections.abc import Mapping

from alnico.checkpoint.adapter_changes import is_transposed_linear
from alnico.checkpoint.layouts import transformers_names
from alnico.checkpoint.source import Source
from alnico.checkpoint.tied_weights import architectures
from alnico.lora.writer import OutputAdapter, OutputModule, target_modules
from alnico.plan.families import OTHER_TABLES, ROUTERS, is_lookup
from alnico.store.encoders.encoded import EncodedTensor
from alnico.store.model_pair import repository_of
from alnico.vocabulary.tables import find_tables, is_input

WEIGHT = ".weight"


class AdapterLayout:
    """Says which tensors of a base a LoRA adapter can hold, and what their modules are called in transformers."""

    def __init__(self, base: Source) -> None:
        self._base = base
        self._spelled = transformers_names(base.config, base.tensors)
        self._tables = {name for name in find_tables(base).rows if is_input(name)}

    def holds(self, name: str) -> bool:
        """Is a tensor the weight of a linear layer, stored (out, in)?"""
        spelled, tensor = self._spelled.get(name, name), self._base.tensors.get(name)
        return (
            tensor is not None
            and len(tensor.shape) == 2
            and spelled.endswith(WEIGHT)
            and name not in self._tables
            and not is_lookup(spelled)
            and not spelled.endswith((*ROUTERS, *OTHER_TABLES))
            and not is_transposed_linear(name, self._base.config)
        )

    def module(self, name: str, encoded: EncodedTensor) -> OutputModule:
        """Return the module of a tensor that is stored by factors."""
        left, right = encoded.parts["left"], encoded.parts["right"]
        module = self._spelled.get(name, name).removesuffix(WEIGHT)
        return OutputModule(module, "linear", encoded.rank, left.shape, right.shape)

    def adapter(self, chosen: Mapping[str, EncodedTensor], reference: str | None) -> OutputAdapter | None:
        """Return the adapter of all tensors that are stored under PEFT's names; None without one."""
        modules = [self.module(name, one) for name, one in chosen.items() if one.is_peft]
        if not modules:
            return None
        named = {m.module for m in modules}
        others = [s.removesuffix(WEIGHT) for s in self._spelled.values() if s.endswith(WEIGHT)]
        origin = repository_of(self._base)
        classes = architectures(self._base.config)
        is_causal = any(a.endswith(("ForCausalLM", "LMHeadModel")) for a in classes)
        settings = {
            "target_modules": target_modules(
                [m.module for m in modules], [o for o in others if o not in named]
            ),
            "task_type": "CAUSAL_LM" if is_causal else None,
            "base_model_name_or_path": origin.name if origin is not None else reference,
        }
        dtypes = {one.parts["left"].dtype for one in chosen.values() if one.is_peft}
        return OutputAdapter(modules, dtype=dtypes.pop() if len(dtypes) == 1 else "F32", settings=settings)
