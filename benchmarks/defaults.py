"""What the tool chooses by itself, beside everything that it could have chosen.

Each combination of dtype, kernels and number of threads decodes the same tokens in a process of its
own, as `generate` without options would; all take turns, once a round. Shown is each one's least
time a token, and how the choice compares with the best of those that give a model's own weights.

    python -m benchmarks.defaults --models smollm2 --rounds 3
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.common import add_output, parse_quick, plain_parser, say
from conflayers_cli.engine.open_model import open_model
from conflayers_cli.kernels.native_library import (
    UNIT_VARIABLE,
    available_units,
    unavailable_reason,
    usable_threads,
)
from conflayers_cli.models.load_options import LoadOptions
from conflayers_cli.utils.environment import processor_name
from conflayers_cli.utils.files import write_json

PROMPT = 64
"""Tokens before those that are timed."""
SLACK = 1.05
"""The choice may take so much of the best one's time."""


@dataclass(frozen=True)
class Choice:
    """One combination; None: what the tool chooses."""

    dtype: str | None = None
    kernels: str | None = None
    threads: int | None = None

    @property
    def name(self) -> str:
        if self == Choice():
            return "the tool's choice"
        return f"{self.dtype}, {self.kernels}, {self.threads} thread{'s' * (self.threads != 1)}"

    def environment(self) -> dict[str, str]:
        more: dict[str, str] = {}
        if self.kernels is not None:
            more[UNIT_VARIABLE] = "off" if self.kernels == "PyTorch" else self.kernels
        if self.threads is not None:
            more["OMP_NUM_THREADS"] = str(self.threads)
        return {**os.environ, **more}


def combinations() -> list[Choice]:
    """All that runs here, the tool's choice first."""
    units = [] if unavailable_reason() else list(available_units())
    threads, count = [], usable_threads()
    while count:
        threads.append(count)
        count //= 2
    return [
        Choice(),
        *(
            Choice(dtype, kernels, number)
            for dtype in ("float32", "bfloat16", "float16")
            for kernels in (*units, "PyTorch")
            for number in threads
        ),
    ]


def time_tokens(model: str, dtype: str | None, tokens: int) -> dict[str, Any]:
    """Milliseconds a token, the median of single passes after a prompt, and what ran."""
    loaded, decoder = open_model(model, LoadOptions(device="cpu", dtype=dtype or "auto"))
    text = torch.randint(
        decoder.vocabulary, (1, PROMPT + tokens), generator=torch.Generator().manual_seed(0)
    )
    cache = decoder.new_cache(PROMPT + tokens)
    decoder.prefill(text[:, :PROMPT], cache)
    times = []
    for at in range(PROMPT, PROMPT + tokens):
        position = torch.tensor([[at]])
        begin = time.perf_counter()
        decoder.forward(text[:, at : at + 1], position, cache)
        times.append(time.perf_counter() - begin)
    return {
        "ms": 1e3 * sorted(times)[len(times) // 2],
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "kernels": decoder.kernels,
    }


def run_one(model: str, choice: Choice, tokens: int) -> dict[str, Any]:
    """`time_tokens` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.defaults", "--one", model]
    command += ["--tokens", str(tokens), *(["--dtype", choice.dtype] if choice.dtype else [])]
    done = subprocess.run(
        command, env=choice.environment(), stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure(model: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every combination's figures for a model, the tool's choice first."""
    choices = combinations()
    found: list[dict[str, Any]] = [{"choice": choice.name, "ms": []} for choice in choices]
    for number in range(options.rounds):
        for choice, entry in zip(choices, found, strict=True):
            one = run_one(model, choice, options.tokens)
            entry["ms"].append(one.pop("ms"))
            entry.update(one)
        say(f"{model}: round {number + 1} of {options.rounds}")
    for entry in found:
        entry["least_ms"] = min(entry["ms"])
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = plain_parser(__doc__)
    parser.add_argument("--models", nargs="+", default=["smollm2", "smollm2-deep"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64, help="timed in each round")
    parser.add_argument("--one", metavar="MODEL", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    add_output(parser)
    options = parse_quick(parser, arguments, {"models": ["smollm2"], "rounds": 1, "tokens": 4})
    if options.one:
        print(json.dumps(time_tokens(options.one, options.dtype, options.tokens)))
        return 0
    results = {model: measure(model, options) for model in options.models}
    worst = 0.0
    for model, entries in results.items():
        best = min(entry["least_ms"] for entry in entries[1:])
        print(f"{model} ({processor_name()})")
        for entry in entries:
            share = entry["least_ms"] / best
            print(f"  {entry['choice']:38} {entry['least_ms']:8.2f} ms  {share:6.2f}")
        print(f"  chosen: {entries[0]['dtype']}, {entries[0]['kernels']}")
        worst = max(worst, entries[0]["least_ms"] / best)
    if options.output:
        document = {"processor": processor_name(), "rounds": options.rounds, "models": results}
        write_json(options.output, document)
    return 0 if worst <= SLACK or options.quick else 3


if __name__ == "__main__":
    sys.exit(main())
