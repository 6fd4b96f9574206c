"""Yu et al. 2024 with the election of Yadav et al. 2023, as mergekit 0.1.5 puts them together, and its trim between the two."""

from references.dare_linear import kept_of
from references.ties import consensus, rescaled, trimmed


def merge(models, base, options, noise):
    weight = options.get("weight", [1.0] * len(models))
    if "trim" in options:
        dropped = kept_of(models, base, {**options, "rescale": "none"}, noise)
        kept = [
            rescaled(trimmed(d, t), m - base, s, options.get("rescale", "l1"))
            for d, t, m, s in zip(dropped, options["trim"], models, options["density"], strict=True)
        ]
    else:
        kept = kept_of(models, base, options, noise)
    change = consensus(
        kept,
        weight,
        options.get("elect", "weighted"),
        options.get("divide", "none"),
        options.get("tie", "auto"),
    )
    return base + options.get("scale", 1.0) * change
