"""Extracts a LoRA adapter from a fine-tune: leading singular vectors of each matrix's change."""

from __future__ import annotations

import functools
import math
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from alnico.checkpoint.durable import write_file
from alnico.checkpoint.layouts import transformers_names
from alnico.checkpoint.lineage import lineage_of
from alnico.checkpoint.lora_adapter import PREFIX
from alnico.checkpoint.lora_model import AdaptedModel, repositories
from alnico.checkpoint.memory_model import MemoryModel
from alnico.checkpoint.open_adapter import open_adapter
from alnico.checkpoint.open_model import open_adapted, open_model
from alnico.checkpoint.output_path import check_publishable, replace_mode
from alnico.checkpoint.renamed_model import with_names_of
from alnico.checkpoint.source import Source, read_tensor, unwrap
from alnico.checkpoint.tied_weights import architectures
from alnico.checkpoint.untied_model import untie
from alnico.cluster.node_models import NodeModels
from alnico.cluster.nodes import check_numerics
from alnico.devices import DEFAULT_DEVICE
from alnico.engine.arena import Arena
from alnico.engine.fetch import fetch_files
from alnico.engine.matrix_gpu import MatrixGpu, kind_of, matrix_gpus
from alnico.engine.relatedness import TENSORS, SampledTensor, compare_models, is_matrix, pick_evenly
from alnico.errors import AlnicoError, MismatchError, ResourceError, RunError, VerificationError
from alnico.events import Reading, Watcher
from alnico.folders import remove
from alnico.kernels.clock import counts_compiling
from alnico.kernels.constants import ARITHMETIC
from alnico.lora.extract_deltas import ExtractMemory, arena_bytes, fit_extraction, real_of
from alnico.lora.extract_on_nodes import ExtractNodes
from alnico.lora.extract_options import Options, checked_options
from alnico.lora.extract_result import ExtractedTensor, Extraction, card_text
from alnico.lora.extract_targets import (
    EmbeddingsChoice,
    ExtractTarget,
    ExtractTargets,
    OthersChoice,
    SavedTensors,
    find_targets,
    module_names,
    saved_of,
)
from alnico.lora.factor_store import FactorStore
from alnico.lora.factorise import FactorisingRun
from alnico.lora.folded_distances import FoldedDistances, runs_of
from alnico.lora.packed_experts import depths_of, packed_factors, target_parameters
from alnico.lora.ranks import Spectrum, ranks_of_size
from alnico.lora.triples import triples_on
from alnico.lora.writer import AdapterFiles, OutputAdapter, OutputModule, target_modules
from alnico.models.open_models import name_model, open_models, path_of
from alnico.numerics.arithmetic import ieee_arithmetic
from alnico.numerics.dtypes import DTYPES
from alnico.numerics.sizes import format_size
from alnico.output.card import public_names
from alnico.output.disk_space import check_output_place, check_space, needed_files
from alnico.output.lock import format_json
from alnico.output.staging import PartDirectory
from alnico.run_options import DEFAULT_BUDGET_BYTES, DEFAULT_DOWNLOAD_CACHE_BYTES, RunOptions, Size
from alnico.threads import Abandoned, Crew

REPORT = "extraction.json"


