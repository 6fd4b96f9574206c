"""RAM: averages entries that several models changed, keeps those that one model changed."""

from typing import Annotated

from alnico.methods.base import Between, Merge, method


@method(space="delta", source="Reinforced Agent Merging 2026, https://arxiv.org/abs/2601.13572")
def ram(*, epsilon: Annotated[float, Between(0)] = 1e-5) -> Merge:
    """Average the task-vector entries of the models that changed a parameter.

    ``out = base + mean_A(model_i - base)`` over the models A with ``|model_i - base| > epsilon``.

    Use when: the task vectors are sparse, as after reinforcement learning. An entry that only one model
        changed keeps its size, while a mean would divide it by the number of models.

    Options:
        epsilon: the change above which a parameter counts as changed, at least 0, in units of the parameters.
    Shapes: one task-vector entry per model in, one number out; any number of models besides the base.
    Measures: one pass. Memory: blocks. Grain: element.
    Edge cases: where no model changed a parameter, the base's bits are written. With task vectors of the size
        of ``epsilon`` most entries do not count: choose it well below them.
    Differs from the source: nothing. The default of ``epsilon`` is mergekit's.
    Source: Reinforced Agent Merging 2026, https://arxiv.org/abs/2601.13572; as a merge: mergekit 0.1.5.

    >>> ram.bind({}, 3).arguments
    (1e-05,)
    """

    def mix(delta, epsilon):
        total = 0.0
        changed = 0.0
        for i in range(len(delta)):
            if abs(delta[i]) > epsilon:
                total += delta[i]
                changed += 1.0
        return total / changed if changed > 0 else 0.0

    return Merge(mix, (epsilon,))
