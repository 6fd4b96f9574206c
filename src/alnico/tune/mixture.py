"""Builds a mixture of experts from dense models; measures its gates from prompts where the recipe says so."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from alnico.checkpoint.json_files import read_json
from alnico.checkpoint.output_path import replace_mode
from alnico.checkpoint.shards import DEFAULT_MAX_SHARD_BYTES
from alnico.checkpoint.source import read_tensor
from alnico.checkpoint.statistics import SUMMARY, open_statistics, write_statistics
from alnico.devices import DEFAULT_DEVICE
from alnico.engine.planner import Planner
from alnico.engine.run import MergeResult
from alnico.engine.stages import close, plan_stages
from alnico.errors import AlnicoError, EvaluationError, ModelError, RecipeError
from alnico.evaluation.loaded_model import open_subject
from alnico.evaluation.placement import ModulePlacement
from alnico.evaluation.tasks import EvaluatedModel
from alnico.evaluation.tokens import named_failures
from alnico.events import Counted, Watcher
from alnico.installation import import_extra
from alnico.kernels.clock import counts_compiling
from alnico.numerics.arithmetic import ieee_arithmetic
from alnico.output.remote_target import RemoteTarget, output_place
from alnico.plan.mixture_kinds import MLP
from alnico.recipe.experts import OF_PROMPTS, Expert, Mixture
from alnico.recipe.load import RecipeLike, load_recipes
from alnico.recipe.reference import resolve_reference
from alnico.recipe.schema import Recipe
from alnico.recipe.stages import order_stages
from alnico.run_options import DEFAULT_BUDGET_BYTES, DEFAULT_DOWNLOAD_CACHE_BYTES, RunOptions, Size
from alnico.tune.statistics.measure import weights_of

NEARLY_ALIKE = 5.0
"""The condition number of a layer's gates from which on they hardly tell the experts apart, as in mergekit."""


@counts_compiling
@ieee_arithmetic()
def build_mixture(
    recipe: RecipeLike,
    out: str | os.PathLike[str],
    *,
    gates: str | os.PathLike[str] | None = None,
    memory: Size = DEFAULT_BUDGET_BYTES,
    threads: int | None = None,
    max_shard_size: Size = DEFAULT_MAX_SHARD_BYTES,
    seed: int | None = None,
    overwrite: bool = False,
    overwrite_anything: bool = False,
    restart: bool = False,
    offline: bool = False,
    stream: bool = False,
    download_cache: str | os.PathLike[str] | None = None,
    download_cache_size: Size = DEFAULT_DOWNLOAD_CACHE_BYTES,
    device: Any = DEFAULT_DEVICE,
    dtype: Any = "auto",
    work_dir: str | os.PathLike[str] | None = None,
    watch: Watcher | None = None,
) -> tuple[MergeResult, ...]:
    """Build a mixture of experts from dense models of one shape, by a recipe with ``experts``.

    The MLPs of each layer of the experts stand side by side, and a gate chooses for each token which of them it passes.
    All other tensors are those of ``base_model``, or averages over the experts. The recipe says how the gates are made: by
    ridge regression on statistics of the experts' data, from prompts, or at random. Prompts are run through ``base_model``
    with the extra ``[eval]``, in float32 on the processor and in the model's dtype on a GPU, and their gates are kept in a
    folder, so that a second call has the same ones. The recipes of mergekit-moe are such recipes.

    The output loads in transformers, and has a lock and a card as a merge has. A file of several documents is built as a
    whole: experts may be the outputs of stages. The same call resumes an interrupted build.

    Options:
        recipe: YAML file of the recipe; - reads standard input on the command line.
        out: Directory to create, or a URL such as s3://bucket/model; a name that ends in .safetensors makes one file.
        gates: Folder for gates that are measured from prompts, or that has them; default: OUT-gates, next to the output.
        seed: Seed of random gates; default: the recipe's, or 0.
        dtype: dtype of base_model while prompts are measured: auto, float32, bfloat16 or float16.
    Errors: RecipeError for a recipe without experts; EvaluationError for prompts that cannot be measured; all of
        :func:`alnico.merge`.
    """
    placement = ModulePlacement.of(device, dtype)
    run = RunOptions.of(
        memory=memory,
        threads=threads,
        offline=offline,
        stream=stream,
        download_cache=download_cache,
        download_cache_size=download_cache_size,
        watch=watch,
        device=device,
    )
    planner = Planner.of(run, max_shard_size)
    recipes = load_recipes(recipe, seed=seed)
    _check_recipes(recipes)
    place = output_place(out, work_dir)
    may_replace = replace_mode(overwrite, overwrite_anything)
    named = {r.stage for r in recipes if r.stage}
    ready: list[Recipe] = []
    notes: list[str] = []
    if any(map(_needs_measuring, recipes)):  # what does not fit is refused before a model runs
        close(plan_stages(order_stages(recipes), planner.plan, None))
    for one in recipes:
        mixture = one.mixture
        if mixture is None or not _needs_measuring(one):
            ready.append(one)
            continue
        folder = _gates_folder(gates, place, one, len(recipes))
        notes += _measure_gates(one, mixture, folder, named, planner, placement)
        ready.append(_with_gates(one, folder))
    results = planner.merge_all(ready, place, overwrite=may_replace, restart=restart)
    return tuple(dataclasses.replace(r, notes=(*r.notes, *notes)) if notes else r for r in results)


