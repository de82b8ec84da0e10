"""Real clients against a real socket: curl and the openai package; and how a server ends."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from time import monotonic, sleep
from typing import Any

import pytest

from tests.server.conftest import CONTEXT, GREEDY, alone, drafting, tiny_model


@contextmanager
def listening(**options: Any) -> Iterator[tuple[str, Any]]:
    """(address, uvicorn's server) of a server in a thread of this process."""
    from conflayers_cli.server import run
    from conflayers_cli.server.options import ServerOptions

    loaded, decoder = tiny_model()
    chosen = ServerOptions(**{"port": 0, "batch_size": 2, "context": CONTEXT, **options})
    service = run.build_service(loaded, decoder, drafting(decoder), chosen)
    sock = run.listen(chosen)
    server = run.make_server(service)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        while not server.started:
            sleep(0.01)
        yield f"http://127.0.0.1:{sock.getsockname()[1]}", server
    finally:
        server.handle_exit(signal.SIGTERM, None)
        thread.join(30)
        sock.close()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with listening() as (address, _):
        yield address


def connect(address: str) -> socket.socket:
    host, port = address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def post(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


def chat(**more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Why?"}], "max_tokens": 12, **GREEDY, **more}


def read_all(connection: socket.socket) -> bytes:
    received = b""
    while piece := connection.recv(1 << 16):
        received += piece
    return received


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
@pytest.mark.parametrize("stream", [False, True])
def test_curl(address: str, stream: bool) -> None:
    command = ["curl", "-sN", f"{address}/v1/chat/completions", "--json", "@-"]
    body = json.dumps(chat(stream=stream))
    out = subprocess.run(command, input=body, capture_output=True, text=True, timeout=60).stdout

    if stream:
        *lines, last = [line.removeprefix("data: ") for line in out.split("\n\n") if line]
        deltas = [json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines]
        text = "".join(deltas)
        assert last == "[DONE]"
    else:
        text = json.loads(out)["choices"][0]["message"]["content"]
    assert text == alone("Why?").text


def test_the_openai_package(address: str) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        body = chat(model="tiny")
        whole = client.chat.completions.create(**body, logprobs=True, top_logprobs=2)
        with client.chat.completions.create(**body, stream=True) as stream:
            text = "".join(
                chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices
            )
        completion = client.completions.create(model="tiny", prompt="Once", temperature=0)
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**body, extra_body={"nothing": 1})
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("other")
        names = [model.id for model in client.models.list()]

    expected = alone("Why?").text
    assert whole.choices[0].message.content == text == expected
    assert whole.usage.completion_tokens_details.accepted_prediction_tokens is not None
    assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 2
    assert completion.choices[0].text == alone("Once", 16, chat=False).text
    assert caught.value.param == "nothing"
    assert names == ["tiny"]


def test_work_ends_when_its_client_goes_away() -> None:
    with listening(batch_size=1) as (address, _):
        for stream in (False, True):
            long = connect(address)
            long.sendall(post(chat(max_tokens=480, logit_bias={"256": -100}, stream=stream)))
            if stream:
                long.recv(100)
            else:
                sleep(0.05)
            long.close()
        with connect(address) as connection:
            connection.sendall(post(chat()))
            answer = read_all(connection)
        with connect(address) as connection:
            request = "GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            connection.sendall(request.encode())
            figures = read_all(connection).decode()

    content = json.loads(answer.partition(b"\r\n\r\n")[2])["choices"][0]["message"]["content"]
    assert content == alone("Why?").text
    tokens = next(
        float(line.split()[1])
        for line in figures.splitlines()
        if line.startswith("conflayers_generated_tokens_total")
    )
    assert tokens < 2 * 480


def test_slow_writers_are_not_waited_for() -> None:
    with listening(read_timeout=0.2) as (address, _), connect(address) as connection:
        connection.sendall(post(chat())[:-5])
        assert read_all(connection).startswith(b"HTTP/1.1 408 ")


def wait_for(done: Callable[[], bool]) -> bool:
    end = monotonic() + 20
    while not done() and monotonic() < end:
        sleep(0.02)
    return done()


ENDLESS = {"max_tokens": 480, "logit_bias": {"256": -100}}


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_do_not_read_are_cut_off(stream: bool) -> None:
    more = {**ENDLESS, "stream": stream, "logprobs": True, "top_logprobs": 20}
    with listening(read_timeout=0.5) as (address, server):
        (waiting,) = server.servers[0].sockets
        waiting.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 12)  # of connections, too
        with connect(address) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 12)
            connection.sendall(post(chat(**more)))
            assert wait_for(lambda: bool(server.server_state.connections))
            assert wait_for(lambda: not server.server_state.connections)


@pytest.mark.parametrize("begun", [b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: "])
def test_clients_that_do_not_ask_are_cut_off(begun: bytes) -> None:
    with listening(read_timeout=0.2) as (address, _), connect(address) as connection:
        connection.sendall(begun)
        with suppress(ConnectionResetError):
            assert connection.recv(100) == b""


def test_a_connection_in_use_is_not_cut_off() -> None:
    with listening(read_timeout=0.2) as (address, _), connect(address) as connection:
        for _ in range(25):
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            received = b""
            while not received.endswith(b"}"):
                received += connection.recv(1 << 16)
            assert received.startswith(b"HTTP/1.1 200 ")
            sleep(0.02)


@pytest.mark.parametrize("stream", [True, False])
def test_what_outlasts_the_drain_is_told_so(stream: bool) -> None:
    with listening(drain=0) as (address, server), connect(address) as connection:
        connection.sendall(post(chat(**ENDLESS, n=8, stream=stream)))
        if stream:
            received = connection.recv(100)
        else:
            received = b""
            sleep(0.1)
        server.handle_exit(signal.SIGTERM, None)
        received += read_all(connection)

    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 " if stream else b"HTTP/1.1 503 ")
    told = [line.removeprefix(b"data: ") for line in body.splitlines() if b'"error"' in line]
    assert json.loads(told[-1])["error"]["code"] == "shutting_down"


def test_sigterm_lets_running_requests_end() -> None:
    with listening() as (address, server), connect(address) as connection:
        connection.sendall(post(chat(max_tokens=200, logit_bias={"256": -100}, stream=True)))
        received = connection.recv(100)
        server.handle_exit(signal.SIGTERM, None)
        received += read_all(connection)

    assert received.rstrip().endswith(b"data: [DONE]\n\n\r\n0")


def test_many_streams_some_cancelled_are_not_mixed_up() -> None:
    import asyncio

    import httpx2 as httpx

    from tools.soak_server import LENGTHS, Expected, soak

    prompts = ("Why?", "abcabcabcabc", "x" * 100, "The sky")
    expected = [
        Expected(prompt, {length: alone(prompt, length).text for length in LENGTHS})
        for prompt in prompts
    ]

    async def run(address: str) -> Any:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=address, limits=limits, timeout=60) as client:
            return await soak(client, expected, streams=12, seconds=2)

    with listening(batch_size=4, queue_size=4) as (address, _):
        seen = asyncio.run(run(address))

    assert (seen.wrong, seen.lost) == ([], [])
    assert seen.texts and seen.cancelled
