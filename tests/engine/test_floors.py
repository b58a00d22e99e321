"""The floors against what torch counts and what the caches really weigh."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from whisper.model import disable_sdpa

from pipeline.demo.train.convert import to_openai
from pipeline.engine import floors
from pipeline.engine.floors import Cost, Peak, datasheet_peak
from pipeline.engine.model import WhisperModel
from pipeline.engine.random_checkpoint import Shape, write_random_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("floors"), Shape(64, 2, 2, 3))


def test_the_operations_are_those_that_torch_counts(checkpoint: Path) -> None:
    """One token in the reference's decoder without a cache: a step, the audio's keys and values, the vocabulary."""
    model, dims = to_openai(checkpoint), WhisperModel(checkpoint, torch.device("cpu"), torch.float32).dims
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(), disable_sdpa(), counter:
        model.decoder(torch.tensor([[1]]), torch.zeros(1, 1500, 64))
    parts = floors.step(dims, 1, 1, 4), floors.cross_keys_and_values(dims, 1, 4), floors.vocabulary(dims, 1, 4)
    assert sum(part.flop for part in parts) == counter.get_total_flops()


def test_a_lane_more_reads_a_lane_more(checkpoint: Path) -> None:
    """And weights are read once, however many lanes there are."""
    model = WhisperModel(checkpoint, torch.device("cpu"), torch.float32)
    bytes_of = [floors.step(model.dims, lanes, 448, 4).bytes for lanes in (0, 1, 2)]
    assert bytes_of[2] - bytes_of[1] == bytes_of[1] - bytes_of[0] == model.lane_bytes()
    biases_and_norms = 3 * 64 * (3 + 1 + 1 + 1 + 4 + 1 + 6)  # left out: a thousandth of a real model
    decoder = sum(t.numel() for n, t in to_openai(checkpoint).decoder.named_parameters() if n.startswith("blocks"))
    keys_and_values_of_audio = 3 * 2 * 64 * 64
    assert bytes_of[0] == pytest.approx(4 * (decoder - keys_and_values_of_audio - biases_and_norms), rel=0.01)


def test_the_larger_of_the_two_is_the_floor() -> None:
    peak, cost = Peak(flop_per_s=100.0, bytes_per_s=10.0), Cost(flop=50.0, bytes=20.0)
    assert (peak.seconds(cost), peak.limit(cost)) == (2.0, "bytes")
    assert (peak.seconds(cost * 0.5), peak.limit(Cost(50.0, 1.0))) == (1.0, "operations")
    found = floors.shares({"step": cost, "encoder": cost}, peak, {"step": 4.0})
    assert found == {"step": {"floor_s": 2.0, "limit": "bytes", "measured_s": 4.0, "share_of_floor": 0.5}}
    assert floors.ceiling_rtfx({"a": cost, "b": cost}, peak) == 30 / 4


@pytest.mark.parametrize(
    ("name", "terabytes"),
    [("NVIDIA H200", 4.8), ("NVIDIA H100 80GB HBM3", 3.35), ("NVIDIA H100 PCIe", 2.0), ("NVIDIA L40S", 0.864),
     ("NVIDIA L4", 0.3), ("NVIDIA A100-SXM4-80GB", 2.04)],
)  # fmt: skip
def test_a_device_is_known_by_its_name(name: str, terabytes: float) -> None:
    peak = datasheet_peak(name)
    assert peak is not None
    assert peak.bytes_per_s == terabytes * 1e12
    assert datasheet_peak("cpu") is None
