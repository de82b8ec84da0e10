"""Calibrations killed at any moment, and resumed until they end: is anything lost, or left behind?

Each strategy calibrates a tiny model once without being disturbed. Then it does so again and again,
and is killed (SIGKILL) each time: at a random moment of the run, or at the moment in which its
journal has grown. It is resumed until it ends by itself. Checked: the journal only ever grows, by
whole lines, and measures nothing twice; the profile is complete and says what the undisturbed run's
does; nothing but the profile and its tensors is left.

    python -m tools.kill_calibrate --kills 10 --output kill-calibrate.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from conflayers_cli.profile.schema import Profile
from conflayers_cli.search.journal import journal_path, parse_journal
from conflayers_cli.utils.files import write_json
from tests.cli.conftest import save_model, write_prompts

STRATEGIES = {
    "local": (),
    "conflayers": ("--search-interval", 6, "--max-iterations", 12),
    "swift": ("--max-iterations", 60),
    "knapsack": (),
    "greedy": ("--patience", 4),
    "auto": ("--budget", 600),
}
MAX_LIVES = 60
POLL = 0.002
"""Seconds between two looks at the journal's size."""

Moment = Callable[["subprocess.Popen[bytes]", Path], bool]
"""Waits for the moment to kill in; False: the process has ended before."""


class FaultError(Exception):
    """Something was lost, repeated or left behind."""


@dataclass
class KillRecord:
    """The kills of one calibration.

    Attributes:
        kills: by kind of moment.
        entries: of the journal, found after each kill; 0: the model was still being loaded.
        seconds: wall time of all its lives.
    """

    kills: dict[str, int] = field(default_factory=dict)
    entries: list[int] = field(default_factory=list)
    seconds: float = 0.0


def at_random(generator: random.Random, seconds: float) -> Moment:
    """A moment uniform over the run's length."""

    def wait(process: subprocess.Popen[bytes], journal: Path) -> bool:
        try:
            process.wait(generator.uniform(0.0, seconds))
        except subprocess.TimeoutExpired:
            return True
        return False

    return wait


def at_growth(generator: random.Random, most: int) -> Moment:
    """The moment in which the journal has grown by up to ``most`` pieces."""

    def wait(process: subprocess.Popen[bytes], journal: Path) -> bool:
        left, size = generator.randint(1, most), _size(journal)
        while process.poll() is None:
            now = _size(journal)
            if now > size:
                size, left = now, left - 1
                if not left:
                    return True
            time.sleep(POLL)
        return False

    return wait


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def start(arguments: Sequence[object], cache: Path) -> subprocess.Popen[bytes]:
    """The command line, in a process of its own."""
    command = [sys.executable, "-m", "conflayers_cli", "calibrate", *map(str, arguments)]
    root = Path(__file__).parent.parent
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CONFLAYERS_CACHE": str(cache)}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=root, env={**os.environ, **settings}, stdout=pipe, stderr=pipe
    )


