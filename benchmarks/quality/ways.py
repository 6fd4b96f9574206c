"""The rows of the table: each way to choose a recipe, by the validation part alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from quality.bench import Bench, Chosen, Recipe, say
from quality.tuners import by_statistics, learned, searched, souped


@dataclass(frozen=True)
class Way:
    """One row. ``is_core`` ways make the short table."""

    name: str
    choose: Callable[[Bench], Chosen]
    is_core: bool = True


def fixed(make: Callable[[Bench], Recipe], setting: str = "") -> Callable[[Bench], Chosen]:
    """Choose a recipe that has nothing to tune."""
    return lambda bench: Chosen(make(bench), setting)


def grid(candidates: Callable[[Bench], Iterator[Chosen]]) -> Callable[[Bench], Chosen]:
    """Choose the recipe that is best on the validation part; of equals, the first."""

    def choose(bench: Bench) -> Chosen:
        tried = []
        for chosen in candidates(bench):
            scored = bench.score(chosen.recipe, "validation")
            say(f"  {chosen.setting}: {scored.mean:.4f} on validation")
            tried.append((chosen, scored))
        best = max(tried, key=lambda pair: pair[1].mean)[0]
        return replace(best, evaluations=len(tried), seconds=sum(scored.seconds for _, scored in tried))

    return choose


def scales(
    method: str, values: tuple[float, ...], **settings: tuple[float | str, ...]
) -> Callable[[Bench], Chosen]:
    """Choose the scale of a method, and one more option's value if its values are given."""
    (option, choices), *_ = settings.items() or [("", ("",))]

    def candidates(bench: Bench) -> Iterator[Chosen]:
        for choice in choices:
            named = {option: choice} if option else {}
            for scale in values:
                words = ", ".join(f"{name} {value}" for name, value in {**named, "scale": scale}.items())
                yield Chosen(bench.sum(method, scale=scale, **named), words)

    return grid(candidates)


def published(method: str) -> Callable[[Bench], Recipe]:
    """The recipe of a method as its paper has it."""
    return lambda bench: {**bench.sum(method), "preset": "paper"}


def published_scales(method: str, values: tuple[float, ...]) -> Callable[[Bench], Chosen]:
    """Choose the scale of a method that is otherwise as its paper has it."""
    return grid(
        lambda bench: (
            Chosen({**bench.sum(method, scale=scale), "preset": "paper"}, f"scale {scale}")
            for scale in values
        )
    )


def alone(name: str) -> Recipe:
    """The recipe that is one model as it is."""
    return {"merge_method": "passthrough", "models": [{"model": name}]}


def rising(bench: Bench) -> Iterator[Chosen]:
    """LiNeS: task arithmetic whose scale rises over the depth, from ``alpha`` in the first layer to ``alpha + beta`` in the last."""
    for alpha in (0.2, 0.3, 0.4, 0.5):
        for beta in (0.2, 0.4, 0.6):
            recipe = {**bench.sum("task_arithmetic"), "lines": {"alpha": alpha, "beta": beta}}
            yield Chosen(recipe, f"alpha {alpha}, beta {beta}")


def rising_matrices(bench: Bench) -> Iterator[Chosen]:
    """LiNeS on TSV: its scale rises around 1."""
    for alpha, beta in ((0.8, 0.2), (0.8, 0.4), (1.0, 0.2), (1.0, 0.4)):
        recipe = {**bench.sum("tsv"), "lines": {"alpha": alpha, "beta": beta}}
        yield Chosen(recipe, f"alpha {alpha}, beta {beta}")


def weighed_matrices(bench: Bench) -> Recipe:
    """A weight of each task at three depths searched around TSV."""
    return bench.sum("tsv", [{"search": [0.5, 1.5], "layers": 3}] * len(bench.tasks))


def one_after_another(bench: Bench) -> Recipe:
    """SLERP knows two models: each next one is turned to by 1/k on the arc from the merge of those before it."""
    stages = []
    before = str(bench.work / bench.specialist(bench.tasks[0]))
    for count, name in enumerate(bench.tasks[1:], 2):
        after = str(bench.work / bench.specialist(name))
        stages.append(
            {
                "name": f"of-{count}",
                "merge_method": "slerp",
                "base_model": before,
                "models": [{"model": before}, {"model": after}],
                "parameters": {"t": 1 / count},
            }
        )
        before = f"of-{count}"
    return stages


AROUND_ONE = (0.8, 1.0, 1.2, 1.4)
TENTHS = tuple(i / 10 for i in range(1, 13))
scaled = functools.cache(scales("task_arithmetic", TENTHS))


def best_scale(bench: Bench) -> float:
    """The scale that was chosen for task arithmetic."""
    return float(scaled(bench).recipe["parameters"]["lambda"])


def weighed(bench: Bench, layers: int | None = None) -> Recipe:
    """A weight of each task searched, or of each task at several depths, around task arithmetic.

    Weights are shares of ``scale``, which is as many times the scale that was chosen for task arithmetic as there are tasks. So the
    default settings, which a search tries first, are task arithmetic, and at the ends a task has none or two and a half times as much.
    """
    count = len(bench.tasks)
    searched: dict[str, Any] = {"search": [0.0, 2.5 / count], **({"layers": layers} if layers else {})}
    return bench.sum("task_arithmetic", [searched] * count, scale=round(count * best_scale(bench), 3))


def trimmed(bench: Bench) -> Recipe:
    """Scale and density of TIES searched."""
    return bench.sum("ties", scale={"search": [0.5, 4.0]}, density={"search": [0.05, 1.0]})


