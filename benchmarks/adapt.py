"""Drafting without a profile: from the first token on, over a stream whose task changes.

A stream of prompts is decoded by every arm in turn, prompt by prompt, so that all meet the same
moments of the machine: plainly, with drafts that learn (`generate` as it comes), by a calibrated
profile, and by the papers' loops. Then once more by what a second process would begin with. Shown
is the speed over plain decoding by how many tokens the stream has come to.

    python -m benchmarks.adapt --data spec_bench.jsonl --profile profiles/smollm2-deep.yaml
    python -m benchmarks.adapt --tasks qa writing qa --arms auto --quick
"""

from __future__ import annotations

import argparse
import itertools
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import common
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.engine.open_model import open_model
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.prompts import Prompt, as_messages, builtin_prompts, read_prompts
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.models.load_options import LoadOptions
from conflayers_cli.models.loaded_model import LoadedModel
from conflayers_cli.models.tokenization import encode
from conflayers_cli.profile.build_proposer import build_proposer
from conflayers_cli.profile.schema import Profile
from conflayers_cli.search.adaptive.proposer import AutoProposer, Learnt
from conflayers_cli.search.adaptive.report import describe
from conflayers_cli.search.online import AdaptiveProposer
from conflayers_cli.search.open_proposer import BUDGET
from conflayers_cli.spec_decode.options import DraftOptions
from conflayers_cli.spec_decode.proposer import Proposer
from conflayers_cli.utils.environment import describe_environment
from conflayers_cli.utils.files import write_json

ARMS = ("auto", "profile", "conflayers", "swift")
BORDERS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""Tokens of the stream, counted from its begin, between which speeds are compared."""


@dataclass
class Arm:
    """One way to decode the stream: what it took, token by token."""

    proposer: Proposer | None
    tokens: list[int] = field(default_factory=lambda: [0])
    seconds: list[float] = field(default_factory=lambda: [0.0])
    outputs: list[list[int]] = field(default_factory=list)

    def decode(self, decoder: Decoder, loaded: LoadedModel, request: GenerationRequest) -> None:
        """Decode a prompt; the pass over it is not counted."""
        generation = Generation(
            decoder, request, proposer=self.proposer, end_tokens=loaded.end_tokens
        )
        for step in list(generation)[1:]:
            self.tokens.append(self.tokens[-1] + len(step.tokens))
            self.seconds.append(self.seconds[-1] + step.seconds)
        self.outputs.append(generation.output)

    def seconds_at(self, tokens: float) -> float:
        """Seconds that the first so many tokens of the stream took."""
        at = bisect_left(self.tokens, tokens)
        if at == 0 or at == len(self.tokens) or self.tokens[at] == tokens:
            return self.seconds[min(at, len(self.tokens) - 1)]
        before, after = self.tokens[at - 1], self.tokens[at]
        share = (tokens - before) / (after - before)
        return self.seconds[at - 1] + share * (self.seconds[at] - self.seconds[at - 1])


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = common.plain_parser(__doc__)
    parser.add_argument("--data", type=Path, help="prompts with categories; else our own")
    parser.add_argument("--model", default="smollm2-deep")
    parser.add_argument("--profile", type=Path, help="of the arm 'profile'")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--tasks", nargs="+", default=["summarization", "qa", "summarization"])
    parser.add_argument("--per-task", type=int, default=5)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--dtype", default="auto")
    common.add_output(parser)
    options = parser.parse_args(arguments)
    if options.quick:
        options.per_task, options.max_new_tokens = 1, 24
    return options


def stream_of(options: argparse.Namespace) -> list[tuple[str, Prompt]]:
    """(task, prompt) in order; a task that comes again goes on with its next prompts."""
    prompts = read_prompts(options.data) if options.data else builtin_prompts()
    rest = {task: [p for p in prompts if p.category == task] for task in set(options.tasks)}
    found = []
    for task in options.tasks:
        own, rest[task] = rest[task][: options.per_task], rest[task][options.per_task :]
        found += [(task, prompt) for prompt in own]
    return found


def proposers(
    loaded: LoadedModel, decoder: Decoder, options: argparse.Namespace, keep: list[Learnt]
) -> dict[str, Callable[[], Proposer | None]]:
    """How each arm's proposer is made."""

    def by_profile() -> Proposer | None:
        path = options.profile or common.PROFILES / f"{options.model}.yaml"
        profile = Profile.load(path)
        return build_proposer(loaded, decoder, profile, path, False, DraftOptions())

    return {
        "auto": lambda: AutoProposer(decoder, budget=BUDGET, keep=keep.append),
        "profile": by_profile,
        "conflayers": lambda: AdaptiveProposer(decoder, "conflayers"),
        "swift": lambda: AdaptiveProposer(decoder, "swift"),
    }


