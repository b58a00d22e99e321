"""Finalise 100,000 recordings of 12 Units each: how long, in how much memory, and killed half way.

    python -m tests.benchmarks.finalise_scale [--recordings 100000] [--out FILE] [--dir FOLDER] [--keep]

The committed data is made directly, through `ledger.commit`, by as many processes as there are cores: objects of 8
Units, as a run on GPUs writes them. Then, each a process of its own that is watched with all its children:

    killed     murmur finalize, kill -9 to the whole group when its first shard is written
    again      the same to its end: wall time, processor time, peak memory of every process
    grown      1 % more recordings, and finalize: what is new costs, what is there does not
    nothing    finalize with nothing new

At the end every id is counted in the tables. Prints one JSON object on the last line; ends with 1 where the tables are
not exact.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from pipeline.config import load_config
from pipeline.job import shards_for
from pipeline.ledger import commit
from pipeline.machine import machine, usable_cores
from pipeline.output import open_output, write_inputs
from pipeline.schema import UNITS, to_table, unit_row
from pipeline.store import Store
from pipeline.types import SAMPLE_RATE, Recording, Segment, UnitResult

UNITS_PER_OBJECT = 8
UNIT = 300 * SAMPLE_RATE
SAID = " It was said here, and it was heard there, that the third of the three red boats had come in before noon."


def batched(items: Iterable[Any], n: int) -> Iterator[list[Any]]:
    """As Python 3.12's."""
    iterator = iter(items)
    while some := list(islice(iterator, n)):
        yield some


def name_of(i: int) -> str:
    return f"s3://corpus/recordings/{i % 997:03}/recording-{i:08}.opus"


def template(n_segments: int) -> pa.Table:
    """One Unit, of which every other is a copy under another name."""
    tokens = tuple(range(50_364, 50_364 + 24))
    step = UNIT / SAMPLE_RATE / n_segments
    segments = tuple(
        Segment(
            start=i * step, end=(i + 1) * step, text=SAID, tokens=tokens, avg_logprob=-0.25, compression_ratio=1.5,
            no_speech_prob=0.1, temperature=0.0, language="en", language_probability=0.9, words=(),
        )
        for i in range(n_segments)
    )  # fmt: skip
    unit = UnitResult(
        Recording("x", "x"), 0, False, start=0, n_samples=UNIT, segments=segments, language="en",
        language_probability=0.9, speech=UNIT // 2, uncovered_speech=0, n_windows=10,
    )  # fmt: skip
    return to_table([unit_row(unit)], UNITS)


def commit_all(uri: str, recordings: range, units: int, n_segments: int, n_shards: int) -> None:
    """The Units of `recordings` in the order in which a run would commit them: many recordings at once."""
    store, whole = Store.at(uri), pa.concat_tables([template(n_segments)] * UNITS_PER_OBJECT).combine_chunks()
    kind = UNITS.field("recording").type
    order = ((i, k) for some in batched(recordings, 64) for k in range(units) for i in some)
    for some in batched(order, UNITS_PER_OBJECT):
        n, names = len(some), [name_of(i) for i, _ in some]
        fields = {field.name: pa.nulls(n, field.type) for field in kind}
        fields |= {"id": pa.array(names), "uri": pa.array(names), "source": pa.array(["list.parquet"] * n)}
        fields |= {"size": pa.array([28_800_000] * n, pa.int64())}
        columns = {
            "recording_id": pa.array(names),
            "index": pa.array([k for _, k in some], pa.int32()),
            "is_last": pa.array([k == units - 1 for _, k in some]),
            "start": pa.array([k * UNIT for _, k in some], pa.int64()),
            "recording": pa.StructArray.from_arrays(list(fields.values()), fields=list(kind)),
        }
        table = whole.slice(0, n)
        for name, values in columns.items():
            table = table.set_column(UNITS.get_field_index(name), UNITS.field(name), values)
        commit(store, table, n_shards)


def make(uri: str, recordings: range, units: int, n_segments: int, n_shards: int) -> float:
    """Commit all of them, on all cores, and return the seconds it took."""
    began = time.monotonic()
    parts = [recordings[k :: 4 * usable_cores()] for k in range(4 * usable_cores())]
    with ProcessPoolExecutor(usable_cores()) as pool:
        for work in [pool.submit(commit_all, uri, part, units, n_segments, n_shards) for part in parts]:
            work.result()
    return time.monotonic() - began


def list_inputs(uri: str, n: int) -> None:
    write_inputs(Store.at(uri), (Recording(name_of(i), name_of(i), size=28_800_000) for i in range(n)))


# ---- a process and its children


