"""A whole job against an S3 server on bad days: refused and cut requests, wrong keys, and keys that expire half way.

The command is a process of its own: its workers inherit the store's address with the environment.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import fsspec
import pytest
from audio_files import tone, write_wav
from commands import FAKE, last_json, murmur
from s3_faults import Faults

from pipeline.errors import EXIT_FAILED, EXIT_OK, EXIT_USAGE
from pipeline.ledger import Ledger
from pipeline.output import read_output

N = 24


@pytest.fixture
def manifest(s3: str, tmp_path: Path) -> str:
    """`N` clips on S3, listed with ids in a manifest beside them."""
    fs = fsspec.filesystem("s3")
    lines = []
    for i in range(N):
        clip = write_wav(tmp_path / f"{i:02}.wav", tone(200 + 20 * i, 1.0 + i / 8))
        fs.put_file(str(clip), f"{s3}/audio/{i:02}.wav")
        lines.append(json.dumps({"audio_filepath": f"audio/{i:02}.wav", "id": f"{i:02}", "duration": 1.0 + i / 8}))
    fs.pipe_file(f"{s3}/list.jsonl", "\n".join(lines).encode())
    return f"{s3}/list.jsonl"


@pytest.mark.ray
def test_refused_and_cut_requests_cost_no_row(
    s3: str, s3_server: str, manifest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Faults(s3_server, refused=0.1, cut=0.02) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        done = murmur("transcribe", manifest, "--output", f"{s3}/out", *FAKE, "--json")
        assert done.returncode == EXIT_OK, done.stderr
        assert (last_json(done)["ok"], last_json(done)["missing"]) == (N, 0)
        assert proxy.seen["refused"] > 5
        assert proxy.seen["cut"] > 0


@pytest.mark.ray
def test_wrong_keys_and_keys_that_expire_mark_nothing(
    s3: str, s3_server: str, manifest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = ["transcribe", manifest, "--output", f"{s3}/out", *FAKE, "--json"]
    with Faults(s3_server, denied=True) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        refused = murmur(*job)
        assert refused.returncode == EXIT_USAGE  # it does not even get to the list
        assert "access refused" in refused.stderr

        proxy.denied, proxy.expires_after = False, proxy.seen["passed"] + 60
        expired = murmur(*job)
        assert expired.returncode == EXIT_FAILED, expired.stderr
        assert len([line for line in expired.stderr.splitlines() if line.startswith("murmur:")]) == 1
        assert proxy.seen["expired"]

        proxy.expires_after = None
        out = read_output(f"{s3}/out")
        statuses = Counter(Ledger.read(out.store, out.run.n_shards).recordings()["status"].to_pylist())
        assert set(statuses) <= {"ok", "partial"}
        assert statuses["ok"] < N  # half way
        done = murmur(*job)
        assert done.returncode == EXIT_OK, done.stderr
        assert (last_json(done)["ok"], last_json(done)["failed"]) == (N, 0)
