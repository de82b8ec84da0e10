"""A text the model wrote, fed to drafts token by token in one pass (teacher forcing).

Of a long answer blocks are judged that are spread over it: what begins an answer is harder to
draft than what it goes on with. At every position the draft sees the full model's keys and values
of the tokens before and its own. Plans that are judged after one another differ in little, and what
comes before the first sub-layer that differs is the same. So with native kernels the hidden states
of one plan, the *anchor*, are kept for every sub-layer, and a pass begins where its plan parts from
it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.engine.effects import Effects, sub_layer_effects
from conflayers_cli.kernels.kv_cache import KVCache
from conflayers_cli.kernels.native_choice import MAX_TOP, NativeChoice, Resume
from conflayers_cli.kernels.native_forward import NativeForward
from conflayers_cli.search.corpus import Continuation
from conflayers_cli.skip_plan import SkipPlan

MAX_POSITIONS = 64
"""Of each text that plans are judged at."""
BLOCKS = 2
"""Parts of a longer answer with as many positions in each, one behind the other."""
MARGIN_TOP = 8
"""Most likely tokens of a draft among which the text's next one is looked for."""


@dataclass(frozen=True)
class Trace:
    """One text under a plan, position by position.

    Attributes:
        agrees: whether the draft's choice is the text's next token, bool ``[n]``.
        probability: the draft's probability of its own choice, float64 ``[n]``.
        margin: how far its logit of the text's next token is above all others', float64 ``[n]``,
            where that is not among the `MARGIN_TOP` highest, an upper bound; -inf: not finite.
    """

    agrees: npt.NDArray[np.bool_]
    probability: npt.NDArray[np.float64]
    margin: npt.NDArray[np.float64]

    @cached_property
    def runs(self) -> list[int]:
        """Length of the run of agreement that begins at each position."""
        return _distances(~self.agrees, len(self.agrees)).tolist()

    @cached_property
    def _draft_lengths(self) -> dict[float, list[int]]:
        return {}

    def draft_lengths(self, stop_probability: float) -> list[int]:
        """Tokens drafted from each position on, the stop token included, without a maximum."""
        if stop_probability not in self._draft_lengths:
            stops = self.probability < stop_probability
            lengths = _distances(stops, len(stops) - 1) + 1
            self._draft_lengths[stop_probability] = lengths.tolist()
        return self._draft_lengths[stop_probability]


@dataclass(frozen=True)
class SideTrace:
    """The draft's other candidates along one text.

    Attributes:
        beside: their probabilities at every position, falling, float64 ``[n, K]``.
        rank: index among them of the text's next token, ``[n]``; K where it is not there.
    """

    beside: npt.NDArray[np.float64]
    rank: npt.NDArray[np.int64]


