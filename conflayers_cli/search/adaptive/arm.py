"""One way of drafting among several: its proposer, what its passes cost, what it is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from conflayers_cli.engine.cost_model import CostTable
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.search.adaptive.pass_times import PassTimes, cost_table
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.mixed import MixedProposer

MAX_LENGTH = 12
"""Drafts considered when a way of drafting is judged, in tokens."""
CARE = 2.0
"""Standard deviations between an acceptance rate and its bounds."""
INT4_SHARE = 0.45
"""A draft pass of all layers in four bits over a full pass, before one was timed."""


@dataclass
class Arm:
    """A plan and its proposer.

    Attributes:
        plan: what drafting leaves out; the empty plan: only n-grams draft.
        share: guess of a draft pass's seconds over a full pass's, until one was timed.
        times: of draft passes.
        proposer: drafts.
        steps: decoded with it.
        rows: numbers of sequences that the proposer knows the costs of.
    """

    plan: SkipPlan
    share: float
    times: PassTimes
    proposer: MixedProposer = field(init=False)
    steps: int = 0
    rows: tuple[int, ...] = ()

    def draft_seconds(self, verify: PassTimes, rows: Sequence[int]) -> dict[int, float]:
        """Seconds of a draft pass of one token of each of so many sequences."""
        known = self.times.known
        found = (self.times if known else verify).costs(rows)
        return {row: seconds * (1 if known else self.share) for row, seconds in found.items()}

    def costs(self, verify: PassTimes, rows: Sequence[int], depth: int) -> CostTable:
        """What passes cost by now, for so many sequences; the proposer is to know it."""
        self.rows = tuple(rows)
        return cost_table(verify, self.draft_seconds(verify, rows), depth, rows)

    def speed(self, verify: PassTimes, deviations: float = 0.0) -> float:
        """Tokens a second of one sequence, over those without drafts, by the acceptance rate seen,
        or by a bound so many standard deviations off."""
        if not self.plan:
            return 1.0
        acceptance = self.proposer.policy.acceptance
        rate, (_, count) = acceptance.skip_rate, acceptance.skip_counts
        spread = (rate * (1 - rate) / (count + 1)) ** 0.5
        return speedup(rate + deviations * spread, self.draft_seconds(verify, (1,))[1], verify)


def speedup(rate: float, draft: float, verify: PassTimes) -> float:
    """Tokens a second of the best draft length over those without drafts.

    ``rate``: the chance of each drafted token; ``draft``: seconds of drafting one.
    """
    rate = min(max(rate, 0.0), 0.995)
    costs = verify.costs(range(1, MAX_LENGTH + 2))
    return max(
        (1 - rate ** (n + 1)) / (1 - rate) * costs[1] / (n * draft + costs[n + 1])
        for n in range(MAX_LENGTH + 1)
    )


def pass_share(depth: int, plan: SkipPlan, sizes: Mapping[str, float]) -> float:
    """What is read of the weights in a draft pass under a plan, over a full pass's.

    ``sizes``: of one layer's "attention" and "mlp", and of the "head", in any unit.
    """
    own = INT4_SHARE if plan.weights else 1.0
    every = depth * (sizes["attention"] + sizes["mlp"]) + sizes["head"]
    left_out = len(plan.attention) * sizes["attention"] + len(plan.mlp) * sizes["mlp"]
    return own * (every - left_out) / every


def weight_sizes(decoder: Decoder) -> dict[str, float]:
    """Numbers of the weights of a layer's sub-layers and of the head, by the configuration."""
    config = decoder.config
    hidden = int(config.hidden_size)
    heads = int(getattr(config, "num_attention_heads", 1))
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    width = int(getattr(config, "head_dim", None) or hidden // heads)
    inner = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    attention = hidden * width * 2 * (heads + kv_heads)
    return {
        "attention": float(attention),
        "mlp": float(3 * hidden * inner),
        "head": float(hidden * decoder.vocabulary),
    }
