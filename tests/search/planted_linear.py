"""A tiny model in which a run of layers is nearly linear, and far from the identity."""

from __future__ import annotations

import functools

import transformers as hf

from conflayers_cli.engine.cost_model import Costs
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.search.corpus import Texts
from conflayers_cli.search.objective import Objective
from conflayers_cli.search.problem import Task
from conflayers_cli.search.record import Record
from tests import tiny

DEPTH = 10
LINEAR = range(3, 8)
IDENTITY = 1
"""A layer that may be left out as it is."""
COSTS = Costs(
    {1: 10.5, 2: 10.7, 26: 13.0}, floor=0.5, attention=0.5, mlp=0.5, context=256, stand_in=0.1
)
NEW_TOKENS = 96
LLAMA = {**tiny.LLAMA_LIKE, "num_hidden_layers": DEPTH, "mlp_bias": True}


@functools.cache
def decoder() -> Decoder:
    """With its gate wide open for every token, a planted layer's MLP is a matrix."""
    model = tiny.build(hf.LlamaConfig(**LLAMA), seed=4)
    for i in LINEAR:
        layer = model.model.layers[i]
        layer.self_attn.o_proj.weight.data *= 1e-3
        layer.mlp.gate_proj.weight.data *= 0.0
        layer.mlp.gate_proj.bias.data.fill_(0.5)
    idle = model.model.layers[IDENTITY]
    for weight in (idle.self_attn.o_proj.weight, idle.mlp.down_proj.weight):
        weight.data *= 1e-3
    idle.mlp.down_proj.bias.data *= 0.0
    return Decoder(model)


def prompts(count: int, first: int = 0) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(tiny.prompt(9, seed)) for seed in range(first, first + count))


@functools.cache
def output(prompt: tuple[int, ...]) -> tuple[int, ...]:
    """What the model writes, longer than any task wants it."""
    (sample,) = Texts(decoder(), (prompt,), NEW_TOKENS, frozenset()).enough(1)
    return sample.output


def task(
    count: int = 6,
    *,
    costs: Costs = COSTS,
    tokens: int = NEW_TOKENS,
    recorder: Record | None = None,
) -> Task:
    """A task whose texts are known; with a recorder they are decoded when asked for."""
    made = Task(decoder(), prompts(count), costs, tokens, frozenset(), recorder=recorder)
    for prompt in made.prompts if recorder is None else ():
        made.texts.note(prompt, output(prompt)[:tokens])
    return made


@functools.cache
def fresh_objective() -> Objective:
    """Judges by texts that no task has."""
    texts = Texts(decoder(), prompts(3, 100), NEW_TOKENS, frozenset())
    return Objective(decoder(), COSTS, texts.enough())
