"""How many of what the job runs, from the nodes it has: plain rules, printed at the start, each a key of `pool`.

    GPU   one engine a GPU with one CPU; every other CPU decodes.
    CPU   engines of up to 8 CPUs, two CPUs of each node left for decoding.

Ray holds a logical CPU for every running decode task, also while that waits for a slow engine: so decoding never gets
the CPUs that the engines need, and writing asks for none at all. That is what keeps two CPUs from a deadlock.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from pipeline.config import Config
from pipeline.errors import ConfigError

_T = TypeVar("_T", int, float)
_MAX_ENGINE_CPUS = 8  # one engine gains little from more threads; another engine does
_WRITE_TASKS = 4
_GPU_LANES = 256  # what an engine takes at most where memory allows; not measured
_GPU_BLOCK_MB = 16

# Of one CPU, in times of real time, by the processor time measured on a Xeon (README, "How fast"): the slowest and the
# fastest of the common forms (mp3 and 16 kHz flac), read and decoded, then looked through for voices.
_DECODED, _LOOKED_THROUGH = (425.0, 2653.0), 1734.0
PREPARED_PER_CPU = tuple(1 / (1 / rate + 1 / _LOOKED_THROUGH) for rate in _DECODED)

# What a GPU's engine is taken to transcribe, in times of real time, by what the model's name contains. Derived floor,
# not measured: a quarter of what `engine.floors` says an H200 could do at most, 256 lanes full, 100 tokens a window in
# half precision. `tests/benchmarks/cuda.py` measures it; the more special name first.
DERIVED_GPU_RTFX_NOT_MEASURED = {
    "tiny": 29_600, "base": 14_600, "small": 4_600, "medium": 1_640,
    "distil-large": 2_800, "turbo": 2_500, "large": 930,
}  # fmt: skip
_UNKNOWN_GPU_RTFX = DERIVED_GPU_RTFX_NOT_MEASURED["base"]  # a model that does not say: as hungry as they come in use


@dataclass(frozen=True, slots=True)
class Node:
    cpus: float
    gpus: float = 0.0


@dataclass(frozen=True, slots=True)
class Pools:
    """The sizes of a run; see `describe`."""

    engines: int
    engine_cpus: float
    engine_gpus: float
    threads: int | None  # of one engine on CPU; None: it has a GPU
    decode_tasks: int
    decode_cpus: float
    units_per_call: int | None  # Units an engine is handed at once; None: a block of them
    calls_per_engine: int  # such calls in flight; the stage lets in only what the lanes can soon take
    block_mb: int  # a block of PCM is what one engine task takes and one write commits: 32 s of audio a MB
    write_tasks: int = _WRITE_TASKS
    is_served: bool = False  # the engines are a running application's, each with a client here

    def describe(self) -> str:
        where = f"{self.engine_gpus:g} GPU" if self.engine_gpus else f"{self.engine_cpus:g} CPU"
        engines = f"1 engine on {where}" if self.engines == 1 else f"{self.engines} engines on {where} each"
        if self.is_served:
            engines = f"the application's {self.engines} replica{'s' * (self.engines > 1)}"
        units = self.units_per_call
        many = f"{32 * self.block_mb} s of audio" if units is None else f"{units} Unit{'s' * (units > 1)}"
        calls = f"{self.calls_per_engine} calls in flight of {many}"
        return f"{engines} ({calls}), decoding on {self.decode_tasks * self.decode_cpus:g} CPU"

    def limit(self, model: str) -> str | None:
        """Which side is expected to be the limit, and what the other would need; None: no GPU, and so the engines."""
        if not self.engine_gpus:
            return None
        cpus, gpus_take = self.decode_tasks * self.decode_cpus, self.engines * gpu_rtfx(model)
        slow, fast = (cpus * rate for rate in PREPARED_PER_CPU)
        side = "decoding on the CPUs" if fast < gpus_take else "the engines" if slow > gpus_take else "either side"
        wanted = sorted(math.ceil(gpus_take / rate) for rate in PREPARED_PER_CPU)
        engines = "1 engine takes" if self.engines == 1 else f"{self.engines} engines take"
        return (
            f"the limit: {side}. {cpus:g} CPU prepare {_times(slow)} (mp3) to {_times(fast)} (flac) times real time, "
            f"{engines} about {_times(gpus_take)} (derived, not measured): "
            f"as much as {wanted[0]} to {wanted[1]} CPU prepare"
        )


def gpu_rtfx(model: str) -> float:
    """What one GPU's engine is taken to transcribe in times of real time: see `DERIVED_GPU_RTFX_NOT_MEASURED`."""
    rates = DERIVED_GPU_RTFX_NOT_MEASURED
    return next((rate for name, rate in rates.items() if name in model.rpartition("/")[2]), _UNKNOWN_GPU_RTFX)