@counts_compiling
@ieee_arithmetic()
def extract(
    tuned: Any,
    base: Any,
    out: str | os.PathLike[str] | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    size: int | str | None = None,
    max_rank: int | None = None,
    exact: bool = False,
    others: OthersChoice = "save",
    embeddings: EmbeddingsChoice = "lora",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    dtype: str = "float32",
    seed: int = 0,
    verify: bool = True,
    memory: Size = DEFAULT_BUDGET_BYTES,
    threads: int | None = None,
    overwrite: bool = False,
    overwrite_anything: bool = False,
    restart: bool = False,
    offline: bool = False,
    stream: bool = False,
    download_cache: str | os.PathLike[str] | None = None,
    download_cache_size: Size = DEFAULT_DOWNLOAD_CACHE_BYTES,
    device: Any = DEFAULT_DEVICE,
    ray: str | bool | None = None,
    watch: Watcher | None = None,
) -> Any:
    """Write what a fine-tune changed of its base as a LoRA adapter: ``B A`` near ``tuned - base``.

    Each matrix of the difference D is projected onto its leading singular vectors by
    :func:`alnico.numerics.randomized.randomized_svd`. A and B each get the square roots of the singular
    values, and alpha is the rank, so that the scale is 1. Differences are computed in float32 (float64 where
    a model is), without earlier rounding. Convolutions are flattened; an embedding has ``lora_embedding_A``
    and ``_B``. The finished adapter is folded back and compared with the fine-tune, tensor by tensor, in
    float64. The same call resumes an interrupted extraction. With ``ray`` the nodes of a cluster do all this, and this process
    collects the factors and writes the adapter, with the same bytes.

    In Python the models may be in memory: modules, dicts of tensors, and the others that merges take. Without
    ``out`` the result is an :class:`alnico.lora.Triples`: a triple (A, B, scale) for each matrix, with the
    numbers of the adapter on disk, and the tensors that are saved whole as ``saved``.

    Use when: you want to store, serve or combine a full fine-tune as an adapter. Spectra of fine-tunes fall
        slowly: for all-MiniLM-L6-v2, rank 32 keeps 68 % of the energy of a matrix's change, rank 128 keeps
        93 %. The report states the loss of each tensor.

    Options:
        tuned: The fine-tune: a directory, a file, a URL, or owner/name@revision on the hub.
        base: The model that it was tuned from.
        out: Directory of the adapter to create.
        rank: Rank of every matrix; default: 32, unless energy or size is given.
        energy: Share of each matrix's squares to keep, in (0, 1]; each matrix gets the smallest rank that
            does.
        size: Size of the adapter's file, such as 50MB; a number is bytes. Ranks go where they keep most
            energy for their bytes, after the tensors that are saved whole.
        max_rank: Largest rank with energy or size; default with size: 256.
        exact: Compute all singular vectors from eigenvalues instead of random directions, whose error is at
            most 1 % above the best.
        others: What to do with norms, biases and other tensors that are not matrices: save (as they are) or
            leave (out).
        embeddings: What to do with embeddings and heads: lora (as factors), save (as they are) or leave
            (out).
        include: Only tensors that match this filter, as in recipes; may be repeated.
        exclude: No tensors that match this filter, as in recipes; may be repeated.
        dtype: Dtype of the adapter: float32, bfloat16 or float16.
        seed: Seed of the random directions.
        verify: Fold the adapter back and measure what is lost.
    Edge cases: an unchanged tensor is left out and named. Experts packed into one tensor are a parameter
        (``target_parameters``) whose experts each have factors of the same rank; in memory A and B then have
        three dimensions.
    Errors: RecipeError for an option out of its range; MismatchError for models of different kinds, for
        unrelated models, and for equal models, which leave nothing to extract; NonFiniteError; ResourceError;
        OutputError; VerificationError; those of reading and HubError.
    Differs from the source: the singular vectors are found by random directions unless ``exact``.
    Source: Eckart, Young 1936 (the best approximation of a rank); Halko et al. 2011,
        https://arxiv.org/abs/0909.4061; Hu et al. 2021, https://arxiv.org/abs/2106.09685; the format is
        PEFT's.
    """
    begin = time.perf_counter()
    name_model(tuned, "tuned")
    name_model(base, "base")
    run = RunOptions.of(
        memory=memory,
        threads=threads,
        offline=offline,
        stream=stream,
        download_cache=download_cache,
        download_cache_size=download_cache_size,
        watch=watch,
        device=device,
        ray=ray,
    )
    gpus = matrix_gpus(run.device)
    options = checked_options(
        rank, energy, size, max_rank, exact, others, embeddings, include, exclude, dtype, seed
    )
    if out is None:
        with tempfile.TemporaryDirectory(prefix="alnico-") as folder:
            files = Path(folder, "extracted")
            extraction = extract(
                tuned, base, files, rank=rank, energy=energy, size=size, max_rank=max_rank, exact=exact,
                others=others, embeddings=embeddings, include=include, exclude=exclude, dtype=dtype, seed=seed,
                verify=verify, memory=memory, threads=threads, offline=offline, stream=stream, download_cache=download_cache, download_cache_size=download_cache_size, device=device, ray=ray, watch=watch,
            )  # fmt: skip
            found = open_models({"base": base}, base=base, access=run.access)
            with closing(found), open_adapter(os.fspath(files)) as adapter:
                return triples_on(adapter, found.sources["base"], found.gives_torch, extraction.error)
    target = Path(out)
    check_publishable(target)
    may_replace = replace_mode(overwrite, overwrite_anything)
    with ExitStack() as stack:
        paths = [path for model in (tuned, base) if (path := path_of(model)) is not None]
        if len(paths) == 2:
            opened: list[Source] = [
                stack.enter_context(open_model(path, access=run.access)) for path in paths
            ]
        else:
            found = open_models({"tuned": tuned, "base": base}, base=base, access=run.access)
            stack.callback(found.close)
            opened = list(found.sources.values())
        on_nodes = None if run.ray is None else NodeModels.of(opened, run)
        models = untie(opened, opened)
        models[0] = with_names_of(models[0], models[1])
        targets = find_targets(
            models[0],
            models[1],
            include=options.include,
            exclude=options.exclude,
            others=options.others,
            embeddings=options.embeddings,
        )
        caps = [options.cap(s) if s.treatment == "factors" else 0 for s in targets.compared]
        room = fit_extraction(models[0], models[1], targets.compared, caps, run)
        check_output_place(target, needed_files(models), may_replace)
        saved = sum(
            s.elements * DTYPES[options.dtype].bytes for s in targets.compared if s.treatment == "saved"
        )
        check_space(
            target,
            2 * sum(4 * cap * sum(s.sides) for s, cap in zip(targets.compared, caps, strict=True)) + saved,
        )
        fetch_files(models, [m.absent(list(m.tensors), True) for m in models], run.watch)
        _check_related(models[0], models[1], targets)
        nodes = None
        if on_nodes is not None and run.ray is not None:
            from alnico.cluster.connect import connect

            cluster = stack.enter_context(connect(run.ray))
            check_numerics(cluster.nodes, ["extract"])
            nodes = ExtractNodes(cluster, on_nodes, options, targets.compared, run)
        with PartDirectory(target) as part:
            work = _ExtractRun(models[0], models[1], options, targets, room, run.watch, gpus, nodes)
            store = FactorStore(part, work.fingerprint(), restart)
            try:
                extraction = work.all(part, store, verify, path_of(base) or "the base")
            except RunError:
                raise
            except AlnicoError:
                part.remove()
                raise
            part.publish(None, may_replace)
    return replace(extraction, path=target, seconds=time.perf_counter() - begin)


