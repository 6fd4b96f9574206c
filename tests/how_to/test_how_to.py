"""Every block of every how-to page runs, and prints what the page shows."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from how_to.page_blocks import PAGES, ROOT, Block, blocks_of, commands_of
from how_to.page_models import SCORED, SCORING, prepared
from how_to.page_session import Outcome, forking, session
from how_to.page_text import agrees

NOT_RUN = {
    "it installs packages": "a test installs nothing",
    "it needs another operating system": "the suite runs on Linux",
    "it depends on the free disk space": "machines differ",
    "it needs a model of the hub": "tests have no network",
    "it needs the demo's download": "tests have no network",
    "it needs a GPU": "the suite runs on machines without one",
    "it needs several machines": "the suite runs on one; the same is run by the script for SLURM, on processes",
    "it compiles for a minute": "tests/engine/test_warm.py runs it for few kernels",
    "it needs a Kubernetes cluster": "the suite has none; test_several_machines.py checks the manifest and runs its command",
}
"""The reasons for which a block may be left out: ``<!-- not run: REASON -->``."""


CHEAP = ("first-merge", "merge-a-lora", "merge-large-models", "stack-layers", "different-tokenizers")
MARKS = {
    **{page: [pytest.mark.before_each_merge] for page in CHEAP},
    "several-machines": [pytest.mark.nightly],  # it starts three nodes of Ray
    "curve": [pytest.mark.nightly],  # it scores a dozen models
}

TITLES = {
    "average-checkpoints": "Average the last checkpoints of a run",
    "chat-vector": "Give a new base the chat skills of an old one",
    "add-difference": "Add the difference of two models",
    "retain": "Keep what a fine-tune forgot",
    "merge-a-lora": "Merge a LoRA into a base",
    "merge-large-models": "Merge 70B models on a 32 GB machine",
    "models-by-url": "Merge models on S3 or a web server",
    "merge-image-models": "Merge image models",
    "stack-layers": "Put layers together (frankenmerge)",
    "build-a-mixture": "Build a mixture of experts",
    "different-tokenizers": "Merge models with different tokenizers",
    "choose-a-method": "Which method, which weights",
    "curve": "Draw the curve of a merge",
    "from-mergekit": "Move over from mergekit",
    "notebook": "Use alnico from a notebook",
    "publish": "Publish a merge",
    "share-task-vectors": "Share a task vector, and equip a base with it",
    "on-a-gpu": "Use a GPU",
    "several-machines": "Use several machines",
    "platforms": "macOS and Windows",
    "cite": "Cite alnico",
}


@pytest.fixture(scope="module")
def forks() -> Iterator[subprocess.Popen[str]]:
    with forking() as server:
        yield server


@pytest.fixture(scope="module")
def scoring_forks() -> Iterator[subprocess.Popen[str]]:
    with forking(*SCORING) as server:
        yield server


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=MARKS.get(page.stem, [])) for page in PAGES],
    ids=lambda page: page.stem,
)
def test_every_block_of_a_page_runs_and_prints_what_it_shows(
    page: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = tmp_path / "merges"
    forks = request.getfixturevalue("scoring_forks" if page.stem in SCORED else "forks")
    with prepared(page.stem, folder) as environment, session(folder, forks, environment) as running:
        for outcome in running.run(blocks_of(page.read_text("utf-8"))):
            problem = outcome.problem()
            assert problem is None, f"{page.name}, {problem}"


def test_each_how_to_has_its_title() -> None:
    titles = {p.stem: p.read_text("utf-8").partition("\n")[0] for p in PAGES if p.parent.name == "how-to"}
    assert titles == {name: f"# {title}" for name, title in TITLES.items()}


def test_the_bibtex_entry_says_what_the_citation_file_says() -> None:
    page = (ROOT / "docs" / "how-to" / "cite.md").read_text("utf-8")
    (entry,) = (block.text for block in blocks_of(page) if block.title == "alnico.bib")
    fields = dict(re.findall(r"(\w+) += \{+(.+?)\}+,?\n", entry))
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert [author["name"] for author in cited["authors"]] == [fields["author"]]
    assert {key: fields[key] for key in ("title", "version", "license")} == {
        key: cited[key] for key in ("title", "version", "license")
    }


def test_links_of_a_page_lead_somewhere() -> None:
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#]+?\.\w+)?(#[\w-]+)?\)", text):
            if "://" in target[0]:
                continue
            path = page.parent / target[0] if target[0] else page
            assert path.is_file(), f"{page.name}: {target[0]}"
            if target[1]:
                headings = re.findall(r"(?m)^#+ (.+)$", path.read_text("utf-8"))
                assert target[1][1:] in map(anchor, headings), f"{page.name}: {target}"


def anchor(heading: str) -> str:
    """The name under which a heading is linked to."""
    return re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-")


def test_a_block_is_left_out_for_a_listed_reason_alone() -> None:
    left_out: Counter[str] = Counter()
    run = 0
    for page in PAGES:
        for block in blocks_of(page.read_text("utf-8")):
            assert block.kind != "unknown", f"{page.name}, line {block.line}: a block that nothing runs"
            if block.kind == "marked":
                assert block.reason in NOT_RUN, f"{page.name}, line {block.line}: {block.reason}"
                left_out[block.reason] += 1
            run += block.kind != "marked"
    print(f"{run} blocks are run; left out: {dict(left_out)}")  # shown with -s


PAGE = """
```yaml title="notes/a.yml"
one: 1
```

