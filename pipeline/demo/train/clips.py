"""Makes the bundled clips: a dozen held-out recordings in as many formats, one silent, one damaged.

The seeds were chosen so that the demo model reads the clips almost without an error; how often it errs on clips
that nobody chose is in the model card. The same library versions give the same bytes.
Knows nothing about the job or the server that read the clips.

    python -m pipeline.demo.train.clips [FOLDER] [--check]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.demo import clips_path, model_path
from pipeline.demo.train.heldout import (
    Clip,
    cut_at_pauses,
    make_clip,
    make_long,
    manifest_row,
    reference,
    write_index,
)
from pipeline.demo.train.lexicon import Language
from pipeline.demo.train.synth import SAMPLE_RATE

_SILENCE_S = 10
_FRAME = 1024  # samples a frame handed to the encoder, which cuts its own


@dataclass(frozen=True, slots=True)
class Format:
    """How a clip is stored. `bit_rate` is None for lossless codecs."""

    codec: str
    rate: int
    layout: str = "mono"
    bit_rate: int | None = None
    sample_format: str = "s16"


@dataclass(frozen=True, slots=True)
class Spec:
    """One clip of speech: its file, what is said, and how it is stored."""

    file_name: str
    language: Language
    n_sentences: int
    seed: int
    format: Format
    kind: str = "clean"

    @property
    def clip_id(self) -> str:
        return self.file_name.rsplit(".", 1)[0]

    def make(self) -> Clip:
        if self.kind == "long":
            return make_long(self.language, self.seed, n_sentences=self.n_sentences)
        return make_clip(self.language, self.n_sentences, self.seed, one_voice=self.n_sentences < 5)


SPECS = (
    Spec("en-one.wav", "en", 1, 4, Format("pcm_s16le", 16_000)),
    Spec("en-three.flac", "en", 3, 1, Format("flac", 44_100, "stereo")),
    Spec("en-five.mp3", "en", 5, 2, Format("libmp3lame", 32_000, "mono", 64_000, "s16p")),
    Spec("en-long.opus", "en", 42, 9, Format("libopus", 24_000, "mono", 32_000), kind="long"),
    Spec("de-two.flac", "de", 2, 5, Format("flac", 22_050)),
    Spec("de-phone.wav", "de", 1, 17, Format("pcm_s16le", 8_000)),
    Spec("de-four.webm", "de", 4, 2, Format("libopus", 48_000, "stereo", 64_000)),
    Spec("es-two.m4a", "es", 2, 4, Format("aac", 48_000, "stereo", 96_000, "fltp")),
    Spec("es-three.wav", "es", 3, 1, Format("pcm_s16le", 24_000, "stereo")),
    Spec("es-five.ogg", "es", 5, 7, Format("libopus", 48_000, "mono", 48_000)),
)
_SILENT = "silence.wav"
_DAMAGED = "damaged.m4a"


def write_clips(folder: Path) -> None:
    """All clips, the manifest and the references."""
    folder.mkdir(parents=True, exist_ok=True)
    clips = {spec: spec.make() for spec in SPECS}
    for spec, clip in clips.items():
        encode(folder / spec.file_name, clip.pcm, spec.format)
    encode(folder / _SILENT, _silence(), Format("pcm_s16le", SAMPLE_RATE))
    _write_damaged(folder)
    rows = [manifest_row(clip, spec.clip_id, spec.file_name, spec.kind) for spec, clip in clips.items()]
    write_index(folder, [*rows, *_special_rows()], {spec.clip_id: reference(clip) for spec, clip in clips.items()})


def _special_rows() -> list[dict[str, Any]]:
    silent = {"audio_filepath": _SILENT, "id": "silence", "text": "", "duration": _SILENCE_S, "kind": "silence"}
    # Nobody knows how long a file is that nothing can decode, nor what was said in it.
    damaged = {"audio_filepath": _DAMAGED, "id": "damaged", "kind": "damaged", "expected": "failed"}
    return [silent, damaged]


def _silence() -> NDArray[np.int16]:
    """Not digital silence: a noise floor at -76 dB of full scale, as a quiet room has."""
    floor = np.random.default_rng(0).standard_normal(_SILENCE_S * SAMPLE_RATE)
    return np.rint(floor * 5).astype(np.int16)


def _write_damaged(folder: Path) -> None:
    """A real recording whose bytes were overwritten behind its first box, so it still looks like an .m4a."""
    path = folder / _DAMAGED
    encode(path, make_clip("en", 2, 1).pcm, Format("aac", 16_000, "mono", 32_000, "fltp"))
    data = bytearray(path.read_bytes())
    first_box = int.from_bytes(data[:4], "big")
    data[first_box:] = np.random.default_rng(0).bytes(len(data) - first_box)
    path.write_bytes(data)


# --- encoding ---------------------------------------------------------------------------------------------------


def encode(path: Path, pcm: NDArray[np.int16], target: Format) -> None:
    """Write 16 kHz samples as `target`; the container follows the file's name."""
    import av

    samples = _channels(_resampled(pcm, target.rate), target.layout)
    # bitexact: no encoder version, date or random serial number in the file.
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        stream: Any = container.add_stream(target.codec, rate=target.rate)
        stream.codec_context.layout = target.layout
        stream.codec_context.format = target.sample_format
        stream.codec_context.options = {"flags": "+bitexact"}
        if target.bit_rate:
            stream.codec_context.bit_rate = target.bit_rate
        for frame in _frames(samples, target):
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _resampled(pcm: NDArray[np.int16], rate: int) -> NDArray[np.int16]:
    from scipy.signal import resample_poly

    if rate == SAMPLE_RATE:
        return pcm
    divisor = int(np.gcd(rate, SAMPLE_RATE))
    samples = resample_poly(pcm.astype(np.float64), rate // divisor, SAMPLE_RATE // divisor)
    return np.asarray(np.rint(np.clip(samples, -32768, 32767)), np.int16)


def _channels(pcm: NDArray[np.int16], layout: str) -> NDArray[np.int16]:
    """[channels, samples]; the right channel is a little softer, as if the speaker sat left."""
    if layout == "mono":
        return pcm[None]
    return np.stack([pcm, np.rint(pcm * 0.8).astype(np.int16)])


def _frames(samples: NDArray[np.int16], target: Format) -> Iterator[Any]:
    """Frames in the sample format of the encoder, with their times in samples."""
    import av

    # One continuous stream: only the sample format changes, so the resampler keeps no tail.
    convert = av.AudioResampler(target.sample_format, target.layout, target.rate, frame_size=None)
    for start in range(0, samples.shape[1], _FRAME):
        piece = np.ascontiguousarray(samples[:, start : start + _FRAME].T.reshape(1, -1))
        frame = av.AudioFrame.from_ndarray(piece, format="s16", layout=target.layout)
        frame.sample_rate, frame.pts = target.rate, start
        yield from convert.resample(frame)


def decode(path: Path) -> NDArray[np.int16]:
    """A whole file as 16 kHz mono samples."""
    import av

    resample = av.AudioResampler("s16", "mono", SAMPLE_RATE)
    with av.open(str(path)) as container:
        frames = [out for frame in container.decode(audio=0) for out in resample.resample(frame)]
        frames += resample.resample(None)
    return np.concatenate([frame.to_ndarray()[0] for frame in frames])


# --- checking ---------------------------------------------------------------------------------------------------


def check(folder: Path) -> bool:
    """Transcribe the written files with openai-whisper, whole and in pieces; True when all is within 10 % WER."""
    import torch

    from pipeline.demo.train.convert import to_openai
    from pipeline.demo.train.evaluate import transcribe, word_errors

    torch.set_num_threads(1)
    model = to_openai(model_path())
    good = True
    for spec in SPECS:
        clip, pcm = spec.make(), decode(folder / spec.file_name)
        whole = transcribe(model, pcm)
        pieces = " ".join(transcribe(model, piece).text for piece in cut_at_pauses(clip, pcm=pcm))
        rates = [word_errors([clip.text], [text]) for text in (whole.text, pieces)]
        fine = max(rates) <= 0.1 and whole.language == clip.language
        good &= fine
        print(
            f"{spec.file_name:14} {len(pcm) / SAMPLE_RATE:6.1f} s of {clip.duration_s:6.1f}  {whole.language}  "
            f"WER whole {rates[0]:.3f}  in pieces {rates[1]:.3f}{'' if fine else '  <-- not good'}"
        )
    silent = transcribe(model, decode(folder / _SILENT)).text
    print(f"{_SILENT:14} {silent!r}")
    return good and silent == ""


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the bundled demo clips.")
    parser.add_argument("folder", type=Path, nargs="?", default=clips_path())
    parser.add_argument("--check", action="store_true", help="transcribe the written files with the demo model")
    options = parser.parse_args()
    write_clips(options.folder)
    size = sum(path.stat().st_size for path in options.folder.iterdir())
    print(f"{size / 1e6:.2f} MB in {options.folder}")
    if options.check and not check(options.folder):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
