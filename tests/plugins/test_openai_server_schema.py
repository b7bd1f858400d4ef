"""schemathesis over the server's own OpenAPI document: whatever is sent, no 5xx, and answers are as the document says."""

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable

schemathesis = pytest.importorskip("schemathesis")
pytestmark = pytest.mark.slow
EXAMPLES = 40


@pytest.fixture(scope="module")
def server(start_server):
    small = ("engine.max_model_len=64", "plugins.openai_server.max_choices=4", "plugins.openai_server.stored_responses=5")
    return start_server(*(part for setting in small for part in ("--set", setting)))


def test_answers_are_as_the_document_says(server):
    """Half of what is sent follows the document, half breaks it."""
    document = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    names = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")
    checks = schemathesis.checks.CHECKS.get_by_names(names)
    paths = set()
    for operation in (found.ok() for found in document.get_all_operations()):
        paths.add(operation.path)
        for mode in schemathesis.GenerationMode:
            strategy = operation.as_strategy(generation_mode=mode)

            @settings(
                max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
            )
            @given(case=strategy)
            def send(case):
                case.call_and_validate(checks=checks, timeout=60)

            try:
                send()
            except Unsatisfiable:
                assert mode == schemathesis.GenerationMode.NEGATIVE  # it takes nothing that could be wrong
    assert len(paths) >= 12


def test_the_document_has_every_route_and_the_fields_of_plugins(server):
    found = httpx.get(f"{server.url}/openapi.json").json()
    expected = {"/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize", "/detokenize", "/health"}
    assert expected <= set(found["paths"]) and "presence_penalty" in found["components"]["schemas"]["ChatRequest"]["properties"]
    assert httpx.get(f"{server.url}/docs").status_code == 200
