"""The dynamic programme against real drafts, one token at a time."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.search.corpus import Continuation
from conflayers_cli.search.strategies import knapsack_window as window_module
from conflayers_cli.search.strategies.knapsack_dp import DynamicProgram, KnapsackWeights, SkipPath
from conflayers_cli.search.strategies.knapsack_window import TokenWindow
from conflayers_cli.skip_plan import SkipPlan
from tests import tiny
from tests.search import planted

SIZE = 8


def text_of(decoder: Decoder) -> Continuation:
    prompt = tiny.prompt(13, 1)
    return Continuation(tuple(prompt), tuple(tiny.generated(decoder, prompt, 20)))


class Drafts:
    """Real drafts of the window's tokens, each on top of the full model's cache."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, text = decoder, text_of(decoder)
        self.window = TokenWindow(decoder, [text], SIZE)
        self.tokens = (*text.prompt, *text.output)
        self._known: dict[SkipPlan, tuple[torch.Tensor, torch.Tensor]] = {}

    def run(self, plan: SkipPlan) -> tuple[torch.Tensor, torch.Tensor]:
        """States after every layer that runs, repeated where one doesn't, ``[L, T, d]``, and
        choices ``[T]``."""
        if plan not in self._known:
            each = [self._draft(at, plan) for at in self.window.positions[0].tolist()]
            states, choices = zip(*each, strict=True)
            self._known[plan] = torch.stack(states, dim=1), torch.tensor(choices)
        return self._known[plan]

    def _draft(self, at: int, plan: SkipPlan) -> tuple[torch.Tensor, int]:
        cache = self.decoder.new_cache(at + 1)
        self.decoder.prefill(torch.tensor([self.tokens[:at]]), cache)
        seen: dict[int, torch.Tensor] = {}
        handles = []
        for i, layer in enumerate(self.decoder.stack.layers):

            def keep(module: object, args: object, output: Any, i: int = i) -> None:
                seen[i] = (output[0] if isinstance(output, tuple) else output)[0, -1]

            handles.append(layer.register_forward_hook(keep))
        fed, position = torch.tensor([[self.tokens[at]]]), torch.tensor([[at]])
        with self.decoder.stack.watching():
            logits = self.decoder.forward(fed, position, cache, plan)
        for handle in handles:
            handle.remove()
        for i in range(1, self.decoder.depth):
            seen.setdefault(i, seen[i - 1])
        states = torch.stack([seen[i] for i in range(self.decoder.depth)])
        return states, int(logits[0, -1].argmax())

    def similarity(self, plan: SkipPlan, layer: int) -> float:
        full, draft = self.run(SkipPlan())[0][layer], self.run(plan)[0][layer]
        return float(torch.cosine_similarity(draft.double(), full.double(), dim=-1).mean())

    def agreement(self, plan: SkipPlan) -> float:
        return float((self.run(plan)[1] == self.window.following).float().mean())


@functools.cache
def drafts(family: str) -> Drafts:
    return Drafts(tiny.decoder(family))


def fill(
    real: Drafts, weights: KnapsackWeights, most_saved: int = 100, least: float = -1.0
) -> tuple[DynamicProgram, tuple[SkipPath, ...]]:
    programme = DynamicProgram(
        real.decoder, real.window, weights, max_saved=most_saved, min_similarity=least
    )
    return programme, programme.run()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_path_is_what_a_real_draft_does(family: str) -> None:
    real = drafts(family)
    weights = KnapsackWeights.of(1, 1) if real.decoder.sub_layers else KnapsackWeights.whole()
    _, paths = fill(real, weights)
    assert len(paths) == (tiny.DEPTH - 2) * weights.layer + 1
    assert paths[0] == SkipPath(SkipPlan(), 0, 1.0, 1.0)
    for path in paths:
        assert path.similarity == pytest.approx(real.similarity(path.plan, -1), abs=1e-5)
        assert path.agreement == pytest.approx(real.agreement(path.plan))


Extension = tuple[SkipPlan, int]


def extensions(plan: SkipPlan, layer: int, weights: KnapsackWeights) -> Iterable[Extension]:
    """A plan with the layer's sub-layers added in all ways, and the units that saves."""
    yield plan, 0
    yield SkipPlan.of((*plan.attention, layer), (*plan.mlp, layer)), weights.layer
    if weights.attention is not None and weights.mlp is not None:
        yield SkipPlan.of((*plan.attention, layer), plan.mlp), weights.attention
        yield SkipPlan.of(plan.attention, (*plan.mlp, layer)), weights.mlp


def by_hand(real: Drafts, weights: KnapsackWeights) -> list[dict[int, tuple[float, SkipPlan]]]:
    """The programme, plan by plan with real drafts: best (similarity, plan) by layer and budget."""
    table = [{0: (1.0, SkipPlan())}]
    for i in range(1, real.decoder.depth):
        best: dict[int, tuple[float, SkipPlan]] = {}
        inner = i < real.decoder.depth - 1
        for saved, (_, plan) in table[-1].items():
            for extended, more in extensions(plan, i, weights) if inner else [(plan, 0)]:
                arrival = (real.similarity(extended, i), extended)
                best[saved + more] = max(
                    best.get(saved + more, arrival), arrival, key=lambda a: a[0]
                )
        table.append(best)
    return table


