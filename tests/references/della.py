"""Deep et al. 2024 with the election of Yadav et al. 2023, as mergekit 0.1.5 puts them together."""

from references.della_linear import kept_of
from references.ties import consensus


def merge(models, base, options, noise):
    weight = options.get("weight", [1.0] * len(models))
    kept = kept_of(models, base, options, noise)
    return base + options.get("scale", 1.0) * consensus(
        kept,
        weight,
        options.get("elect", "weighted"),
        options.get("divide", "weight"),
        options.get("tie", "auto"),
    )
