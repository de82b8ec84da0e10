"""Decoding prompts to the end, one by one or several at once: texts, tokens, and what it took."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, cast

from conflayers_cli.engine.decoder import FULL, Decoder
from conflayers_cli.generation.batch import Batch, BatchRequest
from conflayers_cli.generation.detokenizer import TextStream
from conflayers_cli.generation.loop import Finish, Generation, Step
from conflayers_cli.generation.prefix_cache import Conversation
from conflayers_cli.positions import AcceptedPerPosition, count_positions, merge
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.proposer import BatchProposer, Proposer


@dataclass(frozen=True)
class DraftCount:
    """What one drafter did."""

    steps: int = 0
    drafted: int = 0
    accepted: int = 0

    def __add__(self, other: DraftCount) -> DraftCount:
        return DraftCount(
            self.steps + other.steps,
            self.drafted + other.drafted,
            self.accepted + other.accepted,
        )


@dataclass(frozen=True)
class Summary:
    """What decoding took, the prompt's pass apart from the rest.

    Attributes:
        prefill_seconds: the pass over the prompt, which also decides the first token.
        decode_seconds: all steps behind it.
        tokens: tokens produced.
        decode_tokens: those of the steps behind the prefill.
        steps: those steps.
        by_drafter: what each drafter did in them; steps without a draft are not in it.
        draft_seconds: the part of ``decode_seconds`` spent on drafts that held a token.
        by_position: what each drafter did by place in the draft.
    """

    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    tokens: int = 0
    decode_tokens: int = 0
    steps: int = 0
    by_drafter: Mapping[str, DraftCount] = field(default_factory=dict)
    draft_seconds: float = 0.0
    by_position: Mapping[str, AcceptedPerPosition] = field(default_factory=dict)

    @classmethod
    def of(cls, steps: Iterable[Step]) -> Summary:
        """The summary of a generation's steps."""
        return cls.total(map(_of_step, steps))

    @classmethod
    def total(cls, summaries: Iterable[Summary]) -> Summary:
        """One summary of several generations."""
        parts = list(summaries)
        drafters: dict[str, DraftCount] = {}
        positions: dict[str, AcceptedPerPosition] = {}
        for part in parts:
            positions = merge(positions, part.by_position)
            for name, count in part.by_drafter.items():
                drafters[name] = drafters.get(name, DraftCount()) + count
        return cls(
            prefill_seconds=sum(part.prefill_seconds for part in parts),
            decode_seconds=sum(part.decode_seconds for part in parts),
            tokens=sum(part.tokens for part in parts),
            decode_tokens=sum(part.decode_tokens for part in parts),
            steps=sum(part.steps for part in parts),
            by_drafter=drafters,
            draft_seconds=sum(part.draft_seconds for part in parts),
            by_position=positions,
        )

    @property
    def drafted(self) -> int:
        """Tokens drafted."""
        return sum(count.drafted for count in self.by_drafter.values())

    @property
    def accepted(self) -> int:
        """Drafted tokens that were kept."""
        return sum(count.accepted for count in self.by_drafter.values())

    @property
    def tokens_per_second(self) -> float | None:
        """Of decoding, without the prefill; None where nothing was decoded behind it."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds > 0 else None

    @property
    def acceptance_rate(self) -> float | None:
        """The share of drafted tokens that were kept; None where nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def drafted_by(self) -> str | None:
        """Who drafted how much, for people; None unless several did."""
        if len(self.by_drafter) < 2:
            return None
        parts = (
            f"{name} {count.drafted} ({count.accepted / count.drafted:.1%} accepted)"
            for name, count in self.by_drafter.items()
        )
        return f"drafted by: {', '.join(parts)}"

    @property
    def tokens_per_step(self) -> float | None:
        """Tokens per full pass behind the prefill; None where there was none."""
        return self.decode_tokens / self.steps if self.steps else None

    def as_json(self) -> dict[str, Any]:
        """The summary as JSON takes it."""
        return {
            "prefill_seconds": round(self.prefill_seconds, 6),
            "decode_seconds": round(self.decode_seconds, 6),
            "tokens": self.tokens,
            "decode_tokens": self.decode_tokens,
            "steps": self.steps,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "tokens_per_second": self.tokens_per_second,
            "acceptance_rate": self.acceptance_rate,
            "tokens_per_step": self.tokens_per_step,
            "by_drafter": {
                name: {"steps": c.steps, "drafted": c.drafted, "accepted": c.accepted}
                for name, c in self.by_drafter.items()
            },
        }


