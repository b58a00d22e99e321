"""The Ray cluster of a run: joined or started when it is first needed, asked what it has, quiet, and left behind clean.

Knows nothing of what is run on it. Ray itself is imported when it is needed: a finished run again never starts it.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import TracebackType
from typing import Any, TypeVar

from pipeline.census import Census
from pipeline.config import Config, RayConfig
from pipeline.errors import ConfigError, CrashLoopError, MurmurError
from pipeline.machine import RAY_NICENESS
from pipeline.pools import Node
from pipeline.served import Application

log = logging.getLogger(__name__)
_T = TypeVar("_T")

# Ray ends idle workers beyond one a CPU after a second, engines and its own helpers counted, and starts others for the
# next write: a second of processor time each. Twenty thousand short recordings took half as long again.
_KEPT_WORKERS = 24
LOCAL_CPUS = 4  # logical CPUs of a cluster started here, at least: two would be an engine's and a decoder's


@contextmanager
def counting_processes() -> Iterator[Any]:
    """The handle of the run's `Census`, on this node: it goes when the driver goes."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    census = ray.remote(Census).options(num_cpus=0, scheduling_strategy=here).remote(_alive_nodes)
    try:
        yield census
    finally:
        ray.kill(census)


def _alive_nodes() -> set[str]:
    import ray

    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


class Cluster:
    """The Ray cluster of a run, joined or started when it is first needed; stopped again if it was started here.

    `niceness` is that of the workers of one that is started here; by default Ray's own, by which they give way to
    whatever else runs.
    """

    def __init__(self, config: RayConfig, niceness: int = RAY_NICENESS) -> None:
        self.is_connected = False
        self._config, self._niceness = config, niceness
        self._application: Application | None = None
        self._exit = ExitStack()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.close()

    def nodes(self) -> list[Node]:
        """The nodes that are there now."""
        import ray

        self._connect()
        alive = (node["Resources"] for node in ray.nodes() if node["Alive"])
        return [Node(resources.get("CPU", 0.0), resources.get("GPU", 0.0)) for resources in alive]

    def free_cpus(self) -> float:
        """Logical CPUs that nothing holds now, a running application's replicas among it."""
        import ray

        self._connect()
        return float(ray.available_resources().get("CPU", 0.0))

    def application(self, config: Config) -> Application:
        """The running application that `engine: serve` asks for. Raises `ConfigError` where there is none."""
        import ray

        if self._application is None:
            if not (ray.is_initialized() or self._config.address or os.environ.get("RAY_ADDRESS")):
                raise ConfigError("engine: serve needs the cluster where the application runs: set ray.address")
            self._connect()
            self._application = Application.find(config)
        return self._application

    def ask_nodes(self, question: Callable[[], _T]) -> list[_T]:
        """The answer of every node that has CPUs."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._connect()
        ids = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        there = (NodeAffinitySchedulingStrategy(node_id=id, soft=False) for id in ids)
        answers: list[_T] = ray.get(
            [ray.remote(question).options(num_cpus=0, scheduling_strategy=where).remote() for where in there]
        )
        return answers

    def _connect(self) -> None:
        if self.is_connected:
            return
        import ray
        from ray.data import DataContext

        if not ray.is_initialized():
            self._init()
        # A run that ends early, or has less to write than it might have had: nobody needs to be told.
        warnings.filterwarnings("ignore", "The maximum number of concurrent tasks for", UserWarning)
        context = DataContext.get_current().copy()
        context.enable_progress_bars = context.print_on_execution_start = log.isEnabledFor(logging.DEBUG)
        context.raise_original_map_exception = True  # our own errors come back as themselves, see `plain_errors`
        context.enable_fallback_to_arrow_object_ext_type = False  # what Arrow has no type for is a mistake of ours
        self._exit.enter_context(DataContext.current(context))
        self.is_connected = True

    def _init(self) -> None:
        import ray

        verbose = log.isEnabledFor(logging.DEBUG)
        address = self._config.address or os.environ.get("RAY_ADDRESS")
        common = {"log_to_driver": verbose, "logging_level": logging.INFO if verbose else logging.CRITICAL}
        handler = signal.getsignal(signal.SIGTERM)
        try:
            with nullcontext() if verbose else _quiet_core():
                if address:
                    ray.init(address=address, **common)
                else:
                    with _on_loopback():
                        ray.init(
                            address="local",
                            num_cpus=self._config.num_cpus or max(LOCAL_CPUS, os.cpu_count() or 1),
                            object_store_memory=self._config.object_store_mb and self._config.object_store_mb << 20,
                            include_dashboard=False,
                            _system_config={"num_workers_soft_limit": _KEPT_WORKERS, "worker_niceness": self._niceness},
                            _node_ip_address="127.0.0.1",
                            **common,
                        )
        except ConnectionError as error:
            raise ConfigError(f"ray.address {address}: no Ray cluster answers there ({error})") from None
        except Exception as error:  # Ray's own, of no class: its node has 30 s to start, which a laden machine may miss
            if "timed out during startup" not in str(error):
                raise
            raise CrashLoopError(
                "Ray did not start on this machine within the time it gives itself: too much else runs here, or too "
                "little memory is free; nothing is lost, the same command tries again"
            ) from error
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # ray.init puts its own in place of the command's
        if not verbose:
            _hush("ray.data")
        self._exit.callback(ray.shutdown)


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Ray's processes that are started within listen on 127.0.0.1 alone. Else Ray takes the address of a network for
    `_node_ip_address`, whatever is given (`services.resolve_ip_for_localhost`), and a dozen ports on all interfaces,
    unless it believes that there are no clusters on this system, as on macOS and Windows."""
    from ray._private import ray_constants

    name = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR  # for the processes: here it was read at the import
    before, constant = os.environ.get(name), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[name], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:  # this process may join a cluster later
        ray_constants.ENABLE_RAY_CLUSTER = constant
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def _quiet_core() -> Iterator[None]:
    """Ray's C++ side writes to stderr past Python: a warning for every actor pool (of Ray Data's own making, ray issue
    53727), and if it is told not to, that it was told so."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    sys.stderr.flush()
    stderr = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def _hush(logger: str) -> None:
    """Errors reach the user as one line of ours; the library's own account of them stays in its log file."""
    for handler in logging.getLogger(logger).handlers:
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.CRITICAL)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Our own errors, which Ray raises with the worker's traceback in their text, as they were raised there."""
    from ray.exceptions import RayTaskError

    try:
        yield
    except RayTaskError as error:
        cause = error.cause
        line = str(cause).partition("\n")[0]
        if isinstance(cause, MurmurError):
            raise type(cause)(line) from None
        raise RuntimeError(f"{type(cause).__name__} in a worker: {line}") from error
