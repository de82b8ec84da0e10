"""What is refused, and how that is said."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from conflayers_cli.errors import InputError
from conflayers_cli.server.bodies import Bodies
from tests.server.conftest import CONTEXT, GREEDY, Served, alone

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Why?"}]
IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]


def error_of(response: Any) -> dict[str, Any]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and error["message"]
    return dict(error)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"audio": {}}, "audio"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"n": True}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": CONTEXT}, "max_tokens"),
        ({"seed": 0.5}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"logit_bias": {"a": 1}}, "logit_bias.a"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"top_logprobs": 3}, None),
        ({"stream_options": {"include_usage": True}}, None),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0"),
        ({"messages": [{"role": "god", "content": "x"}]}, "messages.0.role"),
        ({"messages": IMAGE}, "messages.0.content.0.type"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "messages"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        ({"prediction": {"type": "content"}}, "prediction.content"),
    ],
)
def test_what_is_not_done_is_refused_by_name(
    served: Served, body: dict[str, Any], param: str | None
) -> None:
    response = served.client.post(CHAT, json={"messages": MESSAGES, **body})

    error = error_of(response)
    assert response.status_code == 400
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"messages": NaN}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"messages": "x", "messages": 1e999}',
    ],
)
def test_broken_json_is_refused(served: Served, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    response = served.client.post(CHAT, content=body, headers=headers)

    assert response.status_code == 400
    error_of(response)


def test_what_asks_for_what_is_done_anyway_is_taken(served: Served) -> None:
    more = {
        "user": "me",
        "store": False,
        "response_format": {"type": "text"},
        "tool_choice": "none",
        "parallel_tool_calls": True,
        "presence_penalty": 0,
        "logit_bias": {},
        "modalities": ["text"],
        "top_k": -1,
        "stop": None,
        "max_completion_tokens": 12,
    }
    assert served.answer("Why?", **more) == alone("Why?").text


def test_models_are_named_and_others_are_not_found(served: Served) -> None:
    (model,) = served.client.get("/v1/models").json()["data"]

    assert model["id"] == "tiny"
    assert served.client.get("/v1/models/tiny").json() == model
    assert served.client.get("/v1/models/models/tiny").json() == model
    assert served.answer("Why?", model="tiny") == served.answer("Why?", model="models/tiny")
    for response in (served.chat("Why?", model="gpt-5"), served.client.get("/v1/models/gpt-5")):
        assert response.status_code == 404
        assert error_of(response)["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("GET", CHAT, 405), ("DELETE", "/v1/models", 405)],
)
def test_unknown_paths_and_methods(served: Served, method: str, path: str, status: int) -> None:
    response = served.client.request(method, path)

    assert response.status_code == status
    error_of(response)


def test_pages_of_other_sites_get_nothing(served: Served) -> None:
    body = '{"messages": [{"role": "user", "content": "Why?"}]}'
    plain = served.client.post(CHAT, content=body, headers={"Content-Type": "text/plain"})
    rebound = served.client.get("/v1/models", headers={"Host": "evil.example"})
    foreign = served.client.get("/v1/models", headers={"Origin": "https://evil.example"})

    assert (plain.status_code, rebound.status_code) == (415, 400)
    assert "access-control-allow-origin" not in foreign.headers


def test_a_site_that_is_allowed_may_ask(serve: Callable[..., Served]) -> None:
    served = serve(cors_origins=["https://mine.example"])
    headers = {"Origin": "https://mine.example", "Access-Control-Request-Method": "POST"}

    response = served.client.options(CHAT, headers=headers)

    assert response.headers["access-control-allow-origin"] == "https://mine.example"


def test_large_bodies_and_outputs_are_refused(serve: Callable[..., Served]) -> None:
    served = serve(max_body=1000, max_new_tokens=10)

    large, long = served.chat("x" * 1000), served.chat("Why?", max_tokens=11)

    assert (large.status_code, error_of(large)["code"]) == (413, "too_large")
    assert (long.status_code, error_of(long)["code"]) == (400, "max_tokens_exceeded")
    assert len(served.answer("Why?", max_tokens=None)) <= 10


def test_keys_are_asked_for_and_share_nothing(serve: Callable[..., Served], tmp_path: Path) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text("# two\nfirst-key\n\nsecond-key\n")
    served = serve(api_keys=keys, drafts=False)

    def ask(key: str | None) -> Any:
        headers = {"Authorization": f"Bearer {key}".encode("latin-1")} if key else {}
        body = {"messages": [{"role": "user", "content": "a" * 100}], "max_tokens": 2}
        return served.client.post(CHAT, json=body, headers=headers)

    def cached(key: str) -> int:
        return int(ask(key).json()["usage"]["prompt_tokens_details"]["cached_tokens"])

    for wrong in (None, "first", "first-key2", "ä"):
        response = ask(wrong)
        assert (response.status_code, error_of(response)["code"]) == (401, "invalid_api_key")
    assert served.client.get("/v1/models").status_code == 401
    assert served.client.get("/metrics").status_code == 401
    assert served.client.get("/health").status_code == 200
    assert [cached("first-key"), cached("second-key")] == [0, 0]
    assert cached("first-key") > 90


@pytest.mark.parametrize("text", ["", "# nothing\n", "short\n"])
def test_key_files_without_a_key(serve: Callable[..., Served], tmp_path: Path, text: str) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text(text)
    with pytest.raises(InputError, match=r"keys\.txt"):
        serve(api_keys=keys)


def test_the_document_says_what_is_taken(served: Served) -> None:
    document = served.client.get("/openapi.json").json()

    assert set(document["paths"]) >= {CHAT, "/v1/completions", "/v1/models", "/health"}
    fields = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"messages", "temperature", "prediction", "logit_bias"} <= set(fields)


def test_figures_for_prometheus(serve: Callable[..., Served]) -> None:
    served = serve()
    served.answer("abcabcabc", max_tokens=30)
    text = served.client.get("/metrics").text

    assert "conflayers_generated_tokens_total 30.0" in text
    assert 'conflayers_texts_total{reason="length"} 1.0' in text
    assert "conflayers_running_texts 0.0" in text
    assert 'conflayers_requests_total{path="/v1/chat/completions",status="200"} 1.0' in text
    assert "abc" not in text


def test_the_page_is_there_and_asks_nobody_else(served: Served) -> None:
    page = served.client.get("/")
    script = served.client.get("/page/chat.js")

    assert page.status_code == script.status_code == 200
    assert "http://" not in page.text + script.text and "https://" not in page.text + script.text
    assert "default-src 'self'" in page.headers["content-security-policy"]


@pytest.mark.parametrize("name", ["chat_template", "tokenizer_kwargs", "padding", "tokenize"])
def test_a_client_brings_no_template_of_its_own(served: Served, name: str) -> None:
    response = served.chat("a", chat_template_kwargs={name: "{{ 9**9 }}"})
    assert response.status_code == 400 and name in response.json()["error"]["message"]


def test_the_first_fault_of_a_large_list_is_enough(served: Served) -> None:
    response = served.client.post("/v1/completions", json={"prompt": [{}] * 300_000})
    assert response.status_code == 400 and response.elapsed.total_seconds() < 20


def test_of_what_changes_nothing_there_is_not_much(served: Served) -> None:
    body = {"messages": MESSAGES, "modalities": ["x"] * 500_000}
    began = monotonic()
    assert served.client.post(CHAT, json=body).status_code == 400
    assert monotonic() - began < 2


def test_bodies_that_arrive_at_once_are_bounded(served: Served) -> None:
    from conflayers_cli.server.errors import ApiError
    from conflayers_cli.server.guards import MAX_BODIES, BodyReader
    from conflayers_cli.server.schema import ChatRequest

    reader = BodyReader(100, 30)

    class Arriving:
        """A request of 90 bytes and more that are to come."""

        def __init__(self) -> None:
            self.headers = {"content-type": "application/json"}
            self.goes_on = asyncio.Event()

        async def stream(self) -> AsyncIterator[bytes]:
            yield b" " * 90
            await self.goes_on.wait()

    async def run() -> list[Any]:
        some = [Arriving() for _ in range(MAX_BODIES + 4)]
        reads = [asyncio.create_task(reader.read(each, ChatRequest)) for each in some]
        await asyncio.sleep(0.05)
        for each in some:
            each.goes_on.set()
        return await asyncio.gather(*reads, return_exceptions=True)

    codes = [error.status for error in asyncio.run(run()) if isinstance(error, ApiError)]
    assert (codes.count(503), codes.count(400)) == (3, MAX_BODIES + 1)
    assert {error.status for error in asyncio.run(run())} == {400, 503}


def test_a_large_body_is_refused_by_its_head(serve: Callable[..., Served]) -> None:
    served = serve(max_body=1000)
    headers = {"Content-Type": "application/json", "Content-Length": "2000"}
    response = served.client.post(CHAT, content=b"{}", headers=headers)
    assert response.status_code == 413


def test_a_request_may_not_ask_for_more_texts_than_there_are_places(
    serve: Callable[..., Served],
) -> None:
    served = serve(batch_size=1, queue_size=2)
    refused = served.chat("Why?", n=4)
    assert (refused.status_code, error_of(refused)["param"]) == (400, "n")
    assert served.chat("Why?", n=3, max_tokens=1).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_what_fails_is_told_and_no_prompt_is_logged(
    serve: Callable[..., Served],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    stream: bool,
) -> None:
    served = serve()

    told = "quoting: Why?"

    def fail(*_: object) -> None:
        raise RuntimeError(told)

    monkeypatch.setattr(Bodies, "add", fail)
    with caplog.at_level("INFO"):
        response = served.chat("Why?", stream=stream)

    assert response.status_code == (200 if stream else 500)
    assert '"server_error"' in response.text and "[DONE]" not in response.text
    assert "RuntimeError" in caplog.text and "quoting" not in caplog.text


def test_an_answers_message_is_taken_back(served: Served) -> None:
    first = {"role": "user", "content": "Why?"}
    message = served.chat("Why?", **GREEDY).json()["choices"][0]["message"]
    body = {"messages": [first, message, first], "max_tokens": 5, **GREEDY}
    assert served.client.post("/v1/chat/completions", json=body).status_code == 200


def test_a_completion_goes_as_far_as_there_is_room(serve: Callable[..., Served]) -> None:
    served = serve(max_new_tokens=10)
    response = served.client.post("/v1/completions", json={"prompt": "abc", **GREEDY})
    assert response.json()["usage"]["completion_tokens"] == 10
