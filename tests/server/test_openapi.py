"""The published description is true: whatever fits it, or does not, is answered as it says, and never by a 5xx."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest

from mope_bb.config import ServerConfig
from mope_bb.keys import Key
from mope_bb.server.app import Surroundings
from mope_bb.server.openapi import describe_api
from mope_bb.zoo.serving import ZooServer
from tests.server.serving import Served, served

CHECKS = (
    *("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_headers_conformance"),
    *("response_schema_conformance", "negative_data_rejection", "missing_required_header", "unsupported_method"),
    *("allow_header_conformance", "ignored_auth"),
)
"""All but those of times, of resources that are created (there are none), and one by which whatever fits the
description must be accepted: not every text is a preference."""
KEY = "the key of this description"


@pytest.fixture(scope="module")
def small_answers(nano_experts: ZooServer) -> Iterator[Served]:
    """The real zoo, where answers are short."""
    settings = ServerConfig(max_tokens=3, default_max_tokens=2, max_n=2)
    with served(nano_experts.config(), Surroundings(settings, Key(KEY))) as server:
        yield server


@pytest.mark.slow
def test_schemathesis(small_answers: Served, tmp_path: Path) -> None:
    """Requests made from the description, right ones and wrong ones: no 5xx, and no answer that is not described."""
    program = Path(sys.executable).with_name("schemathesis")
    run = subprocess.run(
        [
            *(program, "run", f"{small_answers.url}/openapi.json", "-H", f"Authorization: Bearer {KEY}"),
            *("--checks", ",".join(CHECKS)),
            *("--max-examples", "30", "--generation-deterministic", "--no-shrink", "--continue-on-failure"),
            *("--request-timeout", "60", "--no-color"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-6000:]
    # It does not ask for the description itself again.
    assert f"Tested: {len(describe_api(has_key=True)['paths']) - 1}" in run.stdout, run.stdout


def test_every_route_is_described(zoo_server: Served) -> None:
    """And every described one exists."""
    document = zoo_server.get("/openapi.json").json()
    assert document == describe_api(has_key=False)
    for path, operations in document["paths"].items():
        for method in operations:
            filled = path.format(answer_id="x", name="app.js", model="mope:concise")
            response = zoo_server.get(filled) if method == "get" else zoo_server.post(filled, {})
            assert response.status_code != 405
            assert str(response.status_code) in operations[method]["responses"]


def test_replies_are_as_described(small_answers: Served) -> None:
    """A whole reply with all that can be asked for fits its schema, and has no field more."""
    document = describe_api(has_key=True)
    schema = {"$ref": "#/components/schemas/ChatReply", "components": document["components"]}
    body = {
        "model": "mope",
        "messages": [{"role": "user", "content": "Hi"}],
        "logprobs": True,
        "top_logprobs": 2,
        "trace": "experts",
        "n": 2,
    }
    reply = small_answers.post("/v1/chat/completions", body, headers={"authorization": f"Bearer {KEY}"}).json()
    jsonschema.Draft202012Validator(schema).validate(reply)
    assert set(reply) == set(document["components"]["schemas"]["ChatReply"]["properties"])
