"""The engine's faces on the demo model: batches, refill, mixed options, cancellation, refusals."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import subprocess
import sys
import threading
import time
import weakref
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.demo import model_path
from pipeline.demo.train.heldout import Clip, make_clip
from pipeline.engine import EngineConfig, EngineLoad, load_engine
from pipeline.engine.decoding import Align, Span, Walk, Window, walk
from pipeline.engine.local import LocalEngine
from pipeline.engine.model import WhisperModel
from pipeline.engine.scheduler import Task, _Ask
from pipeline.errors import ConfigError, EngineError, ModelError
from pipeline.flags import MISMATCH
from pipeline.stitch import stitch
from pipeline.types import DecodeOptions, Hypothesis, Recording, Unit, UnitResult
from pipeline.vad import detect

PLAIN = DecodeOptions(chunk_length_s=10)


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    return [make_clip(("en", "de", "es")[i % 3], 1 + i % 2, seed=900 + i) for i in range(6)]


def unit(clip: Clip, name: str = "x", **recording: str) -> Unit:
    return Unit(Recording(name, name, **recording), 0, 0, clip.pcm, is_last=True, speech=detect(clip.pcm))  # type: ignore[arg-type]


def key(result: UnitResult) -> tuple[object, ...]:
    return (result.language, [(s.tokens, s.start, s.end, s.temperature) for s in result.segments])


def assert_close(a: Hypothesis, b: Hypothesis) -> None:
    assert [s.tokens for s in a.segments] == [s.tokens for s in b.segments]
    for one, other in zip(a.segments, b.segments, strict=True):
        assert one.avg_logprob == pytest.approx(other.avg_logprob, abs=1e-5)


def test_every_row_is_the_same_alone_and_in_a_batch(engine: LocalEngine, clips: list[Clip]) -> None:
    """Six windows over four lanes, so that lanes are refilled; temperatures 0 and 0.7 side by side."""
    pcms = [clip.pcm for clip in clips]
    for options in (PLAIN, dataclasses.replace(PLAIN, temperature=0.7, language="en")):
        together = engine.decode(pcms, options)
        assert len(together) == len(pcms)
        for i in (0, 3, 5):  # among the first, among those that took over a lane
            (alone,) = engine.decode([pcms[i]], options)
            assert_close(alone, together[i])


def test_units_with_different_options_share_the_batch(engine: LocalEngine, clips: list[Clip]) -> None:
    """Languages, tasks and prompts from the manifest, beside plain Units."""
    units = [
        unit(clips[0], "plain"),
        unit(clips[1], "forced", language="de"),
        unit(clips[1], "translated", language="de", task="translate"),
        unit(clips[2], "prompted", initial_prompt="Hugo compra tres manzanas rojas en Madrid."),
    ]
    together = {result.recording.id: key(result) for result in engine.run(units, PLAIN)}
    assert len(together) == len(units)
    for one in units:
        (alone,) = engine.run([one], PLAIN)
        assert key(alone) == together[one.recording.id]
    assert together["forced"] != together["translated"]


def test_later_units_are_told_the_language_of_the_first(engine: LocalEngine, clips: list[Clip]) -> None:
    later = dataclasses.replace(unit(clips[0]), index=1, start=16000, language_pcm=clips[1].pcm)
    (result,) = engine.run([later], PLAIN)
    assert result.language == "de"


def test_the_wrong_language_or_task_is_seen(engine: LocalEngine, clips: list[Clip]) -> None:
    """Told another language, the demo model writes in that or in its own; told to translate, it writes English."""
    wrong = [
        unit(clip, f"{i} {language}", language=language)
        for i, clip in enumerate(clips)
        for language in ("en", "de", "es")
        if language != clip.language
    ]
    wrong += [unit(clip, f"{i}", task="translate") for i, clip in enumerate(clips) if clip.language != "en"]
    right = [unit(clip, f"{i} {how}", **more) for i, clip in enumerate(clips)  # type: ignore[arg-type]
             for how, more in (("found", {}), ("told", {"language": clip.language}))]  # fmt: skip
    flags = {result.recording.id: stitch([result]).flags for result in engine.run([*wrong, *right], PLAIN)}
    assert [one.recording.id for one in wrong if MISMATCH not in flags[one.recording.id]] == []
    assert [one.recording.id for one in right if MISMATCH in flags[one.recording.id]] == []


def test_words_do_not_change_the_text(engine: LocalEngine, clips: list[Clip]) -> None:
    for clip in clips[:3]:
        (plain,) = engine.run([unit(clip)], PLAIN)
        (worded,) = engine.run([unit(clip)], dataclasses.replace(PLAIN, word_timestamps=True))
        assert [s.tokens for s in plain.segments] == [s.tokens for s in worded.segments]
        for segment in worded.segments:
            assert "".join(w.word for w in segment.words) == segment.text


def test_submit_and_cancel(engine: LocalEngine, clips: list[Clip]) -> None:
    async def go() -> list[UnitResult]:
        gone = [asyncio.ensure_future(engine.submit(unit(clip), PLAIN)) for clip in clips]
        await asyncio.sleep(0.05)
        for task in gone:
            task.cancel()
        await asyncio.gather(*gone, return_exceptions=True)
        return await asyncio.gather(*(engine.submit(unit(clip), PLAIN) for clip in clips[:2]))

    results = asyncio.run(go())
    assert [key(r) for r in results] == [key(next(engine.run([unit(c)], PLAIN))) for c in clips[:2]]
    assert engine._scheduler.idle
    assert engine._scheduler._lanes.count(None) == engine.info.lanes


@pytest.mark.parametrize("gives_way", [True, False])
def test_long_work_gives_way_to_a_clip(
    engine: LocalEngine, clips: list[Clip], monkeypatch: pytest.MonkeyPatch, gives_way: bool
) -> None:
    """While a brief Unit is in the lanes no other windows are encoded, unless that has lasted; its text is the same."""
    monkeypatch.setattr("pipeline.engine.scheduler.GIVES_WAY_S", 1e9 if gives_way else 0.0)
    scheduler = engine._scheduler
    alone = key(asyncio.run(engine.submit(unit(clips[0]), PLAIN)))
    encoded_beside: list[bool] = []
    encode = scheduler._model.encode

    def spied(mel: torch.Tensor) -> torch.Tensor:
        encoded_beside.append(scheduler._n_brief > 0 and len(mel) > 1)  # the clip's windows come one by one
        return encode(mel)

    monkeypatch.setattr(scheduler._model, "encode", spied)
    pcm = np.concatenate([clip.pcm for clip in clips] * 4)
    long = Unit(Recording("long", "long"), 0, 0, pcm, is_last=True, speech=detect(pcm))

    async def story() -> tuple[object, ...]:
        background = asyncio.create_task(engine.submit(long, PLAIN))
        while scheduler.load().busy < scheduler.n_lanes:
            await asyncio.sleep(0.01)
        encoded_beside.clear()
        result = key(await engine.submit(unit(clips[0]), PLAIN, None, True))
        background.cancel()
        return result

    assert asyncio.run(story()) == alone
    assert any(encoded_beside) != gives_way
    assert scheduler._n_brief == 0


def test_silence_and_nothing(engine: LocalEngine) -> None:
    for n in (0, 1, 100, 16_000, 480_000):
        (result,) = engine.run([unit(Clip("en", np.zeros(n, np.int16), ()))], PLAIN)
        assert result.segments == ()
        assert result.n_samples == n
        assert sum(skip.n_samples for skip in result.skipped) == n, "silence is skipped, not lost"


def test_refusals(engine: LocalEngine, clips: list[Clip]) -> None:
    with pytest.raises(EngineError, match="480001"):
        engine.decode([np.zeros(480_001, np.int16)], PLAIN)
    with pytest.raises(ConfigError, match="klingon"):
        engine.decode([clips[0].pcm], dataclasses.replace(PLAIN, language="klingon"))
    with pytest.raises(ConfigError, match="999999"):
        list(engine.run([unit(clips[0])], dataclasses.replace(PLAIN, suppress_tokens=(999_999,))))
    refused, fine = engine.run([unit(clips[0], language="xx"), unit(clips[0])], PLAIN)
    assert refused.failure is not None
    assert "xx" in refused.failure.message
    assert fine.failure is None, "what one manifest line asks for is its own failure"


def test_closed() -> None:
    engine = load_engine(EngineConfig(model="demo", dtype="float32", lanes=1))
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.decode([np.zeros(16_000, np.int16)], PLAIN)


def test_a_device_error_ends_what_is_in_flight_and_nothing_else(
    engine: LocalEngine, clips: list[Clip], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("device on fire")

    with monkeypatch.context() as patch:
        patch.setattr(WhisperModel, "step", broken)
        (failed,) = engine.run([unit(clips[0])], PLAIN)
        assert failed.failure is not None
        assert "device on fire" in failed.failure.message
    (fine,) = engine.run([unit(clips[0])], PLAIN)
    assert fine.failure is None


def test_its_load_tells_work_from_a_hang(
    engine: LocalEngine, clips: list[Clip], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device is held fast in its third step, and let go."""
    assert engine.load() == EngineLoad(lanes=4, busy=0, queued=0, idle_s=0.0)
    reached, go_on, steps = threading.Event(), threading.Event(), count()
    true = WhisperModel.step

    def stuck(*given: Any) -> torch.Tensor:
        if next(steps) == 2:
            reached.set()
            go_on.wait(60)
        return true(*given)

    monkeypatch.setattr(WhisperModel, "step", stuck)
    work = threading.Thread(target=engine.decode, args=([clip.pcm for clip in clips], PLAIN))
    work.start()
    assert reached.wait(60)
    first, _, later = engine.load(), time.sleep(0.05), engine.load()
    assert (later.busy, later.queued) == (4, 2)
    assert first.idle_s + 0.05 <= later.idle_s
    go_on.set()
    work.join()
    assert engine.load() == EngineLoad(4, 0, 0, 0.0)


