"""Whether outputs are the same as vanilla's and, where they part, how close the choice was."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from conflayers_cli.bench.agreement import first_difference
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.engine.sampler import Sampler
from conflayers_cli.sampling_params import SamplingParams

if TYPE_CHECKING:
    from conflayers_cli.bench.runner import CaseRuns


@dataclass(frozen=True)
class Divergence:
    """Where an arm's greedy output leaves the vanilla one.

    Attributes:
        id: the prompt.
        position: index of the first new token that differs.
        gap: between the two best scores there, by the whole model.
        vanilla: the vanilla arm's token, None where its output has ended.
        other: the other arm's.
    """

    id: str
    position: int
    gap: float
    vanilla: int | None
    other: int | None


@dataclass(frozen=True)
class Identity:
    """How many prompts' greedy outputs equal the vanilla ones, and where the others part."""

    matching: int
    total: int
    divergences: tuple[Divergence, ...]


def identities(
    names: Iterable[str], cases: Sequence[CaseRuns], decoder: Decoder, sampling: SamplingParams
) -> dict[str, Identity]:
    """The outputs of arms compared with those of the arm ``vanilla``."""
    found = {}
    for name in names:
        parted = [d for case in cases if (d := _divergence(case, name, decoder, sampling))]
        found[name] = Identity(len(cases) - len(parted), len(cases), tuple(parted))
    return found


def _divergence(
    case: CaseRuns, arm: str, decoder: Decoder, sampling: SamplingParams
) -> Divergence | None:
    """The first difference in any of the runs."""
    for vanilla, other in zip(case.runs["vanilla"], case.runs[arm], strict=True):
        one, two = vanilla.tokens, other.tokens
        at = first_difference(one, two)
        if at is None:
            continue
        text = [*case.case.tokens, *one[:at]]
        return Divergence(
            case.case.id,
            at,
            _gap(decoder, text, sampling),
            one[at] if at < len(one) else None,
            two[at] if at < len(two) else None,
        )
    return None


def _gap(decoder: Decoder, text: Sequence[int], sampling: SamplingParams) -> float:
    """Between the two best scores of the token behind a text."""
    tokens = torch.tensor([list(text)], device=decoder.device)
    logits = decoder.prefill(tokens, decoder.new_cache(len(text)))[0]
    sampler = Sampler(sampling, decoder.vocabulary, decoder.device)
    sampler.saw(text)
    best = sampler.scores(logits)[0].float().topk(2).values
    return float(best[0] - best[1])
