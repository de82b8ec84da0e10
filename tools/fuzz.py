"""Broken bytes for the two readers of users' files: prompt files and profiles.

    python -m tools.fuzz --output FILE

Valid files of every accepted form are mutated: bits flipped, parts cut, doubled and spliced, lines
repeated, nasty tokens put in, numbers driven to extremes. Whatever is read must be accepted and
sound, or refused in one short line that names the file. Anything else is a finding, as is an input
that takes more than two seconds of the processor; findings are kept as files. A seed gives the same
inputs on every machine.
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
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.common import print_table, say
from conflayers_cli.errors import InputError
from conflayers_cli.generation.prompts import as_messages, read_prompts
from conflayers_cli.profile.schema import Profile
from conflayers_cli.utils.environment import describe_environment
from conflayers_cli.utils.files import write_json
from tools.fuzz_corpus import NO_TEXT, NUMBERS, TOKENS, profile_corpus, prompt_corpus

MAX_SECONDS = 2.0
MAX_MESSAGE = 500
"""Characters of an error, without the path."""
MUTATIONS = (1, 1, 1, 2, 3, 6)
MAX_INPUT = 60_000
"""Bytes of an input."""

PROMPT_SUFFIXES = (".jsonl", ".json", ".txt", ".csv", ".tsv")

_NUMBER = re.compile(rb"[0-9]+")
_WORD = re.compile(rb"[\w.]+")


@dataclass(frozen=True)
class Reader:
    """What reads a kind of file.

    Attributes:
        read: raises an `InputError`, or gives what is checked by ``sound``.
        sound: what is wrong with something accepted; None: nothing.
        suffixes: of the files.
        corpus: files that are accepted.
    """

    name: str
    read: Callable[[Path], object]
    sound: Callable[[object, Path], str | None]
    suffixes: tuple[str, ...]
    corpus: tuple[bytes, ...]


@dataclass
class Report:
    """What became of the inputs of one reader."""

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


READERS = (
    Reader("prompts", read_prompts, sound_prompts, PROMPT_SUFFIXES, prompt_corpus()),
    Reader("profile", Profile.load, sound_profile, (".yaml",), profile_corpus()),
)


def mutate(data: bytes, draw: random.Random, corpus: Sequence[bytes]) -> bytes:
    """The bytes with one thing wrong."""
    start = draw.randrange(len(data) + 1)
    end = min(len(data), start + draw.choice((1, 2, 8, 64, 512)))
    lines = data.split(b"\n")
    line = draw.randrange(len(lines))
    match draw.choice(_KINDS):
        case "flip" if data:
            at = draw.randrange(len(data))
            return data[:at] + bytes([data[at] ^ 1 << draw.randrange(7)]) + data[at + 1 :]
        case "cut":
            return data[:start] + data[end:]
        case "truncate":
            return data[:start]
        case "double":
            return data[:end] + data[start:end] * draw.choice((1, 2, 20)) + data[end:]
        case "splice":
            other = draw.choice(corpus)
            return data[:start] + other[draw.randrange(len(other)) :]
        case "token":
            return data[:start] + draw.choice(draw.choice([TOKENS] * 9 + [NO_TEXT])) + data[start:]
        case "number" if found := list(_NUMBER.finditer(data)):
            found_at = draw.choice(found)
            return data[: found_at.start()] + draw.choice(NUMBERS).encode() + data[found_at.end() :]
        case "word" if found := list(_WORD.finditer(data)):
            found_at = draw.choice(found)
            others = draw.choice((TOKENS, _WORD.findall(draw.choice(corpus))))
            return data[: found_at.start()] + draw.choice(others) + data[found_at.end() :]
        case "repeat-line":
            return b"\n".join([*lines[: line + 1], *lines[line:]])
        case "drop-line":
            return b"\n".join([*lines[:line], *lines[line + 1 :]])
        case "swap-lines":
            other_line = draw.randrange(len(lines))
            lines[line], lines[other_line] = lines[other_line], lines[line]
            return b"\n".join(lines)
        case _:
            return data[:start] + bytes(draw.randrange(128) for _ in range(4)) + data[end:]


_KINDS = (
    "flip",
    "cut",
    "truncate",
    "double",
    "splice",
    "token",
    "number",
    "number",
    "word",
    "word",
    "repeat-line",
    "drop-line",
    "swap-lines",
    "bytes",
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
        if not message.startswith(str(path)):
            return False, f"the error does not name the file: {message[:200]!r}"
        if len(message.splitlines()) != 1 or len(message) - len(str(path)) > MAX_MESSAGE:
            return False, f"the error is not one short line: {message[:200]!r}"
        return False, None
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
    report = Report()
    for suffix, data in inputs(reader, count, seed):
        path = folder / f"input{suffix}"
        path.write_bytes(data)
        begin = time.process_time()
        accepted, wrong = judge(reader, path)
        took = time.process_time() - begin
        if wrong is None and took > seconds:
            wrong = f"it took {took:.1f} s"
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
    parser.add_argument("--inputs", type=int, default=60_000, help="for each of the two")
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
    with TemporaryDirectory() as folder:
        for reader in READERS:
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
        document = {
            "benchmark": "fuzz",
            "settings": {"inputs": count, "seed": options.seed},
            "environment": describe_environment(torch.device("cpu")),
            "readers": {name: asdict(report) for name, report in reports.items()},
            "findings": dict(seen),
        }
        write_json(options.output, document)


if __name__ == "__main__":
    main()
