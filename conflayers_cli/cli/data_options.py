"""Options about a file of prompts that several commands take."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from conflayers_cli.cli import completion
from conflayers_cli.cli.option_groups import OptionGroup
from conflayers_cli.errors import InputError

if TYPE_CHECKING:
    from conflayers_cli.generation.prompts import Prompt

_prompts_option = partial(typer.Option, rich_help_panel="Prompts")


@dataclass(frozen=True)
class DataOptions:
    """Options about a file of prompts, each as its flag says."""

    data: Path | None = None
    max_prompts: int | None = None
    prompt_column: str | None = None
    strict: bool = False

    def check_reading(self) -> None:
        """Raise InputError for options about how a file is read, where there is none."""
        needing = {"--prompt-column": self.prompt_column is not None, "--strict": self.strict}
        for flag, given in needing.items():
            if given and not self.data:
                raise InputError(f"{flag} goes with --data, a file of prompts")

    def read(self, *, keep_answer: bool = False) -> list[Prompt]:
        """The prompts of the file, or those that come with the package.

        ``keep_answer``: as of `read_prompts`.

        Raises:
            InputError: the file can't be read or is refused.
        """
        from conflayers_cli.generation.prompts import builtin_prompts, read_prompts

        self.check_reading()
        if self.data is None:
            return builtin_prompts()[: self.max_prompts]
        return read_prompts(
            self.data,
            column=self.prompt_column,
            strict=self.strict,
            limit=self.max_prompts,
            keep_answer=keep_answer,
        )


DATA = OptionGroup(
    data=_prompts_option(
        "--data",
        metavar="FILE",
        help="Prompt file: JSON lines, JSON, CSV, TSV, Parquet, or text with a prompt a line; or "
        "hf:OWNER/NAME[:SPLIT], a data set of Hugging Face.",
        autocompletion=completion.files(
            *(".jsonl", ".json", ".jsonlines", ".ndjson", ".csv", ".tsv", ".parquet", ".txt")
        ),
    ),
    max_prompts=_prompts_option(
        "--max-prompts",
        min=1,
        metavar="N",
        help="Use only the first N prompts, and read no more of the file.",
    ),
    prompt_column=_prompts_option(
        "--prompt-column",
        metavar="NAME",
        help="With --data: the column, or the key of JSON, that is the prompt; by default prompt, "
        "messages, turns, conversations, instruction, question or article.",
    ),
    strict=_prompts_option(
        "--strict",
        help="With --data: refuse a file with a row that is no prompt, instead of skipping it.",
    ),
)
DataFlags = Annotated[DataOptions, DATA]
