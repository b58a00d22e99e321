"""The suite itself: its tests are spread over processes as `conftest.py` wants."""

from __future__ import annotations

import os

import pytest


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="run in one process")
def test_tests_are_grouped(request: pytest.FixtureRequest) -> None:
    """Or each test would go to whichever process is free: two Ray clusters, and every file's fixtures made twice."""
    assert request.node.nodeid.endswith("@tests/test_suite.py")
