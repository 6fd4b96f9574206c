"""Extract a LoRA adapter from a fine-tune: the leading singular vectors of its task vector, matrix by matrix."""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from alnico.checkpoint.durable import write_file
from alnico.checkpoint.layouts import transformers_names
from alnico.checkpoint.lineage import lineage_of
from alnico.checkpoint.lora_adapter import PREFIX
from alnico.checkpoint.lora_model import repositories
from alnico.checkpoint.open_model import open_adapted, open_model
from alnico.checkpoint.output_path import check_publishable, replace_mode
from alnico.checkpoint.renamed_model import with_names_of
from alnico.checkpoint.source import Source, read_tensor
from alnico.checkpoint.tied_weights import architectures
from alnico.checkpoint.untied_model import untie
from alnico.engine.arena import Arena
from alnico.engine.fetch import fetch_files
from alnico.engine.relatedness import TENSORS, SampledTensor, compare_models, is_matrix, pick_evenly
from alnico.errors import AlnicoError, MismatchError, RecipeError, ResourceError, RunError, VerificationError
from alnico.events import Advanced, Reading, Watcher
from alnico.folders import remove
from alnico.kernels.constants import ARITHMETIC
from alnico.lora.extract_deltas import CHECKED_ELEMENTS, Delta, ExtractMemory, fit, real_of
from alnico.lora.extract_result import ExtractedTensor, Extraction, card_text
from alnico.lora.extract_targets import (
    EmbeddingsChoice,
    ExtractTarget,
    OthersChoice,
    SavedTensors,
    Subjects,
    module_names,
    saved_of,
    subjects_of,
)
from alnico.lora.factor_store import Spool
from alnico.lora.ranks import Spectrum, ranks_of_energy, ranks_of_size
from alnico.lora.writer import AdapterFiles, OutputAdapter, OutputModule, target_modules
from alnico.numerics.arithmetic import ieee_arithmetic
from alnico.numerics.blas import one_blas_thread
from alnico.numerics.dtypes import DTYPES, TORCH_NAMES, decode, decode_into
from alnico.numerics.numbers import finite_number, quote_value, whole_number
from alnico.numerics.randomized import LowRankFactors, exact_svd, randomized_svd
from alnico.numerics.sizes import bytes_of, format_size
from alnico.output.card import public_names
from alnico.output.disk_space import check_output_place, check_space, needed_files
from alnico.output.lock import format_json
from alnico.output.staging import PartDirectory
from alnico.run_options import DEFAULT_BUDGET_BYTES, RunOptions, Size
from alnico.threads import Abandoned, Crew

REPORT = "extraction.json"

FIRST_RANK = 32
"""Where the search for the rank that keeps some energy begins; it doubles."""

MOST_RANK = 256
"""Largest rank of a matrix when bytes are spent where they help most, unless ``max_rank`` says otherwise."""

DEFAULT_RANK = 32


@dataclass(frozen=True)
class Options:
    """What decides an adapter's bits, checked."""

    rank: int | None
    energy: float | None
    size: int | None
    max_rank: int | None
    exact: bool
    others: OthersChoice
    embeddings: EmbeddingsChoice
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    dtype: str
    seed: int

    def cap(self, subject: ExtractTarget) -> int:
        """The largest rank that may be asked for of a matrix."""
        side = min(subject.matrix)
        if self.rank is not None:
            return min(self.rank, side)
        if self.energy is not None:
            return min(self.max_rank or side, side)
        assert self.size is not None
        return min(
            self.max_rank or MOST_RANK, side, self.size // (sum(subject.matrix) * DTYPES[self.dtype].bytes)
        )

    def data(self) -> dict[str, Any]:
        """Those that are not as they would be by themselves, and how the rank was chosen."""
        given = {
            "rank": self.rank,
            "energy": self.energy,
            "size": self.size,
            "max_rank": self.max_rank,
            "exact": self.exact or None,
            "include": list(self.include) or None,
            "exclude": list(self.exclude) or None,
        }
        chosen = {
            "others": self.others,
            "embeddings": self.embeddings,
            "dtype": self.dtype,
            "seed": self.seed,
        }
        return {key: value for key, value in given.items() if value is not None} | chosen


