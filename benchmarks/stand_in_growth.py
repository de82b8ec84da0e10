"""What fitting stand-ins takes, and how it grows with depth, width and tokens.

Models of random weights, Llama-like, in float32, each in a process of its own: seconds for reading
the texts and for the maps of all candidates, and memory on top of the model and one read text. The
last row has less memory than the hidden states take, so that texts are read again.

    python -m benchmarks.stand_in_growth --output FILE
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conflayers_cli.utils import environment
from conflayers_cli.utils.files import write_json

CELLS = (
    # width, depth, tokens, MiB of memory
    (576, 30, 5_000, 1024),
    (576, 30, 10_000, 1024),
    (576, 30, 20_000, 2048),
    (576, 60, 5_000, 1024),
    (1152, 30, 5_000, 1024),
    (2304, 30, 5_000, 2048),
    (576, 30, 5_000, 64),
)
QUICK = ((64, 8, 400, 64), (64, 8, 800, 1))
VOCABULARY = 1024
TEXT = 512
"""Tokens of a text."""


def cell(width: int, depth: int, tokens: int, mebibytes: int) -> dict[str, Any]:
    """The figures of one model, in this process."""
    import torch
    import transformers

    from conflayers_cli.engine.decoder import Decoder
    from conflayers_cli.search.blocks import Fitter, candidates
    from conflayers_cli.search.corpus import Sample
    from conflayers_cli.search.states import Reader

    heads = max(width // 64, 1)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 16 * 16,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=heads,
    )
    torch.manual_seed(0)
    decoder = Decoder(transformers.LlamaForCausalLM(config).eval())
    texts = torch.randint(VOCABULARY, (-(-tokens // TEXT), TEXT)).tolist()
    samples = [Sample(tuple(text[:64]), tuple(text[64:])) for text in texts]
    list(Reader(decoder, samples, TEXT).chunks([0]))  # what a pass takes is not the fit's
    before = _peak()
    reader = Reader(decoder, samples, tokens)
    fitter = Fitter(decoder, reader, None, mebibytes << 20)
    begin = time.perf_counter()
    similarity = fitter.similarity()
    read = time.perf_counter()
    blocks = candidates(similarity)
    maps = fitter.maps(blocks)
    end = time.perf_counter()
    return {
        "width": width,
        "depth": depth,
        "tokens": reader.tokens,
        "memory_mib": mebibytes,
        "states_kept": fitter.kept,
        "blocks": len(maps),
        "reading_seconds": read - begin,
        "fitting_seconds": end - read,
        "peak_mib": (_peak() - before) / 2**20,
        "matrices_mib": sum(t.nbytes for each in maps.values() for t in each.tensors) / 2**20,
    }


def _peak() -> int:
    """Bytes that this process has had at the most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="where to write the results as JSON")
    parser.add_argument("--quick", action="store_true", help="next to nothing, to see that it runs")
    parser.add_argument("--cell", type=int, nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.cell:
        print(json.dumps(cell(*options.cell)))
        return
    rows = []
    for each in QUICK if options.quick else CELLS:
        command = [sys.executable, "-m", "benchmarks.stand_in_growth", "--cell", *map(str, each)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows.append(row := json.loads(done.stdout.strip().splitlines()[-1]))
        kept = "kept" if row["states_kept"] else "read again"
        print(
            f"d {row['width']:5} depth {row['depth']:3} tokens {row['tokens']:6} states {kept:10} "
            f"blocks {row['blocks']:3} reading {row['reading_seconds']:6.1f} s "
            f"fitting {row['fitting_seconds']:6.1f} s peak {row['peak_mib']:7.0f} MiB "
            f"matrices {row['matrices_mib']:6.0f} MiB",
            flush=True,
        )
    if options.output:
        write_json(options.output, {"versions": environment.versions(), "rows": rows})


if __name__ == "__main__":
    main()
