"""The command line: ``alnico merge | plan | inspect | compare | diff | evaluate | suggest | weights | soup | search | adamerge | statistics | verify | reproduce | sign | push | methods | schema | demo``."""

from __future__ import annotations

from alnico.cli import entry

_guarded = entry.guard()  # before the slow imports: Ctrl-C in their midst is a quiet end

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from alnico.cli import printing
from alnico.cli.lora import lora_app
from alnico.cli.options import (
    AllowCode,
    Base,
    FinishedOut,
    Inputs,
    Json,
    Memory,
    MergekitShardSize,
    Models,
    Offline,
    Overwrite,
    OverwriteAnything,
    Quiet,
    RecipeArgument,
    Seed,
    ShardSize,
    StrictLicense,
    Threads,
    TopShare,
    Unrelated,
    Verbose,
    checked_seed,
    size_of,
)
from alnico.cli.printing import (
    EXIT_CODE,
    Page,
    interrupted,
    is_terminal,
    json_page,
    page,
    recipe_page,
    say,
    say_page,
    show_result,
)
from alnico.errors import DIFFERENT, INTERRUPTED, AlnicoError, RecipeError, RunError


class TakesModels(TyperCommand):
    """A command whose models may stand after ``--models``, as many as there are, or by themselves."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [a.removeprefix("--models=") for a in args if a != "--models"])


app = typer.Typer(
    name="alnico",
    help="Merges neural networks in weight space: exactly, inside a memory budget, at nearly the speed of a file copy.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(lora_app)

IGNORED = {
    "copy_tokenizer": "the tokenizer is always carried over",
    "write_model_card": "the model card is always written",
    "lazy_unpickle": "files are always read in part",
    "low_cpu_memory": "--memory is the limit that holds",
}


class Statistic(StrEnum):
    """Kinds of statistics."""

    fisher = "fisher"
    gram = "gram"


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from alnico._version import __version__

        show_result(page([f"alnico {__version__}"]))
        raise typer.Exit


VerifyInputs = Annotated[
    list[str] | None,
    typer.Option(
        "--verify-inputs",
        help="Public key (PEM file): every input must have a signature that holds with it, or with another of these; may be repeated.",
        metavar="KEY",
        show_default=False,
    ),
]
AllowUnsigned = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-unsigned",
        help="With --verify-inputs: an input that need not be signed, as the recipe names it or by its path; may be repeated.",
        metavar="NAME",
        show_default=False,
    ),
]


@app.command()
def merge(
    recipe: RecipeArgument,
    out: Annotated[
        str,
        typer.Argument(help="Directory to be made; or one file, if it ends in .safetensors.", metavar="OUT"),
    ],
    threads: Threads = None,
    memory: Memory = "2GiB",
    seed: Seed = None,
    max_shard_size: ShardSize = None,
    out_shard_size: MergekitShardSize = None,
    overwrite: Overwrite = False,
    overwrite_anything: OverwriteAnything = False,
    restart: Annotated[bool, typer.Option("--restart", help="Forget an unfinished merge of OUT.")] = False,
    strict_license: StrictLicense = False,
    verify_inputs: VerifyInputs = None,
    allow_unsigned: AllowUnsigned = None,
    require_signed: Annotated[
        bool, typer.Option("--require-signed", help="With --verify-inputs: allow no --allow-unsigned.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    offline: Offline = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
    copy_tokenizer: Annotated[
        bool | None, typer.Option("--copy-tokenizer/--no-copy-tokenizer", hidden=True)
    ] = None,
    write_model_card: Annotated[
        bool | None, typer.Option("--write-model-card/--no-write-model-card", hidden=True)
    ] = None,
    lazy_unpickle: Annotated[
        bool | None, typer.Option("--lazy-unpickle/--no-lazy-unpickle", hidden=True)
    ] = None,
    low_cpu_memory: Annotated[
        bool | None, typer.Option("--low-cpu-memory/--no-low-cpu-memory", hidden=True)
    ] = None,
    allow_crimes: Annotated[
        bool | None, typer.Option("--allow-crimes/--no-allow-crimes", hidden=True)
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code/--no-trust-remote-code", hidden=True)
    ] = False,
    cuda: Annotated[bool, typer.Option("--cuda/--no-cuda", hidden=True)] = False,
    device: Annotated[str | None, typer.Option("--device", hidden=True)] = None,
) -> None:
    """Merge the models of a recipe into OUT. The same command takes up an interrupted merge."""
    given = dict(locals())
    if trust_remote_code:
        raise typer.BadParameter("--trust-remote-code: alnico runs no code of a model. Leave the option out.")
    if cuda or (device is not None and device != "cpu"):
        option = "--cuda" if cuda else "--device"
        raise typer.BadParameter(
            f"{option}: this version merges on the processor only, at a disk's speed. Leave the option out."
        )
    for name, why in IGNORED.items():
        if given[name] is not None:
            say(
                f"note: --{'' if given[name] else 'no-'}{name.replace('_', '-')} has no effect: {why}.", quiet
            )
    if (require_signed or allow_unsigned) and not verify_inputs:
        option = "--require-signed" if require_signed else "--allow-unsigned"
        raise typer.BadParameter(f"{option} needs a key to verify with. Give --verify-inputs KEY.")
    if require_signed and allow_unsigned:
        raise typer.BadParameter("--require-signed allows no --allow-unsigned. Leave one out.")
    if dry_run:
        return plan(
            recipe,
            threads,
            memory,
            seed,
            max_shard_size,
            out_shard_size,
            strict_license,
            offline,
            as_json,
            verbose,
            out,
            verify_inputs,
            allow_unsigned,
        )
    from alnico import api
    from alnico.cli import progress, show

    memory_bytes, shard_bytes = size_of(memory, "--memory"), _shard_size(max_shard_size, out_shard_size)
    try:
        with progress.bar(quiet or as_json, verbose) as watch:
            results = api.merge_documents(
                _allowing(_recipe(recipe)) if allow_crimes else _recipe(recipe),
                out,
                memory=memory_bytes,
                threads=threads,
                max_shard_size=shard_bytes,
                seed=seed,
                overwrite=overwrite,
                overwrite_anything=overwrite_anything,
                restart=restart,
                offline=offline,
                strict_license=strict_license,
                verify_inputs=verify_inputs or (),
                allow_unsigned=allow_unsigned or (),
                require_signed=require_signed,
                watch=watch,
            )
    except KeyboardInterrupt:
        raise interrupted("merge") from None
    if as_json:
        show_result(json_page(_one_or_all([show.result_data(result) for result in results])), besides=out)
    elif not quiet:
        for note in dict.fromkeys(note for result in results for note in result.plan.notes):
            say(f"note: {note}", quiet)
        for result in results:
            for line in show.weighing_lines(result.plan):
                say(f"weights: {line}", quiet)
            show_result(page([show.result_line(result)]), besides=out)
    return None


@app.command()
def plan(
    recipe: RecipeArgument,
    threads: Threads = None,
    memory: Memory = "2GiB",
    seed: Seed = None,
    max_shard_size: ShardSize = None,
    out_shard_size: MergekitShardSize = None,
    strict_license: StrictLicense = False,
    offline: Offline = False,
    as_json: Json = False,
    verbose: Verbose = 0,
    out: Annotated[
        str, typer.Option("--out", help="Where the output would go: its disk is checked.", show_default=False)
    ] = "",
    verify_inputs: VerifyInputs = None,
    allow_unsigned: AllowUnsigned = None,
) -> None:
    """Print what a merge would do, from headers alone: what is merged, copied, dropped and why, bytes, memory, disk."""
    if allow_unsigned and not verify_inputs:
        raise typer.BadParameter("--allow-unsigned needs a key to verify with. Give --verify-inputs KEY.")
    from alnico import api
    from alnico.checkpoint.output_path import check_publishable
    from alnico.cli import show
    from alnico.output.disk_space import check_disk

    memory_bytes, shard_bytes = size_of(memory, "--memory"), _shard_size(max_shard_size, out_shard_size)
    plans = api.plan_documents(
        _recipe(recipe),
        memory=memory_bytes,
        threads=threads,
        max_shard_size=shard_bytes,
        single_file=Path(out).name if out.endswith(".safetensors") else None,
        seed=seed,
        offline=offline,
        strict_license=strict_license,
        verify_inputs=verify_inputs or (),
        allow_unsigned=allow_unsigned or (),
    )
    if out:
        check_publishable(Path(out), is_tried=False)
        for made in plans:
            check_disk(made, Path(out))
    if as_json:
        show_result(json_page(_one_or_all([made.summary() for made in plans])))
    else:
        show_result(
            Page("\n\n".join(show.plan_text(made, verbose, Path(out) if out else None) for made in plans))
        )


@app.command()
def inspect(
    model: Annotated[
        str,
        typer.Argument(
            help="A model directory, a .safetensors file, or owner/name@revision on the hub.", metavar="MODEL"
        ),
    ],
    offline: Offline = False,
    as_json: Json = False,
    verbose: Verbose = 0,
) -> None:
    """Print a model's tensors, dtypes, sizes, architecture and vocabulary; of a LoRA adapter its ranks, scales and modules."""
    import alnico
    from alnico.cli import adapters, show

    found = alnico.inspect(model, offline=offline)
    text = adapters.adapter_text if found.kind == "adapter" else show.model_text
    show_result(json_page(found.data()) if as_json else text(found.data(), verbose))


