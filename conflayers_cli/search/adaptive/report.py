"""What a run has learnt while drafting, in a sentence and as a profile."""

from __future__ import annotations

from collections.abc import Sequence

from conflayers_cli.generation.prompts import Prompt, fingerprint
from conflayers_cli.models.loaded_model import LoadedModel
from conflayers_cli.profile.check import current_environment, fingerprint_model
from conflayers_cli.profile.describe import skipped
from conflayers_cli.profile.schema import (
    DraftSettings,
    FoundBy,
    Measured,
    Profile,
    PromptsUsed,
    SkipSection,
)
from conflayers_cli.search.adaptive.arm import MAX_LENGTH
from conflayers_cli.search.adaptive.proposer import AutoProposer


def describe(proposer: AutoProposer, depth: int) -> str:
    """Who drafts by now, how long it took to find out, and what share of the time."""
    plan = proposer.best.plan
    weights = f"{plan.weights} weights" if plan.weights else "the model's own weights"
    how = f"{weights}, skipping {skipped(plan, depth)}" if len(plan) else weights
    drafts = f"drafts use {how}" if plan else "only n-grams draft so far"
    if proposer.settled_after is None:
        state = "still searching" if proposer.tried else "the text was too short for a search"
    elif proposer.tried:
        state = f"settled after {proposer.settled_after:,} tokens, {proposer.tried} sets tried"
    else:
        state = "as an earlier run or the profile had found"
    shares = (
        f"setting up took {proposer.setup_seconds:.2f} s, "
        f"the search {proposer.search_share:.1%} of the time"
    )
    return f"adapt: {drafts} ({state}); {shares}"


def learnt_profile(
    loaded: LoadedModel, proposer: AutoProposer, prompts: Sequence[Prompt], budget: float
) -> Profile:
    """The profile of what drafts now; ``prompts``: what was generated from."""
    best, model = proposer.best, fingerprint_model(loaded)
    rate = best.proposer.policy.acceptance.skip_rate
    return Profile(
        model=model,
        skip=SkipSection.of(best.plan),
        draft=DraftSettings(
            by="mixed" if best.plan else "ngram",
            max_tokens=MAX_LENGTH if best.plan else 0,
            stop_probability=0.0,
        ),
        found_by=FoundBy(
            strategy="auto",
            refined=False,
            settings={"on_the_fly": True, "adapt_budget": budget},
            seed=0,
            prompts=PromptsUsed(count=len(prompts), sha256=fingerprint(prompts)),
        ),
        measured=Measured(
            acceptance_rate=rate if best.plan else None,
            tokens_per_step=None,
            expected_speedup=proposer.expected_speedup if best.plan else None,
            measured_speedup=None,
            iterations=proposer.tried,
            seconds=proposer.search_seconds,
            conclusion=describe(proposer, model.depth),
        ),
        environment=current_environment(loaded),
    )
