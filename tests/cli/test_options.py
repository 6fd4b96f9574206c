"""Every command is its function: same options, same defaults, help from the docstring; the pages made from them are up to date."""

from __future__ import annotations

import importlib.util
import inspect
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import click
import pytest

import alnico.cli
from alnico.cli.command import Command
from alnico.cli.main import GROUPS, load_command
from alnico.cli.options import JSON, Flag
from alnico.cli.parameters import CommandParameter, parameters_of
from alnico.cli.summaries import SUMMARIES

ROOT = Path(__file__).parents[2]


def load_maker() -> Any:
    spec = importlib.util.spec_from_file_location("make_cli", ROOT / "docs" / "make_cli.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def options_of(command: Command) -> set[str]:
    """The parameters of a command's functions that are options of it."""
    parameters = [p for f in command.targets for p in inspect.signature(f).parameters.values()]
    return {p.name for p in parameters if p.kind is not p.VAR_KEYWORD} - {"watch", *command.fills}


@pytest.mark.parametrize("name", SUMMARIES)
def test_the_options_of_a_command_are_the_parameters_of_its_function(name: str) -> None:
    command = load_command(name)
    own = {name for name, flag in command.flags.items() if flag.type is not None}
    built = {p.name for p in command.build(name).params} - {"help"}
    assert own <= built
    assert built - own == options_of(command)


@pytest.mark.parametrize("name", SUMMARIES)
def test_an_option_that_is_left_out_has_the_default_of_the_function(name: str) -> None:
    command = load_command(name)
    signature = {n: p for f in reversed(command.targets) for n, p in inspect.signature(f).parameters.items()}
    if name == "merge":
        del signature["out"]  # the last word
    for p in command.parameters:
        if p.name in options_of(command) & set(signature) and not p.is_required and p.default is not None:
            assert p.value(p.default) == signature[p.name].default, p.name


@pytest.mark.parametrize("name", SUMMARIES)
def test_every_option_says_what_it_does(name: str) -> None:
    command = load_command(name)
    assert command.help.endswith(".")
    for p in command.parameters:
        assert p.flag.is_hidden or (p.help[:1] == p.help[:1].upper() and p.help), p.name
        assert "``" not in p.help
        assert ":func:" not in p.help


def test_every_file_is_a_command_in_the_list() -> None:
    folder = Path(alnico.cli.__path__[0]) / "commands"
    files = {p.stem for p in folder.glob("*.py")} - {"__init__"}
    assert files == {name.replace(" ", "_").replace("-", "_") for name in SUMMARIES}
    assert {name.split()[0] for name in SUMMARIES if " " in name} == set(GROUPS)


def test_the_page_and_the_summaries_are_up_to_date() -> None:
    make_cli = load_maker()
    assert make_cli.PAGE.read_text("utf-8") == make_cli.page(), "run: python docs/make_cli.py"
    assert make_cli.SUMMARIES.read_text("utf-8") == make_cli.summaries(), "run: python docs/make_cli.py"


def test_the_help_imports_no_room() -> None:
    code = (
        "import sys; from alnico.cli.main import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "rooms = {n for n in sys.modules if n.startswith('alnico.') and not n.startswith('alnico.cli')}\n"
        "heavy = {'numpy', 'numba', 'torch', 'yaml', 'rich'} & set(sys.modules)\n"
        "print(sorted(rooms | heavy), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "['alnico._package', 'alnico._version', 'alnico.errors']\n"


def example(
    models: str | Sequence[str],
    *,
    memory: int | str = 3 << 30,
    max_rank: int | None = None,
    weights: float | Sequence[float] | None = None,
    others: Literal["save", "leave"] = "save",
    places: Mapping[str, str] | None = None,
    clamp: tuple[float, float] | None = (0.0, 1.0),
    is_exact: bool = True,
    watch: Any = None,
) -> None:
    """Do something.

    Options:
        models: directories, which
            ``max_rank`` limits.
        max_rank: largest rank, if memory allows.
        weights: numbers for max_rank.
        others: choice.
        places: pairs.
        clamp: limits.
        is_exact: exactness.
    """


def parameters(**flags: Flag) -> dict[str, CommandParameter]:
    return {
        p.name: p for p in parameters_of([example], {"clamp": Flag(switch=(None, (0.0, 1.0))), **flags}, ())
    }


def test_types_names_and_texts_come_from_the_function() -> None:
    found = parameters(json=JSON)
    assert list(found) == [
        "models", "memory", "max_rank", "weights", "others", "places", "clamp", "is_exact", "json",
    ]  # fmt: skip
    assert (found["models"].metavar, found["models"].names, found["models"].type) == ("MODEL", (), list[str])
    assert found["models"].help == "Directories, which --max-rank limits."
    assert found["max_rank"].help == "Largest rank, if memory allows."
    assert (found["memory"].default, found["memory"].value("5GB")) == ("3GiB", 5 * 10**9)
    assert [found["weights"].value(text) for text in ("0.5", "1,2")] == [0.5, [1.0, 2.0]]
    assert [found["clamp"].value(on) for on in (False, True)] == [None, (0.0, 1.0)]
    assert found["is_exact"].names == ("--is-exact/--no-is-exact",)
    assert found["others"].type == ("save", "leave")
    assert found["places"].value(["a=b=c"]) == {"a": "b=c"}


@pytest.mark.parametrize(
    ("name", "typed", "message"),
    [
        (
            "memory",
            "lots",
            "--memory: 'lots' is not a size; expected a number with a unit, such as 5GB or 2GiB.",
        ),
        ("weights", "x,1", "--weights: 'x,1' is not a list of numbers. Write them as 0.7,0.3."),
    ],
)
def test_a_value_that_cannot_be_converted_names_the_option(name: str, typed: str, message: str) -> None:
    with pytest.raises(click.BadParameter) as refused:
        parameters()[name].value(typed)
    assert refused.value.message == message


def test_seeds_have_64_bits_in_every_command() -> None:
    for name in SUMMARIES:
        for p in load_command(name).parameters:
            if p.name == "seed":
                with pytest.raises(
                    click.BadParameter, match="--seed: 9223372036854775808 has more than 64 bits"
                ):
                    p.value(1 << 63)


def test_a_flag_for_no_parameter_is_a_mistake() -> None:
    with pytest.raises(AssertionError, match="example has no parameter"):
        parameters(wrong=Flag(also=("-x",)))
