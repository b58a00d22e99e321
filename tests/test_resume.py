"""kill -9 in the middle, and the same command again: complete, nothing twice, the tables as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
from audio_files import tone, write_wav
from commands import FAKE, command, last_json, murmur, tables

from pipeline import cli

LONG_S = 290.0  # ten Units of at most 30 s


def committed_units(output: Path) -> list[tuple[str, int]]:
    """(recording, index) of every Unit that every ledger object names."""
    said = (json.loads(path.read_text()) for path in (output / "_run" / "ledger").glob("*.json"))
    return [(unit["recording_id"], unit["index"]) for entry in said for unit in entry["units"]]


def start(job: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*job), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def kill_when(process: subprocess.Popen[str], output: Path, n_objects: int) -> None:
    """SIGKILL to the driver as soon as so many ledger objects exist; its cluster goes with it."""
    ledger = output / "_run" / "ledger"
    deadline = time.monotonic() + 150
    while len(list(ledger.glob("*.json"))) < n_objects:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "nothing was committed"
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.ray
def test_killed_in_the_middle_and_started_again(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    write_wav(folder / "long.wav", tone(333, LONG_S))
    for i in range(12):
        write_wav(folder / f"short-{i:02}.wav", tone(200 + 20 * i, 1.0 + i / 8))
    (folder / "damaged.wav").write_bytes(b"no audio" * 200)
    # Every Unit takes a while, so that the run is long enough to be killed in; the result is the same.
    slow = "fake.faults=[{kind: hang, text: '0.6'}]"
    settings = [*FAKE, "--set", "unit_length_s=30", "--set", "chunk_level=word", "--set", slow]
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"

    job = ["transcribe", str(folder), "--output", str(killed), *settings]
    with start(job) as process:
        kill_when(process, killed, n_objects=8)
    assert not (killed / "_SUCCESS").exists()
    before = committed_units(killed)
    assert 8 <= len(before) < 23  # in the middle, not at the end

    done = murmur(*job, "--json")
    assert done.returncode == 3, done.stderr  # the damaged one
    result = last_json(done)
    assert {key: result[key] for key in ("inputs", "ok", "failed", "missing")} == {
        "inputs": 14, "ok": 13, "failed": 1, "missing": 0,
    }  # fmt: skip
    # A worker that outlives the driver by a moment may commit what the second run does too; what was there, it may not.
    units = Counter(committed_units(killed))
    assert {unit: units[unit] for unit in before} == dict.fromkeys(before, 1), "work that was committed was done again"

    # These two on the session's cluster, which takes a third of the time.
    with pytest.raises(SystemExit, match="3"):
        cli.main(["transcribe", str(folder), "--output", str(undisturbed), *settings])
    assert tables(killed) == tables(undisturbed)
    assert sorted(units) == sorted(committed_units(undisturbed))

    with pytest.raises(SystemExit, match="3"):
        cli.main(job)
    assert "nothing was left to do" in capsys.readouterr().out
    assert Counter(committed_units(killed)) == units
