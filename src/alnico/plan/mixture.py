"""Plans a mixture of experts: which tensors of which dense models are copied under which names, and the gates."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alnico.checkpoint.computed_tensors import ComputedTensors
from alnico.checkpoint.renamed_model import RenamedModel
from alnico.checkpoint.source import Source, Tensor
from alnico.checkpoint.statistics import StatisticsSource
from alnico.errors import MismatchError, ModelError
from alnico.methods import find
from alnico.methods.base import MatrixMethod, Merge, combine
from alnico.numerics.dtypes import MERGEABLE, Shape, promote
from alnico.plan import families, gates
from alnico.plan.compatibility import Misfit, config_notes, explain_mismatch
from alnico.plan.job import Dropped, Input, Job
from alnico.plan.job_builder import copied, new_job
from alnico.plan.mixture_kinds import (
    INVERSE_FREQUENCIES,
    MATRICES,
    MLP,
    MixtureKind,
    choose_kind,
    fits_kind,
    mixture_config,
)
from alnico.plan.statistics_inputs import StatisticsInputs
from alnico.plan.tensor_matching import TensorMatcher
from alnico.recipe.experts import OF_PROMPTS, Expert, Mixture
from alnico.recipe.schema import Recipe

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
"""Keys of a dense config that a mixture's is made from."""


@dataclass(frozen=True)
class MixturePlan:
    """What a recipe of a mixture comes to: jobs in the order of layers, the config, and what is said about both."""

    jobs: list[Job]
    config: Mapping[str, Any]
    dropped: list[Dropped]
    notes: list[str]


def plan_mixture(recipe: Recipe, references: Sequence[str], sources: list[Source], donor: int) -> MixturePlan:
    """Plan a mixture. ``donor`` is the base; statistics and gates are appended to ``sources``.

    Errors: MismatchError for models of other types and sizes, and for what the kind of mixture cannot hold; ModelError.
    """
    assert recipe.mixture is not None
    mixture = recipe.mixture
    base = sources[donor]
    used = [donor, *(references.index(name) for name in mixture.references)]
    models = [sources[i] for i in dict.fromkeys(used)]
    _check_dense(models)
    dense = str(base.config.get("model_type"))
    kind = choose_kind(
        dense,
        mixture.architecture,
        bool(mixture.shared),
        any(e.positive_prompts for e in mixture.shared),
        base.label,
    )
    if kind.bias and len(mixture.experts) < 2:
        raise MismatchError(
            f"experts: there is one, and {kind.model_type} compares two or more; expected at least two. Add an expert, or choose another "
            "architecture."
        )
    for key in SIZES:
        if not isinstance(base.config.get(key), int) or base.config[key] < 1:
            raise ModelError(
                f"{base.label}: config.json has no {key}; expected a whole number. Correct the config."
            )
    _check_shapes(models, base)
    builder = _MixtureBuilder(recipe, mixture, references, sources, donor, kind)
    config, notes = mixture_config(
        base.config, kind, len(mixture.experts), mixture.experts_per_token, base.label
    )
    jobs = builder.build()
    return MixturePlan(
        jobs,
        config,
        builder.dropped(jobs),
        [*_notes(mixture, kind, base.label), *notes, *builder.notes, *config_notes(models, base)],
    )


def _check_dense(models: Sequence[Source]) -> None:
    """Refuse models that are mixtures, and models of several types. Errors: MismatchError."""
    for model in models:
        experts = [name for name in model.tensors if families.is_of_mixture(name)]
        if experts:
            raise MismatchError(
                f"{model.label}: is a mixture of experts already, with {experts[0]}; expected a dense model. Merge mixtures with `alnico "
                "merge`, or use the dense models that it was built from."
            )
    types = {str(model.config.get("model_type") or "none") for model in models}
    if len(types) > 1:
        each = ", ".join(f"{m.label} ({m.config.get('model_type') or 'none'})" for m in models)
        raise MismatchError(
            f"the models are of several types: {each}; expected one type. Use models of one type."
        )


