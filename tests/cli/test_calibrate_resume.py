"""``conflayers calibrate`` ended in every way, and ``--resume``."""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from conflayers_cli.profile.schema import Profile
from conflayers_cli.search.job import CalibrationJob
from conflayers_cli.search.journal import Journal, parse_journal, temporary_name
from conflayers_cli.search.memo import Entry
from tests import processes
from tests.cli.conftest import Result, Run, quick_search, save_model, write_prompts
from tests.disk import limited_to
from tests.processes import Process, environment
from tests.ranks import run_ranks
from tools import kill_calibrate
from tools.kill_calibrate import at_growth, calibrate_with_kills, check_end

QUICK = ("--dtype", "float32", *quick_search(3, 24, 8))


class KilledError(BaseException):
    """The end of a process that nothing in it hears of."""


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_prompts(tmp_path / "prompts.jsonl", *(f"Tell me about {i}." for i in range(5)))


@pytest.fixture
def asked(model: Path, prompts: Path) -> tuple[object, ...]:
    """A quick calibration."""
    return (*("calibrate", "-m", model, "--data", prompts, "-o", "found.yaml"), *QUICK, "--json")


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "found.journal.jsonl"


@contextmanager
def dying(monkeypatch: pytest.MonkeyPatch, after: int) -> Iterator[None]:
    """Within: a process dies once its journal has so many entries."""
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(Journal, "append", append_and(after, lambda: raise_(KilledError)))
        yield


def append_and(after: int, then: Callable[[], object]) -> Callable[[Journal, str, Entry], None]:
    """`Journal.append`, and something else once there were so many new entries."""
    append, count = Journal.append, 0

    def counted(self: Journal, key: str, entry: Entry) -> None:
        nonlocal count
        append(self, key, entry)
        count += 1
        if count == after:
            then()

    return counted


def raise_(error: type[BaseException]) -> None:
    raise error


def entries(journal: Path) -> int:
    return len(parse_journal(journal, journal.read_bytes()).entries)


def beside(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"prompts.jsonl"}


