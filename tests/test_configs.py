"""Every file that is shipped in `configs/` loads, and says what it is for."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import load_config
from pipeline.pools import Node, size_pools

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
# Where each is meant to run.
MACHINES = {
    "local.yaml": [Node(4)],
    "single-gpu.yaml": [Node(16, 1)],
    "cluster.yaml": [Node(4), Node(32, 8), Node(32, 8), Node(64)],
}


def test_each_file_has_a_machine() -> None:
    others = {"serve.yaml", "runtime_env.yaml"}  # other programs' formats, tested with these
    assert {path.name for path in CONFIGS.glob("*.yaml")} - others == MACHINES.keys()


@pytest.mark.parametrize("name", MACHINES)
def test_it_loads_and_its_pools_fit(name: str) -> None:
    config = load_config(CONFIGS / name, env={})
    nodes = MACHINES[name]
    pools = size_pools(nodes, config)
    assert pools.engines * pools.engine_gpus == sum(node.gpus for node in nodes)
    assert pools.engines * pools.engine_cpus + pools.decode_tasks <= sum(node.cpus for node in nodes)
    assert (CONFIGS / name).read_text().startswith("# ")
