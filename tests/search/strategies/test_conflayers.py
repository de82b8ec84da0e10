"""The paper's loop, on a tiny model."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from conflayers_cli.engine.cost_model import PassCosts
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.errors import InputError
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.search.problem import SearchProblem, SearchResult, Trial
from conflayers_cli.search.strategies.conflayers import ConfLayers
from conflayers_cli.search.strategies.layer_confidence import certainty, measure_confidence
from conflayers_cli.skip_plan import SkipPlan
from tests import tiny

COSTS = PassCosts({1: 10.0, 26: 20.0}, floor=1.0, attention=0.5, mlp=0.5, context=256)
DEPTH = 12


def deep() -> Decoder:
    import transformers as hf

    config = hf.LlamaConfig(**{**tiny.LLAMA_LIKE, "num_hidden_layers": DEPTH})
    return Decoder(tiny.build(config, seed=4))


def problem(
    decoder: Decoder, on_trial: Callable[[Trial, Trial | None], None] = lambda trial, best: None
) -> SearchProblem:
    prompts = tuple(tuple(tiny.prompt(9, seed)) for seed in range(3))
    return SearchProblem(decoder, prompts, COSTS, 40, frozenset(), on_trial)


def search(on: SearchProblem | None = None, **settings: int | float) -> SearchResult:
    method = ConfLayers(
        **{"search_interval": 6, "max_iterations": 8, "stop_probability": 0.0, **settings}  # type: ignore[arg-type]
    )
    return method.search(on or problem(deep()))


def test_starts_balanced_and_ends_with_the_best_it_decoded_with() -> None:
    result = search()
    assert result.trials[0].plan == SkipPlan.balanced(DEPTH)
    decoded = [trial for trial in result.trials if trial.steps]
    best = max(decoded, key=lambda trial: trial.accepted / trial.steps)
    assert result.plan == best.plan
    assert len(decoded) > 1


def test_is_reproducible() -> None:
    first, second = search(), search()
    assert [t.plan for t in first.trials] == [t.plan for t in second.trials]
    assert [t.accepted for t in first.trials] == [t.accepted for t in second.trials]


def test_sets_that_are_too_small_are_not_decoded_with_and_lower_lambda() -> None:
    result = search(skip_ratio=0.6, max_iterations=30)
    least = 0.6 * (DEPTH - 2) + 1
    proposed = result.trials[1:]
    small = [t for t in proposed if len(t.plan.layers) < least]
    assert small, "the case must arise for the test to mean anything"
    assert all(t.steps == 0 for t in small)
    assert all(t.steps > 0 for t in proposed if len(t.plan.layers) >= least)
    lam = result.tensors["lambda"].tolist()
    for before, after, row in zip(lam, lam[1:], result.tensors["selected"], strict=False):
        share = int(row.sum()) / (DEPTH - 2)
        count = int(row.sum())
        step = 0.05 if share > 0.85 else -0.05 if count < least else 0.0
        assert after - before == pytest.approx(step)


def test_ends_at_its_limits() -> None:
    assert len(search(max_iterations=3).trials) == 3
    patient = search(max_iterations=100, patience=2)
    assert "no improvement in 2" in patient.stopped_because


def test_a_set_that_keeps_nothing_is_given_up_at_half_an_interval() -> None:
    result = search(search_interval=20)
    given_up = [t for t in result.trials if t.steps and t.accepted / t.steps < 1]
    assert given_up
    assert all(t.steps == 10 for t in given_up)


def test_tensors_tell_every_proposal() -> None:
    result = search()
    proposals = len(result.trials) - 1
    for name, values in result.tensors.items():
        assert values.shape[0] == proposals, name
    assert result.tensors["attention_confidence"].shape == (proposals, DEPTH - 2)
    assert result.tensors["selected"].shape == (proposals, DEPTH)
    assert not result.tensors["selected"][:, [0, DEPTH - 1]].any()


def test_texts_are_the_models_own() -> None:
    decoder = deep()
    work = problem(decoder)
    search(work)
    samples = work.continuations.get(3)
    assert len(samples) == 3
    for sample in samples:
        vanilla = Generation(decoder, GenerationRequest(sample.prompt, len(sample.output)))
        list(vanilla)
        assert tuple(vanilla.output) == sample.output


def test_an_interrupt_keeps_the_best_so_far() -> None:
    seen: list[Trial] = []

    def interrupt(trial: Trial, best: Trial | None) -> None:
        seen.append(trial)
        if len(seen) == 2:
            raise KeyboardInterrupt

    method = ConfLayers(search_interval=6, stop_probability=0.0)
    result = method.search(problem(deep(), interrupt))
    assert result.interrupted
    assert result.plan == max(seen, key=lambda t: t.accepted / t.steps).plan


def test_interrupted_before_anything_was_decoded() -> None:
    def never(trial: Trial, best: Trial | None) -> None:
        raise AssertionError("nothing is evaluated")

    decoder = deep()
    forward = decoder.forward
    calls = 0

    def interrupted(*args: object, **kwargs: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)  # type: ignore[arg-type]

    decoder.forward = interrupted  # type: ignore[method-assign]
    result = ConfLayers().search(problem(decoder, never))
    assert result.interrupted
    assert result.plan == SkipPlan.balanced(DEPTH)


def test_ends_when_the_time_is_over() -> None:
    work = problem(deep())
    work.deadline = 0.0
    result = search(work)
    assert result.stopped_because == "out of time"
    assert result.plan == SkipPlan.balanced(DEPTH)


def test_too_shallow_a_model_is_refused() -> None:
    import transformers as hf

    config = hf.LlamaConfig(**{**tiny.LLAMA_LIKE, "num_hidden_layers": 3})
    with pytest.raises(InputError, match="3 layers are too few"):
        ConfLayers().search(problem(Decoder(tiny.build(config))))


def test_confidence_is_taken_at_the_tokens_own_positions() -> None:
    decoder = deep()
    tokens = tiny.prompt(30, 5)
    outputs: dict[tuple[str, int], torch.Tensor] = {}

    def keep(kind: str, layer: int, output: torch.Tensor) -> None:
        outputs[kind, layer] = output[:, -10:]

    cache = decoder.new_cache(30)
    with decoder.observing(keep):
        decoder.prefill(torch.tensor([tokens]), cache)
    keys = [layer.keys.clone() for layer in cache.layers]
    confidence = measure_confidence(decoder, cache, tokens, 10)
    for i in range(1, DEPTH - 1):
        assert confidence.attention[i - 1] == pytest.approx(
            certainty(outputs["attention", i]), abs=1e-5
        )
        assert confidence.mlp[i - 1] == pytest.approx(certainty(outputs["mlp", i]), abs=1e-5)
    for before, layer in zip(keys, cache.layers, strict=True):
        np.testing.assert_allclose(before, layer.keys, atol=1e-5)
