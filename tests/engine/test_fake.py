"""The fake engine: its text is a function of the samples, and each fault does what its name says, that often."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from speech import pcm_at, talk

from pipeline.config import Fault
from pipeline.engine import Engine, EngineConfig, EngineLoad, load_engine
from pipeline.engine.fake import FakeEngine, Faults, hear
from pipeline.errors import (
    EngineError,
    EngineMemoryError,
    NonFiniteError,
    StoreError,
)
from pipeline.stitch import UNCOVERED
from pipeline.types import SAMPLE_RATE, DecodeOptions, Recording, Unit
from pipeline.units import cut_units
from pipeline.vad import SileroVad

OPTIONS = DecodeOptions()


def noise(duration_s: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-9000, 9000, round(duration_s * SAMPLE_RATE)).astype(np.int16)


def unit(name: str = "a", pcm: np.ndarray | None = None, **recording: str) -> Unit:
    audio = noise(2.0) if pcm is None else pcm
    return Unit(Recording(id=name, uri=f"{name}.wav", **recording), 0, 0, audio, is_last=True)


def engine(*faults: Fault, state: Path | None = None) -> Engine:
    return load_engine(EngineConfig("any", fake_faults=faults, fake_state=str(state) if state else None))


def test_a_tuple_of_faults_asks_for_the_fake() -> None:
    assert isinstance(engine(), FakeEngine)


def test_text_depends_on_the_samples_alone() -> None:
    one, other = noise(3.0, seed=1), noise(3.0, seed=2)
    a, b, c = engine().decode([one, other, one.copy()], OPTIONS)
    assert a == c
    assert a.segments[0].text != b.segments[0].text
    assert engine().decode([one], OPTIONS) == [a]  # another process would say the same


def test_a_segment_spans_what_can_be_heard() -> None:
    silence = np.zeros(SAMPLE_RATE, np.int16)
    pcm = np.concatenate([silence, np.full(2 * SAMPLE_RATE, 5000, np.int16), silence])
    (segment,) = hear(pcm, OPTIONS).segments
    assert (segment.start, segment.end) == (1.0, 3.0)
    assert len(segment.text.split()) == 4
    assert segment.words == ()


@pytest.mark.parametrize("pcm", [np.zeros(0, np.int16), np.zeros(8000, np.int16), np.full(8000, 300, np.int16)])
def test_nothing_to_hear_gives_no_segment(pcm: np.ndarray) -> None:
    assert hear(pcm, OPTIONS).segments == ()


def test_words_lie_within_their_segment_and_do_not_change_the_text() -> None:
    pcm = noise(5.0)
    (plain,) = hear(pcm, OPTIONS).segments
    (segment,) = hear(pcm, DecodeOptions(word_timestamps=True)).segments
    assert segment.text == plain.text == "".join(word.word for word in segment.words)
    times = [t for word in segment.words for t in (word.start, word.end)]
    assert times == sorted(times)
    assert (times[0], times[-1]) == (segment.start, pytest.approx(segment.end))


def test_submit_and_run_agree() -> None:
    units = [unit("a", noise(2.0, 1)), unit("b", noise(70.0, 2))]
    ran = list(engine().run(units, OPTIONS))

    async def submit() -> Sequence[object]:
        fake = engine()
        return await asyncio.gather(*(fake.submit(u, OPTIONS) for u in units))

    assert ran == asyncio.run(submit())  # type: ignore[comparison-overlap]
    assert all(result.n_samples == u.n_samples for result, u in zip(ran, units, strict=True))


def test_a_manifest_line_overrides_the_language() -> None:
    (result,) = engine().run([unit(language="de")], OPTIONS)
    assert result.language == "de"


@pytest.mark.parametrize(
    ("kind", "error"), [("raise", EngineError), ("oom", EngineMemoryError), ("nan", NonFiniteError)]
)
def test_a_failure_costs_its_unit_only(kind: str, error: type[EngineError]) -> None:
    fake = engine(Fault(match="bad*", kind=kind, text="as asked"))  # type: ignore[arg-type]
    good, bad = fake.run([unit("good"), unit("bad-1")], OPTIONS)
    assert good.failure is None
    assert bad.failure is not None
    assert (bad.failure.kind, bad.failure.message, bad.failure.stage) == (error.kind, "as asked", "engine")
    assert sum(skip.n_samples for skip in bad.skipped) == bad.n_samples
    with pytest.raises(error):
        asyncio.run(fake.submit(unit("bad-2"), OPTIONS))


def test_text_empty_and_loop_change_what_is_said() -> None:
    said = {
        kind: next(engine(Fault(kind=kind, text=text)).run([unit()], OPTIONS))  # type: ignore[arg-type]
        for kind, text in (("text", "hello there"), ("loop", "hello there"), ("empty", ""))
    }
    assert said["text"].segments[0].text == " hello there"
    assert said["empty"].segments == ()
    (loop,) = said["loop"].segments
    assert loop.text.count("hello there") > 20
    assert loop.compression_ratio > 2.4  # what the real engine's check is there for


def test_submitted_windows_are_counted_while_they_are_awaited() -> None:
    fake = engine(Fault(kind="hang", text="0.05"))

    async def go() -> list[int]:
        waiting = [asyncio.ensure_future(fake.submit(unit(pcm=noise(s)), OPTIONS)) for s in (2.0, 70.0)]
        await asyncio.sleep(0)
        counts = [fake.n_windows]
        await asyncio.gather(*waiting)
        return [*counts, fake.n_windows]

    assert asyncio.run(go()) == [4, 0]


def test_a_hang_looks_like_no_progress() -> None:
    fake = engine(Fault(match="stuck", kind="hang", text="0.4"))
    assert fake.load() == EngineLoad(lanes=8, busy=0, queued=0, idle_s=0.0)

    async def go() -> list[EngineLoad]:
        waiting = asyncio.ensure_future(fake.submit(unit("stuck", noise(290.0)), OPTIONS))
        await asyncio.sleep(0.1)
        stuck = fake.load()
        await fake.submit(unit("fine"), OPTIONS)
        further = fake.load()
        await waiting
        return [stuck, further]

    stuck, further = asyncio.run(go())
    assert (stuck.busy, stuck.queued) == (8, 2)
    assert stuck.idle_s >= 0.09
    assert further.idle_s < stuck.idle_s
    assert fake.load() == EngineLoad(8, 0, 0, 0.0)

    drawn = threading.Thread(target=list, args=[fake.run([unit("stuck")], OPTIONS)])
    drawn.start()
    longest = 0.0
    while drawn.is_alive():
        longest = max(longest, fake.load().idle_s)
        time.sleep(0.01)
    assert longest >= 0.2


@pytest.mark.parametrize("chunk_length_s", [10, 30])
def test_recordings_with_a_tenth_of_the_windows_emptied_are_flagged(chunk_length_s: int) -> None:
    """Real units of synthetic speech through the engine, with and without the fault."""
    pcm, draw = pcm_at(talk(40)[0], -6), np.random.default_rng(1)
    options = DecodeOptions(chunk_length_s=chunk_length_s)
    affected = flagged = good = 0
    for i in range(80):
        first = int(draw.integers(0, len(pcm) - 60 * SAMPLE_RATE))
        part = pcm[first:][: int(draw.integers(5, 60)) * SAMPLE_RATE]
        (one,) = cut_units(
            Recording(str(i), "x"),
            [part],
            vad=SileroVad(),
            unit_length_s=300,
            algorithm="windows",
            sequential_max_s=7200,
        )
        (whole,), (holed,) = (
            list(engine(*faults).run([one], options)) for faults in ((), (Fault(kind="empty", text="0.1"),))
        )
        assert whole.flags == ()
        assert set(holed.segments) <= set(whole.segments)
        if holed.segments == whole.segments:
            good += 1
            assert holed.flags == ()
        else:
            affected += 1
            flagged += UNCOVERED in holed.flags
    assert good >= 20
    assert affected >= 10
    assert flagged >= 0.95 * affected


def test_faults_strike_as_often_as_they_say_for_each_recording(tmp_path: Path) -> None:
    fault = Fault(match="*", kind="raise", times=2)

    def outcomes(name: str) -> list[bool]:
        # A new engine each time: the count is kept in the folder, not in a process.
        return [next(engine(fault, state=tmp_path).run([unit(name)], OPTIONS)).failure is None for _ in range(4)]

    assert outcomes("a") == [False, False, True, True]
    assert outcomes("b") == [False, False, True, True]
    assert [next(engine(fault).run([unit("a")], OPTIONS)).failure is None for _ in range(2)] == [False, False]


def test_exit_ends_the_process_once(tmp_path: Path) -> None:
    script = f"""