@pytest.mark.parametrize(
    "weights", [KnapsackWeights.whole(), KnapsackWeights.of(1, 1), KnapsackWeights.of(2, 3)]
)
@pytest.mark.parametrize("family", ["llama", "gpt-neox", "gemma2"])
def test_keeps_the_closest_of_all_that_arrive(family: str, weights: KnapsackWeights) -> None:
    real = drafts(family)
    programme, paths = fill(real, weights)
    table = by_hand(real, weights)
    for i, row in enumerate(table):
        arrived = {j for j in range(101) if not programme.similarity[i, j].isnan()}
        assert arrived == set(row)
        for j, (similarity, _) in row.items():
            assert float(programme.similarity[i, j]) == pytest.approx(similarity, abs=1e-5)
    assert {path.saved: path.plan for path in paths} == {j: p for j, (_, p) in table[-1].items()}


def test_planted_layers_are_the_best_answer_of_all() -> None:
    """Of all sets of as many whole layers none is closer than the programme's, which is them."""
    real = Drafts(planted.decoder())
    _, paths = fill(real, KnapsackWeights.whole())
    count = len(planted.PLANTED)
    (path,) = [path for path in paths if path.saved == count]
    assert path.plan == SkipPlan.of_layers(planted.PLANTED)
    assert path.similarity == pytest.approx(1.0, abs=1e-4)
    for worse in paths[count + 1 :]:
        assert worse.similarity < 0.99


def test_paths_end_under_the_least_similarity() -> None:
    real = drafts("llama")
    free, all_paths = fill(real, KnapsackWeights.of(1, 1))
    least = float(free.similarity[-1].nan_to_num(2).sort().values[3])
    programme, paths = fill(real, KnapsackWeights.of(1, 1), least=least)
    assert 1 < len(paths) < len(all_paths)
    assert float(programme.similarity[~programme.similarity.isnan()].min()) >= least - 1e-6


def test_saves_no_more_than_it_may_and_never_at_the_ends() -> None:
    _, paths = fill(drafts("llama"), KnapsackWeights.of(2, 3), most_saved=9)
    assert [path.saved for path in paths] == [0, 2, 3, 4, 5, 6, 7, 8, 9]
    for path in paths:
        path.plan.check(tiny.DEPTH)
        assert path.saved == 2 * len(path.plan.attention) + 3 * len(path.plan.mlp)


def test_a_state_at_a_time_comes_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    real = drafts("llama")
    _, paths = fill(real, KnapsackWeights.of(2, 3))
    monkeypatch.setattr(window_module, "MAX_BYTES", 1)
    assert real.window.states_at_once == 1
    _, chunked = fill(real, KnapsackWeights.of(2, 3))
    assert [path.plan for path in chunked] == [path.plan for path in paths]


def partial(paths: Sequence[SkipPath]) -> set[int]:
    return {i for path in paths for i in path.plan.partial}


class Clock:
    """Runs by what is computed: a second for every state that passes a layer."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def tick(self, layer: object, args: tuple[torch.Tensor, ...]) -> None:
        self.now += len(args[0])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    layers = planted.decoder().stack.layers
    handles = [layer.register_forward_pre_hook(clock.tick) for layer in layers]
    yield clock
    for handle in handles:
        handle.remove()


def test_a_pace_too_slow_gives_up_the_finer_budgets(clock: Clock) -> None:
    real = Drafts(planted.decoder())

    def run(seconds: float | None) -> tuple[tuple[SkipPath, ...], float]:
        begin = clock.now
        programme = DynamicProgram(
            real.decoder,
            real.window,
            KnapsackWeights.of(2, 3),
            max_saved=40,
            min_similarity=-1.0,
            deadline=None if seconds is None else begin + seconds,
        )
        return programme.run(), clock.now - begin

    whole, taken = run(None)
    assert max(partial(whole)) == planted.DEPTH - 2
    assert run(2 * taken)[0] == whole
    hurried, less = run(taken / 2)
    assert less <= taken / 2
    assert all(path.saved % 5 == 0 for path in hurried)
    assert max(partial(hurried), default=0) < planted.DEPTH / 2
    best = {path.saved: path for path in hurried}[5 * len(planted.PLANTED)]
    assert best.plan == SkipPlan.of_layers(planted.PLANTED)
    assert run(10)[0] == ()


def test_there_is_nothing_where_the_deadline_is_over() -> None:
    real = drafts("llama")
    programme = DynamicProgram(
        real.decoder,
        real.window,
        KnapsackWeights.whole(),
        max_saved=3,
        min_similarity=0.5,
        deadline=time.perf_counter(),
    )
    assert programme.run() == ()


def test_attention_is_computed_once_for_a_layer_with_and_without_its_mlp() -> None:
    real = drafts("llama")
    calls = [0] * tiny.DEPTH

    def count(module: Any, args: object, kwargs: object) -> None:
        calls[module.layer_idx] += 1

    attention = [layer.get_submodule("self_attn") for layer in real.decoder.stack.layers]
    handles = [each.register_forward_pre_hook(count, with_kwargs=True) for each in attention]
    fill(real, KnapsackWeights.of(1, 1))
    for handle in handles:
        handle.remove()
    assert calls == [2] * tiny.DEPTH, "the full model, and all states at once"


@pytest.mark.parametrize("kind", ["self_attn", "mlp"])
def test_the_model_is_itself_again_after_an_interrupt(kind: str) -> None:
    real = drafts("llama")
    layer = real.decoder.stack.layers[2]
    before = dict(layer._modules)
    calls = 0

    def interrupt(module: object, args: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt

    handle = layer.get_submodule(kind).register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        fill(real, KnapsackWeights.of(1, 1))
    handle.remove()
    assert dict(layer._modules) == before
    assert tuple(real.decoder.model.model.layers) == real.decoder.stack.layers
