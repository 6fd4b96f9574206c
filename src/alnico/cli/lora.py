"""``alnico lora fold | combine | extract``: adapters."""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alnico.cli.options import (
    Json,
    Memory,
    Offline,
    Overwrite,
    OverwriteAnything,
    Quiet,
    ShardSize,
    Threads,
    Verbose,
    checked_seed,
    size_of,
)
from alnico.cli.printing import Page, interrupted, json_page, page, say, show_result

if TYPE_CHECKING:
    from alnico.lora.combine import Combined

TOLD = 10
"""Lines of progress, about."""

lora_app = typer.Typer(
    name="lora",
    help="LoRA adapters: fold them into their base, combine them without it, extract them from fine-tunes.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Weights = Annotated[
    str | None,
    typer.Option(
        "--weights",
        "-w",
        help="One for all adapters or one for each, such as 0.7,0.3; default: 1.",
        show_default=False,
    ),
]


def weights_of(text: str | None, adapters: int) -> list[float]:
    """The numbers of ``--weights``, one for each adapter. Errors: a wrong command line."""
    try:
        given = [float(part) for part in (text or "1").split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"--weights: {text!r} is no list of numbers. Write them as 0.7,0.3."
        ) from None
    if len(given) not in (1, adapters):
        raise typer.BadParameter(
            f"--weights: there are {len(given)} for {adapters} adapters. Give one for all, or one for each."
        )
    return given if len(given) == adapters else given * adapters


@lora_app.command()
def fold(
    paths: Annotated[
        list[str],
        typer.Argument(
            help="The base, its adapters, and last the directory to be made (or one file, if it ends in .safetensors).",
            metavar="BASE ADAPTER... OUT",
        ),
    ],
    weights: Weights = None,
    at_once: Annotated[
        bool,
        typer.Option(
            "--at-once", help="Adapters all change the base itself, rather than what those before them made."
        ),
    ] = False,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Dtype of OUT; default: the base's.", show_default=False)
    ] = None,
    threads: Threads = None,
    memory: Memory = "2GiB",
    max_shard_size: ShardSize = None,
    overwrite: Overwrite = False,
    overwrite_anything: OverwriteAnything = False,
    restart: Annotated[bool, typer.Option("--restart", help="Forget an unfinished fold of OUT.")] = False,
    offline: Offline = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Fold LoRA adapters into their base and write the model. The same command takes up an interrupted fold."""
    from alnico.cli import progress, show
    from alnico.lora.fold import fold as folded

    if len(paths) < 3:
        raise typer.BadParameter(
            "fold needs a base, an adapter and, last, a place for the model. Give all three."
        )
    base, *adapters, out = paths
    try:
        with progress.bar(quiet or as_json, verbose) as watch:
            result = folded(
                base,
                adapters,
                out,
                weights=weights_of(weights, len(adapters)),
                at_once=at_once,
                dtype=dtype,
                memory=size_of(memory, "--memory"),
                threads=threads,
                max_shard_size=size_of(max_shard_size or "5GB", "--max-shard-size"),
                overwrite=overwrite,
                overwrite_anything=overwrite_anything,
                restart=restart,
                offline=offline,
                watch=watch,
            )
    except KeyboardInterrupt:
        raise interrupted("fold") from None
    for note in result.plan.notes:
        say(f"note: {note}", quiet or as_json)
    if as_json:
        show_result(json_page(show.result_data(result)), besides=out)
    elif not quiet:
        show_result(page([show.result_line(result)]), besides=out)


@lora_app.command()
def combine(
    adapters: Annotated[
        list[str],
        typer.Argument(
            help="Adapters: directories, or owner/name@revision on the hub; and last the directory to be made.",
            metavar="ADAPTER... OUT",
        ),
    ],
    weights: Weights = None,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            "-m",
            help="svd or cat (weighted sums), a method of task vectors, tsv, iso_c, or a name of PEFT's.",
        ),
    ] = "svd",
    rank: Annotated[
        int | None, typer.Option("--rank", "-r", min=1, help="Largest rank of an update.", show_default=False)
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            "--energy", help="Least share of an update's squares that its rank keeps.", show_default=False
        ),
    ] = None,
    space: Annotated[
        str | None,
        typer.Option(
            "--space",
            help="Where a method of task vectors works: dense (default), core or knots.",
            show_default=False,
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="An option of the method, NAME=VALUE; [a, b] gives one an adapter. May be repeated.",
            show_default=False,
        ),
    ] = None,
    majority_sign_method: Annotated[
        str | None,
        typer.Option(
            "--majority-sign-method", help="PEFT's word for elect: total or frequency.", show_default=False
        ),
    ] = None,
    saved: Annotated[
        str,
        typer.Option(
            "--saved",
            help="Modules that adapters hold whole, where the result needs the base: error, average or drop.",
        ),
    ] = "error",
    unrelated: Annotated[
        str, typer.Option("--unrelated", help="Adapters that name different bases: error or allow.")
    ] = "error",
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            help="Of the output; default: float32, float64 where an adapter is.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", callback=checked_seed, help="Seed of random methods.")] = 0,
    memory: Memory = "2GiB",
    threads: Threads = None,
    overwrite: Overwrite = False,
    overwrite_anything: OverwriteAnything = False,
    offline: Offline = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Combine LoRA adapters of one base into one adapter, from their files alone."""
    from alnico.lora.combine import combine as combined

    if len(adapters) < 2:
        raise typer.BadParameter(
            "combine needs an adapter and, after it, the directory to be made. Give both."
        )
    options = dict(_setting(text) for text in settings or ())
    if majority_sign_method is not None:
        options["majority_sign_method"] = majority_sign_method
    found = combined(
        adapters[:-1],
        adapters[-1],
        weights=None if weights is None else weights_of(weights, len(adapters) - 1),
        method=method,
        rank=rank,
        energy=energy,
        space=space,
        saved=saved,
        unrelated=unrelated,
        dtype=dtype,
        seed=seed,
        memory=size_of(memory, "--memory"),
        threads=threads,
        overwrite=overwrite,
        overwrite_anything=overwrite_anything,
        offline=offline,
        watch=_watch(quiet or as_json),
        **options,
    )
    for note in found.notes:
        say(f"note: {note}", quiet or as_json)
    if as_json:
        show_result(json_page(found.data()), besides=found.path)
    elif not quiet:
        show_result(combined_text(found, verbose), besides=found.path)