def _times(rate: float) -> str:
    return f"{float(f'{rate:.2g}'):,.0f}"


def _calls(lanes: int, seconds_a_call: float) -> int:
    """Calls in flight whose 30 s windows fill the lanes twice."""
    return math.ceil(2 * lanes * 30 / seconds_a_call)


def size_pools(nodes: Sequence[Node], config: Config) -> Pools:
    """The pools for a cluster of these nodes. Raises `ConfigError` if a GPU is asked for and there is none."""
    gpus = sum(node.gpus for node in nodes)
    wants_gpu = config.engine != "fake" and (config.device.startswith("cuda") or (config.device == "auto" and gpus > 0))
    if wants_gpu and not gpus and config.pool.engines is None:
        raise ConfigError(
            f"device: {config.device}, and the cluster has no GPU (if it will scale up, set pool.engines)"
        )
    cpus = max(1.0, sum(node.cpus for node in nodes))
    engine_gpus = _given(config.pool.engine_gpus, 1.0 if wants_gpu else 0.0)
    beside_gpu = 1.0 if cpus >= gpus + 1 else 0.25
    engine_cpus = _given(config.pool.engine_cpus, beside_gpu if wants_gpu else _cpu_share(nodes, config))
    fitting = gpus // engine_gpus if engine_gpus else sum((node.cpus - 1) // engine_cpus for node in nodes)
    fitting = 1 if config.engine == "fake" else fitting  # it does next to nothing
    engines = _given(config.pool.engines, max(1, int(fitting)))
    # A Unit of `sequential` may be two hours, 230 MB: never several in one call.
    batched = bool(engine_gpus) and config.algorithm == "windows"
    # Clips of 30 s are a window each: so many calls must be in flight that their windows fill the lanes twice, 16 on a
    # CPU, where a call is a clip. Longer Units wait in the stage, not in the engine (`stages.Door`).
    calls = _calls(_GPU_LANES, 32 * _GPU_BLOCK_MB) if engine_gpus else 32
    return Pools(
        engines=engines,
        engine_cpus=engine_cpus,
        engine_gpus=engine_gpus,
        threads=None if engine_gpus else max(1, int(engine_cpus)),
        decode_tasks=_given(config.pool.decode_tasks, max(1, int(cpus - engines * engine_cpus))),
        decode_cpus=1.0 if cpus >= 2 else 0.5,
        units_per_call=config.pool.units_per_call or (8 if batched else 1 if engine_gpus else None),
        calls_per_engine=_given(config.pool.calls_per_engine, calls),
        block_mb=_GPU_BLOCK_MB if batched else 1,
    )


def served_pools(free_cpus: float, replicas: int, on_gpu: bool, config: Config) -> Pools:
    """The pools beside a running application: a client for each of its engines, all free CPUs for decoding.

    Raises `ConfigError` where the application and others have left no CPU to decode on.
    """
    if free_cpus < 1:
        raise ConfigError("engine: serve, and no CPU of the cluster is free for decoding beside what runs on it")
    like = size_pools([Node(free_cpus, float(on_gpu))], config.model_copy(update={"device": "auto"}))
    return dataclasses.replace(
        like,
        engines=_given(config.pool.engines, replicas),
        engine_cpus=_given(config.pool.engine_cpus, 0.0),
        engine_gpus=0.0,
        threads=None,
        decode_tasks=_given(config.pool.decode_tasks, int(free_cpus)),
        is_served=True,
    )


def _cpu_share(nodes: Sequence[Node], config: Config) -> float:
    largest = max((node.cpus for node in nodes), default=1.0)
    if largest < 2:
        return 0.5
    return 1.0 if config.engine == "fake" else max(1.0, min(_MAX_ENGINE_CPUS, largest - 2))


def _given(value: _T | None, derived: _T) -> _T:
    return derived if value is None else value
