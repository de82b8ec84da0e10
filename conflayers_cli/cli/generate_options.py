"""Options of ``generate`` alone, and which of them go together."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from conflayers_cli.cli.data_options import DATA, DataOptions
from conflayers_cli.cli.option_groups import OptionGroup
from conflayers_cli.errors import InputError
from conflayers_cli.search.open_proposer import BUDGET
from conflayers_cli.skip_plan import check_target_speedup
from conflayers_cli.spec_decode.options import DraftOptions

logger = logging.getLogger(__name__)

_prompts_option = partial(typer.Option, rich_help_panel="Prompts")
_adapt_option = partial(typer.Option, rich_help_panel="Adapting")
_lossy_option = partial(typer.Option, rich_help_panel="Lossy: layers left out for good")
DEFAULT_BUDGET = 0.05
AUTO = "auto"
ADAPT_METHODS = (AUTO, "conflayers", "swift")

Prompts = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="PROMPT",
        help="Joined by blank lines where there are several; - stands for standard input.",
        show_default=False,
    ),
]
Stream = Annotated[
    bool, typer.Option("--stream/--no-stream", help="Print the text while it is decoded.")
]
Stats = Annotated[
    bool, typer.Option("--stats", help="Say on stderr how fast it was and what was drafted.")
]


@dataclass(frozen=True)
class FileOptions(DataOptions):
    """Options about a file of prompts and what is made of it, each as its flag says."""

    output: Path | None = None
    resume: bool = False
    batch_size: int | None = None
    ray: str | None = None
    workers: int | None = None

    @property
    def size(self) -> int:
        """Prompts decoded at once."""
        return self.batch_size or 1

    def check(self, prompt: list[str] | None, as_json: bool, continued: bool) -> None:
        """Raise InputError for options that don't go together."""
        if self.data and prompt:
            raise InputError("a PROMPT and --data: give one of the two")
        if self.data and as_json:
            raise InputError(
                "--json is one document, and --data gives JSON lines already: leave it out"
            )
        if self.resume and not self.output:
            raise InputError("--resume needs the file to go on with: --output FILE")
        needing = {
            "--output": self.output,
            "--max-prompts": self.max_prompts,
            "--batch-size": self.batch_size,
            "--continue-final-message": continued or None,
        }
        for flag, value in needing.items():
            if value is not None and not self.data:
                raise InputError(f"{flag} goes with --data, a file of prompts")
        self.check_reading()


FILE = OptionGroup(
    **DATA.options,
    output=typer.Option(
        "--output", "-o", metavar="FILE", help="With --data: where the JSON lines go, one a prompt."
    ),
    resume=typer.Option("--resume", help="With --output: go on where an interrupted run stopped."),
    batch_size=_prompts_option(
        "--batch-size",
        min=1,
        metavar="N",
        help="With --data: prompts decoded at once (1); one that ends makes room for the next.",
    ),
    ray=_prompts_option(
        "--ray",
        metavar="auto|ADDRESS",
        help="Spread the prompts over the workers of a Ray cluster (HOST:PORT; auto: this "
        "machine's, or one started here for the run), each with the whole model.",
    ),
    workers=_prompts_option(
        "--workers",
        min=1,
        metavar="N",
        help="With --ray: how many workers; by default one per GPU, without GPUs one per machine.",
    ),
)
FileFlags = Annotated[FileOptions, FILE]