@ieee_arithmetic()
def extract(
    tuned: str | os.PathLike[str],
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
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
    watch: Watcher | None = None,
) -> Extraction:
    """Write what a fine-tune changed of its base as a LoRA adapter: ``B A`` near ``tuned - base``.

    Each matrix of the difference D is projected on its leading singular vectors by
    :func:`alnico.numerics.randomized.randomized_svd`; A and B share the singular values by their square
    roots, and alpha is the rank, so that the scale is 1. Differences are taken in float32 (float64 where a
    model is), never rounded before. Convolutions are flattened; an embedding has ``lora_embedding_A`` and
    ``_B``. The finished adapter is folded back and compared with the fine-tune, tensor by tensor, in float64.
    The same call resumes an interrupted extraction.

    Use when: a full fine-tune is to be kept, served or combined as an adapter. Fine-tunes have slowly falling
        spectra: of all-MiniLM-L6-v2's, rank 32 keeps 68 % of the energy of a matrix's change, rank 128 93 %.
        The report says what is lost where.

    Options:
        tuned: The fine-tune: a directory, a file, or owner/name@revision on the hub.
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
    Edge cases: an unchanged tensor is left out and named; a stack of experts in one tensor is left out and
        named.
    Errors: RecipeError for an option out of its range; MismatchError for models of other kinds, unrelated
        ones, and equal ones, of which there is nothing to extract; NonFiniteError; ResourceError;
        OutputError; VerificationError; those of reading and HubError.
    Differs from the source: the singular vectors are found by random directions unless ``exact``.
    Source: Eckart, Young 1936 (the best of a rank); Halko et al. 2011, https://arxiv.org/abs/0909.4061; Hu et
        al. 2021, https://arxiv.org/abs/2106.09685; the format is PEFT's.
    """
    begin = time.perf_counter()
    run = RunOptions.of(memory=memory, threads=threads, offline=offline, watch=watch)
    options = _checked(rank, energy, size, max_rank, exact, others, embeddings, include, exclude, dtype, seed)
    target = Path(out)
    check_publishable(target)
    may_replace = replace_mode(overwrite, overwrite_anything)
    with ExitStack() as stack:
        opened: list[Source] = [
            stack.enter_context(open_model(reference, offline=run.offline)) for reference in (tuned, base)
        ]
        models = untie(opened, opened)
        models[0] = with_names_of(models[0], models[1])
        subjects = subjects_of(
            models[0],
            models[1],
            include=options.include,
            exclude=options.exclude,
            others=options.others,
            embeddings=options.embeddings,
        )
        caps = [options.cap(s) if s.treatment == "factors" else 0 for s in subjects.compared]
        room = fit(models[0], models[1], subjects.compared, caps, run)
        check_output_place(target, needed_files(models), may_replace)
        saved = sum(
            s.elements * DTYPES[options.dtype].bytes for s in subjects.compared if s.treatment == "saved"
        )
        check_space(
            target,
            2 * sum(4 * cap * sum(s.matrix) for s, cap in zip(subjects.compared, caps, strict=True)) + saved,
        )
        fetch_files(models, [m.absent(list(m.tensors), True) for m in models], run.watch)
        _judge(models[0], models[1], subjects)
        with PartDirectory(target) as part:
            work = _ExtractRun(models[0], models[1], options, subjects, room, run.watch)
            spool = Spool(part, work.fingerprint(), restart)
            try:
                found = work.all(part, spool, verify, os.fspath(base))
            except RunError:
                raise
            except AlnicoError:
                part.remove()
                raise
            part.publish(None, may_replace)
    return replace(found, path=target, seconds=time.perf_counter() - begin)


