"""Requests that schemathesis makes of the description, and its verdicts on the answers."""

from __future__ import annotations

from contextlib import suppress

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


def sweep(url: str, mode: GenerationMode, n_examples: int) -> int:
    """So many requests to each operation; raises where an answer is a server's error or not as described. Returns the
    number of operations."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    for operation in operations:

        @settings(
            max_examples=n_examples, deadline=None, database=None, derandomize=True,
            suppress_health_check=list(HealthCheck), phases=[Phase.generate],
        )  # fmt: skip
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: Case) -> None:
            case.call_and_validate(base_url=url, checks=CHECKS, timeout=60)

        with suppress(Unsatisfiable):  # one without any field has no wrong request
            ask()
    return len(operations)
