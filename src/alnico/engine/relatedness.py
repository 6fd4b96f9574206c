"""Checks by sampled tensors, before a merge, that the models were tuned from one base.

A merge works only if parameters have the same meaning in all models, as in models tuned from one base.
Tensors of such models are nearly parallel. Those of models trained from different starts are nearly
orthogonal, and so are those of a model whose neurons were permuted. A sample of the large tensors shows the
difference without reading the models.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal

import numpy as np

from alnico.checkpoint.source import Source, Tensor
from alnico.errors import MismatchError
from alnico.numerics.dtypes import DTYPES, MERGEABLE, decode
from alnico.plan.job import Plan

Relation = Literal["equal", "tuned", "far", "unrelated"]

TENSORS = 32
"""Most tensors that are sampled before a merge, spread over the model."""

PAIRS_AT_ONCE = 64
"""Differences of samples that are in memory at once."""

SAMPLE = 16_384
"""Elements that are sampled from the middle of a tensor: 64 KiB of float32."""

LARGE = 4_096
"""Fewest elements of a tensor whose cosine is significant: 0.1 is then six standard deviations of the cosine
of independent tensors."""

LEAST_TENSORS = 4
"""Models with fewer large tensors are not judged, except networks in memory (:data:`SMALL`)."""

SMALL = 64
"""Fewest elements of a sampled matrix, for networks in memory with fewer large ones."""

LEAST_ELEMENTS = 4_096
"""Fewest elements of all these matrices together, two at least, to be judged: networks of 784, 128 and 10
units have more."""

DEVIATIONS = 3.0
"""Standard deviations of the cosine of independent matrices, 1/sqrt(elements), within which a small matrix is
uncorrelated."""

UNCORRELATED = 0.1
"""Cosine below which two tensors are uncorrelated. Measured (docs/decisions/0005): 0.05 at most between
Llamas trained from different seeds on the same text; 0.88 at least after as many steps of training again as
the model had; 0.9996 at least between all-MiniLM-L6-v2 and its fine-tune."""

NEARLY_ALL = 0.9
"""Share of the large tensors that are uncorrelated in models of different origin. A new embedding, a new head
or unmerged adapters do not change the other tensors."""

FAR = 0.7
"""Cosine of the whole sample below which a model is far from the other: it was trained much further."""

LENGTHS = (2 / 3, 3 / 2)
"""Usual lengths of a model relative to the other; outside of them, it was scaled."""

NEAR_DUPLICATE = 0.1
"""Two task vectors that differ by less than this share of their length are near duplicates."""


@dataclass(frozen=True)
class Caller:
    """The words in which a caller allows unrelated models, and whether it also judges small networks."""

    allow: str
    judges_small: bool = False
    report: str = ""
    """Advice on how to see the distances between models."""


IN_A_RECIPE = Caller(
    "say unrelated: allow in the recipe", report=" (`alnico analyze` shows how far each is from it)"
)
IN_PYTHON = Caller('pass unrelated="allow"', judges_small=True)
PYTHON_OR_COMMAND = Caller(
    'pass unrelated="allow" (--unrelated allow on the command line)',
    report=" (`alnico analyze` shows how far each is from it)",
)


@dataclass(frozen=True)
class Likeness:
    """How similar a model is to another, by sampled tensors: ``change`` is |model - other| / |other|.

    ``elements_differ`` counts what is not equal; ``cosines`` are those of the large tensors.
    """

    model: str
    other: str
    tensors: int
    elements_differ: int
    change: float
    cosine: float
    length: float
    """|model| / |other|"""
    cosines: Mapping[str, float] = field(repr=False)
    sizes: Mapping[str, int] = field(repr=False)
    """Sampled elements of the tensors with a cosine."""
    least: int
    """Fewest elements of a matrix with a cosine."""

    @property
    def uncorrelated(self) -> dict[str, float]:
        """The tensors that are uncorrelated with the other model's, with their cosines."""
        return {name: c for name, c in self.cosines.items() if c < self._bound(name)}

    def _bound(self, name: str) -> float:
        """The cosine below which a tensor is uncorrelated. Cosines of small tensors are larger by chance."""
        return max(UNCORRELATED, DEVIATIONS / math.sqrt(self.sizes[name]))

    @property
    def is_judged(self) -> bool:
        """Is the sample large enough? It needs four large matrices; if small ones count, two with enough
        elements together."""
        if self.least < LARGE:
            return len(self.cosines) > 1 and sum(self.sizes.values()) >= LEAST_ELEMENTS
        return len(self.cosines) >= LEAST_TENSORS

    @property
    def verdict(self) -> Relation:
        if self.elements_differ == 0:
            return "equal"
        if self.is_judged and len(self.uncorrelated) >= NEARLY_ALL * len(self.cosines):
            return "unrelated"
        near = self.cosine >= FAR and LENGTHS[0] <= self.length <= LENGTHS[1]
        return "tuned" if near or not self.is_judged else "far"


