"""Murmuration's own Prometheus metrics: their names, what they mean, and the only labels they can have.

Every label has a fixed set of values; what is not in it counts as `other`. So no file name, no address and no model
of a request ever becomes a time series. Ray exports them, with `ray_` before the name and the worker's own id (so a
gauge is one engine's, or one driver's). Knows no Ray: `Meters` is given something that makes the instruments.

Counters count what was done, also what had to be done twice after a crash; what is in the output, the tables say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.errors import MurmurError

OTHER = "other"
STAGES = ("source", "decode", "vad", "engine", "commit")  # of `types.Spent`, and the commit


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. `labels`: the name of each, and all values that it can have."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    buckets: tuple[float, ...] = ()


def _kinds(error: type[MurmurError] = MurmurError) -> Iterator[str]:
    yield error.kind
    for one in error.__subclasses__():
        yield from _kinds(one)


KINDS = tuple(sorted({"internal", OTHER, *_kinds()}))
FAILURE_STAGES = ("manifest", "decode", "engine", "sink", OTHER)

METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            "murmur_audio_seconds_total",
            "counter",
            "Seconds of audio that left the decoders, and the engines.",
            {"stage": ("decoded", "transcribed")},
        ),
        Metric("murmur_rtfx", "gauge", "Seconds of audio an engine did for each second, over the last minute."),
        Metric("murmur_lanes", "gauge", "Lanes of an engine: slots of its running batch."),
        Metric("murmur_lanes_busy", "gauge", "Of these, lanes with a window in them."),
        Metric("murmur_windows_queued", "gauge", "Windows in an engine that wait for a lane."),
        Metric("murmur_units_in_flight", "gauge", "Units that an engine was handed and has not ended."),
        Metric(
            "murmur_recordings_total",
            "counter",
            "Recordings that ended in this run, as committed.",
            {"status": ("ok", "failed")},
        ),
        Metric(
            "murmur_failures_total",
            "counter",
            "Recordings that failed in this run, by what failed first.",
            {"kind": KINDS, "stage": FAILURE_STAGES},
        ),
        Metric(
            "murmur_retries_total",
            "counter",
            "Tries beyond the first: of a source or a decoder, and of recordings that were put off and taken up again.",
            {"stage": ("decode", "engine")},
        ),
        Metric(
            "murmur_stage_seconds_total",
            "counter",
            "Seconds that Units took, by stage; in an engine many at once.",
            {"stage": STAGES},
        ),
        Metric(
            "murmur_stage_seconds",
            "histogram",
            "Seconds that one Unit took (Ray's exporter makes sums of bucket middles: use the counter for those).",
            {"stage": STAGES},
            (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0),
        ),
    )
}

Record = Callable[[float, dict[str, str]], None]  # counts, sets or observes a value under these labels


class Meters:
    """Metrics of this process; an instrument is made when it is first used."""

    def __init__(self, make: Callable[[Metric], Record]) -> None:
        self._make = make
        self._instruments: dict[str, Record] = {}

    def record(self, name: str, value: float, **labels: str) -> None:
        """Add to a counter (nothing, if it is nothing), set a gauge, or observe."""
        metric = METRICS[name]
        if metric.kind == "counter" and value <= 0:
            return
        if name not in self._instruments:
            self._instruments[name] = self._make(metric)
        self._instruments[name](value, bounded(metric, labels))

    def spent(self, spent: Any) -> None:
        """What a Unit took in each stage that `spent` (of `types.Spent`, or such a mapping) knows of."""
        for stage in STAGES:
            value = spent.get(f"{stage}_s") if isinstance(spent, Mapping) else getattr(spent, f"{stage}_s", None)
            if value is not None:
                self.record("murmur_stage_seconds_total", value, stage=stage)
                self.record("murmur_stage_seconds", value, stage=stage)


def bounded(metric: Metric, labels: Mapping[str, str]) -> dict[str, str]:
    """`labels` with values that the metric knows; raises `KeyError` for labels that it does not have."""
    if labels.keys() != metric.labels.keys():
        raise KeyError(f"{metric.name} has the labels {sorted(metric.labels)}, not {sorted(labels)}")
    return {name: value if value in metric.labels[name] else OTHER for name, value in labels.items()}
