"""Which drafted tokens the target accepts: by its own choice (greedy), or by rejection sampling.

Speculative sampling: arXiv 2211.17192, algorithm 1, with several candidates for one position.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from conflayers_cli.engine.sampler import Sampler, renormalize


def accept_greedy(
    drafted: Sequence[int], best: Sequence[int], leaves: Sequence[Sequence[int]] = ()
) -> tuple[int, int]:
    """Which drafts are accepted, and the token that follows them.

    Args:
        drafted: γ drafted tokens, a chain.
        best: the full model's choice at each row: behind the text, behind each draft, and behind
            each leaf, position by position; `INVALID_TOKEN` where it has none, and no draft is
            accepted.
        leaves: other candidates for each draft's position; empty: there are none anywhere.

    Returns:
        (row, token): the last row accepted, and the model's choice there, which may be
        `INVALID_TOKEN`. Row k ≤ γ: the first k drafts equal the model's choice. A row beyond: a
        leaf does, and the drafts before it.
    """
    kept = 0
    while kept < len(drafted) and drafted[kept] == best[kept]:
        kept += 1
    if leaves and kept < len(drafted) and best[kept] in leaves[kept]:
        before = sum(map(len, leaves[:kept])) + leaves[kept].index(best[kept])
        kept = len(drafted) + 1 + before
    return kept, best[kept]


def accept_sampled(
    drafted: Sequence[int],
    target: torch.Tensor,
    draft: torch.Tensor | None,
    sampler: Sampler,
    leaves: Sequence[Sequence[int]] = (),
) -> tuple[int, int]:
    """Speculative sampling (arXiv 2211.17192, algorithm 1): the result has the target's law.

    The candidates for a position are tried in turn, the draft first, then its leaves. Whatever is
    rejected leaves a residual: p becomes max(0, p − q) and q loses the rejected token, both
    normalised anew; the next candidate, drawn from that q, meets that p.

    Args:
        drafted: γ drafted tokens, a chain.
        target: p, ``[γ + 1 + leaves, V]``; rows as in :func:`accept_greedy`.
        draft: q, ``[γ, V]``; None where the tokens were not sampled (q is one at the token).
        sampler: gives the random numbers.
        leaves: other candidates for each draft's position, drawn from its q without replacement
            after it; empty: there are none anywhere.

    Returns:
        (row, token): the last row accepted, as in :func:`accept_greedy`. ``token`` comes from p
        there, or from what is left of it after all candidates were rejected.
    """
    leaf_rows = itertools.count(len(drafted) + 1)
    first, chances = _first_chances(drafted, target, draft, sampler, sum(map(len, leaves)))
    for i, token in enumerate(drafted):
        p, q = target[i], None if draft is None else draft[i]
        p_candidate, q_candidate = first[i]
        # Numbered before any is tried: rows of leaves that go untried count all the same.
        side = list(zip(leaves[i], leaf_rows, strict=False)) if leaves else []
        for candidate, row in ((token, i + 1), *side):
            if row > len(drafted):
                p_candidate = float(p[candidate])
                q_candidate = 1.0 if q is None else float(q[candidate])
            if chances[row - 1] * q_candidate < p_candidate:
                break
            p, q = _after_rejection(p, q, candidate)
        else:
            return i, sampler.draw(p)
        if row > len(drafted):
            return row, sampler.draw(target[row])
    return len(drafted), sampler.draw(target[len(drafted)])


def _first_chances(
    drafted: Sequence[int],
    target: torch.Tensor,
    draft: torch.Tensor | None,
    sampler: Sampler,
    leaves: int,
) -> tuple[list[tuple[float, float]], list[float]]:
    """((p, q) of each drafted token, a random number for each of them and of the leaves).

    Read from the device all at once: every read waits for it.
    """
    if not drafted:
        return [], []
    tokens = torch.tensor(drafted).to(target.device, non_blocking=True)[:, None]
    p = target[: len(drafted)].gather(1, tokens)[:, 0]
    q = torch.ones_like(p) if draft is None else draft.gather(1, tokens)[:, 0]
    read: list[float] = torch.cat([p, q, sampler.uniform(len(drafted) + leaves)]).tolist()
    count = len(drafted)
    return list(zip(read[:count], read[count : 2 * count], strict=True)), read[2 * count :]


def _after_rejection(
    p: torch.Tensor, q: torch.Tensor | None, token: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(residual of p, q without the token), ``[V]`` each; q None: it was one at the token."""
    if q is None:
        residual = _without(p, token)
    else:
        residual = (p - q).clamp_(min=0.0)
        q = renormalize(_without(q, token))
    # p = q up to rounding leaves nothing to sample from; the rule's limit there is p itself.
    return torch.where(residual.sum() > 0, renormalize(residual), p), q


def _without(probabilities: torch.Tensor, token: int) -> torch.Tensor:
    rest = probabilities.clone()
    rest[token] = 0.0
    return rest
