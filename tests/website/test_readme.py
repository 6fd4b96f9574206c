"""The README is a front page: short, with figures that are those of the pages behind it, and each how-to one click away."""

from __future__ import annotations

import re
from pathlib import Path

import alnico
from alnico.cli.main import load_command
from alnico.methods import registry

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
DOCS = ROOT / "docs"


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_it_fits_on_a_front_page() -> None:
    assert len(README.splitlines()) <= 130


def test_every_how_to_is_in_a_row_with_its_title() -> None:
    table = "\n".join(line for line in README.splitlines() if line.startswith("| "))
    shown = dict(re.findall(r"\[([^\]]+)\]\((docs/how-to/[\w-]+\.md)\)", table))
    titles = {
        page.read_text("utf-8").partition("\n")[0].removeprefix("# "): page.relative_to(ROOT).as_posix()
        for page in (DOCS / "how-to").glob("*.md")
    }
    assert sorted(shown.values()) == sorted(titles.values())
    for title, page in shown.items():
        (whole,) = (t for t, p in titles.items() if p == page)
        assert whole.startswith(title) or title.startswith(whole), title


def test_the_figures_of_speed_are_those_of_the_benchmarks() -> None:
    page = (DOCS / "benchmarks.md").read_text("utf-8")
    section = page.partition("## Speed of a merge")[2].partition("\n## ")[0]
    full = {row[0]: row for row in map(cells, section.splitlines()) if len(row) == 13}
    shown = README.partition("<!-- speed -->")[2].partition("<!-- /speed -->")[0].strip().splitlines()[2:]
    assert len(shown) == 3
    for line in shown:
        name, limit, ours, memory, theirs, their_memory = cells(line)
        row = full[re.split(r"[ ,]", name)[0]]
        seconds = [f"{row[i].split()[0]} s" for i in (2, 5, 9)]
        assert [limit, ours, theirs] == seconds
        assert [memory, their_memory] == [f"{row[8]} MiB", f"{row[11]} MiB"]


def test_the_numbers_of_methods_and_architectures_are_true() -> None:
    row = next(cells(line) for line in README.splitlines() if line.startswith("| merge methods |"))
    assert int(row[1]) == len([m for m in registry().values() if m.factory.__module__.startswith("alnico.")])
    (tried,) = re.findall(r"small models of (\d+) tried", README)
    assert f"Small models of {tried} architectures" in (DOCS / "architectures.md").read_text("utf-8")


def test_the_pictures_are_there() -> None:
    pictures = re.findall(r'src(?:set)?="([^"]+)"', README)
    assert pictures
    assert [path for path in pictures if not (ROOT / path).is_file()] == []


def test_its_recipe_and_its_commands_are_ones() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert alnico.load_recipe(text).notes == ()
    (commands,) = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    names = [line.split()[1] for line in commands.splitlines() if line.startswith("alnico ")]
    assert names == ["plan", "merge", "verify", "merge"]
    for line in commands.splitlines():
        words = line.partition("  #")[0].split()
        options = {name for p in load_command(words[1]).parameters for name in p.names}
        assert {word for word in words if word.startswith("-")} <= options
