"""Pool sizes from the nodes: nothing that is asked for may be more than there is, or the run waits for ever."""

from __future__ import annotations

import pytest

from pipeline.config import load_config
from pipeline.engine import floors
from pipeline.engine.model import Dims
from pipeline.engine.random_checkpoint import SIZES
from pipeline.errors import ConfigError
from pipeline.pools import DERIVED_GPU_RTFX_NOT_MEASURED, Node, gpu_rtfx, size_pools

LAPTOP = [Node(4)]
CLUSTERS = [
    [Node(1)],
    [Node(2)],
    LAPTOP,
    [Node(8)],
    [Node(64)],
    [Node(2)] * 3,
    [Node(0), Node(16)],  # a head without CPUs
    [Node(1, 1)],  # as many GPUs as CPUs
    [Node(8, 1)],
    [Node(4), *[Node(32, 8)] * 2],
]


@pytest.mark.parametrize("nodes", CLUSTERS, ids=str)
@pytest.mark.parametrize("engine", ["local", "fake"])
def test_the_pools_fit_the_cluster(nodes: list[Node], engine: str) -> None:
    pools = size_pools(nodes, load_config(sets=[f"engine={engine}"], env={}))
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    assert pools.engines * pools.engine_cpus + pools.decode_tasks * pools.decode_cpus <= cpus
    assert pools.engines * pools.engine_gpus <= gpus
    assert any(node.cpus >= pools.engine_cpus and node.gpus >= pools.engine_gpus for node in nodes)
    assert min(pools.engines, pools.decode_tasks, pools.units_per_call or 1, pools.calls_per_engine) >= 1


def test_engines_go_to_the_gpus() -> None:
    pools = size_pools([Node(4), *[Node(32, 8)] * 2], load_config(env={}))
    assert (pools.engines, pools.engine_gpus, pools.threads) == (16, 1.0, None)
    assert pools.decode_tasks == 68 - 16
    assert size_pools([Node(32, 8)], load_config(sets=["device=cpu"], env={})).engine_gpus == 0
    assert size_pools([Node(32, 8)], load_config(sets=["engine=fake"], env={})).engine_gpus == 0


def test_a_cpu_engine_has_threads_and_takes_a_block_a_call() -> None:
    pools = size_pools(LAPTOP, load_config(env={}))
    assert (pools.engines, pools.threads, pools.units_per_call, pools.decode_tasks) == (1, 2, None, 2)


def test_two_hours_of_audio_are_never_batched() -> None:
    pools = size_pools([Node(8, 1)], load_config(sets=["algorithm=sequential"], env={}))
    assert (pools.units_per_call, pools.block_mb) == (1, 1)


def test_a_gpu_that_is_asked_for_must_be_there() -> None:
    with pytest.raises(ConfigError, match="no GPU"):
        size_pools(LAPTOP, load_config(sets=["device=cuda"], env={}))
    will_scale_up = load_config(sets=["device=cuda", "pool.engines=4"], env={})
    assert size_pools(LAPTOP, will_scale_up).engines == 4


@pytest.mark.parametrize(("nodes", "lanes"), [(LAPTOP, 16), ([Node(16, 1)], 256)])
def test_clips_of_thirty_seconds_fill_the_lanes(nodes: list[Node], lanes: int) -> None:
    pools = size_pools(nodes, load_config(env={}))
    clips_per_call = max(1, 32 * pools.block_mb // 30)
    assert pools.calls_per_engine * clips_per_call >= 1.5 * lanes


def test_the_limit_is_told_for_gpus() -> None:
    """15 CPU beside one GPU: too few for whisper-tiny, enough for the large ones, for base it depends on the files."""
    pools = size_pools([Node(16, 1)], load_config(env={}))
    assert size_pools(LAPTOP, load_config(env={})).limit("openai/whisper-base") is None
    assert str(pools.limit("openai/whisper-base")).startswith("the limit: either side.")
    assert str(pools.limit("/a/turbo/large-v3")).startswith("the limit: the engines.")
    assert pools.limit("my-tiny") == (
        "the limit: decoding on the CPUs. 15 CPU prepare 5,100 (mp3) to 16,000 (flac) times real time, "
        "1 engine takes about 30,000 (derived, not measured): as much as 29 to 87 CPU prepare"
    )


def test_what_a_gpu_is_taken_to_do_is_derived_from_the_floors() -> None:
    full = {"large": "large-v3", "turbo": "large-v3-turbo", "distil-large": "distil-large-v3"}
    for name, rate in DERIVED_GPU_RTFX_NOT_MEASURED.items():
        shape = SIZES[full.get(name, name)]
        width, layers = shape.width, (shape.encoder_layers, shape.decoder_layers)
        dims = Dims(
            n_mels=shape.n_mels, n_audio_ctx=1500, n_audio_layer=layers[0], n_text_ctx=448, n_text_layer=layers[1],
            n_state=width, n_audio_head=shape.heads, n_text_head=shape.heads, n_vocab=shape.n_vocab,
            n_audio_mlp=4 * width, n_text_mlp=4 * width,
        )  # fmt: skip
        costs = floors.per_window(dims, lanes=256, tokens=100, batch=32, itemsize=2)
        assert rate == pytest.approx(floors.ceiling_rtfx(costs, floors.DATASHEET["H200"]) / 4, rel=0.02), name
        assert gpu_rtfx(f"openai/whisper-{name}") == rate


def test_settings_win_over_rules() -> None:
    sets = [f"pool.{key}=3" for key in ("decode_tasks", "engines", "engine_cpus", "units_per_call", "calls_per_engine")]
    pools = size_pools(LAPTOP, load_config(sets=sets, env={}))
    given = (pools.decode_tasks, pools.engines, pools.engine_cpus, pools.units_per_call, pools.calls_per_engine)
    assert given == (3, 3, 3.0, 3, 3)
    assert pools.describe() == "3 engines on 3 CPU each (3 calls in flight of 3 Units), decoding on 3 CPU"