def _checked(
    rank: int | None,
    energy: float | None,
    size: int | str | None,
    max_rank: int | None,
    exact: bool,
    others: OthersChoice,
    embeddings: EmbeddingsChoice,
    include: Sequence[str],
    exclude: Sequence[str],
    dtype: str,
    seed: int,
) -> Options:
    for name, filters in (("include", include), ("exclude", exclude)):
        if (
            isinstance(filters, str)
            or not isinstance(filters, Sequence)
            or not all(isinstance(f, str) for f in filters)
        ):
            raise RecipeError(
                f"extract: {name} is {quote_value(filters)}; expected a list of filters. Write ['mlp'], say."
            )
    given = [
        name for name, value in (("rank", rank), ("energy", energy), ("size", size)) if value is not None
    ]
    if len(given) > 1:
        raise RecipeError(
            f"extract: {' and '.join(given)} both say how large ranks are; expected one of them. Leave one out."
        )
    rank, max_rank = (
        None if v is None else whole_number(v, f"extract: {n}", None, RecipeError)
        for n, v in (("rank", rank), ("max_rank", max_rank))
    )
    for name, number in (("rank", rank), ("max_rank", max_rank)):
        if number is not None and number < 1:
            raise RecipeError(f"extract: {name} is {number}; expected 1 at least. Choose a larger one.")
    seed = whole_number(seed, "extract: seed", None, RecipeError)
    share = "the share of squares that is kept, in (0, 1]. Choose 0.9, say"
    if (
        energy is not None
        and not 0 < (energy := finite_number(energy, "extract: energy", share, RecipeError)) <= 1
    ):
        raise RecipeError(f"extract: energy is {energy:g}; expected {share}.")
    if max_rank is not None and rank is not None:
        raise RecipeError(
            "extract: max_rank is for energy and size, and rank is given; expected one of them. Leave one out."
        )
    for name, choice, known in (
        ("others", others, ("save", "leave")),
        ("embeddings", embeddings, ("lora", "save", "leave")),
    ):
        if choice not in known:
            raise RecipeError(
                f"extract: {name} is {choice!r}; expected {' or '.join(known)}. Choose one of them."
            )
    code = TORCH_NAMES.get(
        (dtype if isinstance(dtype, str) else quote_value(dtype)).removeprefix("torch."), ""
    )
    if code not in ("F32", "BF16", "F16"):
        raise RecipeError(
            f"extract: dtype is {quote_value(dtype)}; expected float32, bfloat16 or float16. Choose one of them."
        )
    return Options(
        DEFAULT_RANK if not given else rank,
        energy,
        None if size is None else bytes_of(size),
        max_rank,
        exact,
        others,
        embeddings,
        tuple(include),
        tuple(exclude),
        code,
        seed,
    )


def _judge(tuned: Source, base: Source, subjects: Subjects) -> None:
    """Look at a sample before anything is computed. Errors: MismatchError for models that were not tuned from one another."""
    names = [s.name for s in subjects.compared if is_matrix(base.tensors[s.name])]
    found = compare_models(
        (base, tuned), pick_evenly([SampledTensor(name, (0, 1)) for name in names], TENSORS)
    ).likenesses
    if found and found[0].verdict == "unrelated":
        few = ", ".join(
            f"{name} (cosine {cosine:.2f})" for name, cosine in list(found[0].uncorrelated.items())[:3]
        )
        raise MismatchError(
            f"{tuned.label} was not tuned from {base.label}: {len(found[0].uncorrelated)} of {len(found[0].cosines)} matrices that were "
            f"looked at have nothing to do with one another: {few}; expected cosines near 1. Give the base that it was tuned from."
        )


