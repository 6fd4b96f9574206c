"""Derives a first recipe, with its reasons, from an analysis: the rules of docs/choosing.md."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import yaml

from alnico.analysis.results import AnalysedModel, Analysis, Pair, TensorScope
from alnico.engine.relatedness import LARGE, LEAST_TENSORS, NEAR_DUPLICATE, NEARLY_ALL
from alnico.errors import AlnicoError, visible
from alnico.methods import find
from alnico.methods.base import MatrixMethod
from alnico.models.memory_merge import MemoryMerge
from alnico.models.open_models import template_of
from alnico.notebook import never_fails, result_html, result_line
from alnico.numerics.arithmetic import ieee_arithmetic
from alnico.numerics.sizes import count_of, format_size
from alnico.plan.job import stack_of
from alnico.plan.statistics_inputs import why_no_matrix

ANOTHER_START = 0.99
"""Relative change of a matrix from which it is unrelated to the base's. Independent matrices are at 1 or
more, whatever their lengths: |model - base|^2 = |model|^2 + |base|^2. At a cosine of 0.1, the bound of the
check before a merge, it is at least 0.995."""

FAR = 0.5
"""Relative change of a whole model from which a finding mentions it: fine-tunes are at a few per cent."""

SAME_TASK = 0.6
"""Cosine of two task vectors from which they count as one task learned twice. Measured (docs/choosing.md): at
least 0.91 between runs of one task, at most 0.31 between different tasks, of which Model Stock keeps a third
of what the mean does."""

AVERAGE = 0.9
"""Share of the way from the base to the mean that Model Stock goes, from which the mean itself is
suggested."""

OPPOSED = -0.1
"""Cosine of two task vectors at or below which they oppose each other."""

CROWDED = 2.0
"""Overlap of two models' top parameters, as a multiple of that by chance, from which they count as
contested."""

CONTESTED = 0.4
"""Share of opposite signs among shared top parameters from which they count as contested; by chance it is
0.5."""

APART = 0.1
"""Share of all magnitude that adding cancels, up to which the models changed different parameters."""

UNEQUAL = 3.0
"""Ratio of the longest task vector to the shortest from which the long ones get smaller weights."""

MANY = 4
"""Number of different tasks above which the scale is smaller than the distance suggests, as tuned scales
are."""

IN_MATRICES = 0.5
"""Share of the squares of a task vector from which methods over whole matrices are suggested: they merge the rest as its
mean."""

IN_TABLES = 0.05
"""Share of the squares of a task vector in tables of tokens and positions, and token heads, from which a reason mentions
``embeddings: matrix``."""

OPERATIONS_A_SECOND = 5e10
"""Floating-point operations a second of one processor in decompositions of float64 matrices, as methods count them. Measured:
the eigenvectors of a matrix of 4,096 take 10 s."""

LONG_SECONDS = 120.0
"""Time of one processor from which a warning says how long a merge takes."""

MUCH_BYTES = 1 << 30
"""Memory for one matrix from which a warning says how much a merge needs."""

DENSITIES = (0.2, 0.5)
"""Smallest and largest density that is suggested: the paper's of ties, and that of mergekit's examples."""

STANDING_OUT = 0.5
"""Effective sparsity from which few entries hold most of a task vector, so that trimming by magnitude keeps
it. A normal distribution, where no entry stands out, has 0.36."""

SMALL = 0.005
"""Standard deviation of a task vector's entries up to which dropping random entries and rescaling the others
works, as published results show."""


@dataclass(frozen=True)
class SuggestRule:
    """One of :data:`RULES`: its condition, what it suggests, and the evidence for and against it."""

    name: str
    when: str
    then: str
    evidence: str


RULES = (
    SuggestRule(
        "alone",
        "one model is left",
        "`linear` of the base and the model, half of each",
        "The midpoint keeps much of the base's accuracy when the data shift (WiSE-FT, 2109.01903). It does "
        "not merge skills.",
    ),
    SuggestRule(
        "same task, one direction",
        f"cosines of {SAME_TASK:g} or more link all models, and k c / (1 + (k - 1) c), with the mean cosine "
        f"c, is at least {AVERAGE:g}",
        "`linear`, the uniform soup",
        "72 CLIP fine-tunes on ImageNet: uniform soup 80.0 %, greedy soup, which needs labels, 81.0 "
        "(2203.05482).",
    ),
    SuggestRule(
        "same task",
        f"cosines of {SAME_TASK:g} or more link all models, and that share is below {AVERAGE:g}",
        "`model_stock`, which goes that share of the way from the base to the mean",
        "Two CLIP fine-tunes of one task: 87.8 % on ImageNet with nothing to tune (2403.19522). For "
        "different tasks it stays near the base, and on language models found in the wild it gained nothing "
        "(2511.21437).",
    ),
    SuggestRule(
        "apart",
        f"several tasks, and adding cancels at most {APART:g} of all magnitude",
        "`task_arithmetic`, scale 1",
        "Where the changed regions do not overlap, adding all of them keeps each as it was trained "
        "(2408.13656).",
    ),
    SuggestRule(
        "different tasks",
        f"several tasks, full models or adapters, and matrices (tables of tokens included) hold {IN_MATRICES:g} or more of the "
        "squares of each task vector; the default",
        "`tsv` with its defaults",
        "The eight tasks of [quality.md](quality.md), with nothing tuned: 86.1 % on average over three trainings, where task "
        "arithmetic at its best scale has 80 to 82 and the specialists have 88; `dc_merge`, which is close to it, 86.6. Four "
        "tasks on a language model of 135 M: both 84.1, task arithmetic at its best scale 79.1, specialists 84.8; with task "
        "vectors cut to rank 16, as adapters have, `tsv` 83.9, task arithmetic 77.9. 8 CLIP tasks: 85.9, TIES 75.1 and "
        "task arithmetic 70.8, both tuned (2412.00081). Against: pairs are within a point of task arithmetic at its best "
        "scale, either way; no gain on language models found in the wild, where task arithmetic has one (2511.21437).",
    ),
    SuggestRule(
        "conflict, few entries hold it",
        f"several tasks, changed mostly outside of matrices, and two models are opposed (cosine {OPPOSED:g} or less) or contest the same top "
        f"parameters (shared {CROWDED:g} times as often as by chance, {CONTESTED:.0%} or more of them with "
        f"opposite signs); effective sparsity {STANDING_OUT:g} or more, or entries with a standard deviation "
        f"above {SMALL:g}",
        f"`ties`, density 1 - effective sparsity of each model, within {DENSITIES[0]:g} to {DENSITIES[1]:g}",
        "8 CLIP tasks: 75.1, task arithmetic 70.8, both tuned (2306.01708, tables of later papers). "
        "Against: 8 GLUE tasks 54.9, task arithmetic 58.5; no gain on language models found in the wild "
        "(2511.21437).",
    ),
    SuggestRule(
        "conflict, no entry stands out",
        f"the same conflict; effective sparsity below {STANDING_OUT:g}, and entries with a standard "
        f"deviation of at most {SMALL:g}",
        f"`dare_ties`, density 1/k for k tasks, within {DENSITIES[0]:g} to {DENSITIES[1]:g}",
        "A language, a mathematics and a code model of 13 B: 87.2 % of the experts' scores, TIES 82.6, task "
        "arithmetic 80.4 (2311.03099, tables of later papers). It fails where changes are large; no gain in "
        "the wild (2511.21437).",
    ),
    SuggestRule(
        "few matrices",
        "several tasks, and none of the above",
        "`task_arithmetic` at the scale of the distance",
        "The only method with reliable gains over the base on language models found in the wild, with a "
        "tuned scale (2511.21437). Tuned scales: 0.2 to 0.3 for 8 tasks, 0.1 for 14 and 20 (2212.04089, "
        "2405.07813).",
    ),
)
"""In the order in which they are tried; the first that holds is used."""


@dataclass(frozen=True)
class Fit:
    """What headers and vocabularies show about merging a model with its base.

    ``keys`` are recipe keys that make the merge possible, and ``note`` says why they are needed. ``refused``
    says why no keys do. See :mod:`alnico.analysis.plan_check`.
    """

    is_adapter: bool = False
    keys: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    refused: str = ""


@dataclass(frozen=True)
class Suggestion:
    """A first recipe, with reasons.

    ``rule`` is the name of one of :data:`RULES`. ``rule``, ``method`` and ``recipe`` are None if no model is
    left to merge. ``recipe`` is YAML, with everything else as comments. ``findings`` are about models and
    pairs, ``reasons`` about the method and its values, ``warnings`` about what to check. ``models`` are the
    models by their names in the recipe, for :meth:`merge`.
    """

    rule: str | None
    method: str | None
    recipe: str | None
    findings: tuple[str, ...]
    reasons: tuple[str, ...]
    warnings: tuple[str, ...]
    compile_seconds: float = field(default=0.0, compare=False)
    models: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    in_memory: tuple[str, ...] = field(default=(), repr=False, compare=False)
    """The names in the recipe that stand for objects, not for paths."""

    def __repr__(self) -> str:
        return result_line(
            "no suggestion" if self.method is None else f"suggestion of {self.method}",
            count_of(len(self.models), "model") if self.models else "",
            self.reasons[0] if self.reasons else "",
        )

    @never_fails
    def _repr_html_(self) -> str:
        lists = (
            ("Why", self.reasons),
            ("About the models", self.findings),
            ("Before you use it", self.warnings),
        )
        return result_html(
            "No recipe" if self.method is None else f"Suggested: {self.method}",
            *(f"{heading}: {' '.join(lines[:8])}" for heading, lines in lists if lines),
            code=None if self.recipe is None else _without_comments(self.recipe),
        )

    @ieee_arithmetic()
    def merge(self, *, threads: int | None = None) -> Any:
        """Merge by the suggested recipe, in memory.

        The result is a copy of the base's module, or of the first module among the models, with the merged
        weights; if no model is a module, a dict of tensors. Errors: AlnicoError if no model is left to merge;
        those of merging.
        """
        if self.recipe is None:
            raise AlnicoError(
                f"this suggestion has no recipe: {' '.join(self.reasons)} Its findings say why each model is "
                "left out."
            )
        recipe = yaml.safe_load(self.recipe)
        base = self.models.get(recipe["base_model"])
        merge = MemoryMerge(self.models, recipe, base, threads)
        return merge.state_dict() if template_of(self.models.values()) is None else merge.module()

    def data(self) -> dict[str, Any]:
        """All of it as plain data, for ``--json``."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in vars(self).items()
            if name not in ("models", "in_memory")
        }


