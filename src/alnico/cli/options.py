"""What the commands share: options with their help, and sizes."""

from __future__ import annotations

from typing import Annotated

import typer

RecipeArgument = Annotated[
    str, typer.Argument(help="YAML file of the recipe; - reads it from standard input.", metavar="RECIPE")
]


def checked_seed(seed: int | None) -> int | None:
    if seed is not None and not -(1 << 63) <= seed < 1 << 63:
        raise typer.BadParameter(f"{seed} has more than 64 bits. Choose a smaller seed.")
    return seed


def checked_share(share: float) -> float:
    if not 0 < share <= 1:
        raise typer.BadParameter(f"{share:g} is no share in (0, 1]. The default is 0.2.")
    return share


Threads = Annotated[
    int | None,
    typer.Option("--threads", "-j", "--num-threads", min=1, help="Threads; default: the processors."),
]
Memory = Annotated[str, typer.Option("--memory", help="Budget of the whole process, such as 2GiB.")]
ShardSize = Annotated[
    str | None, typer.Option("--max-shard-size", help="Most bytes in one output file; default: 5GB.")
]
Seed = Annotated[
    int | None,
    typer.Option(
        "--seed",
        "--random-seed",
        callback=checked_seed,
        help="Seed of random methods; default: the recipe's, or 0.",
    ),
]
MergekitShardSize = Annotated[str | None, typer.Option("--out-shard-size", hidden=True)]
Models = Annotated[
    list[str],
    typer.Argument(
        help="Models: directories, files, or owner/name@revision; --models may stand before them.",
        metavar="MODEL...",
    ),
]
Base = Annotated[
    str, typer.Option("--base", help="The model that the others were tuned from.", show_default=False)
]
TopShare = Annotated[
    float,
    typer.Option(
        "--top", callback=checked_share, help="Share of the entries that count as a model's top parameters."
    ),
]
Offline = Annotated[
    bool, typer.Option("--offline", help="No network: of the hub's models, what its cache holds.")
]
AllowCode = Annotated[
    bool,
    typer.Option(
        "--allow-code",
        help="Let the files of tasks and of the search run code and open a storage: only if you trust whoever wrote them.",
    ),
]
StrictLicense = Annotated[
    bool,
    typer.Option(
        "--strict-license",
        help="Refuse models whose licenses conflict or are unknown.",
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Replace OUT when the new one is complete, if that is a model or alnico wrote it."
    ),
]
OverwriteAnything = Annotated[
    bool,
    typer.Option(
        "--overwrite-anything", help="Replace OUT whatever is in it, but for inputs, mounts and devices."
    ),
]
Unrelated = Annotated[
    str, typer.Option("--unrelated", help="Models that were not tuned from one base: error or allow.")
]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        help="Where an input lies now: NAME=PATH, its name as in the lock; may be repeated.",
        metavar="NAME=PATH",
        show_default=False,
    ),
]
FinishedOut = Annotated[str, typer.Argument(help="The directory of a finished merge.", metavar="OUT")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Verbose = Annotated[
    int, typer.Option("--verbose", "-v", count=True, help="Print every tensor.", show_default=False)
]


def size_of(text: str, option: str) -> int:
    """Bytes of an option. Errors: a wrong command line."""
    from alnico.numerics.sizes import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        raise typer.BadParameter(f"{option}: {error}.") from None