@dataclass(frozen=True)
class SampledTensor:
    """A tensor to sample, and the positions of the sources that have it; the others are compared with the
    first."""

    name: str
    models: tuple[int, ...]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The first model with each of the others."""
        return [(self.models[0], model) for model in self.models[1:]]


class _SampleSums:
    """Sums over the sampled elements of one model and its difference from another."""

    def __init__(self, least: int) -> None:
        self.least = least
        self.other = self.change = self.product = 0.0
        self.tensors = self.elements_differ = 0
        self.cosines: dict[str, float] = {}
        self.sizes: dict[str, int] = {}

    def add(self, name: str, other: np.ndarray, delta: np.ndarray, is_large: bool) -> None:
        of_other, of_delta, product = _dot(other, other), _dot(delta, delta), _dot(other, delta)
        self.other += of_other
        self.change += of_delta
        self.product += product
        self.tensors += 1
        self.elements_differ += int(np.count_nonzero(delta))
        if is_large and of_other > 0 and of_other + 2 * product + of_delta > 0:
            self.cosines[name] = _cosine(of_other, product, of_delta)
            self.sizes[name] = other.size

    def likeness(self, model: str, other: str) -> Likeness:
        length = max(self.other + 2 * self.product + self.change, 0.0)
        scale = self.other or 1.0
        return Likeness(
            model,
            other,
            self.tensors,
            self.elements_differ,
            (self.change / scale) ** 0.5,
            _cosine(self.other, self.product, self.change),
            (length / scale) ** 0.5,
            self.cosines,
            self.sizes,
            self.least,
        )


def _dot(a: np.ndarray, b: np.ndarray) -> float:
    # Not a @ b: BLAS sends even a short sum to all threads, which took 30 to 600 ms instead of 3 on a busy
    # machine.
    return float(np.einsum("i,i->", a, b))


def _cosine(of_other: float, product: float, of_delta: float) -> float:
    """Return the cosine of x and x + d from |x|^2, x d and |d|^2; 1 if one of them is 0."""
    length = of_other + 2 * product + of_delta
    return (
        min(max((of_other + product) / (of_other * length) ** 0.5, -1.0), 1.0)
        if of_other > 0 and length > 0
        else 1.0
    )


@dataclass(frozen=True)
class ModelComparison:
    """How similar models are to one another.

    ``likenesses`` compare models with a common reference. ``duplicates`` are pairs of nearly equal models:
    two models, their reference, and their distance as a share of their distance from it.
    """

    likenesses: tuple[Likeness, ...]
    duplicates: tuple[tuple[str, str, str, float], ...] = ()


def compare_models(
    sources: Sequence[Source],
    places: Iterable[SampledTensor],
    least: int = LARGE,
    small: Collection[tuple[int, int]] = (),
) -> ModelComparison:
    """Read a sample of tensors and compare the models. The reads are the same every time, in order.

    Matrices of ``least`` elements or more have a cosine; of :data:`SMALL` or more in ``small`` pairs of
    models, the other and the model.

    Errors: those of reading; tensors with a NaN or an infinity are left to the merge, which names them.
    """
    tallies: dict[tuple[int, int], _SampleSums] = {}
    apart: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]] = {}
    for place in places:
        if len(place.models) == 1:  # layers of one model
            continue
        first, *rest = (_read(sources[m], place.name) for m in place.models)
        with np.errstate(all="ignore"):
            deltas = np.stack(rest)
            rest.clear()
            deltas -= first
            if not np.isfinite([_dot(x, x) for x in (first, *deltas)]).all():
                continue
        tensor = sources[place.models[0]].tensors[place.name]
        for pair, delta in zip(place.pairs, deltas, strict=True):
            size = SMALL if pair in small else least
            tally = tallies.setdefault(pair, _SampleSums(size))
            tally.add(place.name, first, delta, is_matrix(tensor, size))
        if len(deltas) > 1:
            k = len(deltas)
            differences, lengths = apart.setdefault(place.models, (np.zeros((k, k)), np.zeros((k, k))))
            _add_pairs(deltas, differences, lengths)
    likenesses = [
        tally.likeness(sources[model].label, sources[other].label)
        for (other, model), tally in tallies.items()
    ]
    sums: dict[tuple[int, int, int], list[float]] = {}
    for (reference, *models), (differences, lengths) in apart.items():
        for i, j in combinations(range(len(models)), 2):
            total = sums.setdefault((models[i], models[j], reference), [0.0, 0.0])
            total[0] += float(differences[i, j])
            total[1] += float(lengths[i, j])
    near = [
        (triple, (difference / length) ** 0.5)
        for triple, (difference, length) in sums.items()
        if length > 0 and difference <= NEAR_DUPLICATE**2 * length
    ]
    labels = [s.label for s in sources]
    return ModelComparison(
        tuple(likenesses),
        tuple((labels[a], labels[b], labels[other], share) for (a, b, other), share in near),
    )


def _add_pairs(deltas: np.ndarray, differences: np.ndarray, lengths: np.ndarray) -> None:
    """Add |d_i - d_j|^2 of the rows of ``deltas`` (k, n), and the larger of |d_i|^2 and |d_j|^2, for i < j; both are (k, k).

    A row against many that follow: hundreds of checkpoints have tens of thousands of pairs.
    """
    own = np.einsum("ij,ij->i", deltas, deltas)
    lengths += np.maximum.outer(own, own)
    for i in range(len(deltas) - 1):
        for j in range(i + 1, len(deltas), PAIRS_AT_ONCE):
            change = deltas[j : j + PAIRS_AT_ONCE] - deltas[i]
            differences[i, j : j + PAIRS_AT_ONCE] += np.einsum("ij,ij->i", change, change)


def sampled_tensors(
    plan: Plan, caller: Caller = IN_A_RECIPE
) -> tuple[list[SampledTensor], set[tuple[int, int]]]:
    """Choose the tensors of a plan that are sampled, and the pairs of models in which small matrices count."""
    places: dict[str, SampledTensor] = {}
    orders: set[tuple[int, ...]] = set()
    for job in plan.jobs:
        read = job.merged if job.base is None else (job.base, *job.inputs)
        if (
            job.is_computed
            and job.elements
            and len(read) > 1
            and all(i.name == read[0].name and i.dtype in MERGEABLE for i in read)
        ):
            models = tuple(dict.fromkeys(i.model for i in read))
            if len(models) == 2 and models[::-1] in orders:  # a rule may have them in the other order
                models = models[::-1]
            orders.add(models)
            places[job.name] = SampledTensor(read[0].name, models)
    large = {p.name for p in places.values() if is_matrix(_first(plan, p))}
    by_models: dict[tuple[int, ...], list[SampledTensor]] = {}
    for place in places.values():
        by_models.setdefault(place.models, []).append(place)
    common: Counter[tuple[int, int]] = Counter()
    for group in by_models.values():
        common.update(dict.fromkeys(group[0].pairs, sum(p.name in large for p in group)))
    small = {pair for pair in common if caller.judges_small and common[pair] < LEAST_TENSORS}
    matrices = [
        p
        for p in places.values()
        if p.name in large or (small and not small.isdisjoint(p.pairs) and is_matrix(_first(plan, p), SMALL))
    ]
    if matrices:
        by_models = {}
        for place in matrices:
            by_models.setdefault(place.models, []).append(place)
    sampled = {p.name for group in by_models.values() for p in pick_evenly(group, TENSORS)}
    return [p for p in places.values() if p.name in sampled], small


def check_relatedness(plan: Plan, caller: Caller = IN_A_RECIPE) -> Plan:
    """Compare the models of a plan by a sample, and return the plan with notes about them.

    Only values that are mixed are compared: copies and layers from several models are what the recipe
    requests, and only models that are mixed with each other. Networks in memory are often small: where two
    models are mixed in fewer than four large matrices and a ``caller`` ``judges_small``, small ones count.
    Errors: MismatchError for models that were not tuned from one base, unless the recipe says
    ``unrelated: allow``. The advice is in the words of the ``caller``. Experts in another order are named.
    """
    of_experts: list[str] = []
    if any(".experts." in job.name for job in plan.jobs):
        from alnico.engine.expert_order import find_reordered, order_notes  # with mixtures of experts

        of_experts = order_notes(find_reordered(plan))
    sampled, small = sampled_tensors(plan, caller)
    comparison = compare_models(plan.sources, sampled, small=small)
    unrelated = [x for x in comparison.likenesses if x.verdict == "unrelated"]
    if unrelated and plan.recipe.unrelated == "error":
        raise MismatchError(*of_experts, *(_refusal(x, caller) for x in unrelated))
    with_base = any(job.base is not None for job in plan.jobs)
    return dataclasses.replace(
        plan, notes=(*plan.notes, *of_experts, *relatedness_notes(comparison, with_base))
    )


def relatedness_notes(comparison: ModelComparison, with_base: bool) -> list[str]:
    """List notes about models that are equal, nearly equal, far from the other, or unrelated."""
    lines = []
    for x in comparison.likenesses:
        sampled = f"{x.tensors} sampled tensors"
        if x.verdict == "equal":
            end = "there is nothing to merge from it" if with_base else "they are one model, counted twice"
            lines.append(f"{x.model} equals {x.other} in all {sampled}; {end}.")
        elif x.verdict == "unrelated":
            lines.append(
                f"{x.model} and {x.other} were not tuned from one base (cosine {x.cosine:.2f}); unrelated: allow merges them."
            )
        elif x.verdict == "far":
            lines.append(
                f"{x.model} is far from {x.other}: cosine {x.cosine:.2f}, {x.length:.2f} times as long, in {sampled}; "
                "fine-tunes are nearly parallel. Make sure that they belong together."
            )
        elif x.uncorrelated:
            lines.append(
                f"{x.model}: {len(x.uncorrelated)} of {len(x.cosines)} sampled matrices are uncorrelated with those of "
                f"{x.other}: {_list_tensors(x.uncorrelated)}. They were trained from scratch; exclude them with a filter if that is not intended."
            )
    for a, b, other, share in comparison.duplicates:
        how = (
            "are equal in all sampled tensors"
            if share == 0
            else f"are nearly one model: they differ by {share:.1%} of their distance from {other}"
        )
        lines.append(f"{a} and {b} {how}; together they count twice.")
    return lines


def is_matrix(tensor: Tensor, least: int = LARGE) -> bool:
    """Has a tensor two dimensions or more, and enough elements for a significant cosine?"""
    return sum(n > 1 for n in tensor.shape) > 1 and tensor.elements >= least


def _first(plan: Plan, place: SampledTensor) -> Tensor:
    return plan.sources[place.models[0]].tensors[place.name]


def pick_evenly(places: Sequence[SampledTensor], count: int) -> list[SampledTensor]:
    """Return ``count`` places, evenly spread, with the first and the last."""
    if len(places) <= count:
        return list(places)
    return [places[i * (len(places) - 1) // (count - 1)] for i in range(count)]


def sample_bytes(tensor: Tensor) -> int:
    """The bytes of the elements that are sampled of a tensor."""
    return min(tensor.elements, SAMPLE) * DTYPES[tensor.dtype].bytes


def _read(source: Source, name: str) -> np.ndarray:
    """Read the elements in the middle of a tensor, as float64."""
    tensor = source.tensors[name]
    raw = np.empty(sample_bytes(tensor), np.uint8)
    width = DTYPES[tensor.dtype].bytes
    count = raw.size // width
    source.read_into(name, (tensor.elements - count) // 2 * width, memoryview(raw))
    return decode(raw, tensor.dtype).astype(np.float64)


def _refusal(x: Likeness, caller: Caller) -> str:
    return (
        f"{x.model} and {x.other} were not tuned from one base: {len(x.uncorrelated)} of {len(x.cosines)} sampled matrices "
        f"are uncorrelated: {_list_tensors(x.uncorrelated)}; expected cosines near 1, as between fine-tunes. The same "
        f"parameter does not mean the same in both, so a merge of them works like neither. Use models tuned from one base"
        f"{caller.report}, or {caller.allow}."
    )


def _list_tensors(cosines: Mapping[str, float]) -> str:
    shown = [f"{name} (cosine {c:.2f})" for name, c in list(cosines.items())[:3]]
    return ", ".join(shown) + (f" and {len(cosines) - 3} more" if len(cosines) > 3 else "")
