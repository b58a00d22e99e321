"""Decoders are real processes here: killed, hung, out of memory, orphaned; each costs one file and loses no sample."""

from __future__ import annotations

import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from audio_files import noise, tone, write_audio

from pipeline import decoder
from pipeline.config import Config, Fault
from pipeline.decoder import DecodedAudio, PlainAudio, close_idle, open_audio
from pipeline.decoder_wire import WINDOW, Tag, Wire
from pipeline.errors import (
    AudioError,
    DamagedAudioError,
    DecodeMemoryError,
    DecoderCrashError,
    DecodeTimeoutError,
    EmptyAudioError,
)
from pipeline.types import SAMPLE_RATE, Pcm, Recording, Unit, UnitResult
from pipeline.units import read_units

MINUTES = 3


@pytest.fixture(autouse=True)
def no_idle_processes() -> Iterator[None]:
    close_idle()
    yield
    close_idle()


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Too long for all of it to wait in a socket."""
    return write_audio(tmp_path_factory.mktemp("audio") / "long.flac", np.tile(noise(20.0), 3 * MINUTES))


@pytest.fixture
def short(tmp_path: Path) -> Path:
    return write_audio(tmp_path / "short.flac", noise(1.0))


def opened(path: Path, **limits: object) -> DecodedAudio:
    stream = open_audio(Recording("id", str(path)), **{"channels": "mix", "max_audio_s": 3600, **limits})  # type: ignore[arg-type]
    assert isinstance(stream, DecodedAudio)
    return stream


def read(path: Path, **limits: object) -> Pcm:
    with opened(path, **limits) as stream:
        return np.concatenate(list(stream))


def suffering(kind: str, text: str = "", times: int = 99) -> Callable[[], Fault | None]:
    left = [Fault(match="*", stage="decode", kind=kind, text=text)] * times  # type: ignore[arg-type]
    return lambda: left.pop() if left else None


def pid_of(stream: DecodedAudio) -> int:
    assert stream._decoder is not None
    return stream._decoder.pid


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 20
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ---- processes and how long they serve


def test_one_process_serves_file_after_file(short: Path) -> None:
    pids = set()
    for _ in range(3):
        with opened(short) as stream:
            pids.add(pid_of(stream))
            assert sum(map(len, stream)) == SAMPLE_RATE
    assert len(pids) == 1
    assert pids != {os.getpid()}


def test_it_gives_way_to_who_started_it_but_not_to_everybody(short: Path) -> None:
    """A server answers while it decodes; on a machine that is very busy decoding still comes on."""
    with opened(short) as stream:
        assert os.getpriority(os.PRIO_PROCESS, pid_of(stream)) == max(os.nice(0), min(15, os.nice(0) + 5))


def test_it_is_replaced_after_many_files(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "MAX_FILES", 2)
    pids = []
    for _ in range(4):
        with opened(short) as stream:
            pids.append(pid_of(stream))
            list(stream)
    assert pids[0] == pids[1] != pids[2] == pids[3]
    assert not is_running(pids[0])


def test_a_file_that_fails_costs_no_process(short: Path, tmp_path: Path) -> None:
    with opened(short) as stream:
        pid = pid_of(stream)
        list(stream)
    (tmp_path / "bad").write_bytes(b"no audio")
    with pytest.raises(DamagedAudioError):
        opened(tmp_path / "bad")
    with opened(short) as stream:
        assert pid_of(stream) == pid


def test_a_stream_may_be_left_half_way(long: Path, short: Path) -> None:
    with opened(long) as stream:
        pid = pid_of(stream)
        assert 0 < len(next(iter(stream))) < 10 * SAMPLE_RATE
    assert not is_running(pid)
    assert len(read(short)) == SAMPLE_RATE


def test_nothing_leaks_over_many_files(short: Path, tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(b"no audio")

    def some() -> tuple[int, int]:
        for number in range(25):
            read(short)
            with pytest.raises(AudioError):
                read(tmp_path / ("bad" if number % 2 else "missing"))
        with opened(short) as stream:
            return len(os.listdir("/proc/self/fd")), len(os.listdir(f"/proc/{pid_of(stream)}/fd"))

    assert some() == some()


def test_threads_have_a_process_each_while_they_need_it(long: Path) -> None:
    with ThreadPoolExecutor(4) as threads:
        all_pcm = list(threads.map(read, [long] * 4))
    assert all(np.array_equal(pcm, all_pcm[0]) for pcm in all_pcm)
    assert len(decoder._pool._idle) <= decoder.usable_cores()


def test_a_process_outlives_the_thread_that_asked_for_it(long: Path) -> None:
    """Linux tells a process of the end of the thread that started it, not of the whole parent."""
    streams: list[DecodedAudio] = []
    thread = threading.Thread(target=lambda: streams.append(opened(long)))
    thread.start()
    thread.join()
    with streams[0] as stream:
        assert sum(map(len, stream)) == MINUTES * 60 * SAMPLE_RATE
        assert stream.attempts == 1


def test_a_process_that_does_not_start_ends_the_run(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No row is marked: it is no file's fault."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match=r"does not start \(exit code 1\)"):
        opened(short)


# ---- what it may not do


def test_it_has_no_credentials_and_no_files(long: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cret")
    with opened(long) as stream:
        of_it = Path(f"/proc/{pid_of(stream)}")
        assert b"s3cret" not in (of_it / "environ").read_bytes()
        opened_files = [os.readlink(of_it / "fd" / number) for number in sorted(os.listdir(of_it / "fd"), key=int)]
        assert [name.partition(":")[0] for name in opened_files] == ["socket", "/dev/null", "pipe", "/memfd"]


CONFINED = """
import os, socket, sys
from pipeline.decoder_child import confine
confine(300, os.getppid())
def fails(what):
    try:
        what()
    except (OSError, MemoryError) as error:
        print(type(error).__name__)
    else:
        print("done")
