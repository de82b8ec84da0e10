"""Options of ``calibrate`` alone, as annotated types for Typer."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from conflayers_cli.cli import completion
from conflayers_cli.cli.option_groups import OptionGroup
from conflayers_cli.cli.options import LOAD, MAX_SEED, PROMPTS
from conflayers_cli.generation.prompt_encoding import PromptOptions
from conflayers_cli.models.load_options import LoadOptions
from conflayers_cli.search.options import SearchOptions
from conflayers_cli.search.strategies.registry import STRATEGIES

_search_option = partial(typer.Option, rich_help_panel="Search")

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
    ),
]
SEARCH = OptionGroup(
    strategy=_search_option(
        "--strategy",
        metavar="NAME",
        help="local (refinement alone), conflayers, swift, knapsack, clasp, greedy, unified, or "
        "auto, which runs them all; or FILE.py:CLASS, one of your own (the file is run).",
        autocompletion=completion.one_of(*STRATEGIES),
    ),
    target_speedup=_search_option(
        "--target-speedup",
        metavar="S",
        help="unified: keep the model's depth over S layers, evenly spaced; without --data nothing "
        "is measured.",
    ),
    budget=_search_option(
        "--budget",
        min=1.0,
        metavar="SECONDS",
        help="The best plan after about so long, the model's loading not counted. auto: 600; "
        "others take as long as they need.",
    ),
    memory=_search_option(
        "--calibration-memory",
        min=64,
        metavar="MIB",
        help="Memory that judging plans may take beside the model: with less, plans are judged by "
        "fewer texts, and more slowly.",
    ),
    skip_ratio=_search_option(
        "--skip-ratio",
        min=0.0,
        max=0.9,
        metavar="R",
        help="Share of layers skipped: conflayers' least (0.4), swift's exact (0.45).",
    ),
    search_interval=_search_option(
        "--search-interval",
        min=1,
        metavar="N",
        help="Verify steps that conflayers decodes with each set (30).",
    ),
    max_iterations=_search_option(
        "--max-iterations",
        min=1,
        metavar="N",
        help="Sets proposed at the most: conflayers 100, swift 1000.",
    ),
    patience=_search_option(
        "--patience",
        min=1,
        metavar="N",
        help="Sets in a row without improvement that end it: conflayers 15, swift 300, greedy 12.",
    ),
    context_window=_search_option(
        "--context-window",
        min=1,
        metavar="W",
        help="Generated tokens that sets are scored by: conflayers 100, swift 50.",
    ),
    refine=_search_option(
        "--refine/--no-refine",
        help="Improve the found set layer by layer (all but unified do by default); "
        "without, the paper's own result.",
    ),
    refine_limit=_search_option(
        "--refine-limit", min=1, metavar="N", help="The most sets scored in refinement."
    ),
    tree=_search_option(
        "--tree/--no-tree",
        help="Look whether side candidates beside the draft pay, when the set is refined.",
    ),
    draft_weights=_search_option(
        "--draft-weights",
        help="What drafts compute with: the model's own weights, a copy of the layers' rounded to "
        "four bits (a quarter to a third more memory), or (auto) what is predicted to be faster.",
    ),
    seed=_search_option(
        "--seed",
        min=0,
        max=MAX_SEED,
        metavar="N",
        help="Seed of the prompts' order, of which are held out for the check, and of random sets.",
    ),
)
SearchFlags = Annotated[SearchOptions, SEARCH]
PromptFlags = Annotated[
    PromptOptions,
    PROMPTS.but(
        max_new_tokens=typer.Option(
            "--max-new-tokens", "-n", min=8, metavar="N", help="Tokens decoded of each prompt."
        )
    ),
]
LoadFlags = Annotated[LoadOptions, LOAD.without("exact")]
