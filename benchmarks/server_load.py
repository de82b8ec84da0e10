"""`conflayers serve` beside llama.cpp's server: the same weights, chats, budget, threads and slots.

Both serve all the time, and take turns at each load: a closed loop of 1, 4 and 16 clients, greedy,
streamed, measured as `conflayers bench --server` does. Neither keeps what it read of earlier
prompts, since the same ones come again. llama-server is built from llama.cpp's source for this
processor (cmake -DGGML_NATIVE=ON, target llama-server; the source is in llama-cpp-python's sdist);
`benchmarks.peers` writes the bfloat16 GGUF.

    python -m benchmarks.server_load --llama-server llama-server --gguf bf16.gguf --output FILE
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from time import monotonic, sleep
from typing import Any

import httpx2 as httpx

from benchmarks import common
from conflayers_cli.bench.server_load import ServerLoad, measure_server
from conflayers_cli.generation.prompts import builtin_prompts
from conflayers_cli.utils.environment import processor_name
from conflayers_cli.utils.files import write_json
from conflayers_cli.version import __version__

OURS, PLAIN, LLAMA = "conflayers", "conflayers, no drafts", "llama.cpp"
AGAIN = "conflayers, texts come again"
START_SECONDS = 120.0


def commands(options: argparse.Namespace) -> dict[str, list[str]]:
    """What starts each server, but for its port."""
    served = [sys.executable, "-m", "conflayers_cli", "serve", "--dtype", "bfloat16"]
    served += ["--batch-size", str(options.slots), "--context", str(options.context)]
    served += ["--prefix-cache", "0", "--served-name", "smollm2"]
    drafting = ["--profile", str(options.profile)]
    new = [*drafting, "--draft-texts", "0"]  # each turn has the texts of the one before
    llama = [str(options.llama_server), "-m", str(options.gguf), "--alias", "smollm2"]
    llama += ["-t", str(options.threads), "-tb", str(options.threads)]
    llama += ["-np", str(options.slots), "-c", str(options.slots * options.context)]
    llama += ["--cont-batching", "--no-cache-prompt", "--cache-ram", "0", "--no-ui"]
    found = {
        OURS: [*served, *new],
        AGAIN: [*served, *drafting],
        PLAIN: [*served, "-m", "smollm2", "--draft", "none"],
    }
    return {name: found.get(name, llama) for name in options.servers}


@contextmanager
def serving(command: Sequence[str], port: int, threads: int) -> Iterator[str]:
    """The address of a server, once it answers; it ends with the block."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(
        [*command, "--port", str(port)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        end = monotonic() + START_SECONDS
        while not _answers(address):
            if process.poll() is not None or monotonic() > end:
                raise SystemExit(f"{command[0]} does not serve: run it by hand to see why")
            sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(30)


def _answers(address: str) -> bool:
    try:
        return bool(httpx.get(f"{address}/health", timeout=5).status_code == 200)
    except httpx.HTTPError:
        return False


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The loads on each server, in turns."""
    prompts = builtin_prompts()
    found: dict[str, list[Any]] = {name: [] for name in options.servers}
    with ExitStack() as stack:
        addresses = {
            name: stack.enter_context(serving(command, options.port + i, options.threads))
            for i, (name, command) in enumerate(commands(options).items())
        }
        for turn in range(options.rounds + 1):
            for clients, requests in zip(options.clients, options.requests, strict=True):
                for name, address in addresses.items():
                    if not turn and clients != options.clients[-1]:
                        continue  # a first turn, not kept, in which drafters learn what pays
                    load = ServerLoad(
                        url=address,
                        prompts=prompts,
                        requests=requests,
                        clients=(clients,),
                        max_new_tokens=options.max_new_tokens,
                    )
                    common.say(f"{name}: {clients} clients, turn {turn}")
                    (figures,) = measure_server(load, lambda *_: None).loads
                    if turn:
                        found[name].append(figures.model_dump(mode="json"))
    return found


def table(loads: dict[str, list[dict[str, Any]]]) -> str:
    """Medians of the rounds, in Markdown."""
    lines = [
        "| clients | server | tokens/s | first token, ms (p95) | between chunks, p99, ms "
        "| a token, ms | accepted |",
        "| --: | --- | --: | --: | --: | --: | --: |",
    ]
    counts = sorted({load["clients"] for each in loads.values() for load in each})
    for clients in counts:
        for name, each in loads.items():
            own = [load for load in each if load["clients"] == clients]

            def of(figure: str, at: str, own: list[dict[str, Any]] = own) -> float:
                return 1000 * median(load[figure][at] or 0.0 for load in own)

            speeds = [load["tokens_per_second"] for load in own]
            rates = [load["acceptance_rate"] for load in own]
            accepted = "–" if None in rates or not rates else f"{median(rates):.0%}"
            first = of("time_to_first_token_s", "p50"), of("time_to_first_token_s", "p95")
            lines.append(
                f"| {clients} | {name} | {median(speeds):.0f} ({min(speeds):.0f}–{max(speeds):.0f})"
                f" | {first[0]:.0f} ({first[1]:.0f}) | {of('between_chunks_s', 'p99'):.0f} "
                f"| {of('per_token_s', 'p50'):.1f} | {accepted} |"
            )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = common.plain_parser(__doc__)
    parser.add_argument("--llama-server", type=Path, default=Path("llama-server"))
    parser.add_argument("--gguf", type=Path, help="smollm2 in bfloat16, for llama.cpp")
    parser.add_argument("--profile", type=Path, default=common.PROFILES / "smollm2.yaml")
    parser.add_argument("--servers", nargs="+", default=[OURS, PLAIN, LLAMA, AGAIN])
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--requests", nargs="+", type=int, default=[10, 20, 32])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--context", type=int, default=1024, help="of each slot")
    parser.add_argument("--port", type=int, default=8460)
    common.add_output(parser)
    quick = {"clients": [1], "requests": [2], "rounds": 1, "max_new_tokens": 8}
    options = common.parse_quick(parser, arguments, quick)
    found = measure(options)
    if options.output:
        head = {"conflayers": __version__, "processor": processor_name()}
        settings = common.describe_settings(options)
        write_json(options.output, {**head, "settings": settings, "loads": found})
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
