"""Notices: what a user may want to know and a result can do without.

They go through :mod:`logging`: each module logs to ``logging.getLogger(__name__)``, so all of them
are below the logger ``conflayers_cli``. A warning says something about a result (a prompt was cut,
a profile is another model's), an information how work goes on or what it took. Nothing is shown
unless somebody asks for it: the command line prints all of them on stderr (:func:`on_stderr`), the
Python API turns warnings into `ConfLayersWarning` (:func:`collected`), and programs may set the
logger's level and handlers as they like.
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
"""Characters of a message: what it quotes may come out of a file."""

# Overrides, embeddings and isolates of writing direction, which can make a line read otherwise than
# it is (CVE-2021-42574). The marks that Arabic and Hebrew texts need are others, and so are the
# joiners of emoji.
_DIRECTIONS = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
# Shown as Unicode's pictures of them. C1 controls and directions have none.
_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
VISIBLE = _PICTURES | {0x7F: 0x2421} | dict.fromkeys((*range(0x80, 0xA0), *_DIRECTIONS), 0xFFFD)
"""Characters that could steer a terminal, and what is shown in their place (`str.translate`)."""

Render = Callable[[str, tuple[str, ...]], str]
"""Makes a notice's text of its message and the arguments' names in it (``extra={"names": …}``)."""

_quiet: ContextVar[bool] = ContextVar("quiet", default=False)
_collector: ContextVar[logging.Handler | None] = ContextVar("collector", default=None)


def terminal_safe(text: str) -> str:
    """The text with control characters made visible, so that it can't steer a terminal.

    Character by character: what begins in one piece of a text and ends in the next is caught, too.
    """
    return text.translate(VISIBLE)


def one_line(text: object) -> str:
    """A message fit for one line on a terminal; of a very long one the middle is left out."""
    line = terminal_safe(" ".join(str(text).split()))
    if len(line) <= MAX_MESSAGE:
        return line
    half = MAX_MESSAGE // 2
    return f"{line[:half]} … {line[-half:]}"


def say(message: str) -> None:
    """Print what has to be heard, a failure for one, quiet or not: one line on stderr."""
    if sys.stderr is None:  # closed by the caller; print() would turn to stdout then
        return
    # Where stderr is gone too there is nobody left to tell.
    with suppress(OSError, ValueError):
        print(f"{PROGRAM}: {one_line(message)}", file=sys.stderr, flush=True)  # noqa: T201


def as_it_is(message: str, names: tuple[str, ...]) -> str:
    """The message with arguments called by their names, for Python programs."""
    return message


def _text(record: logging.LogRecord, render: Render) -> str:
    return render(record.getMessage(), tuple(getattr(record, "names", ())))


class _StderrHandler(logging.Handler):
    """Prints notices on stderr, but for those that are being collected."""

    def __init__(self, render: Render) -> None:
        super().__init__()
        self._render = render

    def emit(self, record: logging.LogRecord) -> None:
        if _collector.get() is None:
            say(_text(record, self._render))


class _Collector(logging.Handler):
    """Appends the notices of its own context to a list: other threads have others."""

    def __init__(self, messages: list[str], render: Render) -> None:
        super().__init__()
        self._messages = messages
        self._render = render

    def emit(self, record: logging.LogRecord) -> None:
        if _collector.get() is self:
            self._messages.append(one_line(_text(record, self._render)))


@contextmanager
def quiet(wanted: bool) -> Iterator[None]:
    """Within, if wanted: no notices on stderr and no progress bars, but failures as ever."""
    token = _quiet.set(wanted)
    try:
        yield
    finally:
        _quiet.reset(token)


@contextmanager
def on_stderr(render: Render = as_it_is) -> Iterator[None]:
    """Within: all notices go to stderr, a line each, and nowhere else; with `quiet` nowhere."""
    logger, handler = logging.getLogger(LOGGER), _StderrHandler(render)
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
def collected(messages: list[str], render: Render = as_it_is) -> Iterator[None]:
    """Within: notices of this context are appended to ``messages``, and no bar is shown."""
    logger, handler = logging.getLogger(LOGGER), _Collector(messages, render)
    token = _collector.set(handler)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        _collector.reset(token)


def bars_wanted() -> bool:
    """Whether progress may be drawn: not if quiet, nor for a program that collects notices."""
    return not _quiet.get() and _collector.get() is None
