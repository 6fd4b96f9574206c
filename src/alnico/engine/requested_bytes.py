"""Says in advance how many bytes of models at URLs a merge requests, besides headers and side files."""

from __future__ import annotations

from collections.abc import Sequence

from alnico.checkpoint.remote.remote_weights import remote_tensors
from alnico.checkpoint.source import Source
from alnico.engine import measure
from alnico.engine.blocks import blocks
from alnico.engine.differences import as_differences
from alnico.engine.measure import SAMPLED_RUN, SAMPLED_RUNS, SMALL, is_bracketed
from alnico.engine.reading_ahead import in_one_pass, is_read_ahead, reads_of
from alnico.engine.relatedness import sample_bytes, sampled_tensors
from alnico.kernels.facts import KthLargest, MeasuredFact
from alnico.numerics.dtypes import DTYPES
from alnico.plan.job import Job, Plan
from alnico.plan.remote_reads import RemoteReads

TO_MERGE, AS_SAMPLE = "to merge", "as a sample, to compare the models"
WHOLE_MODEL, NORMS, NO_ROOM = (
    "to measure the whole model",
    "for weights from norms",
    "again, without room in the memory",
)


def requested_bytes(plan: Plan) -> dict[str, int]:
    """Return the bytes of weights that a merge of the plan requests from servers, by their purpose, if nothing is done or kept yet.

    That is what its jobs read, each byte once; what is measured before; a sample of some tensors; and what jobs read several times
    and have no room for in the memory. More is requested only where a search for a kth largest value in such a tensor needs a further
    pass, which its sample decides, and of tensors without room that are computed from others.
    """
    if not reads_of(plan.jobs, plan.sources):
        return {}
    jobs = as_differences(plan.jobs, plan.sources)
    reads = reads_of([*jobs, *plan.to_measure], plan.sources)
    read = [job for job in jobs if job.name in reads]
    of_jobs = {job.name: _of_job(job, reads[job.name], plan) for job in read}
    once = sum(min(reads[job.name].byte_size, of_jobs[job.name]) for job in read)
    of_model = 0
    for fact, over in measure.over_model(jobs).items():
        a_pass = sum(_one_pass(job, reads[job.name], plan) for job in over if job.name in reads)
        of_model += measure.model_passes(fact, over) * a_pass
    found = {
        TO_MERGE: once,
        NO_ROOM: sum(of_jobs.values()) - once,
        WHOLE_MODEL: of_model,
        NORMS: sum(_direct(job, plan) for job in plan.to_measure),
        AS_SAMPLE: _sampled(plan),
    }
    return {purpose: count for purpose, count in found.items() if count}


def _of_job(job: Job, reads: RemoteReads, plan: Plan) -> int:
    if is_read_ahead(reads, plan.memory.ahead_bytes):
        return reads.byte_size
    if job.merge is None or job.kind != "mix":
        return _direct(job, plan)
    levels = job.merge.levels()
    if len(list(blocks((0, job.elements), plan.memory.block_elements))) < 2:
        return _direct(job, plan)  # it is held as a block
    samples = sum(any(is_bracketed(f, job) for f in _searched(level, job)) for level in levels)
    passes = 1 + sum(max((_passes(fact, job) for fact in level), default=0) for level in levels)
    return passes * _direct(job, plan) + samples * _direct(job, plan, _sampled_elements(job))


def _one_pass(job: Job, reads: RemoteReads, plan: Plan) -> int:
    once = in_one_pass(reads)
    return once.byte_size if is_read_ahead(once, plan.memory.ahead_bytes) else _direct(job, plan)


def _direct(job: Job, plan: Plan, elements: int | None = None) -> int:
    """The bytes that a pass over a job requests, or over so many of its elements, where each input is requested when it is read."""
    total = 0
    for tensor in job.read:
        found = [] if tensor.is_difference else _stored(plan.sources[tensor.model], tensor.name)
        if found:
            stored = min(sum(found), tensor.byte_size)
            total += stored if elements is None else stored * elements // max(job.elements, 1)
    return total


def _stored(source: Source, name: str) -> list[int]:
    return [model.tensors[stored].byte_size for model, stored in remote_tensors(source, [name])]


def _searched(level: Sequence[MeasuredFact], job: Job) -> list[KthLargest]:
    """The kth largest values of a level for which a tensor is searched."""
    return [
        fact
        for fact in level
        if isinstance(fact, KthLargest) and job.elements and any(share < 1 for share in fact.share)
    ]


def _passes(fact: MeasuredFact, job: Job) -> int:
    if not isinstance(fact, KthLargest):
        return 1
    if not _searched([fact], job):
        return 0
    if job.elements <= SMALL or is_bracketed(fact, job):
        return 1
    return DTYPES["F64" if job.real == "float64" else "F32"].bits // 16


def _sampled_elements(job: Job) -> int:
    return SAMPLED_RUNS * min(job.elements // SAMPLED_RUNS, SAMPLED_RUN)


def _sampled(plan: Plan) -> int:
    """The bytes of the sample by which models are compared before they are merged."""
    places, _ = sampled_tensors(plan)
    total = 0
    for place in places:
        for model in place.models:
            found = remote_tensors(plan.sources[model], [place.name])
            if found:
                tensor = plan.sources[model].tensors[place.name]
                elements = sample_bytes(tensor) * tensor.elements // max(tensor.byte_size, 1)
                stored = found[0][0].tensors[found[0][1]]
                total += elements * stored.byte_size // max(stored.elements, 1)
    return total