def _needs_measuring(recipe: Recipe) -> bool:
    mixture = recipe.mixture
    return mixture is not None and mixture.gate_mode in OF_PROMPTS and mixture.gates is None


def _check_recipes(recipes: Sequence[Recipe]) -> None:
    """Refuse recipes of which none builds a mixture. Errors: RecipeError."""
    if not any(recipe.mixture for recipe in recipes):
        raise RecipeError(
            f"{recipes[0].name}: has no experts, so it merges models into one of their kind; expected the recipe of a mixture. Run "
            "`alnico merge`, in Python alnico.merge, or write experts."
        )


def _gates_folder(
    given: str | os.PathLike[str] | None, out: Path | RemoteTarget, recipe: Recipe, documents: int
) -> Path:
    """Return the folder of a recipe's gates. Errors: AlnicoError for an output elsewhere, without one."""
    if given is not None:
        folder = Path(given)
        return folder / (recipe.stage or "mixture") if documents > 1 else folder
    if isinstance(out, RemoteTarget):
        raise AlnicoError(
            f"{out}: is not on this machine, and the gates are measured into a folder that is; expected gates. Give the folder "
            "(--gates; in Python gates)."
        )
    end = f"-{recipe.stage}" if recipe.stage and documents > 1 else ""
    return out.with_name(f"{out.name.removesuffix('.safetensors')}{end}-gates")


