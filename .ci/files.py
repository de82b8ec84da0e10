"""Whether text files end as they should and YAML can be read: `python .ci/files.py FILE…`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

HARD_BREAKS = (".md",)
"""Suffixes of files in which two spaces at a line's end mean something."""


def faults(path: Path) -> Iterator[str]:
    """What is wrong with a file, a line each."""
    try:
        text = path.read_text(encoding="utf-8")
    except ValueError as error:
        yield f"{path}: is not UTF-8: {error}"
        return
    if text and (not text.endswith("\n") or text.endswith("\n\n")):
        yield f"{path}: has to end with one end of line"
    for number, line in enumerate(text.split("\n"), 1):
        if line != line.rstrip() and path.suffix not in HARD_BREAKS:
            yield f"{path}:{number}: ends with spaces"
    if path.suffix in (".yaml", ".yml"):
        try:
            list(yaml.safe_load_all(text))
        except yaml.YAMLError as error:
            yield f"{path}: {' '.join(str(error).split())}"


def main(names: list[str]) -> int:
    found = [fault for name in names for fault in faults(Path(name))]
    sys.stderr.writelines(f"{fault}\n" for fault in found)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
