"""Train difference: adds to a model what another learned, more of it where the two differ."""

from alnico.methods.base import Merge, method


@method(
    space="delta",
    models=(2, 2),
    source="hako-mikan 2023, trainDifference of supermerger, https://github.com/hako-mikan/sd-webui-supermerger",
)
def train_difference(*, strength: float = 1.0) -> Merge:
    """Add to the first model what the second learned, entry by entry the less the nearer the two are.

    For a model A, a model B and the base C that B was trained from: ``out = A + 1.8 * strength * s * (B - C)`` with
    ``s = |B - A| / (|B - A| + |B - C|)``. Where A has already what B has, s is 0; where A is the base, s is 1/2.

    Use when: a model A should learn what B learned from its base C, as if B had been trained from A: the usual way of people who merge
        image models, in place of adding ``B - C`` to A (``task_arithmetic`` of A and B). No paper compares it.

    Options:
        strength: the factor on what is added, any number; what the programs call alpha. 0 copies the first model.
    Shapes: the entries of two task vectors in, one number out; two models besides the base, in this order: A, B.
    Measures: one pass. Memory: blocks. Grain: element.
    Edge cases: where A, B and C agree, s is 0/0 and nothing is added; where A and B agree, A stays.
    Differs from the source: nothing; supermerger and sd-mecha compute the same.
    Source: supermerger, https://github.com/hako-mikan/sd-webui-supermerger (``trainDifference``).

    >>> train_difference.bind({"strength": 0.0}, 2).copies
    0
    """

    def mix(delta, strength):
        apart = abs(delta[1] - delta[0])
        both = apart + abs(delta[1])
        share = apart / both if both > 0 else 0.0
        return delta[0] + strength * (share * delta[1])

    return Merge(mix, (1.8 * strength,), copies=0 if strength == 0 else None)
