"""schemathesis against the service's OpenAPI document: whatever is sent, no answer is a 5xx."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

from tests.scheduler import services

pytestmark = pytest.mark.slow

EXAMPLES = 6  # of each operation, positive and negative ones


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with services.client(tmp_path_factory.mktemp("openapi")) as found:
        # Something behind the names that are used below, so that what lies behind a 404 is reached too.
        assert found.post("/v1/trajectories", json={"run": "a", "location": "/a", "name": "a"}).status_code == 201
        record = {"step": 1, "location": "/a", "weights": "a" * 64, "files": {}}
        assert found.post("/v1/trajectories/a/checkpoints", json=record).status_code == 201
        assert found.put("/v1/runs/a", json={"steps": 100, "trajectory": "a"}).status_code == 201
        body = {"expected": 0, "effective": 0, "document": {"policy": "one_shot"}}
        assert found.put("/v1/runs/a/schedule", json=body).status_code == 201
        assert found.put("/v1/replicas/a", json={"group": "a", "endpoint": "grpc://a:1"}).status_code == 201
        found.headers.update(services.token(found.service.store, "admin"))
        found.service.authenticator.forget()
        yield found


def _token(client) -> dict[str, str]:
    return {"Authorization": client.headers["Authorization"]}


def operations(client):
    schema = schemathesis.openapi.from_asgi("/openapi.json", client.app, headers=_token(client))
    for result in schema.get_all_operations():
        operation = result.ok()
        if operation.path == "/v1/stream" or "/tokens" in operation.path:  # one never ends; the others would ask for tokens
            continue
        yield operation


def test_no_answer_is_a_server_error(client):
    asked = answered = 0
    for operation in operations(client):
        strategy = operation.as_strategy()

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=strategy)
        def check(case):
            nonlocal asked, answered
            for name in ("name", "reference", "id"):  # every second one at what there is
                if name in case.path_parameters and asked % 2:
                    case.path_parameters[name] = "a"
            asked += 1
            response = case.call(headers=_token(client))
            answered += response.status_code < 400
            assert response.status_code < 500, (case.as_curl_command(), response.text)

        check()
    assert asked >= 60
    assert answered >= 20


def test_the_document_names_every_answer_that_it_gives(client):
    document = client.app.openapi()
    assert document["components"]["securitySchemes"]
    for path, item in document["paths"].items():
        for method, operation in item.items():
            assert {"401", "403", "413", "422"} <= operation["responses"].keys(), (method, path)
            if path != "/health":
                assert operation["security"], (method, path)