1. A step:

    ```console
    $ cat notes/a.yml   # a file
    one: 1
    $ alnico methods linear \\
        --json
    {
    ...
    $ alnico inspect nothing-here
    alnico: model 'nothing-here': ...
    ```

```python
x = 2
print("x is", x)
x + 1
```

```text
x is 2
3
```

<!-- not run: it installs packages -->
```console
$ pip install .
```

```text
of nothing
```
"""


def outcomes(page: str, forks: subprocess.Popen[str], folder: Path) -> list[Outcome]:
    folder.mkdir()
    with session(folder, forks) as running:
        return list(running.run(blocks_of(page)))


@pytest.mark.slow
def test_a_page_is_a_session_in_one_folder(forks: subprocess.Popen[str], tmp_path: Path) -> None:
    assert [o.problem() for o in outcomes(PAGE, forks, tmp_path / "merges")] == [None] * 4


@pytest.mark.slow
def test_what_is_printed_otherwise_or_fails_is_found(forks: subprocess.Popen[str], tmp_path: Path) -> None:
    page = PAGE.replace("    one: 1", "    two: 2").replace("alnico: model", "model").replace("\n3\n", "\n")
    problems = [o.problem() for o in outcomes(page, forks, tmp_path / "merges")]
    assert [p is not None for p in problems] == [True, False, True, True]
    assert problems[0] is not None
    assert "-two: 2\n+one: 1" in problems[0]
    succeeds = PAGE.replace("nothing-here\n", "--help\n")
    assert outcomes(succeeds, forks, tmp_path / "again")[2].problem() is not None


def test_blocks_and_commands_are_read_with_their_lines() -> None:
    blocks = blocks_of(PAGE)
    assert [block.kind for block in blocks] == ["file", "console", "python", "output", "marked", "unknown"]
    assert (blocks[0].title, blocks[0].text) == ("notes/a.yml", "one: 1\n")
    assert [block.line for block in blocks] == [3, 9, 20, 26, 32, 36]
    assert [(c.typed, c.printed, c.line) for c in commands_of(blocks[1])] == [
        ("cat notes/a.yml   # a file", "one: 1", 9),
        ("alnico methods linear \\\n    --json", "{\n...", 11),
        ("alnico inspect nothing-here", "alnico: model 'nothing-here': ...", 15),
    ]
    with pytest.raises(ValueError, match=r"line 7: a console block begins with"):
        list(commands_of(Block("console", "one\n$ two\n", 7)))


@pytest.mark.parametrize(
    ("shown", "printed", "equal"),
    [
        ("out: 3 tensors, 0.1 s, 2.0 GB/s", "out: 3 tensors, 12.34 s, 0.05 GB/s", True),
        ("out: 3 tensors, 0.1 s", "out: 4 tensors, 0.1 s", False),
        ("0.1 s, 1 GB/s", "3.70 s + 46 s compiling kernels (kept for the next run), 1 GB/s", True),
        (
            "done",
            "compiling kernels for this processor, which takes a while\ndone\ntook 1 s + 2 s compiling kernels (kept)",
            True,
        ),
        ("first\n...\nlast", "first\nsecond\nthird\nlast", True),
        ("first\n...\nlast", "first\nlast", True),
        ("first\n...", "first", True),
        ("first\n...\nlast", "first\nsecond\nlost", False),
        ("the ... fox\nends", "the quick\nbrown fox\nends", True),
        ("12.3 GB free", "4.56 GB free", True),
        ("", "something", False),
    ],
)
def test_times_and_speeds_may_differ_and_nothing_else(shown: str, printed: str, equal: bool) -> None:
    assert agrees(shown, printed) is equal


def test_numbers_vary_only_where_a_page_says_so() -> None:
    assert not agrees("score 81.25 [70.0, 90.1]", "score 9 [7.0, 90]")
    assert agrees("score 81.25 [70.0, 90.1]", "score 9 [7.0, 90]", numbers=False)
    assert not agrees("score 81.25 [70.0, 90.1]", "loss 9 [7.0, 90]", numbers=False)