def run_stream(
    loaded: LoadedModel,
    decoder: Decoder,
    arms: dict[str, Arm],
    stream: Sequence[tuple[str, Prompt]],
    budget: int,
) -> list[int]:
    """Decode the stream by all arms in turn; returns where each prompt begins, in tokens."""
    begins = []
    for number, (task, prompt) in enumerate(stream):
        request = GenerationRequest(encode(loaded, as_messages(prompt, None), None), budget)
        begins.append(arms["plain"].tokens[-1])
        names = list(arms)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            arms[name].decode(decoder, loaded, request)
        common.say(f"{number + 1}/{len(stream)} {task}")
    return begins


def ratios(arms: dict[str, Arm], borders: Sequence[int]) -> dict[str, list[float]]:
    """Each arm's speed over plain decoding between two borders."""
    plain, found = arms["plain"], dict[str, list[float]]()
    for name, arm in arms.items():
        found[name] = [
            (plain.seconds_at(end) - plain.seconds_at(begin))
            / max(arm.seconds_at(end) - arm.seconds_at(begin), 1e-9)
            for begin, end in itertools.pairwise(borders)
        ]
    return found


def show(arms: dict[str, Arm], borders: Sequence[int]) -> dict[str, Any]:
    """Print the speeds between borders; returns them."""
    found = ratios(arms, borders)
    names = [name for name in arms if name != "plain"]
    common.say("tokens".ljust(14) + "".join(name.rjust(12) for name in names))
    for i, (begin, end) in enumerate(itertools.pairwise(borders)):
        cells = "".join(f"{found[name][i]:.2f}×".rjust(12) for name in names)
        common.say(f"{begin}–{end}".ljust(14) + cells)
    total = arms["plain"].tokens[-1]
    whole = {name: ratios(arms, (0, total))[name][0] for name in names}
    common.say("all".ljust(14) + "".join(f"{whole[name]:.2f}×".rjust(12) for name in names))
    same = {
        name: sum(a == b for a, b in zip(arm.outputs, arms["plain"].outputs, strict=True))
        for name, arm in arms.items()
    }
    common.say(f"texts that are plain decoding's, of {len(arms['plain'].outputs)}: {same}")
    speed = total / arms["plain"].seconds[-1]
    return {
        "borders": list(borders),
        "over_plain": found,
        "whole": whole,
        "plain_tokens_per_second": speed,
        "identical": same,
        "outputs": len(arms["plain"].outputs),
    }


def tasks_borders(stream: Sequence[tuple[str, Prompt]], begins: list[int], end: int) -> list[int]:
    """Where the task changes, in tokens of the stream."""
    changes = [
        begin for i, begin in enumerate(begins) if i == 0 or stream[i][0] != stream[i - 1][0]
    ]
    return [*changes, end]


def main(arguments: Sequence[str] | None = None) -> None:
    """Decode the stream, print, write."""
    options = parse_options(arguments)
    loaded, decoder = open_model(options.model, LoadOptions(device="cpu", dtype=options.dtype))
    kept: list[Learnt] = []
    make, stream = proposers(loaded, decoder, options, kept), stream_of(options)
    arms = {"plain": Arm(None), **{name: Arm(make[name]()) for name in options.arms}}
    begins = run_stream(loaded, decoder, arms, stream, options.max_new_tokens)
    total = arms["plain"].tokens[-1]
    document: dict[str, Any] = {
        "model": options.model,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "tasks": options.tasks,
        "environment": describe_environment(loaded.device),
        "cold": show(arms, [0, *(border for border in BORDERS if border < total), total]),
    }
    document["by_task"] = show(arms, tasks_borders(stream, begins, total))
    learning = arms["auto"].proposer if "auto" in arms else None
    if isinstance(learning, AutoProposer):
        document["story"] = describe(learning, decoder.depth)
        document["search_share"] = learning.search_share
        common.say(document["story"])
        learning.save()
    if kept:
        common.say("by what a second process begins with:")
        again: dict[str, Arm] = {
            "plain": Arm(None),
            "again": Arm(AutoProposer(decoder, budget=BUDGET, learnt=kept[-1])),
        }
        if "profile" in arms:
            again["profile"] = Arm(arms["profile"].proposer)
        run_stream(loaded, decoder, again, stream, options.max_new_tokens)
        document["again"] = show(again, [0, *(b for b in BORDERS if b < total), total])
    if options.output:
        write_json(options.output, document)


if __name__ == "__main__":
    main()