import asyncio, numpy as np
from pipeline.config import Fault
from pipeline.engine import EngineConfig, load_engine
from pipeline.types import DecodeOptions, Recording, Unit
fake = load_engine(EngineConfig("any", fake_faults=(Fault(kind="exit", times=1),), fake_state={str(tmp_path)!r}))
unit = Unit(Recording(id="a", uri="a.wav"), 0, 0, np.full(8000, 900, np.int16), is_last=True)
print(asyncio.run(fake.submit(unit, DecodeOptions())).failure)
"""
    first, second = (
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False) for _ in range(2)
    )
    assert (first.returncode, first.stdout) == (1, "")
    assert (second.returncode, second.stdout) == (0, "None\n")


def test_a_hang_holds_up_only_its_unit() -> None:
    fake = engine(Fault(match="slow", kind="hang", text="0.2"))
    order: list[str] = []

    async def submit(name: str) -> None:
        await fake.submit(unit(name), OPTIONS)
        order.append(name)

    async def both() -> None:
        await asyncio.gather(submit("slow"), submit("fast"))

    asyncio.run(both())
    assert order == ["fast", "slow"]


def test_faults_of_the_sink() -> None:
    faults = Faults([Fault(match="x", stage="sink", kind="raise")], state=None)
    faults.inject("y", "sink")
    faults.inject("x", "engine")
    with pytest.raises(StoreError):
        faults.inject("x", "sink")


@pytest.mark.parametrize(("stage", "kind"), [("decode", "text"), ("decode", "nan"), ("sink", "empty"), ("sink", "oom")])
def test_what_cannot_happen_is_refused(stage: str, kind: str) -> None:
    with pytest.raises(ValueError, match="cannot happen"):
        Fault(stage=stage, kind=kind)  # type: ignore[arg-type]


def test_it_needs_no_torch() -> None:
    script = (
        "import sys; from pipeline.engine import EngineConfig, load_engine; "
        "load_engine(EngineConfig('any', fake_faults=())); print({'torch', 'ray', 'transformers'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
