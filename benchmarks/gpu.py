"""Decoding on a GPU: how near its memory's speed, and the output against vanilla's and generate's.

The models are random ones of 8B and 13B shape, made on the device, with text and with layers that
are nearly the identity planted in them (see `gpu_models`): how much of a real model can be left out
is not the subject here, but what decoding makes of it. One model is held at a time; a GPU with
80 GB takes them. Parts, by importance; one that fails leaves its traceback in the results, and the
others run:

  float32            drafted == vanilla == generate, 8B shape with 8 layers
  bfloat16           drafted == vanilla, 8B: chains, trees, n-grams, refused drafts, batches
  rows               whether a row's bits depend on how many rows there are, by operation
  ceiling            the memory's bandwidth: a large copy, bytes read and written
  vanilla            8B, batch 1: share of that bandwidth (weights, keys and values read per token
                     by the seconds of one), and eager generate, by turns
  speculative        13B, half of the layers planted, against own vanilla by turns: speed-up,
                     acceptance, engine efficiency (seconds of the passes run, each measured alone
                     and not waited for, of the seconds taken), time split; n-grams; a bad plan
  idle               13B: share of a decoding run in which the device does nothing, by torch's
                     profiler, and the kernels that take longest
  kernels            products and attention alone: seconds, share of the bandwidth
  contexts, batches  8B: vanilla, drafted, generate by context and by batch size
  compile            8B: the engine's compiled layers against its plain ones
  generate-compiled  8B: generate with its static cache, compiled
  smollm2            real models, from folders: --smollm2

    python -m benchmarks.gpu --output gpu.json
    python -m benchmarks.gpu --parts speculative idle --seconds 240 --output speculative.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import (
    common,
    gpu_correctness,
    gpu_kernels,
    gpu_speculative,
    gpu_speed,
)
from benchmarks.gpu_bench import Bench
from benchmarks.gpu_runs import Result
from conflayers_cli.models.device import find_device
from conflayers_cli.utils.files import check_target


@dataclass(frozen=True)
class Part:
    """A part of the benchmark.

    Attributes:
        seconds: it is not begun with fewer left; about what it takes.
    """

    name: str
    run: Callable[[Bench, Result], None]
    seconds: float


PARTS = (
    Part("float32", gpu_correctness.float32, 30),
    Part("bfloat16", gpu_correctness.bfloat16, 45),
    Part("rows", gpu_kernels.rows, 15),
    Part("ceiling", gpu_kernels.ceiling, 2),
    Part("vanilla", gpu_speed.vanilla, 30),
    Part("speculative", gpu_speculative.speculative, 50),
    Part("idle", gpu_speculative.idle, 25),
    Part("kernels", gpu_kernels.kernels, 20),
    Part("contexts", gpu_speed.contexts, 30),
    Part("batches", gpu_speed.batches, 30),
    Part("compile", gpu_speed.compiled, 45),
    Part("generate-compiled", gpu_speed.generate_compiled, 60),
    Part("smollm2", gpu_speculative.smollm2, 20),
)
SLOW = ("generate-compiled",)
"""Parts that compiling makes long: run where they are asked for by name."""

QUICK: dict[str, Any] = {
    "contexts": [48, 64],
    "batches": [1, 2],
    "tokens": 12,
    "prompts": 2,
    "runs": 1,
}


def parser() -> argparse.ArgumentParser:
    """The options."""
    parser = common.plain_parser(__doc__)
    names = [part.name for part in PARTS]
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=names,
        default=[name for name in names if name not in SLOW],
        help=f"which to run; by default all but {', '.join(SLOW)}",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=480.0,
        help="time for all parts together: one that it is too short for is left out, and one that "
        "goes on beyond it is ended (480)",
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--contexts", nargs="+", type=int, default=[512, 4096, 16_384])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=128, help="decoded behind a prompt (128)")
    parser.add_argument("--prompts", type=int, default=4, help="of a measurement (4)")
    parser.add_argument("--runs", type=int, default=3, help="of each way, by turns (3)")
    parser.add_argument(
        "--smollm2", nargs="+", type=Path, default=[], help="folders of converted real models"
    )
    parser.add_argument("--dtype", default="auto", help="of the real models")
    parser.add_argument(
        "--profiles", type=Path, default=common.PROFILES, help="folder with the real models' ones"
    )
    common.add_output(parser)
    return parser


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The settings, with the parts in their own order."""
    options = common.parse_quick(parser(), arguments, QUICK)
    options.device = str(find_device(options.device))
    if options.output:
        check_target(options.output)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    options = parse_options(arguments)
    bench = Bench(options)
    try:
        for part in PARTS:
            if part.name in options.parts and (part.name != "smollm2" or options.smollm2):
                bench.run(part.name, part.run, part.seconds)
    finally:
        bench.print()


if __name__ == "__main__":
    main()
