"""Do the tests find faults? Breaks one place of the code after the other and runs tests on it.

The faults are in `mutants.toml`. Each is put into a copy of the repository, never into the
repository itself, and the tests named for it are run there; before that they have to pass without
it. A fault that no test finds is one that they would let through: exit code 3.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from benchmarks.common import print_table, say
from conflayers_cli.errors import ConfLayersError, GateError, InputError
from conflayers_cli.utils.environment import describe_environment
from conflayers_cli.utils.files import check_target, write_json

ROOT = Path(__file__).resolve().parents[1]
LIST = Path(__file__).with_name("mutants.toml")
LEFT_OUT = (".git", ".venv", "venv", "out", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info")
FIRST_FAILURE = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", re.MULTILINE)


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        name: what is wrong with it.
        file: where, from the repository's root.
        old: text that occurs there exactly once.
        new: what replaces it.
        tests: test files, or tests by their ids, one of which has to fail.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def mutated(self, root: Path) -> str:
        """The file's text with the fault.

        Raises:
            ConfLayersError: the old text is not there exactly once, or is the new one.
        """
        text = (root / self.file).read_text(encoding="utf-8")
        count = text.count(self.old)
        if count != 1 or self.old == self.new:
            raise ConfLayersError(
                f"mutant “{self.name}”: its text has to occur once in {self.file} and to differ "
                f"from the new one, but occurs {count} times; mend {LIST.name}: {self.old!r}"
            )
        return text.replace(self.old, self.new)


@dataclass(frozen=True)
class Verdict:
    """What came of a run of tests.

    Attributes:
        status: "timeout" counts as killed.
        test: the first that failed, None where none did or time was up.
        seconds: of the run.
    """

    status: Literal["killed", "timeout", "survived"]
    test: str | None
    seconds: float


def known_mutants() -> tuple[Mutant, ...]:
    """All of them, in the list's order."""
    entries = tomllib.loads(LIST.read_text(encoding="utf-8"))["mutants"]
    return tuple(Mutant(**{**entry, "tests": tuple(entry["tests"])}) for entry in entries)


def choose(names: Sequence[str] | None) -> list[Mutant]:
    """The mutants of these names, all of them for None.

    Raises:
        InputError: there is none of a name.
    """
    known = {mutant.name: mutant for mutant in known_mutants()}
    if unknown := [name for name in names or () if name not in known]:
        raise InputError(f"no mutant “{unknown[0]}”: --list shows them")
    return [known[name] for name in dict.fromkeys(names or known)]


def copy_repository(folder: Path) -> Path:
    """A copy of the repository as it is, for tests to be run in."""
    return Path(shutil.copytree(ROOT, folder / "copy", ignore=shutil.ignore_patterns(*LEFT_OUT)))


def run_tests(copy: Path, tests: Sequence[str], limit: int) -> Verdict:
    """Run tests in a copy, up to the first that fails.

    Args:
        limit: seconds of the processor's time after which they are stopped; on a machine that is
            busy with other things tests take longer and are none the worse. Ten times as many by
            the clock stop those that only wait.

    Raises:
        ConfLayersError: they can't be run: nothing is known then of what they find.
    """
    pytest = [sys.executable, "-m", "pytest", *tests, "-x", "-q", "-rfE", "-p", "no:cacheprovider"]
    pytest += ["-o", "addopts=", "--hypothesis-profile=unshrunk"]
    # Compiled files are known by their source's second and size, which a fault may not change.
    own = {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    begin = time.perf_counter()
    try:
        done = subprocess.run(
            ["sh", "-c", f'ulimit -S -t {limit}; exec "$@"', "sh", *pytest],
            cwd=copy,
            env=os.environ | own,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=10 * limit,
            text=True,
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        return Verdict("timeout", None, time.perf_counter() - begin)
    seconds = time.perf_counter() - begin
    if done.returncode == -signal.SIGXCPU:
        return Verdict("timeout", None, seconds)
    if done.returncode == 0:
        return Verdict("survived", None, seconds)
    found = FIRST_FAILURE.search(done.stdout)
    if done.returncode != 1 or found is None:
        last = (done.stdout.strip().splitlines() or ["no output"])[-1]
        raise ConfLayersError(f"pytest {' '.join(tests)} ended with {done.returncode}: {last}")
    return Verdict("killed", found[1], seconds)


def judge(mutants: Sequence[Mutant], limit: int) -> Iterator[tuple[Mutant, Verdict]]:
    """Each mutant and what came of it, in a copy that is made for all of them.

    Raises:
        ConfLayersError: a mutant's text is not there, or its tests fail without it, too.
    """
    for mutant in mutants:  # all of them, before time is spent on any
        mutant.mutated(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_repository(Path(folder))
        tests = sorted({test for mutant in mutants for test in mutant.tests})
        say(f"running {', '.join(tests)} without any fault")
        plain = run_tests(copy, tests, limit * len(tests))
        if plain.status != "survived":
            what = "take too long" if plain.test is None else f"fail: {plain.test}"
            raise ConfLayersError(f"without any fault the tests {what}; mend that first")
        for mutant in mutants:
            file = copy / mutant.file
            before = file.read_bytes()
            file.write_text(mutant.mutated(copy), encoding="utf-8")
            try:
                found = run_tests(copy, mutant.tests, limit)
            finally:
                file.write_bytes(before)
            yield mutant, found


def save(output: Path | None, found: Sequence[tuple[Mutant, Verdict]]) -> None:
    """Write the results so far, where a file is asked for."""
    if output:
        rows = [{"name": m.name, "file": m.file, **asdict(v)} for m, v in found]
        head = {"benchmark": "mutants", "environment": describe_environment(torch.device("cpu"))}
        write_json(output, {**head, "mutants": rows})


def report(found: Sequence[tuple[Mutant, Verdict]]) -> None:
    """Print the table.

    Raises:
        GateError: one survived.
    """
    rows = [(m.name, Path(m.file).name, v.test or v.status, f"{v.seconds:.0f}") for m, v in found]
    print_table(["mutant", "file", "killed by", "seconds"], rows)
    survived = [m.name for m, v in found if v.status == "survived"]
    if survived:
        raise GateError(f"{len(survived)} of {len(rows)} survived: {'; '.join(survived)}")


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    found.add_argument("--only", nargs="+", metavar="NAME", help="these alone")
    found.add_argument("--list", action="store_true", help="show their names, and run nothing")
    found.add_argument(
        "--limit", type=int, default=300, help="seconds of the processor for each one's tests"
    )
    found.add_argument("--output", type=Path, help="where to write the results as JSON")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge the mutants; returns the exit code."""
    options = parser().parse_args(arguments)
    try:
        mutants = choose(options.only)
        if options.list:
            print_table(["mutant", "file"], [(m.name, m.file) for m in mutants])
            return 0
        if options.output:
            check_target(options.output)
        found = []
        for mutant, came in judge(mutants, options.limit):
            found.append((mutant, came))
            say(f"{len(found)} of {len(mutants)}: {came.status}: {mutant.name}")
            save(options.output, found)
        report(found)
    except ConfLayersError as error:
        say(f"mutants: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
