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
import yaml

from benchmarks.common import print_table, say
from conflayers_cli.errors import InputError
from conflayers_cli.generation.prompts import as_messages, read_prompts
from conflayers_cli.profile.schema import Profile
from conflayers_cli.utils.environment import describe
from conflayers_cli.utils.files import write_json

SECONDS = 2.0
LONGEST = 500
"""Characters of an error, without the path."""
MUTATIONS = (1, 1, 1, 2, 3, 6)
LARGEST = 60_000
"""Bytes of an input."""

_USER = {"role": "user", "content": "Why is the sky blue?"}
_CHAT = [{"role": "system", "content": "Be brief."}, _USER, {"role": "assistant", "content": "So."}]
_TURN = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
PROMPT_LINES = (
    {"prompt": "naïve café 🙂", "id": "a", "category": "qa"},
    {"prompt": "line\nbreak", "id": 7, "other": {"deep": [1, 2.5e3, None, True]}},
    {"messages": [*_CHAT, _USER], "id": "m"},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]},
    {"turns": ["First", "Second"], "question_id": 81, "category": "writing"},
    {"conversations": [{"from": "system", "value": ""}, *_TURN, _TURN[0]], "id": "x_0"},
)
PROFILE_TEXT = """\
# A profile with every key
schema_version: 1
model:
  name: m/some-model
  architecture: LlamaForCausalLM
  depth: 32
  hidden_size: 576
  attention_heads: 9
  key_value_heads: 3
  intermediate_size: null
  vocabulary: 49152
  config_hash: 0123456789abcdef
skip:
  attention: [5, 3, 30]
  mlp: [5, 7]
draft: {max_tokens: 12, stop_probability: 0.5, by: mixed, lookahead: no, tree: [[0.8, 3], [0, 5]]}
ranges:
  - from_context: 1024
    skip: {attention: [4], mlp: []}
    draft:
      max_tokens: 4
      stop_probability: 1
source: "a paper, \\u00a7 3"
found_by:
  strategy: conflayers
  refined: true
  settings: {skip_ratio: 0.4, name: 'x', none: null, count: 12, 'on': yes}
  seed: 18446744073709551615
  prompts: {count: 30, sha256: SHA}
measured:
  acceptance_rate: 0.943
  tokens_per_step: 4.278
  expected_speedup: 1.418
  measured_speedup: null
  iterations: 15
  seconds: 148.2
  conclusion: |
    skipping 58 sub-layers
    decodes at 1.41×
environment:
  device: cpu
  dtype: bfloat16
  threads: 2
  python: 3.11.9
  torch: 2.13.0
  transformers: 5.23.0
  conflayers: 0.1.0
tensors: deep.safetensors
""".replace("SHA", "ab" * 32)

TOKENS: tuple[bytes, ...] = tuple(
    text.encode()
    for text in (
        *("&a ", "*a", "<<: ", "!!python/object/apply:os.system ", "!!int ", "!!bool ", "!!float "),
        *("!!timestamp ", "!!binary ", "!!set ", "!!omap ", "!!null ", "!x ", "? ", "? [a]\n: b\n"),
        *("---\n", "...\n", "%YAML 9.9\n", "%TAG ! tag:x:\n", "- ", "[", "]", "{", "}", "[" * 300),
        *("{a: " * 200, "| \n", ">+9\n", "#", "'", '"', '"\\ud800"', '"\\U7fffffff"', "~", "null"),
        *("yes", "no", "on", "NaN", ".nan", ".inf", "-.inf", "Infinity", "-Infinity", "1e999"),
        *("1_000", "010", "0x1f", "0b11", "1:30", "1:30.5", "-1", "0", "-0", "1.0", "9" * 4301),
        *("2020-01-01", "2020-99-99", "0001-01-01 00:00:00 +99:99", "=", "\\u0000", "\\ud83d"),
        *(
            "\t",
            "\r",
            "\r\n",
            "\n",
            "\x0b",
            "\x1b[2J",
            "\x7f",
            "\x85",
            "\u2028",
            "\u202e",
            "\ufeff",
        ),
        *("\ufffe", "\u200b", "é", "🙂", '"prompt": ', '"messages": ', '"turns": ', '"id": "a", '),
        *('"role": "tool"', '"content": null', '{"type": "image"}', "x" * 5000, "a: " * 50),
    )
)
NO_TEXT = (
    b"\0",
    b"\xff",
    b"\xfe\xff",
    b"\xef\xbb\xbf",
    b"\xc3",
    b"\xed\xa0\x80",
    b"\xf4\x90\x80\x80",
)
NUMBERS = (
    *("0", "-1", "1e308", "1e309", "4294967296", "9223372036854775808", "0.1", "-0.0", "1.5"),
    *("18446744073709551616", "1" + "0" * 400, "9" * 5000, "NaN", "1e-999"),
)
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