def _check_shapes(models: Sequence[Source], base: Source) -> None:
    """Refuse models whose MLPs have other shapes, or are missing. Errors: MismatchError."""
    names = [name for name in base.tensors if MLP.fullmatch(name)]
    if not names:
        raise MismatchError(
            f"{base.label}: has no MLP such as model.layers.0.mlp.gate_proj.weight; expected one in every layer. Use a model of the "
            "types that mixtures are built from."
        )
    for model in models:
        misfits = [
            Misfit(n, {0: base.tensors[n].shape, 1: model.tensors[n].shape if n in model.tensors else None})
            for n in names
            if n not in model.tensors or model.tensors[n].shape != base.tensors[n].shape
        ]
        if not misfits:
            continue
        lines = explain_mismatch(misfits, (base, model))
        if lines:
            raise MismatchError(f"{lines[0]} Experts have the shapes of base_model.")
        shape = misfits[0].shapes[1]
        found = "lacks it" if shape is None else f"is {shape}"
        raise MismatchError(
            f"{misfits[0].name}: {model.label} {found}, {base.label} is {misfits[0].shapes[0]}; expected experts of one shape. Use "
            "models of one size."
        )


def _notes(mixture: Mixture, kind: MixtureKind, base: str) -> list[str]:
    """What to know of the mixture as a whole."""
    others = "the average of the experts" if mixture.others == "average" else base
    shared = ", and every token passes a shared one" if mixture.shared else ""
    notes = [
        f"a mixture of type {kind.model_type}: a token passes {mixture.experts_per_token} of {len(mixture.experts)} experts{shared}; all "
        f"other tensors are those of {others}."
    ]
    if len({(e.models, e.rank, e.residual_scale) for e in mixture.experts}) == 1 and len(mixture.experts) > 1:
        notes.append(
            "all experts are the same, so the mixture computes what one of them does, whatever its gates; train it to make them differ."
        )
    if mixture.gate_mode in ("random", "uniform_random"):
        notes.append("the gates are random: the mixture is of use only after training.")
    return notes


