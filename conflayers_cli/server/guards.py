"""Who may ask, and how much a request may be."""

from __future__ import annotations

import asyncio
import hmac
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request

from conflayers_cli.errors import InputError
from conflayers_cli.server.errors import ApiError, invalid_request
from conflayers_cli.server.schema import Part
from conflayers_cli.utils.text_files import read_text

MIN_KEY = 8
MAX_KEYS_FILE = 1 << 20
MAX_BODIES = 16
"""So many times the largest body may be arriving at once."""
Parsed = TypeVar("Parsed", bound=Part)


def read_keys(path: Path) -> frozenset[str]:
    """The keys in a file, one a line; empty lines and those with ``#`` at their beginning are none.

    Raises:
        InputError: the file can't be read, has no key, or one that is too short.
    """
    lines = (line.strip() for line in read_text(path, MAX_KEYS_FILE).splitlines())
    keys = frozenset(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise InputError(f"{path}: has no key")
    if any(len(key) < MIN_KEY or not key.isascii() for key in keys):
        raise InputError(f"{path}: a key has {MIN_KEY} ASCII characters at least")
    return keys


class KeyRing:
    """The API keys that are taken.

    Args:
        keys: None: nobody is asked for one, and all are one owner.
    """

    def __init__(self, keys: frozenset[str] | None) -> None:
        # Hashes are as long as each other: comparing them tells nothing of lengths.
        self._keys = None if keys is None else [_hash(key.encode()) for key in sorted(keys)]
        self.count = len(keys or ())

    def owner(self, request: Request) -> str:
        """Who asks: a hash of the key. Raises ApiError where the key is none of these."""
        if self._keys is None:
            return ""
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        secret = _hash(given.strip().encode("latin-1", "replace"))
        # All are compared, so that the time tells nothing of which.
        matches = [hmac.compare_digest(secret, key) for key in self._keys]
        if kind.lower() != "bearer" or not any(matches):
            raise ApiError(
                401,
                "no valid API key: send one as Authorization: Bearer KEY",
                code="invalid_api_key",
            )
        return secret.hex()[:16]


def _hash(secret: bytes) -> bytes:
    return sha256(secret).digest()


class BodyReader:
    """Reads requests: each within a time and a size, and all at once within `MAX_BODIES` of these.

    Args:
        max_bytes: of a body.
        seconds: in which it must have arrived.
    """

    def __init__(self, max_bytes: int, seconds: float) -> None:
        self._max_bytes, self._seconds = max_bytes, seconds
        self._held = 0  # bytes of bodies that are not whole

    async def read(self, request: Request, kind: type[Parsed]) -> Parsed:
        """The checked body of a request.

        Only JSON is taken by its content type: what a page of another site can send unasked is
        none.

        Raises:
            ApiError: it is too large or too slow, no JSON, or not what the endpoint takes; or too
                much is arriving at once.
            ClientDisconnect: the client is gone.
        """
        media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media != "application/json":
            raise ApiError(415, "Content-Type: only application/json is taken")
        if int(request.headers.get("content-length", 0)) > self._max_bytes:
            raise self._too_large()
        try:
            async with asyncio.timeout(self._seconds):
                body = await self._read(request)
        except TimeoutError:
            raise ApiError(
                408, f"the request has not arrived within {self._seconds:g} s", kind="timeout"
            ) from None
        try:
            return kind.model_validate_json(body)
        except ValidationError as error:
            raise invalid_request(error) from None

    async def _read(self, request: Request) -> bytes:
        body = bytearray()
        try:
            async for piece in request.stream():
                body += piece
                self._held += len(piece)
                if len(body) > self._max_bytes:
                    raise self._too_large()
                if self._held > MAX_BODIES * self._max_bytes:
                    raise ApiError(
                        503,
                        "too many large requests are arriving at once",
                        kind="server_overloaded",
                        code="busy",
                        retry_after=1,
                    )
        finally:
            self._held -= len(body)
        return bytes(body)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"a request has {self._max_bytes:,} bytes at most", code="too_large")


__all__ = ["BodyReader", "ClientDisconnect", "KeyRing", "read_keys"]