WORDS = dataclasses.replace(PLAIN, word_timestamps=True)


@pytest.fixture(scope="module")
def with_words(engine: LocalEngine, clips: list[Clip]) -> list[Hypothesis]:
    """Of three clips, where memory is enough."""
    return engine.decode([clip.pcm for clip in clips[:3]], WORDS)


@pytest.mark.parametrize("where", ["encode", "prefill", "step", "align", "likelihood", "first_logits"])
def test_out_of_memory_halves_the_lanes_and_loses_nothing(
    clips: list[Clip], with_words: list[Hypothesis], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """The device refuses the first batch, and any of more than two, wherever that is noticed."""
    true = getattr(WhisperModel, where)
    refused = []

    def small(self: WhisperModel, *given: Any, **more: Any) -> Any:
        windows = {"encode": 0, "first_logits": 0, "prefill": 1, "step": 1, "align": 1}  # which argument has so many
        size = len(given[windows[where]]) if where in windows else 0
        if size > 2 or not refused:
            refused.append(size)
            raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")
        return true(self, *given, **more)

    with load_engine(EngineConfig(model="demo", dtype="float32", lanes=4)) as engine:
        monkeypatch.setattr(WhisperModel, where, small)
        found = engine.decode([clip.pcm for clip in clips[:3]], WORDS)
        assert engine.load().lanes == 2
    assert refused
    assert [h.segments for h in found] == [h.segments for h in with_words]


def test_out_of_memory_with_one_lane_is_an_error(clips: list[Clip], monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object, **__: object) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    with load_engine(EngineConfig(model="demo", dtype="float32", lanes=2)) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(WhisperModel, "step", none)
            with pytest.raises(EngineError, match="allocate memory"):
                engine.decode([clips[0].pcm], PLAIN)
        assert engine.decode([clips[0].pcm], PLAIN)[0].segments


def test_a_beam_finds_the_same_alone_and_among_others(engine: LocalEngine, clips: list[Clip]) -> None:
    beam = dataclasses.replace(PLAIN, beam_size=3)
    (alone,) = engine.decode([clips[0].pcm], beam)
    among = engine.decode([clip.pcm for clip in clips[:3]], beam)
    assert among[0].segments == alone.segments
    with pytest.raises(EngineError, match="beam_size 5 needs as many lanes; there are 4"):
        engine.decode([clips[0].pcm], dataclasses.replace(PLAIN, beam_size=5))


def test_a_walk_that_breaks_is_its_own_unit_s_failure(
    engine: LocalEngine, clips: list[Clip], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(span: Span, *rest: object, **more: object) -> Walk:
        if span.start == 16_000:
            raise KeyError("a fault of ours")
        return walk(span, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr("pipeline.engine.local.walk", broken)
    poison = dataclasses.replace(unit(clips[0], "poison"), index=1, start=16_000)
    results = {r.recording.id: r for r in engine.run([unit(clips[1], "well"), poison, unit(clips[2], "too")], PLAIN)}
    assert results["poison"].failure is not None
    assert "a fault of ours" in results["poison"].failure.message
    assert results["well"].failure is None
    assert results["too"].failure is None


def test_a_caller_that_goes_away_takes_its_work_along(engine: LocalEngine, clips: list[Clip]) -> None:
    results = engine.run([unit(clip) for clip in clips], PLAIN)
    next(results)
    results.close()  # type: ignore[attr-defined]
    (after,) = engine.run([unit(clips[0])], PLAIN)
    assert after.failure is None
    assert engine._scheduler.idle


def test_a_unit_s_samples_are_given_back_with_its_result(engine: LocalEngine, clips: list[Clip]) -> None:
    """Without waiting for the garbage collector, which in a process of this size may not come for a thousand Units."""

    def one() -> tuple[Unit, weakref.ref[Any]]:
        fresh = dataclasses.replace(unit(clips[0]), pcm=clips[0].pcm.copy())
        return fresh, weakref.ref(fresh.pcm)

    async def submitted() -> list[weakref.ref[Any]]:
        (done, its), (gone, other) = one(), one()
        await engine.submit(done, PLAIN)
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(engine.submit(gone, PLAIN), 0.05)
        return [its, other]

    gc.disable()
    try:
        ran, its = one()
        list(engine.run([ran], WORDS))
        del ran
        refs = [its, *asyncio.run(submitted())]
        next(engine.run([unit(clips[1])], PLAIN))  # the dispatcher has come round
        assert [ref() is None for ref in refs] == [True] * 3
    finally:
        gc.enable()


def test_words_of_one_frame(engine: LocalEngine) -> None:
    """A window of 10 ms has half an encoder position; whatever text a model gives it, timing it is no error."""
    window = Window(Span(np.zeros(160, np.int16)), 0, 1)
    window.hidden = torch.zeros(1500, 192)
    ask = _Ask(
        Task(walk(window.span, PLAIN, engine._tokenizer), print), Align(window, (1000, 1001), "en", "transcribe")
    )
    (timings,) = engine._scheduler._align([(ask, 0)])
    assert all(t.start == t.end == 0.0 for t in timings)


def test_an_engine_left_open_does_not_break_the_exit() -> None:
    program = """
import numpy as np
from pipeline.engine import EngineConfig, EngineLoad, load_engine
from pipeline.types import DecodeOptions
engine = load_engine(EngineConfig(model="demo", dtype="float32", lanes=2))
engine.decode([np.zeros(16000, np.int16)], DecodeOptions())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the demo model whose files may be spoilt."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in model_path().iterdir():
        if file.name != "model.safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_weights_that_are_missing_cut_or_misshapen(checkpoint: Path) -> None:
    from safetensors.torch import load_file, save_file

    config = EngineConfig(model=str(checkpoint), dtype="float32", lanes=1)
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        load_engine(config)
    weights = checkpoint / "model.safetensors"
    whole = (model_path() / "model.safetensors").read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="damaged"):
        load_engine(config)
    tensors = load_file(model_path() / "model.safetensors")
    name = "model.decoder.layers.1.fc1.weight"
    save_file({**tensors, name: tensors[name][:10].clone()}, weights)
    with pytest.raises(ModelError, match=name):
        load_engine(config)
    save_file({k: v for k, v in tensors.items() if k != name}, weights)
    with pytest.raises(ModelError, match=f"{name} is missing"):
        load_engine(config)


def test_pickled_weights_are_refused(checkpoint: Path) -> None:
    (checkpoint / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(ModelError, match="pickled and refused"):
        load_engine(EngineConfig(model=str(checkpoint)))


def test_no_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="--model demo"):
        load_engine(EngineConfig(model="openai/whisper-nonesuch"))
    with pytest.raises(ModelError, match="no such folder"):
        load_engine(EngineConfig(model="./nowhere"))
