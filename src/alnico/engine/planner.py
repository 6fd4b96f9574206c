"""Plans recipes under the options of one call, and merges them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

from alnico.checkpoint.file_model import FileModel
from alnico.checkpoint.open_model import open_model
from alnico.checkpoint.output_path import Replace, check_publishable, is_single_file
from alnico.checkpoint.reference import Paths, path_list
from alnico.checkpoint.shards import DEFAULT_MAX_SHARD_BYTES
from alnico.checkpoint.signatures import SignedInputs, check_key
from alnico.checkpoint.source import Source
from alnico.checkpoint.statistics import StatisticsSource
from alnico.engine.fetch import fetch_inputs
from alnico.engine.remote_run import run_plan_to
from alnico.engine.requested_bytes import requested_bytes
from alnico.engine.run import MergeResult
from alnico.engine.stages import MergeOnNodes, close, run_stages
from alnico.errors import AlnicoError, OutputError
from alnico.numerics.sizes import bytes_of
from alnico.output.file_metadata import with_metadata
from alnico.output.remote_target import RemoteTarget
from alnico.output.shard_uploads import UPLOAD_BYTES
from alnico.plan.build import build_plan
from alnico.plan.job import Plan
from alnico.plan.norm_weights import analysis_files
from alnico.recipe.reference import resolve_reference
from alnico.recipe.requantise import with_requantising
from alnico.recipe.schema import Recipe
from alnico.recipe.stages import order_stages
from alnico.run_options import DEFAULT_RUN, RunOptions, Size

NO_STAGES: Mapping[str, str | Source] = MappingProxyType({})


@dataclass(frozen=True)
class Planner:
    """Plans recipes: opens their models, checks signatures where ``signed`` asks for it, and lays out the
    output."""

    run: RunOptions = DEFAULT_RUN
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES
    strict_license: bool = False
    signed: SignedInputs | None = None
    has_hashes: bool = True
    """Can the hashes of the inputs be written into the metadata of an output of one file?"""
    _checked: set[str] = field(default_factory=set)
    """Inputs whose signatures were checked."""

    @classmethod
    def of(
        cls,
        run: RunOptions,
        max_shard_size: Size,
        strict_license: bool = False,
        verify_inputs: Paths = (),
        allow_unsigned: Paths = (),
        require_signed: bool = False,
    ) -> Planner:
        """Check the options that a caller gave. Errors: AlnicoError; UncheckedError for a key that cannot be read."""
        max_shard_bytes = bytes_of(max_shard_size)
        signed = signed_inputs(verify_inputs, allow_unsigned, require_signed)
        return cls(run, max_shard_bytes, strict_license, signed)

    def plan(
        self, recipe: Recipe, stages: Mapping[str, str | Source] = NO_STAGES, single_file: str | None = None
    ) -> Plan:
        """Plan a recipe. ``stages`` maps names of stages to their paths, or to what they will be.

        Errors: as for :func:`alnico.plan.build.build_plan`; VerificationError and UncheckedError for
        signatures.
        """

        def open_source(reference: str) -> Source:
            stage = stages.get(reference)
            if stage is not None and not isinstance(stage, str):
                return stage
            model = open_model(stage or resolve_reference(reference, recipe.folder), access=self.run.access)
            if isinstance(model, FileModel) and stage is not None:
                model.label = reference  # not the temporary folder of the stage
            elif self.signed is not None and reference not in self._checked:
                self.signed.check(model, reference)
                self._checked.add(reference)
            return model

        plan = build_plan(
            recipe,
            run=self.run,
            max_shard_bytes=self.max_shard_bytes,
            single_file=single_file,
            open_source=open_source,
            strict_license=self.strict_license,
        )
        if self.signed is not None:
            self._check_other_inputs(self.signed, plan)
        if single_file is not None:
            plan = with_metadata(plan, has_hashes=self.has_hashes)
        requested = sum(requested_bytes(plan).values())
        return replace(plan, bytes_to_request=requested) if requested else plan

    def _check_other_inputs(self, signed: SignedInputs, plan: Plan) -> None:
        """Check the signatures of inputs that are not models: statistics, and analyses that weights come
        from."""
        for source in plan.sources:
            if isinstance(source, StatisticsSource) and source.label not in self._checked:
                signed.check(source)
                self._checked.add(source.label)
        for path, place in analysis_files(plan, (".", plan.recipe.folder)).items():
            if path not in self._checked:
                signed.check_path(place, path)
                self._checked.add(path)

    def for_output(self, out: Path | RemoteTarget) -> Planner:
        """Return the planner of an output: one at a URL needs memory to send it."""
        if not isinstance(out, RemoteTarget):
            return self
        return replace(self, run=replace(self.run, reserved_bytes=UPLOAD_BYTES), has_hashes=False)

    def merge(
        self, recipe: Recipe, out: Path | RemoteTarget, *, overwrite: Replace, restart: bool
    ) -> MergeResult:
        """Plan a recipe, download its inputs and merge it into ``out``, on the nodes of a cluster if ``run.ray`` names one.

        Errors: all of ``alnico.errors``.
        """
        if isinstance(out, Path):
            check_publishable(out, may_be_gguf=True)
        single_file = single_file_of(out)
        planner = self.for_output(out)
        plan = planner.plan(recipe, single_file=single_file)
        try:
            fetch_inputs(
                plan, out, overwrite=overwrite, watch=self.run.watch, on_nodes=self.run.ray is not None
            )
            with planner.nodes() as nodes:
                return run_plan_to(
                    plan,
                    out,
                    overwrite=overwrite,
                    restart=restart,
                    watch=self.run.watch,
                    factor_cache=self.run.factor_cache,
                    nodes=None if nodes is None else nodes(recipe, NO_STAGES, single_file),
                )
        finally:
            close([plan])

    def merge_all(
        self, recipes: Sequence[Recipe], out: Path | RemoteTarget, *, overwrite: Replace, restart: bool
    ) -> tuple[MergeResult, ...]:
        """Merge all documents of a file into ``out``, with those that requantising them needs.

        Returns what is no stage and was not finished before. Errors: all of ``alnico.errors``.
        """
        recipes = with_requantising(recipes)
        if len(recipes) == 1:
            return (self.merge(recipes[0], out, overwrite=overwrite, restart=restart),)
        planner = self.for_output(out)
        with planner.nodes() as nodes:
            return run_stages(
                order_stages(recipes),
                planner.plan,
                out,
                overwrite=overwrite,
                restart=restart,
                watch=self.run.watch,
                factor_cache=self.run.factor_cache,
                nodes=nodes,
            )

    def merge_one(
        self, recipe: Recipe, out: Path | RemoteTarget, *, overwrite: Replace, restart: bool
    ) -> MergeResult:
        """Merge one recipe into ``out``, see :meth:`merge_all`. Errors: all of ``alnico.errors``."""
        results = self.merge_all((recipe,), out, overwrite=overwrite, restart=restart)
        if not results:  # an earlier run ended after it published the output
            raise OutputError(
                f"{out}: is finished already; expected a merge to do. Use it, or merge with restart."
            )
        return results[0]

    @contextmanager
    def nodes(self) -> Iterator[MergeOnNodes | None]:
        """Connect to the cluster that ``run.ray`` names, and give what merges a recipe on it; None if it names none.

        Errors: as for :func:`alnico.cluster.connect.connect`.
        """
        if self.run.ray is None:
            yield None
            return
        from alnico.cluster import connect
        from alnico.engine.cluster_merge import ClusterMerge

        run = replace(self.run, watch=None, ray=None)
        planner = replace(self, run=run, signed=None, _checked=set())
        with connect.connect(self.run.ray) as cluster:
            yield partial(ClusterMerge, cluster, planner, self.run.factor_cache)

    def on_node(self) -> Planner:
        """Return this planner with the threads of the node that this is called on, unless the caller gave a number."""
        if not self.run.has_default_threads:
            return self
        from alnico.cluster.nodes import processors_here

        return replace(self, run=replace(self.run, threads=processors_here()))


def single_file_of(out: Path | RemoteTarget) -> str | None:
    """Return the name of the one output file, if ``out`` is a file."""
    if isinstance(out, RemoteTarget):
        return out.single_file
    return out.name if is_single_file(out) else None


def signed_inputs(keys: Paths, unsigned: Paths, is_required: bool) -> SignedInputs | None:
    """Return what a call requires of its inputs' signatures; None if nothing.

    Errors: AlnicoError for options that contradict each other; UncheckedError for a key that cannot be read.
    """
    key_paths, exempt = [Path(key) for key in path_list(keys)], tuple(path_list(unsigned))
    if (is_required or exempt) and not key_paths:
        raise AlnicoError(
            "signatures are required, and no public key is given to verify them with. Give one (--verify-inputs)."
        )
    if is_required and exempt:
        raise AlnicoError(
            f"every input must be signed, and {exempt[0]} need not be. Leave out --require-signed or --allow-unsigned."
        )
    if not key_paths:
        return None
    for key in key_paths:  # also where no input turns out to be signed
        check_key(key)
    return SignedInputs(tuple(key_paths), exempt)
