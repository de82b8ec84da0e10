"""Whether side candidates pay: decoding with a tree, replayed on paper.

As in :mod:`.objective`, but at every position the draft's next-best tokens are traced too: where
the chain's token is refused and the model's choice stands beside it, the step keeps it and decides
one token more. Leaves are chosen by the very rule that drafting uses, with the measured costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from conflayers_cli.engine.cost_model import Costs
from conflayers_cli.search.objective import (
    SAME,
    Objective,
    Replay,
    Score,
    Setting,
    SideTrace,
    Trace,
    chain_lengths,
    runs_of,
)
from conflayers_cli.spec_decode.tree import TreeShape, leaf_counts


def with_tree(objective: Objective, score: Score, shape: TreeShape) -> Score | None:
    """The score with side candidates beside the chain; None where they gain nothing to speak of.

    Args:
        objective: has the texts and the costs.
        score: of the plan with its best chain.
        shape: how many candidates are wanted, before costs say how many stay.
    """
    if not score.plan or score.setting.max_tokens == 0:
        return None
    traces = objective.traces(score.plan)
    sides = objective.side_traces(score.plan, shape.most)
    draft = objective.costs.draft_cost(score.plan, objective.decoder.depth)
    setting = replace(score.setting, tree=shape)
    played = replay_tree(
        list(zip(traces, sides, strict=True)),
        setting,
        draft,
        objective.costs,
        only_draft=objective.decoder.invariance.bitwise,
    )
    speedup = played.tokens * objective.costs.verify_cost(1) / played.seconds
    if speedup <= score.speedup * (1 + SAME):
        return None
    return replace(score, setting=setting, speedup=speedup, replay=played)


def replay_tree(
    traces: Sequence[tuple[Trace, SideTrace]],
    setting: Setting,
    draft_cost: float,
    costs: Costs,
    *,
    only_draft: bool = False,
) -> Replay:
    """Greedy decoding of the traced texts with leaves beside the chain, on paper.

    Args:
        traces: texts under a plan.
        setting: with a tree.
        draft_cost: seconds per drafted token.
        costs: of verification.
        only_draft: the token behind a leaf that stands is not kept, but the next draft begins with
            it for nothing (half precision, see :mod:`conflayers_cli.spec_decode.tree`).

    Raises:
        ValueError: the setting has no tree.
    """
    if setting.tree is None:
        raise ValueError("a setting with a tree is needed")
    steps = drafted = accepted = tokens = 0
    seconds = 0.0
    for trace, side in traces:
        chain, run = chain_lengths(trace, setting), runs_of(trace.agrees)
        at = 0
        while at < len(trace.agrees):
            drafts = int(chain[at])
            span = slice(at, at + drafts)
            leaves = leaf_counts(
                trace.probability[span],
                side.beside[span],
                setting.tree,
                costs.verify_cost,
                draft_cost,
                only_draft=only_draft,
            )
            kept = min(drafts, int(run[at]))
            if kept < drafts and side.rank[at + kept] < leaves[kept]:  # an alternative stands
                if only_draft:
                    seconds -= draft_cost
                else:
                    kept += 1
            steps += 1
            drafted += drafts
            accepted += kept
            tokens += kept + 1
            seconds += drafts * draft_cost + costs.verify_cost(1 + drafts + sum(leaves))
            at += kept + 1
    return Replay(steps, drafted, accepted, tokens, seconds)