def test_what_was_killed_goes_on_with_resume(
    run: Run,
    asked: tuple[object, ...],
    journal: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = run(*asked).document
    assert beside(tmp_path) == {"found.yaml", "found.safetensors"}
    with dying(monkeypatch, after=7):
        run(*asked)
    assert entries(journal) == 7

    again = run(*asked)
    assert again.code == 2 and again.err.count("\n") == 1
    assert "--resume goes on with it, --no-resume begins anew" in again.err
    assert entries(journal) == 7

    result = run(*asked, "--resume")
    assert result.code == 0, result.err
    assert "going on with found.journal.jsonl: " in result.err
    assert beside(tmp_path) == {"found.yaml", "found.safetensors"}
    for what in ("stopped_because", "refine_judged"):
        assert result.document[what] == whole[what]
    sets = [[t["attention"] for t in each["trials"]] for each in (whole, result.document)]
    assert sets[0] == sets[1]

    over = run(*asked, "--resume")
    assert over.code == 2 and "found.yaml: is finished" in over.err and over.err.count("\n") == 1


def test_other_options_are_no_way_to_go_on(
    run: Run,
    model: Path,
    prompts: Path,
    asked: tuple[object, ...],
    journal: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = (*asked, "--dtype", "float32")
    with dying(monkeypatch, after=3):
        run(*asked)
    before = journal.read_bytes()
    deeper = save_model(tmp_path / "deeper", num_hidden_layers=6)
    other_prompts = write_prompts(tmp_path / "more.jsonl", "Another one")
    cases: dict[str, tuple[object, ...]] = {
        "settings.seed 0 there, 7 here": (*asked, "--seed", 7),
        "settings.patience 15 there, 2 here": (*asked, "--patience", 2),
        "settings.max_new_tokens 24 there, 25 here": (*asked, "-n", 25),
        "settings.tree True there, False here": (*asked, "--no-tree"),
        "calibration: prompts ": (*asked, "--data", other_prompts),
        "environment.dtype float32 there, bfloat16 here": (*asked, "--dtype", "bfloat16"),
        "model.depth 5 there, 6 here": (*asked, "--model", deeper),
        "strategy conflayers there, clasp here": (
            *("calibrate", "-m", model, "--data", prompts, "-o", "found.yaml", "-n", 24),
            *("--refine-limit", 8, "--dtype", "float32", "--strategy", "clasp"),
        ),
    }
    for told, arguments in cases.items():
        result = run(*arguments, "--resume")
        assert result.code == 2, told
        assert told in result.err and "is of another calibration" in result.err
        assert journal.read_bytes() == before
    result = run(*asked, "--seed", 7, "--no-resume")
    assert result.code == 0, result.err
    assert not journal.exists()
    found_by = Profile.load(tmp_path / "found.yaml").found_by
    assert found_by is not None and found_by.seed == 7


def test_the_same_options_with_other_weights_are_refused(
    run: Run, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file, save_file

    model = save_model(tmp_path / "own")
    asked = ("calibrate", "-m", model, "--data", prompts, "-o", "found.yaml", *QUICK)
    with dying(monkeypatch, after=2):
        run(*asked)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"] *= 1.5
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    result = run(*asked, "--resume")
    assert result.code == 2 and "weights " in result.err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_search_writes_its_best_and_can_go_on(
    run: Run,
    asked: tuple[object, ...],
    journal: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    code: int,
) -> None:
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", append_and(10, lambda: signal.raise_signal(number)))
        result = run(*asked)
    assert signal.getsignal(number) is before
    assert result.code == code, result.err
    assert result.document["interrupted"] and result.document["trials"]
    assert "--resume goes on with found.journal.jsonl" in result.err
    measured = Profile.load(tmp_path / "found.yaml").measured
    assert measured is not None and "interrupted" in measured.conclusion
    assert entries(journal) >= 3

    done = run(*asked, "--resume")
    assert done.code == 0, done.err
    assert not done.document["interrupted"]
    assert done.document["refine_judged"] > result.document["refine_judged"]
    measured = Profile.load(tmp_path / "found.yaml").measured
    assert measured is not None and "interrupted" not in measured.conclusion
    assert beside(tmp_path) == {"found.yaml", "found.safetensors"}


def test_killed_for_real_and_resumed(
    run: Run,
    asked: tuple[object, ...],
    journal: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def start(arguments: Sequence[object], cache: Path) -> Process:
        told = environment(CONFLAYERS_CACHE=str(cache))
        pipe = subprocess.PIPE
        arguments = ("calibrate", *arguments)
        return processes.start("conflayers_cli", arguments, env=told, stdout=pipe, stderr=pipe)

    monkeypatch.setattr(kill_calibrate, "start", start)
    undisturbed = run(*asked, "-o", "other.yaml").document
    folder = tmp_path / "own"
    folder.mkdir()
    profile = folder / "found.yaml"
    moments = [("growth", at_growth(random.Random(seed), most=6)) for seed in (1, 2)]
    fate, answer = calibrate_with_kills(
        (*asked[1:], "-o", profile), profile, Path(os.environ["CONFLAYERS_CACHE"]), moments
    )
    assert fate.kills == {"growth": 2}
    assert 0 < fate.entries[0] < fate.entries[1]
    check_end(profile, answer, undisturbed)


def test_a_disk_that_fills_up_stops_nothing_but_the_journal(
    run: Run,
    asked: tuple[object, ...],
    journal: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The profile's own failure ends with 1, and says all that was found."""
    with dying(monkeypatch, after=1):
        run(*asked)
    with limited_to(600):
        result = run(*asked, "--resume")
    assert result.code == 1
    assert result.err.count("can't be written") == 2  # the journal, then a file of the answer
    assert result.document["path"] is None
    assert result.document["profile"]["skip"] is not None
    assert "--resume goes on with found.journal.jsonl" in result.err
    assert beside(tmp_path) == {"found.journal.jsonl"}
    assert entries(journal) >= 1
    again = run(*asked, "--resume")
    assert again.code == 0, again.err
    assert beside(tmp_path) == {"found.yaml", "found.safetensors"}


def test_a_full_disk_refuses_before_the_model_is_loaded_or_at_once(
    run: Run, asked: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CalibrationJob, "run", lambda *args, **more: pytest.fail("work was begun"))
    with limited_to(0):
        result = run(*asked)
    assert result.code == 1 and "found.journal.jsonl: can't be written" in result.err
    assert not beside(tmp_path)
    result = run(*asked, "-o", "/proc/found.yaml")
    assert result.code == 1 and "can't be written" in result.err and result.err.count("\n") == 1


def test_killed_while_the_answer_is_written(
    run: Run,
    asked: tuple[object, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between its two files, and within one of them."""

    def killed(self: Profile) -> str:
        raise KilledError

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(Profile, "to_yaml", killed)
        run(*asked)
    half = tmp_path / temporary_name(tmp_path / "found.yaml")
    half.write_text("model: half")
    assert beside(tmp_path) == {"found.journal.jsonl", "found.safetensors", half.name}
    result = run(*asked, "--resume")
    assert result.code == 0, result.err
    assert beside(tmp_path) == {"found.yaml", "found.safetensors"}
    assert Profile.load(tmp_path / "found.yaml").tensors == "found.safetensors"


def test_tensors_that_are_anothers_are_not_replaced(
    run: Run,
    asked: tuple[object, ...],
    journal: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with dying(monkeypatch, after=3):
        run(*asked)
    (tmp_path / "found.safetensors").write_bytes(b"weights")
    result = run(*asked, "--resume")
    assert result.code == 2 and "would be replaced" in result.err
    assert (tmp_path / "found.safetensors").read_bytes() == b"weights"
    assert entries(journal) == 3


def test_a_failure_of_the_model_keeps_what_was_measured(
    run: Run, asked: tuple[object, ...], journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", append_and(5, lambda: raise_(MemoryError)))
        assert run(*asked).code == 1
    assert entries(journal) == 5
    assert run(*asked, "--resume").code == 0


def test_input_that_can_not_be_searched_leaves_nothing(
    run: Run, prompts: Path, tmp_path: Path
) -> None:
    shallow = save_model(tmp_path / "shallow", num_hidden_layers=3)
    result = run("calibrate", "-m", shallow, "--data", prompts, *QUICK, "-o", "found.yaml")
    assert result.code == 2 and "3 layers are too few" in result.err
    assert beside(tmp_path) == {"shallow"}


def test_two_processes_go_on_together(
    model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first has the journal; both are led by it."""
    shared = save_model(tmp_path / "shared", vocab_size=258)
    found = tmp_path / "found.yaml"
    limits = [
        "--strategy",
        "conflayers",
        "--max-iterations",
        2,
        "--refine-limit",
        6,
        "--no-tree",
        "-n",
        24,
    ]
    asked = ["calibrate", "--model", shared, "--data", prompts, "-o", found, *limits]
    asked += ["--dtype", "float32", "--json"]
    journal = tmp_path / "found.journal.jsonl"

    whole = run_ranks(2, lambda rank: [*asked, "-o", tmp_path / "other.yaml"])
    assert [each.code for each in whole] == [0, 0], whole[0].err
    monkeypatch.setenv("CONFLAYERS_TEST_DIES_AFTER", "6")
    killed = run_ranks(2, lambda rank: asked, module="tests.cli.dying")
    assert [each.code for each in killed] == [9, 9], killed[0].err
    assert entries(journal) == 6
    done = run_ranks(2, lambda rank: [*asked, "--resume"])
    assert [each.code for each in done] == [0, 0], done[0].err
    assert "going on with" in done[0].err and done[1].out == done[1].err == ""
    assert not journal.exists()
    sets = [
        [trial["attention"] for trial in Result(0, each[0].out, "").document["trials"]]
        for each in (whole, done)
    ]
    assert sets[0] == sets[1]
