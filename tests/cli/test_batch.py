"""``generate --batch-size``: several prompts at once, of which the answers show nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.proposer import Context, Draft
from tests.cli.conftest import Run, save_model, write_prompts
from tests.engine.rows import SkipRows

TEXTS = ("Tell me.", "A somewhat longer prompt than the first one", "x", "Why?", "Go on.", "And?")
COUNT = len(TEXTS)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_prompts(tmp_path / "prompts.jsonl", *TEXTS)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose context is nearly filled by the longer prompt: it gets the shortest answer."""
    folder = tmp_path_factory.mktemp("models") / "short"
    return save_model(folder, template=None, max_position_embeddings=64)


class Interrupting(SkipRows):
    """Is interrupted when it drafts for the nth time."""

    calls = 0
    last = 10**9

    def propose_batch(self, contexts: Sequence[Context], limits: Sequence[int]) -> list[Draft]:
        type(self).calls += 1
        if self.calls > self.last:
            raise KeyboardInterrupt
        return super().propose_batch(contexts, limits)


@pytest.fixture
def drafting(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has generate --draft draft for rows; with ``last``, be interrupted behind so many drafts."""

    def patch(last: int = 10**9) -> None:
        monkeypatch.setattr(Interrupting, "calls", 0)
        monkeypatch.setattr(Interrupting, "last", last)
        monkeypatch.setattr(
            "conflayers_cli.cli.generate.build_proposer",
            lambda loaded, decoder, *_, **__: Interrupting(decoder, SkipPlan.of_layers([2]), 3),
        )

    return patch


def arguments_for(model: Path, prompts: Path, *more: object) -> tuple[object, ...]:
    return ("generate", "-m", model, "--data", prompts, "--dtype", "float32", "-n", 30, *more)


def without_times(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "stats"} for line in lines]


@pytest.mark.parametrize("size", [1, 2, 4, 9])
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_answers_are_those_of_one_by_one(
    run: Run, short: Path, prompts: Path, size: int, temperature: float
) -> None:
    arguments = arguments_for(short, prompts, "-t", temperature, "--seed", 3)
    alone, together = run(*arguments), run(*arguments, "--batch-size", size)
    assert together.code == 0, together.err
    assert [line["id"] for line in together.lines] == [f"p{i}" for i in range(COUNT)]
    assert without_times(together.lines) == without_times(alone.lines)
    assert len({len(line["token_ids"]) for line in alone.lines}) > 1  # they don't end together
    assert "lossless" not in together.lines[0]


@pytest.mark.parametrize("size", [2, 4])
def test_drafts_change_the_steps_alone(
    run: Run, short: Path, prompts: Path, drafting: Callable[..., None], size: int
) -> None:
    arguments = arguments_for(short, prompts)
    alone = run(*arguments)
    drafting()
    together = run(*arguments, "--draft", "ngram", "--batch-size", size, "--stats")
    assert without_times(together.lines) == without_times(alone.lines)
    stats = [line["stats"] for line in together.lines]
    drafted, accepted = (sum(each[key] for each in stats) for key in ("drafted", "accepted"))
    assert 0 < accepted < drafted
    assert set(stats[0]["by_drafter"]) == {"skip"}
    for each in stats:
        assert each["decode_tokens"] == each["steps"] + each["accepted"]
    assert f"drafted {drafted}, accepted {accepted}" in together.err
    assert f"up to {size} prompts at once" in together.err


def test_a_profile_changes_no_answer(run: Run, profile: Path, model: Path, prompts: Path) -> None:
    arguments = ("--data", prompts, "--dtype", "float32", "-n", 12)
    alone = run("generate", "-p", profile, *arguments)
    together = run("generate", "-p", profile, *arguments, "--batch-size", 3)
    assert without_times(together.lines) == without_times(alone.lines)


@pytest.mark.parametrize("last", [0, 3, 8, 14])
def test_an_interruption_keeps_what_could_be_written(
    run: Run, short: Path, prompts: Path, drafting: Callable[..., None], last: int, tmp_path: Path
) -> None:
    """Whole lines in order; an answer that waits for an earlier one is lost."""
    arguments = arguments_for(short, prompts, "--batch-size", 3, "--draft", "ngram")
    whole = run(*arguments).lines
    drafting(last)
    output = tmp_path / "out.jsonl"
    cut = run(*arguments, "-o", output)
    assert cut.code == 130
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert without_times(lines) == without_times(whole[: len(lines)])
    assert len(lines) < COUNT
    assert (len(lines) > 0) == (last >= 14)
    assert f"{len(lines)} of {COUNT} prompts are answered; --resume" in cut.err
    drafting()
    assert run(*arguments, "-o", output, "--resume").code == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert without_times(lines) == without_times(whole)


def test_another_batch_size_and_other_drafts_may_go_on(
    run: Run, model: Path, profile: Path, prompts: Path
) -> None:
    """No text depends on them."""
    arguments = ("generate", "--data", prompts, "-n", 4, "-t", 0.8, "-o", "out.jsonl")
    assert run(*arguments, "-p", profile, "--max-prompts", 2, "--batch-size", 2).code == 0
    more = ("-m", model, "--draft", "ngram", "--resume", "--batch-size", 3)
    assert run(*arguments, *more).code == 0


def test_the_bar_counts_prompts_that_are_done(
    run: Run, short: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, float]] = []

    @contextmanager
    def bar() -> Iterator[Callable[[str, float], None]]:
        yield lambda message, done: told.append((message, done))

    monkeypatch.setattr("conflayers_cli.cli.generate_output.progress_bar", bar)
    assert run(*arguments_for(short, prompts, "--batch-size", 4, "-o", "out.jsonl")).code == 0
    assert told == [(f"{n} of {COUNT} prompts", n / COUNT) for n in range(COUNT + 1)]


def test_what_does_not_go_with_it(run: Run, model: Path, profile: Path, prompts: Path) -> None:
    for more in (("--adapt", "conflayers"), ("--tree", "-p", profile)):
        refused = run(*arguments_for(model, prompts, "--batch-size", 2, *more))
        assert (refused.code, refused.out) == (2, "")
        assert str(more[0]) in refused.err and "leave --batch-size out" in refused.err
    refused = run("generate", "Hello", "-m", model, "--batch-size", 2)
    assert refused.code == 2 and "--batch-size goes with --data" in refused.err
    allowed = ("--batch-size", 1, "--tree", "-p", profile, "-n", 2)
    assert run(*arguments_for(model, prompts, *allowed)).code == 0