class ForcedText:
    """A continuation to judge plans by; the full model reads it before the first.

    Args:
        decoder: the model.
        continuation: of at least 3 tokens.
        stride: the anchor's states are kept before every so many sub-layers; 0: nowhere. Without
            native kernels they never are.
        share: where in each part of a long answer its block lies, from 0 (first) to 1 (last).
    """

    def __init__(
        self, decoder: Decoder, continuation: Continuation, stride: int = 1, share: float = 0.0
    ) -> None:
        output, start = continuation.output, len(continuation.prompt)
        self._blocks = judged_blocks(len(output) - 1, share)
        at = torch.tensor([i for block in self._blocks for i in block], device=decoder.device)
        tokens = torch.tensor(output, device=decoder.device)
        self._decoder = decoder
        self._context = (*continuation.prompt, *output[: self._blocks[-1].stop])
        self._cache: KVCache | None = None
        self._input_ids, self._following = tokens[at][None], tokens[at + 1]
        self._positions = (start + at)[None]
        # Every drafted token has a slot behind the text: it sees the full model's keys and its own.
        self._slots = torch.arange(len(at), device=decoder.device)[None] + len(self._context)
        self._stride = stride if isinstance(decoder.passes.fused, NativeForward) else 0
        self._states: list[torch.Tensor | None] = []
        self.anchor: SkipPlan | None = None

    @property
    def size(self) -> int:
        """Positions judged at."""
        return self._input_ids.shape[1]

    @property
    def keeps_states(self) -> bool:
        """Whether there is any use of an anchor."""
        return self._stride > 0

    def trace(self, plan: SkipPlan, *, anchor: bool = False) -> Trace:
        """The text under a plan; ``anchor``: whether plans judged from now on are like it."""
        top = min(MARGIN_TOP, self._decoder.vocabulary)
        choice = self._choose(plan, top, anchor=anchor)
        if choice is None:
            return self._trace(*_top(self._logits(plan)))
        return self._trace(choice.top_tokens[0], choice.top_logits[0], choice.log_sum[0])

    @torch.inference_mode()
    def chained_trace(self, plan: SkipPlan, length: int) -> Trace:
        """The text in drafts of ``length`` tokens, each of which sees its draft's own keys and
        values of those before it, and the full model's of what precedes the draft."""
        cache, chosen, done = self._filled_cache(), [], 0
        for block in self._blocks:
            for begin in range(0, len(block), length):
                part = slice(done + begin, done + min(begin + length, len(block)))
                chosen.append(_top(self._drafted(cache, plan, part)))
            done += len(block)
        return self._trace(*(torch.cat(parts) for parts in zip(*chosen, strict=True)))

    def _drafted(self, cache: KVCache, plan: SkipPlan, part: slice) -> torch.Tensor:
        """A draft's logits ``[T, V]`` along consecutive positions; the cache is left as it was."""
        positions = self._positions[:, part]
        slots = slice(int(positions[0, 0]), int(positions[0, -1]) + 1)
        memory = [
            states[:, :, slots] for layer in cache.layers for states in (layer.keys, layer.values)
        ]
        kept = [states.clone() for states in memory]
        logits = self._decoder.forward(self._input_ids[:, part], positions, cache, plan)
        for states, before in zip(memory, kept, strict=True):
            states.copy_(before)
        return logits[0].float()

    def _trace(self, tokens: torch.Tensor, logits: torch.Tensor, log_sum: torch.Tensor) -> Trace:
        """Of the most likely tokens ``[n, K]`` and the logarithms of the sums ``[n]``."""
        probability = torch.exp(logits[:, 0] - log_sum)
        finite = probability.isfinite()  # logits with NaN choose nothing
        is_next = tokens == self._following[:, None]
        at = torch.where(is_next.any(-1), is_next.int().argmax(-1), tokens.shape[-1] - 1)
        own = logits.gather(-1, at[:, None])[:, 0]
        agrees = finite & is_next[:, 0]
        margin = torch.where(is_next[:, 0], logits[:, 0] - logits[:, 1], own - logits[:, 0])
        values = (probability.where(finite, 0.0), margin.where(finite, -torch.inf))
        return Trace(agrees.cpu().numpy(), *(each.double().cpu().numpy() for each in values))

    def side_trace(self, plan: SkipPlan, count: int) -> SideTrace:
        """The draft's ``count`` next-best candidates along the text."""
        count = min(count + 1, self._decoder.vocabulary)
        choice = self._choose(plan, count) if count <= MAX_TOP else None
        if choice is not None:
            indices = choice.top_tokens[0]
            values = torch.exp(choice.top_logits[0] - choice.log_sum[0, :, None]).nan_to_num(0.0)
        else:
            values, indices = torch.softmax(self._logits(plan), -1).nan_to_num(0.0).topk(count)
        found = indices[:, 1:] == self._following[:, None]
        rank = torch.where(found.any(-1), found.int().argmax(-1), found.shape[-1])
        return SideTrace(values[:, 1:].double().cpu().numpy(), rank.cpu().numpy())

    def effects(self) -> Effects:
        """How much each sub-layer of the full model changes the hidden states along the text."""
        return sub_layer_effects(
            self._decoder, self._input_ids, self._positions, self._filled_cache(), self._slots
        )

    def _filled_cache(self) -> KVCache:
        if self._cache is None:
            decoder = self._decoder
            self._cache = decoder.new_cache(len(self._context) + self.size)
            decoder.prefill(torch.tensor([self._context], device=decoder.device), self._cache)
        return self._cache

    def _logits(self, plan: SkipPlan) -> torch.Tensor:
        logits = self._decoder.forward(
            self._input_ids, self._positions, self._filled_cache(), plan, slots=self._slots
        )
        return logits[0].float()

    def _choose(self, plan: SkipPlan, top: int = 0, *, anchor: bool = False) -> NativeChoice | None:
        resume = self._resume(plan, anchor) if self._stride else None
        choice = self._decoder.choose(
            self._input_ids,
            self._positions,
            self._filled_cache(),
            plan,
            slots=self._slots,
            top=top,
            resume=resume,
        )
        if anchor and choice is not None and self.keeps_states:
            self.anchor = plan
        return choice

    def _resume(self, plan: SkipPlan, anchor: bool) -> Resume | None:
        """Where a pass under a plan can begin with the anchor's states, and what it is to keep."""
        count = 2 * self._decoder.depth
        if anchor and not self._states:
            shape = (1, self.size, int(self._decoder.config.hidden_size))
            self._states = [
                torch.empty(shape, dtype=self._decoder.dtype)
                if i and i % self._stride == 0
                else None
                for i in range(count)
            ]
        if not self._states:
            return None
        begin, entry = self._entry(plan)
        if anchor:
            self.anchor = None  # until the pass is through
        return Resume(self._states if anchor else (None,) * count, begin, entry)

    def _entry(self, plan: SkipPlan) -> tuple[int, torch.Tensor | None]:
        """The last sub-layer that a pass can begin at, and its states."""
        anchor = self.anchor
        if anchor is None or anchor.weights != plan.weights:
            return 0, None
        runs, differs = _runs(anchor, self._decoder.depth), _runs(plan, self._decoder.depth)
        first = next(
            (i for i, (a, b) in enumerate(zip(runs, differs, strict=True)) if a != b), None
        )
        for begin in range(len(runs) - 1 if first is None else first, 0, -1):
            # What is left out between changes nothing.
            holder = next((i for i in range(begin, len(runs)) if runs[i]), None)
            if holder is not None and self._states[holder] is not None:
                return begin, self._states[holder]
        return 0, None


