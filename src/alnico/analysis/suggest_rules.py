"""A recipe to begin with, from what an analysis found, with its reasons: the rules of docs/choosing.md."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import yaml

from alnico.analysis.results import AnalysedModel, Analysis, Pair
from alnico.engine.relatedness import LARGE, LEAST_TENSORS, NEAR_DUPLICATE, NEARLY_ALL
from alnico.errors import visible

ANOTHER_START = 0.99
"""Relative change of a matrix from which it has nothing to do with the base's. Independent ones are at least at 1, whatever their
lengths: |model - base|^2 = |model|^2 + |base|^2; a cosine of 0.1, the bound of the judge before a merge, is 0.995 at least."""

FAR = 0.5
"""Relative change of a whole model from which it is worth a word: fine-tunes lie at some per cent."""

SAME_TASK = 0.6
"""Cosine of two task vectors from which they are taken for one task learned twice. Measured (docs/choosing.md): 0.91 at least between
runs of one task, 0.31 at most between different ones, of which Model Stock then keeps a third of what the mean does."""

AVERAGE = 0.9
"""Model Stock's way from the base to the mean from which it says no more than the mean itself."""

OPPOSED = -0.1
"""Cosine of two task vectors from which on downwards they pull against one another."""

CROWDED = 2.0
"""How many times more often than by chance two models may have the same top parameters before these count as contested."""

CONTESTED = 0.4
"""Share of opposite signs among the top parameters that both have, from which they count as contested; by chance it is 0.5."""

APART = 0.1
"""Share of all magnitude that adding up loses, up to which models have changed different parameters."""

UNEQUAL = 3.0
"""Times by which the longest task vector is longer than the shortest, from which the long ones are weighted down."""

MANY = 4
"""Models of different tasks above which the scale is taken smaller than the distance says: tuned ones are."""

DENSITIES = (0.2, 0.5)
"""Least and largest share that ties is told to keep: the paper's, and that of mergekit's examples."""

STANDING_OUT = 0.5
"""Effective sparsity from which few entries hold most of a task vector, so that trimming by magnitude keeps it; 0.36 is a normal
distribution's, where none stands out."""

SMALL = 0.005
"""Standard deviation of a task vector's entries up to which dropping some at random and enlarging the others was found to work."""


@dataclass(frozen=True)
class SuggestRule:
    """One of :data:`RULES`: when it goes, what it suggests, what speaks for it and what against."""

    name: str
    when: str
    then: str
    evidence: str


RULES = (
    SuggestRule(
        "alone",
        "one model is left",
        "`linear` of the base and the model, half of each",
        "Half way keeps much of the base where the data shift (WiSE-FT, 2109.01903). It is no merge of skills.",
    ),
    SuggestRule(
        "same task, one direction",
        f"all cosines are linked at {SAME_TASK:g} or more, and k c / (1 + (k - 1) c) with the mean cosine c is at least {AVERAGE:g}",
        "`linear`, the uniform soup",
        "72 CLIP fine-tunes on ImageNet: uniform soup 80.0 %, greedy soup, which needs labels, 81.0 (2203.05482).",
    ),
    SuggestRule(
        "same task",
        f"all cosines are linked at {SAME_TASK:g} or more, and that share is below {AVERAGE:g}",
        "`model_stock`, which goes that share of the way from the base to the mean",
        "Two CLIP fine-tunes of one task: 87.8 % on ImageNet without anything to tune (2403.19522). "
        "Of different tasks it stays near the base, and on language models found in the wild it gained nothing (2511.21437).",
    ),
    SuggestRule(
        "adapters",
        "all models are the base with a LoRA adapter, of several tasks",
        "`task_arithmetic` at the scale of the distance",
        "Sums the products B A exactly; merging A and B apart adds cross terms. Of Qwen-14B adapters task arithmetic came to 54.7 and "
        "DARE with TIES to 54.6. Methods in the adapters' common space (2410.19735, 2509.17786) report more; alnico has none yet.",
    ),
    SuggestRule(
        "conflict, few entries hold it",
        f"several tasks, and two models are opposed (cosine {OPPOSED:g} or less) or contest the same top parameters (shared {CROWDED:g} "
        f"times as often as by chance, {CONTESTED:.0%} or more of them with opposite signs); effective sparsity {STANDING_OUT:g} or more, or "
        f"entries that deviate by more than {SMALL:g}",
        f"`ties`, density 1 - effective sparsity of each model, within {DENSITIES[0]:g} to {DENSITIES[1]:g}",
        "8 CLIP tasks: 75.1 against 70.8 of task arithmetic, both tuned (2306.01708, its successors' tables). Against: 8 GLUE tasks 54.9 "
        "against 58.5; on language models found in the wild no gain (2511.21437).",
    ),
    SuggestRule(
        "conflict, no entry stands out",
        f"the same conflict; effective sparsity below {STANDING_OUT:g}, and entries that deviate by at most {SMALL:g}",
        f"`dare_ties`, density 1/k for k tasks, within {DENSITIES[0]:g} to {DENSITIES[1]:g}",
        "A language, a mathematics and a code model of 13 B: 87.2 % of the experts, TIES 82.6, task arithmetic 80.4 (2311.03099, its "
        "successors' tables). It fails where changes are large; in the wild no gain (2511.21437).",
    ),
    SuggestRule(
        "apart",
        f"several tasks, and adding up loses at most {APART:g} of all magnitude",
        "`task_arithmetic`, scale 1",
        "Where regions do not overlap, putting all in place keeps each as it was trained (2408.13656).",
    ),
    SuggestRule(
        "different tasks",
        "several tasks, and none of the above; also in doubt",
        "`task_arithmetic` at the scale of the distance",
        "On language models found in the wild the only method that gained reliably over the base, with a tuned scale (2511.21437). Tuned "
        "scales: 0.2 to 0.3 for 8 tasks, 0.1 for 14 and 20 (2212.04089, 2405.07813).",
    ),
)
"""In the order in which they are asked; the first that holds is taken."""


