"""A tiny model in which some layers are nearly the identity: the right answer is known."""

from __future__ import annotations

import functools

import transformers as hf

from conflayers_cli.engine.cost_model import PassCosts
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.search.problem import OnTrial, SearchProblem, ignore_trial
from tests import tiny

DEPTH = 12
PLANTED = (2, 3, 6, 7, 9)
COSTS = PassCosts({1: 12.0, 2: 12.2, 26: 15.0}, floor=0.5, attention=0.5, mlp=0.5, context=256)


@functools.cache
def decoder() -> Decoder:
    config = hf.LlamaConfig(**{**tiny.LLAMA_LIKE, "num_hidden_layers": DEPTH})
    model = tiny.build(config, seed=4)
    for i in PLANTED:
        layer = model.model.layers[i]
        layer.self_attn.o_proj.weight.data *= 1e-3
        layer.mlp.down_proj.weight.data *= 1e-3
    return Decoder(model)


def problem(
    on_trial: OnTrial = ignore_trial, costs: PassCosts = COSTS, prompts: int = 4
) -> SearchProblem:
    texts = tuple(tuple(tiny.prompt(9, seed)) for seed in range(prompts))
    return SearchProblem(decoder(), texts, costs, 48, frozenset(), on_trial)