def watched(uri: str, *, kill_at: str | None = None) -> dict[str, Any]:
    """`murmur finalize` to its end, or until a file of the table `kill_at` is there: then all of it is killed."""
    command = [sys.executable, "-m", "pipeline.cli", "finalize", uri, "--json"]
    began, peaks = time.monotonic(), {}
    cpu_s = 0.0
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
        while process.poll() is None:
            cpu_s = max(cpu_s, look(process.pid, peaks))
            if kill_at is not None and any(Path(uri, kill_at).glob("*.parquet")):
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                break
            time.sleep(0.5)
        said.seek(0)
        last = (said.read().splitlines() or [""])[-1]
    found = {"wall_s": round(time.monotonic() - began, 1), "cpu_s": round(cpu_s), "exit_code": process.returncode}
    found["peak_rss_mb"] = dict(sorted(peaks.items(), key=lambda pair: -pair[1])[:6])
    if kill_at is None and process.returncode != 0:
        raise RuntimeError(f"finalize ended with {process.returncode}: {last}")
    return found if kill_at else found | {"said": json.loads(last)}


def look(root: int, peaks: dict[str, int]) -> float:
    """Note the largest resident memory of each kind of process below `root`; their processor seconds so far."""
    ticks = 0
    for pid in session_of(root):
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            title = Path(f"/proc/{pid}/cmdline").read_text().split("\0")[0].rpartition("/")[2][:40]
        except OSError:
            continue
        name = "driver" if pid == root else title
        rss = [int(line.split()[1]) // 1024 for line in status.splitlines() if line.startswith("VmRSS")]
        peaks[name] = max([peaks.get(name, 0), *rss])
        ticks += sum(map(int, stat[11:15]))  # its own and those of children that ended
    return ticks / os.sysconf("SC_CLK_TCK")


def session_of(root: int) -> Iterable[int]:
    """The processes that descend from `root`; Ray's have sessions of their own, and the raylet stays their parent."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
    mine, before = {root}, 0
    while len(mine) > before:
        before = len(mine)
        mine |= {pid for pid, parent in parents.items() if parent in mine}
    return mine


def exact(uri: str, recordings: int, units: int, n_segments: int) -> bool:
    """Whether the tables hold every recording once, and all of each."""
    rows = ds.dataset(f"{uri}/recordings").to_table(["recording_id", "status", "n_segments", "duration_s"])
    segments = ds.dataset(f"{uri}/segments").count_rows()
    return bool(
        len(rows) == recordings == pc.count_distinct(rows["recording_id"]).as_py()
        and pc.all(pc.equal(rows["n_segments"], units * n_segments)).as_py()
        and pc.all(pc.equal(rows["duration_s"], units * UNIT / SAMPLE_RATE)).as_py()
        and segments == recordings * units * n_segments
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recordings", type=int, default=100_000)
    parser.add_argument("--units", type=int, default=12)
    parser.add_argument("--segments", type=int, default=3, help="of one Unit")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--keep", action="store_true", help="the output, to look at")
    parser.add_argument("--made", metavar="FOLDER", help="an output of these sizes that was made before")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    n, units, n_segments = arguments.recordings, arguments.units, arguments.segments
    n_shards = shards_for(n)
    if arguments.made:
        uri, made_s = arguments.made, None
    else:
        uri = tempfile.mkdtemp(prefix="finalise-scale-", dir=arguments.dir)
        config = load_config(overrides={"engine": "fake", "model": "demo"}, env={})
        open_output(
            uri, settings=config.model_dump(mode="json"), keys={"benchmark": True}, model="demo", model_revision=None,
            n_shards=n_shards,
        )  # fmt: skip
        made_s = round(make(uri, range(n), units, n_segments, n_shards))
        list_inputs(uri, n)
        print(f"made in {made_s} s: {uri}", file=sys.stderr)
    report: dict[str, Any] = {
        "benchmark": "finalise_scale", "recordings": n, "units": n * units, "segments": n * units * n_segments,
        "units_per_object": UNITS_PER_OBJECT, "shards": n_shards, "made_s": made_s,
    }  # fmt: skip
    report["killed"] = watched(uri, kill_at="recordings")
    report["again"] = watched(uri)
    report["exact"] = exact(uri, n, units, n_segments)
    more = n + n // 100
    make(uri, range(n, more), units, n_segments, n_shards)
    list_inputs(uri, more)
    report["grown"] = watched(uri)
    report["nothing"] = watched(uri)
    report["exact"] = report["exact"] and exact(uri, more, units, n_segments)
    report["machine"] = machine()
    if not arguments.keep:
        shutil.rmtree(uri)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))
    return 0 if report["exact"] else 1


if __name__ == "__main__":
    sys.exit(main())