def chosen_among(bench: Bench) -> Recipe:
    """The method searched, with its scale and density."""
    methods = ["task_arithmetic", "ties", "dare_ties", "della", "breadcrumbs"]
    return {
        **bench.sum("ties", scale={"search": [0.2, 3.0]}, density={"search": [0.1, 1.0]}),
        "merge_method": {"choice": methods},
    }


WAYS = (
    Way("base", fixed(lambda _: alone("base"))),
    Way("average", fixed(lambda bench: bench.sum("linear", base=False))),
    Way("task arithmetic 0.3", fixed(lambda bench: bench.sum("task_arithmetic", scale=0.3))),
    Way("task arithmetic", scaled),
    Way(
        "ties as published",
        fixed(published("ties"), "preset paper, scale 1"),
    ),
    Way("ties", scales("ties", (1.0, 1.5, 2.0, 2.5, 3.0), density=(0.2, 0.5))),
    Way("lines", grid(rising)),
    Way("tsv", fixed(lambda bench: bench.sum("tsv"))),
    Way("tsv (tuned)", scales("tsv", AROUND_ONE)),
    Way("tsv as published", fixed(published("tsv"), "preset paper, scale 1")),
    Way("tsv as published (tuned)", published_scales("tsv", (1.0, 1.5, 2.0, 2.5))),
    Way("dc_merge", fixed(lambda bench: bench.sum("dc_merge"))),
    Way("dc_merge (tuned)", scales("dc_merge", AROUND_ONE)),
    Way("dc_merge as published", fixed(published("dc_merge"), "preset paper, scale 1")),
    Way("swudi", fixed(lambda bench: bench.sum("swudi"))),
    Way("swudi (tuned)", scales("swudi", (0.8, 1.0, 1.2, 1.4, 1.6))),
    Way("iso_c", fixed(lambda bench: bench.sum("iso_c"))),
    Way("iso_c (tuned)", scales("iso_c", (1.0, 1.5, 2.0, 2.5))),
    Way("iso_cts", fixed(lambda bench: bench.sum("iso_cts"))),
    Way("iso_cts (tuned)", scales("iso_cts", (1.0, 1.5, 2.0, 2.5))),
    Way("svd (tuned)", scales("svd", (0.4, 0.6, 0.8, 1.0))),
    Way("model stock", fixed(lambda bench: bench.sum("model_stock"))),
    Way("karcher", fixed(lambda bench: bench.sum("karcher", base=False))),
    Way("slerp (one after another)", fixed(one_after_another)),
    Way("greedy soup", souped("sorted")),
    Way("dare_linear", scales("dare_linear", (0.4, 0.5, 0.6, 0.7), density=(0.2, 0.5)), is_core=False),
    Way("dare_ties", scales("dare_ties", (0.4, 0.6, 0.8, 1.0), density=(0.2, 0.5)), is_core=False),
    Way("della", scales("della", (1.0, 1.5, 2.0, 2.5), density=(0.3, 0.6)), is_core=False),
    Way("breadcrumbs", scales("breadcrumbs", (0.5, 0.6, 0.7, 0.8), density=(0.5, 0.9)), is_core=False),
    Way("consensus", scales("consensus", (0.5, 0.6, 0.7, 0.8)), is_core=False),
    Way("pcb", scales("pcb", (0.6, 1.0, 1.5, 2.0), density=(0.1, 0.2)), is_core=False),
    Way("magmax", scales("magmax", (0.3, 0.5, 0.7, 1.0)), is_core=False),
    Way("fisher", by_statistics("fisher", "fisher", "fisher"), is_core=False),
    Way("regmean", by_statistics("regmean", "gram", "gram", alpha=0.9), is_core=False),
    Way("regmean++", by_statistics("regmean", "gram", "gram-plus", alpha=0.9), is_core=False),
    Way("greedy soup (all tried)", souped("all"), is_core=False),
    Way("search of ties (tpe)", searched("ties", trimmed, "tpe", 30), is_core=False),
    Way("search of methods (tpe)", searched("methods", chosen_among, "tpe", 30), is_core=False),
    Way("search by task (tpe)", searched("task", weighed, "tpe", 60), is_core=False),
    Way("search by task (cma-es)", searched("task", weighed, "cmaes", 80), is_core=False),
    Way(
        "search by task and depth (tpe)", searched("depth", lambda b: weighed(b, 3), "tpe", 60), is_core=False
    ),
    Way(
        "search by task and depth (cma-es)",
        searched("depth", lambda b: weighed(b, 3), "cmaes", 120),
        is_core=False,
    ),
    Way("lines on tsv", grid(rising_matrices), is_core=False),
    Way(
        "search of tsv by task and depth (cma-es)",
        searched("tsv-depth", weighed_matrices, "cmaes", 60),
        is_core=False,
    ),
    Way("adamerging (by task)", learned("task", 100, 3e-3, best_scale), is_core=False),
    Way("adamerging (by tensor)", learned("tensor", 120, 3e-3, best_scale), is_core=False),
    Way(
        "adamerging++ (by tensor)",
        learned("tensor", 80, 3e-3, lambda _: 1.0, greatest=2.0, plus=True),
        is_core=False,
    ),
    Way(
        "adamerging of tsv (by tensor)",
        learned("tensor", 50, 3e-3, lambda _: 1.0, greatest=2.0, method="tsv"),
        is_core=False,
    ),
)
