"""Broken bytes for what reads users' files: prompts, profiles, what models bring, what is cached.

    python -m tools.fuzz --output FILE

Valid files of every accepted form are mutated: bits flipped, parts cut, doubled and spliced, lines
repeated, nasty tokens put in, numbers driven to extremes, values of JSON replaced by others.
Whatever is read must be accepted and sound (the same as by Python's own readers, where there are
any), or refused in one short line that names the file. Anything else is a finding, as is an input
that takes more than two seconds of the processor or 256 MiB of memory; findings are kept as files.
A seed gives the same inputs on every machine. With --reader the results of the other readers in
--output are kept, so that they can be run in parts; Parquet needs pyarrow.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.common import print_table, say
from conflayers_cli.errors import InputError
from conflayers_cli.generation.prompts import as_messages, read_prompts
from conflayers_cli.profile.schema import Profile
from conflayers_cli.utils.environment import describe_environment
from conflayers_cli.utils.files import write_json
from conflayers_cli.utils.memory import PeakMemory
from tools import fuzz_models, fuzz_tables
from tools.fuzz_corpus import profile_corpus, prompt_corpus
from tools.fuzz_mutations import mutate
from tools.fuzz_reader import Reader

MAX_SECONDS = 2.0
MAX_MEMORY = 256 << 20
"""Bytes by which an input may raise the process's peak."""
MAX_MESSAGE = 500
"""Characters of an error, without the path."""
MUTATIONS = (1, 1, 1, 2, 3, 6)
MAX_INPUT = 60_000
"""Bytes of an input."""

PROMPT_SUFFIXES = (".jsonl", ".json", ".txt", ".csv", ".tsv")


@dataclass
class Report:
    """What became of the inputs of one reader."""

    seed: int = 0
    inputs: int = 0
    accepted: int = 0
    slowest_seconds: float = 0.0
    findings: int = 0


def sound_prompts(found: object, path: Path) -> str | None:
    """What is wrong with prompts that were accepted."""
    prompts = found if isinstance(found, list) else []
    if not prompts:
        return "no prompts, and no error"
    if len({prompt.id for prompt in prompts}) < len(prompts):
        return "an id is there twice"
    for prompt in prompts:
        messages = as_messages(prompt)
        if messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
            return "nothing to answer"
        json.dumps(messages, ensure_ascii=False).encode()
    return None


def sound_profile(found: object, path: Path) -> str | None:
    """What is wrong with a profile that was accepted."""
    if not isinstance(found, Profile):
        return "no profile"
    again = path.with_name("again.yaml")
    again.write_text(found.to_yaml(), encoding="utf-8")
    read = Profile.load(again)
    if (read.plan, read.model, read.ranges) != (found.plan, found.model, found.ranges):
        return "it is another profile once it is written and read"
    return None


@cache
def readers() -> tuple[Reader, ...]:
    """All of them; that of Parquet where pyarrow is installed."""
    return (
        Reader("prompts", read_prompts, sound_prompts, PROMPT_SUFFIXES, prompt_corpus()),
        Reader("profile", Profile.load, sound_profile, (".yaml",), profile_corpus()),
        *fuzz_tables.readers(sound_prompts),
        *fuzz_models.readers(),
    )