@app.command()
def compare(
    models: Annotated[
        list[str],
        typer.Argument(
            help="The parents, and last the merged model: directories, files, or owner/name@revision.",
            metavar="PARENT... MERGED",
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            help="What the parents were tuned from; default: the one MERGED records.",
            show_default=False,
        ),
    ] = None,
    scores: Annotated[
        list[str] | None,
        typer.Option(
            "--scores", help="A .json or .csv file, or TASK:MODEL=SCORE; may be repeated.", show_default=False
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            "--out", "-o", help="Folder for the numbers, the tables and the page.", show_default=False
        ),
    ] = None,
    top_share: TopShare = 0.2,
    threads: Threads = None,
    memory: Memory = "2GiB",
    offline: Offline = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Print what a merged model kept of its parents: distances, task vectors, signs, largest parameters, scores; by group."""
    from alnico import api
    from alnico.cli import progress
    from alnico.cli.keeping import kept_text

    if len(models) < 2:
        raise typer.BadParameter("compare needs a parent and, after it, the merged model. Give both.")
    with progress.bar(quiet or as_json, 0) as watch:
        found = api.compare(
            models[:-1],
            models[-1],
            base=base,
            scores=scores or (),
            out=out,
            top_share=top_share,
            memory=size_of(memory, "--memory"),
            threads=threads,
            offline=offline,
            watch=watch,
        )
    for note in found.notes:
        say(f"note: {note}", quiet or as_json)
    if as_json:
        show_result(json_page(found.data()), besides=out)
    elif not quiet:
        show_result(kept_text(found, verbose), besides=out)
    if out is not None:
        say(_written(out), quiet or as_json)


@app.command()
def diff(
    a: Annotated[
        str, typer.Argument(help="A model: directory, file, or owner/name@revision on the hub.", metavar="A")
    ],
    b: Annotated[str, typer.Argument(help="The model that is compared with it.", metavar="B")],
    threads: Threads = None,
    memory: Memory = "2GiB",
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="Exit with 14 if the models differ, with 0 if not.")
    ] = False,
    offline: Offline = False,
    as_json: Json = False,
    verbose: Verbose = 0,
) -> None:
    """Print which tensors of two models differ, and by how much: by content hash, values, keys of configs, side files."""
    from alnico import api
    from alnico.cli.difference import difference_text

    found = api.diff(a, b, memory=size_of(memory, "--memory"), threads=threads, offline=offline)
    show_result(
        json_page(found.data()) if as_json else difference_text(found, verbose),
        besides=EXIT_CODE if exit_code else None,
    )
    if exit_code and not found.is_equal:
        raise typer.Exit(DIFFERENT)


@app.command(cls=TakesModels)
def analyze(
    models: Models,
    base: Base,
    out: Annotated[
        str | None,
        typer.Option(
            "--out", "-o", help="Folder for the numbers, the tables and the page.", show_default=False
        ),
    ] = None,
    top_share: TopShare = 0.2,
    subspace_side: Annotated[
        int,
        typer.Option(
            "--subspace-side",
            min=0,
            help="Compare singular vectors of matrices up to this smaller side; 0: none.",
        ),
    ] = 512,
    threads: Threads = None,
    memory: Memory = "2GiB",
    restart: Annotated[
        bool, typer.Option("--restart", help="Forget an unfinished analysis of the folder.")
    ] = False,
    offline: Offline = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Print how far models are from their base, where, and whether they pull the same parameters in opposite directions."""
    from alnico import api
    from alnico.cli import progress
    from alnico.cli.analysing import analysis_text

    try:
        with progress.bar(quiet or as_json, 0) as watch:
            found = api.analyze(
                models,
                base=base,
                out=out,
                top_share=top_share,
                subspace_side=subspace_side,
                memory=size_of(memory, "--memory"),
                threads=threads,
                restart=restart,
                offline=offline,
                watch=watch,
            )
    except KeyboardInterrupt:
        raise interrupted("analysis" if out is not None else None) from None
    if as_json:
        show_result(json_page(found.data(), None), besides=out)
    elif not quiet:
        show_result(analysis_text(found, verbose), besides=out)
    if out is not None:
        say(_written(out), quiet or as_json)


@app.command(cls=TakesModels)
def evaluate(
    tasks: Annotated[str, typer.Option("--tasks", "-t", help="YAML file of the tasks.", metavar="FILE")],
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="Models: transformers checkpoints, or owner/name@revision; for functions of one's own also weights alone. --models may "
            "stand before them.",
            metavar="MODEL...",
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", help="The model that the others were tuned from.", show_default=False),
    ] = None,
    merged: Annotated[
        list[str] | None,
        typer.Option(
            "--merged",
            help="A merge of the models, compared with each and the base; may be repeated.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="File for the JSON.", show_default=False)
    ] = None,
    report: Annotated[
        str | None,
        typer.Option(
            "--report", help="Folder for the JSON and the page.", metavar="FOLDER", show_default=False
        ),
    ] = None,
    offline: Offline = False,
    allow_code: AllowCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Annotated[
        int, typer.Option("--verbose", "-v", count=True, help="Print every interval.", show_default=False)
    ] = 0,
) -> None:
    """Print scores of models on tasks, with intervals; of merges, paired differences and what they kept of their parents."""
    from alnico import api
    from alnico.checkpoint.durable import replace_file
    from alnico.checkpoint.output_path import check_new_file, is_stream
    from alnico.checkpoint.overwrite import is_evaluation
    from alnico.cli.evaluating import scorecard_text
    from alnico.errors import OutputError

    if not models and not merged and base is None:
        raise typer.BadParameter("evaluate needs a model at least. Give one.")
    if out is not None and (os.path.isdir(out) or not os.path.isdir(Path(out).parent)):
        raise OutputError(
            f"{out}: cannot be written; expected a file in a folder that is there. Choose another name."
        )
    is_streamed = out is not None and is_stream(Path(out))
    if out is not None and not is_streamed and not is_evaluation(Path(out)):
        check_new_file(Path(out))
    found = api.evaluate(
        models or (),
        tasks,
        base=base,
        merged=merged or (),
        out=report,
        offline=offline,
        allow_code=allow_code,
        watch=lambda model, task, score: say(f"{model}  {task}  {score.value:.4g}", quiet or as_json),
    )
    text = json_page(found.data())
    if out is not None:
        if is_streamed:
            Path(out).write_text(text + "\n", "utf-8")
        else:
            replace_file(Path(out), text + "\n")
    if as_json:
        show_result(text, besides=out or report)
    elif not quiet:
        show_result(scorecard_text(found, verbose), besides=out or report)
    if report is not None:
        say(_written(report), quiet or as_json)


@app.command(cls=TakesModels)
def suggest(
    models: Annotated[
        list[str] | None, typer.Argument(help="Models, as for analyze.", metavar="MODEL...")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", help="The model that the others were tuned from.", show_default=False),
    ] = None,
    analysis: Annotated[
        str | None,
        typer.Option(
            "--analysis", help="An analysis, instead of base and models: its folder.", metavar="FOLDER"
        ),
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="File of the recipe; default: standard output.")
    ] = None,
    threads: Threads = None,
    memory: Memory = "2GiB",
    offline: Offline = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Print a recipe to begin with, and why: from distances, cosines and conflicts of the models."""
    from alnico import api
    from alnico.checkpoint.output_path import check_new_file, write_new_file
    from alnico.cli import progress
    from alnico.errors import MismatchError

    if (base is None or not models) if analysis is None else (base is not None or bool(models)):
        raise typer.BadParameter(
            "suggest needs --base and models, or --analysis alone. Give the one or the other."
        )
    if out is not None:
        check_new_file(Path(out))
    with progress.bar(quiet or as_json, 0) as watch:
        found = api.suggest(
            models or (),
            base=base,
            analysis=analysis,
            folder=Path(out).parent if out else ".",
            memory=size_of(memory, "--memory"),
            threads=threads,
            offline=offline,
            watch=watch,
        )
    if found.recipe is None:
        raise MismatchError(*found.findings, *found.reasons)
    if out is not None:
        write_new_file(Path(out), found.recipe)
    if as_json:
        show_result(json_page(found.data()), besides=out)
        return
    for said in (*found.findings, *(found.reasons if out else ()), *found.warnings):
        say(f"note: {said}", quiet)
    show_result(page([f"{out}: {found.method}"]) if out else recipe_page(found.recipe), besides=out)


@app.command(cls=TakesModels)
def weights(
    models: Models,
    base: Base,
    mode: Annotated[str, typer.Option("--mode", help="linear, power or exp.")] = "exp",
    beta: Annotated[float, typer.Option("--beta", help="Of exp: exp(-beta L / mean L).")] = 1.0,
    alpha: Annotated[float, typer.Option("--alpha", help="Of power: 1 / L^alpha.")] = 1.5,
    scale: Annotated[float, typer.Option("--scale", help="What the weights sum to.")] = 1.0,
    per: Annotated[
        str, typer.Option("--per", help="Norms of the model, each layer or each tensor.")
    ] = "model",
    analysis: Annotated[
        str | None,
        typer.Option(
            "--from", help="Norms of an analysis: its folder.", metavar="FOLDER", show_default=False
        ),
    ] = None,
    threads: Threads = None,
    memory: Memory = "2GiB",
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Print weights that follow from how far models are from their base, and the line of a recipe that gives them."""
    from alnico import api
    from alnico.cli import show

    if base in models:
        raise typer.BadParameter(f"{base} is the base, and no model beside it. Leave it out of the models.")
    found = api.norm_weights(
        models,
        base=base,
        mode=mode,
        beta=beta,
        alpha=alpha,
        scale=scale,
        per=per,
        analysis=analysis,
        threads=threads,
        memory=size_of(memory, "--memory"),
        offline=offline,
    )
    if not as_json:
        for note in found.notes:
            say(f"note: {note}", False)
    show_result(json_page(found.data()) if as_json else show.weights_text(found))


@app.command(cls=TakesModels)
def soup(
    models: Models,
    tasks: Annotated[
        str,
        typer.Option(
            "--tasks", help="YAML file of the tasks to choose by.", metavar="FILE", show_default=False
        ),
    ],
    order: Annotated[
        str,
        typer.Option(
            "--order",
            help="sorted: each model once, the best first. all: the best of all in each round. uniform: all.",
        ),
    ] = "sorted",
    replace: Annotated[
        bool, typer.Option("--replace", help="With --order all: a model may come in again.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Keep only what is better, not what is as good.")
    ] = False,
    least_gain: Annotated[
        float, typer.Option("--least-gain", help="Gain that is worth a model; below 0, a loss.")
    ] = 0.0,
    objective: Annotated[str, typer.Option("--objective", help="mean, or the name of a task.")] = "mean",
    base: Annotated[
        str | None,
        typer.Option("--base", help="Model whose config and tokenizer the soup has.", show_default=False),
    ] = None,
    report: Annotated[
        str | None,
        typer.Option(
            "--report",
            help="YAML file of other tasks, to score the soup by.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    shared: Annotated[
        bool, typer.Option("--shared", help="The report may have examples that chose the soup.")
    ] = False,
    unrelated: Unrelated = "error",
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="File of the recipe; default: standard output.")
    ] = None,
    threads: Threads = None,
    memory: Memory = "2GiB",
    offline: Offline = False,
    allow_code: AllowCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find which models to average by scoring the averages, and print the recipe. Needs alnico[eval]."""
    from alnico import api
    from alnico.checkpoint.output_path import check_new_file, write_new_file
    from alnico.cli import soups
    from alnico.cli.evaluating import scorecard_text

    if out is not None:
        check_new_file(Path(out))
    found = api.soup(
        models,
        tasks,
        order=order,
        replace=replace,
        strict=strict,
        least_gain=least_gain,
        objective=objective,
        base=base,
        unrelated=unrelated,
        threads=threads,
        memory=size_of(memory, "--memory"),
        offline=offline,
        allow_code=allow_code,
        report=report,
        shared=shared,
        watch=None if as_json else lambda step: say(soups.step_text(step), quiet),
    )
    recipe = found.recipe(Path(out).parent if out else ".")
    if out is not None:
        write_new_file(Path(out), recipe)
    if as_json:
        show_result(json_page({**found.data(), "recipe": recipe}), besides=out)
        return
    say_page(soups.soup_text(found), quiet)
    if found.report is not None:
        say_page(page(["", f"{report}:", *scorecard_text(found.report, 0).split("\n")]), quiet)
    show_result(page([out]) if out is not None else recipe_page(recipe), besides=out)


@app.command(cls=TakesModels)
def adamerge(
    models: Models,
    base: Base,
    tasks: Annotated[
        str,
        typer.Option(
            "--tasks",
            help="Tasks file; its inputs are learned from, its labels never read (label: null where there are none).",
            show_default=False,
        ),
    ],
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            "-o",
            help="File of the recipe, with its course beside it; default: standard output.",
            show_default=False,
        ),
    ] = None,
    per: Annotated[
        str, typer.Option("--per", help="What has a coefficient of each model: task, layer or tensor.")
    ] = "tensor",
    plus: Annotated[
        bool, typer.Option("--plus", help="AdaMerging++: after the trim and election of TIES.")
    ] = False,
    density: Annotated[
        float, typer.Option("--density", help="Share of a task vector that --plus keeps.")
    ] = 0.2,
    scope: Annotated[
        str, typer.Option("--scope", help="Of what --density is the share: model or tensor.")
    ] = "model",
    steps: Annotated[int, typer.Option("--steps", help="Steps, each of a batch of every task.")] = 500,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Inputs of a task in a step.")] = 16,
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", help="Adam's: about how far a step moves a coefficient.")
    ] = 1e-3,
    init: Annotated[float, typer.Option("--init", help="Every coefficient at the beginning.")] = 0.3,
    clamp: Annotated[bool, typer.Option("--clamp/--no-clamp", help="Keep coefficients in [0, 1].")] = True,
    seed: Annotated[int, typer.Option("--seed", callback=checked_seed, help="Decides the batches.")] = 0,
    unrelated: Unrelated = "error",
    memory: Annotated[
        str,
        typer.Option(
            "--memory", help="Held of the task vectors, such as 2GiB; the rest is read at each step."
        ),
    ] = "2GiB",
    offline: Offline = False,
    allow_code: AllowCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Learn the coefficients of task vectors from inputs without labels (AdaMerging), and write the recipe."""
    from alnico import api
    from alnico.cli import learning

    found = api.adamerge(
        models,
        base=base,
        tasks=tasks,
        out=out,
        per=per,
        plus=plus,
        density=density,
        scope=scope,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        init=init,
        clamp=(0.0, 1.0) if clamp else None,
        seed=seed,
        unrelated=unrelated,
        memory=size_of(memory, "--memory"),
        offline=offline,
        allow_code=allow_code,
        watch=None if quiet or as_json else learning.step_watch(steps),
    )
    for line in learning.note_lines(found, tasks):
        say(line, quiet or as_json)
    if as_json:
        show_result(json_page(found.data(), None), besides=out)
    elif out is None:
        show_result(recipe_page(found.recipe))
    elif not quiet:
        show_result(learning.coefficients_text(found, verbose), besides=out)
        say(f"written: {out} and its course", quiet)


@app.command(cls=TakesModels)
def statistics(
    kind: Annotated[
        Statistic, typer.Argument(help="fisher, for merge_method fisher; gram, for regmean.", metavar="KIND")
    ],
    models: Models,
    tasks: Annotated[
        list[str],
        typer.Option(
            "--tasks",
            help="Tasks file, whose inputs are measured on; of several models one for all, or one each.",
            show_default=False,
        ),
    ],
    out: Annotated[
        str,
        typer.Option(
            "--out",
            "-o",
            help="Directory to be made; of several models, one for each in it.",
            show_default=False,
        ),
    ],
    examples: Annotated[int, typer.Option("--examples", min=1, help="Most inputs of a task.")] = 256,
    exact: Annotated[
        bool, typer.Option("--exact/--sampled", help="fisher: all classes of an input, or one that is drawn.")
    ] = True,
    seed: Annotated[
        int, typer.Option("--seed", callback=checked_seed, help="fisher: decides the classes of --sampled.")
    ] = 0,
    plus: Annotated[
        bool,
        typer.Option("--plus", help="gram: for RegMean++, of all models together, layer by merged layer."),
    ] = False,
    alpha: Annotated[
        float, typer.Option("--alpha", min=0, max=1, help="gram --plus: regmean's; give the recipe the same.")
    ] = 0.9,
    ridge: Annotated[
        float, typer.Option("--ridge", min=0, max=1, help="gram --plus: regmean's; give the recipe the same.")
    ] = 1e-6,
    normalize: Annotated[
        bool, typer.Option("--normalize", help="gram --plus: regmean's; give the recipe the same.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace statistics that stand there.")
    ] = False,
    overwrite_anything: Annotated[
        bool,
        typer.Option("--overwrite-anything", help="Write also into a folder of other things, which stay."),
    ] = False,
    offline: Offline = False,
    allow_code: AllowCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure what Fisher merging or RegMean needs of models, on inputs without labels, as files that their recipes name."""
    from alnico import api
    from alnico.cli import measuring

    watch = None if quiet or as_json else measuring.watch
    general: dict[str, Any] = {
        "examples": examples,
        "offline": offline,
        "allow_code": allow_code,
        "overwrite": overwrite,
        "overwrite_anything": overwrite_anything,
        "watch": watch,
    }
    if kind is Statistic.fisher:
        if len(models) > 1 or len(tasks) > 1 or plus:
            raise typer.BadParameter(
                "fisher measures one model on one tasks file, and has no --plus. Give one model at a time."
            )
        written = [
            api.fisher_statistics(
                models[0],
                out,
                tasks=tasks[0],
                expectation="exact" if exact else "sampled",
                seed=seed,
                **general,
            )
        ]
    else:
        settings: dict[str, Any] = {"plus": plus, "alpha": alpha, "ridge": ridge, "normalize": normalize}
        written = list(
            api.gram_statistics(
                models, out, tasks=tasks if len(tasks) > 1 else tasks[0], **settings, **general
            )
        )
    if as_json:
        show_result(
            json_page({"kind": kind.value, "written": [str(path) for path in written]}, None), besides=out
        )
    elif not quiet:
        settings = {"alpha": alpha, "ridge": ridge, "normalize": normalize} if plus else {}
        show_result(recipe_page(measuring.recipe_hint(kind.value, models, written, settings)), besides=out)


@app.command()
def search(
    recipe: Annotated[
        str,
        typer.Argument(
            help="Recipe with {search: [least, greatest]} or {choice: [...]} in place of values.",
            metavar="RECIPE",
        ),
    ],
    out: Annotated[
        str | None,
        typer.Option("--out", "-o", help="Folder of the search; default: NAME-search.", show_default=False),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", help="Tasks to search on; default: those of the recipe.", show_default=False),
    ] = None,
    report: Annotated[
        str | None,
        typer.Option(
            "--report",
            help="Tasks to report on, never searched on; or `same`: those searched on.",
            show_default=False,
        ),
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option("--trials", min=1, help="Trials, those of earlier runs among them.", show_default=False),
    ] = None,
    workers: Annotated[int, typer.Option("--workers", "-w", min=1, help="Processes that score trials.")] = 1,
    ray: Annotated[bool, typer.Option("--ray", help="The workers are on a cluster of Ray.")] = False,
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads", "-j", min=1, help="Threads of each worker; default: the processors, shared out."
        ),
    ] = None,
    memory: Memory = "2GiB",
    offline: Offline = False,
    allow_code: AllowCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Search the values that a recipe leaves open, for the best scores on tasks. The same command goes on with a search."""
    from alnico import api
    from alnico.cli import searching

    folder = out or f"{Path(recipe).stem}-search"
    found = api.search(
        recipe,
        out=folder,
        tasks=tasks,
        report=report,
        trials=trials,
        workers=workers,
        engine="ray" if ray else "local",
        threads=threads,
        memory=size_of(memory, "--memory"),
        offline=offline,
        allow_code=allow_code,
        watch=searching.watcher(quiet or as_json),
    )
    show_result(
        json_page(found.data()) if as_json else searching.search_text(found, Path(folder)), besides=folder
    )


@app.command()
def verify(
    out: FinishedOut,
    against_inputs: Annotated[
        bool,
        typer.Option(
            "--against-inputs", help="Make blocks again from the inputs, and compare them bit for bit."
        ),
    ] = False,
    sample: Annotated[
        float | None,
        typer.Option(
            "--sample",
            help="Share of the blocks that are made again, in (0, 1]; default: all.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Which blocks --sample takes.")] = 0,
    inputs: Inputs = None,
    key: Annotated[
        str | None,
        typer.Option(
            "--key", help="Public key (PEM file) of its signature.", metavar="KEY", show_default=False
        ),
    ] = None,
    threads: Threads = None,
    memory: Memory = "2GiB",
    offline: Offline = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check a finished merge: every tensor and file against the hashes in its lock; what could not be checked is no pass."""
    from alnico import api
    from alnico.cli import progress
    from alnico.cli.proving import verification_text
    from alnico.errors import UncheckedError
    from alnico.verification.replan import parse_places

    if not against_inputs and (sample is not None or inputs):
        raise typer.BadParameter(
            f"{'--sample' if sample is not None else '--input'} is for --against-inputs. Say both."
        )
    if sample is not None and not 0 < sample <= 1:
        raise typer.BadParameter(
            f"--sample: {sample:g} is no share in (0, 1]. Give 0.01 for a hundredth of the blocks."
        )

    def show(found: Any) -> None:
        if as_json:
            show_result(json_page(found.data()), besides=EXIT_CODE)
        elif not quiet:
            show_result(verification_text(found), besides=EXIT_CODE)

    try:
        with progress.bar(quiet or as_json, 0) as watch:
            found = api.verify(
                out,
                against_inputs=against_inputs,
                sample=1.0 if sample is None else sample,
                seed=seed,
                inputs=parse_places(inputs or ()),
                key=key,
                memory=size_of(memory, "--memory"),
                threads=threads,
                offline=offline,
                watch=watch,
            )
    except UncheckedError as error:
        if error.found is not None:
            show(error.found)
        raise
    show(found)


@app.command()
def reproduce(
    out: FinishedOut,
    new: Annotated[
        str | None,
        typer.Argument(
            help="Where the second merge is kept; default: it is removed when it is compared.",
            metavar="[NEWOUT]",
        ),
    ] = None,
    inputs: Inputs = None,
    threads: Threads = None,
    memory: Memory = "2GiB",
    restart: Annotated[bool, typer.Option("--restart", help="Forget an unfinished second merge.")] = False,
    offline: Offline = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Merge the recipe in OUT's lock again, from the same inputs by their hashes, and compare: the same bytes."""
    from alnico import api
    from alnico.cli import progress
    from alnico.cli.proving import reproduction_text
    from alnico.verification.replan import parse_places

    with progress.bar(quiet or as_json, 0) as watch:
        found = api.reproduce(
            out,
            new,
            inputs=parse_places(inputs or ()),
            memory=size_of(memory, "--memory"),
            threads=threads,
            restart=restart,
            offline=offline,
            watch=watch,
        )
    if as_json:
        show_result(json_page(found.data()), besides=EXIT_CODE)
    elif not quiet:
        show_result(reproduction_text(found), besides=EXIT_CODE)


@app.command()
def sign(
    out: FinishedOut,
    key: Annotated[
        str, typer.Option("--key", help="Private key (PEM file, P-256, P-384 or P-521).", metavar="KEY")
    ],
    as_json: Json = False,
) -> None:
    """Check a finished merge against its lock, and sign its files as OpenSSF model-signing does, into OUT/model.sig."""
    from alnico import api

    path = api.sign(out, key)
    show_result(
        json_page({"signature": str(path)}) if as_json else page([f"{path}: signs all files beside it"]),
        besides=path,
    )


@app.command()
def push(
    out: Annotated[str, typer.Argument(help="The directory of a finished merge.", metavar="OUT")],
    name: Annotated[
        str,
        typer.Argument(
            help="The model on the hub: owner/name. It is made if it is not there.", metavar="NAME"
        ),
    ],
    private: Annotated[bool, typer.Option("--private", help="Only its owner may see it.")] = False,
    branch: Annotated[
        str | None, typer.Option("--branch", "--revision", help="Branch; default: main.", show_default=False)
    ] = None,
    message: Annotated[
        str | None, typer.Option("--message", "-m", help="Message of the commit.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Upload a finished merge to the hub, as one commit, and print its address."""
    from alnico import api
    from alnico.output.validate import local_paths

    for path in local_paths(Path(out)):
        say(
            f"note: the lock and the recipe name {path}, which everyone who sees the model can read.", as_json
        )
    url = api.push(
        out,
        name,
        private=private,
        branch=branch,
        message=message,
        quiet=as_json or not is_terminal(sys.stderr),
    )
    show_result(json_page({"url": url}) if as_json else page([url]), besides=url)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Show one method in full.", metavar="[NAME]")] = None,
    as_json: Json = False,
) -> None:
    """List the merge methods, or show one in full."""
    from alnico.cli import show
    from alnico.methods import find, registry

    if name is not None:
        method = find(name)
        show_result(json_page(show.method_data(method)) if as_json else show.method_text(method))
    else:
        every = registry().values()
        show_result(json_page([show.method_data(m) for m in every]) if as_json else show.methods_text(every))


@app.command()
def schema(
    search: Annotated[
        bool, typer.Option("--search", help="Of the files that `alnico search` takes.")
    ] = False,
) -> None:
    """Print the JSON Schema of recipes, for editors: keys, methods, options with their ranges and defaults."""
    from alnico import api

    show_result(json_page(api.schema(search=search)))


@app.command()
def demo(
    out: Annotated[
        str, typer.Argument(help="Folder for the merged models.", metavar="[FOLDER]")
    ] = "alnico-demo",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Merge two real models (all-MiniLM-L6-v2 and a fine-tune of it) by several methods, and show what came out."""
    from alnico.cli import demo as run

    outcome = run.demo(Path(out), threads)
    show_result(json_page(outcome.data()) if as_json else outcome.text(), besides=out)


def _recipe(reference: str) -> Any:
    """A path, or the text of standard input with a name for messages."""
    if reference != "-":
        return reference
    from alnico.recipe.load import MAX_BYTES, decode_recipes

    try:
        given = sys.stdin.buffer.read(MAX_BYTES + 1) or b""
    except (AttributeError, OSError, ValueError) as error:  # closed, or open for writing only
        raise RecipeError(
            f"standard input: cannot be read ({error}); expected a recipe. Send it there, or name a file."
        ) from None
    return decode_recipes(given, "standard input")


def _allowing(recipes: Any) -> Any:
    """The recipes with ``unrelated: allow``, which is what mergekit's ``--allow-crimes`` means here."""
    import dataclasses

    from alnico.recipe.load import load_recipes

    return tuple(
        dataclasses.replace(
            r, unrelated="allow", text=r.text and f"{r.text.rstrip()}\n# run with --allow-crimes\n"
        )
        for r in load_recipes(recipes)
    )


def _written(folder: str) -> str:
    """Where the report is, and how to get what is missing of it."""
    from alnico.analysis.page import has_report

    page = Path(folder) / "report.html"
    return (
        f"written: {page}"
        if has_report()
        else f"written: {folder}, without the page and pictures: pip install 'alnico[report]'"
    )


def _one_or_all(data: list[Any]) -> Any:
    """What a recipe gives: of a file with several documents, a list."""
    return data[0] if len(data) == 1 else data


def _shard_size(ours: str | None, mergekits: str | None) -> int:
    """Bytes of ``--max-shard-size``, or of mergekit's ``--out-shard-size``, where 5B means 5 billion."""
    if mergekits is None:
        return size_of(ours or "5GB", "--max-shard-size")
    if ours is not None:
        raise typer.BadParameter("--max-shard-size and --out-shard-size are one option. Leave one out.")
    text = mergekits.strip()
    return size_of(
        text[:-1] + "GB" if text[-1:] in "bB" and text[-2:-1].isdigit() else text, "--out-shard-size"
    )


def main() -> None:
    """Run a command and exit with the code of the error's class; a traceback is only for our own mistakes."""
    printing.begin()
    code: Any = 0
    try:
        app(prog_name="alnico")
    except SystemExit as ended:
        code = ended.code or 0
    except KeyboardInterrupt:
        code = INTERRUPTED
    except AlnicoError as error:
        code = error.exit_code
        if not entry.is_interrupted():
            printing.say_error(error)
    except OSError as error:
        code = RunError.exit_code
        if not entry.is_interrupted():
            if error.filename is None:
                raise
            printing.say_error(
                RunError(
                    f"{os.fsdecode(error.filename)}: cannot be used ({error.strerror}). Check the path and its permissions."
                )
            )
    except Exception:
        if not entry.is_interrupted():  # a library made another exception of it
            raise
        code = INTERRUPTED
    if code and (entry.is_interrupted() or code == INTERRUPTED):
        if not printing.is_told():
            interrupted(None)
        raise SystemExit(entry.code_of_signal())
    raise SystemExit(printing.verdict(code) if isinstance(code, int) else code)


def command() -> None:
    """The ``alnico`` command."""
    entry.command(main)


if __name__ == "__main__":
    command()
entry.release(_guarded)
