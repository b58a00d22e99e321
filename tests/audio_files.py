"""Audio files for tests, encoded on the spot. Samples are int16: [n] for mono, [c, n] for more channels."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.int16]

# kind → (libav's container, its codec)
KINDS = {
    "wav": ("wav", "pcm_s16le"),
    "wav24": ("wav", "pcm_s24le"),
    "wavf32": ("wav", "pcm_f32le"),
    "wavu8": ("wav", "pcm_u8"),
    "alaw": ("wav", "pcm_alaw"),
    "adpcm": ("wav", "adpcm_ms"),
    "w64": ("w64", "pcm_s16le"),
    "aiff": ("aiff", "pcm_s16be"),
    "au": ("au", "pcm_s16be"),
    "caf": ("caf", "pcm_s16le"),
    "flac": ("flac", "flac"),
    "mp3": ("mp3", "libmp3lame"),
    "m4a": ("mp4", "aac"),
    "aac": ("adts", "aac"),
    "ac3": ("ac3", "ac3"),
    "opus": ("ogg", "libopus"),
    "webm": ("webm", "libopus"),
    "mka": ("matroska", "flac"),
    "wv": ("wv", "wavpack"),
}

# Texts that name another file, in the way of each format.
PLAYLISTS = {
    "hls": "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{path}\n#EXT-X-ENDLIST\n",
    "m3u": "#EXTM3U\n{path}\n",
    "ffconcat": "ffconcat version 1.0\nfile {path}\n",
    "sdp": "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nc=IN IP4 127.0.0.1\r\nt=0 0\r\nm=audio 5004 RTP/AVP 0\r\n",
    "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
    'mediaPresentationDuration="PT10S"><Period><AdaptationSet mimeType="audio/mp4"><Representation id="1" '
    'bandwidth="1"><BaseURL>{path}</BaseURL></Representation></AdaptationSet></Period></MPD>',
    "imf": '<?xml version="1.0"?><CompositionPlaylist xmlns="http://www.smpte-ra.org/schemas/2067-3/2016"/>',
}


def tone(hz: float, duration_s: float, rate: int = 16_000, level: float = 0.25) -> Samples:
    t = np.arange(round(duration_s * rate)) / rate
    return (np.sin(2 * np.pi * hz * t) * level * 32767).astype(np.int16)


def noise(duration_s: float, rate: int = 16_000, level: float = 0.1, seed: int = 0) -> Samples:
    """White noise, of which no second is like another."""
    n = round(duration_s * rate)
    return (np.random.default_rng(seed).normal(0, level, n).clip(-1, 1) * 32767).astype(np.int16)


def write_wav(path: Path, pcm: Samples, rate: int = 16_000) -> Path:
    return write_audio(path, pcm, rate, "wav")


def write_audio(
    path: Path, pcm: Samples, rate: int = 16_000, kind: str = "", layout: str = "", bit_rate: int = 0, **options: str
) -> Path:
    """Encode `pcm` to `path` as `kind` (the path's extension if empty); `options` are the container's."""
    form, codec = KINDS[kind or path.suffix[1:]]
    channels = np.atleast_2d(pcm)
    layout = layout or {1: "mono", 2: "stereo"}[len(channels)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format=form, container_options=options) as container:
        _encode(container, channels, rate, codec, layout, bit_rate)
    return path


def write_tracks(path: Path, tracks: list[Samples], rate: int = 48_000, form: str = "matroska") -> Path:
    """Several audio tracks in one file, each mono."""
    with av.open(str(path), "w", format=form) as container:
        streams = [container.add_stream("flac", rate=rate, layout="mono") for _ in tracks]
        for stream, pcm in zip(streams, tracks, strict=True):
            for packet in [*stream.encode(_frame(pcm[None], rate, "mono")), *stream.encode(None)]:
                container.mux(packet)
    return path


def write_film(path: Path, pcm: Samples | None, rate: int = 48_000) -> Path:
    """A second of pictures in MP4, with sound or without."""
    with av.open(str(path), "w", format="mp4") as container:
        video = container.add_stream("mpeg4", rate=25)
        video.width = video.height = 64
        video.pix_fmt = "yuv420p"
        audio = container.add_stream("aac", rate=rate, layout="mono") if pcm is not None else None
        for index in range(25):
            frame = av.VideoFrame.from_ndarray(np.full((96, 64), index * 8, np.uint8), format="yuv420p")
            frame.pts, frame.time_base = index, Fraction(1, 25)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if audio is not None and pcm is not None:
            container.mux(audio.encode(_frame(pcm[None], rate, "mono")))
            container.mux(audio.encode(None))
    return path


def _frame(channels: Samples, rate: int, layout: str) -> av.AudioFrame:
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(channels.T).reshape(1, -1), format="s16", layout=layout)
    frame.sample_rate, frame.pts = rate, 0
    return frame


def _encode(
    container: av.container.OutputContainer, channels: Samples, rate: int, codec: str, layout: str, bit_rate: int = 0
) -> None:
    stream = container.add_stream(codec, rate=rate, layout=layout)
    if bit_rate:
        stream.bit_rate = bit_rate
    container.start_encoding()
    frames = []
    if channels.shape[1]:  # the encoder's own sample format and frame length
        size = stream.codec_context.frame_size or 4096
        resampler = av.AudioResampler(stream.codec_context.format, layout, rate, frame_size=size)
        frames = [*resampler.resample(_frame(channels, rate, layout)), *resampler.resample(None)]
    for frame in [*frames, None]:
        container.mux(stream.encode(frame))