@dataclass(frozen=True)
class Answer:
    """What a model wrote, why it ended, and what it took.

    Of the prompt's tokens ``prompt_tokens_kept`` did not have to be read: a conversation had them.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: Finish | Literal["interrupted"]
    prompt_tokens: int
    stats: Summary
    prompt_tokens_kept: int = 0

    def as_json(self) -> dict[str, Any]:
        """The answer as JSON takes it."""
        return {
            "text": self.text,
            "token_ids": list(self.token_ids),
            "finish_reason": self.finish_reason,
            "prompt_tokens": self.prompt_tokens,
            "stats": self.stats.as_json(),
        }


def answer(
    decoder: Decoder,
    tokenizer: Any,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: SamplingParams | None = None,
    drafter: Proposer | None = None,
    end_tokens: frozenset[int] = frozenset(),
    stops: Sequence[str] = (),
    on_text: Callable[[str], None] | None = None,
    conversation: Conversation | None = None,
    stopped: Callable[[], bool] | None = None,
) -> Answer:
    """Decode one prompt to the end.

    Args:
        decoder, tokenizer, prompt, max_new_tokens, sampling, drafter, end_tokens, stops,
            conversation, stopped: as in `answering`.
        on_text: given every piece of text as soon as it is certain; the pieces add up to the text.

    Raises:
        InputError: as `Generation`.
    """
    pieces = answering(
        *(decoder, tokenizer, prompt),
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        drafter=drafter,
        end_tokens=end_tokens,
        stops=stops,
        conversation=conversation,
        stopped=stopped,
    )
    while True:
        try:
            text = next(pieces)
        except StopIteration as end:
            return cast(Answer, end.value)
        if on_text:
            on_text(text)


def answering(
    decoder: Decoder,
    tokenizer: Any,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: SamplingParams | None = None,
    drafter: Proposer | None = None,
    end_tokens: frozenset[int] = frozenset(),
    stops: Sequence[str] = (),
    conversation: Conversation | None = None,
    stopped: Callable[[], bool] | None = None,
) -> Generator[str, None, Answer]:
    """Decode one prompt as far as somebody goes on asking.

    Args:
        decoder: the model.
        tokenizer: its transformers tokenizer.
        prompt: token ids, at least one.
        max_new_tokens: the most tokens produced.
        sampling, drafter, end_tokens: as in `Generation`.
        stops: strings that end the text and are not part of it.
        conversation: of this decoder, to go on in; None: the prompt is read from its beginning.
        stopped: asked after every step; True ends the answer there.

    Yields:
        Every piece of text, none of them empty, as soon as it is certain; they add up to the text.

    Returns:
        The answer.

    Raises:
        InputError: as `Generation`, when the first piece is asked for.
    """
    stream = TextStream(tokenizer, stops)
    begin = partial(Generation, decoder) if conversation is None else conversation.begin
    generation = begin(
        prompt,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        drafter=drafter,
        end_tokens=end_tokens,
        watch=stream.feed,
    )
    steps = []
    for step in generation:
        steps.append(step)
        if text := stream.take():
            yield text
        if stopped is not None and stopped():
            break
    if text := stream.finish():
        yield text
    return Answer(
        text=stream.text,
        token_ids=tuple(generation.output),
        finish_reason=generation.finish or "interrupted",
        prompt_tokens=len(prompt),
        stats=Summary.of(steps),
        prompt_tokens_kept=generation.filled,
    )


def answer_batch(
    decoder: Decoder,
    tokenizer: Any,
    requests: Sequence[BatchRequest],
    *,
    size: int,
    drafter: BatchProposer | None = None,
    plan: SkipPlan = FULL,
    end_tokens: frozenset[int] = frozenset(),
    stops: Sequence[str] = (),
    on_text: Callable[[str], None] | None = None,
) -> Iterator[tuple[int, Answer]]:
    """Decode prompts, several at once (see `engine.batch`).

    Args:
        decoder, tokenizer: the model.
        requests: the prompts; what is told about their tokens is the texts' business here.
        size: how many are decoded at once.
        drafter: drafts for them, losslessly; None: nobody.
        plan: what is left out behind the prompts, which is lossy.
        end_tokens, stops: what ends a text.
        on_text: given the first prompt's text piece by piece.

    Yields:
        (a request's number, its answer) as soon as it is done, in whatever order that is. Seconds
        are the answer's share of what all took together.

    Raises:
        InputError: as `Batch`.
    """
    streams = [TextStream(tokenizer, stops) for _ in requests]
    rows = [
        replace(request, watch=stream.feed)
        for request, stream in zip(requests, streams, strict=True)
    ]
    batch = Batch(decoder, rows, size=size, drafter=drafter, plan=plan, end_tokens=end_tokens)
    for number, step in batch:
        stream = streams[number]
        text = stream.take() + (stream.finish() if step.finish else "")
        if text and on_text and number == 0:
            on_text(text)
        if step.finish:
            yield (
                number,
                Answer(
                    text=stream.text,
                    token_ids=tuple(t for each in batch.steps[number] for t in each.tokens),
                    finish_reason=step.finish,
                    prompt_tokens=len(requests[number].prompt),
                    stats=Summary.of(batch.steps[number]),
                ),
            )


def _of_step(step: Step) -> Summary:
    count = len(step.tokens)
    if step.drafter == "prefill":
        return Summary(prefill_seconds=step.seconds, tokens=count)
    return Summary(
        decode_seconds=step.seconds,
        tokens=count,
        decode_tokens=count,
        steps=1,
        by_drafter=_by_drafter(step),
        draft_seconds=step.draft_seconds,
        by_position=count_positions(step),
    )


def _by_drafter(step: Step) -> dict[str, DraftCount]:
    """Who drafted how much in a step; the tokens that were kept are the chain's first ones."""
    sources = step.sources or (step.drafter,) * step.drafted
    return {
        name: DraftCount(1, sources.count(name), sources[: step.accepted].count(name))
        for name in dict.fromkeys(sources)
    }
