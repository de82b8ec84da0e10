"""Options of ``calibrate`` alone, as annotated types for Typer."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from conflayers_cli.cli import completion
from conflayers_cli.cli.option_groups import OptionGroup
from conflayers_cli.cli.options import LOAD, MAX_SEED, PROMPTS
from conflayers_cli.cli.strategies import STRATEGIES, SearchOptions
from conflayers_cli.generation.prompt_encoding import PromptOptions
from conflayers_cli.models.load_options import LoadOptions

_SEARCH = "Search"


class DraftWeights(Enum):
    """What drafts compute with."""

    AUTO = "auto"
    OWN = "own"
    INT4 = "int4"


Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="The profile; MODEL.yaml here by default."),
]
Resume = Annotated[
    bool | None,
    typer.Option(
        "--resume/--no-resume",
        help="Go on with a calibration that was cut short, given the same options again; or begin "
        "anew in its place.",
        show_default=False,
    ),
]
StrategyName = Annotated[
    str,
    typer.Option(
        "--strategy",
        metavar="NAME",
        help="conflayers, swift, knapsack, clasp, greedy, unified, or auto, which runs them all; "
        "or FILE.py:CLASS, one of your own (the file is run).",
        autocompletion=completion.one_of(*STRATEGIES),
        rich_help_panel=_SEARCH,
    ),
]
SEARCH = OptionGroup(
    target_speedup=typer.Option(
        "--target-speedup",
        metavar="S",
        help="unified: keep the model's depth over S layers, evenly spaced; without --data nothing "
        "is measured.",
        rich_help_panel=_SEARCH,
        show_default=False,
    ),
    budget=typer.Option(
        "--budget",
        min=1.0,
        metavar="SECONDS",
        help="auto: about the time for all strategies and the check of their plans (600).",
        rich_help_panel=_SEARCH,
        show_default=False,
    ),
    skip_ratio=typer.Option(
        "--skip-ratio",
        min=0.0,
        max=0.9,
        metavar="R",
        help="Share of layers skipped: conflayers' least (0.4), swift's exact (0.45).",
        show_default=False,
        rich_help_panel=_SEARCH,
    ),
    search_interval=typer.Option(
        "--search-interval",
        min=1,
        metavar="N",
        help="Verify steps that conflayers decodes with each set (30).",
        show_default=False,
        rich_help_panel=_SEARCH,
    ),
    max_iterations=typer.Option(
        "--max-iterations",
        min=1,
        metavar="N",
        help="Sets proposed at the most: conflayers 100, swift 1000.",
        show_default=False,
        rich_help_panel=_SEARCH,
    ),
    patience=typer.Option(
        "--patience",
        min=1,
        metavar="N",
        help="Sets in a row without improvement that end it: conflayers 15, swift 300, greedy 12.",
        show_default=False,
        rich_help_panel=_SEARCH,
    ),
    context_window=typer.Option(
        "--context-window",
        min=1,
        metavar="W",
        help="Generated tokens that sets are judged by: conflayers 100, swift 50.",
        show_default=False,
        rich_help_panel=_SEARCH,
    ),
)
SearchFlags = Annotated[SearchOptions, SEARCH]
Refine = Annotated[
    bool | None,
    typer.Option(
        "--refine/--no-refine",
        help="Improve the found set layer by layer (all but unified do, if not told otherwise); "
        "without, the paper's own result.",
        rich_help_panel=_SEARCH,
        show_default=False,
    ),
]
Tree = Annotated[
    bool,
    typer.Option(
        "--tree/--no-tree",
        help="Look whether side candidates beside the draft pay, when the set is refined.",
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
DraftWeightsOption = Annotated[
    DraftWeights,
    typer.Option(
        "--draft-weights",
        help="What drafts compute with: the model's own weights, a copy of the layers' rounded to "
        "four bits (a quarter to a third more memory), or (auto) what is predicted to be faster.",
        rich_help_panel=_SEARCH,
    ),
]
PromptFlags = Annotated[
    PromptOptions,
    PROMPTS.but(
        max_new_tokens=typer.Option(
            "--max-new-tokens", "-n", min=8, metavar="N", help="Tokens decoded of each prompt."
        )
    ),
]
LoadFlags = Annotated[LoadOptions, LOAD.without("exact")]
Seed = Annotated[
    int,
    typer.Option(
        "--seed",
        min=0,
        max=MAX_SEED,
        metavar="N",
        help="Of the prompts' order, which of them are held out for the check, and random sets.",
        rich_help_panel=_SEARCH,
    ),
]
