"""Tests that need a CUDA device: `pytest -m gpu tests/gpu`. Without one they are skipped, or with
MURMUR_FAIL_WITHOUT_GPU=1, for a machine that should have one, they fail."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(autouse=True)
def _needs_a_gpu() -> None:
    if torch.cuda.is_available():
        return
    if os.environ.get("MURMUR_FAIL_WITHOUT_GPU") == "1":
        pytest.fail("torch finds no CUDA device, and MURMUR_FAIL_WITHOUT_GPU=1 forbids skipping")
    pytest.skip("torch finds no CUDA device")