def _without_comments(recipe: str) -> str:
    """Return a recipe without the comments at its head, which the reasons and warnings are."""
    return "\n".join(line for line in recipe.splitlines() if not line.startswith("#"))


def suggest_recipe(
    analysis: Analysis,
    fits: Sequence[Fit] = (),
    *,
    left_out: Sequence[str] = (),
    in_memory: Collection[str] = (),
) -> Suggestion:
    """Suggest a method, weights, scale and densities from distances, cosines and conflicts. Reads no files.

    ``fits`` has one entry per model, in order; without it all models are taken to fit. The recipe names the
    models as ``analysis`` does, so its paths are relative to the same folder. ``left_out`` are findings about
    models that were not analyzed. ``in_memory`` are the references that name objects.
    """
    evidence = _Evidence(analysis, fits or [Fit()] * len(analysis.models))
    evidence.findings += left_out
    models = evidence.without_duplicates(evidence.usable())
    if not models:
        return nothing_left(evidence.findings)
    choice = evidence.choose(models)
    used = [reference(m) for m in (analysis.base, *(analysis.models[i] for i in models))]
    objects = [name for name in used if name in in_memory]
    warnings = [*evidence.warnings, EVALUATE, *([_in_memory_note(objects)] if objects else [])]
    text = _recipe(analysis, evidence, models, choice, warnings)
    return Suggestion(
        choice.rule,
        choice.method,
        text,
        tuple(evidence.findings),
        tuple(choice.reasons),
        tuple(warnings),
        in_memory=tuple(objects),
    )


