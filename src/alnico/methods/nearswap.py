"""NearSwap: takes a bounded step from the base to a model."""

from typing import Annotated

from alnico.methods.base import Between, Merge, method


@method(
    space="delta",
    models=(1, 1),
    source="alchemonaut 2024, QuartetAnemoi, https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    presets={"author": {"t": 0.0001}},
)
def nearswap(*, t: Annotated[float, Between(0)]) -> Merge:
    """Take the model's parameter where it is near the base's, elsewhere a bounded step towards it.

    ``out = (1 - w) * base + w * model`` with ``w = min(1, t / |model - base|)``; that is, ``base + clip(model
    - base, -t, t)``.

    Use when: the base should stay nearly as it is, and take something from another model where the two nearly
        agree. One author used it for a model of 70 G parameters and found steps of 0.0025 and more unusable;
        we know of no paper that compares it.
    Start with: {t: 0.0001}

    Options:
        t: the largest step, at least 0, in units of the parameters; 0 gives the base. The author's value for
            a model of 70 G parameters is 0.0001.
    Presets:
        author: the step for a 70 G parameter model, 0.0001.
    Shapes: one task-vector entry in, one number out; one model besides the base.
    Measures: one pass over the model and the base. Memory: blocks. Grain: element.
    Edge cases: t = 0 copies the base.
    Differs from the source: nothing. mergekit treats differences below 1e-6 as 1e-6, so that a smaller t
        never reaches the model, and a t below 0 as 0; here that is an error.
    Source: alchemonaut 2024, https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001.

    >>> nearswap.bind({"t": 0}, 1).copies
    'base'
    """

    def mix(delta, t):
        return min(max(delta[0], -t), t)

    return Merge(mix, (float(t),), copies="base" if t == 0 else None)
