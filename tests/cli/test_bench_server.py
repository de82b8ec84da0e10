"""Loads on a server, whose clients' times are known here."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx2 as httpx
import pytest

from conflayers_cli.bench.server_load import ServerLoad, measure_server
from conflayers_cli.bench.server_schema import Percentiles, ServerBenchDocument
from conflayers_cli.errors import ConfLayersError
from conflayers_cli.generation.prompts import Prompt
from tests.cli.conftest import Run

PROMPTS = [Prompt("a", text="Why?"), Prompt("b", text="How?")]
Answer = Callable[[dict[str, Any]], tuple[int, list[Any]]]


def stream(body: dict[str, Any]) -> tuple[int, list[Any]]:
    """Two chunks of text, the usage of five tokens."""
    details = {"accepted_prediction_tokens": 3, "rejected_prediction_tokens": 1}
    usage = {"prompt_tokens": 7, "completion_tokens": 5, "completion_tokens_details": details}
    chunks = [{"choices": [{"delta": {"content": text}}]} for text in ("", "one", "two")]
    return 200, [*chunks, {"choices": [], "usage": usage}]


@pytest.fixture
def answer_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[Answer], list[Any]]:
    """Has a server answer; returns what it is asked."""
    client = httpx.AsyncClient

    def use(answer: Answer) -> list[Any]:
        asked: list[Any] = []

        def handle(request: Any) -> Any:
            if request.url.path == "/v1/models":
                return httpx.Response(200, json={"data": [{"id": "m"}]})
            asked.append((request.headers.get("authorization"), json.loads(request.content)))
            status, events = answer(asked[-1][1])
            lines = [f"data: {json.dumps(event)}\n\n" for event in events]
            return httpx.Response(status, text="".join([*lines, "data: [DONE]\n\n"]))

        transport = httpx.MockTransport(handle)
        monkeypatch.setattr(
            httpx, "AsyncClient", lambda **more: client(transport=transport, **more)
        )
        return asked

    return use


def measured(**more: Any) -> ServerBenchDocument:
    load = ServerLoad("http://server:1/v1", PROMPTS, **{"requests": 4, **more})
    return measure_server(load, lambda what, share: None)


def test_loads_of_both_kinds(answer_with: Callable[[Answer], list[Any]]) -> None:
    asked = answer_with(stream)

    document = measured(clients=(1, 3), rates=(1000.0,), key="secret", max_new_tokens=9)

    assert [(load.clients, load.rate) for load in document.loads] == [
        (1, None),
        (3, None),
        (None, 1000.0),
    ]
    assert len(asked) == 12 and {key for key, _ in asked} == {"Bearer secret"}
    assert {body["max_tokens"] for _, body in asked} == {9}
    assert {body["messages"][0]["content"] for _, body in asked} == {"Why?", "How?"}
    for load in document.loads:
        assert (load.requests, load.failed, load.tokens, load.prompt_tokens) == (4, 0, 20, 28)
        assert (load.accepted, load.rejected, load.acceptance_rate) == (12, 4, 0.75)
        assert load.tokens_per_second == pytest.approx(20 / load.seconds)
    assert "secret" not in json.dumps(document.as_json())
    assert ServerBenchDocument.model_validate(document.as_json()) == document


def test_failures_are_counted_by_kind(answer_with: Callable[[Answer], list[Any]]) -> None:
    answers = iter([(429, []), (200, [{"error": {}}]), (200, []), stream({})])
    answer_with(lambda body: next(answers))

    (load,) = measured().loads

    assert load.failed == 3
    assert load.errors == {"status 429": 1, "an error in the stream": 1, "an empty answer": 1}
    answer_with(lambda body: (500, []))
    with pytest.raises(ConfLayersError, match="status 500"):
        measured()


def test_percentiles_are_of_the_nearest_rank() -> None:
    figures = Percentiles.of([each / 100 for each in range(100, 0, -1)])
    assert (figures.p50, figures.p95, figures.p99, figures.max) == (0.5, 0.95, 0.99, 1.0)
    assert Percentiles.of([]).p50 is None


def test_the_command(answer_with: Callable[[Answer], list[Any]], run: Run) -> None:
    asked = answer_with(stream)
    command = ("bench", "--server", "http://server:1", "--clients", 2, "--max-prompts", 3)

    table = run(*command)
    document = run(*command, "--json", "-o", "load.json").document

    assert table.code == 0 and "2 clients" in table.out and "75.0%" in table.out
    assert document["kind"] == "server-load" and document["loads"][0]["requests"] == 3
    assert len(asked) == 6
    for wrong in (("--batch-size", 2), ("--model", "x"), ("--top-k", 3)):
        assert run(*command, *wrong).code == 2
    assert run("bench", "--clients", 2, "--model", "x").code == 2
