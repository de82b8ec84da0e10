"""What a cell of the papers' table works on: a model, prompts of a task, and how much is done."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks import common
from benchmarks.paper_tasks import TaskPrompts
from conflayers_cli.bench.systems import BenchPrompt
from conflayers_cli.engine.cost_model import CostTable
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.errors import InputError
from conflayers_cli.generation.prompt_encoding import encode_prompt
from conflayers_cli.generation.prompts import Prompt
from conflayers_cli.models.loaded_model import LoadedModel
from conflayers_cli.search.problem import SearchProblem


@dataclass(frozen=True)
class Amount:
    """How much is done for a cell.

    Attributes:
        prompts, search_prompts: measured, and searched on.
        max_new_tokens, search_tokens: decoded of each, at the most.
        search_seconds: for a search, refining included: none begins another round after them.
        target_speedup: unified's.
        temperature: of what is measured; searches are greedy.
        runs, warmup: decodings of each prompt in each arm, and of one before them.
        arms: which are measured; vanilla always is.
    """

    prompts: int
    search_prompts: int
    max_new_tokens: int
    search_tokens: int
    search_seconds: float
    target_speedup: float
    temperature: float
    runs: int
    warmup: int
    arms: tuple[str, ...]


@dataclass(frozen=True)
class Work:
    """A model with the prompts of a task, as the model gets them."""

    name: str
    task: str
    loaded: LoadedModel
    decoder: Decoder
    costs: CostTable
    search: tuple[BenchPrompt, ...]
    figures: tuple[BenchPrompt, ...]

    @classmethod
    def of(
        cls,
        name: str,
        task: str,
        loaded: LoadedModel,
        decoder: Decoder,
        costs: CostTable,
        prompts: TaskPrompts,
        amount: Amount,
    ) -> Work:
        """Encode the prompts.

        Raises:
            InputError: none of them leaves room for the new tokens.
        """
        one, other = (
            fitting(loaded, own, count, tokens, prompts.raw)
            for own, count, tokens in (
                (prompts.search, amount.search_prompts, amount.search_tokens),
                (prompts.figures, amount.prompts, amount.max_new_tokens),
            )
        )
        return cls(name, task, loaded, decoder, costs, one, other)

    def search_problem(self, amount: Amount) -> SearchProblem:
        """What a strategy works on; made anew for each, so that none profits from another's."""
        return SearchProblem(
            self.decoder,
            tuple(prompt.tokens for prompt in self.search),
            self.costs.by_batch[1],
            amount.search_tokens,
            self.loaded.end_tokens,
            deadline=amount.search_seconds,
        )


def fitting(
    loaded: LoadedModel, prompts: Sequence[Prompt], count: int, tokens: int, raw: bool
) -> tuple[BenchPrompt, ...]:
    """The first prompts with which so many new tokens fit into the model's context.

    Longer ones are left out: an article cut short would be another task.

    Raises:
        InputError: there is none.
    """
    room = sys.maxsize if loaded.context_length is None else loaded.context_length - tokens
    found: list[BenchPrompt] = []
    for prompt in prompts:
        if len(found) == count:
            break
        try:
            encoded = tuple(encode_prompt(loaded, prompt, None, raw))
        except InputError as error:
            common.say(f"{prompt.id} is left out: {error}")
            continue
        if len(encoded) <= room:
            found.append(BenchPrompt(prompt.id, prompt.category, encoded, tokens))
        else:
            common.say(f"{prompt.id} is left out: {len(encoded):,} tokens, {room:,} have room")
    if not found:
        raise InputError(
            f"no prompt leaves room for {tokens:,} new tokens in the context of {loaded.name}"
        )
    return tuple(found)
