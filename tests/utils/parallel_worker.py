"""One rank of `test_parallel`: decodes in many ways and writes down what came out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from conflayers_cli.engine.cost_measurement import measure_costs
from conflayers_cli.engine.cost_model import CostTable, PassCosts
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.errors import InputError
from conflayers_cli.generation.batch import Batch
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.models.load_options import LoadOptions
from conflayers_cli.models.loaded_model import LoadedModel
from conflayers_cli.models.loader import load_model
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.search.online import AdaptiveProposer
from conflayers_cli.search.strategies.layer_confidence import measure_confidence
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.mixed import MixedProposer
from conflayers_cli.spec_decode.proposer import Proposer, SkipProposer
from conflayers_cli.utils.distributed import RankOutput, broadcast_rank0, run_on_rank0, world
from conflayers_cli.utils.files import JsonLines, write_json

PLAN = SkipPlan.of_layers([2])
TOKENS = 20
PROMPT = list(range(5, 25))
SAMPLED = SamplingParams(temperature=0.9, top_p=0.9, seed=3)


def decoded(
    decoder: Decoder,
    proposer: Proposer | None,
    sampling: SamplingParams | None = None,
    count: int = TOKENS,
) -> list[int]:
    generation = Generation(
        decoder, GenerationRequest(PROMPT, count, sampling or SamplingParams()), proposer=proposer
    )
    list(generation)
    return generation.output


def in_some_ways(loaded: LoadedModel, decoder: Decoder) -> dict[str, Any]:
    """Greedy text, plain and drafted, and what it shows of the model."""
    generation = Generation(decoder, GenerationRequest(PROMPT, TOKENS))
    list(generation)
    confidence = measure_confidence(decoder, generation.cache, generation.tokens, 12)
    return {
        "spread": loaded.spread,
        "greedy": generation.output,
        "drafted": decoded(decoder, SkipProposer(decoder, PLAN, 4, 0.0)),
        "confidence": confidence.total.tolist(),
        "heads": [layer.keys.shape[1] for layer in generation.cache.layers],
    }


def in_more_ways(decoder: Decoder) -> dict[str, Any]:
    """Drafted by all kinds of drafters, sampled, in a batch; and what passes cost."""
    costs = measure_costs(decoder, context=16, rounds=5, growth=False, seconds=0.1)
    # Drafts would never pay for a model so small: its passes are made to cost as large ones'.
    prices = PassCosts({1: 1.01, 26: 1.26}, floor=0.05, attention=0.01, mlp=0.01, context=16)
    table = CostTable({1: prices}, decoder.depth)
    batch = Batch(
        decoder,
        [GenerationRequest(PROMPT[n:], TOKENS, SamplingParams()) for n in (0, 3)],
        proposer=MixedProposer(decoder, PLAN, table),
    )
    batch.run()
    return {
        "costs": sorted(costs.verify.values()),
        "mixed": decoded(decoder, MixedProposer(decoder, PLAN, table)),
        "adaptive": decoded(decoder, AdaptiveProposer(decoder, "conflayers", budget=0.5)),
        "sampled": decoded(decoder, SkipProposer(decoder, PLAN, 4, 0.0), SAMPLED),
        "batch": batch.outputs,
    }


def in_agreement() -> dict[str, Any]:
    """Rank 0's values where each rank has its own."""
    rank = world().rank
    refusal = None

    def refused() -> None:
        raise InputError(f"rank {rank} can't")

    try:
        run_on_rank0(refused)
    except InputError as error:
        refusal = str(error)
    return {
        "number": broadcast_rank0(0.1 + rank),
        "object": broadcast_rank0({"rank": rank, "text": "×" * (rank + 1)}),
        "tensor": broadcast_rank0(torch.full((2, 3), rank).t()).tolist(),
        "truth": broadcast_rank0(rank == 0),
        "first": run_on_rank0(lambda: f"rank {world().rank}"),
        "refusal": refusal,
    }


def in_one_file(path: Path) -> int:
    """Go on with a file of lines; how many were there already."""
    rank = world().rank
    with JsonLines.open(path, [], resume=False) as lines:
        done = lines.done
        lines.append({"written by": rank})
    write_json(path.with_suffix(".json"), rank)
    return done


def main(folder: str, output: str) -> int:
    rank_output = RankOutput()
    found = in_agreement()
    found["done"] = in_one_file(Path(output).with_name("lines.jsonl"))
    loaded = load_model(folder, LoadOptions(dtype="float32"))
    decoder = Decoder(loaded.model)
    found |= in_some_ways(loaded, decoder)
    if world().size == 2:  # with more, processes wait for each other most of the time
        found |= in_more_ways(decoder)
    Path(output).write_text(json.dumps(found))
    return rank_output.common_exit_code(0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
