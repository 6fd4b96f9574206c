"""Ilharco et al. 2023, section 2."""


def merge(models, base, options, noise):
    weight = options.get("weight", [1.0] * len(models))
    change = sum(w * (m - base) for w, m in zip(weight, models, strict=True))
    if options.get("divide", "none") == "weight":
        change = change / sum(weight)
    return base + options.get("scale", 1.0) * change
