"""Units: every sample once, cut in silence, the same in any pieces; what cannot be read is a row."""

from __future__ import annotations

import tracemalloc
import wave
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from speech import frames, pcm_at, talk

from pipeline.config import Config
from pipeline.errors import AudioError, DamagedAudioError, NotFoundError, SourceError, TooLongError
from pipeline.types import SAMPLE_RATE, VAD_FRAME, Algorithm, Pcm, Recording, Unit, UnitResult
from pipeline.units import HARD_CUT, RESTART, TRUNCATED, cut_frame, cut_units, read_units
from pipeline.vad import MAYBE_SPEECH, Frames, SileroVad, detect

RECORDING = Recording("a", "a.wav")


class Scripted(SileroVad):
    """Hears in each frame the speech that its first sample says, `lag` frames late."""

    def __init__(self, lag: int = 70) -> None:
        super().__init__()
        self._lag, self._pcm, self._told = lag, np.zeros(0, np.int16), 0

    def push(self, pcm: Pcm) -> Frames:
        self._pcm = np.concatenate([self._pcm, pcm])
        return self._tell(len(self._pcm) // VAD_FRAME - self._lag)

    def finish(self) -> Frames:
        return self._tell(-(-len(self._pcm) // VAD_FRAME))

    def _tell(self, until: int) -> Frames:
        told, self._told = self._told, max(self._told, until)
        return self._pcm[::VAD_FRAME][told : self._told].astype(np.uint8)


def scripted(drawing: str, short_by: int = 0) -> Pcm:
    """Audio in which `Scripted` hears the drawing; the last frame lacks some samples."""
    pcm = np.repeat(frames(drawing).astype(np.int16), VAD_FRAME)
    return pcm[: len(pcm) - short_by]


def in_blocks(pcm: Pcm, sizes: Sequence[int]) -> Iterator[Pcm]:
    at = count = 0
    while at < len(pcm):
        size = sizes[count % len(sizes)]
        yield pcm[at : at + size]
        at, count = at + size, count + 1


def cut(
    blocks: Iterable[Pcm],
    vad: SileroVad | None = None,
    *,
    algorithm: Algorithm = "windows",
    unit_length_s: int = 30,
    sequential_max_s: int = 60,
) -> list[Unit]:
    return list(
        cut_units(
            RECORDING,
            blocks,
            vad=vad,
            unit_length_s=unit_length_s,
            algorithm=algorithm,
            sequential_max_s=sequential_max_s,
        )
    )


def check_units(units: Sequence[Unit], pcm: Pcm, limit_s: int, *, vad: bool) -> None:
    np.testing.assert_array_equal(np.concatenate([unit.pcm for unit in units]), pcm)
    assert [unit.index for unit in units] == list(range(len(units)))
    assert [unit.is_last for unit in units] == [False] * (len(units) - 1) + [True]
    assert [unit.start for unit in units] == [0, *np.cumsum([unit.n_samples for unit in units])[:-1]]
    assert all(unit.start % VAD_FRAME == 0 for unit in units)
    assert all(0 < unit.n_samples <= limit_s * SAMPLE_RATE for unit in units)
    for unit in units:
        assert unit.pcm.dtype == np.int16
        assert (unit.speech is None) == (not vad)
        assert unit.speech is None or len(unit.speech) == -(-unit.n_samples // VAD_FRAME)


def same(one: Unit, other: Unit) -> bool:
    plain = all(
        getattr(one, name) == getattr(other, name) for name in ("recording", "index", "start", "is_last", "flags")
    )
    return plain and all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in ("pcm", "speech", "language_pcm")
    )


# 30 s are 937.5 frames, so a unit has at most 937; its last third begins at frame 624, its last nine tenths at 93.
@pytest.mark.parametrize(
    ("drawing", "sizes"),
    [
        ("1#", [1]),
        ("937#", [937]),
        ("700# 10. 227#", [937]),
        ("700# 10. 228#", [705, 233]),  # one frame too long: the middle of the pause
        ("700# 100. 600#", [794, 606]),  # 0.2 s before what follows
        ("650# 63. 80# 100. 400#", [887, 406]),  # pauses of 2 s and more are alike: the latest
        ("650# 62. 80# 20. 400#", [706, 506]),  # of shorter ones the longest
        ("300# 10. 900#", [305, 905]),  # none in the last third: back through the unit
        ("2000.", [931, 931, 138]),  # what comes after the limit is unknown, so 0.2 s before it
    ],
)
def test_cuts(drawing: str, sizes: list[int]) -> None:
    pcm = scripted(drawing)
    units = cut([pcm], Scripted())
    check_units(units, pcm, 30, vad=True)
    assert [unit.n_samples / VAD_FRAME for unit in units] == sizes
    assert all(unit.flags == () for unit in units)


def test_a_recording_without_a_pause_is_cut_hard_where_it_is_least_like_speech() -> None:
    pcm = scripted("1500#")
    pcm[800 * VAD_FRAME : 804 * VAD_FRAME] = 90
    units = cut([pcm], Scripted())
    check_units(units, pcm, 30, vad=True)
    assert [(unit.n_samples / VAD_FRAME, unit.flags) for unit in units] == [(802, (HARD_CUT,)), (698, ())]


@pytest.mark.parametrize("vad", [True, False])
@pytest.mark.parametrize("algorithm", ["windows", "sequential"])
@pytest.mark.parametrize("n_samples", [0, 1, VAD_FRAME - 1, VAD_FRAME, VAD_FRAME + 1])
def test_short_recordings_are_one_unit(n_samples: int, algorithm: Algorithm, vad: bool) -> None:
    pcm = np.full(n_samples, 230, np.int16)
    for blocks in ([], [pcm[:0]], [pcm], list(in_blocks(pcm, [1]))):
        pieces = blocks if n_samples == 0 or (len(blocks) and len(blocks[0])) else [pcm]
        (unit,) = cut(pieces, Scripted() if vad else None, algorithm=algorithm)
        assert (unit.index, unit.start, unit.n_samples, unit.is_last, unit.flags) == (0, 0, n_samples, True, ())
        assert unit.language_pcm is None
        assert len(unit.speech) == -(-n_samples // VAD_FRAME) if unit.speech is not None else not vad


@pytest.mark.parametrize("seed", range(12))
def test_units_of_random_speech_are_the_same_in_any_pieces(seed: int) -> None:
    draw = np.random.default_rng(seed)
    longest = int(draw.choice([10, 100, 2000]))
    runs = [np.full(draw.integers(1, longest), draw.choice([0, 25, 26, 255])) for _ in range(4000 // longest * 2)]
    pcm = np.repeat(np.concatenate(runs).astype(np.int16), VAD_FRAME)
    pcm = pcm[: len(pcm) - int(draw.integers(0, VAD_FRAME))]
    expected = cut([pcm], Scripted())
    check_units(expected, pcm, 30, vad=True)
    for unit in expected[:-1]:
        assert unit.speech is not None
        end = unit.start // VAD_FRAME + len(unit.speech)
        assert HARD_CUT in unit.flags or (pcm[(end - 2) * VAD_FRAME : (end + 2) * VAD_FRAME] < MAYBE_SPEECH).all()
    for sizes, lag in (([16_000], 0), ([1, 100_000, 777], 1024), (draw.integers(1, 600_000, 9).tolist(), 5)):
        units = cut(in_blocks(pcm, sizes), Scripted(lag))
        assert len(units) == len(expected)
        assert all(map(same, units, expected))


@pytest.mark.parametrize("vad", [True, False])
def test_real_speech_in_any_pieces(vad: bool) -> None:
    audio, _ = talk(20)
    pcm = pcm_at(audio, -6)
    expected = cut([pcm], SileroVad() if vad else None)
    check_units(expected, pcm, 30, vad=vad)
    assert len(expected) > 2
    for sizes in ([16_000], [123_457, 1]):
        assert all(map(same, cut(in_blocks(pcm, sizes), SileroVad() if vad else None), expected))
    bounds = [unit.start for unit in expected[1:]]
    assert max(np.abs(audio[bound - 256 : bound + 256]).max() for bound in bounds) < 0.02
    if vad:
        speech = np.concatenate([unit.speech for unit in expected if unit.speech is not None])
        np.testing.assert_array_equal(speech, detect(pcm))
        assert all(unit.flags == () for unit in expected)


def test_without_a_vad_units_are_cut_where_it_is_quiet() -> None:
    pcm = np.random.default_rng(0).normal(0, 3000, 100 * SAMPLE_RATE).astype(np.int16)
    pcm[25 * SAMPLE_RATE :][:3200] //= 100
    units = cut([pcm])
    check_units(units, pcm, 30, vad=False)
    assert 25 * SAMPLE_RATE + 1024 <= units[0].n_samples <= 25 * SAMPLE_RATE + 3200 - 512
    assert all(unit.flags == () for unit in units)


def test_sequential_is_one_unit_up_to_its_own_limit_and_says_where_it_restarts() -> None:
    whole = scripted("1875#")
    (unit,) = cut([whole], Scripted(), algorithm="sequential")
    assert (unit.n_samples, unit.flags) == (60 * SAMPLE_RATE, ())
    longer = scripted("1500# 100. 2000# 100. 500#", short_by=100)
    units = cut([longer], Scripted(), algorithm="sequential")
    check_units(units, longer, 60, vad=True)
    assert [unit.n_samples for unit in units[:1]] == [1594 * VAD_FRAME]
    assert [unit.flags for unit in units] == [(), (RESTART, HARD_CUT), (RESTART,)]


@pytest.mark.parametrize(
    ("drawing", "first_unit", "expected"),
    [
        ("100# 800. 100#", 894, [None, (0, 894)]),  # clipped at the end of the unit where it begins
        ("1000. 800# 50. 900#", 931, [None, None, (62, 919)]),  # only units after that one carry it
        ("3000.", 931, [None, None, None, None]),  # nothing was speech
        ("20. 16? 794. 100. 900#", 924, [None, (13, 924)]),  # doubtful speech that lasts
        ("20. 5? 805. 100. 900#", 924, [None, None]),  # doubtful for a moment: no speech
    ],
)
def test_later_units_carry_the_first_speech(
    drawing: str, first_unit: int, expected: list[tuple[int, int] | None]
) -> None:
    pcm = scripted(drawing)
    units = cut([pcm], Scripted())
    assert units[0].n_samples == first_unit * VAD_FRAME
    for unit, piece in zip(units, expected, strict=False):
        if piece is None:
            assert unit.language_pcm is None
        elif unit.language_pcm is None:
            pytest.fail(f"unit {unit.index} carries nothing")
        else:
            first = next(u for u in units if u.speech is not None and (u.speech >= MAYBE_SPEECH).any())
            wanted = first.pcm[piece[0] * VAD_FRAME :][: 30 * SAMPLE_RATE]
            np.testing.assert_array_equal(unit.language_pcm, wanted)


def test_a_moment_of_doubtful_speech_is_none() -> None:
    (unit,) = cut([scripted("40. 5? 100. 2# 50. 100#")], Scripted())
    assert unit.speech is not None
    assert np.flatnonzero(unit.speech >= MAYBE_SPEECH).tolist() == list(range(197, 297))


def test_memory_is_that_of_a_unit_however_long_the_stream() -> None:
    block = np.random.default_rng(0).integers(-2, 3, SAMPLE_RATE).astype(np.int16)  # near silence: no network

    def peak_mb(hours: float) -> float:
        tracemalloc.start()
        vad = SileroVad()
        blocks = (block.copy() for _ in range(int(hours * 3600)))
        n_samples = 0
        for unit in cut_units(
            RECORDING, blocks, vad=vad, unit_length_s=300, algorithm="windows", sequential_max_s=7200
        ):
            n_samples += unit.n_samples
        assert n_samples == int(hours * 3600) * SAMPLE_RATE
        peak = tracemalloc.get_traced_memory()[1] / 2**20
        tracemalloc.stop()
        return peak

    short, long = peak_mb(0.25), peak_mb(0.75)
    assert long < short * 1.05
    assert long < 50  # a unit of 300 s is 9.2 MB


@pytest.mark.parametrize(
    ("drawing", "frame", "hard"),
    [
        ("937#", 935, True),
        ("937.", 931, False),
        ("933# 4.", 935, False),
        ("80# 20. 837#", 94, False),  # the pause that begins the last nine tenths
        ("70# 20. 847#", 935, True),  # before them a unit would be too short to be worth it
    ],
)
def test_cut_frame(drawing: str, frame: int, hard: bool) -> None:
    assert cut_frame(frames(drawing), 937) == (frame, hard)


# --- from files ---------------------------------------------------------------------------------------------------


class Stream:
    """An `AudioStream` of given blocks that ends as said."""

    def __init__(self, blocks: Sequence[Pcm], error: AudioError | None = None) -> None:
        self.flags, self.attempts, self.closed = {"clipped", "a"}, 3, False
        self._blocks, self._error = blocks, error

    def __iter__(self) -> Iterator[Pcm]:
        yield from self._blocks
        if self._error is not None:
            raise self._error

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True


def read(monkeypatch: pytest.MonkeyPatch, stream: Stream | AudioError, **settings: object) -> list[Unit | UnitResult]:
    def open_audio(recording: Recording, **limits: object) -> Stream:
        assert recording == RECORDING
        assert limits == {
            "channels": "mix", "max_audio_s": 172_800, "memory_mb": 1500, "timeout_s": None, "strike": None
        }  # fmt: skip
        if isinstance(stream, AudioError):
            raise stream
        return stream

    monkeypatch.setattr("pipeline.units.open_audio", open_audio)
    items = list(read_units(RECORDING, Config.model_validate({"unit_length_s": 30, **settings})))
    assert isinstance(stream, AudioError) or stream.closed
    return items


def spoken() -> list[Pcm]:
    return list(in_blocks(pcm_at(talk(20)[0], -6), [20_000]))


SILENT = [np.zeros(SAMPLE_RATE, np.int16)] * 40


def test_a_good_file_is_its_units_and_the_flags_are_on_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    items = read(monkeypatch, Stream(spoken()))
    units = [item for item in items if isinstance(item, Unit)]
    assert len(units) == len(items) > 2
    assert [unit.flags for unit in units] == [()] * (len(units) - 1) + [("a", "clipped")]
    check_units(units, np.concatenate(spoken()), 30, vad=True)


def test_settings_reach_the_cutting(monkeypatch: pytest.MonkeyPatch) -> None:
    (unit,) = read(monkeypatch, Stream(spoken()), vad="none", algorithm="sequential")
    assert isinstance(unit, Unit)
    assert (unit.n_samples, unit.speech) == (sum(map(len, spoken())), None)
    units = read(monkeypatch, Stream(SILENT * 2), algorithm="sequential", sequential_max_s=60)
    assert [unit.flags for unit in units] == [(), (RESTART, "a", "clipped")]


@pytest.mark.parametrize("stream", [NotFoundError("no such file"), Stream([], DamagedAudioError("no frame"))])
def test_nothing_decodable_is_one_failed_row(stream: Stream | AudioError, monkeypatch: pytest.MonkeyPatch) -> None:
    (item,) = read(monkeypatch, stream)
    assert isinstance(item, UnitResult)
    assert (item.index, item.is_last, item.start, item.n_samples) == (0, True, 0, 0)
    assert item.failure is not None
    assert item.failure.stage == "decode"
    assert item.failure.kind == ("damaged_audio" if isinstance(stream, Stream) else "not_found")
    assert item.failure.attempts == (3 if isinstance(stream, Stream) else 1)


@pytest.mark.parametrize("vad", ["silero", "none"])
def test_damage_after_speech_is_flagged(vad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    items = read(monkeypatch, Stream(spoken(), DamagedAudioError("bad frame")), vad=vad)
    assert all(isinstance(item, Unit) for item in items)
    assert items[-1].is_last
    assert items[-1].flags == ("a", "clipped", TRUNCATED)
    assert all(item.flags == () for item in items[:-1])


@pytest.mark.parametrize(
    ("blocks", "error"),
    [
        ("silent", DamagedAudioError("bad frame")),
        ("spoken", SourceError("connection lost")),
        ("spoken", TooLongError("longer than max_audio_s")),
    ],
)
def test_other_ends_give_what_was_decoded_and_a_failed_row(
    blocks: str, error: AudioError, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = SILENT if blocks == "silent" else spoken()
    *units, lost = read(monkeypatch, Stream(pieces, error))
    assert all(isinstance(unit, Unit) and not unit.is_last for unit in units)
    assert sum(unit.n_samples for unit in units) == sum(map(len, pieces))
    assert isinstance(lost, UnitResult)
    assert (lost.index, lost.is_last, lost.n_samples) == (len(units), True, 0)
    assert lost.start == sum(map(len, pieces))
    assert lost.failure is not None
    assert (lost.failure.kind, lost.failure.attempts) == (error.kind, 3)


def test_damage_after_speech_and_then_silence_is_still_damage_after_speech(monkeypatch: pytest.MonkeyPatch) -> None:
    items = read(monkeypatch, Stream([*spoken(), *SILENT], DamagedAudioError("bad frame")))
    assert all(isinstance(item, Unit) for item in items)
    assert TRUNCATED in items[-1].flags


def test_starts_never_overlap_across_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    items = read(monkeypatch, Stream(spoken(), SourceError("connection lost")))
    assert all(one.start + one.n_samples == other.start for one, other in pairwise(items))


def write_wav(path: Path, pcm: Pcm) -> Recording:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(pcm.tobytes())
    return Recording(path.stem, str(path))


def test_real_files(tmp_path: Path) -> None:
    pcm = np.concatenate(spoken())
    good = write_wav(tmp_path / "good.wav", pcm)
    (tmp_path / "cut.wav").write_bytes((tmp_path / "good.wav").read_bytes()[: 44 + len(pcm)])
    cut_short, missing = Recording("cut", str(tmp_path / "cut.wav")), Recording("none", str(tmp_path / "none.wav"))
    settings = Config(unit_length_s=30)

    units = [item for item in read_units(good, settings) if isinstance(item, Unit)]
    check_units(units, pcm, 30, vad=True)
    assert units[-1].flags == ()

    *first, last = read_units(cut_short, settings)
    assert all(isinstance(item, Unit) and item.flags == () for item in first)
    assert isinstance(last, Unit)
    assert (last.is_last, last.flags) == (True, (TRUNCATED,))
    assert last.start + last.n_samples == len(pcm) // 2

    (lost,) = read_units(missing, settings)
    assert isinstance(lost, UnitResult)
    assert lost.failure is not None
    assert lost.failure.kind == "not_found"