fails(lambda: open(sys.executable, "rb"))
fails(lambda: open("/tmp/x-%d" % os.getpid(), "wb"))
fails(lambda: socket.socket())
fails(lambda: os.dup(1))
fails(lambda: bytearray(200 << 20))
fails(lambda: bytearray(400 << 20))
"""


def test_what_it_gives_up() -> None:
    done = subprocess.run([sys.executable, "-c", CONFINED], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["OSError", "OSError", "OSError", "OSError", "done", "MemoryError"]


# ---- killed


def test_a_process_that_is_killed_costs_nothing(long: Path) -> None:
    whole = read(long)
    with opened(long) as stream:
        blocks, killed = [], pid_of(stream)
        for number, block in enumerate(stream):
            blocks.append(block)
            if number == 5:
                os.kill(killed, signal.SIGKILL)
        assert stream.attempts == 2
    assert np.array_equal(np.concatenate(blocks), whole)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_a_file_that_always_ends_its_process_is_given_up(how: signal.Signals, long: Path, short: Path) -> None:
    done = 0
    with opened(long) as stream:
        with pytest.raises(DecoderCrashError, match=f"long.flac: decoding it ends .*{how.name}") as caught:  # noqa: PT012
            for block in stream:
                done += len(block)
                os.kill(pid_of(stream), how)
        assert stream.attempts == 2
    assert SAMPLE_RATE <= done < MINUTES * 60 * SAMPLE_RATE
    assert (caught.value.kind, caught.value.store_wide) == ("decoder_crash", False)
    assert len(read(short)) == SAMPLE_RATE


def test_what_was_decoded_before_the_crash_stays(long: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pids = []
    original = DecodedAudio._next

    def next_then_die(self: DecodedAudio, *wanted: Tag) -> object:
        frame = original(self, *wanted)
        if self._n_decoded > 100 * SAMPLE_RATE:
            pids.append(pid_of(self))
            os.kill(pid_of(self), signal.SIGSEGV)
        return frame

    monkeypatch.setattr(DecodedAudio, "_next", next_then_die)
    *units, lost = read_units(Recording("id", str(long)), Config(vad="none", unit_length_s=30))
    assert isinstance(lost, UnitResult)
    assert lost.failure is not None
    assert (lost.failure.kind, lost.failure.stage, lost.failure.attempts) == ("decoder_crash", "decode", 2)
    assert all(isinstance(unit, Unit) for unit in units)
    assert lost.start == sum(unit.n_samples for unit in units) > 100 * SAMPLE_RATE
    assert len(set(pids)) == 2


ORPHAN = """
import sys, time
from pipeline.config import Fault
from pipeline.decoder import open_audio
from pipeline.types import Recording
faults = [None, Fault(match="*", stage="decode", kind="hang")]
with open_audio(Recording("id", sys.argv[1]), channels="mix", max_audio_s=99) as stream:
    pid = stream._decoder.pid
    list(stream)
