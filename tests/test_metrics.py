"""Our metrics: bounded labels, a dashboard that names only what exists, and what a real Ray exports of a run."""

from __future__ import annotations

import json
import re
import threading
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from audio_files import tone, write_wav
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from pipeline import errors, job
from pipeline.config import Config
from pipeline.figures import STAGES as SHOWN_STAGES
from pipeline.metrics import KINDS, METRICS, OTHER, STAGES, Meters, Metric, bounded
from pipeline.types import Spent

ROOT = Path(__file__).resolve().parent.parent


class Noted:
    """Instruments that remember what was recorded."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.values: list[tuple[str, float, dict[str, str]]] = []

    def __call__(self, metric: Metric) -> Callable[[float, dict[str, str]], None]:
        self.made.append(metric.name)
        return lambda value, labels: self.values.append((metric.name, value, labels))


def test_an_instrument_is_made_once_and_when_it_is_needed() -> None:
    noted = Noted()
    meters = Meters(noted)
    assert noted.made == []
    meters.record("murmur_recordings_total", 2, status="ok")
    meters.record("murmur_recordings_total", 0, status="failed")  # Ray's counters refuse nothing
    meters.record("murmur_lanes", 0)  # a gauge may be at zero
    meters.record("murmur_recordings_total", 1, status="ok")
    assert noted.made == ["murmur_recordings_total", "murmur_lanes"]
    assert noted.values == [
        ("murmur_recordings_total", 2, {"status": "ok"}),
        ("murmur_lanes", 0, {}),
        ("murmur_recordings_total", 1, {"status": "ok"}),
    ]


def test_only_stages_that_were_measured_are_recorded() -> None:
    noted = Noted()
    Meters(noted).spent(Spent(source_s=0.5, engine_s=2.0))
    Meters(noted).spent({"commit_s": 0.25})
    seconds = [(value, labels["stage"]) for name, value, labels in noted.values if name == "murmur_stage_seconds_total"]
    assert seconds == [(0.5, "source"), (2.0, "engine"), (0.25, "commit")]


def test_a_thousand_names_make_no_thousand_series() -> None:
    metric = METRICS["murmur_failures_total"]
    labels = [bounded(metric, {"kind": f"kind-{i}", "stage": f"s{i}"}) for i in range(1000)]
    assert {tuple(sorted(one.items())) for one in labels} == {(("kind", OTHER), ("stage", OTHER))}
    with pytest.raises(KeyError, match="not \\['recording'\\]"):
        bounded(metric, {"recording": "a"})
    assert all(0 < len(values) < 50 for metric in METRICS.values() for values in metric.labels.values())


def test_every_kind_of_failure_has_its_label() -> None:
    assert {errors.NotFoundError.kind, errors.WorkerCrashError.kind, "internal", OTHER} <= set(KINDS)
    assert {f"{stage}_s" for stage in STAGES} == set(SHOWN_STAGES)


def test_names_and_kinds_are_what_prometheus_wants() -> None:
    for name, metric in METRICS.items():
        assert re.fullmatch("murmur_[a-z_]+", name)
        assert name.endswith("_total") == (metric.kind == "counter")
        assert bool(metric.buckets) == (metric.kind == "histogram")
        assert metric.help.endswith((".", ").")), name


def test_the_dashboard_names_only_metrics_and_labels_that_exist() -> None:
    dashboard = json.loads((ROOT / "configs" / "grafana.json").read_text())
    targets = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    named = {name for expression in targets for name in re.findall(r"ray_(murmur_\w+)", expression)}
    assert {name.removesuffix("_bucket") for name in named} == set(METRICS)  # and all of them are shown
    labels = {label for metric in METRICS.values() for label in metric.labels} | {"le", "WorkerId"}
    used = {
        name for expression in targets for by in re.findall(r"by \(([^)]*)\)", expression) for name in by.split(", ")
    }
    legends = [target["legendFormat"] for panel in dashboard["panels"] for target in panel["targets"]]
    shown = {name for legend in legends for name in re.findall(r"{{(\w+)}}", legend)}
    assert used | shown <= labels
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)


# ---- on a real Ray


def scrape() -> dict[tuple[str, ...], float]:
    """What Ray exports of ours on all nodes, summed over workers: (name, label values ...) → value."""
    import ray

    found: dict[tuple[str, ...], float] = defaultdict(float)
    for node in ray.nodes():
        url = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            text = answer.read().decode()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                name = sample.name.removeprefix("ray_")
                metric = METRICS.get(name) or METRICS.get(re.sub("_(bucket|count|sum)$", "", name))
                if metric is not None:
                    own = [sample.labels[label] for label in (*metric.labels, "le") if label in sample.labels]
                    found[name, *own] += sample.value
    return found


def most_until(ended: threading.Event) -> dict[tuple[str, ...], float]:
    """The largest value of each series that was seen until then."""
    most: dict[tuple[str, ...], float] = {}
    while not ended.wait(0.3):
        for key, value in scrape().items():
            most[key] = max(value, most.get(key, value))
    return most


@pytest.mark.ray
def test_what_ray_exports_of_a_run_is_what_the_tables_say(
    ray_cluster: None, tmp_path: Path, fake_config: Callable[..., Config]
) -> None:
    folder = tmp_path / "audio"
    for i in range(6):
        write_wav(folder / f"{i}.wav", tone(200 + 50 * i, 1.0 + i))
    (folder / "junk.wav").write_bytes(b"no audio" * 100)
    hang = {"match": "*4.wav", "stage": "engine", "kind": "hang", "text": "6"}
    config = fake_config(vad="none", fake__faults=[hang, {"match": "*5.wav", "stage": "engine", "kind": "nan"}])
    before, ended = scrape(), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(most_until, ended)
        try:
            job.run([str(folder)], str(tmp_path / "out"), config, console=Console(quiet=True))
        finally:
            ended.set()
        most = watching.result()
    # Of this engine; those of earlier tests' engines on this cluster are still exported, and vanish meanwhile.
    assert most["murmur_lanes",] >= 8
    assert most["murmur_lanes",] % 8 == 0
    assert most["murmur_lanes_busy",] >= 1
    assert most["murmur_units_in_flight",] >= 1

    rows = pq.read_table(tmp_path / "out" / "recordings").to_pylist()
    statuses = Counter(row["status"] for row in rows)
    expected: dict[tuple[str, ...], float] = {
        ("murmur_audio_seconds_total", "decoded"): sum(row["duration_s"] for row in rows),
        ("murmur_audio_seconds_total", "transcribed"): sum(row["duration_s"] for row in rows if row["status"] == "ok"),
        ("murmur_recordings_total", "ok"): statuses["ok"],
        ("murmur_recordings_total", "failed"): statuses["failed"],
        ("murmur_failures_total", "non_finite", "engine"): 1,
        ("murmur_failures_total", "damaged_audio", "decode"): 1,
        ("murmur_stage_seconds_count", "commit"): len(rows),
        ("murmur_stage_seconds_count", "engine"): len(rows) - 1,
        ("murmur_stage_seconds_count", "decode"): len(rows),
    }

    def now() -> dict[tuple[str, ...], float]:
        return {key: round(value - before.get(key, 0.0), 6) for key, value in scrape().items()}

    deadline = time.monotonic() + 60  # workers report every second, and a loaded machine late
    while any(now().get(key) != value for key, value in expected.items()) and time.monotonic() < deadline:
        time.sleep(0.5)
    found = now()
    assert {key: found.get(key) for key in expected} == expected
    assert found["murmur_stage_seconds_total", "engine"] > 6  # the one that hung
    assert found["murmur_stage_seconds_total", "decode"] > 0


def test_without_ray_nothing_is_recorded(fake_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline import stages

    monkeypatch.setattr(stages.ray, "is_initialized", lambda: False)
    stages.count_retries(1, "decode")
    stages.count_commit(3, 0.5)