class _ExtractRun:
    """One extraction: all its tensors, threads and results."""

    def __init__(
        self,
        tuned: Source,
        base: Source,
        options: Options,
        subjects: Subjects,
        room: ExtractMemory,
        watch: Watcher | None,
    ) -> None:
        self.tuned = tuned
        self.base = base
        self.options = options
        self.subjects = subjects
        self.room = room
        self._crew = Crew(room.threads, watch)
        self._arena = Arena(max(room.held_bytes, 32 * CHECKED_ELEMENTS))

    def all(self, part: PartDirectory, spool: Spool, verify: bool, reference: str) -> Extraction:
        """Factors, ranks, files, verification; the adapter is in the part directory when this returns."""
        is_left = False
        try:
            with self._crew:
                try:
                    self._factorise(spool)
                except BaseException as error:
                    has_ended = True
                    with suppress(RunError):  # this error came first
                        has_ended = spool.stop(is_interrupted=isinstance(error, KeyboardInterrupt))
                    is_left = isinstance(error, Abandoned) or not has_ended
                    raise
                spool.stop()
                return self._made(part, spool, verify, reference)
        finally:
            if not is_left:  # a thread that is left behind may still write what it computed
                spool.close()

    def _made(self, part: PartDirectory, spool: Spool, verify: bool, reference: str) -> Extraction:
        """The adapter, of factors that are all in the spool."""
        ranks = self._ranks(spool)
        tensors = self._tensors(spool, ranks)
        if not any(t.change for t in tensors):
            raise MismatchError(
                f"{self.tuned.label} equals {self.base.label} in all {len(tensors)} tensors, so there is nothing to extract; expected a "
                "fine-tune and its base. Check the two paths."
            )
        if not any(t.treatment == "factors" for t in tensors):
            raise MismatchError(
                f"{self.tuned.label}: no matrix that is to be factors changed from {self.base.label}, or has room for a rank; expected one at "
                "least. Raise the size, or change the filters."
            )
        found = Extraction(
            part.model,
            self.tuned.label,
            self.base.label,
            self.options.data(),
            tuple(tensors),
            tuple((a.name, a.why) for a in self.subjects.unmatched),
            0,
            sum(t.byte_size for t in self.base.tensors.values()),
            False,
            0.0,
            len(spool.done),
        )
        with suppress(OSError):
            remove(part.model, part.folder)  # of a run that was ended while it wrote the adapter
        files = self._write(part, spool, found, reference)
        found = replace(found, byte_size=files.byte_size)
        if verify:
            found = self._verified(part, found)
        try:
            write_file(part.model / REPORT, format_json(found.data()) + "\n", part.folder)
        except OSError as error:
            raise RunError(
                f"{part.model}: cannot be written ({error.strerror}). Make room or check the disk."
            ) from None
        files.lock(self._locked())
        return found

    def fingerprint(self) -> dict[str, Any]:
        """What decides the adapter's bits; each option by its name, so that one that changed is named."""
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
            **{f"--{key.replace('_', '-')}": chosen.get(key) for key in keys},
            "inputs": [model.identity() for model in (self.tuned, self.base)],
        }

    def _factorise(self, spool: Spool) -> None:
        todo = [s for s in self.subjects.compared if s.name not in spool.done]
        # The largest first: a thread that takes one last works on while the others have nothing to do.
        todo.sort(key=lambda s: (s.treatment != "factors", -s.elements))
        self._crew.tell(Reading(len(todo), sum(self._bytes(s) for s in todo)))
        with one_blas_thread():
            self._crew.run([(self._one, (spool, subject)) for subject in todo])

    def _one(self, spool: Spool, subject: ExtractTarget) -> None:
        real = real_of(self.tuned, self.base, subject.name)
        cap = self.options.cap(subject) if subject.treatment == "factors" else 0
        is_held = cap > 0 and self.room.holds(subject, real)
        delta = Delta(
            self.tuned,
            self.base,
            subject,
            self._arena.views([subject.elements * real.itemsize])[0] if is_held else None,
        )
        if cap:
            factors = self._factors(delta, cap)
        else:
            rows, columns = subject.matrix
            squares = delta.squares() if subject.elements else 0.0
            factors = LowRankFactors(
                np.zeros((rows, 0), real), np.zeros((0, columns), real), np.zeros(0), squares
            )
        if not math.isfinite(factors.squares):
            delta.refuse()
        if not factors.squares and real == np.float64:
            delta.refuse_tiny()
        self._crew.check()  # a later run may write at the same place
        spool.put(subject.name, factors)
        self._crew.tell(Advanced(subject.name, self._bytes(subject)))

    def _factors(self, delta: Delta, cap: int) -> LowRankFactors:
        shape = delta.subject.matrix

        def blocks() -> Any:
            for block in delta.blocks():
                self._crew.check()
                yield block

        if self.options.exact:
            return self._enough(exact_svd(blocks, shape, cap))
        seed = (self.options.seed % (1 << 64), xxhash.xxh3_64_intdigest(delta.subject.name.encode()))
        if self.options.energy is None:
            return randomized_svd(blocks, shape, cap, seed=seed)
        rank = min(FIRST_RANK, cap)
        while True:
            found = randomized_svd(blocks, shape, rank, seed=seed)
            kept = float(np.sum(found.values**2))
            if rank == cap or found.rank < rank or not kept < self.options.energy * found.squares:
                return self._enough(found)
            rank = min(2 * rank, cap)

    def _enough(self, factors: LowRankFactors) -> LowRankFactors:
        """What is needed of factors: up to the energy that is to be kept."""
        if self.options.energy is None or not factors.rank:
            return factors
        rank = ranks_of_energy([Spectrum(factors.values, factors.squares, 1)], self.options.energy)[0]
        return LowRankFactors(
            factors.left[:, :rank].copy(), factors.right[:rank].copy(), factors.values[:rank], factors.squares
        )

    def _ranks(self, spool: Spool) -> dict[str, int]:
        """The rank of each matrix that is to be factors; 0 for one that did not change."""
        factored = self.subjects.factored
        width = DTYPES[self.options.dtype].bytes
        spectra = [Spectrum(*spool.spectrum(s.name), sum(s.matrix) * width) for s in factored]
        if self.options.size is None:
            return {s.name: len(spectrum.values) for s, spectrum in zip(factored, spectra, strict=True)}
        most = {s.name: len(spectrum.values) for s, spectrum in zip(factored, spectra, strict=True)}
        adapter, _ = self._adapter(most, self._saved(spool, most), "")
        fixed = sum(math.prod(shape) for shape in adapter.saved.values()) * width
        header = 8 + sum(len(name) + 100 for name, _, _ in adapter.tensors()) + 200
        budget = self.options.size - fixed - header
        if budget <= 0:
            raise ResourceError(
                f"extract: what is saved as it is takes {format_size(fixed + header)}, the size is {format_size(self.options.size)}. Raise "
                "--size, or leave out what is no matrix (--others leave)."
            )
        return dict(zip((s.name for s in factored), ranks_of_size(spectra, budget), strict=True))

    def _saved(self, spool: Spool, ranks: Mapping[str, int]) -> SavedTensors:
        changed = [
            s.name for s in self.subjects.compared if s.treatment == "saved" and spool.spectrum(s.name)[1] > 0
        ]
        return saved_of(
            self.base,
            changed,
            {s.module for s in self.subjects.factored if ranks[s.name]},
            self.subjects.tied,
        )

    def _tensors(self, spool: Spool, ranks: Mapping[str, int]) -> list[ExtractedTensor]:
        whole = set(self._saved(spool, ranks).names)
        width = DTYPES[self.options.dtype].bytes
        found = []
        for s in self.subjects.compared:
            values, squares = spool.spectrum(s.name)
            rank = ranks.get(s.name, 0)
            treatment: Any = "unchanged" if not squares and s.name not in whole else s.treatment
            why = s.why if treatment == "left out" else ""
            if treatment == "factors" and not rank:
                treatment, why = "left out", "bytes keep more elsewhere"
            if s.name in whole:
                treatment, why = "saved", ""
            rest = (
                max(squares - float(np.sum(values[:rank] ** 2)), 0.0) if treatment == "factors" else squares
            )
            size = (
                rank * sum(s.matrix) * width
                if treatment == "factors"
                else s.elements * width
                if treatment == "saved"
                else 0
            )
            left = 0.0 if treatment == "saved" else math.sqrt(rest)
            found.append(
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
        return found

    def _adapter(
        self, ranks: Mapping[str, int], saved: SavedTensors, reference: str
    ) -> tuple[OutputAdapter, dict[str, ExtractTarget]]:
        """What the adapter holds, and the subject of each of its modules."""
        modules: dict[str, ExtractTarget] = {s.module: s for s in self.subjects.factored if ranks[s.name]}
        outputs = [
            replace(_module(s, ranks[s.name]), module=self._spelled[s.name].rpartition(".")[0])
            for s in modules.values()
        ]
        spelled = self._spelled
        words = [spelled[name].split(".") for name in self.base.tensors]
        every = {".".join(w[:i]) for w in words for i in range(1, len(w))}
        named = {spelled[s.name].rpartition(".")[0] for s in modules.values()}
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
            "modules_to_save": module_names(list(spelled.values()), self._spelled_modules(saved)) or None,
            "bias": "all" if saved.has_biases else "none",
            "fan_in_fan_out": any(s.is_turned and s.kind == "linear" for s in modules.values()),
        }
        shapes = {
            self._written(name, written): self.base.tensors[name].shape
            for name, written in saved.names.items()
        }
        return OutputAdapter(outputs, shapes, self.options.dtype, settings), modules

    @functools.cached_property
    def _spelled(self) -> dict[str, str]:
        """The base's tensors as its module has them, by their names in the file: an adapter has the module's names."""
        return transformers_names(self.base.config, self.base.tensors)

    def _spelled_modules(self, saved: SavedTensors) -> list[str]:
        """The modules that are saved whole, by the module's names."""
        whole = set(saved.modules)
        return sorted(
            {self._spelled[n].rpartition(".")[0] for n in self.base.tensors if n.rpartition(".")[0] in whole}
        )

    def _written(self, name: str, written: str) -> str:
        """How a tensor that is saved is called in the adapter; ``written`` is that by the file's names."""
        module, _, parameter = self._spelled[name].rpartition(".")
        return f"{module}.base_layer.{parameter}" if written != name else self._spelled[name]

    def _write(self, part: PartDirectory, spool: Spool, found: Extraction, reference: str) -> AdapterFiles:
        ranks = {t.name: t.rank for t in found.tensors}
        saved = self._saved(spool, ranks)
        adapter, modules = self._adapter(ranks, saved, reference)
        with AdapterFiles(part, adapter) as files:
            for module, subject in zip(adapter.modules, modules.values(), strict=True):
                factors = spool.read(subject.name, module.rank)
                left, right = factors.left, factors.right
                if subject.is_turned:
                    left, right = right.T, left.T
                of_left, of_right = module.names
                files.write(of_right, np.ascontiguousarray(right))
                files.write(of_left, np.ascontiguousarray(left))
            for name, written in saved.names.items():
                files.write(PREFIX + self._written(name, written), read_tensor(self.tuned, name))
            files.finish(*self._card(replace(found, byte_size=files.byte_size)))
        return files

    def _card(self, found: Extraction) -> tuple[dict[str, Any], str]:
        """The card's front matter and text."""
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
        return front, card_text(found, tuned, base)

    def _locked(self) -> dict[str, Any]:
        """What the lock says beside the hashes of what was made."""
        return {
            "do": "extract",
            "options": self.options.data(),
            "inputs": [
                {
                    "model": model.label,
                    "repositories": [{"repository": r.name, "commit": r.commit} for r in repositories(model)],
                    "files": [
                        {k: v for k, v in f.items() if k not in ("mtime_ns", "commit")}
                        for f in model.identity()
                    ],
                }
                for model in (self.tuned, self.base)
            ],
        }

    def _verified(self, part: PartDirectory, found: Extraction) -> Extraction:
        """Fold the adapter back and measure what is left of the change. Errors: VerificationError if it is more than it must be."""
        subjects = {s.name: s for s in self.subjects.compared}
        todo = [t for t in found.tensors if t.treatment in ("factors", "saved") and subjects[t.name].elements]
        sums: dict[str, np.ndarray] = {
            t.name: np.zeros((-(-subjects[t.name].elements // CHECKED_ELEMENTS), 2)) for t in todo
        }
        self._crew.tell(Reading(len(todo), sum(self._bytes(subjects[t.name]) for t in todo)))
        with open_adapted(found.tuned, self.base.label, str(part.model)) as folded:

            def measure(name: str, runs: range) -> None:
                elements = subjects[name].elements
                for run in runs:
                    self._crew.check()
                    first, last = run * CHECKED_ELEMENTS, min((run + 1) * CHECKED_ELEMENTS, elements)
                    sums[name][run] = self._apart(folded, name, first, last)
                    self._crew.tell(Advanced(name, self._bytes(subjects[name]) * (last - first) // elements))

            calls = [
                (measure, (t.name, range(i, min(i + 8, len(sums[t.name])))))
                for t in todo
                for i in range(0, len(sums[t.name]), 8)
            ]
            with one_blas_thread():
                self._crew.run(calls)
        tensors = []
        for t in found.tensors:
            if t.name not in sums:
                tensors.append(replace(t, measured=t.expected))
                continue
            left, length = (math.sqrt(math.fsum(column)) for column in sums[t.name].T)
            eps = {"F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}[self.options.dtype]
            allowed = math.sqrt(
                t.expected**2 * 1.002 + (4 * eps * t.change) ** 2 + (4 * 2.0**-24 * length) ** 2
            )
            least = {"F32": 2.0**-126, "F16": 2.0**-14, "BF16": 2.0**-126}[self.options.dtype]
            if (
                t.treatment == "saved"
            ):  # below the least normal number, rounding takes as much from every number
                allowed = 2 * eps * (length + t.change) + 2 * least * eps * math.sqrt(
                    subjects[t.name].elements
                )
            elif t.bytes:
                allowed = max(allowed, 1e-5 * t.change)
            if not left <= allowed:
                self._refuse_tiny(subjects[t.name], t, least)
                raise VerificationError(
                    f"{t.name}: folded back, the adapter is {left:.3g} from the fine-tune, expected {allowed:.3g} at most (the change is "
                    f"{t.change:.3g} long). The disk or memory may be faulty: extract again, and report it if it stays."
                )
            tensors.append(replace(t, measured=left))
        return replace(found, tensors=tuple(tensors), is_verified=True)

    def _refuse_tiny(self, subject: ExtractTarget, tensor: ExtractedTensor, least: float) -> None:
        """Say so where an adapter differs since numbers are below those that its dtype, or the arithmetic, holds in full.

        Errors: MismatchError.
        """
        each = tensor.change / math.sqrt(subject.elements)
        arithmetic = float(np.finfo(real_of(self.tuned, self.base, subject.name)).smallest_normal)
        factor = math.sqrt(tensor.change / max(subject.matrix)) if tensor.treatment == "factors" else math.inf
        if each < 1e3 * arithmetic or factor < 4 * least:
            raise MismatchError(
                f"{tensor.name}: the change is so small ({each:.1e} in the mean) that {self.options.dtype} cannot hold its factors; expected a "
                "larger one, or a dtype of the adapter with a wider range (float32 or bfloat16). Leave the tensor out (exclude), or multiply "
                "both models by a number."
            )

    def _apart(self, folded: Source, name: str, first: int, last: int) -> tuple[float, float]:
        """The sums of squares of folded minus fine-tune and of the fine-tune, over some elements."""
        count = last - first
        widths = [DTYPES[m.tensors[name].dtype].bytes for m in (folded, self.tuned)]
        # Memory that is used again: fresh pages for each block took two thirds of the time.
        rest, *views = self._arena.views(
            [8 * count, *(count * width for width in widths), 4 * count, 4 * count]
        )
        values = []
        for model, raw, narrow, width in zip((folded, self.tuned), views[:2], views[2:], widths, strict=True):
            model.read_into(name, first * width, memoryview(raw))
            if width >= 4:
                values.append(decode(raw, model.tensors[name].dtype))
            else:
                decode_into(raw, model.tensors[name].dtype, narrow.view(np.float32))
                values.append(narrow.view(np.float32))
        made, meant = values
        wide = rest.view(np.float64)
        np.subtract(made, meant, out=wide, dtype=np.float64)
        return float(wide @ wide), float(meant @ meant)

    def _bytes(self, subject: ExtractTarget) -> int:
        return sum(model.tensors[subject.name].byte_size for model in (self.tuned, self.base))


def _module(subject: ExtractTarget, rank: int) -> OutputModule:
    rows, columns = subject.matrix
    if subject.kind == "convolution":
        ones = (1,) * (len(subject.shape) - 2)
        return OutputModule(
            subject.module, "convolution", rank, (rows, rank, *ones), (rank, *subject.shape[1:])
        )
    if subject.is_turned:
        rows, columns = columns, rows
    return OutputModule(subject.module, subject.kind, rank, (rows, rank), (rank, columns))
