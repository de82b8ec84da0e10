"""Options of ``conflayers bench`` alone, as annotated types for Typer."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Other(Enum):
    """What of transformers can be measured beside the engine's own arms (see `peers.PEERS`)."""

    TRANSFORMERS = "transformers"
    STATIC = "transformers-static"
    PROMPT_LOOKUP = "prompt-lookup"
    EARLY_EXIT = "early-exit"


Runs = Annotated[
    int, typer.Option("--runs", min=1, metavar="N", help="How often each prompt is decoded.")
]
Warmup = Annotated[
    int,
    typer.Option("--warmup", min=0, metavar="N", help="Decodings of each arm that don't count."),
]
Against = Annotated[
    list[Other] | None,
    typer.Option(
        "--against",
        help="Measure model.generate of transformers, too: plain, with a static cache, with prompt "
        "lookup (10 tokens), or drafting by an early exit at half the depth; may be given "
        "repeatedly.",
        show_default=False,
    ),
]
BatchSize = Annotated[
    int,
    typer.Option(
        "--batch-size",
        min=1,
        metavar="N",
        help="Prompts decoded at once, in both arms; one that ends makes room for the next.",
    ),
]
TargetSpeedup = Annotated[
    float | None,
    typer.Option(
        "--target-speedup",
        metavar="S",
        help="Measure, too, the model with its depth over S layers kept for good (lossy: not the "
        "model's own text). Without --profile these layers draft as well.",
        show_default=False,
    ),
]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="Write the results there as JSON."),
]
FailUnder = Annotated[
    float | None,
    typer.Option(
        "--fail-under", min=0.0, metavar="X", help="End with code 3 if the speed-up is under X."
    ),
]
