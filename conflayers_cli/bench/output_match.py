"""Whether outputs equal vanilla's and, where they diverge, how close the choice was."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from conflayers_cli.bench.agreement import first_difference
from conflayers_cli.bench.schema import VANILLA, Divergence, OutputMatch
from conflayers_cli.bench.systems import PromptRuns
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.engine.sampler import Sampler
from conflayers_cli.sampling_params import SamplingParams


def match_outputs(
    names: Iterable[str], prompts: Sequence[PromptRuns], decoder: Decoder, sampling: SamplingParams
) -> dict[str, OutputMatch]:
    """The outputs of systems compared with those of ``vanilla``, by system."""
    matches = {}
    for name in names:
        parted = [d for runs in prompts if (d := _divergence(runs, name, decoder, sampling))]
        matches[name] = OutputMatch(
            matching=len(prompts) - len(parted), total=len(prompts), divergences=parted
        )
    return matches


def _divergence(
    prompt: PromptRuns, system: str, decoder: Decoder, sampling: SamplingParams
) -> Divergence | None:
    """The first difference in any of the runs."""
    for vanilla, other in zip(prompt.runs[VANILLA], prompt.runs[system], strict=True):
        one, two = vanilla.tokens, other.tokens
        at = first_difference(one, two)
        if at is None:
            continue
        return Divergence(
            id=prompt.prompt.id,
            position=at,
            gap=_gap(decoder, [*prompt.prompt.tokens, *one[:at]], sampling),
            vanilla=one[at] if at < len(one) else None,
            other=two[at] if at < len(two) else None,
        )
    return None


def _gap(decoder: Decoder, context: Sequence[int], sampling: SamplingParams) -> float:
    """Difference of the two best logits of the token after ``context``."""
    tokens = torch.tensor([list(context)], device=decoder.device)
    logits = decoder.prefill(tokens, decoder.new_cache(len(context)))[0]
    sampler = Sampler(sampling, decoder.vocabulary, decoder.device)
    sampler.mark_seen(context)
    best = sampler.scores(logits)[0].float().topk(2).values
    return float(best[0] - best[1])
