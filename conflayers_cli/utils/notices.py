"""Notices: messages for the user beside the result.

They go through :mod:`logging`: each module logs to ``logging.getLogger(__name__)``, below the
logger ``conflayers_cli``. A warning says something about a result (a prompt was cut, a profile is
another model's), an info message how work goes on. The command line prints them on stderr
(:func:`notices_to_stderr`), the Python API turns warnings into `ConfLayersWarning`
(:func:`collect_notices`), and programs may set the logger's level and handlers.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar

PROGRAM = "conflayers"
LOGGER = "conflayers_cli"
MAX_MESSAGE = 1000
"""Characters of a message, which may quote a file."""

# Overrides, embeddings and isolates of writing direction, which can disguise a line
# (CVE-2021-42574). The marks that Arabic and Hebrew texts need are others, as are emoji's joiners.
_DIRECTIONS = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
# Unicode's pictures of C0 controls; C1 controls and directions have none
_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
VISIBLE = _PICTURES | {0x7F: 0x2421} | dict.fromkeys((*range(0x80, 0xA0), *_DIRECTIONS), 0xFFFD)
"""Replacements of characters that could steer a terminal, for `str.translate`."""

Render = Callable[[str, tuple[str, ...]], str]
"""Makes a notice's text of its message and the arguments' names in it (``extra={"names": …}``)."""

_quiet: ContextVar[bool] = ContextVar("quiet", default=False)
_collector: ContextVar[logging.Handler | None] = ContextVar("collector", default=None)


def terminal_safe(text: str) -> str:
    """The text with control characters made visible, so that it can't steer a terminal.

    Works by character, so a text may come in pieces.
    """
    return text.translate(VISIBLE)


def one_line(text: object) -> str:
    """A message as one line for a terminal, the middle of a very long one left out."""
    line = terminal_safe(" ".join(str(text).split()))
    if len(line) <= MAX_MESSAGE:
        return line
    half = MAX_MESSAGE // 2
    return f"{line[:half]} … {line[-half:]}"


def print_notice(message: str) -> None:
    """Print one line on stderr, quiet or not."""
    if sys.stderr is None:  # closed by the caller; print() would turn to stdout then
        return
    with suppress(OSError, ValueError):  # stderr may be gone
        print(f"{PROGRAM}: {one_line(message)}", file=sys.stderr, flush=True)  # noqa: T201


def unchanged(message: str, names: tuple[str, ...]) -> str:
    """The message with arguments called by their names, for Python programs."""
    return message


class _Handler(logging.Handler):
    """Renders notices and passes them to ``emit_text``.

    A collector (``collects``) takes those of its own context, the handler for stderr those that no
    collector takes.
    """

    def __init__(self, emit_text: Callable[[str], None], render: Render, collects: bool) -> None:
        super().__init__()
        self._emit_text, self._render, self._collects = emit_text, render, collects

    def emit(self, record: logging.LogRecord) -> None:
        if _collector.get() is (self if self._collects else None):
            names = tuple(getattr(record, "names", ()))
            self._emit_text(self._render(record.getMessage(), names))


@contextmanager
def quiet(wanted: bool) -> Iterator[None]:
    """Within, if wanted: no notices on stderr and no progress bars, but errors as ever."""
    token = _quiet.set(wanted)
    try:
        yield
    finally:
        _quiet.reset(token)


@contextmanager
def notices_to_stderr(render: Render = unchanged) -> Iterator[None]:
    """Within: all notices go to stderr, a line each, and nowhere else; with `quiet` nowhere."""
    logger, handler = logging.getLogger(LOGGER), _Handler(print_notice, render, False)
    before = logger.level, logger.propagate
    logger.propagate = False
    if not _quiet.get():
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


@contextmanager
def collect_notices(messages: list[str], render: Render = unchanged) -> Iterator[None]:
    """Within: notices of this context are appended to ``messages``, and no bar is shown."""
    logger = logging.getLogger(LOGGER)
    handler = _Handler(lambda text: messages.append(one_line(text)), render, collects=True)
    token = _collector.set(handler)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        _collector.reset(token)


def progress_enabled() -> bool:
    """Whether progress may be drawn: not if quiet or while notices are collected."""
    return not _quiet.get() and _collector.get() is None
