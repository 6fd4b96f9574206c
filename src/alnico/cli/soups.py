"""A soup as text for people: its steps as they come, and what came of it."""

from __future__ import annotations

from alnico.cli.printing import Page, page
from alnico.tune.soup import Soup, SoupStep


def step_text(step: SoupStep) -> str:
    """A line for an average that was tried."""
    size = sum(step.counts.values())
    gain = "" if step.best is None else f"  {step.score - step.best:+.6f}"
    return f"{'+' if step.is_kept else ' '} {step.tried}: {step.score:.6f}{gain}{f'  of {size}' if size > 1 else ''}"


def soup_text(found: Soup) -> Page:
    """The models of a soup, and its score beside those of the models alone and of the uniform soup."""
    size = sum(found.counts.values())
    rows = [
        (f"soup of {len(found.counts)}", found.score, ""),
        (f"uniform soup of {len(found.alone)}", found.uniform, ""),
    ]
    rows += [
        (reference, value, f"{found.counts[reference]} of {size}" if reference in found.counts else "")
        for reference, value in found.alone.items()
    ]
    width = max(len(name) for name, _, _ in rows)
    lines = [f"{'':{width}}  {found.objective:>10}  in the soup"]
    lines += [f"{name:{width}}  {value:10.6f}  {share}".rstrip() for name, value, share in rows]
    return page(
        [
            *lines,
            "",
            "These are scores on the tasks that chose the soup, so its own is too good. --report scores it on others.",
        ]
    )