def inputs(reader: Reader, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """So many inputs, each with a file's suffix."""
    draw = random.Random(f"{reader.name} {seed}")
    for _ in range(count):
        data = draw.choice(reader.corpus)
        for _ in range(draw.choice(MUTATIONS)):
            data = mutate(data, draw, reader.corpus)[:MAX_INPUT]
        yield draw.choice(reader.suffixes), data


def judge(reader: Reader, path: Path) -> tuple[bool, str | None]:
    """Whether a file is accepted, and what is wrong with how it was dealt with."""
    try:
        found = reader.read(path)
    except InputError as error:
        message = str(error)
        named = message.startswith(str(path)) if reader.begins else str(path.parent) in message
        if not named:
            return False, f"the error does not name the file: {message[:200]!r}"
        if len(message.splitlines()) != 1 or len(message) - len(str(path)) > MAX_MESSAGE:
            return False, f"the error is not one short line: {message[:200]!r}"
        return False, reader.refused(message, path) if reader.refused else None
    except Exception as error:  # noqa: BLE001 - whatever it is, it is a finding
        return False, f"{type(error).__name__}: {str(error)[:200]}"
    try:
        return True, reader.sound(found, path)
    except Exception as error:  # noqa: BLE001 - the same
        return True, f"accepted, and then {type(error).__name__}: {str(error)[:200]}"


def fuzz(
    reader: Reader,
    count: int,
    seed: int,
    folder: Path,
    keep: Callable[[str, bytes, str], None],
    seconds: float = MAX_SECONDS,
) -> Report:
    """Give a reader so many inputs.

    Args:
        folder: where they are written, one over the other.
        keep: called with each finding: suffix, input, what is wrong.
        seconds: of the processor that an input may take.
    """
    report = Report(seed)
    memory = PeakMemory(torch.device("cpu"))
    memory.begin()
    before = memory.peak()
    for suffix, data in inputs(reader, count, seed):
        path = folder / f"input{suffix}"
        path.write_bytes(data)
        begin = time.process_time()
        accepted, wrong = judge(reader, path)
        took = time.process_time() - begin
        if wrong is None and took > seconds:
            wrong = f"it took {took:.1f} s"
        peak = memory.peak()
        if peak is not None and before is not None:
            if wrong is None and report.inputs and peak - before > MAX_MEMORY:
                wrong = f"it took {(peak - before) >> 20} MiB"
            before = max(before, peak)
        report.inputs += 1
        report.accepted += accepted
        report.slowest_seconds = max(report.slowest_seconds, took)
        if wrong is not None:
            report.findings += 1
            keep(suffix, data, wrong)
    return report


def _keep(
    folder: Path, seen: Counter[str], name: str, suffix: str, data: bytes, wrong: str
) -> None:
    """Save a finding, of each kind the first few."""
    kind = re.sub(r"[0-9]+|'[^']*'", "…", wrong)
    seen[f"{name}: {kind}"] += 1
    if seen[f"{name}: {kind}"] > 3:
        return
    say(f"{name}: {wrong}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}-{sum(seen.values())}{suffix}").write_bytes(data)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [reader.name for reader in readers()]
    parser.add_argument("--inputs", type=int, default=12_000, help="for each reader")
    parser.add_argument("--reader", action="append", choices=names, help="only this one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--findings", type=Path, default=Path("fuzz-findings"), help="folder for what is found"
    )
    parser.add_argument("--output", type=Path, help="where to write the results as JSON")
    parser.add_argument("--quick", action="store_true", help="1,000 inputs for each")
    options = parser.parse_args(arguments)
    count = 1000 if options.quick else options.inputs
    seen: Counter[str] = Counter()
    reports: dict[str, Report] = {}
    known = _known(options.output)
    with TemporaryDirectory() as folder:
        for reader in readers():
            if reader.name in (options.reader or names):
                keep = partial(_keep, options.findings, seen, reader.name)
                reports[reader.name] = fuzz(reader, count, options.seed, Path(folder), keep)
    print_table(
        ["reader", "inputs", "accepted", "slowest", "findings"],
        [
            [
                name,
                f"{report.inputs:,}",
                f"{report.accepted / report.inputs:.1%}",
                f"{report.slowest_seconds:.2f} s",
                report.findings,
            ]
            for name, report in reports.items()
        ],
    )
    if options.output:
        mine = {name: asdict(report) for name, report in reports.items()}
        kept = {
            kind: count
            for kind, count in known.get("findings", {}).items()
            if kind.partition(":")[0] not in reports
        }
        document = {
            "benchmark": "fuzz",
            "environment": describe_environment(torch.device("cpu")),
            "readers": {**known.get("readers", {}), **mine},
            "findings": {**kept, **seen},
        }
        write_json(options.output, document)


def _known(path: Path | None) -> dict[str, Any]:
    """What an output has already; nothing: there is none, or it is of another form."""
    if path is None or not path.is_file():
        return {}
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {} if "settings" in known else known


if __name__ == "__main__":
    main()
