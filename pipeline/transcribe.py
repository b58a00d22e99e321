"""The whole path without Ray: one recording in, its Transcript out. The bulk job takes the same three steps.

read_units (decode, cut)  →  engine.run (continuous batching)  →  stitch
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipeline.channels import merged, tagged
from pipeline.config import Config
from pipeline.engine import Engine
from pipeline.manifest import default_id
from pipeline.stitch import stitch
from pipeline.types import DecodeOptions, Recording, Transcript, Unit, UnitResult
from pipeline.units import read_units


def transcribe(
    source: str | Path | Recording, engine: Engine, options: DecodeOptions, config: Config | None = None
) -> Transcript:
    """The Transcript of one audio file, anything fsspec opens, or a `Recording` of a manifest.

    `options` say how it is decoded; `config` only how it is read and cut (channels, VAD, unit length, limits). Audio
    that cannot be read gives a `failed` Transcript with its reason, not an exception.
    """
    config = (config or Config()).model_copy(update={"algorithm": options.algorithm})
    recording = source if isinstance(source, Recording) else Recording(id=default_id(str(source)), uri=str(source))
    unreadable: list[UnitResult] = []

    def units() -> Iterator[Unit]:
        for item in read_units(recording, config):
            if isinstance(item, Unit):
                yield item
            else:
                unreadable.append(item)

    done = merged(engine.run(tagged(units()), options))
    return stitch(done + unreadable)