def wait_for_answer(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    """The answer of a process that ends by itself."""
    out, err = process.communicate()
    if process.returncode:
        raise FaultError(f"exit code {process.returncode}: {err.decode()}")
    document: dict[str, Any] = json.loads(out)
    return document


def calibrate_with_kills(
    arguments: Sequence[object],
    profile: Path,
    cache: Path,
    moments: Sequence[tuple[str, Moment]],
) -> tuple[KillRecord, dict[str, Any]]:
    """Calibrate, killed at each of the moments until it ends; what happened, and the answer.

    Raises:
        FaultError: what should hold does not.
    """
    record, before, journal = KillRecord(), b"", journal_path(profile)
    begin = time.perf_counter()
    for kind, moment in moments:
        process = start([*arguments, "--resume"], cache)
        if moment(process, journal):
            process.kill()
            process.communicate()
        if process.returncode != -9:
            break
        record.kills[kind] = record.kills.get(kind, 0) + 1
        if profile.exists() and not journal.exists():  # all but its process had ended
            record.seconds = time.perf_counter() - begin
            return record, {}
        now = journal.read_bytes() if journal.exists() else b""
        record.entries.append(_check_journal(journal, before, now))
        before = now
        if profile.exists():
            Profile.load(profile)
    else:
        process = start([*arguments, "--resume"], cache)
    answer = wait_for_answer(process)
    record.seconds = time.perf_counter() - begin
    return record, answer


def _check_journal(journal: Path, before: bytes, now: bytes) -> int:
    """How many entries a journal has; FaultError unless it is the one before, grown."""
    whole = before[: before.rfind(b"\n") + 1]
    if not now.startswith(whole):
        raise FaultError(
            f"{journal}: of {len(whole)} bytes written before there are {len(now)} now, or others"
        )
    content = parse_journal(journal, now)
    if content.size != len(now[: now.rfind(b"\n") + 1]):
        raise FaultError(f"{journal}: a line is damaged")
    if len(content.entries) < now.count(b"\n") - 1:
        raise FaultError(f"{journal}: something was measured twice")
    return len(content.entries)


def check_end(profile: Path, answer: dict[str, Any], undisturbed: dict[str, Any]) -> None:
    """FaultError unless the profile is whole, alone, and says what the undisturbed run says."""
    found = Profile.load(profile)
    names = {profile.name} | ({found.tensors} if found.tensors else set())
    left = {path.name for path in profile.parent.iterdir()} - names
    if left or (found.tensors and not (profile.parent / found.tensors).exists()):
        raise FaultError(f"beside the profile there is {left or 'no file of tensors'}")
    if not answer:
        return
    for what in ("stopped_because", "refine_judged"):
        if answer[what] != undisturbed[what]:
            raise FaultError(f"{what}: {answer[what]}, undisturbed {undisturbed[what]}")
    sets = [
        [(trial["attention"], trial["mlp"], trial["accepted"]) for trial in each["trials"]]
        for each in (answer, undisturbed)
    ]
    if sets[0] != sets[1]:
        raise FaultError("the search looked at other sets than undisturbed")


def run_strategy(name: str, kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """One strategy's calibrations, killed so often in all."""
    generator, cache = random.Random(seed), folder / "cache"
    common = ["--model", folder / "tiny", "--data", folder / "prompts.jsonl", "--json"]
    common += ["--dtype", "float32", "-n", 32, "--refine-limit", 40, "--strategy", name]
    common += STRATEGIES[name]

    def profile_path(number: int) -> Path:
        own = folder / f"{name}-{number}"
        own.mkdir()
        return own / "found.yaml"

    start([*common, "-o", profile_path(0)], cache).communicate()  # measures what passes cost
    begin = time.perf_counter()
    undisturbed = wait_for_answer(start([*common, "-o", profile_path(1)], cache))
    seconds = time.perf_counter() - begin
    records: list[KillRecord] = []
    while sum(sum(record.kills.values()) for record in records) < kills:
        profile = profile_path(len(records) + 2)
        kinds = [
            ("random", at_random(generator, seconds)),
            ("growth", at_growth(generator, most=8)),
        ]
        moments = [generator.choice(kinds) for _ in range(generator.randint(2, MAX_LIVES))]
        record, answer = calibrate_with_kills([*common, "-o", profile], profile, cache, moments)
        if name != "auto":  # which strategies the time reaches depends on the machine
            check_end(profile, answer, undisturbed)
        else:
            check_end(profile, {}, undisturbed)
        records.append(record)
        print(f"{name}: {record.kills}, entries found {record.entries}, {record.seconds:.0f} s")
    return {
        "seconds_undisturbed": seconds,
        "kills": sum(sum(record.kills.values()) for record in records),
        "calibrations": [asdict(record) for record in records],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Hunt, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--kills", type=int, default=10, help="of each strategy, at the least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="where to write the results as JSON")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        save_model(folder / "tiny", num_hidden_layers=8)
        write_prompts(folder / "prompts.jsonl", *(f"Tell me about {i}." for i in range(6)))
        results = {
            name: run_strategy(name, options.kills, options.seed, folder)
            for name in options.strategies
        }
    total = sum(result["kills"] for result in results.values())
    print(f"{total} kills, and every calibration came to its end; nothing lost or left behind")
    if options.output:
        write_json(options.output, {"seed": options.seed, "strategies": results})


if __name__ == "__main__":
    main()
