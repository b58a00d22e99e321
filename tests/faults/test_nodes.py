"""A cluster of two nodes, one of them lost without warning in the middle (F36): equal tables, and nobody accused."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from audio_files import tone, write_wav
from commands import FAKE, last_json, murmur, tables
from processes import start
from ray.cluster_utils import Cluster

N = 30
SLOW = "fake.faults=[{kind: hang, text: '0.5'}]"  # every Unit takes a while; the result is the same


NODE = {"num_cpus": 3, "object_store_memory": 200 << 20}


def head_and_second() -> tuple[Cluster, Any]:
    """A cluster of processes of its own, and its second node. Not the session's: this one is broken.

    At the machine's own address: Ray takes 127.0.0.1 for that in who joins, and then finds nobody there.
    """
    quick = {"health_check_period_ms": 500, "health_check_failure_threshold": 4}
    head = NODE | {"include_dashboard": False, "_system_config": quick}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    return cluster, cluster.add_node(**NODE)


@pytest.fixture
def two_nodes() -> Iterator[tuple[Cluster, Any]]:
    cluster, second = head_and_second()
    yield cluster, second
    cluster.shutdown()


@pytest.mark.ray
def test_a_node_is_lost_without_warning(two_nodes: tuple[Cluster, Any], tmp_path: Path) -> None:
    cluster, second = two_nodes
    for i in range(N):
        write_wav(tmp_path / "in" / f"{i:02}.wav", tone(150 + 10 * i, 35.0 if i % 10 == 0 else 1.0 + 0.1 * (i % 7)))
    settings = [*FAKE, "--set", SLOW, "--set", "unit_length_s=30", "--set", f"ray.address={cluster.address}"]
    settings += ["--set", "pool.engines=2", "--set", "pool.engine_cpus=2", "--set", "pool.calls_per_engine=2"]
    output, ledger = tmp_path / "out", tmp_path / "out" / "_run" / "ledger"

    with start("transcribe", tmp_path / "in", "--output", output, "--json", *settings) as driver:
        deadline = time.monotonic() + 120
        while len(list(ledger.glob("*.json"))) < 5:
            assert driver.poll() is None, driver.communicate()[1]
            assert time.monotonic() < deadline, "nothing was committed"
            time.sleep(0.05)
        cluster.remove_node(second, allow_graceful=False)
        out, err = driver.communicate(timeout=200)
    assert driver.returncode == 0, err
    assert (json.loads(out.splitlines()[-1])["ok"], json.loads(out.splitlines()[-1])["failed"]) == (N, 0)

    again = murmur("transcribe", tmp_path / "in", "--output", tmp_path / "calm", "--json", *settings)
    assert last_json(again)["ok"] == N
    assert tables(output) == tables(tmp_path / "calm")
