"""``alnico soup``: which models to average."""

from __future__ import annotations

from pathlib import Path

from alnico.checkpoint.output_path import check_new_file, write_new_file
from alnico.cli.command import CommandCall, command
from alnico.cli.commands.evaluate import scorecard_text
from alnico.cli.options import JSON, NEW_FILE, QUIET, SCORING_DTYPE, Flag
from alnico.cli.printing import Page, page, recipe_page, say_page
from alnico.tune.category_experts import CategoryExperts
from alnico.tune.soup import Soup


@command(
    "alnico.soup",
    fills=("names", "minimize"),
    tasks=Flag(metavar="FILE", is_option=True),
    scores=Flag(metavar="FILE"),
    clusters=Flag(metavar="COUNT", least=1),
    report=Flag(metavar="FILE"),
    out=NEW_FILE,
    dtype=SCORING_DTYPE,
    json=JSON,
    quiet=QUIET,
)
def run(call: CommandCall) -> None:
    out = call["out"]
    if out is not None:
        check_new_file(Path(out))
    soup = call.invoke()
    recipe = soup.recipe(Path(out).parent if out else ".")
    if out is not None:
        write_new_file(Path(out), recipe)
    if not call.is_json:
        say_page(soup_text(soup), call.is_quiet)
        if soup.report is not None:
            report = page(["", f"{call['report']}:", *scorecard_text(soup.report, 0).split("\n")])
            say_page(report, call.is_quiet)
    call.show(
        lambda: {**soup.data(), "recipe": recipe},
        lambda: page([out]) if out is not None else recipe_page(recipe),
        besides=out,
        even_quiet=True,
    )


def experts_lines(experts: CategoryExperts) -> list[str]:
    """Why each candidate was chosen."""
    left_out = ", ".join(experts.left_out)
    return [
        *(cluster.reason for cluster in experts.clusters),
        *([f"left out, as all models have one score: {left_out}"] if left_out else []),
    ]


def soup_text(soup: Soup) -> Page:
    """The models of a soup, and its score beside those of the models alone and of the uniform soup."""
    size = sum(soup.counts.values())
    rows: list[tuple[str, float, str]] = []
    if soup.score is not None and soup.uniform is not None:
        rows.append((f"soup of {len(soup.counts)}", soup.score, ""))
        rows.append((f"uniform soup of {len(soup.alone)}", soup.uniform, ""))
    rows += [
        (reference, value, f"{soup.counts[reference]} of {size}" if reference in soup.counts else "")
        for reference, value in soup.alone.items()
    ]
    width = max(len(name) for name, _, _ in rows)
    column = max(10, len(soup.objective))
    lines = [] if soup.experts is None else [*experts_lines(soup.experts), ""]
    lines.append(f"{'':{width}}  {soup.objective:>10}  in the soup")
    lines += [f"{name:{width}}  {value:{column}.4f}  {share}".rstrip() for name, value, share in rows]
    if soup.score is None:
        return page(
            [*lines, "", "No average was scored: the experts have equal weights. --tasks finds weights."]
        )
    return page(
        [
            *lines,
            "",
            f"{soup.objective}: {'higher' if soup.goal == 'max' else 'lower'} is better.",
            "These are scores on the tasks that chose the soup, so its own is too good. --report scores it on others.",
        ]
    )
