"""Errors in OpenAI's form: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import logging
import traceback
from typing import Any

from pydantic import ValidationError

INVALID = "invalid_request_error"


class ApiError(Exception):
    """What a client is told.

    Args:
        status: the HTTP status.
        message: a sentence.
        kind: the error's ``type``.
        param: the field that is wrong; None: none is.
        code: for programs.
        retry_after: seconds after which to try again; None: nothing is said.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.param, self.code, self.retry_after = param, code, retry_after

    @property
    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


def log_failure(logger: logging.Logger, what: str, error: BaseException) -> None:
    """Log an error by its kind and place. What it says may quote a prompt: for debugging alone."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    logger.error(f"{what}: {type(error).__name__}\n{frames}")
    logger.debug(what, exc_info=error)


def server_failed() -> ApiError:
    """What a client is told of what it has no part in."""
    return ApiError(500, "the server failed; see its log", kind="server_error")


def invalid_request(error: ValidationError) -> ApiError:
    """The first thing that is wrong with a request, by the name of its field, without its value."""
    found = error.errors(include_url=False, include_input=False, include_context=False)
    # Of a field that may be of several kinds, the one that fits furthest says most.
    same = [each for each in found if each["loc"][:1] == found[0]["loc"][:1]]
    first = max(same, key=lambda each: len(each["loc"]))
    kind, message = first["type"], str(first["msg"])
    if kind == "json_invalid":
        return ApiError(400, "the body is not valid JSON", code="invalid_json")
    # Branches of a union are named in the place, too; a client knows the fields alone.
    names = [str(part) for part in first["loc"] if not _is_branch(part)]
    field = ".".join(names) or None
    if kind == "extra_forbidden":
        return ApiError(400, f"{field} is not supported", param=field, code="unsupported_parameter")
    message = message.removeprefix("Value error, ").removeprefix("Assertion failed, ")
    where = f"{field}: " if field else ""
    return ApiError(400, where + message[:1].lower() + message[1:], param=field, code=kind)


def _is_branch(part: int | str) -> bool:
    return isinstance(part, str) and ("[" in part or part in _BRANCHES)


_BRANCHES = frozenset(
    {"str", "int", "ChatPart", "TextPart", "tagged-union", "nullable", "constrained-str"}
)
