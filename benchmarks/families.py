"""Which families of transformers' decoders can be decoded exactly, and with what: by trying each.

Of every family a tiny random model (float32) is decoded by transformers' own ``generate``, by this
engine without drafts, and with drafts of every kind; all have to give the same tokens. What a
family is refused for is the message that a user would get.

    python -m benchmarks.families --output FILE --table docs/families.md
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.common import print_table, say
from benchmarks.family_models import VOCABULARY, families, tiny_model
from conflayers_cli.engine.cost_model import CostTable, PassCosts
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.errors import InputError
from conflayers_cli.generation.batch import Batch
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.mixed import MixedProposer
from conflayers_cli.spec_decode.proposer import Proposer, SkipProposer
from conflayers_cli.spec_decode.tree import TreeShape
from conflayers_cli.utils.environment import describe_environment
from conflayers_cli.utils.files import write_atomically, write_json

NEW_TOKENS = 24
LENGTHS = (5, 13, 20)
"""Of the prompts, in tokens: one within the tiny models' window, the others beyond it."""
LAYERS = SkipPlan.of_layers([1, 3])
SUB_LAYERS = SkipPlan.of([1, 2], [2, 3])
TREE = TreeShape(((0.5, 2), (0.0, 4)))
EXACT, DIFFERENT, LACKING = "exact", "**differs**", "–"


@dataclass(frozen=True)
class Finding:
    """What was seen of a family.

    Attributes:
        family: transformers' ``model_type``.
        name: of the class.
        refused: why it is not decoded here; None: it is.
        untried: why no small model of it could be made; None: one was.
        checks: "exact", "–" (not to be had) or "differs", by what was tried.
    """

    family: str
    name: str
    refused: str | None = None
    untried: str | None = None
    checks: dict[str, str] | None = None


def _prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in LENGTHS]


def _generated(decoder: Decoder, prompt: Sequence[int]) -> list[int]:
    """What transformers' own greedy decoding gives, whole passes over the text without a cache.

    A cache may have a family's own bounds and faults; the text by itself says what the model says.
    """
    text = list(prompt)
    with decoder.plain() as model, torch.inference_mode():
        for _ in range(NEW_TOKENS):
            logits = model(input_ids=torch.tensor([text]), use_cache=False).logits
            text.append(int(logits[0, -1].argmax()))
    return text[len(prompt) :]


def _decoded(decoder: Decoder, prompt: Sequence[int], proposer: Proposer | None) -> list[int]:
    generation = Generation(decoder, GenerationRequest(prompt, NEW_TOKENS), proposer=proposer)
    list(generation)
    return generation.output


def _costs(depth: int) -> CostTable:
    """Costs under which drafting always seems to pay: it is right or wrong that counts here."""
    cheap = PassCosts({n: 1.0 + n / 1000 for n in range(1, 65)}, 0.01, 0.0, 0.0, 64)
    return CostTable(dict.fromkeys((1, 2, 4), cheap), depth=depth)