print(pid, flush=True)
open_audio(Recording("id", sys.argv[1]), channels="mix", max_audio_s=99, strike=lambda: faults.pop())
"""


def test_it_dies_with_its_parent_even_while_it_hangs(short: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ORPHAN, str(short)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        time.sleep(0.2)
        assert is_running(pid)
        parent.kill()
    wait_until_gone(pid)


def test_ctrl_c_is_for_the_parent(long: Path) -> None:
    """A terminal sends it to all processes of its group."""
    with opened(long) as stream:
        assert os.getpgid(pid_of(stream)) != os.getpgid(0)


def test_an_interrupt_while_reading_is_not_swallowed(long: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(offset: int, size: int) -> bytes:
        raise KeyboardInterrupt

    with opened(long) as stream:
        pid = pid_of(stream)
        monkeypatch.setattr(stream._source, "read_at", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(stream)
    assert not is_running(pid)


# ---- limits


def test_a_memory_bomb(short: Path) -> None:
    """F31: the process really asks for 50 GB."""
    with pytest.raises(DecodeMemoryError, match=r"more than decode_memory_mb \(700 MB\)") as caught:
        opened(short, memory_mb=700, strike=suffering("oom"))
    assert (caught.value.kind, caught.value.attempts) == ("memory", 2)
    assert len(read(short, memory_mb=700)) == SAMPLE_RATE


def test_little_memory_is_enough_for_any_length(long: Path) -> None:
    assert len(read(long, memory_mb=200)) == MINUTES * 60 * SAMPLE_RATE


def test_a_hang_ends_at_the_deadline(short: Path) -> None:
    with pytest.raises(DecodeTimeoutError, match=r"takes longer than 0 s \(decode_timeout_s\)") as caught:
        opened(short, timeout_s=0.3, strike=suffering("hang"))
    assert caught.value.attempts == 1
    assert len(read(short)) == SAMPLE_RATE


def test_without_a_timeout_the_deadline_follows_from_what_was_decoded(
    long: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(long) as stream:
        assert stream._limit_s() == 60
        list(stream)
        assert stream._limit_s() == 60 + MINUTES * 60 / 10
    monkeypatch.setattr(decoder, "GRACE_S", 0.3)
    with pytest.raises(DecodeTimeoutError):
        opened(long, strike=suffering("hang"))


def test_a_slow_reader_is_not_the_decoders_fault(long: Path) -> None:
    took_s = 0.0
    with opened(long, timeout_s=30) as stream:
        for number, _ in enumerate(stream):
            if number == 0:
                time.sleep(0.5)
        took_s = stream._waited_s
    with opened(long, timeout_s=30) as stream:
        blocks = iter(stream)
        next(blocks)
        before = stream._waited_s
        time.sleep(took_s + 0.5)
        assert stream._waited_s == before


@pytest.mark.parametrize(
    ("kind", "error", "attempts"),
    [("exit", DecoderCrashError, 2), ("raise", DamagedAudioError, 1), ("empty", EmptyAudioError, 1)],
)
def test_other_faults(kind: str, error: type[AudioError], attempts: int, short: Path) -> None:
    with pytest.raises(error) as caught:
        opened(short, strike=suffering(kind))
    assert caught.value.attempts == attempts


@pytest.mark.parametrize("kind", ["exit", "oom"])
def test_what_happens_once_costs_nothing(kind: str, short: Path) -> None:
    with opened(short, strike=suffering(kind, times=1)) as stream:
        assert sum(map(len, stream)) == SAMPLE_RATE
        assert stream.attempts == 2


def test_a_fault_strikes_also_where_nothing_needs_a_decoder(tmp_path: Path) -> None:
    path = write_audio(tmp_path / "a.wav", tone(440, 1.0))
    recording = Recording("id", str(path))
    with open_audio(recording, channels="mix", max_audio_s=9) as stream:
        assert isinstance(stream, PlainAudio)
    with pytest.raises(DecoderCrashError):
        open_audio(recording, channels="mix", max_audio_s=9, strike=suffering("exit"))


# ---- the wire


@pytest.fixture
def ends() -> Iterator[tuple[Wire, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        yield over(one), other


def over(end: socket.socket) -> Wire:
    return Wire(end, mmap.mmap(-1, WINDOW))


@pytest.mark.parametrize("shape", [(16_000,), (2, 8_000), (1, 5)])
def test_a_block_keeps_its_shape(shape: tuple[int, ...], ends: tuple[Wire, socket.socket]) -> None:
    wire, other = ends
    block = noise(1.0)[: int(np.prod(shape))].reshape(shape)
    over(other).send_block(block)
    frame = wire.receive(5)
    assert frame.tag is Tag.BLOCK
    assert np.array_equal(frame.samples, block)
    assert frame.samples.flags.writeable


@pytest.mark.parametrize("sent", [b"\xff\0\0\0\0\0\0\0", b"\7\0\0\0\xff\xff\xff\xff"])
def test_what_is_no_frame_is_refused(sent: bytes, ends: tuple[Wire, socket.socket]) -> None:
    wire, other = ends
    other.sendall(sent)
    with pytest.raises(ValueError, match=r"frame|Tag"):
        wire.receive(5)


def test_time_is_for_a_whole_frame(ends: tuple[Wire, socket.socket]) -> None:
    wire, other = ends
    other.sendall(b"\7\0\0\0\4\0\0\0\1")
    with pytest.raises(TimeoutError):
        wire.receive(0.05)
    other.close()
    with pytest.raises(EOFError):
        wire.receive(5)