def prompt_corpus() -> tuple[bytes, ...]:
    """Prompt files of every form."""
    lines = [
        json.dumps(line, ensure_ascii=number % 2 == 0) for number, line in enumerate(PROMPT_LINES)
    ]
    return tuple(
        text.encode()
        for text in (
            "\n".join(lines),
            "\r\n".join([*lines[:2], "", lines[4]]),
            *lines,
            json.dumps(PROMPT_LINES, indent=1),
            "A plain text\n\n {odd} \n[1]\n",
            "\ufeffWith a mark\nand more",
        )
    )


def profile_corpus() -> tuple[bytes, ...]:
    """Profiles: with every key, with those that are needed, in other styles."""
    head, _, _ = PROFILE_TEXT.partition("ranges:")
    flow = json.dumps(yaml.safe_load(head), indent=1)  # JSON is YAML
    return (
        PROFILE_TEXT.encode(),
        head.encode(),
        head.replace("\n", "\r\n").encode(),
        flow.encode(),
    )


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
    Reader("prompts", read_prompts, sound_prompts, (".jsonl", ".json", ".txt"), prompt_corpus()),
    Reader("profile", Profile.load, sound_profile, (".yaml",), profile_corpus()),
)


def mutated(data: bytes, draw: random.Random, corpus: Sequence[bytes]) -> bytes:
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
            return data[:start] + draw.choice(draw.choice((*(TOKENS,) * 9, NO_TEXT))) + data[start:]
        case "number" if found := list(_NUMBER.finditer(data)):
            place = draw.choice(found)
            return data[: place.start()] + draw.choice(NUMBERS).encode() + data[place.end() :]
        case "word" if found := list(_WORD.finditer(data)):
            place = draw.choice(found)
            others = draw.choice((TOKENS, _WORD.findall(draw.choice(corpus))))
            return data[: place.start()] + draw.choice(others) + data[place.end() :]
        case "repeat line":
            return b"\n".join([*lines[: line + 1], *lines[line:]])
        case "drop line":
            return b"\n".join([*lines[:line], *lines[line + 1 :]])
        case "swap lines":
            other_line = draw.randrange(len(lines))
            lines[line], lines[other_line] = lines[other_line], lines[line]
            return b"\n".join(lines)
        case _:
            return data[:start] + bytes(draw.randrange(128) for _ in range(4)) + data[end:]


_KINDS = (
    *("flip", "cut", "truncate", "double", "splice", "token", "number", "number"),
    *("word", "word", "repeat line", "drop line", "swap lines", "bytes"),
)


def inputs(reader: Reader, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """So many inputs, each with a file's suffix."""
    draw = random.Random(f"{reader.name} {seed}")
    for _ in range(count):
        data = draw.choice(reader.corpus)
        for _ in range(draw.choice(MUTATIONS)):
            data = mutated(data, draw, reader.corpus)[:LARGEST]
        yield draw.choice(reader.suffixes), data


def judged(reader: Reader, path: Path) -> tuple[bool, str | None]:
    """Whether a file is accepted, and what is wrong with how it was dealt with."""
    try:
        found = reader.read(path)
    except InputError as error:
        told = str(error)
        if not told.startswith(str(path)):
            return False, f"the error does not name the file: {told[:200]!r}"
        if len(told.splitlines()) != 1 or len(told) - len(str(path)) > LONGEST:
            return False, f"the error is not one short line: {told[:200]!r}"
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
    seconds: float = SECONDS,
) -> Report:
    """Give a reader so many inputs.

    Args:
        folder: where they are written, one over the other.
        keep: told of each finding: suffix, input, what is wrong.
        seconds: of the processor that an input may take.
    """
    report = Report()
    for suffix, data in inputs(reader, count, seed):
        path = folder / f"input{suffix}"
        path.write_bytes(data)
        begin = time.process_time()
        accepted, wrong = judged(reader, path)
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
            "environment": describe(torch.device("cpu")),
            "readers": {name: asdict(report) for name, report in reports.items()},
            "findings": dict(seen),
        }
        write_json(options.output, document)


if __name__ == "__main__":
    main()
