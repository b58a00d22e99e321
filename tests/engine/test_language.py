"""`language: window`: the rule on numbers, and the demo model on recordings in several languages."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pipeline.demo.train.heldout import make_clip
from pipeline.engine.language import CHANGE, Heard, follow, settle
from pipeline.engine.local import LocalEngine
from pipeline.stitch import stitch
from pipeline.types import SAMPLE_RATE, DecodeOptions, Pcm, Recording, Unit, UnitResult
from pipeline.vad import detect

EN, DE, ES = range(3)
WINDOW = DecodeOptions(chunk_length_s=10, language="window")


def windows(*probabilities: tuple[float, float]) -> Heard:
    """English and German as given, Spanish the rest."""
    return np.array([(en, de, max(0.0, 1 - en - de)) for en, de in probabilities])


@pytest.mark.parametrize(
    ("heard", "expected"),
    [
        ([], []),
        ([(0.5, 0.4)], [EN]),  # alone it is what it is heard as
        ([(0.98, 0.01), (0.4, 0.55), (0.99, 0.0)], [EN, EN, EN]),  # a doubtful one keeps its neighbours' language
        ([(0.4, 0.55), (0.99, 0.0), (0.99, 0.0)], [EN, EN, EN]),  # also the first
        ([(0.99, 0.0), (0.99, 0.0), (0.4, 0.55)], [EN, EN, EN]),  # and the last
        ([(0.98, 0.01), (0.01, 0.98), (0.99, 0.0)], [EN, DE, EN]),  # a sure one has its own
        ([(0.98, 0.01), (0.97, 0.01), (0.01, 0.98), (0.02, 0.97)], [EN, EN, DE, DE]),
        ([(0.9, 0.05), (0.45, 0.5), (0.02, 0.97)], [EN, DE, DE]),  # between two the likelier of them
        ([(0.9, 0.05), (0.5, 0.45), (0.02, 0.97)], [EN, EN, DE]),
        ([(0.9, 0.05), (0.3, 0.28), (0.02, 0.97)], [EN, EN, DE]),  # a third language between them is not believed
        ([(0.0, 1.0), (1.0, 0.0), (0.0, 1.0)], [DE, EN, DE]),  # a probability of 0 forbids nothing
        ([(0.4, 0.4)] * 3, [EN, EN, EN]),
    ],
)
def test_windows_beside_each_other(heard: list[tuple[float, float]], expected: list[int]) -> None:
    assert settle(windows(*heard).reshape(-1, 3)) == expected


def test_it_is_the_likeliest_of_all_ways() -> None:
    """Against every way there is, for six windows of three languages."""
    random = np.random.default_rng(3)
    ways = np.array(np.meshgrid(*[range(3)] * 6)).reshape(6, -1).T
    for _ in range(50):
        heard = random.dirichlet([0.5, 0.5, 0.5], 6)
        worth = [heard[range(6), way].prod() / CHANGE ** np.count_nonzero(np.diff(way)) for way in ways]
        path = settle(heard)
        assert heard[range(6), path].prod() / CHANGE ** np.count_nonzero(np.diff(path)) == pytest.approx(max(worth))


def test_a_window_that_knows_only_what_was_before() -> None:
    assert follow(None, np.array([0.4, 0.5, 0.1])) == DE
    assert follow(EN, np.array([0.4, 0.5, 0.1])) == EN
    assert follow(EN, np.array([0.3, 0.65, 0.05])) == DE
    assert follow(EN, np.array([0.0, 1.0, 0.0])) == DE


# ---- the demo model


def mixed(*languages: str, pause_s: float = 3.0, seed: int = 0) -> tuple[Pcm, list[tuple[float, str]]]:
    """Turns of two sentences with pauses between: the audio, and where each turn ends."""
    parts: list[Pcm] = []
    ends: list[tuple[float, str]] = []
    for number, language in enumerate(languages):
        clip = make_clip(language, 2, seed=10 * seed + number)  # type: ignore[arg-type]
        parts += [clip.pcm, np.zeros(round(pause_s * SAMPLE_RATE), np.int16)]
        ends.append((sum(map(len, parts)) / SAMPLE_RATE, language))
    return np.concatenate(parts), ends


def unit(pcm: Pcm, name: str = "x") -> Unit:
    return Unit(Recording(name, name), 0, 0, pcm, is_last=True, speech=detect(pcm))


def wrong(result: UnitResult, ends: list[tuple[float, str]]) -> list[tuple[float, str | None]]:
    """The segments that are not in the language of the turn they end in."""
    found = [(s.end, s.language) for s in result.segments]
    return [(end, language) for end, language in found if language != next(one for at, one in ends if end <= at)]


def test_each_turn_keeps_its_language(engine: LocalEngine) -> None:
    pcm, ends = mixed("de", "en", "es", "de")
    (result,) = engine.run([unit(pcm)], WINDOW)
    assert wrong(result, ends) == []
    assert result.language == "de"
    assert stitch([result]).flags == ("language_switched",)
    assert all(s.language_probability is not None and s.language_probability > 0.3 for s in result.segments)


def test_the_neighbours_in_the_batch_change_nothing(engine: LocalEngine) -> None:
    units = [unit(mixed("en", "es", "de", seed=k)[0], str(k)) for k in range(3)]
    together = {result.recording.id: result for result in engine.run(units, WINDOW)}
    for one in units:
        (alone,) = engine.run([one], WINDOW)
        other = together[one.recording.id]
        assert [(s.text, s.language) for s in alone.segments] == [(s.text, s.language) for s in other.segments]


def test_silence_has_no_language(engine: LocalEngine) -> None:
    (result,) = engine.run([unit(np.zeros(20 * SAMPLE_RATE, np.int16))], WINDOW)
    assert (result.segments, result.language) == ((), None)


def test_sequential_goes_from_window_to_window(engine: LocalEngine) -> None:
    """The Unit is one span; its windows are 30 s long."""
    pcm, ends = mixed("en", "en", "en", "en", "de", "de", "de", "de", "de", "de", seed=2)
    options = dataclasses.replace(WINDOW, algorithm="sequential", condition_on_previous_text=False)
    (result,) = engine.run([dataclasses.replace(unit(pcm), speech=None)], options)
    late = [s.language for s in result.segments if s.start > ends[3][0] + 30]
    assert result.segments[0].language == "en"
    assert set(late) == {"de"}


def test_cancelled_while_it_listens(engine: LocalEngine) -> None:
    """A caller that leaves takes what is heard for it along; the engine goes on."""
    import asyncio

    async def leave() -> None:
        task = asyncio.ensure_future(engine.submit(unit(mixed("de", "en", "es")[0]), WINDOW))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    pcm, ends = mixed("de", "en")
    (result,) = engine.run([unit(pcm)], WINDOW)
    assert wrong(result, ends) == []
    assert engine.n_windows == 0
