"""Sources that refuse, under the job on a real Ray: tried last once more; a store that refuses all stops the run."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from audio_files import tone, write_wav
from rich.console import Console

from pipeline import job
from pipeline.census import IN_A_ROW
from pipeline.config import Config
from pipeline.errors import EXIT_FAILED, EXIT_OK, StoreError
from pipeline.ledger import Ledger
from pipeline.output import read_output

N = IN_A_ROW + 10  # unless a test says otherwise


class Host:
    """A web server of a folder: `refuse(path, n-th request for it)` gives the status to answer with instead."""

    def __init__(self, folder: Path) -> None:
        self.refuse: Callable[[str, int], int | None] = lambda path, n: None
        self.asked: Counter[str] = Counter()
        host = self

        class Handler(SimpleHTTPRequestHandler):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args, directory=str(folder))

            def send_head(self) -> Any:
                host.asked[self.path] += 1
                status = host.refuse(self.path, host.asked[self.path])
                if status is None:
                    return super().send_head()
                self.send_error(status)
                return None

            def log_message(self, format: str, *args: Any) -> None:
                return None

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def n() -> int:
    return N


@pytest.fixture
def host(tmp_path: Path, n: int) -> Iterator[Host]:
    for i in range(n):
        write_wav(tmp_path / "web" / f"{i:03}.wav", tone(150 + 5 * i, 1.0))
    host = Host(tmp_path / "web")
    yield host
    host.close()


@pytest.fixture
def run(tmp_path: Path, host: Host, n: int, fake_config: Callable[..., Config]) -> Callable[[], Any]:
    manifest = tmp_path / "list.jsonl"
    lines = ({"audio_filepath": f"{host.address}/{i:03}.wav", "id": f"{i:03}", "duration": 1.0} for i in range(n))
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def start() -> Any:
        with open(tmp_path / "said.txt", "a") as said:
            return job.run([str(manifest)], str(tmp_path / "out"), fake_config(vad="none"), console=Console(file=said))

    return start


def statuses(tmp_path: Path) -> Counter[str]:
    out = read_output(str(tmp_path / "out"))
    return Counter(Ledger.read(out.store, out.run.n_shards).recordings()["status"].to_pylist())


# Enough for a whole block that is refused before the first five have been read, and counts for nothing then.
@pytest.mark.ray
@pytest.mark.parametrize("n", [2 * IN_A_ROW + 5])
def test_a_store_that_refuses_everything_stops_the_run_and_nothing_is_marked(
    ray_cluster: None, host: Host, run: Callable[[], Any], n: int, tmp_path: Path
) -> None:
    """As when credentials expire half way: some are done, the rest is refused; later the same command goes on."""
    host.refuse = lambda path, n: 403 if path >= "/005" else None
    with pytest.raises(StoreError, match=f"refuses: more than {IN_A_ROW} recordings in a row.*access refused"):
        run()
    assert set(statuses(tmp_path)) <= {"ok"}
    host.refuse = lambda path, n: None
    summary = run()
    assert (summary.exit_code, summary.counts["ok"], summary.counts["failed"]) == (EXIT_OK, n, 0)


@pytest.mark.ray
def test_what_could_not_be_read_is_tried_last_before_it_is_failed(
    ray_cluster: None, host: Host, run: Callable[[], Any], tmp_path: Path
) -> None:
    """Ten that are refused all the time and ten that are refused until all others are done."""

    def refuse(path: str, n: int) -> int | None:
        others_done = sum(host.asked[f"/{i:03}.wav"] > 0 for i in range(20, N)) == N - 20
        return 403 if path < "/010" or (path < "/020" and not others_done) else None

    host.refuse = refuse
    summary = run()
    assert (summary.exit_code, summary.counts["ok"], summary.counts["failed"]) == (EXIT_FAILED, N - 10, 10)
    found = pa.concat_tables(map(pq.read_table, (tmp_path / "out" / "recordings").glob("*.parquet"))).to_pylist()
    failed = {row["recording_id"]: row["error_kind"] for row in found if row["status"] == "failed"}
    assert failed == {f"{i:03}": "forbidden" for i in range(10)}


@pytest.mark.ray
def test_a_store_that_goes_down_for_good_is_seen_before_anything_is_called_failed(
    ray_cluster: None, host: Host, run: Callable[[], Any], tmp_path: Path
) -> None:
    """Fewer than stop a run, but what it gave before it gives no more."""

    def refuse(path: str, n: int) -> int | None:
        is_down = all(host.asked[f"/{i:03}.wav"] for i in range(30, N))
        return 403 if path >= "/030" or is_down else None

    host.refuse = refuse
    with pytest.raises(StoreError, match="refuses what it gave before"):
        run()
    assert set(statuses(tmp_path)) == {"ok"}
