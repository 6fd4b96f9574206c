"""Davari and Belilovsky 2023 with the election of Yadav et al. 2023, as mergekit 0.1.5 puts them together."""

from references.breadcrumbs import kept_of
from references.ties import consensus, near_tie


def undecided(models, base, options):
    weight = options.get("weight", [1.0] * len(models))
    return near_tie(kept_of(models, base, options), weight, options.get("elect", "weighted"))


def merge(models, base, options, noise):
    weight = options.get("weight", [1.0] * len(models))
    kept = kept_of(models, base, options)
    return base + options.get("scale", 1.0) * consensus(
        kept,
        weight,
        options.get("elect", "weighted"),
        options.get("divide", "none"),
        options.get("tie", "auto"),
    )