def _with_gates(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe with the folder of its gates, in its text, too."""
    assert recipe.mixture is not None
    mixture = dataclasses.replace(recipe.mixture, gates=str(folder))
    text = (
        f"{recipe.text.rstrip()}\ngates: {json.dumps(str(folder), ensure_ascii=False)}\n"
        if recipe.text
        else ""
    )
    try:
        is_read = (
            yaml.safe_load(text) == {**yaml.safe_load(recipe.text), "gates": str(folder)} if text else False
        )
    except yaml.YAMLError:  # such as a mapping in braces
        is_read = False
    return dataclasses.replace(recipe, mixture=mixture, text=text if is_read else "")


def _question(mixture: Mixture, base: str, placement: ModulePlacement) -> str:
    """Return a digest of what gates are measured by: two measurements with one digest answer the same question."""
    asked = [[e.positive_prompts, e.negative_prompts] for e in (*mixture.experts, *mixture.shared)]
    mode = "hidden" if mixture.gate_mode == "hidden_last" else mixture.gate_mode
    written = json.dumps([mode, base, asked, len(mixture.shared), placement.where, placement.own_or_dtype])
    return hashlib.sha256(written.encode()).hexdigest()


def _measure_gates(
    recipe: Recipe,
    mixture: Mixture,
    folder: Path,
    stages: set[str],
    planner: Planner,
    placement: ModulePlacement,
) -> list[str]:
    """Measure the gates of a recipe into ``folder``, unless it has them; return notes on them.

    Errors: RecipeError for a base that is the output of a stage; EvaluationError; OutputError.
    """
    reference = recipe.base_model or ""
    if reference in stages:
        raise RecipeError(
            f"{recipe.name}: base_model is {reference}, the output of a stage, and gate_mode is {mixture.gate_mode}, which runs the base "
            "before anything is merged; expected a model. Merge the stage first, and name its output."
        )
    question = _question(mixture, reference, placement)
    if (folder / SUMMARY).is_file() and read_json(folder / SUMMARY).get("question") == question:
        return _alike(folder)
    subject = open_subject(
        resolve_reference(reference, recipe.folder),
        label=reference,
        offline=planner.run.offline,
        placement=placement,
    )
    experts = [*mixture.experts, *(e for e in mixture.shared if e.positive_prompts)]
    measure = _embedded if mixture.gate_mode == "cheap_embed" else _hidden
    with closing(weights_of(subject)) as model:
        norms = _norms(list(model.tensors), subject.label)
        gates = []
        for done, expert in enumerate(experts):
            gates.append(_direction(subject, expert, mixture, measure, len(norms)))
            if planner.run.watch:
                planner.run.watch(Counted("experts", done + 1, len(experts)))
        values = np.stack(gates, axis=1)  # (layers, experts, hidden)
        count = len(mixture.experts)
        tensors: dict[str, np.ndarray] = {}
        entries: dict[str, Mapping[str, Any]] = {}
        for layer, norm in enumerate(norms):
            tensors[norm] = values[layer, :count]
            entries[norm] = {"stored": norm}
            if len(experts) > count:
                tensors[f"{norm}.shared"] = values[layer, count:]
                entries[norm] = {"stored": norm, "parts": {"shared": f"{norm}.shared"}}
        others = {
            name: "gates are measured before the norms of layers alone"
            for name in model.tensors
            if name not in entries
        }
        write_statistics(
            folder,
            "gates",
            model,
            tensors,
            entries,
            {"question": question, "gate_mode": mixture.gate_mode, "left_out": others},
            reference=reference,
            overwrite=True,
        )
    return _alike(folder)


def _norms(names: Sequence[str], label: str) -> list[str]:
    """Return the norms at the start of the layers, in order. Errors: ModelError if there are none."""
    layers = dict.fromkeys(m["layer"] for name in names if (m := MLP.fullmatch(name)))
    ordered = sorted(layers, key=lambda layer: int(layer.rstrip(".").rpartition(".")[2]))
    norms = [f"{layer}input_layernorm.weight" for layer in ordered]
    if not norms or not set(norms) <= set(names):
        raise ModelError(
            f"{label}: has no layers with an MLP and input_layernorm; expected a dense model of type llama, mistral, qwen2 or qwen3. Use "
            "one of these."
        )
    return norms


def _direction(
    subject: EvaluatedModel, expert: Expert, mixture: Mixture, measure: Any, layers: int
) -> np.ndarray:
    """Return what an expert's prompts have in common in each layer, less its negative prompts, of length 1: (layers, hidden)."""
    is_mean = mixture.gate_mode == "hidden_avg"
    values = measure(subject, expert.positive_prompts, layers, is_mean)
    if expert.negative_prompts:
        values = values - measure(subject, expert.negative_prompts, layers, is_mean)
    lengths = np.linalg.norm(values, axis=-1, keepdims=True)
    if not np.isfinite(values).all() or not (lengths > 0).all():
        layer = (
            int(np.argmin(lengths))
            if np.isfinite(values).all()
            else int(np.argmax(~np.isfinite(values).all(axis=-1)))
        )
        raise EvaluationError(
            f"{expert.models[0]}: its prompts give no direction in layer {layer} of {subject.label}; expected other positive than "
            "negative prompts, and finite numbers. Change the prompts."
        )
    return np.asarray(values / lengths)


def _tokenised(subject: EvaluatedModel, prompts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of prompts, each after the token for the beginning of a text, if there is one."""
    tokenizer = subject.tokenizer()
    with named_failures(f"{subject.label}: the prompts"):
        begin = tokenizer.bos_token or ""
        ids = [tokenizer(begin + prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    empty = next((prompt for prompt, own in zip(prompts, ids, strict=True) if not own), None)
    if empty is not None:
        raise EvaluationError(
            f"prompt {empty!r}: has no tokens; expected some text. Change it, or leave it out."
        )
    return ids


def _hidden(subject: EvaluatedModel, prompts: Sequence[str], layers: int, is_mean: bool) -> np.ndarray:
    """Return the mean over prompts of the inputs of each layer, at the last token or over all tokens: (layers, hidden)."""
    torch = import_extra("torch", "gates of prompts", "eval")
    module = subject.module("causal")
    device = next(module.parameters()).device
    total = np.zeros(())
    for ids in _tokenised(subject, prompts):
        # Each prompt alone: in a batch, padding would count as text, or need a mask for every model.
        with torch.no_grad():
            states = module(
                input_ids=torch.tensor([ids], device=device), output_hidden_states=True, use_cache=False
            ).hidden_states[:layers]
        at = [state[0].float().mean(dim=0) if is_mean else state[0, -1].float() for state in states]
        total = total + torch.stack([one.cpu() for one in at]).double().numpy()
    return np.asarray(total / len(prompts))


def _embedded(subject: EvaluatedModel, prompts: Sequence[str], layers: int, _: bool) -> np.ndarray:
    """Return the sum of the prompts' token embeddings, of length 1, the same for each layer: (layers, hidden)."""
    with closing(weights_of(subject)) as model:
        name = next((n for n in model.tensors if n.endswith("embed_tokens.weight")), None)
        if name is None:
            raise ModelError(
                f"{subject.label}: has no embed_tokens.weight; expected a table of embeddings. Choose the gate_mode hidden."
            )
        table = read_tensor(model, name)
    total = sum(
        (table[ids].astype(np.float64).sum(axis=0) for ids in _tokenised(subject, prompts)), np.zeros(())
    )
    length = float(np.linalg.norm(total))
    return np.tile(total / (length or 1.0), (layers, 1))


def _alike(folder: Path) -> list[str]:
    """Return a note on layers whose gates hardly tell the experts apart."""
    with closing(open_statistics(str(folder))) as statistics:
        alike = []
        for number, entry in enumerate(statistics.entries.values()):
            gates = read_tensor(statistics, entry.stored).astype(np.float64)
            if len(gates) > 1 and np.linalg.cond(gates) > NEARLY_ALIKE:
                alike.append(number)
        if not alike:
            return []
        which = (
            "all layers"
            if len(alike) == len(statistics.entries)
            else f"{len(alike)} of {len(statistics.entries)} layers"
        )
        return [
            f"in {which}, the gates of prompts are so alike that some experts will hardly be used (the condition number of the gates is above "
            f"{NEARLY_ALIKE:g}). Give prompts that differ more, add negative_prompts, or choose gate_mode ridge."
        ]
