"""One model times a number."""


def merge(models, base, options, noise):
    return models[0] * options.get("scale", [1.0])[0]