@dataclass(frozen=True)
class Fit:
    """What headers and vocabularies say of a model and its base.

    ``keys`` of the recipe make them fit, ``found`` says why they are needed; ``refused`` why nothing does. See ``analysis.fit``.
    """

    is_adapter: bool = False
    keys: Mapping[str, Any] = field(default_factory=dict)
    found: str = ""
    refused: str = ""


@dataclass(frozen=True)
class Suggestion:
    """A recipe to begin with.

    ``rule`` is the name of one of :data:`RULES`; it, ``method`` and ``recipe`` are None where no model is left to merge. ``recipe`` is
    YAML, with all the rest as comments. ``findings`` are about models and pairs, ``reasons`` about the method and its values,
    ``warnings`` about what to check.
    """

    rule: str | None
    method: str | None
    recipe: str | None
    findings: tuple[str, ...]
    reasons: tuple[str, ...]
    warnings: tuple[str, ...]

    def data(self) -> dict[str, Any]:
        """All of it as plain data, for ``--json``."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()
        }


def suggest_recipe(
    analysis: Analysis, fits: Sequence[Fit] = (), *, left_out: Sequence[str] = ()
) -> Suggestion:
    """Suggest a recipe: methods, weights, scale and densities from distances, cosines and conflicts. Pure, and quick.

    ``fits`` are those of the models, in their order; without them all models are taken to fit. The recipe names the models as
    ``analysis`` does: its paths hold from where those do. ``left_out`` is said of models that were not analysed.
    """
    found = _Evidence(analysis, fits or [Fit()] * len(analysis.models))
    found.said += left_out
    kept = found.without_duplicates(found.usable())
    if not kept:
        return nothing_left(found.said)
    choice = found.choice(kept)
    warnings = [*found.warnings, EVALUATE]
    text = _recipe(analysis, found, kept, choice, warnings)
    return Suggestion(
        choice.rule, choice.method, text, tuple(found.said), tuple(choice.reasons), tuple(warnings)
    )


def nothing_left(findings: Sequence[str]) -> Suggestion:
    """What is suggested where no model can be merged."""
    return Suggestion(None, None, None, tuple(findings), ("No model is left to merge.",), ())


EVALUATE = "These numbers say how parameters lie to one another, not what the models can do: evaluate the merge, and each model, on your tasks."


@dataclass(frozen=True)
class _Choice:
    rule: str
    method: str
    reasons: Sequence[str]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    per_model: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    with_base: bool = False


class _Evidence:
    """What the rules ask of an analysis, and what was said on the way."""

    def __init__(self, analysis: Analysis, fits: Sequence[Fit]) -> None:
        self.analysis = analysis
        self.fits = fits
        self.names = [m.name for m in analysis.models]
        self.lengths = [0.0 if c is None else c.l2 for c in analysis.whole.changes]
        self.said: list[str] = []
        self.warnings: list[str] = []

    def usable(self) -> list[int]:
        """The models that can be merged with this base."""
        kept = []
        for i, (name, fit) in enumerate(zip(self.names, self.fits, strict=True)):
            why = fit.refused or self._refused(i)
            if why:
                self.said.append(f"{name} is left out: {why}")
                continue
            kept.append(i)
            change = self.analysis.whole.changes[i]
            if change is not None and (change.relative_l2 or 0.0) >= FAR:
                self.said.append(
                    f"{name} is far from the base: its task vector is {change.relative_l2:.0%} as long as the base. Fine-tunes lie at "
                    "some per cent; check that it was tuned from this base and not trained on for long."
                )
            if fit.found:
                self.said.append(f"{name}: {fit.found}")
            skipped = [
                s for s in self.analysis.skipped if s.model in (name, self.analysis.models[i].reference)
            ]
            if skipped:
                some = ", ".join(s.tensor for s in skipped[:3]) + (
                    f" and {len(skipped) - 3} more" if len(skipped) > 3 else ""
                )
                self.said.append(
                    f"{name}: {len(skipped)} tensor{'s' if len(skipped) > 1 else ''} could not be compared with the base's: {some}."
                )
        return kept

    def _refused(self, model: int) -> str:
        change = self.analysis.whole.changes[model]
        if change is None:
            return "it has no tensor of the name and shape of one of the base: another kind or size of model, which no method merges."
        if change.l2 == 0:
            return f"it equals the base in all {change.elements} parameters that were compared."
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
                f"{strange} of its {len(matrices)} matrices are as far from the base's as independent ones (its task vector is "
                f"{change.relative_l2 or 0:.2f} times as long as the base); it was not tuned from this base. Give the base it was tuned from."
            )
        return ""

    def without_duplicates(self, models: Sequence[int]) -> list[int]:
        """The models, and of those that are nearly one only the first."""
        kept: list[int] = []
        for j in models:
            for i in kept:
                pair = self.analysis.whole.pair(i, j)
                longer = max(self.lengths[i], self.lengths[j])
                if pair is not None and pair.distance <= NEAR_DUPLICATE * longer:
                    apart = (
                        f"{pair.distance / longer:.1%} of their way from the base apart"
                        if pair.distance
                        else "equal"
                    )
                    self.said.append(
                        f"{self.names[j]} is left out: it and {self.names[i]} are {apart}, and would count twice."
                    )
                    break
            else:
                kept.append(j)
        return kept

    def choice(self, kept: Sequence[int]) -> _Choice:
        """The first rule of :data:`RULES` that holds."""
        if len(kept) == 1:
            alone = f"{self.names[kept[0]]} is the only model to merge; half way between it and the base keeps some of both (WiSE-FT)."
            return _Choice("alone", "linear", [alone], with_base=True)
        groups = self.groups(kept)
        if len(groups) == 1:
            return self._of_one_task(kept)
        said = [self._kinship(kept), *(self._alike(g) for g in groups if len(g) > 1)]
        weights = self._weights(kept, groups, said)
        if all(self.fits[i].is_adapter for i in kept):
            said.append(
                "All are LoRA adapters: their products B A are added up exactly, before one rounding; the output is a whole model."
            )
            return self._sum("adapters", kept, groups, weights, said)
        conflict = self._conflict(kept)
        if conflict:
            return self._elected(kept, groups, weights, [*said, conflict])
        lost = self.analysis.whole.cancelled
        others = [n for i, n in enumerate(self.lengths) if i not in kept]
        if lost is not None and lost <= APART and not any(others):
            said.append(
                f"Adding them up loses {lost:.1%} of all magnitude: they changed different parameters, and each can stay as it is."
            )
            return self._sum("apart", kept, groups, weights, said, 1.0)
        said.append(
            "No pair conflicts more than independent task vectors do. In doubt task arithmetic: in the wild it gains most reliably."
        )
        return self._sum("different tasks", kept, groups, weights, said)

    def cosine(self, i: int, j: int) -> float:
        pair = self.analysis.whole.pair(i, j)
        return 0.0 if pair is None or pair.cosine is None else pair.cosine

    def groups(self, kept: Sequence[int]) -> list[list[int]]:
        """Models linked by cosines of :data:`SAME_TASK` or more."""
        groups: list[list[int]] = []
        for j in kept:
            linked = [g for g in groups if any(self.cosine(i, j) >= SAME_TASK for i in g)]
            groups = [g for g in groups if g not in linked] + [[*(i for g in linked for i in g), j]]
        return sorted(sorted(g) for g in groups)

    def _of_one_task(self, kept: Sequence[int]) -> _Choice:
        k = len(kept)
        mean = sum(self.cosine(i, j) for i, j in combinations(kept, 2)) / (k * (k - 1) / 2)
        way = k * mean / (1 + (k - 1) * mean)
        said = [
            f"The task vectors have a mean cosine of {mean:.2f}: the same or very similar tasks, learned from one base."
        ]
        if way >= AVERAGE:
            said.append(
                f"What they share is {way:.0%} of their mean, so the plain mean loses next to nothing by what they do not."
            )
            return _Choice("same task, one direction", "linear", said)
        said.append(
            f"What they share is {way:.0%} of the way to their mean; model_stock goes that far, tensor by tensor."
        )
        return _Choice("same task", "model_stock", said)

    def _kinship(self, kept: Sequence[int]) -> str:
        cosines = {pair: self.cosine(*pair) for pair in combinations(kept, 2)}
        (a, least), (b, most) = (
            min(cosines.items(), key=lambda x: x[1]),
            max(cosines.items(), key=lambda x: x[1]),
        )
        if len(cosines) == 1:
            return f"The task vectors have a cosine of {least:.2f}: different tasks."
        return f"The cosines of the task vectors lie between {least:.2f} ({self._both(a)}) and {most:.2f} ({self._both(b)}): different tasks."

    def _both(self, pair: tuple[int, int]) -> str:
        return f"{self.names[pair[0]]}, {self.names[pair[1]]}"

    def _alike(self, group: Sequence[int]) -> str:
        return f"{', '.join(self.names[i] for i in group)} learned much the same and share one weight of 1."

    def _weights(
        self, kept: Sequence[int], groups: Sequence[Sequence[int]], said: list[str]
    ) -> dict[int, float]:
        weights = {i: 1 / len(g) for g in groups for i in g}
        lengths = sorted(self.lengths[i] for i in kept)
        if lengths[-1] >= UNEQUAL * lengths[0]:
            middle = lengths[(len(lengths) - 1) // 2]
            long = [i for i in kept if self.lengths[i] > middle]
            weights |= {i: weights[i] * middle / self.lengths[i] for i in long}
            said.append(
                f"The longest task vector is {lengths[-1] / lengths[0]:.1f} times the shortest and would drown the others: "
                f"{', '.join(self.names[i] for i in long)} is weighted down to the length of the middle one."
            )
        return {i: round(w, 4) for i, w in weights.items()}

    def _conflict(self, kept: Sequence[int]) -> str:
        pairs = [p for i, j in combinations(kept, 2) if (p := self.analysis.whole.pair(i, j)) is not None]
        opposed = [p for p in pairs if p.cosine is not None and p.cosine <= OPPOSED]
        if opposed:
            worst = min(opposed, key=lambda p: p.cosine or 0.0)
            return f"{self._both(worst.models)} pull against one another: cosine {worst.cosine:.2f}."
        contested = [p for p in pairs if self._contests(p)]
        if contested:
            worst = max(contested, key=lambda p: p.top_overlap or 0.0)
            return (
                f"{self._both(worst.models)} share {worst.top_overlap:.0%} of their top parameters (by chance {self.analysis.top_share:.0%}), "
                f"{worst.top_sign_conflict:.0%} of them with opposite signs."
            )
        return ""

    def _contests(self, pair: Pair) -> bool:
        overlap, signs = pair.top_overlap, pair.top_sign_conflict
        return (
            overlap is not None
            and signs is not None
            and overlap >= min(CROWDED * self.analysis.top_share, 1.0)
            and signs >= CONTESTED
        )

    def _elected(
        self,
        kept: Sequence[int],
        groups: Sequence[Sequence[int]],
        weights: Mapping[int, float],
        said: Sequence[str],
    ) -> _Choice:
        changes = {i: self.analysis.whole.changes[i] for i in kept}
        sparsities = {i: 0.0 if c is None else c.effective_sparsity or 0.0 for i, c in changes.items()}
        deviation = max(0.0 if c is None else c.std for c in changes.values())
        low, high = DENSITIES
        shown = ", ".join(f"{self.names[i]} {s:.2f}" for i, s in sparsities.items())
        doubt = (
            "Compare with task_arithmetic: in the wild it gains more reliably than methods that elect signs."
        )
        if max(sparsities.values()) < STANDING_OUT and deviation <= SMALL:
            density = round(min(max(1 / len(groups), low), high), 2)
            reason = (
                f"No entries stand out (effective sparsity {shown}), so a random share of {density:g} of each is kept: about one task a "
                "parameter, then the sign with more weight."
            )
            return self._weighted(
                "conflict, no entry stands out",
                "dare_ties",
                kept,
                weights,
                [*said, reason, doubt],
                density=density,
            )
        densities = {i: round(min(max(1 - s, low), high), 2) for i, s in sparsities.items()}
        reason = f"Few entries hold most of the task vectors (effective sparsity {shown}): the largest of each are kept, then the sign with more weight."
        if max(sparsities.values()) < STANDING_OUT:
            reason = (
                f"No entries stand out (effective sparsity {shown}), but they deviate by {deviation:.2g}, too much for a random drop: the "
                "largest are kept, then the sign with more weight."
            )
        return self._weighted(
            "conflict, few entries hold it", "ties", kept, weights, [*said, reason, doubt], densities
        )

    def _weighted(
        self,
        rule: str,
        method: str,
        kept: Sequence[int],
        weights: Mapping[int, float],
        said: Sequence[str],
        densities: Mapping[int, float] | None = None,
        **parameters: float,
    ) -> _Choice:
        """A choice whose values stand at the top where all models have the same, and under the models where not."""
        per_model: dict[int, dict[str, float]] = {i: {} for i in kept}
        for name, values in (("weight", weights), ("density", densities)):
            if not values:
                continue
            if len(set(values.values())) > 1:
                for i in kept:
                    per_model[i][name] = values[i]
            elif name != "weight" or values[kept[0]] != 1:
                parameters[name] = values[kept[0]]
        return _Choice(rule, method, said, parameters, per_model)

    def _sum(
        self,
        rule: str,
        kept: Sequence[int],
        groups: Sequence[Sequence[int]],
        weights: Mapping[int, float],
        said: Sequence[str],
        scale: float | None = None,
    ) -> _Choice:
        """Task arithmetic, by default at the scale of the distance: the merge as far from the base as one model."""
        k = len(groups)
        reasons = list(said)
        if scale is None:
            scale = self._scale(groups, weights)
            whence = "the merge is as far from the base as one model on the average"
            if k > MANY:
                scale = math.sqrt(scale / k)
                whence = f"between 1/{k} and where {whence}, as tuned scales of many tasks are"
            scale = round(scale, 2)
            reasons.append(
                f"scale {scale:g}: {whence}. Search {1 / k:.2f} to {k**-0.5:.2f} on held-out data."
            )
        chosen = self._weighted(rule, "task_arithmetic", kept, weights, reasons)
        return _Choice(rule, chosen.method, reasons, {**chosen.parameters, "scale": scale}, chosen.per_model)

    def _scale(self, groups: Sequence[Sequence[int]], weights: Mapping[int, float]) -> float:
        """Length of one task vector (the root mean square, of those weighted down what is left) over that of the weighted sum; at
        most 1/sqrt(k), which is that of k at right angles."""
        pull = {i: weights[i] * self.lengths[i] for group in groups for i in group}
        squares = [(pull[i] * len(group)) ** 2 for group in groups for i in group]
        summed = sum(pull[i] * pull[j] * (1.0 if i == j else self.cosine(i, j)) for i in pull for j in pull)
        right_angles = 1 / math.sqrt(len(groups))
        return (
            min(math.sqrt(sum(squares) / len(squares) / summed), right_angles) if summed > 0 else right_angles
        )


def _recipe(
    analysis: Analysis, found: _Evidence, kept: Sequence[int], choice: _Choice, warnings: Sequence[str]
) -> str:
    said = ["Suggested by alnico.", *found.said, *choice.reasons, *warnings]
    lines = [
        line
        for text in said
        for line in textwrap.wrap(visible(text), 110, initial_indent="# ", subsequent_indent="#   ")
    ]
    lines += [_key("merge_method", choice.method), _key("base_model", reference(analysis.base))]
    lines.append("models:")
    if choice.with_base:
        lines.append(f"  - {_key('model', reference(analysis.base))}")
    for i in kept:
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
            [*lines, *(_key(name, value) for name, value in _keys(found.fits[i].keys for i in kept).items())]
        )
        + "\n"
    )


def _key(name: str, value: Any) -> str:
    plain = dict(value) if isinstance(value, Mapping) else value
    text = yaml.safe_dump(plain, default_flow_style=True, sort_keys=False, width=math.inf, allow_unicode=True)
    return f"{name}: " + text.removesuffix("...\n").rstrip()


def _keys(asked: Any) -> dict[str, Any]:
    """The keys of all models in one recipe: the rules of all, and the vocabulary of all tokens where one model asks for it."""
    keys: dict[str, Any] = {}
    for one in asked:
        for name, value in one.items():
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
    """What a recipe calls a model: on the hub, with the commit that was looked at."""
    pinned = model.commit is not None and not {"@", "+"} & set(model.reference)
    return f"{model.reference}@{model.commit}" if pinned else model.reference
