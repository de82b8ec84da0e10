"""Would drafting over a part of the vocabulary pay?

Logits of fewer tokens make a draft pass cheaper, and every token outside them is a draft refused.
Half of the prompts stand for calibration: the part is the tokens of their texts and outputs, and
the first ids up to a size (merges of byte-pair encodings are numbered by frequency). The outputs of
the other half tell how many tokens lie outside; with a prompt's own tokens added, too. What that
comes to is predicted from measured costs, for the best fixed length of drafts.

    python -m benchmarks.vocabulary --data spec_bench.jsonl --output vocabulary.json
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from benchmarks import common
from conflayers_cli.bench.systems import Case
from conflayers_cli.engine.cost_cache import costs_of
from conflayers_cli.engine.cost_model import Costs
from conflayers_cli.generation.loop import Generation
from conflayers_cli.skip_plan import SkipPlan

SIZES = (4096, 8192, 16_384, 24_576, 32_768)
LONGEST = 25


def output_of(subject: common.Subject, case: Case) -> list[int]:
    """What the model writes, greedily."""
    generation = Generation(
        subject.decoder,
        case.tokens,
        max_new_tokens=case.max_new_tokens,
        end_tokens=subject.loaded.end_tokens,
    )
    for _ in generation:
        pass
    return generation.output


def outside(
    texts: Sequence[tuple[Sequence[int], Sequence[int]]], part: Collection[int]
) -> tuple[float, float]:
    """Shares of output tokens outside a part: as it is, and with each prompt's own tokens added.

    Args:
        texts: (prompt, output) pairs.
        part: token ids.
    """
    total = sum(len(output) for _, output in texts)
    alone = sum(token not in part for _, output in texts for token in output)
    added = 0
    for prompt, output in texts:
        own = set(prompt)
        added += sum(token not in part and token not in own for token in output)
    return alone / total, added / total


def speed(costs: Costs, plan: SkipPlan, depth: int, chance: float, share: float) -> float:
    """Tokens per second with drafts of the best fixed length (KnapSpec, arXiv 2602.20217).

    Args:
        chance: that a drafted token stands.
        share: of the vocabulary that drafts have logits of.
    """
    draft = costs.draft_cost(plan, depth, share)
    best, reach, tokens = 0.0, 1.0, 1.0
    for length in range(1, LONGEST + 1):
        reach *= chance
        tokens += reach
        best = max(best, tokens / (length * draft + costs.verify_cost(length + 1)))
    return best


def measure(subject: common.Subject, cases: Sequence[Case]) -> dict[str, Any]:
    """The table of one model."""
    texts = [(case.tokens, output_of(subject, case)) for case in cases]
    learnt = {token for text in texts[0::2] for part in text for token in part}
    costs = costs_of(subject.loaded, subject.decoder).table.by_batch[1]
    depth, whole = subject.decoder.depth, subject.decoder.vocabulary
    profile = subject.profile
    plan = profile.plan if profile else SkipPlan()
    measured = profile.measured.acceptance_rate if profile and profile.measured else None
    chance = 0.95 if measured is None else measured
    full = speed(costs, plan, depth, chance, 1.0)
    rows = []
    for size in (size for size in SIZES if size < whole):
        part = learnt | set(range(size))
        alone, added = outside(texts[1::2], part)
        share = len(part) / whole
        gain = speed(costs, plan, depth, chance * (1 - added), share) / full
        rows.append({"size": len(part), "outside": alone, "with_prompt": added, "over_all": gain})
    draft = costs.draft_cost(plan, depth)
    return {
        "head_of_draft": costs.head / draft if draft else None,
        "acceptance": chance,
        "sizes": rows,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = common.parser_for(__doc__, per_category=4, models=["smollm2-deep"])
    options = common.parsed(parser, arguments, per_category=2)
    results = {}
    for name in options.models:
        subject = common.open_subject(name, options)
        prompts = common.mixed_up(common.prompts_of(options))
        found = measure(subject, common.cases_of(subject, prompts, options.max_new_tokens))
        results[name] = found
        print(f"{name}: logits are {found['head_of_draft'] or 0:.1%} of a draft pass")
        common.print_table(
            ["tokens", "outside", "with the prompt's own", "speed over all tokens"],
            [
                [
                    f"{row['size']:,}",
                    f"{row['outside']:.1%}",
                    f"{row['with_prompt']:.1%}",
                    f"{row['over_all']:.2f}×",
                ]
                for row in found["sizes"]
            ],
        )
        common.save(options, "vocabulary", subject, {"models": results})


if __name__ == "__main__":
    main()
