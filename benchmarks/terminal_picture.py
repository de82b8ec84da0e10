"""A command and what it prints on a terminal, as an SVG for the docs.

    python -m benchmarks.terminal_picture docs/terminal.svg -- conflayers bench --profile deep.yaml

The command runs on a pseudo-terminal, so that the picture shows what a person sees. It is drawn on
a ground of its own, legible on light and dark pages.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import pty
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import DIMMED_MONOKAI
from rich.text import Text

from conflayers_cli.utils.files import write_atomically

WIDTH = 112
CELL = 12.2
"""What rich's SVG gives a character."""
_TEXT = re.compile(r'x="([\d.]+)" y=("[\d.]+") textLength="([\d.]+)"([^>]*>)((?:&#160;)+)')


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="the SVG")
    parser.add_argument("command", nargs="+", help="behind --")
    parser.add_argument("--width", type=int, default=WIDTH, help="columns")
    parser.add_argument("--typed", help="the command as it is shown, where it is another one")
    parser.add_argument("--first", type=int, help="keep so many lines from the start")
    options = parser.parse_args(arguments)
    printed = printed_by(options.command, options.width)
    typed = shlex.join(options.typed.split() if options.typed else options.command)
    shown = [f"$ {typed}", *printed][: options.first]
    write_atomically(options.output, picture(shown, options.width))


def printed_by(command: Sequence[str], width: int) -> list[str]:
    """The lines that a command prints on a terminal, with their colours.

    Not what it says on stderr, where progress comes and goes.

    Raises:
        SystemExit: it fails.
    """
    size = {"COLUMNS": str(width), "LINES": "60", "TERM": "xterm-256color"}
    ours, its = pty.openpty()
    with subprocess.Popen(command, stdout=its, env={**os.environ, **size}) as process:
        os.close(its)
        found = bytearray()
        # A terminal whose other end is closed is an error to read from, on Linux.
        with contextlib.suppress(OSError):
            while part := os.read(ours, 65536):
                found += part
        os.close(ours)
    if process.returncode:
        raise SystemExit(f"{command[0]} ended with {process.returncode}")
    return found.decode().replace("\r\n", "\n").rstrip("\n").split("\n")


def picture(lines: Sequence[str], width: int) -> str:
    """Lines with terminal colours as an SVG that fetches nothing."""
    console = Console(
        record=True, width=width, file=io.StringIO(), force_terminal=True, legacy_windows=False
    )
    for line in lines:
        console.print(Text.from_ansi(line), soft_wrap=True)
    svg = console.export_svg(title="conflayers", theme=DIMMED_MONOKAI)
    svg = _TEXT.sub(_without_margin, svg)
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    return re.sub(r"Fira Code", "ui-monospace, Menlo, Consolas, DejaVu Sans Mono", svg)


def _without_margin(match: re.Match[str]) -> str:
    """A text that begins with spaces, begun behind them: not all programs keep them."""
    x, y, length, rest, spaces = match.groups()
    margin = len(spaces) // len("&#160;") * CELL
    shifted, shorter = float(x) + margin, float(length) - margin
    return f'x="{shifted:g}" y={y} textLength="{shorter:g}"{rest}'


if __name__ == "__main__":
    main(sys.argv[1:])