def _check_related(tuned: Source, base: Source, targets: ExtractTargets) -> None:
    """Compare a sample of the models before computing. Errors: MismatchError for unrelated models."""
    names = [s.name for s in targets.compared if is_matrix(base.tensors[s.name])]
    likenesses = compare_models(
        (base, tuned), pick_evenly([SampledTensor(name, (0, 1)) for name in names], TENSORS)
    ).likenesses
    if likenesses and likenesses[0].verdict == "unrelated":
        few = ", ".join(
            f"{name} (cosine {cosine:.2f})" for name, cosine in list(likenesses[0].uncorrelated.items())[:3]
        )
        raise MismatchError(
            f"{tuned.label} was not tuned from {base.label}: {len(likenesses[0].uncorrelated)} of "
            f"{len(likenesses[0].cosines)} compared matrices are unrelated: {few}; expected cosines near 1. "
            "Give the base that it was tuned from."
        )


class _ExtractRun:
    """One extraction: all its tensors, threads and results."""

    def __init__(
        self,
        tuned: Source,
        base: Source,
        options: Options,
        targets: ExtractTargets,
        room: ExtractMemory,
        watch: Watcher | None,
        gpus: tuple[MatrixGpu, ...] = (),
        nodes: ExtractNodes | None = None,
    ) -> None:
        self.tuned = tuned
        self.base = base
        self.options = options
        self.targets = targets
        self.room = room
        self._crew = Crew(room.threads, watch)
        self._device = kind_of(gpus)
        self._gpus = gpus
        self._nodes = nodes
        self._arena = Arena(arena_bytes(room))

    def all(self, part: PartDirectory, store: FactorStore, verify: bool, reference: str) -> Extraction:
        """Compute factors and ranks, write the adapter into the part directory, and verify it."""
        is_left = False
        try:
            with self._crew:
                try:
                    self._factorise(store)
                except BaseException as error:
                    has_ended = True
                    with suppress(RunError):  # the first error matters
                        has_ended = store.stop(is_interrupted=isinstance(error, KeyboardInterrupt))
                    is_left = isinstance(error, Abandoned) or not has_ended
                    raise
                store.stop()
                return self._write_adapter(part, store, verify, reference)
        finally:
            if not is_left:  # an abandoned thread may still write its result
                store.close()

    def _factorise(self, store: FactorStore) -> None:
        todo = [s for s in self.targets.compared if s.name not in store.done]
        if self._nodes is None:
            FactorisingRun(
                self.tuned, self.base, self.options, self.room, self._crew, self._arena, store.put, self._gpus
            ).factorise(todo)
        else:
            results = [
                sum(s.sides) * real_of(self.tuned, self.base, s.name).itemsize * self.options.cap(s)
                if s.treatment == "factors"
                else 0
                for s in todo
            ]
            self._nodes.factorise(todo, [self._bytes(s) for s in todo], results, store.put)

    def _write_adapter(
        self, part: PartDirectory, store: FactorStore, verify: bool, reference: str
    ) -> Extraction:
        """Write and verify the adapter from the stored factors."""
        ranks = self._ranks(store)
        tensors = self._tensors(store, ranks)
        if not any(t.change for t in tensors):
            raise MismatchError(
                f"{self.tuned.label} equals {self.base.label} in all {len(tensors)} tensors, so there is "
                "nothing to extract; expected a fine-tune and its base. Check the two paths."
            )
        if not any(t.treatment == "factors" for t in tensors):
            raise MismatchError(
                f"{self.tuned.label}: no matrix selected for factors differs from {self.base.label} and fits "
                "the size; expected at least one. Raise the size, or change the filters."
            )
        extraction = Extraction(
            part.model,
            self.tuned.label,
            self.base.label,
            self.options.data(),
            tuple(tensors),
            tuple((a.name, a.why) for a in self.targets.unmatched),
            0,
            sum(t.byte_size for t in self.base.tensors.values()),
            False,
            0.0,
            len(store.done),
        )
        with suppress(OSError):
            remove(part.model, part.folder)  # left by a run that was killed while writing the adapter
        files = self._write(part, store, extraction, reference)
        extraction = replace(extraction, byte_size=files.byte_size)
        if verify:
            extraction = self._verify(part, extraction)
        try:
            write_file(part.model / REPORT, format_json(extraction.data()) + "\n", part.folder)
        except OSError as error:
            raise RunError(
                f"{part.model}: cannot be written ({error.strerror}). Make room or check the disk."
            ) from None
        files.lock(self._lock_contents())
        return extraction

    def fingerprint(self) -> dict[str, Any]:
        """Return what decides the adapter's bits, by option, so that an error can name the changed one."""
        chosen = self.options.data()
        keys = (
            "rank",
            "energy",
            "size",
            "max_rank",
            "exact",
            "others",
            "embeddings",
            "include",
            "exclude",
            "dtype",
            "seed",
        )
        return {
            "arithmetic": ARITHMETIC,
            "device": self._device,
            **{f"--{key.replace('_', '-')}": chosen.get(key) for key in keys},
            "inputs": [model.identity() for model in (self.tuned, self.base)],
        }

    def _ranks(self, store: FactorStore) -> dict[str, int]:
        """Return the rank of each matrix selected for factors; 0 for an unchanged one."""
        factored = self.targets.factored
        width = DTYPES[self.options.dtype].bytes
        spectra = [Spectrum(*store.spectrum(s.name), sum(s.sides) * width) for s in factored]
        if self.options.size is None:
            return {s.name: len(spectrum.values) for s, spectrum in zip(factored, spectra, strict=True)}
        most = {s.name: len(spectrum.values) for s, spectrum in zip(factored, spectra, strict=True)}
        adapter, _ = self._adapter(most, self._saved(store, most), "")
        fixed = sum(math.prod(shape) for shape in adapter.saved.values()) * width
        header = 8 + sum(len(name) + 100 for name, _, _ in adapter.tensors()) + 200
        budget = self.options.size - fixed - header
        if budget <= 0:
            raise ResourceError(
                f"extract: the tensors saved whole need {format_size(fixed + header)}, but the size is "
                f"{format_size(self.options.size)}. Raise --size, or leave out tensors that are not matrices "
                "(--others leave)."
            )
        return dict(zip((s.name for s in factored), ranks_of_size(spectra, budget), strict=True))

    def _saved(self, store: FactorStore, ranks: Mapping[str, int]) -> SavedTensors:
        changed = [
            s.name for s in self.targets.compared if s.treatment == "saved" and store.spectrum(s.name)[1] > 0
        ]
        return saved_of(
            self.base,
            changed,
            Counter(s.module for s in self.targets.factored if ranks[s.name]),
            self.targets.tied,
        )

    def _tensors(self, store: FactorStore, ranks: Mapping[str, int]) -> list[ExtractedTensor]:
        whole = set(self._saved(store, ranks).names)
        width = DTYPES[self.options.dtype].bytes
        extracted = []
        for s in self.targets.compared:
            values, squares = store.spectrum(s.name)
            rank = ranks.get(s.name, 0)
            treatment: Any = "unchanged" if not squares and s.name not in whole else s.treatment
            why = s.why if treatment == "left out" else ""
            if treatment == "factors" and not rank:
                treatment, why = "left out", "the size keeps more energy elsewhere"
            if s.name in whole:
                treatment, why = "saved", ""
            rest = (
                max(squares - float(np.sum(values[:rank] ** 2)), 0.0) if treatment == "factors" else squares
            )
            size = (
                rank * sum(s.sides) * width
                if treatment == "factors"
                else s.elements * width
                if treatment == "saved"
                else 0
            )
            left = 0.0 if treatment == "saved" else math.sqrt(rest)
            extracted.append(
                ExtractedTensor(
                    s.name,
                    s.shape,
                    treatment,
                    why,
                    rank if treatment == "factors" else 0,
                    size,
                    math.sqrt(squares),
                    left,
                )
            )
        return extracted

    def _adapter(
        self, ranks: Mapping[str, int], saved: SavedTensors, reference: str
    ) -> tuple[OutputAdapter, list[ExtractTarget]]:
        """Return the adapter's contents, and the target of each of its updates."""
        spelled = self._spelled
        chosen = [s for s in self.targets.factored if ranks[s.name]]
        depths = depths_of([spelled[s.name] for s in chosen if s.kind == "parameter"])
        outputs = [
            replace(
                _module(s, ranks[s.name]),
                module=spelled[s.name].rpartition(".")[0],
                parameter=spelled[s.name].rpartition(".")[2] if s.kind == "parameter" else "",
                depth=depths.get(spelled[s.name], 0),
            )
            for s in chosen
        ]
        words = [spelled[name].split(".") for name in self.base.tensors]
        every = {".".join(w[:i]) for w in words for i in range(1, len(w))}
        named = {spelled[s.name].rpartition(".")[0] for s in chosen if s.kind != "parameter"}
        stacks = [spelled[s.name] for s in chosen if s.kind == "parameter"]
        kinds = architectures(self.base.config)
        is_causal = any(k.endswith("ForCausalLM") for k in kinds)
        is_both = bool(self.base.config.get("is_encoder_decoder")) and any(
            k.endswith("ForConditionalGeneration") for k in kinds
        )
        origin = self.base.origin
        settings = {
            "task_type": "CAUSAL_LM" if is_causal else "SEQ_2_SEQ_LM" if is_both else None,
            "base_model_name_or_path": origin.name if origin is not None else reference,
            "revision": origin.commit if origin is not None else None,
            "target_modules": target_modules(sorted(named), sorted(every - named)),
            **({"target_parameters": target_parameters(stacks, spelled.values())} if stacks else {}),
            "modules_to_save": module_names(list(spelled.values()), self._spelled_modules(saved)) or None,
            "bias": "all" if saved.has_biases else "none",
            "fan_in_fan_out": any(s.is_turned and s.kind == "linear" for s in chosen),
        }
        shapes = {
            self._written(name, written): self.base.tensors[name].shape
            for name, written in saved.names.items()
        }
        return OutputAdapter(outputs, shapes, self.options.dtype, settings), chosen

    @functools.cached_property
    def _spelled(self) -> dict[str, str]:
        """Maps names of tensors in the base's files to those in its module, which an adapter uses."""
        return transformers_names(self.base.config, self.base.tensors)

    def _spelled_modules(self, saved: SavedTensors) -> list[str]:
        """Return the modules saved whole, by their names in the base's module."""
        whole = set(saved.modules)
        return sorted(
            {self._spelled[n].rpartition(".")[0] for n in self.base.tensors if n.rpartition(".")[0] in whole}
        )

    def _written(self, name: str, written: str) -> str:
        """Return the adapter's name of a saved tensor; ``written`` is that in the file's names."""
        module, _, parameter = self._spelled[name].rpartition(".")
        return f"{module}{'.base_layer' * written.count('.base_layer')}.{parameter}"

    def _write(
        self, part: PartDirectory, store: FactorStore, extraction: Extraction, reference: str
    ) -> AdapterFiles:
        ranks = {t.name: t.rank for t in extraction.tensors}
        saved = self._saved(store, ranks)
        adapter, chosen = self._adapter(ranks, saved, reference)
        with AdapterFiles(part, adapter) as files:
            for module, target in zip(adapter.modules, chosen, strict=True):
                factors = store.read(target.name, module.rank)
                left, right = factors.left, factors.right
                if target.kind == "parameter":
                    left, right = packed_factors(left, right, target.experts, is_turned=target.is_turned)
                elif target.is_turned:
                    left, right = right.T, left.T
                of_left, of_right = module.names
                files.write(of_right, np.ascontiguousarray(right))
                files.write(of_left, np.ascontiguousarray(left))
            for name, written in saved.names.items():
                files.write(PREFIX + self._written(name, written), read_tensor(self.tuned, name))
            files.finish(*self._card(replace(extraction, byte_size=files.byte_size)))
        return files

    def _card(self, extraction: Extraction) -> tuple[dict[str, Any], str]:
        """Return the card's front matter and text."""
        licences = [lineage_of(model).licence for model in (self.tuned, self.base)]
        ids = [repository.name for repository in repositories(self.base)]
        front: dict[str, Any] = {"library_name": "peft", "tags": ["lora", "alnico"]}
        if ids:
            front = {
                "base_model": ids[0] if len(ids) == 1 else ids,
                "base_model_relation": "adapter",
                **front,
            }
        if licences[0] and licences[0] == licences[1]:
            front |= licences[0]
        tuned, base = public_names([self.tuned, self.base])
        return front, card_text(extraction, tuned, base)

    def _lock_contents(self) -> dict[str, Any]:
        """Return the lock's contents, except the hashes of the output."""
        return {
            "do": "extract",
            "options": self.options.data(),
            "device": self._device,
            "inputs": [
                {
                    "model": model.label,
                    "repositories": [{"repository": r.name, "commit": r.commit} for r in repositories(model)],
                    **lineage_of(model).data(),
                    "files": [
                        {k: v for k, v in f.items() if k not in ("mtime_ns", "commit")}
                        for f in model.identity()
                    ],
                }
                for model in (self.tuned, self.base)
            ],
        }

    def _verify(self, part: PartDirectory, extraction: Extraction) -> Extraction:
        """Fold the adapter back and measure what it misses. Errors: VerificationError, MismatchError."""
        targets = {s.name: s for s in self.targets.compared}
        todo = [
            t for t in extraction.tensors if t.treatment in ("factors", "saved") and targets[t.name].elements
        ]
        sums = {t.name: np.zeros((runs_of(targets[t.name].elements), 2)) for t in todo}
        read = [self._bytes(targets[t.name]) for t in todo]

        def put(name: str, run: int, squares: tuple[float, float]) -> None:
            sums[name][run] = squares

        if self._nodes is None:
            self._crew.report(Reading(len(todo), sum(read)))
            with self._folded(extraction.tuned, part) as folded:
                FoldedDistances(folded, self.tuned, self._crew, self._arena, put).measure(
                    [(name, range(len(each))) for name, each in sums.items()]
                )
        else:
            runs = {name: len(each) for name, each in sums.items()}
            self._nodes.measure(os.path.abspath(part.model), runs, read, put)
        tensors = []
        for t in extraction.tensors:
            if t.name not in sums:
                tensors.append(replace(t, measured=t.expected))
                continue
            distance, length = (math.sqrt(math.fsum(column)) for column in sums[t.name].T)
            eps = {"F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}[self.options.dtype]
            allowed = math.sqrt(
                t.expected**2 * 1.002 + (4 * eps * t.change) ** 2 + (4 * 2.0**-24 * length) ** 2
            )
            least = {"F32": 2.0**-126, "F16": 2.0**-14, "BF16": 2.0**-126}[self.options.dtype]
            if t.treatment == "saved":  # below the least normal number, the rounding error is absolute
                allowed = 2 * eps * (length + t.change) + 2 * least * eps * math.sqrt(
                    targets[t.name].elements
                )
            elif t.bytes:
                allowed = max(allowed, 1e-5 * t.change)
            if not distance <= allowed:
                self._refuse_tiny(targets[t.name], t, least)
                raise VerificationError(
                    f"{t.name}: the folded adapter is {distance:.3g} from the fine-tune; expected at most "
                    f"{allowed:.3g} (the norm of the change is {t.change:.3g}). The disk or memory may be "
                    "faulty: extract again, and report it if it happens again."
                )
            tensors.append(replace(t, measured=distance))
        return replace(extraction, tensors=tuple(tensors), is_verified=True)

    @contextmanager
    def _folded(self, label: str, part: PartDirectory) -> Iterator[Source]:
        """Open the adapter on its base, which stays open if it is in memory."""
        source = unwrap(self.base)
        if not isinstance(source, MemoryModel):
            with open_adapted(label, self.base.label, str(part.model)) as folded:
                yield folded
            return
        with open_adapter(str(part.model)) as adapter:
            yield AdaptedModel(label, source, adapter)

    def _refuse_tiny(self, target: ExtractTarget, tensor: ExtractedTensor, least: float) -> None:
        """Refuse a change too small for full precision in the adapter's dtype or in the arithmetic.

        Errors: MismatchError.
        """
        each = tensor.change / math.sqrt(target.elements)
        arithmetic = float(np.finfo(real_of(self.tuned, self.base, target.name)).smallest_normal)
        factor = math.sqrt(tensor.change / max(target.matrix)) if tensor.treatment == "factors" else math.inf
        if each < 1e3 * arithmetic or factor < 4 * least:
            raise MismatchError(
                f"{tensor.name}: the change is so small ({each:.1e} on average) that {self.options.dtype} "
                "cannot represent its factors; expected a larger one, or an adapter dtype with a wider range "
                "(float32 or bfloat16). Exclude the tensor (exclude), or multiply both models by a number."
            )

    def _bytes(self, target: ExtractTarget) -> int:
        return sum(model.tensors[target.name].byte_size for model in (self.tuned, self.base))


def _module(target: ExtractTarget, rank: int) -> OutputModule:
    rows, columns = target.matrix
    if target.kind == "convolution":
        ones = (1,) * (len(target.shape) - 2)
        return OutputModule(
            target.module, "convolution", rank, (rows, rank, *ones), (rank, *target.shape[1:])
        )
    if target.is_turned:
        rows, columns = columns, rows
    width = rank * target.experts
    return OutputModule(target.module, target.kind, rank, (rows, width), (width, columns))
