"""What would cost the server more than it costs who sends it: values, names, fields; audio that is read for ever."""

from __future__ import annotations

import pytest
import requests
from application import EN_FIVE, ROUTE, Serve


@pytest.mark.parametrize("name", [" x", "x ", "", "x" * 59 + " y", "\t", "\r\nSet-Cookie: a=b"])
def test_names_that_no_header_can_hold(serve: Serve, name: str) -> None:
    """P20: the header that names what was ignored can always be sent."""
    url = f"{serve().url}{ROUTE}"
    response = requests.post(url, files={"audio": EN_FIVE}, params={"a": "1", name: "1"}, timeout=30)
    assert response.status_code == 200
    assert response.headers["Murmur-Ignored"].startswith("a, ")
    assert "Set-Cookie" not in response.headers
