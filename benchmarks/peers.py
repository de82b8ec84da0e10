"""This engine beside llama.cpp, OpenVINO GenAI and transformers: same weights, prompts and budget.

Every engine runs in a process of its own, which stays loaded, and they take turns at each prompt.
All get the same token ids (by the model's own chat template), choose greedily and end at the same
tokens. Quantised weights are another model's, and are marked so. Figures are medians (least–most).

Peers live in an environment of their own; llama.cpp is built from source for this processor:

    python -m benchmarks.peers setup --peers-venv out/peers-venv
    python -m benchmarks.peers run --peers-venv out/peers-venv
    python -m benchmarks.peers run --subjects smollm2 --parts speed --rounds 5
    python -m benchmarks.peers table benchmarks/results/peers-….json

A run replaces in the result file the parts that it measures, and leaves the others. Parts:
  speed     tokens a second behind the first token; drafts; identical texts; memory
  contexts  time to the first token, and of a token behind it, by length of the prompt
  passes    milliseconds by tokens in a pass; drafts' passes; speed of memory
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import common, peer_tables
from benchmarks.gpu_models import random_prompts
from benchmarks.peer_arms import ARMS, DRAFTED, LABELS, Bench, opened
from benchmarks.peer_models import NAMES, prepare
from benchmarks.peer_worker import PeerError
from conflayers_cli.kernels.native_library import available_units, unavailable_reason
from conflayers_cli.utils.environment import describe_environment, processor_name
from conflayers_cli.utils.files import write_json
from conflayers_cli.utils.statistics import Spread

RESULTS = Path("benchmarks/results")
WIDTHS = (1, 2, 4, 8, 16)
PASSES_AT_ONCE = 4
SHORT = 2048
"""Room for texts that llama.cpp sets aside, where they are not long."""
CONTEXT_BUDGET = 24
"""Tokens decoded behind each length."""


def measure_speed(bench: Bench) -> dict[str, Any]:
    """Tokens a second by turns, whether texts are alike, and memory."""
    options, model = bench.options, bench.model
    memory: dict[str, int | None] = {}
    for name in bench.arms:
        bench.generate(name, model.prompts[0], 8, model.ends)
        # plain arms come first, and their worker's peak is not yet that of drafts
        memory[name] = bench.worker(name).call("memory")["bytes"]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in bench.arms}
    for number in range(options.rounds):
        for which, prompt in enumerate(model.prompts):
            turn = (number + which) % len(runs)
            for name in [*bench.arms[turn:], *bench.arms[:turn]]:
                found = bench.generate(name, prompt, options.max_new_tokens, model.ends)
                runs[name].append(found)
        common.say(f"{model.name}: round {number + 1} of {options.rounds}")
    return {
        "rounds": options.rounds,
        "prompts": len(model.prompts),
        "max_new_tokens": options.max_new_tokens,
        "arms": {name: speed_figures(name, runs) for name in runs},
        "memory_bytes": memory,
        "failed": bench.failed,
    }


def speed_figures(name: str, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """An arm's figures of all arms' runs, of which those of one index took turns."""
    own = runs[name]
    found: dict[str, Any] = {"tokens_per_second": spread([run["rate"] for run in own])}
    for base in ("llama", "llama-q4", "plain"):
        if base in runs and base != name:
            pairs = [(a["rate"], b["rate"]) for a, b in zip(own, runs[base], strict=True)]
            found[f"over_{base}"] = spread([a / b for a, b in pairs if a and b])
    if drafted := sum(run.get("drafted", 0) for run in own):
        steps = sum(run["steps"] for run in own)
        found["drafted"] = drafted
        found["acceptance"] = sum(run["accepted"] for run in own) / drafted
        found["tokens_per_step"] = sum(run["count"] - 1 for run in own) / steps
    reference = DRAFTED.get(name, "plain")
    if reference in runs and reference != name:
        pairs_of_texts = zip(own, runs[reference], strict=True)
        alike = [first_difference(a["tokens"], b["tokens"]) for a, b in pairs_of_texts]
        found["identical"] = {"to": reference, "matching": alike.count(None), "total": len(alike)}
        found["first_difference"] = spread([n + 1 for n in alike if n is not None])
    return found


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The index of the first token that differs; None: there is none."""
    if list(one) == list(other):
        return None
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def spread(values: Sequence[float | None]) -> dict[str, float | None]:
    """Median, least and most of those that are known."""
    return Spread.of([value for value in values if value]).model_dump()


