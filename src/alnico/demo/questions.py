"""Holds 40 questions of site reliability and the answer to each, written for the demo before any was measured.

The task: embed all questions and answers, and order the answers of each question by cosine. A question is answered
right at once if its own answer comes first. The pairs share few words, so that counting words does not suffice.
"""

from __future__ import annotations

from dataclasses import dataclass

from alnico.demo.encoder import SentenceEncoder

PAIRS: tuple[tuple[str, str], ...] = (
    ("why does my container get killed with exit code 137", "it used more memory than its limit allows"),
    ("new pods stay in pending", "no node has enough free cpu or memory for the request"),
    ("what is an error budget", "how much unreliability an objective still permits this month"),
    (
        "how do I stop calling a service that keeps failing",
        "open a circuit breaker and answer from a fallback",
    ),
    ("the site is slow for one user in a hundred", "look at the 99th percentile instead of the mean"),
    ("browser says the connection is not private", "the certificate has expired and must be renewed"),
    ("image cannot be pulled", "registry credentials are missing or the tag does not exist"),
    ("all clients retry at the same second", "add random jitter to exponential backoff"),
    (
        "what happens to reads while the primary database fails over",
        "replicas serve slightly stale data until one is promoted",
    ),
    ("writes fail although the disk has free space", "the file system ran out of inodes"),
    ("too many open files", "raise the descriptor limit or close leaked sockets"),
    ("how do I release to a few users first", "send five percent of traffic to a canary"),
    (
        "switch back to the old version at once",
        "keep two identical environments and move the load balancer between them",
    ),
    ("who is woken when the alert fires", "the engineer on the rotation schedule"),
    ("meeting after the outage", "blameless review with a timeline and actions that prevent a repeat"),
    ("a consumer cannot keep up with the topic", "lag grows; add partitions and members to the group"),
    ("two nodes both believe they are leader", "split brain; require a quorum and fence the loser"),
    ("follow one request through all microservices", "distributed tracing with propagated context"),
    ("one customer uses all the capacity", "apply rate limits per tenant"),
    ("host name resolves to the wrong address", "flush stale records and lower their time to live"),
    ("how long may recovery take", "the objective for time until service is restored"),
    ("how much data may we lose in a disaster", "the objective for the age of the last backup"),
    ("replace servers instead of patching them", "immutable infrastructure built from versioned images"),
    ("somebody changed the cluster by hand", "drift between declared and actual configuration"),
    ("keep passwords out of the repository", "inject secrets from a vault at run time"),
    ("pages that nobody needs to act on", "alert fatigue; delete or tune noisy monitors"),
    ("the application hangs while memory is cleaned up", "long garbage collection pauses"),
    ("transactions wait for each other forever", "a deadlock; take locks in one order"),
    ("every query reads the whole table", "create an index on the filtered column"),
    ("database refuses new connections", "put a pooler in front of it"),
    ("cache is cold after restart and the backend melts", "a stampede; warm it up and coalesce requests"),
    ("traffic goes to an instance that is not ready", "the readiness probe is missing"),
    ("process is alive but does nothing", "restart it when the liveness check fails"),
    ("add machines when load rises", "horizontal autoscaling on utilisation"),
    ("break things on purpose to learn", "chaos experiments with a small blast radius"),
    ("manual repetitive work that grows with the service", "toil, which should be automated away"),
    ("gateway returns 504", "the upstream did not answer within the timeout"),
    ("clocks differ between hosts", "synchronise time with ntp"),
    ("move pods away before maintenance", "cordon and drain the node"),
    ("logs fill the volume", "rotate and ship them to central storage"),
)
"""Question and answer."""

CHANCE_RANK = (len(PAIRS) + 1) / 2


@dataclass(frozen=True)
class Answered:
    """How a model ordered the answers."""

    first: int
    """Questions whose own answer came first."""
    mean_rank: float
    """Place of the right answer, on average; 1 is best, :data:`CHANCE_RANK` is chance."""
    questions: int


def answer(encoder: SentenceEncoder) -> Answered:
    """Let a model order the answers of all questions by cosine. Equal cosines count against it."""
    asked = encoder.embed([question for question, _ in PAIRS])
    answers = encoder.embed([text for _, text in PAIRS])
    cosines = asked @ answers.T
    ranks = (cosines >= cosines.diagonal()[:, None]).sum(1)
    return Answered(int((ranks == 1).sum()), float(ranks.mean()), len(PAIRS))
