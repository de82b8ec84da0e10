"""Several threads decode with one model: each gets what it would get alone."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.engine.model_lock import get_lock
from conflayers_cli.generation.batch import Batch
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.mixed import MixedProposer
from conflayers_cli.spec_decode.proposer import Proposer, SkipProposer
from conflayers_cli.spec_decode.tree import TreeShape
from tests import tiny
from tests.engine.test_graph_runner import free
from tests.kernels.tape import TapeRecorder

COUNT = 24
THREADS = 4

Work = Callable[[Decoder], list[list[int]]]


def plan(number: int) -> SkipPlan:
    return SkipPlan.of_layers([1 + number % 3])


def single(
    number: int, proposer: Callable[[Decoder], Proposer | None], sampling: SamplingParams
) -> Work:
    def work(decoder: Decoder) -> list[list[int]]:
        generation = Generation(
            decoder,
            GenerationRequest(tiny.prompt(5 + number, number), COUNT, sampling),
            proposer=proposer(decoder),
        )
        tiny.steps_of(generation)
        return [generation.output]

    return work


def several(number: int, sampling: SamplingParams) -> Work:
    def work(decoder: Decoder) -> list[list[int]]:
        requests = [
            GenerationRequest(tiny.prompt(4 + i, 10 * number + i), 12, sampling) for i in (1, 2)
        ]
        batch = Batch(decoder, requests, proposer=MixedProposer(decoder, plan(number), free()))
        batch.run()
        return batch.outputs

    return work


def observed(decoder: Decoder) -> list[list[int]]:
    """Sees its own passes' sub-layers, and nobody else's."""
    seen: list[int] = []
    with decoder.observing(lambda kind, layer, output: seen.append(output.shape[1])):
        decoder.prefill(torch.tensor([tiny.prompt(11)]), decoder.new_cache(11))
    return [seen]


def plainly(decoder: Decoder) -> list[list[int]]:
    """As transformers decodes."""
    return [tiny.generated(decoder, tiny.prompt(6, 3), 12)]


SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, seed=11)
WORK: list[Work] = [
    single(0, lambda d: None, SamplingParams()),
    single(1, lambda d: SkipProposer(d, plan(1), 4, 0.0), SamplingParams()),
    single(
        2, lambda d: SkipProposer(d, plan(2), 3, 0.0, tree=TreeShape(((0.0, 2),))), SamplingParams()
    ),
    single(3, lambda d: MixedProposer(d, plan(3), free(turnaround=9.0)), SamplingParams()),
    single(4, lambda d: SkipProposer(d, plan(4), 4, 0.0), SAMPLED),
    single(5, lambda d: MixedProposer(d, None, free()), SamplingParams(repetition_penalty=1.2)),
    several(6, SamplingParams()),
    several(7, SAMPLED),
    observed,
    plainly,
]


def opened(kind: str) -> Decoder:
    model = tiny.build(tiny.CONFIGS["gemma2" if kind == "modules" else "llama"]())
    return Decoder(model, recorder=TapeRecorder() if kind == "recorded" else None)


@pytest.mark.parametrize("kind", ["fused", "modules", "recorded"])
def test_threads_get_what_each_gets_alone(kind: str) -> None:
    decoder = opened(kind)
    assert (decoder.passes.fused is None) == (kind == "modules")
    alone = [work(decoder) for work in WORK]

    def rounds(thread: int) -> list[tuple[int, Any]]:
        """All of the work, each thread in another order."""
        order = [(thread * 3 + i) % len(WORK) for i in range(len(WORK))]
        return [(number, WORK[number](decoder)) for number in order]

    with ThreadPoolExecutor(THREADS) as threads:
        for found in threads.map(rounds, range(THREADS)):
            for number, result in found:
                assert result == alone[number], f"work {number}"
    assert [work(decoder) for work in WORK] == alone  # and nothing stays behind
    if decoder.runner.reason is None:
        assert decoder.runner.graphs > 0


def test_two_decoders_of_one_model() -> None:
    model = tiny.build(tiny.CONFIGS["gemma2"]())
    decoders = [Decoder(model), Decoder(model)]
    assert decoders[0].stack.lock is decoders[1].stack.lock
    work = WORK[1]
    alone = work(decoders[0])
    with ThreadPoolExecutor(THREADS) as threads:
        for result in threads.map(work, [decoders[i % 2] for i in range(2 * THREADS)]):
            assert result == alone


class BrokenError(Exception):
    """What goes wrong in one thread."""


def test_what_fails_in_one_thread_leaves_the_others_right() -> None:
    decoder = opened("modules")
    work = WORK[1]
    alone = work(decoder)
    draft = plan(2)
    failing = threading.local()
    layer = decoder.stack.layers[4]

    def fail(module: object, args: object) -> None:
        if getattr(failing, "yes", False):
            raise BrokenError

    def break_off(number: int) -> Any:
        if number % 2 == 0:
            return work(decoder)
        failing.yes = True
        try:
            generation = Generation(
                decoder,
                GenerationRequest(tiny.prompt(8), 8),
                proposer=SkipProposer(decoder, draft, 4, 0.0),
            )
            with pytest.raises(BrokenError):
                generation.step()
            cache = decoder.new_cache(8)
            with pytest.raises(BrokenError):  # under the plan: the swap is taken back
                decoder.prefill(torch.tensor([tiny.prompt(8)]), cache, plan=draft)
        finally:
            failing.yes = False
        return None

    handle = layer.register_forward_pre_hook(fail)
    with ThreadPoolExecutor(THREADS) as threads:
        results = list(threads.map(break_off, range(4 * THREADS)))
    handle.remove()
    assert results[::2] == [alone] * (2 * THREADS)
    assert tuple(decoder.stack._list) == decoder.stack.layers


def test_a_pass_waits_for_whoever_watches() -> None:
    decoder = opened("fused")
    done = threading.Event()

    def run() -> None:
        decoder.prefill(torch.tensor([[1, 2, 3]]), decoder.new_cache(3))
        done.set()

    thread = threading.Thread(target=run)
    with decoder.stack.watching():
        thread.start()
        assert not done.wait(0.2)
    assert done.wait(60)
    thread.join()


def test_a_copy_of_a_model_has_a_lock_of_its_own() -> None:
    model = tiny.build(tiny.CONFIGS["llama"]())
    lock = get_lock(model)
    assert get_lock(model) is lock
    assert get_lock(copy.deepcopy(model)) is not lock
