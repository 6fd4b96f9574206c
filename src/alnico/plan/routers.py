"""Recognises the routers of mixtures of experts, and makes the rules and notes of a merge that has them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alnico.checkpoint.source import Source, Tensor
from alnico.checkpoint.statistics import statistics_folder
from alnico.errors import MismatchError
from alnico.numerics.dtypes import MERGEABLE
from alnico.plan.families import TEXT_CONFIGS
from alnico.plan.job import Job
from alnico.recipe.options import matches_filter
from alnico.recipe.schema import EachModel, Parameters, Recipe, Rule

EXPERT_COUNTS = (
    "num_experts", "num_local_experts", "n_routed_experts", "num_routed_experts", "moe_num_experts", "n_experts",
)  # fmt: skip
"""Config keys that give the number of experts of a layer."""

_EXPERT = re.compile(r"(.+?)\.experts\.(?:(\d+)\.)?.+")
_MATRIX = re.compile(r"((?:.+?\.)?)(gate|router)(\.(?:layer|classifier|proj|gate|wg))?\.weight")
_WITH_IT = re.compile(
    r"((?:.+?\.)?)(?:(?:gate|router)\..+|(?:(?:moe_statics|experts)\.)?(?:e_score_correction_bias|expert_bias))"
)
_EXPERTS = 4096
"""Most experts of a layer: a matrix with more rows is no router."""

RIDGE = 1e-3
"""The share of the mean diagonal that calibration adds to the Gram matrix of a router's inputs."""


@dataclass(frozen=True)
class Routers:
    """The routers of a model: their matrices with the numbers of experts, and the other tensors of their modules."""

    experts: Mapping[str, int]
    """The number of experts, the rows of the matrix, by the name of the matrix."""
    others: tuple[str, ...] = ()
    """Biases and corrections that belong to routers."""

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.experts, *self.others)


