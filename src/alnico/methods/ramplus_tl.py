"""RAM+ per tensor: amplifies entries that one model changed, averages those that several did."""

from functools import partial
from typing import Annotated

from alnico.kernels.facts import Derived, Sum
from alnico.methods.base import Between, Merge, method


@method(space="delta", source="Reinforced Agent Merging 2026, https://arxiv.org/abs/2601.13572")
def ramplus_tl(
    *, r: float = 0.1, alpha: Annotated[float, Between(0)] = 0.2, epsilon: Annotated[float, Between(0)] = 1e-5
) -> Merge:
    """Average the entries that several models changed, and amplify those that only one changed.

    As in ``ram``, but where model i alone has changed a parameter, its entry is multiplied by ``1 + r *
    min(alpha, shared_i / unique_i)``: the number of entries of this tensor that it changed together with
    others, over the number that it changed alone.

    Use when: ``ram`` fits, but models whose changes overlap a lot lose too much when they are averaged.

    Options:
        r: the strength of the amplification, any number; 0 is ``ram``.
        alpha: the largest ratio of shared to unique entries that counts, at least 0.
        epsilon: the change above which a parameter counts as changed, at least 0, in units of the parameters.
    Shapes: one task-vector entry per model in, one number out; any number of models besides the base.
    Measures: two sums (numbers of entries), one pass; then one to mix. Memory: blocks. Grain: element.
    Edge cases: a model without entries of its own has the ratio ``alpha`` if it shares any, else 0; where no
        model changed a parameter, the base's bits are written.
    Differs from the source: ratios are per tensor, as in mergekit; the paper takes them over the model.
        mergekit writes float32 for inputs of any dtype.
    Source: Reinforced Agent Merging 2026, https://arxiv.org/abs/2601.13572; as a merge: mergekit 0.1.5.

    >>> _factors(0.1, 0.2, (30.0, 5.0, 2.0), (100.0, 100.0, 0.0))
    (1.02, 1.005, 1.02)
    """
    factor = Derived(
        partial(_factors, r, alpha),
        (Sum(shared, (epsilon,), across=True), Sum(alone, (epsilon,), across=True)),
    )

    def mix(delta, factor, epsilon):
        changed = changes(delta, epsilon)
        total = 0.0
        for i in range(len(delta)):
            if abs(delta[i]) > epsilon:
                total += factor[i] * delta[i] if changed < 2 else delta[i] / changed
        return total

    return Merge(mix, (factor, epsilon))


def changes(delta, epsilon):
    """The number of models that changed a parameter."""
    count = 0.0
    for i in range(len(delta)):
        if abs(delta[i]) > epsilon:
            count += 1.0
    return count


def shared(own, delta, epsilon):
    return 1.0 if abs(own) > epsilon and changes(delta, epsilon) > 1 else 0.0


def alone(own, delta, epsilon):
    return 1.0 if abs(own) > epsilon and changes(delta, epsilon) < 2 else 0.0


def _factors(
    r: float, alpha: float, shared: tuple[float, ...], unique: tuple[float, ...]
) -> tuple[float, ...]:
    return tuple(
        1 + r * min(alpha, s / u if u else alpha if s else 0.0) for s, u in zip(shared, unique, strict=True)
    )