def nothing_left(findings: Sequence[str]) -> Suggestion:
    """Return the suggestion for when no model can be merged."""
    return Suggestion(None, None, None, tuple(findings), ("No model is left to merge.",), ())


def _in_memory_note(names: Sequence[str]) -> str:
    listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return (
        f"{listed} {'is' if len(names) == 1 else 'are'} in memory: alnico.suggest(models, base=base).merge() "
        "merges without files. For alnico.merge, save the models and put their paths into the recipe."
    )


EVALUATE = (
    "These numbers compare parameters, not abilities: evaluate the merge, and each model, on your tasks."
)


@dataclass(frozen=True)
class _Choice:
    rule: str
    method: str
    reasons: Sequence[str]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    per_model: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    with_base: bool = False


class _Evidence:
    """The quantities that the rules use, and the findings and warnings so far."""

    def __init__(self, analysis: Analysis, fits: Sequence[Fit]) -> None:
        self.analysis = analysis
        self.fits = fits
        self.names = [m.name for m in analysis.models]
        self.lengths = [0.0 if c is None else c.l2 for c in analysis.whole.changes]
        self.findings: list[str] = []
        self.warnings: list[str] = []

    def usable(self) -> list[int]:
        """Return the models that can be merged with this base."""
        usable = []
        for i, (name, fit) in enumerate(zip(self.names, self.fits, strict=True)):
            why = fit.refused or self._why_unusable(i)
            if why:
                self.findings.append(f"{name} is left out: {why}")
                continue
            usable.append(i)
            change = self.analysis.whole.changes[i]
            if change is not None and (change.relative_l2 or 0.0) >= FAR:
                self.findings.append(
                    f"{name} is far from the base: its task vector is {change.relative_l2:.0%} as long as "
                    "the base. Fine-tunes are at a few per cent; check that it was tuned from this base and "
                    "not trained much further."
                )
            if fit.note:
                self.findings.append(f"{name}: {fit.note}")
            skipped = [
                s for s in self.analysis.skipped if s.model in (name, self.analysis.models[i].reference)
            ]
            if skipped:
                some = ", ".join(s.tensor for s in skipped[:3]) + (
                    f" and {len(skipped) - 3} more" if len(skipped) > 3 else ""
                )
                self.findings.append(
                    f"{name}: {len(skipped)} tensor{'s' if len(skipped) > 1 else ''} could not be compared "
                    f"with the base's: {some}."
                )
        return usable

    def _why_unusable(self, model: int) -> str:
        change = self.analysis.whole.changes[model]
        if change is None:
            return (
                "it shares no tensor (name and shape) with the base: no method merges models of different kinds "
                "or sizes."
            )
        if change.l2 == 0:
            return f"it equals the base in all {change.elements:,} parameters that were compared."
        matrices = [
            c.relative_l2
            for t in self.analysis.tensors
            if (c := t.changes[model]) is not None
            and c.relative_l2 is not None
            and c.elements >= LARGE
            and sum(n > 1 for n in t.shape) > 1
        ]
        strange = sum(r >= ANOTHER_START for r in matrices)
        if len(matrices) >= LEAST_TENSORS and strange >= NEARLY_ALL * len(matrices):
            return (
                f"{strange} of its {len(matrices)} matrices are as far from the base's as independent ones "
                f"(its task vector is {change.relative_l2 or 0:.2f} times as long as the base); it was not "
                "tuned from this base. Name the base it was tuned from."
            )
        return ""

    def without_duplicates(self, models: Sequence[int]) -> list[int]:
        """Return the models, with only the first of those that are nearly equal."""
        distinct: list[int] = []
        for j in models:
            for i in distinct:
                pair = self.analysis.whole.pair(i, j)
                longer = max(self.lengths[i], self.lengths[j])
                if pair is not None and pair.distance <= NEAR_DUPLICATE * longer:
                    likeness = (
                        f"differs from {self.names[i]} by {pair.distance / longer:.1%} of their distance to "
                        "the base"
                        if pair.distance
                        else f"equals {self.names[i]}"
                    )
                    self.findings.append(
                        f"{self.names[j]} is left out: it {likeness}, so one model would count twice."
                    )
                    break
            else:
                distinct.append(j)
        return distinct

    def choose(self, models: Sequence[int]) -> _Choice:
        """Return the choice of the first rule of :data:`RULES` that holds."""
        if len(models) == 1:
            alone = (
                f"{self.names[models[0]]} is the only model to merge; the midpoint between it and the base "
                "keeps some of both (WiSE-FT)."
            )
            return _Choice("alone", "linear", [alone], with_base=True)
        groups = self.groups(models)
        if len(groups) == 1:
            return self._merge_one_task(models)
        reasons = [self._describe_cosines(models), *(self._describe_group(g) for g in groups if len(g) > 1)]
        weights = self._weights(models, groups, reasons)
        lost = self.analysis.whole.cancelled
        others = [n for i, n in enumerate(self.lengths) if i not in models]
        if lost is not None and lost <= APART and not any(others):
            reasons.append(
                f"Adding the task vectors cancels {lost:.1%} of their magnitude: the models changed "
                "different parameters, and each change can stay as it is."
            )
            return self._sum("apart", models, groups, weights, reasons, 1.0)
        conflict = self._conflict(models)
        share = min(self._share_in_matrices(i, with_tables=True) for i in models)
        if share >= IN_MATRICES:
            return self._whole_matrices(
                models, groups, weights, [*reasons, *([conflict] if conflict else [])]
            )
        reasons.append(
            f"Matrices hold only {share:.0%} of what a model changed, so methods over whole matrices are not suggested."
        )
        if conflict:
            return self._elect_signs(models, groups, weights, [*reasons, conflict])
        reasons.append("No pair conflicts more than independent task vectors do.")
        return self._sum("few matrices", models, groups, weights, reasons)

    def _share_in_matrices(self, model: int, *, with_tables: bool) -> float:
        """Return the share of the squares of a task vector in tensors that `tsv` takes as matrices."""
        whole = self.lengths[model] ** 2
        lengths = (
            change.l2
            for tensor in self.analysis.tensors
            if (change := tensor.changes[model]) is not None and _matrices_of(tensor, with_tables)
        )
        return min(sum(n**2 for n in lengths) / whole, 1.0) if whole else 1.0

    def _whole_matrices(
        self,
        models: Sequence[int],
        groups: Sequence[Sequence[int]],
        weights: Mapping[int, float],
        reasons: Sequence[str],
    ) -> _Choice:
        """Return tsv with its defaults, and warn of the time and memory that it takes for large matrices."""
        # Measured (docs/choosing.md): two runs of one task keep more with whole weights.
        sizes = {i: len(group) for group in groups for i in group}
        weights = {i: round(w * sizes[i], 4) for i, w in weights.items()}
        shared = {self._describe_group(group) for group in groups if len(group) > 1}
        notes = [
            *(
                r.replace("share a weight of 1", "keep their weights, as tsv makes models orthogonal")
                if r in shared
                else r
                for r in reasons
            ),
            "tsv makes the leading singular vectors of the models orthogonal to each other, matrix by matrix, and needs no "
            "scale. Nothing measured here keeps more of different tasks, except dc_merge, which is as good or slightly better "
            "on large matrices.",
        ]
        in_tables = max(
            self._share_in_matrices(i, with_tables=True) - self._share_in_matrices(i, with_tables=False)
            for i in models
        )
        if in_tables >= IN_TABLES:
            notes.append(
                f"Tables of tokens hold up to {in_tables:.0%} of what a model changed; tsv takes their mean. Score embeddings: matrix, "
                "too: it gained much in one measurement and lost as much in another."
            )
        if all(self.fits[i].is_adapter for i in models):
            notes.append(
                "All are LoRA adapters: their products B A are merged as whole matrices; the output is a whole model. "
                "`alnico lora combine --method tsv` makes an adapter of them."
            )
        if len(groups) == 2:
            notes.append("With two tasks it gains little: try task_arithmetic with a scale of 0.7, too.")
        notes.append("If you have held-out data, search scale from 0.6 to 1.2.")
        self.warnings.append(
            "On language models found in the wild (2511.21437), TSV gained nothing and task_arithmetic did: score both."
        )
        self.warnings += self._cost(len(models))
        return self._with_values("different tasks", "tsv", models, weights, notes)

    def _cost(self, models: int) -> list[str]:
        """Say how long a merge of whole matrices takes and what memory it needs, if that is much."""
        method = find("tsv").bind({}, models)
        assert isinstance(method, MatrixMethod)
        assert method.operations is not None
        operations, most = 0.0, 0
        for tensor in self.analysis.tensors:
            if any(tensor.changes) and (count := _matrices_of(tensor, with_tables=False)):
                _, rows, columns = stack_of(tensor.shape)
                operations += count * method.operations(rows, columns, models, *method.arguments)
                most = max(most, 8 * method.numbers(rows, columns, models, *method.arguments))
        seconds = operations / OPERATIONS_A_SECOND
        if seconds < LONG_SECONDS and most < MUCH_BYTES:
            return []
        time = f"{seconds / 3600:.1f} hours" if seconds >= 5400 else f"{max(seconds / 60, 1):.0f} minutes"
        return [
            f"Whole matrices take time: about {time} of one processor, and {format_size(most)} of memory for each processor "
            "that works; `alnico plan` says whether it fits. Processors share the matrices. A killed merge continues with "
            "the next matrix."
        ]

    def cosine(self, i: int, j: int) -> float:
        pair = self.analysis.whole.pair(i, j)
        return 0.0 if pair is None or pair.cosine is None else pair.cosine

    def groups(self, models: Sequence[int]) -> list[list[int]]:
        """Models linked by cosines of :data:`SAME_TASK` or more."""
        groups: list[list[int]] = []
        for j in models:
            linked = [g for g in groups if any(self.cosine(i, j) >= SAME_TASK for i in g)]
            groups = [g for g in groups if g not in linked] + [[*(i for g in linked for i in g), j]]
        return sorted(sorted(g) for g in groups)

    def _merge_one_task(self, models: Sequence[int]) -> _Choice:
        k = len(models)
        mean = sum(self.cosine(i, j) for i, j in combinations(models, 2)) / (k * (k - 1) / 2)
        share = k * mean / (1 + (k - 1) * mean)
        reasons = [
            f"The task vectors have a mean cosine of {mean:.2f}: the same or very similar tasks, learned "
            "from one base."
        ]
        if share >= AVERAGE:
            reasons.append(
                f"Their common part is {share:.0%} of their mean, so the plain mean loses almost nothing."
            )
            return _Choice("same task, one direction", "linear", reasons)
        reasons.append(
            f"Their common part is {share:.0%} of their mean; model_stock goes that share of the way to the "
            "mean, tensor by tensor."
        )
        return _Choice("same task", "model_stock", reasons)

    def _describe_cosines(self, models: Sequence[int]) -> str:
        cosines = {pair: self.cosine(*pair) for pair in combinations(models, 2)}
        (a, least), (b, most) = (
            min(cosines.items(), key=lambda x: x[1]),
            max(cosines.items(), key=lambda x: x[1]),
        )
        if len(cosines) == 1:
            return f"The task vectors have a cosine of {least:.2f}: different tasks."
        return (
            f"The cosines of the task vectors are between {least:.2f} ({self._pair_names(a)}) and {most:.2f} "
            f"({self._pair_names(b)}): different tasks."
        )

    def _pair_names(self, pair: tuple[int, int]) -> str:
        return f"{self.names[pair[0]]}, {self.names[pair[1]]}"

    def _describe_group(self, group: Sequence[int]) -> str:
        return f"{', '.join(self.names[i] for i in group)} learned almost the same and share a weight of 1."

    def _weights(
        self, models: Sequence[int], groups: Sequence[Sequence[int]], reasons: list[str]
    ) -> dict[int, float]:
        weights = {i: 1 / len(g) for g in groups for i in g}
        lengths = sorted(self.lengths[i] for i in models)
        if lengths[-1] >= UNEQUAL * lengths[0]:
            middle = lengths[(len(lengths) - 1) // 2]
            long = [i for i in models if self.lengths[i] > middle]
            weights |= {i: weights[i] * middle / self.lengths[i] for i in long}
            reasons.append(
                f"The longest task vector is {lengths[-1] / lengths[0]:.1f} times as long as the shortest "
                f"and would dominate: the weight of {', '.join(self.names[i] for i in long)} is reduced to "
                "match the length of the median one."
            )
        return {i: round(w, 4) for i, w in weights.items()}

    def _conflict(self, models: Sequence[int]) -> str:
        pairs = [p for i, j in combinations(models, 2) if (p := self.analysis.whole.pair(i, j)) is not None]
        opposed = [p for p in pairs if p.cosine is not None and p.cosine <= OPPOSED]
        if opposed:
            worst = min(opposed, key=lambda p: p.cosine or 0.0)
            return f"{self._pair_names(worst.models)} oppose each other: cosine {worst.cosine:.2f}."
        contested = [p for p in pairs if self._is_contested(p)]
        if contested:
            worst = max(contested, key=lambda p: p.top_overlap or 0.0)
            return (
                f"{self._pair_names(worst.models)} share {worst.top_overlap:.0%} of their top parameters (by "
                f"chance {self.analysis.top_share:.0%}), {worst.top_sign_conflict:.0%} of them with opposite "
                "signs."
            )
        return ""

    def _is_contested(self, pair: Pair) -> bool:
        overlap, signs = pair.top_overlap, pair.top_sign_conflict
        return (
            overlap is not None
            and signs is not None
            and overlap >= min(CROWDED * self.analysis.top_share, 1.0)
            and signs >= CONTESTED
        )

    def _elect_signs(
        self,
        models: Sequence[int],
        groups: Sequence[Sequence[int]],
        weights: Mapping[int, float],
        reasons: Sequence[str],
    ) -> _Choice:
        changes = {i: self.analysis.whole.changes[i] for i in models}
        sparsities = {i: 0.0 if c is None else c.effective_sparsity or 0.0 for i, c in changes.items()}
        deviation = max(0.0 if c is None else c.std for c in changes.values())
        low, high = DENSITIES
        shown = ", ".join(f"{self.names[i]} {s:.2f}" for i, s in sparsities.items())
        caution = (
            "Compare with task_arithmetic: on models found in the wild it gains more reliably than methods that "
            "elect signs."
        )
        if max(sparsities.values()) < STANDING_OUT and deviation <= SMALL:
            density = round(min(max(1 / len(groups), low), high), 2)
            reason = (
                f"No entries stand out (effective sparsity {shown}), so a random share of {density:g} of "
                "each is kept: about one task per parameter. Then the sign with more weight wins."
            )
            return self._with_values(
                "conflict, no entry stands out",
                "dare_ties",
                models,
                weights,
                [*reasons, reason, caution],
                density=density,
            )
        densities = {i: round(min(max(1 - s, low), high), 2) for i, s in sparsities.items()}
        reason = (
            f"Few entries hold most of the task vectors (effective sparsity {shown}): the largest of each are "
            "kept. Then the sign with more weight wins."
        )
        if max(sparsities.values()) < STANDING_OUT:
            reason = (
                f"No entries stand out (effective sparsity {shown}), but their standard deviation is "
                f"{deviation:.2g}, too large for a random drop: the largest are kept. Then the sign with "
                "more weight wins."
            )
        return self._with_values(
            "conflict, few entries hold it", "ties", models, weights, [*reasons, reason, caution], densities
        )

    def _with_values(
        self,
        rule: str,
        method: str,
        models: Sequence[int],
        weights: Mapping[int, float],
        reasons: Sequence[str],
        densities: Mapping[int, float] | None = None,
        **parameters: float,
    ) -> _Choice:
        """Return a choice: values that all models have in common at the top, others under the models."""
        per_model: dict[int, dict[str, float]] = {i: {} for i in models}
        for name, values in (("weight", weights), ("density", densities)):
            if not values:
                continue
            if len(set(values.values())) > 1:
                for i in models:
                    per_model[i][name] = values[i]
            elif name != "weight" or values[models[0]] != 1:
                parameters[name] = values[models[0]]
        return _Choice(rule, method, reasons, parameters, per_model)

    def _sum(
        self,
        rule: str,
        models: Sequence[int],
        groups: Sequence[Sequence[int]],
        weights: Mapping[int, float],
        notes: Sequence[str],
        scale: float | None = None,
    ) -> _Choice:
        """Return task arithmetic, by default with the merge as far from the base as one model."""
        k = len(groups)
        reasons = list(notes)
        if scale is None:
            scale = self._scale(groups, weights)
            origin = "the merge is as far from the base as one model on average"
            if k > MANY:
                scale = math.sqrt(scale / k)
                origin = f"between 1/{k} and the scale at which {origin}, like tuned scales of many tasks"
            scale = round(scale, 2)
            reasons.append(
                f"scale {scale:g}: {origin}. Search {1 / k:.2f} to {k**-0.5:.2f} on held-out data."
            )
        chosen = self._with_values(rule, "task_arithmetic", models, weights, reasons)
        return _Choice(rule, chosen.method, reasons, {**chosen.parameters, "scale": scale}, chosen.per_model)

    def _scale(self, groups: Sequence[Sequence[int]], weights: Mapping[int, float]) -> float:
        """Return the length of one task vector over that of the weighted sum; at most 1/sqrt(k).

        The length of one is the root mean square of the weighted lengths; k task vectors at right angles have
        1/sqrt(k).
        """
        pull = {i: weights[i] * self.lengths[i] for group in groups for i in group}
        squares = [(pull[i] * len(group)) ** 2 for group in groups for i in group]
        summed = sum(pull[i] * pull[j] * (1.0 if i == j else self.cosine(i, j)) for i in pull for j in pull)
        right_angles = 1 / math.sqrt(len(groups))
        return (
            min(math.sqrt(sum(squares) / len(squares) / summed), right_angles) if summed > 0 else right_angles
        )


def _matrices_of(tensor: TensorScope, with_tables: bool) -> int:
    """Return how many matrices `tsv` takes a tensor for; 0 if it merges it as others."""
    method = find("tsv").bind({"embeddings": "matrix" if with_tables else "others"}, 2)
    assert isinstance(method, MatrixMethod)
    return 0 if why_no_matrix(tensor.name, tensor.shape, method) else stack_of(tensor.shape)[0]


def _recipe(
    analysis: Analysis, evidence: _Evidence, models: Sequence[int], choice: _Choice, warnings: Sequence[str]
) -> str:
    comments = ["Suggested by alnico.", *evidence.findings, *choice.reasons, *warnings]
    lines = [
        line
        for text in comments
        for line in textwrap.wrap(visible(text), 110, initial_indent="# ", subsequent_indent="#   ")
    ]
    lines += [_key("merge_method", choice.method), _key("base_model", reference(analysis.base))]
    lines.append("models:")
    if choice.with_base:
        lines.append(f"  - {_key('model', reference(analysis.base))}")
    for i in models:
        change = analysis.whole.changes[i]
        far = (
            f"  # changed by {change.relative_l2:.2%}"
            if change is not None and change.relative_l2 is not None
            else ""
        )
        lines.append(f"  - {_key('model', reference(analysis.models[i]))}{far}")
        if choice.per_model.get(i):
            lines.append(f"    {_key('parameters', choice.per_model[i])}")
    if choice.parameters:
        lines.append(_key("parameters", choice.parameters))
    return (
        "\n".join(
            [
                *lines,
                *(_key(name, value) for name, value in _keys(evidence.fits[i].keys for i in models).items()),
            ]
        )
        + "\n"
    )


def _key(name: str, value: Any) -> str:
    plain = dict(value) if isinstance(value, Mapping) else value
    text = yaml.safe_dump(plain, default_flow_style=True, sort_keys=False, width=math.inf, allow_unicode=True)
    return f"{name}: " + text.removesuffix("...\n").rstrip()


def _keys(every_keys: Any) -> dict[str, Any]:
    """Combine the keys of all models: all their rules, and all tokens if one model needs them."""
    keys: dict[str, Any] = {}
    for recipe_keys in every_keys:
        for name, value in recipe_keys.items():
            if name == "methods":
                keys[name] = [
                    *keys.get(name, []),
                    *(rule for rule in value if rule not in keys.get(name, [])),
                ]
            else:
                keys[name] = value
    if "tokenizer_source" in keys:
        keys.pop("tokenizer", None)
    return keys


def reference(model: AnalysedModel) -> str:
    """Return how a recipe names a model: on the hub, with the commit that was analyzed."""
    pinned = model.commit is not None and not {"@", "+"} & set(model.reference)
    return f"{model.reference}@{model.commit}" if pinned else model.reference