def combined_text(found: Combined, verbose: int) -> Page:
    """The result for people; with ``verbose`` a line an update."""
    from alnico.numerics.sizes import format_size

    ranks = sorted({m.rank for m in found.modules})
    shown = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    lines = [f"{m.name}  rank {m.rank}  error {m.error:.3g}" for m in found.modules] if verbose else []
    lines.append(
        f"{found.path}: {len(found.modules)} updates of rank {shown}, error {found.error:.3g}, {format_size(found.byte_size)} in "
        f"{found.seconds:.1f} s"
    )
    if not verbose and found.error > 0:
        worst = max(found.modules, key=lambda m: m.error)
        lines.append(f"largest error: {worst.error:.3g}, {worst.name}")
    return page(lines)


def _watch(quiet: bool) -> Callable[[int, int], None] | None:
    """What prints some of the steps to stderr, where they take longer than one can wait without a word."""
    begin = time.monotonic()

    def watch(done: int, total: int) -> None:
        if time.monotonic() - begin > 2 and (done % max(1, total // TOLD) == 0 or done == total):
            say(f"combined {done}/{total}")

    return None if quiet else watch


def _setting(text: str) -> tuple[str, Any]:
    """An option and its value, read as in a recipe."""
    import yaml

    name, equals, value = text.partition("=")
    try:
        read = yaml.safe_load(value)
    except yaml.YAMLError:
        read = None
    if not equals or not name.strip().isidentifier() or read is None:
        raise typer.BadParameter(f"--set: {text!r} is no option; expected NAME=VALUE, such as density=0.5.")
    return name.strip(), read


class Others(StrEnum):
    """What becomes of norms and biases."""

    save = "save"
    leave = "leave"


class Embeddings(StrEnum):
    """What becomes of embeddings and heads."""

    lora = "lora"
    save = "save"
    leave = "leave"


@lora_app.command()
def extract(
    tuned: Annotated[
        str,
        typer.Argument(help="The fine-tune: directory, file, or owner/name@revision.", metavar="FINETUNED"),
    ],
    base: Annotated[str, typer.Argument(help="The model that it was tuned from.", metavar="BASE")],
    out: Annotated[str, typer.Argument(help="Directory of the adapter, to be made.", metavar="OUT")],
    rank: Annotated[
        int | None,
        typer.Option("--rank", "-r", min=1, help="Rank of every matrix; default: 32.", show_default=False),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            "--energy", help="Share of each matrix's change to keep, such as 0.9.", show_default=False
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            "--size",
            help="Bytes of the adapter, such as 50MB, spent where they help most.",
            show_default=False,
        ),
    ] = None,
    max_rank: Annotated[
        int | None,
        typer.Option("--max-rank", min=1, help="Largest rank under --energy and --size.", show_default=False),
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Exact singular vectors instead of random directions.")
    ] = False,
    others: Annotated[
        Others, typer.Option("--others", help="Norms, biases and what else is no matrix.")
    ] = Others.save,
    embeddings: Annotated[
        Embeddings, typer.Option("--embeddings", help="Embeddings and heads.")
    ] = Embeddings.lora,
    include: Annotated[
        list[str] | None,
        typer.Option(
            "--include", help="Only tensors that fit this filter; may be repeated.", show_default=False
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            "--exclude", help="No tensors that fit this filter; may be repeated.", show_default=False
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Dtype of the adapter: float32, bfloat16 or float16.")
    ] = "float32",
    seed: Annotated[int, typer.Option("--seed", help="Seed of the random directions.")] = 0,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Fold the adapter back and measure what is lost.")
    ] = True,
    threads: Threads = None,
    memory: Memory = "2GiB",
    overwrite: Overwrite = False,
    overwrite_anything: OverwriteAnything = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Forget an unfinished extraction of OUT.")
    ] = False,
    offline: Offline = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Write what a fine-tune changed of its base as a LoRA adapter. The same command takes up an interrupted extraction."""
    from alnico.cli import progress
    from alnico.cli.extracting import extraction_text
    from alnico.lora.extract import extract as extracted

    try:
        with progress.bar(quiet or as_json, 0) as watch:
            found = extracted(
                tuned,
                base,
                out,
                rank=rank,
                energy=energy,
                size=None if size is None else size_of(size, "--size"),
                max_rank=max_rank,
                exact=exact,
                others=others.value,
                embeddings=embeddings.value,
                include=include or (),
                exclude=exclude or (),
                dtype=dtype,
                seed=seed,
                verify=verify,
                memory=size_of(memory, "--memory"),
                threads=threads,
                overwrite=overwrite,
                overwrite_anything=overwrite_anything,
                restart=restart,
                offline=offline,
                watch=watch,
            )
    except KeyboardInterrupt:
        raise interrupted("extraction") from None
    if as_json:
        told = {**found.data(), "out": str(found.path), "seconds": found.seconds, "resumed": found.resumed}
        show_result(json_page(told), besides=found.path)
    elif not quiet:
        show_result(extraction_text(found, verbose), besides=found.path)