def measure_contexts(bench: Bench) -> dict[str, Any]:
    """First token and tokens behind it by the length of a prompt of random tokens."""
    options, model = bench.options, bench.model
    rows = []
    limit = model.config["max_position_embeddings"] - CONTEXT_BUDGET
    for length in options.contexts:
        count = options.rounds if length <= 2048 else 1
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in bench.arms}
        # each round another text: OpenVINO keeps what it has read
        texts = random_prompts(model.config["vocab_size"], min(length, limit), count, seed=length)
        for text in texts:
            for name in list(found):
                try:
                    found[name].append(bench.generate(name, text, CONTEXT_BUDGET, ()))
                except PeerError as error:
                    common.say(f"{name} at {length}: {error}")
                    del found[name]
        arms = {
            name: {
                "first_seconds": spread([run["first"] for run in runs]),
                "token_seconds": spread([run["rest"] / (CONTEXT_BUDGET - 1) for run in runs]),
            }
            for name, runs in found.items()
        }
        rows.append({"context": length, "rounds": count, "arms": arms})
        common.say(f"{model.name}: context {length}")
    memory = {name: bench.worker(name).call("memory")["bytes"] for name in bench.arms}
    return {"rows": rows, "memory_bytes": memory}


def measure_passes(bench: Bench) -> dict[str, Any]:
    """Passes by width behind a filled context, by turns, and what memory allows."""
    options = bench.options
    cases: dict[str, tuple[str, dict[str, Any]]] = {}
    for name in bench.arms:
        arm = ARMS[name]
        if arm.drafts or arm.engine not in ("conflayers", "llama.cpp"):
            continue
        cases |= {f"{name} {width}": (name, {"width": width}) for width in WIDTHS}
        if name == "plain":
            cases["plain int4"] = (name, {"width": 1, "draft": True})
            cases["plain profile"] = (name, {"width": 1, "own": True})
        bench.worker(name).call("fill", context=options.context)
    seconds: dict[str, list[float]] = {case: [] for case in cases}
    read: list[float] = []
    for number in range(options.rounds + 1):
        for case, (name, what) in cases.items():
            found = bench.worker(name).call("passes", count=PASSES_AT_ONCE, **what)["seconds"]
            seconds[case] += found[1:] if number else []  # the first of each warms up
        if number and bench.runs("plain"):
            read += bench.worker("plain").call("bandwidth", count=3)["gigabytes_per_second"]
    result: dict[str, Any] = {
        "context": options.context,
        "seconds": {case: spread(found) for case, found in seconds.items()},
    }
    if read and "plain 1" in cases:
        count = bytes_read(bench.model.config, options.context)
        result["bytes_read"] = count
        result["memory_gigabytes_per_second"] = spread(read)
        result["share_of_memory"] = {
            case: count / median(seconds[case]) / median(read) / 1e9
            for case in ("plain 1", "llama 1")
            if case in seconds
        }
    return result


def bytes_read(config: Mapping[str, Any], context: int) -> int:
    """What a pass of a plain Llama over one token reads in bfloat16: weights, keys and values."""
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    heads, shared = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or hidden // heads
    attention = 2 * (heads + shared) * size * hidden
    mlp = 3 * hidden * config["intermediate_size"]
    weights = layers * (attention + mlp) + config["vocab_size"] * hidden
    return int(2 * (weights + 2 * layers * context * shared * size))


MEASURE = {"speed": measure_speed, "contexts": measure_contexts, "passes": measure_passes}


def environment(versions: Mapping[str, str]) -> dict[str, Any]:
    """The machine, with what tells kinds of one name apart, and the versions of all."""
    reason = unavailable_reason()
    return {
        **describe_environment(torch.device("cpu")),
        "native_unit": None if reason else available_units()[0],
        "versions": dict(versions),
    }


