"""Declares what commands add to the parameters of their functions, and converts what is typed."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click

REQUIRED = inspect.Parameter.empty


@dataclass(frozen=True)
class Flag:
    """What a command adds to a parameter of its function. With ``type``: a parameter that only the command has."""

    help: str = ""
    """Instead of the text in the function's docstring."""
    spelled: tuple[str, ...] = ()
    """Names of the option instead of the one derived from the parameter."""
    also: tuple[str, ...] = ()
    """Further names, such as ``-o``."""
    metavar: str | None = None
    usage: str = ""
    """The arguments in the line of usage, if they have several forms."""
    least: float | None = None
    most: float | None = None
    default: Any = None
    """Instead of the function's, if it is not None; :data:`REQUIRED` makes the option required."""
    switch: tuple[Any, Any] | None = None
    """Values of a flag that is off and on, for a parameter that is not a boolean."""
    parse: Callable[[Any, str], Any] | None = None
    """Converts what was typed; gets the option's name for errors."""
    type: Any = None
    complete: Callable[[], Iterable[str]] | None = None
    """The values that a shell may complete."""
    is_option: bool = False
    """Is a positional parameter of the function an option of the command?"""
    is_argument: bool = False
    is_hidden: bool = False
    is_file: bool = False
    """Does the option name a file to write, not a folder?"""
    is_count: bool = False
    takes: Callable[[str], bool] | None = None
    """Which words after the option are its value; without one, the option stands alone and is ''."""


def method_names() -> Iterable[str]:
    """Return the names of all merge methods."""
    from alnico.methods import registry

    return registry()


def dtype_names() -> Iterable[str]:
    return ("bfloat16", "float16", "float32", "float64")


def device_names() -> Iterable[str]:
    """Return what the option of the device may be on this machine."""
    from alnico.devices import devices_here

    gpus = [device.name for device in devices_here() if device.is_gpu]
    return ("auto", "cpu", *(["cuda", *gpus, "cuda:all"] if gpus else []))


def scoring_dtype_names() -> Iterable[str]:
    from alnico.evaluation.placement import DTYPES

    return DTYPES


def size_of(text: str, option: str) -> int:
    """Bytes. Errors: a wrong command line."""
    from alnico.numerics.sizes import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        raise click.BadParameter(f"{option}: {error}.") from None


def numbers_of(text: str, option: str) -> float | list[float]:
    """Numbers separated by commas; one alone is a number. Errors: a wrong command line."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(
            f"{option}: {text!r} is not a list of numbers. Write them as 0.7,0.3."
        ) from None
    return numbers if len(numbers) > 1 else numbers[0]


def pairs_of(words: Sequence[str], _option: str) -> dict[str, str]:
    """A mapping from ``NAME=PATH`` words. Errors: ModelError."""
    from alnico.verification.replan import parse_places

    return parse_places(words)


def seed_of(seed: int, option: str) -> int:
    if not -(1 << 63) <= seed < 1 << 63:
        raise click.BadParameter(f"{option}: {seed} has more than 64 bits. Choose a smaller seed.")
    return seed


def device_of(text: str, option: str) -> str:
    from alnico.devices import EXPECTED, checked_device
    from alnico.errors import AlnicoError

    try:
        return checked_device(text)
    except AlnicoError:
        raise click.BadParameter(f"{option} is {text[:100]!r}; expected {EXPECTED}.") from None


def is_ray_address(word: str) -> bool:
    """Is a word after ``--ray`` the address of a cluster? Other words are models, recipes and folders.

    >>> [is_ray_address(word) for word in ("auto", "10.0.0.1:6379", "ray://head:10001", "[::1]:6379", "recipe.yml", "s3://a/b")]
    [True, True, True, True, False, False]
    """
    return re.fullmatch(r"auto|ray://\S+|(\[[0-9a-fA-F:.]+\]|[\w.-]+):\d{1,5}", word) is not None


def share_of(share: float, option: str) -> float:
    if not 0 < share <= 1:
        raise click.BadParameter(f"{option}: {share:g} is not a share in (0, 1]. The default is 0.2.")
    return share


SHARED: Mapping[str, Flag] = {
    "threads": Flag(also=("-j", "--num-threads"), least=1),
    "seed": Flag(parse=seed_of),
    "device": Flag(parse=device_of, complete=device_names),
    "ray": Flag(metavar="[ADDRESS]", takes=is_ray_address, complete=lambda: ("auto",)),
    "top_share": Flag(spelled=("--top",), parse=share_of),
    "inputs": Flag(spelled=("--input",), metavar="NAME=PATH"),
    "verify_inputs": Flag(metavar="KEY"),
    "allow_unsigned": Flag(metavar="NAME"),
}
"""What is added to a parameter of this name in every command."""

JSON = Flag("Print the result as JSON.", type=bool, default=False)
QUIET = Flag("Print only errors.", type=bool, default=False, also=("-q",))
VERBOSE = Flag("Print every tensor.", type=int, default=0, also=("-v",), is_count=True)
SCORING_DTYPE = Flag(metavar="NAME", complete=scoring_dtype_names)
NEW_FILE = Flag("File for the recipe; default: standard output.", type=str, also=("-o",), is_file=True)
