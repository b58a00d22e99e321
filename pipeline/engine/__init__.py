"""The engine's faces: audio in, text out, on one device, for the bulk job, the endpoint and a notebook alike.

`load_engine(EngineConfig)` gives an `Engine`. It imports neither ray nor any audio library, and this page not even
torch: that comes with the first real engine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

from pipeline.errors import ConfigError
from pipeline.types import DecodeOptions, Hypothesis, Pcm, Recording, Segment, Unit, UnitResult

if TYPE_CHECKING:  # it needs pydantic, which the engine itself does not
    from pipeline.config import Config, Fault


@dataclass(frozen=True, slots=True)
class Tuning:
    """How an engine uses its device: no result depends on it beyond what half precision rounds. None: as suits the
    kind of device."""

    static: bool | None = None  # steps over fixed buffers that ask the host nothing (`pipelined.py`); None: on a GPU
    graphs: bool = True  # such steps captured as CUDA graphs; on a CPU they never are
    streams: bool = False  # the encoder beside the decoder, in a stream of its own
    window_batch: int | None = None  # windows encoded together
    refill: int | None = None  # free lanes that are worth a prefill while others wait for it
    lag: int = 1  # steps that are begun before it is asked what ended in an earlier one


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What an engine process needs to start: small and picklable, weights by path."""

    model: str
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    lanes: int | None = None  # slots of the running batch; None: from free memory
    threads: int | None = None  # CPU threads; None: torch's own choice
    fake_faults: tuple[Fault, ...] | None = None  # None: a real engine; a tuple: the fake one with these faults
    fake_state: str | None = None  # fsspec folder where a fault's `times` are counted; None: in this process
    tuning: Tuning = Tuning()


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What was really loaded, for logs and tables."""

    model: str
    revision: str | None
    device: str
    dtype: str
    lanes: int  # at the start; out of memory halves them
    lane_bytes: int  # what one of them takes
    languages: tuple[str, ...]  # codes the model can be asked for; empty: English only

    def __str__(self) -> str:
        lanes = f"{self.lanes} lane{'s' * (self.lanes != 1)} of {self.lane_bytes / 1e6:.0f} MB"
        return f"{self.model} in {self.dtype} on {self.device}, {lanes}"


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What an engine is doing at this moment, for metrics and for whoever watches that it does not hang."""

    lanes: int  # there are so many now
    busy: int  # of them, with a window
    queued: int  # windows that are admitted and have no lane yet
    idle_s: float  # since anything in flight last came further; 0 where nothing is in flight


Heard = Callable[[Sequence[Segment]], None]


class Engine(Protocol):
    """One device with one model. No state survives a call; results do not depend on what else is in the batch."""

    @property
    def info(self) -> EngineInfo: ...

    def decode(self, windows: Sequence[Pcm], options: DecodeOptions) -> list[Hypothesis]:
        """Each Window's (int16 [n], at most 30 s) answer: as many as came in, in order. Raises `EngineError`."""
        ...

    def run(self, units: Iterable[Unit], options: DecodeOptions) -> Iterator[UnitResult]:
        """Every Unit's result, as each ends; one that the engine failed at is a failed result, and so is one whose
        manifest line asks for what the model cannot do.

        Units are drawn from the iterable only as lanes need them. Raises `ConfigError` for options it cannot honour.
        """
        ...

    async def submit(
        self, unit: Unit, options: DecodeOptions, heard: Heard | None = None, brief: bool = False
    ) -> UnitResult:
        """One Unit, decoded beside all others submitted; cancelling the await frees its lanes.

        `heard` is told the result's segments as they are decided, in their order, each once; from another thread.
        `brief`: somebody waits for a few seconds of audio, and longer work gives way to it for a moment.
        Raises `EngineError`, or `ConfigError` for options it cannot honour.
        """
        ...

    @property
    def n_windows(self) -> int:
        """Encoder windows in flight, waiting ones too: what an endpoint counts before it admits a request."""
        ...

    def load(self) -> EngineLoad:
        """From any thread, at any time, also while the device hangs: it takes no lock and waits for nothing."""
        ...

    def close(self) -> None:
        """Stops the dispatcher; what is in flight fails with `EngineError`."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None:
        """Closes it."""


def load_engine(config: EngineConfig) -> Engine:
    """Loads the weights and allocates the lanes. Raises `ModelError` with one line a user can act on."""
    if config.fake_faults is not None:
        from pipeline.engine.fake import FakeEngine

        return FakeEngine(config)
    from pipeline.engine.local import LocalEngine

    return LocalEngine.open(config)


def engine_config(config: Config, threads: int | None = None) -> EngineConfig:
    """The engine's part of the run's settings. Raises `ConfigError` for settings that nothing honours yet."""
    if config.engine == "serve":
        raise ConfigError("engine: serve is the job's, on the cluster where the application runs: it needs --output")
    return EngineConfig(
        model=config.model,
        revision=config.revision,
        device=config.device,
        dtype=config.dtype,
        lanes=config.lanes,
        threads=threads,
        fake_faults=config.fake.faults if config.engine == "fake" else None,
    )


def options_for(recording: Recording, options: DecodeOptions) -> DecodeOptions:
    """The run's options with what this recording's manifest line overrides."""
    overrides = {
        name: value
        for name in ("language", "task", "initial_prompt")
        if (value := getattr(recording, name)) is not None
    }
    return dataclasses.replace(options, **overrides) if overrides else options