@dataclass(frozen=True)
class AdaptOptions:
    """Options about searching while generating, each as its flag says."""

    adapt: str | None = None
    adapt_budget: float | None = None
    save_profile: Path | None = None
    remember: bool | None = None

    def resolved(self, profile: Path | None, drafting: DraftOptions, lossy: bool) -> AdaptOptions:
        """With the method filled in: drafts adapt unless something else says who drafts."""
        told = profile is not None or drafting.method is not None or lossy or drafting.tree
        told = told or drafting.adaptive_draft_length is False
        return self if self.adapt or told else replace(self, adapt=AUTO)

    @property
    def budget(self) -> float:
        """Most of the time to spend on the search, as a share."""
        return self.adapt_budget or (BUDGET if self.adapt == AUTO else DEFAULT_BUDGET)

    def check(self, drafting: DraftOptions, batch_size: int) -> None:
        """Raise InputError for an unknown method, or options that don't go together."""
        if self.adapt is None:
            needing = {
                "--adapt-budget": self.adapt_budget,
                "--save-profile": self.save_profile,
                "--remember": self.remember,
            }
            for flag, value in needing.items():
                if value is not None:
                    methods = f"{', '.join(ADAPT_METHODS[:-1])} or {ADAPT_METHODS[-1]}"
                    raise InputError(f"{flag} goes with --adapt {methods}")
            return
        if self.adapt not in ADAPT_METHODS:
            names = f"{', '.join(ADAPT_METHODS[:-1])} and {ADAPT_METHODS[-1]}"
            raise InputError(f"--adapt {self.adapt}: there is {names}")
        if self.remember is not None and self.adapt != AUTO:
            raise InputError(f"--remember goes with --adapt {AUTO}")
        budget = self.adapt_budget
        if budget is not None and not 0 < budget <= 1:
            raise InputError(f"--adapt-budget {budget:g}: allowed is over 0, at most 1")
        if drafting.tree:
            raise InputError("--adapt drafts chains: leave out --tree")
        if self.save_profile is not None:
            from conflayers_cli.profile.schema import check_replaceable

            check_replaceable(self.save_profile)
        others = {
            "--batch-size": batch_size > 1 and self.adapt != AUTO,
            "--draft": drafting.method is not None,
            "--adaptive-draft-length": drafting.adaptive_draft_length is not None
            and not (self.adapt == AUTO and drafting.adaptive_draft_length),
        }
        for flag, given in others.items():
            if given:
                raise InputError(f"--adapt {self.adapt} drafts in its own way: leave {flag} out")


ADAPT = OptionGroup(
    adapt=_adapt_option(
        "--adapt",
        metavar="METHOD",
        help="Find out while generating what to leave out of drafts: auto (as without a profile), "
        "or by the papers' loops, conflayers or swift. With a profile, its set is where the "
        "search starts. The text stays the model's own.",
    ),
    adapt_budget=_adapt_option(
        "--adapt-budget",
        metavar="SHARE",
        help="Most of the time to spend on passes of the search, over 0 up to 1 "
        f"({BUDGET:g}; the papers' loops {DEFAULT_BUDGET:g}).",
    ),
    save_profile=_adapt_option(
        "--save-profile", metavar="FILE", help="Write what was found as a profile."
    ),
    remember=_adapt_option(
        "--remember/--no-remember",
        help="Begin with what earlier runs have found out about the model on this device, and "
        "keep what this one does (models --clear learnt forgets it). It changes the speed alone.",
    ),
)
AdaptFlags = Annotated[AdaptOptions, ADAPT]


@dataclass(frozen=True)
class SkipOnlyOptions:
    """Options about leaving layers out for good, each as its flag says."""

    skip_only: bool = False
    target_speedup: float | None = None

    def check(self, profile: Path | None, adapt: str | None, drafting: DraftOptions) -> None:
        """Raise InputError where options don't go together."""
        if not self.skip_only:
            if self.target_speedup is not None:
                raise InputError("--target-speedup goes with --skip-only")
            return
        about_drafting = {
            "--adapt": adapt,
            "--draft": drafting.method,
            "--adaptive-draft-length": drafting.adaptive_draft_length,
            "--tree": drafting.tree,
        }
        for flag, value in about_drafting.items():
            if value is not None:
                raise InputError(f"{flag} is about drafting, and --skip-only drafts nothing")
        if self.target_speedup is None and profile is None:
            raise InputError(
                "--skip-only needs --target-speedup S, or a --profile that says the layers"
            )
        if self.target_speedup is not None and profile is not None:
            raise InputError("--target-speedup and --profile: both say which layers; give one")
        check_target_speedup(self.target_speedup)


SKIP_ONLY = OptionGroup(
    skip_only=_lossy_option(
        "--skip-only",
        help="Decode with the skipped model alone: faster, but the text is NOT the model's own.",
    ),
    target_speedup=_lossy_option(
        "--target-speedup",
        metavar="S",
        help="With --skip-only: keep the model's depth over S layers, evenly spaced; "
        "without it, the profile's layers are left out.",
    ),
)
SkipOnlyFlags = Annotated[SkipOnlyOptions, SKIP_ONLY]
