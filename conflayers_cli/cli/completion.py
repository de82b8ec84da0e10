"""Shell completion of values; imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from conflayers_cli.models.registry import CONFIG_FILE, REGISTRY

Complete = Callable[[str], list[str]]


def one_of(*names: str) -> Complete:
    """Completes to one of these names."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return complete


def files(*suffixes: str) -> Complete:
    """Completes to files that end so, and to the folders on the way to them."""

    def complete(incomplete: str) -> list[str]:
        return _paths(incomplete, lambda path: path.suffix.lower() in suffixes)

    return complete


def model(incomplete: str) -> list[str]:
    """Completes to a built-in model, a folder or a GGUF file."""
    names = [name for name in REGISTRY if name.startswith(incomplete)]
    return [*names, *_paths(incomplete, lambda path: path.suffix.lower() == ".gguf")]


def _paths(incomplete: str, wanted: Callable[[Path], bool]) -> list[str]:
    """Paths that begin so; a folder that is no model ends in a slash."""
    folder, slash, begun = incomplete.rpartition("/")
    head, offered = f"{folder}{slash}", []
    try:
        for path in sorted(Path(head or ".").expanduser().iterdir()):
            hidden = path.name.startswith(".") and not begun.startswith(".")
            if hidden or not path.name.startswith(begun):
                continue
            if path.is_dir():
                offered.append(head + path.name + ("" if (path / CONFIG_FILE).is_file() else "/"))
            elif wanted(path):
                offered.append(head + path.name)
    except (OSError, RuntimeError):  # no such folder, or no such user's home
        return []
    return offered
