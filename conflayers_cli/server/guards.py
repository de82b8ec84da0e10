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
        self._keys = None if keys is None else [key.encode() for key in sorted(keys)]

    def owner(self, request: Request) -> str:
        """Who asks: a hash of the key. Raises ApiError where the key is none of these."""
        if self._keys is None:
            return ""
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        secret = given.strip().encode("latin-1", "replace")
        # All are compared, so that the time tells nothing of which.
        matches = [hmac.compare_digest(secret, key) for key in self._keys]
        if kind.lower() != "bearer" or not any(matches):
            raise ApiError(
                401,
                "no valid API key: send one as Authorization: Bearer KEY",
                code="invalid_api_key",
            )
        return sha256(secret).hexdigest()[:16]


async def read_request(
    request: Request, kind: type[Parsed], *, max_bytes: int, seconds: float
) -> Parsed:
    """The checked body of a request.

    Only JSON is taken by its content type: what a page of another site can send unasked is none.

    Raises:
        ApiError: it is too large or too slow, no JSON, or not what the endpoint takes.
        ClientDisconnect: the client is gone.
    """
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":
        raise ApiError(415, "Content-Type: only application/json is taken")
    try:
        async with asyncio.timeout(seconds):
            body = await _read(request, max_bytes)
    except TimeoutError:
        raise ApiError(
            408, f"the request has not arrived within {seconds:g} s", kind="timeout"
        ) from None
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise invalid_request(error) from None


async def _read(request: Request, max_bytes: int) -> bytes:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > max_bytes:
            raise ApiError(413, f"a request has {max_bytes:,} bytes at most", code="too_large")
    return bytes(body)


__all__ = ["ClientDisconnect", "KeyRing", "read_keys", "read_request"]
