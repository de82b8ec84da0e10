"""How well linear maps stand in for blocks of layers, against leaving the layers out.

    python -m benchmarks.stand_ins --data spec_bench.jsonl --output FILE

Maps are fitted to the model's texts of some prompts; agreement with the model's own greedy choice
is taken on texts of other prompts: where the draft sees the model's own keys and values of the
tokens before, as at the first token of a draft ("exact keys"), and where it sees its own for the
whole text ("own keys"), as at the end of an endless one. The same of drafts whose weights are
rounded to four bits, where there may be such. Nothing is timed but the fitting.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks import common
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.prompts import builtin_prompts, read_prompts
from conflayers_cli.search.blocks import Block, Fitter
from conflayers_cli.search.corpus import Sample, Texts
from conflayers_cli.search.states import Reader
from conflayers_cli.skip_plan import SkipPlan, Weights

BLOCKS: tuple[Block, ...] = ((3, 9), (3, 11), (3, 15), (2, 16), (6, 9), (24, 29), (2, 18), (2, 24))
"""Of a model of 30 layers; of others the same shares of the depth."""
DEPTH = 30
TOKENS = (2_500, 10_000, 20_000, 50_000, 100_000)
MEMORY = 6 << 30


@dataclass(frozen=True)
class Judge:
    """Texts that were not fitted to."""

    decoder: Decoder
    samples: Sequence[Sample]

    def agreement(self, plan: SkipPlan, *, exact: bool) -> tuple[float, float, float]:
        """(share of positions where the draft's choice is the model's; share where the draft gives
        its choice 0.5 or more, and the agreement there)."""
        agrees, sure = [], []
        for sample in self.samples:
            logits = self._logits(sample, plan, exact).float()
            best, choice = logits.max(-1)
            wanted = torch.tensor(sample.output[1:])
            agrees.append((choice.cpu() == wanted).double())
            sure.append(torch.exp(best - logits.logsumexp(-1)).cpu() >= 0.5)
        right, certain = torch.cat(agrees), torch.cat(sure)
        among = float(right[certain].mean()) if bool(certain.any()) else 0.0
        return float(right.mean()), float(certain.double().mean()), among

    def _logits(self, sample: Sample, plan: SkipPlan, exact: bool) -> torch.Tensor:
        read = (*sample.prompt, *sample.output[:-1])
        count = len(sample.output) - 1
        cache = self.decoder.new_cache(len(read) + count)
        seen = read if exact else sample.prompt
        self.decoder.prefill(torch.tensor([seen]), cache)
        fed = torch.tensor([sample.output[:-1]])
        positions = torch.arange(len(sample.prompt), len(read))[None]
        slots = positions + count if exact else None
        return self.decoder.forward(fed, positions, cache, plan, slots=slots)[0]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser_for(__doc__, max_new_tokens=160, per_category=8, models=["smollm2"])
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS), help="fitted to")
    parser.add_argument("--ranks", type=int, nargs="*", default=[64, 128, 256])
    options = common.parsed(parser, arguments, tokens=[400], ranks=[16])
    results: dict[str, Any] = {}
    for name in options.models:
        subject = common.open_subject(name, options)
        results[name] = _measured(subject, options)
        print(_table(name, results[name]), flush=True)
        common.save(options, "stand-ins", subject, {"models": results})


def _measured(subject: common.Subject, options: Any) -> dict[str, Any]:
    """All figures of one model."""
    decoder = subject.decoder
    fitted, judged = _split(subject, options)
    common.say(f"decoding texts of {len(fitted) + len(judged)} prompts")
    texts = Texts(decoder, (*judged, *fitted), options.max_new_tokens, subject.loaded.end_tokens)
    samples = texts.others((), 10**9)
    known = {sample.prompt: sample for sample in samples}
    judge = Judge(decoder, [s for p in judged if len((s := known[p]).output) > 2])
    learnt = [known[prompt] for prompt in fitted if prompt in known]
    blocks = [_scaled(block, decoder.depth) for block in BLOCKS]
    blocks = [block for block in dict.fromkeys(blocks) if block[1] - block[0] >= 1]
    rows: list[dict[str, Any]] = []
    kinds: tuple[Weights | None, ...] = (None, "int4")
    if decoder.stack.int4.reason is not None:
        kinds = (None,)
    for weights in kinds[1:]:
        rows.append(_row(judge, None, None, SkipPlan(weights=weights)))
    for block in blocks:
        for weights in kinds:
            rows.append(_row(judge, block, None, replace(_identity(block), weights=weights)))
    for tokens in options.tokens:
        reader = Reader(decoder, learnt, tokens)
        fits: list[tuple[int | None, float]] = []
        for rank in (None, *(options.ranks if tokens == max(options.tokens) else ())):
            begin = time.perf_counter()
            maps = Fitter(decoder, reader, rank, MEMORY).maps(blocks)
            fits.append((rank, time.perf_counter() - begin))
            whole = tokens == max(options.tokens) and rank is None
            for block, stand_in in maps.items():
                common.say(f"{reader.tokens} tokens, rank {rank or 'full'}, layers {block}")
                told = {"tokens": reader.tokens, "rank": rank, "seconds": fits[-1][1]}
                for weights in kinds if whole else (None,):
                    plan = SkipPlan.of(stand_ins=[stand_in], weights=weights)
                    rows.append(_row(judge, block, told, plan))
        if reader.tokens < tokens:
            break
    positions = sum(len(sample.output) - 1 for sample in judge.samples)
    return {"prompts_judged_by": len(judge.samples), "positions": positions, "rows": rows}


def _split(
    subject: common.Subject, options: Any
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """(prompts fitted to, in random order; prompts judged by, some of each large category)."""
    held = common.chosen(options.data, options.categories, options.per_category)
    judges = {prompt.id for prompts in held.values() for prompt in prompts}
    prompts = read_prompts(options.data) if options.data else builtin_prompts()
    cases = common.cases_of(subject, prompts, options.max_new_tokens)
    fitted = [tuple(case.tokens) for case in cases if case.id not in judges]
    random.Random(0).shuffle(fitted)
    if options.quick:
        fitted = fitted[:6]
    return fitted, [tuple(case.tokens) for case in cases if case.id in judges]


def _scaled(block: Block, depth: int) -> Block:
    begin, end = (round(at * depth / DEPTH) for at in block)
    return max(1, begin), min(end, depth - 1)


def _identity(block: Block) -> SkipPlan:
    return SkipPlan.of_layers(range(*block))


def _row(
    judge: Judge, block: Block | None, told: dict[str, Any] | None, plan: SkipPlan
) -> dict[str, Any]:
    return {"block": block, "map": told, "weights": plan.weights, **_agreements(judge, plan)}


def _agreements(judge: Judge, plan: SkipPlan) -> dict[str, Any]:
    exact, sure, among = judge.agreement(plan, exact=True)
    own, _, _ = judge.agreement(plan, exact=False)
    return {"exact_keys": exact, "own_keys": own, "sure": sure, "agreement_where_sure": among}


def _table(name: str, found: dict[str, Any]) -> str:
    lines = [
        f"{name}: agreement on {found['positions']} positions "
        f"of {found['prompts_judged_by']} prompts",
        f"{'layers':10}{'':>5}{'map':>24}{'exact keys':>12}{'own keys':>10}"
        f"{'p ≥ 0.5':>9}{'there':>8}",
    ]
    for row in found["rows"]:
        begin, end = row["block"] or (0, 0)
        told = row["map"]
        what = "left out"
        if told:
            what = f"rank {told['rank'] or 'full'}, {told['tokens']} tok."
        which = f"{begin}–{end - 1}" if end else "none"
        lines.append(
            f"{which:10}{row['weights'] or '':>5}{what:>24}"
            f"{row['exact_keys']:>12.3f}{row['own_keys']:>10.3f}"
            f"{row['sure']:>9.2f}{row['agreement_where_sure']:>8.3f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
