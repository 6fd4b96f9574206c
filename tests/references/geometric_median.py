"""The geometric median, plainly: Weiszfeld's steps on the vectors themselves, with the step of Vardi and Zhang 2000 on a model."""

import numpy as np


def pull_at(x, weight, at):
    apart = [i for i in range(len(x)) if np.linalg.norm(x[i] - x[at]) > 1e-7 * np.linalg.norm(x[at])]
    pull = sum(
        (weight[i] * (x[i] - x[at]) / np.linalg.norm(x[i] - x[at]) for i in apart), np.zeros_like(x[at])
    )
    own = sum(w for i, w in enumerate(weight) if i not in apart)
    return np.linalg.norm(pull), own


def merge(models, base, options, noise):
    weight = np.array(options.get("weight", [1.0] * len(models)))
    weight = weight / weight.sum()
    unit = max(np.abs(m).max(initial=0) for m in models)
    if not unit:
        return models[0]
    x = [m.ravel() / unit for m in models]
    at = weight @ np.stack(x)
    steps = int(options.get("max_iter", 100))
    if steps:
        for i in range(len(x)):
            pull, own = pull_at(x, weight, i)
            if pull < own * (1 - 1e-9):
                return models[i]
    share = weight
    for _ in range(steps):
        distance = np.array([np.linalg.norm(v - at) for v in x])
        there = distance > 1e-7 * max(distance)
        new = np.where(there, weight / np.where(there, distance, 1), 0)
        new = new / new.sum()
        if not there.all():
            here = int(np.argmin(distance))
            pull, own = pull_at(x, weight, here)
            stays = min(1, own / pull)
            new = (1 - stays) * new + stays * np.eye(len(x))[here]
        change = np.abs(new - share).max()
        share, at = new, new @ np.stack(x)
        if change <= options.get("tol", 1e-12):
            break
    return (at * unit).reshape(models[0].shape)
