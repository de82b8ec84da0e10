"""``generate --data`` killed over and over: after ``--resume`` no prompt is lost, repeated or torn.

The real command line answers a file of prompts with a tiny model, one at a time and four at once,
greedily and sampled. It is killed (SIGKILL) at moments drawn uniformly over the time it takes, and
just when its output grows, and resumed, until it ends by itself. Then its output has to be an
uninterrupted run's, byte for byte but for times. (Several prompts at once are drafted for as it
pays by measured costs: there the counts of drafts may differ, too, and what is sampled is decoded
without drafts.) Since a line is one write of the system, which no kill is likely to hit, the output
is also cut at every byte of its last lines and check_cuts.

    python -m tools.kill_generate --output kill-generate.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from conflayers_cli.utils.environment import describe_environment
from conflayers_cli.utils.files import JsonLines, LineKey, write_json
from tests.cli.conftest import save_model, save_profile, write_prompts

TIMES = ("prefill_seconds", "decode_seconds", "tokens_per_second")
COUNTS = ("steps", "drafted", "accepted", "acceptance_rate", "tokens_per_step", "by_drafter")
LIMIT = 1200.0
"""Seconds after which a run counts as stuck."""
WAYS = ("greedy-1", "sampled-1", "greedy-4", "sampled-4")


@dataclass
class Tally:
    """What one way of decoding went through.

    Attributes:
        kills: of them ``grown`` just when the output had grown, the others at random moments.
        torn: kills that left a last line without its end.
        rounds: outputs begun, killed at least once, and finished.
        seconds: of the uninterrupted run.
        faults: what was not as it should be.
    """

    way: str
    kills: int = 0
    grown: int = 0
    torn: int = 0
    rounds: int = 0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)


def without_times(content: bytes, counts: bool = True) -> list[str]:
    """The lines without times, each dumped anew; every one has to be whole.

    Args:
        content: of an output.
        counts: the counts of drafts are kept.

    Raises:
        ValueError: one is not, or the last has no end.
    """
    if content and not content.endswith(b"\n"):
        raise ValueError("the last line is cut off")
    lines = []
    for line in content.splitlines():
        record = json.loads(line)
        for name in TIMES if counts else (*TIMES, *COUNTS):
            del record["stats"][name]
        lines.append(json.dumps(record))
    return lines


def start(arguments: Sequence[object], folder: Path) -> subprocess.Popen[bytes]:
    """The command line in a process of its own."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CONFLAYERS_CACHE": str(folder / "cache"),
    }
    command = [sys.executable, "-m", "conflayers_cli", *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def file_size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def kill_at(
    process: subprocess.Popen[bytes], output: Path, at: float | None, delay: float = 0.0
) -> bool:
    """Kill after ``at`` seconds, or ``delay`` after the output has grown; False: it ended first."""
    begin, before = time.monotonic(), file_size(output)
    while process.poll() is None:
        now = time.monotonic() - begin
        if now > LIMIT:
            process.kill()
            raise TimeoutError(f"no end after {LIMIT:.0f} s")
        if at is not None and now >= at:
            break
        if at is None and file_size(output) > before:
            time.sleep(delay)
            break
        time.sleep(0.0005)
    if process.poll() is not None:
        return False
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


def run_with_kills(
    way: str, arguments: Sequence[object], folder: Path, kills: int, draw: random.Random
) -> Tally:
    """One way of decoding, until it has been killed so often."""
    tally = Tally(way)
    whole = folder / f"{way}-whole.jsonl"
    begin = time.monotonic()
    first = start([*arguments, "-o", whole], folder)
    _, said = first.communicate(timeout=LIMIT)
    tally.seconds = time.monotonic() - begin
    if first.returncode:
        raise RuntimeError(said.decode())
    counts = not way.endswith("-4")
    expected = without_times(whole.read_bytes(), counts)
    while tally.kills < kills:
        output = folder / f"{way}-{tally.rounds}.jsonl"
        while True:
            process = start([*arguments, "-o", output, "--resume"], folder)
            grown = draw.random() < 0.5
            if tally.kills >= kills:
                ended = not kill_at(process, output, LIMIT)
            elif grown:
                ended = not kill_at(process, output, None, draw.choice([0.0, 0.0, 0.002, 0.02]))
            else:
                ended = not kill_at(process, output, draw.uniform(0.0, tally.seconds))
            if ended:
                break
            tally.kills += 1
            tally.grown += grown
            tally.torn += check_partial(output, expected, tally, counts)
        _, said = process.communicate()
        tally.rounds += 1
        if process.returncode:
            tally.faults.append(f"exit code {process.returncode}: {said.decode().strip()}")
        elif without_times(output.read_bytes(), counts) != expected:
            tally.faults.append(f"{output.name} differs")
        if tally.faults:
            break
    return tally


def check_partial(output: Path, expected: Sequence[str], tally: Tally, counts: bool) -> bool:
    """What a kill left has to be a beginning of the whole; whether its last line is torn."""
    content = output.read_bytes() if output.exists() else b""
    whole = content.rfind(b"\n") + 1
    found = without_times(content[:whole], counts)
    if found != expected[: len(found)]:
        tally.faults.append(f"{output.name}: not a beginning of the whole")
    return whole < len(content)


def check_cuts(whole: Path, lines: int) -> int:
    """Cut a copy at every byte of its last lines, and go on; how many cuts there were.

    Raises:
        ValueError: one was not check_cuts.
    """
    content = whole.read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    records = [json.loads(line) for line in content.splitlines()]
    keys = [LineKey(record["index"], record["request_sha256"]) for record in records]
    copy = whole.with_suffix(".cut")
    first = ends[-lines - 1] if lines < len(ends) else 0
    for cut in range(first, len(content) + 1):
        copy.write_bytes(content[:cut])
        done = sum(end <= cut for end in ends)
        with JsonLines.open(copy, keys, resume=True) as output:
            kept = copy.read_bytes()
            for record in records[output.done :]:
                output.append(record)
        again = [json.loads(line) for line in copy.read_bytes().splitlines()]
        if output.done != done or kept != content[: [0, *ends][done]] or again != records:
            raise ValueError(f"a cut at byte {cut} is not mended")
    return len(content) + 1 - first


def main(arguments: Sequence[str] | None = None) -> int:
    """Kill, resume, compare; 1 where anything was lost, repeated or torn."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--kills", type=int, default=80, help="in all")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="where to write the results as JSON")
    options = parser.parse_args(arguments)
    draw = random.Random(options.seed)
    tallies: list[Tally] = []
    cuts: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        model = save_model(folder / "model")
        profile = save_profile(folder / "tiny.yaml", model)
        data = write_prompts(
            folder / "prompts.jsonl", *(f"prompt {i}" for i in range(options.prompts))
        )
        common = ["generate", "--data", data, "--dtype", "float32", "-n", options.max_new_tokens]
        drafted, sampled = ["-p", profile], ["-t", "1.0", "--seed", "7"]
        ways: dict[str, list[Any]] = {
            "greedy-1": drafted,
            "sampled-1": [*drafted, *sampled],
            "greedy-4": [*drafted, "--batch-size", "4"],
            "sampled-4": ["-m", model, "--batch-size", "4", *sampled],
        }
        for number, way in enumerate(options.ways, 1):
            kills = options.kills * number // len(options.ways) - sum(t.kills for t in tallies)
            tally = run_with_kills(way, [*common, *ways[way]], folder, kills, draw)
            tallies.append(tally)
            cuts[way] = check_cuts(folder / f"{way}-whole.jsonl", 3)
            print(
                f"{way}: {tally.kills} kills ({tally.grown} as the output grew, {tally.torn} left "
                f"a torn line), {tally.rounds} outputs finished and the same; "
                f"{cuts[way]} cuts mended; {len(tally.faults)} faults",
                flush=True,
            )
    faults = [f"{tally.way}: {fault}" for tally in tallies for fault in tally.faults]
    for fault in faults:
        print(fault)
    if options.output:
        results = {"ways": [asdict(tally) for tally in tallies], "cuts": cuts, "seed": options.seed}
        write_json(options.output, {**describe_environment(torch.device("cpu")), **results})
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
