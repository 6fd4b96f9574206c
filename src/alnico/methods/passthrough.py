"""Passes one model through, unchanged or scaled."""

from alnico.methods.base import Merge, PerModel, combine, each, method


@method(space="weight", models=(1, 1), source="mergekit 0.1.5, method passthrough")
def passthrough(*, scale: PerModel[float] = each(1.0)) -> Merge:
    """Take one model as it is, or multiplied by a number.

    ``out = scale * model``. At scale 1 the bytes are copied and never decoded, unless the recipe sets another
    output dtype.

    Use when: you take tensors of one model: its layers in a stack of several models, a part that is not
        merged, or a model in another dtype.

    Options:
        scale: the factor on every parameter, any number.
    Shapes: one value in, one number out; one model.
    Measures: one pass over the model. Memory: blocks. Grain: element; bytes at scale 1.
    Edge cases: scale 0 writes zeros.
    Differs from the source: mergekit also multiplies at scale 1; the values are the same.
    Source: mergekit 0.1.5, method passthrough.

    >>> passthrough.bind({}, 1).copies
    0
    """
    return combine(tuple(scale), copies=0 if scale == (1.0,) else None)
