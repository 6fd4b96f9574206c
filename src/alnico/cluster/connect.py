"""Connects to a Ray cluster, or starts one here, and gives a process on each of its nodes.

Nodes run the alnico that is installed on them. Nothing is uploaded: what is sent are pickled values of alnico's own types.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any

from alnico.cluster.nodes import check_software, describe_node, take_processors
from alnico.cluster.pool import NodeLost, Pool, UnitResult, WorkerHost
from alnico.cluster.work import Cluster, NodeInfo
from alnico.errors import AlnicoError, RunError, first_line
from alnico.installation import import_extra

ANSWER_SECONDS = 10.0
"""How long an address may take to accept a connection."""

START_SECONDS = 60.0
"""How long a node may take to start its process; nodes that take longer are left out."""

STORE_BYTES = 100 << 20
"""Memory of Ray's object store on a cluster that is started here: results are small."""

_SETTINGS = bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
"""A frame of HTTP/2: no bytes, of type 4, settings."""

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Set while Ray starts: it reports no usage to its makers, and prints no tip about hidden GPUs."""


@contextmanager
def connect(address: str, purpose: str = "--ray") -> Iterator[Cluster]:
    """Give the nodes of the Ray cluster at ``address``, each with a process of its own; these end with the block.

    '' is the cluster that this process is connected to, else the one at RAY_ADDRESS, else one that is started on this machine and
    stopped at the end. Nodes without processors for Ray (``--num-cpus=0``) are not used. ``purpose`` needs Ray, in messages.
    Errors: AlnicoError if Ray is not installed; RunError if the cluster cannot be reached, or no node answers; MismatchError for
    nodes with another alnico or Python.
    """
    with ray_connection(address, purpose) as ray:
        pool = Pool(_start(ray))
        try:
            check_software(pool.nodes, describe_node("here"))
            yield pool
        finally:
            pool.close()


@contextmanager
def ray_connection(address: str, purpose: str = "--ray") -> Iterator[Any]:
    """Connect this process to a Ray cluster, and give the module ``ray``; see :func:`connect` for ``address`` and errors.

    A connection that this process has is used, and kept.
    """
    target = address or os.environ.get("RAY_ADDRESS", "")
    if target in ("", "local"):
        _ask_for_token()
    ray = import_extra("ray", purpose, "ray")
    if ray.is_initialized():
        yield ray
        return
    _check_reachable(target)
    with _silence():
        with _own_signals(), _environment(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                ray.init(**_arguments(target))
            except (OSError, RuntimeError, ValueError, AssertionError) as error:
                raise _refused(target, error) from None
            except Exception as error:
                if not _is_of_ray(error):
                    raise
                raise _refused(target, error) from None
        try:
            yield ray
        finally:
            with _own_signals():
                ray.shutdown()


def _ask_for_token() -> None:
    """Let the cluster that this process starts take work only from those who know a token.

    Ray listens on all interfaces, and runs what it is sent. Newer versions make a token by themselves, and leave it in the home
    directory, where it changes what `ray start` does. Ray reads these variables when it is imported, and keeps them for the
    process, so that they stay set. A user who has imported Ray, or has set the mode, decides it.
    """
    if "ray" in sys.modules or "RAY_AUTH_MODE" in os.environ:
        return
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


class _OwnPath(list[str]):
    """The module path that workers get from this process: folders in which it looks for modules itself.

    Ray adds the working directory of the driver, first. A file there named as a module that workers import would be run.
    """

    def extend(self, folders: Any) -> None:
        """Add the folders of this process's own path."""
        super().extend(folder for folder in folders if folder in sys.path)


def _arguments(target: str) -> dict[str, Any]:
    from ray.job_config import JobConfig

    job = JobConfig()
    job._py_driver_sys_path = _OwnPath()
    common = {"job_config": job, "log_to_driver": False, "logging_level": "ERROR"}
    if target and target != "local":
        return {"address": target, **common}
    return {
        "address": "local",
        "include_dashboard": False,
        "object_store_memory": STORE_BYTES,
        **common,
    }


def _check_reachable(target: str) -> None:
    """Refuse an address that accepts no connection, at once: Ray tries for a minute. Errors: RunError."""
    host, colon, port = target.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        if target in ("", "auto", "local"):
            return
        raise RunError(
            f"{target} is not the address of a Ray cluster; expected HOST:PORT, such as 10.0.0.1:6379, ray://HOST:PORT or auto. "
            "Correct --ray, or RAY_ADDRESS."
        )
    try:
        with socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS) as connection:
            speaks = "RAY_USE_TLS" in os.environ or _speaks_grpc(connection)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error) or "no answer"
        raise _unreachable(target, reason) from None
    if not speaks:
        raise _unreachable(target, "something else than Ray answers there")


def _speaks_grpc(connection: socket.socket) -> bool:
    """Does a server answer the beginning of HTTP/2, as gRPC's do, with its settings? Ray would try others for minutes."""
    connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _SETTINGS)
    frame = b""
    while len(frame) < len(_SETTINGS) and (data := connection.recv(len(_SETTINGS) - len(frame))):
        frame += data
    return frame[3:4] == _SETTINGS[3:4]