def find_routers(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Routers:
    """Find the routers among the tensors of a model, by name and shape, from headers alone.

    A router is a matrix (experts, inputs) of a module called ``gate`` or ``router``, or of the only layer in it, beside
    experts. The number of its rows is that of the experts: of those stored one by one (``experts.7.``), of the first
    dimension of those packed into one tensor, or of the config. So the gate of a gated MLP (``gate_proj``) and that of a
    shared expert (``shared_expert_gate``, one row) are none.

    >>> from alnico.checkpoint.source import TensorSpec
    >>> shape = lambda *s: TensorSpec("F32", s, "F32")
    >>> of = {f"mlp.experts.{i}.up_proj.weight": shape(8, 4) for i in range(3)}
    >>> find_routers({**of, "mlp.gate.weight": shape(3, 4), "mlp.shared_expert_gate.weight": shape(1, 4)}, {}).names
    ('mlp.gate.weight',)
    """
    counts: dict[str, set[int]] = {}
    for name in tensors:
        match = _EXPERT.fullmatch(name)
        if match is not None and match[2] is not None:
            counts.setdefault(match[1], set()).add(int(match[2]) + 1)
    numbered = {block: {max(found)} for block, found in counts.items()}
    for name, tensor in tensors.items():
        if len(tensor.shape) == 3:
            block = (
                name.partition(".experts.")[0]
                if ".experts." in name
                else _parent(name.removesuffix(".weight"))
            )
            numbered.setdefault(block, set()).add(tensor.shape[0])
    of_config = {n for level in _levels(config) for key in EXPERT_COUNTS if type(n := level.get(key)) is int}
    experts: dict[str, int] = {}
    blocks = set()
    for name, tensor in tensors.items():
        match = _MATRIX.fullmatch(name)
        if match is None or len(tensor.shape) != 2 or not 1 < tensor.shape[0] <= _EXPERTS:
            continue
        block = match[1].rstrip(".")
        beside = numbered.get(block) or numbered.get(_parent(block)) or set()
        if tensor.dtype in MERGEABLE and tensor.shape[0] in beside | of_config:
            experts[name] = tensor.shape[0]
            blocks.add(block)
    others = tuple(
        name
        for name, tensor in tensors.items()
        if name not in experts
        and (match := _WITH_IT.fullmatch(name)) is not None
        and match[1].rstrip(".") in blocks
        and tensor.dtype in MERGEABLE
    )
    return Routers(experts, others)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _levels(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The config, and its parts that describe text models."""
    parts = (config, *(config.get(key) for key in (*TEXT_CONFIGS, "ffn_config")))
    return [part for part in parts if isinstance(part, Mapping)]


def with_router_rules(recipe: Recipe, sources: Sequence[Source], donor: int) -> Recipe:
    """Return the recipe with the rules that its ``routers`` stands for, after its own.

    ``base`` and a model are ``passthrough`` of that model. A folder of statistics is ``regmean``: each merged router W
    minimises ``sum_i (|X_i W^T - X_i W_i^T|^2 / n_i + r_i |W - W_i|^2)``, where X_i are the n_i inputs of the router W_i in
    model i, and r_i is :data:`RIDGE` times the mean square of their entries. So the merged router gives each model's
    inputs the logits that this model's router gives them, and stays near the mean in directions without inputs.
    ``merge`` stands for no rule.

    Errors: MismatchError for a model without routers.
    """
    setting, folder = recipe.routers, recipe.calibrate_routers
    if setting is None and folder is None:
        return recipe
    model = sources[donor]
    found = find_routers(model.tensors, model.config)
    if not found.experts:
        raise MismatchError(
            f"{recipe.name}: routers is for mixtures of experts, and {model.label} has no router; expected a matrix with one row "
            "for each expert, such as model.layers.0.mlp.gate.weight, beside the experts. Remove routers, or merge mixtures."
        )
    if setting == "merge":
        return recipe
    if folder is not None:
        parameters: Parameters = {
            "gram": EachModel(
                tuple(str(Path(folder) / statistics_folder(e.reference)) for e in recipe.models)
            ),
            "alpha": 1.0,
            "ridge": RIDGE,
            "weight": 1.0,
            "normalize": True,
        }
        rules = [Rule(pattern, "regmean", parameters) for pattern in _patterns(found.experts)]
    else:
        rules = [Rule(pattern, "passthrough", model=setting) for pattern in _patterns(found.names)]
    return dataclasses.replace(recipe, methods=(*recipe.methods, *rules))


def _patterns(names: Collection[str]) -> list[str]:
    """Return filters that match exactly these names and the same in other layers."""
    shapes = dict.fromkeys(re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(name)) for name in names)
    return [f"re:^{shape}$" for shape in shapes]


def merged_routers_note(
    recipe: Recipe, sources: Sequence[Source], donor: int, jobs: Sequence[Job]
) -> list[str]:
    """Return a note on routers that are merged like other weights, where the recipe does not say so.

    A router of merged rows may send tokens to other experts than any of the models does. The note has the line to add.
    """
    if recipe.routers is not None or recipe.calibrate_routers is not None:
        return []
    found = find_routers(sources[donor].tensors, sources[donor].config)
    asked = {
        name for name in found.experts if any(matches_filter(rule.filter, name) for rule in recipe.methods)
    }
    merged = [
        job
        for job in jobs
        if job.is_computed and job.name in found.experts and job.name not in asked
        if len({given.model for given in job.merged}) > 1
    ]
    if not merged:
        return []
    name, count = merged[0].name, found.experts[merged[0].name]
    if recipe.slices or recipe.modules:
        (pattern, *_) = _patterns([name])
        kept = f"methods: [{{filter: {pattern!r}, merge_method: passthrough, model: {_model_of(recipe)}}}]"
        line = f"Add {kept} to keep those of one model."
    else:
        line = (
            f"Add `routers: {'base' if recipe.base_model else _model_of(recipe)}` to the recipe to keep those of "
            f"{_model_of(recipe)}, `routers: {{calibrate: DIR}}` to fit them to what `alnico statistics routers` measured, or "
            "`routers: merge` to merge them."
        )
    many = f"{name} and {len(merged) - 1} more routers" if len(merged) > 1 else f"the router {name}"
    return [
        f"{many} of {count} experts are merged like other weights, so tokens may go to other experts than in each model. {line}"
    ]


def _model_of(recipe: Recipe) -> str:
    return recipe.base_model or recipe.references[0]
