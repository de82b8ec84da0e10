"""What the shell offers where a value is being typed. Nothing heavy is loaded for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from conflayers_cli.models.registry import CATALOGUE, CONFIG_FILE

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
    names = [name for name in CATALOGUE if name.startswith(incomplete)]
    return [*names, *_paths(incomplete, lambda path: path.suffix.lower() == ".gguf")]


def _paths(incomplete: str, wanted: Callable[[Path], bool]) -> list[str]:
    """Paths that begin so, as they were begun; a folder that is no model ends in a slash."""
    head, slash, begun = incomplete.rpartition("/")
    try:
        found = sorted(Path(f"{head}{slash}" or ".").expanduser().iterdir())
        return list(_offered(found, f"{head}{slash}", begun, wanted))
    except (OSError, RuntimeError):  # no such folder, or no such user's home
        return []


def _offered(
    found: Iterable[Path], head: str, begun: str, wanted: Callable[[Path], bool]
) -> Iterable[str]:
    for path in found:
        hidden = path.name.startswith(".") and not begun.startswith(".")
        if hidden or not path.name.startswith(begun):
            continue
        if path.is_dir():
            yield f"{head}{path.name}" + ("" if (path / CONFIG_FILE).is_file() else "/")
        elif wanted(path):
            yield f"{head}{path.name}"