def result_file() -> Path:
    """The file for this kind of processor."""
    found = environment({})
    words = f"{processor_name()} {found['native_unit'] or 'plain'}".lower()
    cleaned = "".join(letter if letter.isalnum() else " " for letter in words)
    return RESULTS / f"peers-{'-'.join(cleaned.split())}.json"


def run(options: argparse.Namespace) -> None:
    """Measure what is asked for; the file is written after every part."""
    output = options.output or result_file()
    document: dict[str, Any] = {"benchmark": "peers", "subjects": {}}
    if output.exists():
        document = json.loads(output.read_text(encoding="utf-8"))
        if document["environment"]["processor"] != processor_name():
            raise SystemExit(f"{output} is of another processor: name another --output")
    prompts = common.interleave(
        common.choose_prompts(options.data, options.categories, options.per_category)
    )
    longest = max(options.contexts) + CONTEXT_BUDGET
    for name in options.subjects:
        model = prepare(name, options.work, prompts, options.max_new_tokens)
        entry = document["subjects"].setdefault(name, {})
        for length, parts in ((SHORT, ("speed", "passes")), (longest, ("contexts",))):
            wanted = [part for part in parts if part in options.parts]
            if not wanted:
                continue
            with opened(options, model, length) as bench:
                versions = document.get("environment", {}).get("versions", {})
                for worker in bench.workers.values():
                    versions |= worker.loaded["versions"]
                document["environment"] = environment(versions)
                document["threads"] = options.threads
                for part in wanted:
                    entry[part] = MEASURE[part](bench)
                    write_json(output, document)
    peer_tables.show(document, LABELS)


def setup(options: argparse.Namespace) -> None:
    """Make the peers' environment; llama.cpp takes five minutes to build."""
    folder: Path = options.peers_venv
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = str(folder / "bin/pip")
    flags = {"CMAKE_ARGS": "-DGGML_NATIVE=ON", "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count())}
    llama = ["--no-binary", "llama-cpp-python", "llama-cpp-python"]
    subprocess.run([pip, "install", *llama], check=True, env={**os.environ, **flags})
    # optimum exports models by PyTorch: by the very one that is here
    torch_here = f"torch=={torch.__version__.partition('+')[0]}"
    openvino = ["openvino", "openvino-genai", "openvino-tokenizers", "optimum-intel", "accelerate"]
    subprocess.run([pip, "install", torch_here, *openvino], check=True)
    # it brings along what was built for another PyTorch; texts need none of it
    subprocess.run([pip, "uninstall", "--yes", "torchvision"], check=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Set up, measure, or show what was measured."""
    parser = common.plain_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help_ in (("setup", "make the peers' environment"), ("run", "measure")):
        command = commands.add_parser(name, help=help_)
        command.add_argument("--peers-venv", type=Path, default=Path("out/peers-venv"))
    command.add_argument(
        "--subjects", nargs="+", choices=NAMES, default=["smollm2", "smollm2-deep", "1b", "3b"]
    )
    command.add_argument("--arms", nargs="+", choices=ARMS, help="else all that fit")
    command.add_argument("--parts", nargs="+", choices=MEASURE, default=list(MEASURE))
    command.add_argument("--rounds", type=int, default=3)
    command.add_argument("--data", type=Path, help="prompts with categories; else our own")
    command.add_argument("--categories", nargs="+", help="else the large ones")
    command.add_argument("--per-category", type=int, default=1, help="prompts of each")
    command.add_argument("--max-new-tokens", type=int, default=96)
    command.add_argument("--contexts", nargs="+", type=int, default=[64, 512, 2048, 8192])
    command.add_argument("--context", type=int, default=256, help="of the passes")
    command.add_argument("--threads", type=int, default=torch.get_num_threads())
    command.add_argument("--flash", action="store_true", help="llama.cpp's flash attention")
    command.add_argument("--work", type=Path, default=Path("out/peers"), help="for the models")
    command.add_argument("--output", type=Path, help="else by the processor's name")
    table = commands.add_parser("table", help="show a result file as Markdown")
    table.add_argument("file", type=Path)
    options = parser.parse_args(arguments)
    if options.command == "setup":
        setup(options)
    elif options.command == "table":
        document = json.loads(options.file.read_text(encoding="utf-8"))
        peer_tables.show(document, LABELS)
    else:
        run(options)


if __name__ == "__main__":
    main()
