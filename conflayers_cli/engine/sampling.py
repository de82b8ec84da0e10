"""Logits → the distribution really sampled from; the rules by which drafts are kept.

Order of the transforms as in transformers: repetition penalty, temperature, top-k, top-p, min-p.
Both the draft's and the target's distribution are taken *after* all of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from conflayers_cli.errors import InputError

from .best import NO_TOKEN, best_tokens
from .parallel import agreed

LEAST_SCALE = 1e-30
"""What scores are divided by at the least: float32 has few smaller numbers."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Temperature 0 is greedy, whatever the other settings.

    Raises:
        InputError: a value is outside its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        checks = (
            ("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 or more"),
            ("seed", self.seed, 0 <= self.seed < 2**63, "0 to 2^63 − 1"),
            ("top-k", self.top_k, self.top_k is None or self.top_k >= 1, "1 or more"),
            ("top-p", self.top_p, self.top_p is None or 0 < self.top_p <= 1, "over 0, at most 1"),
            ("min-p", self.min_p, self.min_p is None or 0 <= self.min_p <= 1, "0 to 1"),
            (
                "repetition-penalty",
                self.repetition_penalty,
                0 < self.repetition_penalty < math.inf,
                "over 0 (1 is none)",
            ),
        )
        for name, value, holds, allowed in checks:
            if not holds:
                raise InputError(f"--{name} {value}: allowed is {allowed}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


class Sampler:
    """The settings at work on one sequence: its random numbers and the tokens it has seen.

    Args:
        settings: how tokens are chosen.
        vocabulary: number of logits per position.
        device: where the logits are.
    """

    def __init__(self, settings: Sampling, vocabulary: int, device: torch.device) -> None:
        self.settings = settings
        self.generator = torch.Generator(device=device).manual_seed(settings.seed)
        self._seen: torch.Tensor | None = None
        if settings.repetition_penalty != 1:
            self._seen = torch.zeros(vocabulary, dtype=torch.bool, device=device)

    @property
    def penalises(self) -> bool:
        """Whether scores depend on the tokens seen."""
        return self._seen is not None

    def saw(self, tokens: Iterable[int]) -> None:
        """Note tokens that are part of the text now (prompt included), for the penalty."""
        if self._seen is not None:
            self._seen[list(tokens)] = True

    def scores(
        self,
        logits: torch.Tensor,
        drafted: Sequence[int] = (),
        parents: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Logits with the repetition penalty.

        Args:
            logits: ``[T, V]``, one row more than there are drafts: row 0 stands behind the text.
            drafted: tokens assumed after the text so far; row i + 1 has seen ``drafted[i]`` and
                what the row it stands behind has seen.
            parents: that row, ≤ i, for each draft; None: each stands behind the one before it.

        Returns:
            ``[T, V]``; the input itself where there is no penalty.
        """
        if self._seen is None:
            return logits
        rows = logits.shape[0]
        # Beyond these bounds numbers would overflow, and nothing else be any different.
        penalty = min(max(self.settings.repetition_penalty, LEAST_SCALE), 1 / LEAST_SCALE)
        seen = self._seen[: logits.shape[1]].repeat(rows, 1)
        behind = range(len(drafted)) if parents is None else parents
        for row, (token, parent) in enumerate(zip(drafted, behind, strict=True), 1):
            seen[row] = seen[parent]
            seen[row, token] = True
        logits = logits.float()
        return torch.where(
            seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits
        )

    def distribution(
        self,
        logits: torch.Tensor,
        drafted: Sequence[int] = (),
        parents: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Probabilities really sampled from: float32 ``[T, V]`` of logits ``[T, V]``; all of a
        row's NaN where its logits are not numbers.

        Only for temperatures above 0. ``drafted`` and ``parents`` as in :meth:`scores`.
        """
        settings = self.settings
        scores = self.scores(logits, drafted, parents).float()
        # The maximum first: a tiny temperature must not divide logits to infinity.
        scores = scores - scores.amax(dim=-1, keepdim=True)
        scores = scores / max(settings.temperature, LEAST_SCALE)
        if settings.top_k is not None and settings.top_k < scores.shape[-1]:
            least = scores.topk(settings.top_k, dim=-1).values[..., -1:]
            scores = scores.masked_fill(scores < least, float("-inf"))
        probabilities = torch.softmax(scores, dim=-1)
        if settings.top_p is not None and settings.top_p < 1:
            ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
            before = ordered.cumsum(dim=-1) - ordered
            outside = torch.zeros_like(before, dtype=torch.bool)
            outside.scatter_(-1, order, before >= settings.top_p)
            # On a GPU sums in order differ in their last bits from one time to the next.
            probabilities = agreed(_renormalised(probabilities.masked_fill(outside, 0.0)))
        if settings.min_p:
            least = probabilities.amax(dim=-1, keepdim=True) * settings.min_p
            probabilities = _renormalised(probabilities.masked_fill(probabilities < least, 0.0))
        return probabilities

    def choose(self, logits: torch.Tensor) -> int:
        """The next token from the logits ``[1, V]`` of the last position, or `NO_TOKEN`."""
        if self.settings.greedy:
            return int(best_tokens(self.scores(logits)))
        return self.draw(self.distribution(logits)[0])

    def draw(self, probabilities: torch.Tensor) -> int:
        """A token from ``[V]`` probabilities (need not be normalised); `NO_TOKEN` of NaN.

        By the inverse of their sums: an eighteenth of what ``multinomial`` takes on a CPU.
        Sums in float64 keep the tail; a token of probability 0 adds nothing and is never the first
        beyond a threshold.
        """
        sums = probabilities.cumsum(dim=-1, dtype=torch.float64)
        shape, device = (1,), self.generator.device
        uniform = torch.rand(shape, generator=self.generator, device=device, dtype=torch.float64)
        place = torch.searchsorted(sums, uniform * sums[-1:], right=True)
        # Rounding up to the whole sum is as good as impossible, and would be no token at all.
        last = torch.searchsorted(sums, sums[-1:])
        token = torch.minimum(place, last).masked_fill_(sums[-1:].isnan(), NO_TOKEN)
        return int(agreed(token))

    def draw_distinct(self, probabilities: torch.Tensor, count: int) -> list[int]:
        """``count`` tokens drawn one after another from ``[V]`` probabilities, none twice.

        As many must have a probability over 0 (they need not be normalised).
        """
        drawn: list[int] = torch.multinomial(
            probabilities, count, generator=self.generator
        ).tolist()
        return drawn

    def uniform(self, count: int) -> torch.Tensor:
        """``count`` random numbers from [0, 1), float32."""
        return torch.rand(count, generator=self.generator, device=self.generator.device)


def accept_greedy(
    drafted: Sequence[int], best: Sequence[int], leaves: Sequence[Sequence[int]] = ()
) -> tuple[int, int]:
    """Which drafts stand, and the token that follows them.

    Args:
        drafted: γ drafted tokens, a chain.
        best: the full model's choice at each row: behind the text, behind each draft, and behind
            each leaf, position by position; `NO_TOKEN` where it has none, and no draft stands.
        leaves: other candidates for each draft's place; empty: there are none anywhere.

    Returns:
        (row, token): the last row that stands, and the model's choice there, which may be
        `NO_TOKEN`. Row k ≤ γ: the first k drafts equal the model's choice. A row beyond: a leaf
        does, and the drafts before it.
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

    The candidates for a place are tried in turn, the draft first, then its leaves. Whatever is
    refused is the residual's matter from then on: p becomes max(0, p − q) and q loses the refused
    token, both normalised anew; the next candidate, drawn from that q, meets that p.

    Args:
        drafted: γ drafted tokens, a chain.
        target: p, ``[γ + 1 + leaves, V]``; rows as in :func:`accept_greedy`.
        draft: q, ``[γ, V]``; None where the tokens were not sampled (q is one at the token).
        sampler: gives the random numbers.
        leaves: other candidates for each draft's place, drawn from its q without replacement after
            it; empty: there are none anywhere.

    Returns:
        (row, token): the last row that stands, as in :func:`accept_greedy`. ``token`` comes from p
        there, or from what is left of it after the refusal of all candidates.
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
            p, q = _after_refusal(p, q, candidate)
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


def _after_refusal(
    p: torch.Tensor, q: torch.Tensor | None, token: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(residual of p, q without the token), ``[V]`` each; q None: it was one at the token."""
    if q is None:
        residual = _without(p, token)
    else:
        residual = (p - q).clamp_(min=0.0)
        q = _renormalised(_without(q, token))
    # p = q up to rounding leaves nothing to sample from; the rule's limit there is p itself.
    return torch.where(residual.sum() > 0, _renormalised(residual), p), q


def _without(probabilities: torch.Tensor, token: int) -> torch.Tensor:
    rest = probabilities.clone()
    rest[token] = 0.0
    return rest


def _renormalised(probabilities: torch.Tensor) -> torch.Tensor:
    return probabilities / probabilities.sum(dim=-1, keepdim=True)
