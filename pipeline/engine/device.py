"""How work is handed to a device that computes beside the host: copies, streams, and steps captured once and replayed.

All that is CUDA's own in the engine is on this page, behind a face that a CPU has too. There everything is done at
once, in the order of the calls, through the same buffers at the same addresses: what is tested without a GPU is the
code that runs on one, with the graphs off.

What captured work must keep to, and `tests/engine/test_pipelined.py` checks on a CPU: it reads and writes tensors
that live as long as it does, never asks the host for a value, and makes no tensor from a number of the host's.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

log = logging.getLogger(__name__)
_capturing = threading.Lock()  # one capture at a time in a process, says torch

Work = Callable[[], None]
DECODER, ENCODER = "decoder", "encoder"  # whose stream captured work is replayed in


class Report(Protocol):
    """Values on their way to the host."""

    def wait(self) -> list[Tensor]:
        """The values, once they are there: tensors of the host's."""
        ...


class Device(Protocol):
    """What the pipelined scheduler asks of a device."""

    def repeated(self, work: Work, stream: str = DECODER) -> Work:
        """The same work for many calls, each over the same buffers."""
        ...

    def staging(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory of the host's, to be filled from end to end and uploaded; not to be written again after that."""
        ...

    def upload(self, staged: Tensor) -> Tensor:
        """A copy on the device, without waiting for it; `staged` is from `staging`."""
        ...

    def report(self, tensors: Sequence[Tensor]) -> Report:
        """Copies to the host what the tensors hold after all that was asked for before."""
        ...

    def beside(self) -> Any:
        """A context: what is asked for in it goes to the encoder's stream."""
        ...

    def mark(self) -> Any:
        """A place in the present stream, for `use`."""
        ...

    def use(self, tensor: Tensor, mark: Any) -> Tensor:
        """The tensor, which was made before `mark` in the encoder's stream, for use in the decoder's."""
        ...

    def facts(self) -> dict[str, Any]:
        """How it is used, as plain JSON."""
        ...


# -- at once: a CPU ----------------------------------------------------------------------------------------


class _Done:
    def __init__(self, values: list[Tensor]) -> None:
        self._values = values

    def wait(self) -> list[Tensor]:
        return self._values


class Host:
    """A CPU: nothing is beside anything."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def repeated(self, work: Work, stream: str = DECODER) -> Work:
        return work

    def staging(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype)

    def upload(self, staged: Tensor) -> Tensor:
        return staged.to(self._device)

    def report(self, tensors: Sequence[Tensor]) -> Report:
        return _Done([tensor.detach().cpu().clone() for tensor in tensors])

    @contextmanager
    def beside(self) -> Iterator[None]:
        yield

    def mark(self) -> None:
        return None

    def use(self, tensor: Tensor, mark: Any) -> Tensor:
        return tensor

    def facts(self) -> dict[str, Any]:
        return {"graphs": False, "streams": False}


# -- CUDA ----------------------------------------------------------------------------------------------------


class Cuda:
    """A GPU: everything is asked for and not waited for.

    Pinned memory comes from torch's own cache of it, which gives none away that a copy still reads. What the encoder's
    stream allocated and the decoder's reads is told to torch's allocator (`record_stream`), or it would be given away
    while it is read. Graphs of one stream share a pool of memory, since they never run at once; those of two do not.
    """

    def __init__(self, device: torch.device, graphs: bool, streams: bool) -> None:
        self._device = device
        self._graphs = graphs
        self._encoder = torch.cuda.Stream(device) if streams else None  # type: ignore[no-untyped-call]
        # Torch's own default for it stands on whichever device was the present one first.
        self.capture_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pools: dict[str, Any] = {}
        self.n_captured = self.n_refused = 0

    def repeated(self, work: Work, stream: str = DECODER) -> Work:
        return _Captured(self, work, stream) if self._graphs else work

    def staging(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)

    def upload(self, staged: Tensor) -> Tensor:
        return staged.to(self._device, non_blocking=True)

    def report(self, tensors: Sequence[Tensor]) -> Report:
        return _Copied(tensors)

    @contextmanager
    def beside(self) -> Iterator[None]:
        if self._encoder is None:
            yield
            return
        with torch.cuda.stream(self._encoder):
            yield

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event

    def use(self, tensor: Tensor, mark: torch.cuda.Event | None) -> Tensor:
        if self._encoder is not None and mark is not None:
            here = torch.cuda.current_stream(self._device)
            here.wait_event(mark)
            tensor.record_stream(here)
        return tensor

    def facts(self) -> dict[str, Any]:
        return {
            "graphs": self._graphs,
            "streams": self._encoder is not None,
            "captured": self.n_captured,
            "refused": self.n_refused,
        }

    def pool(self, stream: str) -> Any:
        if stream not in self._pools:
            self._pools[stream] = torch.cuda.graph_pool_handle()
        return self._pools[stream]


class _Copied:
    """Tensors copied into pinned memory behind what their stream has to do."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._values = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
        for value, tensor in zip(self._values, tensors, strict=True):
            value.copy_(tensor, non_blocking=True)
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record()

    def wait(self) -> list[Tensor]:
        self._event.synchronize()
        return self._values


class _Captured:
    """Work that is done as it is the first two times, which loads its kernels and makes the libraries' workspaces, is
    captured the third time, and from there on replayed. Capturing runs nothing: each call does the work just once.

    What cannot be captured goes on as it is; that is counted and said once.
    """

    WARM_UPS = 2

    def __init__(self, cuda: Cuda, work: Work, stream: str) -> None:
        self._cuda, self._work, self._stream = cuda, work, stream
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        self._calls += 1
        if self._calls == self.WARM_UPS + 1:
            self._graph = self._capture()
        if self._graph is not None:
            self._graph.replay()
        else:
            self._work()

    def _capture(self) -> torch.cuda.CUDAGraph | None:
        graph, pool, stream = torch.cuda.CUDAGraph(), self._cuda.pool(self._stream), self._cuda.capture_stream
        try:
            # Other threads of the process may allocate meanwhile: a second engine, a benchmark's own tensors.
            with _capturing, torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self._work()
        except RuntimeError as error:
            self._cuda.n_refused += 1
            log.warning("engine: a step could not be captured and goes on without: %s", str(error).partition("\n")[0])
            return None
        self._cuda.n_captured += 1
        return graph


def device_for(device: torch.device, graphs: bool, streams: bool) -> Device:
    return Cuda(device, graphs, streams) if device.type == "cuda" else Host(device)