def _batched(decoder: Decoder, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    requests = [GenerationRequest(list(prompt), NEW_TOKENS, SamplingParams()) for prompt in prompts]
    proposer = MixedProposer(decoder, LAYERS, _costs(decoder.depth))
    batch = Batch(decoder, requests, size=2, proposer=proposer)
    for _ in batch:
        pass
    return [[t for step in batch.steps[i] for t in step.tokens] for i in range(len(prompts))]


def _windowed(decoder: Decoder) -> bool:
    return any(window is not None for window in decoder.passes.windows.values())


def check(decoder: Decoder) -> dict[str, str]:
    """All ways of decoding, each compared with the model's own text."""
    prompts = _prompts()
    expected = [_generated(decoder, prompt) for prompt in prompts]

    def drafted(proposer: Proposer | None) -> str:
        same = [_decoded(decoder, prompt, proposer) for prompt in prompts] == expected
        return EXACT if same else DIFFERENT

    by_sub_layer = len(decoder.sub_layers) == 2
    tried: dict[str, Callable[[], str]] = {
        "plain": lambda: drafted(None),
        "whole layers": lambda: drafted(SkipProposer(decoder, LAYERS, 4, 0.0)),
        "sub-layers": lambda: (
            drafted(SkipProposer(decoder, SUB_LAYERS, 4, 0.0)) if by_sub_layer else LACKING
        ),
        "trees": lambda: drafted(SkipProposer(decoder, LAYERS, 4, 0.0, TREE)),
        "n-grams and layers": lambda: drafted(
            MixedProposer(decoder, LAYERS, _costs(decoder.depth))
        ),
        "batch": lambda: EXACT if _batched(decoder, prompts) == expected else DIFFERENT,
    }
    found = {name: run() for name, run in tried.items()}
    found["sliding window"] = found["plain"] if _windowed(decoder) else LACKING
    return found


def look_at(family: str) -> Finding:
    """Try one family."""
    try:
        model = tiny_model(family)
        tokens = torch.tensor([_prompts()[0]])
        with torch.inference_mode():
            model(input_ids=tokens, use_cache=False)
    except Exception as error:  # noqa: BLE001 - whatever a family's own code raises on small sizes
        return Finding(family, "", untried=_line(error))
    name = type(model).__name__
    try:
        return Finding(family, name, checks=check(Decoder(model)))
    except InputError as error:
        return Finding(family, name, refused=_line(error))


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__


def markdown(findings: Sequence[Finding], versions: str) -> str:
    """The page of the docs."""
    decoded = [f for f in findings if f.checks]
    refused = [f for f in findings if f.refused]
    untried = [f for f in findings if f.untried]
    columns = list(decoded[0].checks or ()) if decoded else []
    lines = [
        "# Families of models",
        "",
        "Made by `python -m benchmarks.families` from real checks: a tiny random model of each "
        f"family, float32, on CPU ({versions}). *exact*: the greedy text is, token for token, that "
        "of the model's own plain passes, for prompts within and beyond the window; *–*: not to be "
        "had. Every model is checked once more when it is loaded.",
        "",
        f"## Decoded: {len(decoded)}",
        "",
        "| family | " + " | ".join(columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for each in decoded:
        cells = (each.checks or {}).values()
        lines.append(f"| {each.family} | " + " | ".join(cells) + " |")
    lines += ["", f"## Refused, and why: {len(refused)}", "", "| family | reason |", "|---|---|"]
    lines += [f"| {f.family} | {f.refused} |" for f in refused]
    if untried:
        lines += ["", f"## Not tried: {len(untried)}", ""]
        names = ", ".join(f.family for f in untried)
        lines.append(f"No small model of these could be made from their defaults: {names}.")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Try the families, print a table, write the files asked for; 1 where a text differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="results as JSON")
    parser.add_argument("--table", type=Path, help="the page of the docs, as Markdown")
    parser.add_argument("--only", nargs="*", help="these families (default: all)")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    findings = []
    for family in options.only or families():
        findings.append(look_at(family))
        say(f"{family}: {findings[-1].refused or findings[-1].untried or 'decoded'}")
    decoded = [f for f in findings if f.checks]
    head = ["family", *(decoded[0].checks or {})] if decoded else ["family"]
    print_table(head, [[f.family, *(f.checks or {}).values()] for f in decoded])
    if options.output:
        document: dict[str, Any] = {"environment": describe_environment(torch.device("cpu"))}
        write_json(options.output, {**document, "families": [asdict(f) for f in findings]})
    if options.table:
        versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
        write_atomically(options.table, markdown(findings, versions))
    different = [f.family for f in decoded if DIFFERENT in (f.checks or {}).values()]
    if different:
        say(f"not exact: {', '.join(different)}")
    return 1 if different else 0


if __name__ == "__main__":
    raise SystemExit(main())
