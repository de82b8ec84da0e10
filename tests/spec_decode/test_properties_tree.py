"""Trees against an enumeration of their paths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.kernels.kv_cache import KVCache
from conflayers_cli.spec_decode.proposer import Context, Draft
from tests import tiny

CPU = torch.device("cpu")
SIZE = 8
Path = tuple[int, ...]
TOKENS = st.integers(0, SIZE - 1)
SIDES = st.lists(TOKENS, max_size=3, unique=True)
TREES = st.lists(st.tuples(TOKENS, SIDES), max_size=5).map(
    lambda places: Draft(
        tuple(token for token, _ in places), leaves=tuple(tuple(side) for _, side in places)
    )
)


def paths_of(draft: Draft) -> list[Path]:
    """Every way from the text to a node: the chain's first, then each leaf's, place by place."""
    paths = [draft.tokens[: i + 1] for i in range(len(draft.tokens))]
    for i, side in enumerate(draft.leaves):
        paths += [(*draft.tokens[:i], leaf) for leaf in side]
    return paths


@given(TREES)
def test_nodes_and_parents_are_the_paths(draft: Draft) -> None:
    """A node is the last token of its path; its parent's row is that of the path before it."""
    paths = paths_of(draft)
    assert draft.width == len(draft.nodes) == len(draft.parents) == len(paths)
    assert draft.nodes == tuple(path[-1] for path in paths)
    walked: list[Path] = [()]
    for node, parent in zip(draft.nodes, draft.parents, strict=True):
        assert parent < len(walked)
        walked.append((*walked[parent], node))
    assert walked[1:] == paths
    assert all(parent <= len(draft.tokens) for parent in draft.parents)  # leaves have no successors


@given(tokens=st.integers(0, 3), leaves=st.integers(0, 4), sources=st.integers(0, 4))
def test_entries_that_are_not_one_for_each_token_are_refused(
    tokens: int, leaves: int, sources: int
) -> None:
    entries: dict[str, Any] = {"leaves": ((),) * leaves, "sources": ("skip",) * sources}
    if leaves in (0, tokens) and sources in (0, tokens):
        assert Draft((1,) * tokens, **entries).width == tokens
    else:
        with pytest.raises(ValueError, match=f"for {tokens} tokens"):
            Draft((1,) * tokens, **entries)


@dataclass(frozen=True)
class Once:
    """Drafts one and the same."""

    drafted: Draft
    name: str = "once"

    def propose(self, context: Context, limit: int) -> Draft:
        return self.drafted


@settings(max_examples=40)
@given(draft=TREES, length=st.integers(1, 9))
def test_a_tree_is_verified_in_its_places(draft: Draft, length: int) -> None:
    """A node's position is the text's length and that of its path before it; its slot is the next
    one free, counted from the pending token: for the chain the same.
    """
    decoder, seen = tiny.decoder("llama"), list[list[list[int]]]()
    forward = decoder.forward

    def noting(
        tokens: torch.Tensor, positions: torch.Tensor, cache: KVCache, *rest: Any, **more: Any
    ) -> torch.Tensor:
        places = (tokens, positions, more.get("slots", positions))
        seen.append([each[0].tolist() for each in places])
        return forward(tokens, positions, cache, *rest, **more)

    proposer = Once(draft)
    one = Generation(decoder, GenerationRequest(tiny.prompt(length), 20), proposer=proposer)
    one.step()
    filled, pending = len(one.tokens) - 1, one.tokens[-1]
    with pytest.MonkeyPatch.context() as patch:
        tiny.through_logits(decoder, patch)
        patch.setattr(decoder, "forward", noting)
        one.step()
    ((tokens, positions, slots),) = seen
    paths = [(), *paths_of(draft)]
    assert tokens == [pending, *draft.nodes]
    assert positions == [filled + len(path) for path in paths]
    assert slots == [filled + row for row in range(len(paths))]


@given(
    drafted=st.lists(st.integers(0, 2), max_size=6),
    chosen=st.lists(st.integers(0, 2), min_size=7, max_size=7),
)
def test_a_chain_is_followed_as_far_as_it_is_the_models_choice(
    drafted: list[int], chosen: list[int]
) -> None:
    kept, token = Draft(tuple(drafted)).follow(chosen[: len(drafted) + 1])
    assert drafted[:kept] == chosen[:kept]
    assert token == chosen[kept]
    assert kept == len(drafted) or drafted[kept] != chosen[kept]