def judged_blocks(count: int, share: float = 0.0) -> list[range]:
    """The positions of an answer that plans are judged at: all ``count``, or of more than
    `MAX_POSITIONS` a block in each of `BLOCKS` parts of it (``share``: see `ForcedText`)."""
    if count <= MAX_POSITIONS:
        return [range(count)]
    size = MAX_POSITIONS // BLOCKS
    begins = (i * count // BLOCKS for i in range(BLOCKS))
    shift = round(share * (count // BLOCKS - size))
    return [range(begin + shift, begin + shift + size) for begin in begins]


def _top(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of logits ``[T, V]`` the most likely tokens and their logits, ``[T, K]``, the highest first,
    and the logarithm of the sum of all exponentials, ``[T]``."""
    found = logits.topk(min(MARGIN_TOP, logits.shape[-1]), dim=-1)
    first = logits.argmax(dim=-1, keepdim=True)  # of equal logits the first token's
    swapped = found.indices.where(found.indices != first, found.indices[:, :1])
    tokens = torch.cat([first, swapped[:, 1:]], dim=-1)
    return tokens, found.values, torch.logsumexp(logits, dim=-1)


def _runs(plan: SkipPlan, depth: int) -> list[bool]:
    """Whether each sub-layer runs, counted attention, MLP by layer."""
    attention, mlp = set(plan.attention), set(plan.mlp)
    return [i not in skipped for i in range(depth) for skipped in (attention, mlp)]


def _distances(ends: npt.NDArray[np.bool_], last: int) -> npt.NDArray[np.int64]:
    """Distance from each position to the first one in ``ends`` from there on, else to ``last``."""
    at = np.arange(len(ends))
    positions = np.append(np.flatnonzero(ends), last)
    return positions[np.searchsorted(positions[:-1], at)] - at
