"""Random models of usual shapes, made on the device, with text and redundancy like real ones'.

A random model says nothing: its logits are all but ties. Here the embedding and the output head are
planted so that it does, and some layers are made near-identities, so that the right plan is known:

* Every token has two successors, by two random permutations of the vocabulary: the head's row of a
  token is the sum of the embeddings of those that it follows. So the two successors of the last
  token stand out of the vocabulary, and what the layers add to the embedding decides between them.
  That depends on the text before, so layers matter, and text hardly ever repeats itself.
* The gap between the two is spread like a normal variable of about 3 nats: most choices are clear,
  one in forty is within a tenth, as in real models.
* Half of the layers, in irregular places, have the weights of what they add (``o_proj``,
  ``down_proj``) scaled by factors between 0.01 and 0.1, which are halved until leaving them out
  agrees with the model's own choice at nearly all tokens. What came out is in the results.

Weights are drawn so that every product keeps its input's scale, from a seeded generator.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig

from benchmarks.gpu_shapes import Shape
from conflayers_cli.skip_plan import SkipPlan

GAIN = 1.25
"""By which a product spreads its input: 0.0195 as the deviation of weights over 4096 inputs."""
SUCCESSORS = 2
NOISE = 2.1
"""Deviation of a logit by what the layers add, in nats; the gap between two of them has √2 times
that."""
CLEAR = 2.0
"""Deviations by which the successors stand over the likeliest of all other tokens."""
FACTORS = (0.01, 0.1)
AGREEING = 0.985
"""Share of tokens at which the planted plan is to agree with the model."""
MAX_HALVINGS = 6
TEXTS, PROMPT, OUTPUT = 8, 64, 64
"""How many texts the planting is judged by, and their lengths in tokens."""
ROWS_AT_ONCE = 8192
"""Rows of the head that are made at once: bounds the memory that takes."""


@dataclass(frozen=True)
class Planting:
    """What was planted, and what came of it.

    Attributes:
        layers: the near-identities.
        factors: of what each of them adds.
        agreement: share of tokens at which leaving them out agrees with the model's own choice.
        gaps: quantiles of the gap between the two best logits, in nats.
        near_ties: share of tokens with a gap under 0.1.
        repeated: share of the texts' pairs of neighbouring tokens that came before in the text.
    """

    layers: tuple[int, ...]
    factors: tuple[float, ...]
    agreement: float
    gaps: dict[str, float]
    near_ties: float
    repeated: float


@dataclass(frozen=True, eq=False)
class PlantedModel:
    """A model on its device."""

    shape: Shape
    model: Any
    dtype: torch.dtype
    planting: Planting

    @property
    def plan(self) -> SkipPlan:
        """The one that leaves out what was planted."""
        return SkipPlan.of_layers(self.planting.layers)

    @property
    def bad_plan(self) -> SkipPlan:
        """The one that leaves out all layers that matter, but the first and the last."""
        inner = range(1, self.shape.layers - 1)
        return SkipPlan.of_layers(set(inner) - set(self.planting.layers))

    @property
    def weight_bytes(self) -> int:
        """What a pass over one token reads of the weights."""
        return self.shape.weights_read * self.dtype.itemsize

    @property
    def position_bytes(self) -> int:
        """What it reads of the cache for every position."""
        return self.shape.numbers_per_position * self.dtype.itemsize

    def step_bytes(self, context: float) -> float:
        """What it reads in all, behind so many positions."""
        return self.weight_bytes + context * self.position_bytes


def make(
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    known: Planting | None = None,
) -> PlantedModel:
    """A planted model; all of its weights are made where they stay.

    Args:
        shape, device, dtype, seed: which model, and where.
        known: what came of the planting when the same model was made before.
    """
    layers, factors = planted_layers(shape.layers, seed)
    if known is not None:
        factors = known.factors
    model = draw(shape, device, dtype, seed, layers, factors)
    with torch.no_grad():
        planting = known or _settled(model, shape, layers, factors)
    return PlantedModel(shape, model, dtype, planting)


@torch.no_grad()
def draw(
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    layers: Sequence[int],
    factors: Sequence[float],
    successors: int = SUCCESSORS,
) -> Any:
    """A model with planted layers, whatever leaving them out does; see `make`.

    ``successors``: of every token; with one, few choices are close, and texts follow a path.
    """
    config = shape.config()
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.eval().requires_grad_(False)
    generator = torch.Generator(device=device).manual_seed(seed)
    _draw(model, generator)
    for layer, factor in zip(layers, factors, strict=True):
        _scale(model, layer, factor)
    _plant_text(model, shape, generator, successors)
    return model


def planted_layers(depth: int, seed: int = 0) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Half of the layers, never the first or the last, in irregular places, and their factors."""
    chance = random.Random(seed)
    layers = chance.sample(range(1, depth - 1), min(depth // 2, depth - 2))
    low, high = map(math.log, FACTORS)
    factors = tuple(math.exp(chance.uniform(low, high)) for _ in layers)
    return tuple(sorted(layers)), factors


def random_prompts(vocabulary: int, length: int, count: int, seed: int = 0) -> list[list[int]]:
    """Texts of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(vocabulary, (count, length), generator=generator)
    return [[int(token) for token in row] for row in drawn]


def _draw(model: nn.Module, generator: torch.Generator) -> None:
    """All weights but the norms', which are ones; those of the head come later."""
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.normal_(0.0, GAIN / math.sqrt(weight.shape[1]), generator=generator)
        else:
            weight.fill_(1.0)


def _scale(model: Any, layer: int, factor: float) -> None:
    """Scale what a layer adds."""
    found = model.get_decoder().layers[layer]
    for module in (found.self_attn.o_proj, found.mlp.down_proj):
        module.weight.mul_(factor)


def _plant_text(model: Any, shape: Shape, generator: torch.Generator, successors: int) -> None:
    """Embeddings and head as the module's text says.

    With embeddings of deviation e and layers that add n to them, a share ρ = e/√(e² + n²) of the
    normed last state is the embedding. A head whose rows are sums of K embeddings, of deviation s,
    then gives a successor ρ·H·s/√K, and every token a noise of s·√H·√(1 − ρ²).
    """
    embedding = model.get_input_embeddings().weight
    tokens = random_prompts(shape.vocabulary, 64, 4, seed=2)
    embedding.normal_(0.0, 1.0, generator=generator)
    added = _added_by_layers(model, torch.tensor(tokens, device=embedding.device))
    stands_out = math.sqrt(2 * math.log(shape.vocabulary)) + CLEAR  # in deviations of the noise
    odds = stands_out * math.sqrt(successors / shape.hidden)  # e/n
    embedding.mul_(odds * added)
    noisy = 1 / math.sqrt(1 + odds**2)  # √(1 − ρ²)
    spread = NOISE / (math.sqrt(shape.hidden) * noisy)
    scale = spread / math.sqrt(successors) / (odds * added)
    device = embedding.device
    followed = [
        torch.randperm(shape.vocabulary, generator=generator, device=device)
        for _ in range(successors)
    ]
    head = model.get_output_embeddings().weight
    for begin in range(0, shape.vocabulary, ROWS_AT_ONCE):
        part = slice(begin, begin + ROWS_AT_ONCE)
        rows = sum(embedding[order[part]].float() for order in followed)
        head[part] = (rows * scale).to(head.dtype)


def _added_by_layers(model: Any, tokens: torch.Tensor) -> float:
    """Deviation of what all layers together add to embeddings."""
    decoder, found = model.get_decoder(), []

    def keep(module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        found.append(given[0])

    handle = decoder.norm.register_forward_pre_hook(keep)
    try:
        decoder(input_ids=tokens, use_cache=False)
    finally:
        handle.remove()
    added = found[0].float() - decoder.get_input_embeddings()(tokens).float()
    return float(added.pow(2).mean().sqrt())


def _settled(
    model: Any, shape: Shape, layers: tuple[int, ...], factors: tuple[float, ...]
) -> Planting:
    """Halve the planted layers' factors until leaving them out agrees with the model."""
    prompts = random_prompts(shape.vocabulary, PROMPT, TEXTS, seed=3)
    planting = _judged(model, prompts, layers, factors)
    for _ in range(MAX_HALVINGS):
        if planting.agreement >= AGREEING:
            break
        for layer in layers:
            _scale(model, layer, 0.5)
        factors = tuple(factor / 2 for factor in factors)
        planting = _judged(model, prompts, layers, factors)
    return planting


def _judged(
    model: Any,
    prompts: Sequence[Sequence[int]],
    layers: tuple[int, ...],
    factors: tuple[float, ...],
) -> Planting:
    """The model's own greedy texts, and what it says at each of their tokens without layers."""
    given = torch.tensor(prompts, device=model.device)
    settings = GenerationConfig(
        max_new_tokens=OUTPUT, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    texts = model.generate(given, attention_mask=torch.ones_like(given), generation_config=settings)
    logits = _last_logits(model, texts)
    with _left_out(model, layers):
        drafted = _last_logits(model, texts).argmax(dim=-1)
    best = logits.topk(2).values
    gaps = (best[..., 0] - best[..., 1]).flatten()
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75], device=gaps.device)
    quantiles = zip(("5 %", "25 %", "50 %", "75 %"), gaps.quantile(levels).tolist(), strict=True)
    return Planting(
        layers=layers,
        factors=factors,
        agreement=float((drafted == logits.argmax(dim=-1)).float().mean()),
        gaps=dict(quantiles),
        near_ties=float((gaps < 0.1).float().mean()),
        repeated=repetition(texts[:, given.shape[1] :].tolist()),
    )


def _last_logits(model: Any, texts: torch.Tensor) -> torch.Tensor:
    """float32 logits ``[B, OUTPUT, V]`` that the texts' last tokens were chosen by."""
    output = model(input_ids=texts[:, :-1], use_cache=False, logits_to_keep=OUTPUT)
    logits: torch.Tensor = output.logits.float()
    return logits


def repetition(texts: Sequence[Sequence[int]]) -> float:
    """Share of the pairs of neighbouring tokens that came before in their text."""
    pairs = [list(pairwise(text)) for text in texts]
    total = sum(map(len, pairs))
    return 1 - sum(len(set(own)) for own in pairs) / total if total else 0.0


@contextmanager
def _left_out(model: Any, layers: Sequence[int]) -> Iterator[None]:
    """Within: these layers add nothing. (They still run; the engine is not asked here.)"""

    def skip(module: nn.Module, given: tuple[Any, ...], output: Any) -> Any:
        return (given[0], *output[1:]) if isinstance(output, tuple) else given[0]

    found = model.get_decoder().layers
    handles = [found[layer].register_forward_hook(skip) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
