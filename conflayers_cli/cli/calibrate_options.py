"""Options of ``calibrate`` alone, as annotated types for Typer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from conflayers_cli.cli.options import MAX_SEED

_SEARCH = "Search"

Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="The profile; MODEL.yaml here by default."),
]
StrategyName = Annotated[
    str,
    typer.Option(
        "--strategy",
        metavar="NAME",
        help="How layers are chosen: conflayers.",
        rich_help_panel=_SEARCH,
    ),
]
SkipRatio = Annotated[
    float,
    typer.Option(
        "--skip-ratio",
        min=0.0,
        max=0.9,
        metavar="R",
        help="Least share of layers the search tries to skip.",
        rich_help_panel=_SEARCH,
    ),
]
SearchInterval = Annotated[
    int,
    typer.Option(
        "--search-interval",
        min=1,
        metavar="N",
        help="Verify steps that each set is decoded with.",
        rich_help_panel=_SEARCH,
    ),
]
MaxIterations = Annotated[
    int,
    typer.Option(
        "--max-iterations",
        min=1,
        metavar="N",
        help="Sets proposed at the most.",
        rich_help_panel=_SEARCH,
    ),
]
Patience = Annotated[
    int,
    typer.Option(
        "--patience",
        min=1,
        metavar="N",
        help="Sets in a row without improvement that end the search.",
        rich_help_panel=_SEARCH,
    ),
]
ContextWindow = Annotated[
    int,
    typer.Option(
        "--context-window",
        min=1,
        metavar="W",
        help="Generated tokens that confidence is taken over.",
        rich_help_panel=_SEARCH,
    ),
]
Refine = Annotated[
    bool,
    typer.Option(
        "--refine/--no-refine",
        help="Improve the found set layer by layer; without, the paper's exact result.",
        rich_help_panel=_SEARCH,
    ),
]
RefineLimit = Annotated[
    int,
    typer.Option(
        "--refine-limit",
        min=1,
        metavar="N",
        help="Sets judged in refinement at the most.",
        rich_help_panel=_SEARCH,
    ),
]
MaxNewTokens = Annotated[
    int,
    typer.Option(
        "--max-new-tokens", "-n", min=8, metavar="N", help="Tokens decoded of each prompt."
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        "--seed",
        min=0,
        max=MAX_SEED,
        metavar="N",
        help="Which prompts are held out for the check, and their order.",
        rich_help_panel=_SEARCH,
    ),
]