@dataclass
class _MixtureBuilder:
    """Builds the jobs of one mixture."""

    recipe: Recipe
    mixture: Mixture
    references: Sequence[str]
    sources: list[Source]
    donor: int
    kind: MixtureKind
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        base = self.sources[self.donor]
        self.base = base
        self.dense = str(base.config.get("model_type"))
        self.experts = [[self._position(m) for m in e.models] for e in self.mixture.experts]
        self.shared = [[self._position(m) for m in e.models] for e in self.mixture.shared]
        self.merged = list(
            dict.fromkeys([*(i for models in (*self.experts, *self.shared) for i in models), self.donor])
        )
        floats = [
            t.nominal for i in self.merged for t in self.sources[i].tensors.values() if t.dtype in MERGEABLE
        ]
        self.dtype = self.recipe.dtype or promote(list(dict.fromkeys(floats)))
        self._digests: dict[tuple[int, str], str] = {}
        self._merges: dict[object, Merge | MatrixMethod] = {}

    def _position(self, reference: str) -> int:
        return self.references.index(reference)

    def build(self) -> list[Job]:
        """Return the jobs in the order of the base's tensors; a layer's experts follow its first MLP matrix."""
        layers = [
            m["layer"] for n in self.base.tensors if (m := MLP.fullmatch(n)) and m["matrix"] == MATRICES[0]
        ]
        gates_of = self._gates(layers)
        averaged = (
            sorted({i for models in self.experts for i in models}) if self.mixture.others == "average" else []
        )
        self._check_vocabularies(averaged)
        jobs: list[Job] = []
        misplaced: list[str] = []
        for name in self.base.tensors:
            match = MLP.fullmatch(name)
            if match is not None:
                if match["matrix"] == MATRICES[0]:
                    jobs += gates_of[match["layer"]]
                    jobs += self._mlps(match["layer"])
            elif fits_kind(self.dense, name):
                jobs.append(self._other(name, averaged))
            elif not name.endswith(INVERSE_FREQUENCIES):
                misplaced.append(name)
        if misplaced:
            raise MismatchError(
                f"{misplaced[0]}: {self.base.label} has it, and {self.kind.model_type} has no place for it ({len(misplaced)} such "
                f"tensors); expected the tensors of a {self.dense} model. Leave it out by a document with a rule that drops it, and "
                "use that document's output."
            )
        return jobs

    def _check_vocabularies(self, averaged: Sequence[int]) -> None:
        """Compare the vocabularies of models whose embeddings are averaged. Errors: MismatchError."""
        if len(averaged) > 1:
            matcher = TensorMatcher(self.sources, self.donor, "error")
            matcher.check_vocabularies(averaged, self.donor)
            matcher.refuse()
            self.notes += matcher.notes

    def _mlps(self, layer: str) -> list[Job]:
        """Return the jobs of a layer's experts, one after the other, and of its shared expert."""
        jobs = []
        for i, (expert, models) in enumerate(zip(self.mixture.experts, self.experts, strict=True)):
            for matrix in MATRICES:
                jobs.append(
                    self._matrix(
                        f"{layer}{self.kind.expert(i, matrix)}", layer, matrix, expert, models, f"expert {i}"
                    )
                )
        for expert, models in zip(self.mixture.shared, self.shared, strict=True):
            for matrix in MATRICES:
                name = f"{layer}{self.kind.shared}.{matrix}.weight"
                jobs.append(self._matrix(name, layer, matrix, expert, models, "the shared expert"))
        return jobs

    def _matrix(
        self, name: str, layer: str, matrix: str, expert: Expert, models: Sequence[int], place: str
    ) -> Job:
        own = f"{layer}mlp.{matrix}.weight"
        tensor = self.sources[models[0]].tensors[own]
        inputs = tuple(self._input(i, own) for i in models)
        labels = " and ".join(dict.fromkeys(self.sources[i].label for i in models))
        if expert.rank != 1:
            method = self._method(("svd", expert.rank), lambda: find("svd").bind({"rank": expert.rank}, 1))
            assert isinstance(method, MatrixMethod)
            return new_job(
                "matrix",
                name,
                self.dtype,
                tensor,
                inputs,
                base=self._input(self.donor, own),
                matrix=method,
                why=f"{place}: {labels}, of low rank",
            )
        scale = expert.residual_scale if matrix == MATRICES[-1] else 1.0
        if len(models) == 1 and scale == 1:
            return copied(name, inputs[0], tensor, self.dtype, f"{place}: {labels}")
        why = (
            f"{place}: {labels}"
            + (" averaged" if len(models) > 1 else "")
            + (f", times {scale:g}" if scale != 1 else "")
        )
        return self._mean(name, tensor, inputs, scale, why)

    def _mean(self, name: str, tensor: Tensor, inputs: tuple[Input, ...], scale: float, why: str) -> Job:
        """Return the job of the mean of several tensors, times ``scale``."""
        weights = (scale / len(inputs),) * len(inputs)
        merge = self._method(weights, lambda: combine(weights, fixes_equal_inputs=scale == 1))
        assert isinstance(merge, Merge)
        return new_job("mix", name, self.dtype, tensor, inputs, merge=merge, why=why)

    def _method(self, key: object, make: Callable[[], Merge | MatrixMethod]) -> Merge | MatrixMethod:
        """Return the equation of some numbers; tensors with the same numbers share it."""
        if key not in self._merges:
            self._merges[key] = make()
        return self._merges[key]

    def _other(self, name: str, averaged: Sequence[int]) -> Job:
        """Return the job of a tensor outside of the experts."""
        tensor = self.base.tensors[name]
        if len(averaged) < 2:
            origin = averaged[0] if averaged else self.donor
            source = self.sources[origin]
            if name not in source.tensors:
                raise MismatchError(
                    f"{name}: {source.label} lacks it; expected it for others: average. Use others: base."
                )
            return copied(
                name, self._input(origin, name), source.tensors[name], self.dtype, f"of {source.label}"
            )
        for i in averaged:
            other = self.sources[i].tensors.get(name)
            if other is None or other.shape != tensor.shape:
                found = "lacks it" if other is None else f"is {other.shape}"
                raise MismatchError(
                    f"{name}: {self.sources[i].label} {found}, {self.base.label} is {tensor.shape}; expected one shape to average. Use "
                    "others: base."
                )
        inputs = tuple(self._input(i, name) for i in averaged)
        return self._mean(name, tensor, inputs, 1.0, "averaged over the experts")

    def _input(self, model: int, name: str) -> Input:
        tensor = self.sources[model].tensors[name]
        return Input(model, name, tensor.dtype, tensor.byte_size, self._digests.get((model, name), ""))

    def dropped(self, jobs: Sequence[Job]) -> list[Dropped]:
        """Return the tensors of the models that the mixture has not, and why."""
        read = {(i.model, i.name) for job in jobs for i in job.merged}
        others = "averages" if self.mixture.others == "average" else f"those of {self.base.label}"
        dropped = []
        for model in self.merged:
            for name, tensor in self.sources[model].tensors.items():
                if (model, name) in read:
                    continue
                if name.endswith(INVERSE_FREQUENCIES):
                    why = "programs compute it from the config"
                elif MLP.fullmatch(name):
                    why = "the experts take the place of the base's MLPs"
                else:
                    why = f"outside of the experts, the mixture has {others}"
                dropped.append(Dropped(model, name, tensor.byte_size, why))
        return dropped

    # ---- gates

    def _gates(self, layers: Sequence[str]) -> dict[str, list[Job]]:
        """Return the jobs of each layer's gates, and of its bias."""
        hidden = int(self.base.tensors[f"{layers[0]}mlp.{MATRICES[0]}.weight"].shape[1])
        count = len(self.mixture.experts)
        experts = {f"{layer}{self.kind.gate}": (count, hidden) for layer in layers}
        shared = {f"{layer}{self.kind.shared_gate}": (1, hidden) for layer in layers if self.kind.shared_gate}
        mode, scale = self.mixture.gate_mode, self.mixture.gate_scale
        jobs: dict[str, Job] = {}
        asks = any(e.positive_prompts for e in self.mixture.shared)
        if mode in OF_PROMPTS:
            asked = shared if asks else {}
            jobs |= (
                self._measured(layers, experts, asked)
                if self.mixture.gates is not None
                else self._made(
                    gates.unmeasured_gates({**experts, **asked}, mode),
                    "measured from prompts when the mixture is built",
                )
            )
        elif mode == "ridge":
            jobs |= self._made(self._ridge(layers, hidden), "ridge regression on the experts' inputs")
        else:
            made = gates.random_gates(
                {**experts, **shared}, self.recipe.seed, scale, is_uniform=mode == "uniform_random"
            )
            jobs |= self._made(made, "random")
        rest = {name: shape for name, shape in shared.items() if name not in jobs}
        if rest:
            jobs |= self._made(gates.zeros(rest), "zeros: half of the shared expert is added to every token")
        biases: dict[str, Shape] = {
            f"{layer}{self.kind.bias}": (count,) for layer in layers if self.kind.bias
        }
        if biases:
            jobs |= self._made(gates.zeros(biases), "zeros: no expert is preferred", "F32")
        return {layer: [job for name, job in jobs.items() if name.startswith(layer)] for layer in layers}

    def _made(self, source: ComputedTensors, why: str, dtype: str | None = None) -> dict[str, Job]:
        """Add a source of made tensors; return the jobs that write them."""
        self.sources.append(source)
        place = len(self.sources) - 1
        return {
            name: copied(name, Input(place, name, "F32", tensor.byte_size), tensor, dtype or self.dtype, why)
            for name, tensor in source.tensors.items()
        }

    def _measured(
        self, layers: Sequence[str], experts: Mapping[str, Shape], shared: Mapping[str, Shape]
    ) -> dict[str, Job]:
        """Return the jobs of gates that were measured from prompts. Errors: ModelError, MismatchError."""
        assert self.mixture.gates is not None
        place, statistics = StatisticsInputs(self.sources, self.recipe.folder).opened(
            self.mixture.gates, "gates"
        )
        jobs = {}
        scale = self.mixture.gate_scale
        for layer in layers:
            norm = f"{layer}input_layernorm.weight"
            entry = statistics.entries.get(norm)
            stored = {f"{layer}{self.kind.gate}": entry.stored if entry is not None else ""}
            if shared:
                stored[f"{layer}{self.kind.shared_gate}"] = (
                    entry.parts.get("shared", "") if entry is not None else ""
                )
            for name, own in stored.items():
                shape = {**experts, **shared}[name]
                tensor = statistics.tensors.get(own)
                if tensor is None or tensor.shape != shape or tensor.dtype != "F32":
                    found = "are missing" if tensor is None else f"are {tensor.dtype} {tensor.shape}"
                    raise MismatchError(
                        f"{name}: its gates in {statistics.label} {found}; expected F32 {shape}. Leave gates out, and measure them again."
                    )
                given = Input(place, own, tensor.dtype, tensor.byte_size)
                if scale == 1:
                    jobs[name] = copied(name, given, tensor, self.dtype, "measured from prompts")
                else:
                    jobs[name] = self._mean(
                        name, tensor, (given,), scale, f"measured from prompts, times {scale:g}"
                    )
            if entry is not None:
                self._digests[self.donor, norm] = entry.digest
        return jobs

    def _ridge(self, layers: Sequence[str], hidden: int) -> ComputedTensors:
        """Return gates by ridge regression. Errors: ModelError, MismatchError."""
        inputs = StatisticsInputs(self.sources, self.recipe.folder)
        measured: list[StatisticsSource] = []
        names: list[Callable[[str], str]] = []
        for i, (expert, models) in enumerate(zip(self.mixture.experts, self.experts, strict=True)):
            assert expert.gram is not None
            _, statistics = inputs.opened(expert.gram, "gram")
            source = self.sources[models[0]]
            measured.append(statistics)
            names.append(stored_name(source))
            if len(models) == 1 and _is_same(statistics.reference, expert.models[0]):
                for layer in layers:
                    own = f"{layer}mlp.{MATRICES[0]}.weight"
                    entry = statistics.entries.get(names[-1](own))
                    if entry is not None and not isinstance(source, RenamedModel):
                        self._digests[models[0], own] = entry.digest
            elif len(models) == 1 and statistics.reference:
                self.notes.append(
                    f"experts[{i}].gram was measured on {statistics.reference}, so its hashes are not compared with those of "
                    f"{expert.models[0]}."
                )
        wanted = {f"{layer}{self.kind.gate}": f"{layer}mlp.{MATRICES[0]}.weight" for layer in layers}
        return gates.ridge_gates(wanted, measured, names, hidden, self.mixture.ridge, self.mixture.gate_scale)


def stored_name(source: Source) -> Callable[[str], str]:
    """Return what gives the name under which a model's files store a tensor."""
    return (
        (lambda name: source.stored_names(name)[0])
        if isinstance(source, RenamedModel)
        else (lambda name: name)
    )


def _is_same(measured: str, reference: str) -> bool:
    """Do two references mean one model? Paths may be written in two ways: their ends decide.

    >>> _is_same("models/maths", "/data/models/maths"), _is_same("models/maths", "models/code")
    (True, False)
    """

    def end(text: str) -> str:
        return re.split(r"[/\\]", text.rstrip("/\\"))[-1].partition("@")[0]

    return measured == reference or end(measured) == end(reference)
