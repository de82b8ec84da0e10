"""The cells of the papers' table that are done: kept in a file, gone on with, printed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from benchmarks.gpu_bench import plain
from benchmarks.paper_cells import PLANNED
from benchmarks.paper_figures import published
from conflayers_cli.errors import InputError
from conflayers_cli.utils.environment import describe_environment
from conflayers_cli.utils.files import write_json
from conflayers_cli.utils.statistics import Spread

FREE = frozenset({"models", "tasks", "strategies", "budget", "resume", "quick"})
"""Settings that may change when results are gone on with: they only say which cells."""
PLACE = frozenset({"python", "platform"})
"""What of the environment may change: figures don't depend on it."""


@dataclass(frozen=True)
class Setting:
    """A row of the papers' settings."""

    model: str
    task: str
    shots: int
    max_new_tokens: int
    temperature: float


class Results:
    """The cells so far, in their file.

    Args:
        options: the settings.

    Raises:
        InputError: the file to go on with is no such one, of other settings or of another place.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self._path: Path | None = options.output
        self._head = plain(
            {
                "benchmark": "reproduce-papers",
                "settings": {
                    k: v for k, v in common.describe_settings(options).items() if k not in FREE
                },
                "environment": describe_environment(torch.device(options.device)),
            }
        )
        self.cells: list[dict[str, Any]] = []
        if self._path and self._path.is_file():
            if not options.resume:
                raise InputError(f"{self._path}: is there already; --resume goes on with it")
            self.cells = [cell for cell in self._read(self._path) if "failed" not in cell]

    def _read(self, path: Path) -> list[dict[str, Any]]:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            cells: list[dict[str, Any]] = found["cells"]
            other = [
                key
                for part in ("settings", "environment")
                for key, value in self._head[part].items()
                if key not in PLACE and found[part].get(key) != value
            ]
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: is no result of this benchmark") from error
        if other:
            raise InputError(
                f"{path}: was measured with another {', '.join(other)}; use another --output"
            )
        return cells

    def has(self, setting: Setting, strategy: str) -> bool:
        """Whether a cell is done."""
        key = (setting.model, setting.task, strategy)
        return any((cell["model"], cell["task"], cell["strategy"]) == key for cell in self.cells)

    def add(self, setting: Setting, cell: Mapping[str, Any]) -> None:
        """Keep one more."""
        row = {"shots": setting.shots, "max_new_tokens": setting.max_new_tokens}
        self.cells.append(plain({**cell, **row, "temperature": setting.temperature}))
        if self._path:
            write_json(self._path, {**self._head, "cells": self.cells})


def table(cells: Iterable[Mapping[str, Any]]) -> None:
    """Measured and published, side by side, on standard output."""
    head = ["model, task, strategy", "arm", "over vanilla", "over generate"]
    head += ["accepted", "tokens/step", "search", "published (over generate)"]
    rows: list[list[str]] = []
    for cell in cells:
        name = f"{cell['model']}, {cell['task']}, {cell['strategy']}"
        known = published(cell["strategy"], cell["model"], cell["task"])
        text = "; ".join(figure.text for figure in known) or "–"
        if "failed" in cell:
            rows.append([name, "failed", *["–"] * 5, text])
            continue
        arms = [arm for arm in PLANNED if arm in cell["arms"]] or ["vanilla"]
        for number, arm in enumerate(arms):
            first = number == 0
            search = f"{cell['search']['seconds']:.0f} s" if first else ""
            own = measured(cell["arms"][arm])
            rows.append([name if first else "", arm, *own, search, text if first else ""])
    common.print_table(head, rows)


def measured(figures: Mapping[str, Any]) -> list[str]:
    """The figures of an arm, for people."""
    drafted, per_step = figures["drafted"], figures["tokens_per_step"]
    return [
        shown(figures["over_vanilla"]),
        shown(figures.get("over_transformers")),
        f"{figures['accepted'] / drafted:.1%}" if drafted else "–",
        "–" if per_step is None else f"{per_step:.2f}",
    ]


def shown(values: Mapping[str, float | None] | None) -> str:
    """A spread from the results, for people."""
    return common.spread(Spread(**values)) if values else "–"
