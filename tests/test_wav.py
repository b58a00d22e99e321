"""A plain WAV is read as libav would read it, whatever its header says; what is not quite plain is left to libav."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from audio_files import noise, write_audio, write_wav

from pipeline.audio import AudioStream
from pipeline.decoder import Audio, DecodedAudio, open_audio
from pipeline.errors import AudioError
from pipeline.types import SAMPLE_RATE, Pcm, Recording
from pipeline.wav import plain_wav, wav_seconds

PCM = (1, 1, SAMPLE_RATE, 2 * SAMPLE_RATE, 2, 16)  # tag, channels, rate, bytes a second, bytes a sample, bits


def wav(
    data: bytes,
    stated: int | None = None,
    form: tuple[int, int, int, int, int, int] = PCM,
    before: bytes = b"",
    after: bytes = b"",
) -> bytes:
    """A file whose header states `stated` bytes of sound, with chunks before and after them."""
    head = b"RIFF" + struct.pack("<I", 36 + len(data)) + b"WAVE" + before
    chunk = b"fmt " + struct.pack("<IHHIIHH", 16, *form)
    return head + chunk + b"data" + struct.pack("<I", len(data) if stated is None else stated) + data + after


SOUND = noise(3.0).tobytes()
TAG = b"LIST" + struct.pack("<I", 4) + b"INFO"
PLAIN = {
    "plain": wav(SOUND),
    "tagged": wav(SOUND, before=TAG),
    "one sample": wav(SOUND[:2]),
    "cut": wav(SOUND[:50_000], len(SOUND)),
    "cut in a sample": wav(SOUND[:50_001], len(SOUND)),
    "cut by a moment": wav(SOUND[:-400], len(SOUND)),
    "an odd length": wav(SOUND[:50_001]),
}
OTHERS = {
    "tagged behind": wav(SOUND, after=TAG),
    "no length": wav(SOUND, 0),
    "written to a pipe": wav(SOUND, 0xFFFFFFFF),
    "two chunks of sound": wav(SOUND, 1000, after=b""),
    "stereo": wav(SOUND, form=(1, 2, SAMPLE_RATE, 4 * SAMPLE_RATE, 4, 16)),
    "8 kHz": wav(SOUND, form=(1, 1, 8_000, 16_000, 2, 16)),
    "8 bit": wav(SOUND, form=(1, 1, SAMPLE_RATE, SAMPLE_RATE, 1, 8)),
    "float": wav(SOUND, form=(3, 1, SAMPLE_RATE, 4 * SAMPLE_RATE, 4, 32)),
    "a forged byte rate": wav(SOUND, form=(1, 1, SAMPLE_RATE, 1, 2, 16)),
    "RF64": b"RF64" + wav(SOUND)[4:],
    "cut behind its header": wav(b"", len(SOUND)),
    "another thing": b"RIFF\0\0\0\0AVI " + SOUND,
}
SLICES = [(None, None), (0, None), (16_001, 20_000), (40_000, None), (47_000, 1_100), (47_000, 9_000), (99_999, 5)]


def outcome(open_stream: Callable[[], Audio | AudioStream]) -> tuple[Pcm, set[str], str | None]:
    """Samples, flags, and the error after them."""
    blocks, flags, error = [np.zeros(0, np.int16)], set(), None
    try:
        with open_stream() as stream:
            assert not isinstance(stream, DecodedAudio)
            flags = stream.flags
            blocks.extend(stream)
    except AudioError as found:
        error = f"{type(found).__name__}: {found}"
    return np.concatenate(blocks), flags, error


@pytest.mark.parametrize("name", sorted(PLAIN))
@pytest.mark.parametrize("max_audio_s", [2, 60])
def test_plain_files_are_read_as_libav_reads_them(name: str, max_audio_s: int, tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(PLAIN[name])
    for offset, length in SLICES:
        recording = Recording("id", str(path), offset=offset, length=length)
        got = outcome(lambda: open_audio(recording, channels="mix", max_audio_s=max_audio_s))  # noqa: B023
        with path.open("rb") as file:
            limits = {"max_audio_s": max_audio_s, "offset": offset, "length": length}
            wanted = outcome(lambda: AudioStream(file, str(path), **limits))  # noqa: B023
        assert got[1:] == wanted[1:], (offset, length)
        assert np.array_equal(got[0], wanted[0]), (offset, length)


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_what_is_not_quite_plain_is_left_to_libav(name: str) -> None:
    assert plain_wav(OTHERS[name][:4096], len(OTHERS[name])) is None


def test_what_encoders_write_is_plain(tmp_path: Path) -> None:
    data = write_wav(tmp_path / "a.wav", noise(1.0)).read_bytes()
    found = plain_wav(data[:4096], len(data))
    assert found is not None
    assert (data[found.start :], found.n_bytes) == (noise(1.0).tobytes(), 32_000)
    for kind in ("flac", "mp3", "w64", "aiff"):
        data = write_audio(tmp_path / f"a.{kind}", noise(1.0)).read_bytes()
        assert plain_wav(data[:4096], len(data)) is None


@pytest.mark.parametrize("n_bytes", range(0, 60, 3))
def test_a_piece_of_a_header_is_nothing(n_bytes: int) -> None:
    assert plain_wav(wav(SOUND)[: min(n_bytes, 43)], 10**6) is None
    assert wav_seconds(wav(SOUND)[: min(n_bytes, 43)]) is None


def test_the_length_that_a_header_states() -> None:
    assert wav_seconds(wav(SOUND)) == 3.0
    assert wav_seconds(wav(SOUND, 0xFFFFFFFF)) is None
