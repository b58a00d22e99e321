"""What a whole run leaves to be read: a log line for each failure, in the driver and in the workers, and nothing that
does not belong there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from audio_files import tone, write_wav
from commands import FAKE, command, last_json, murmur

SECRET = "hunter2"


@pytest.fixture
def ray_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where Ray's own logs go; a short path, since there are sockets in it."""
    folder = Path(tempfile.mkdtemp(prefix="m-", dir="/tmp"))
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


class NotFound(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        return None


@pytest.fixture
def nowhere() -> Iterator[str]:
    """The address of a server that has no file."""
    with ThreadingHTTPServer(("127.0.0.1", 0), NotFound) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def json_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith('{"time"')]


@pytest.mark.ray
def test_logs_name_what_failed_and_hold_no_text_and_no_secret(tmp_path: Path, ray_folder: Path, nowhere: str) -> None:
    """One run in a process of its own, with a failure of each stage; ids that try to begin lines of their own."""
    lines: list[dict[str, Any]] = [{"audio_filepath": f"{i}.wav", "id": f"rec\nFATAL {i}"} for i in range(4)]
    for i in range(4):
        write_wav(tmp_path / f"{i}.wav", tone(200 + 40 * i, 2.0))
    (tmp_path / "junk.wav").write_bytes(b"no audio" * 100)
    lines.append({"audio_filepath": "junk.wav", "id": "junk"})
    lines.append({"audio_filepath": f"http://user:{SECRET}@{nowhere}/a.wav?X-Amz-Signature={SECRET}", "id": "far"})
    manifest, output = tmp_path / "m.jsonl", tmp_path / "out"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    faults = json.dumps([{"match": "rec*2", "stage": "engine", "kind": "nan"}])
    sets = ("--set", f"fake.faults={faults}", "--set", "log_format=json", "--set", "unit_length_s=30")
    done = murmur("transcribe", manifest, "--output", output, *FAKE, *sets, "--json")
    assert done.returncode == 3, done.stderr
    summary = last_json(done)
    assert summary["start_s"] > 0
    assert summary["finalize_s"] > 0

    rows = {row["recording_id"]: row for row in pq.read_table(output / "recordings").to_pylist()}
    failed = {id: row for id, row in rows.items() if row["status"] == "failed"}
    assert failed.keys() == {"rec\nFATAL 2", "junk", "far"}
    kept = "".join(path.read_text() for path in sorted((output / "_run" / "logs").iterdir()))
    for text in (done.stderr, kept):
        said = {line["recording"]: line for line in json_lines(text) if "kind" in line}
        assert said.keys() == failed.keys()
        for id, row in failed.items():
            told = (said[id]["kind"], said[id]["stage"], said[id]["attempts"])
            assert told == (row["error_kind"], row["error_stage"], row["attempts"])

    # The workers say why, and of which recording; Ray keeps their lines.
    workers = "".join(path.read_text(errors="replace") for path in ray_folder.rglob("worker-*") if path.is_file())
    reasons = {line["recording"]: line["message"] for line in json_lines(workers) if "recording" in line}
    assert reasons.keys() >= failed.keys()
    assert "non_finite" in reasons["rec\nFATAL 2"]

    everything = done.stdout + done.stderr + kept + workers
    everything += "".join(path.read_text() for path in (output / "_run" / "runs").iterdir())
    assert SECRET not in everything
    assert "\nFATAL" not in everything
    texts = [row["text"] for row in rows.values() if row["text"]]
    assert len(texts) == 3
    assert not [text for text in texts if text in everything]


@pytest.mark.ray
def test_a_run_on_a_terminal_shows_a_bar_and_lines_above_it(tmp_path: Path) -> None:
    """Through a real terminal: a line that is logged does not tear the bar, and the summary comes after it."""
    write_wav(tmp_path / "audio" / "a.wav", tone(300, 2.0))
    (tmp_path / "audio" / "junk.wav").write_bytes(b"no audio" * 100)
    shown = in_a_terminal(command("transcribe", tmp_path / "audio", "--output", tmp_path / "out", *FAKE))
    assert "recordings" in shown
    assert "2/2" in shown
    assert "failed: damaged_audio in decode, 1 attempt" in shown
    summary = shown[shown.rindex("2 recordings: 1 ok, 1 failed") :]
    assert "time: " in summary
    assert "every second of it" in " ".join(summary.split())
    assert "murmur retry" in summary


def in_a_terminal(arguments: list[str]) -> str:
    """Everything a command shows on a terminal of 200 columns, without colours and movements."""
    ours, its = os.openpty()
    environment = {**os.environ, "COLUMNS": "200", "TERM": "xterm"}
    with subprocess.Popen(arguments, stdin=its, stdout=its, stderr=its, env=environment) as process:
        os.close(its)
        shown = b""
        while True:
            try:
                some = os.read(ours, 65536)
            except OSError:  # the last one that had it open is gone
                break
            if not some:
                break
            shown += some
        process.wait()
    os.close(ours)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode(errors="replace"))
