"""Bytes that are no request, or a request that lies: the right code or none, and others go on."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator

import pytest

from tests.server.conftest import alone
from tests.server.test_clients import chat, connect, listening, post

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
JSON = b"Content-Type: application/json\r\n"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with listening(max_body=100_000, read_timeout=0.3) as (address, _):
        yield address


def status(address: str, *sent: bytes, half_closed: bool = False) -> int:
    """The status of the answer; 0: the connection was closed without one.

    ``half_closed``: nothing more is to come, which a server may take for a client that is gone.
    """
    with connect(address) as connection:
        received = b""
        try:
            for piece in sent:
                connection.sendall(piece)
            if half_closed:
                connection.shutdown(socket.SHUT_WR)
            received = connection.recv(1 << 16)
        except (ConnectionError, BrokenPipeError):
            pass
    return int(received.split()[1]) if received.startswith(b"HTTP/") else 0


def works(address: str) -> bool:
    with connect(address) as connection:
        connection.sendall(post(chat()))
        received = b""
        while piece := connection.recv(1 << 16):
            received += piece
    return alone("Why?").text.encode()[:3] in received and received.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    ("sent", "codes"),
    [
        ([b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"], {0, 400}),
        ([b"GET / HTTP/9.9\r\n\r\n"], {0, 400, 505}),
        ([HEAD + b"X: " + b"a" * 200_000 + b"\r\n\r\n"], {0, 400, 431}),
        ([HEAD + b"X: y\r\n" * 20_000 + b"\r\n"], {0, 400, 415, 431}),
        ([HEAD + JSON + b"Content-Length: -1\r\n\r\n{}"], {0, 400}),
        ([HEAD + JSON + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}"], {0, 400}),
        ([HEAD + JSON + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}"],
         {0, 400, 408}),
        ([HEAD + JSON + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n"], {0, 400}),
        ([HEAD + JSON + b"Content-Length: 200000\r\n\r\n" + b" " * 200_000], {0, 413}),
        ([HEAD + JSON + b"Transfer-Encoding: chunked\r\n\r\n"]
         + [b"4000\r\n" + b" " * 0x4000 + b"\r\n"] * 8, {0, 413}),
        ([HEAD + JSON + b"Content-Length: 9\r\nExpect: nothing\r\n\r\n123456789"], {400}),
        ([HEAD + b"Content-Length: 2\r\n\r\n{}"], {415}),
        ([HEAD + JSON + b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}"], {400}),
        ([b"POST //v1/../v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n\r\n"], {404}),
        ([b"GET /page/../run.py HTTP/1.1\r\nHost: localhost\r\n\r\n"], {404}),
        ([b"GET /page/%2e%2e/run.py HTTP/1.1\r\nHost: localhost\r\n\r\n"], {404}),
        ([b"GET /v1/models/%ff%00%0a HTTP/1.1\r\nHost: localhost\r\n\r\n"], {404}),
        ([b"GET /v1/models HTTP/1.1\r\n\r\n"], {0, 400}),
        ([b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n"], {0, 400}),
    ],
)  # fmt: skip
def test_what_is_no_request(address: str, sent: list[bytes], codes: set[int]) -> None:
    assert status(address, *sent) in codes
    assert works(address)


def test_noise(address: str) -> None:
    drawn, good = random.Random(0), post(chat(max_tokens=1))
    for _ in range(150):
        broken = bytearray(good)
        for _ in range(drawn.randint(1, 8)):
            broken[drawn.randrange(len(broken))] = drawn.randrange(256)
        code = status(address, bytes(broken), half_closed=True)
        assert code in {0, 200, 400, 404, 405, 408, 413, 415, 505}
    assert works(address)