def _refused(target: str, error: BaseException) -> RunError:
    """Return why Ray did not connect."""
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    if any("AuthenticationError" in f"{type(cause).__name__}: {cause}" for cause in causes):
        return RunError(
            f"the Ray cluster{f' at {target}' if target else ''} asks for a token, which this process does not have. Set RAY_AUTH_MODE=token, "
            "and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the token that the cluster was started with."
        )
    return _unreachable(target, first_line(error))


def _unreachable(target: str, reason: str) -> RunError:
    place = f" at {target}" if target else ""
    return RunError(
        f"the Ray cluster{place} cannot be reached ({reason.rstrip('.')}). Check the address (--ray, or RAY_ADDRESS) and that `ray status` "
        "answers there; run this on a node of the cluster, or leave out --ray to compute on this machine."
    )


@contextmanager
def _environment() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _silence() -> Iterator[None]:
    """Keep Ray from printing pages of its logs to standard output where a node is lost: it has no option for that."""
    import ray._private.worker as driver

    before = getattr(driver, "print_to_stdstream", None)
    if before is None:
        yield
        return
    driver.print_to_stdstream = lambda *_, **__: None
    try:
        yield
    finally:
        driver.print_to_stdstream = before


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep this process's handling of SIGTERM, which Ray replaces."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _is_of_ray(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] == "ray"


class _NodeActor:
    """The process of a node."""

    def __init__(self) -> None:
        self._host = WorkerHost()

    def describe(self, name: str, processors: int) -> NodeInfo:
        take_processors(processors)
        return describe_node(name, processors)

    def begin(self, start: bytes) -> AlnicoError | None:
        return self._host.begin(start)

    def do(self, unit: bytes) -> UnitResult:
        return self._host.do(unit)


class _RayNode:
    """A Ray actor on one node, as a process of the pool."""

    def __init__(self, ray: Any, actor: Any, info: NodeInfo) -> None:
        self._ray = ray
        self._actor = actor
        self.info = info

    def begin(self, start: bytes) -> Future[AlnicoError | None]:
        return _answer(self._actor.begin.remote(start))

    def do(self, unit: bytes) -> Future[UnitResult]:
        return _answer(self._actor.do.remote(unit))

    def kill(self) -> None:
        with suppress(Exception):  # it has ended, or the cluster has
            self._ray.kill(self._actor)


def _answer(reference: Any) -> Future[Any]:
    """Return the future of a call, which ends with NodeLost where Ray lost the process or the answer."""
    from ray.exceptions import RayTaskError

    answer: Future[Any] = Future()

    def settle(future: Future[Any]) -> None:
        error = future.exception()
        if error is None:
            answer.set_result(future.result())
        elif _is_of_ray(error) and not isinstance(error, RayTaskError):
            answer.set_exception(NodeLost(first_line(error)))
        else:
            answer.set_exception(error)

    reference.future().add_done_callback(settle)
    return answer


def _start(ray: Any) -> list[_RayNode]:
    """Start a process on each node that has processors for Ray. Errors: RunError if none answers, or one
    cannot."""
    found = [n for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU", 0) >= 1]
    if not found:
        raise RunError("the Ray cluster has no node with a processor for work. Start one with `ray start`.")
    hosts = [n["NodeManagerHostname"] for n in found]
    names = [
        host if hosts.count(host) == 1 else f"{host}/{n['NodeID'][:6]}"
        for host, n in zip(hosts, found, strict=True)
    ]
    started = []
    for name, node in zip(names, found, strict=True):
        actor = _actor_on(ray, node["NodeID"])
        started.append((name, actor, actor.describe.remote(name, int(node["Resources"]["CPU"]))))
    ready, _ = ray.wait([s[2] for s in started], num_returns=len(started), timeout=START_SECONDS)
    nodes, silent = [], []
    for name, actor, answer in started:
        if answer not in ready:
            silent.append(name)
            ray.kill(actor)
            continue
        try:
            nodes.append(_RayNode(ray, actor, ray.get(answer)))
        except Exception as error:
            if not _is_of_ray(error):
                raise
            if _is_of_code(error):
                raise _cannot_start(name, error) from None
            silent.append(name)  # Ray lists a node for some seconds after it is lost
    if not nodes:
        raise RunError(
            f"no node of the Ray cluster started a process in {START_SECONDS:.0f} s: {', '.join(silent)}. `ray status` tells whether "
            "other work has all their processors; wait for it, or use other nodes."
        )
    return nodes


def _actor_on(ray: Any, node: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node, soft=False)
    # One processor, so that a cluster that shrinks by itself sees that the node works.
    return ray.remote(num_cpus=1, max_restarts=0, scheduling_strategy=there)(_NodeActor).remote()


def _is_of_code(error: Exception) -> bool:
    """Could the process not import or run alnico, other than that its node was lost?"""
    from ray.exceptions import RayTaskError

    return isinstance(error, RayTaskError) or "Error:" in str(error)


def _cannot_start(name: str, error: Exception) -> RunError:
    found = next(
        (line.strip() for line in str(error).splitlines() if "ModuleNotFoundError" in line), first_line(error)
    )
    return RunError(
        f"node {name}: alnico cannot run there ({found}); expected the same alnico as here. Install it on all nodes, in the Python "
        "that Ray was started with."
    )
