from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from conflayers_cli.bench.comparison import ComparedMetric, Comparison
from conflayers_cli.bench.metrics import RegressionMetric
from conflayers_cli.bench.regression import broken_gates, compare, find_verdict
from conflayers_cli.bench.schema import BenchDocument
from conflayers_cli.cli.flags import in_flags
from conflayers_cli.errors import InputError
from conflayers_cli.utils.statistics import Change
from tests.benched import ENVIRONMENT, checked

REPEATABLE = {"repeatable_drafts": True}


def against(new: BenchDocument, old: BenchDocument, **more: Any) -> Comparison:
    return compare(new, old, "old.json", **more)


def compared(
    comparison: Comparison, metric: RegressionMetric = RegressionMetric.SPEEDUP
) -> ComparedMetric:
    return next(each for each in comparison.metrics if each.metric is metric)


def test_the_same_is_held() -> None:
    comparison = against(checked(), checked())
    assert [each.verdict for each in comparison.metrics] == ["held"] * 3
    assert comparison.regressions == comparison.remarks[1:] == ()
    assert compared(comparison).change.ratio == pytest.approx(1.0)
    assert comparison.prompts == 3


def test_a_drop_beyond_the_tolerance_is_a_regression_however_different_prompts_are() -> None:
    old, new = checked([1.1, 2.0, 4.0, 1.5]), checked([1.0, 1.8, 3.7, 1.36])
    comparison = against(new, old)
    assert compared(comparison).verdict == "regression"
    (told,) = comparison.regressions
    assert "speed-up over vanilla is 0.910 of what it was in old.json (95 % interval 0.8" in told
    assert told.endswith("under 0.95")
    assert compared(against(new, old, tolerance=0.2)).verdict == "held"


def test_what_may_be_noise_is_told_and_fails_nothing() -> None:
    old, new = checked([2.0, 2.0, 2.0]), checked([2.6, 1.2, 1.6])
    comparison = against(new, old)
    assert compared(comparison).verdict == "unclear"
    assert comparison.regressions == ()
    assert any("may be noise" in remark for remark in comparison.remarks)


@pytest.mark.parametrize("prompts", [4, 6, 30])
def test_noise_alone_seldom_fails_and_a_real_drop_mostly_does(prompts: int) -> None:
    """Speed-ups scatter by 4 % from bench to bench; the tolerance is 5 %."""
    drawn = np.random.default_rng(prompts)

    def failing(change: float) -> float:
        new, old = np.exp(drawn.normal(0, 0.04, (2, 1000, prompts)))
        changes = (Change.paired(list(change * n), list(o)) for n, o in zip(new, old, strict=True))
        return sum(find_verdict(c, 0.05, certain=False) == "regression" for c in changes) / 1000

    assert failing(1.0) <= 0.025
    assert failing(0.85) >= 0.9


@pytest.mark.parametrize(("accepted", "fails"), [(58, False), (56, True)])
def test_acceptance_that_repeats_is_judged_without_an_interval(accepted: int, fails: bool) -> None:
    old = checked(accepted=60, settings=REPEATABLE)
    comparison = against(checked(accepted=accepted, settings=REPEATABLE), old)
    found = compared(comparison, RegressionMetric.ACCEPTANCE)
    assert (found.judged, found.change.low) == (True, None)
    assert found.change.ratio == pytest.approx(accepted / 60)
    assert bool(comparison.regressions) == fails
    assert ("accepted drafts" in " ".join(comparison.regressions)) == fails


def test_acceptance_that_depends_on_measured_times_is_told_only() -> None:
    old, new = checked(accepted=[60, 62, 64]), checked(accepted=[30, 31, 32])
    comparison = against(new, old)
    found = compared(comparison, RegressionMetric.ACCEPTANCE)
    assert (found.judged, found.verdict) == (False, "regression")
    assert found.change.high is not None and found.change.high < 0.6
    assert comparison.regressions == ()
    assert "acceptance varies from run to run" in " ".join(comparison.remarks)
    assert against(new, old, judged=[RegressionMetric.ACCEPTANCE]).regressions


def test_tokens_per_second_are_judged_on_one_machine_only() -> None:
    old, new = checked(vanilla=20.0), checked(vanilla=10.0)
    assert against(new, old).regressions == ()
    assert compared(against(new, old), RegressionMetric.SPEED).verdict == "regression"
    assert against(new, old, judged=[RegressionMetric.SPEED]).regressions
    elsewhere = checked(environment={**ENVIRONMENT, "processor": "Another"})
    with pytest.raises(InputError, match=r"^judge speed: old\.json was .* another machine"):
        against(elsewhere, old, judged=[RegressionMetric.SPEED])
    (first, *_) = against(elsewhere, old).remarks
    assert "measured elsewhere: processor 'A processor' → 'Another'" in first


def test_prompts_are_paired_by_what_they_say() -> None:
    old = checked([1.0, 2.0, 3.0, 4.0], texts=["a", "b", "b", "c"])
    new = checked([4.0, 3.0, 2.0, 9.0, 1.0], texts=["c", "x", "b", "b", "a"])
    comparison = against(new, old)
    assert comparison.prompts == 4
    change = compared(comparison).change
    assert change.ratio == pytest.approx((1 * 1 * 1 * 3) ** (1 / 4))  # the second b: 9 over 3
    assert "4 prompts are the same; 1 new and 0 old ones are left out" in comparison.remarks


def test_one_prompt_has_its_runs_and_two_have_no_interval() -> None:
    one = compared(against(checked([1.5]), checked([2.0])))
    assert one.verdict == "regression"
    assert one.change.high == pytest.approx(0.75)
    comparison = against(checked([1.5, 1.5]), checked([2.0, 2.0]))
    assert compared(comparison).verdict == "unclear"
    assert "too few prompts and runs to tell" in " ".join(comparison.remarks)


def test_queues_are_compared_by_their_runs() -> None:
    batched = {"batch_size": 2}
    old = checked([2.0, 2.0], settings=batched, together=True)
    new = checked([1.5, 1.5], settings=batched, together=True)
    assert compared(against(new, old)).verdict == "regression"
    other = checked([1.5, 1.5], settings=batched, together=True, texts=["x", f"{0:064x}"])
    with pytest.raises(InputError, match="other prompts, and they decode together"):
        against(other, old)


def test_a_speed_that_is_missing_is_a_regression() -> None:
    short = checked()
    prompts = [
        prompt.model_copy(update={"tokens_per_second": {"vanilla": [None], "speculative": [None]}})
        for prompt in short.prompts
    ]
    comparison = against(short.model_copy(update={"prompts": prompts}), checked())
    assert compared(comparison).verdict == "unknown"
    assert comparison.regressions == (
        "speed-up over vanilla could not be measured here and in old.json",
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_hash": "1" * 16}, r"is of another model \(tiny, configuration 0f0f"),
        ({"texts": ["x", "y", "z"]}, "other prompts, none of them is the same"),
        ({"settings": {"max_new_tokens": 9}}, r"other settings: max_new_tokens 101 \(this: 9\)"),
        ({"settings": {"sampling": {"temperature": 1.0}}}, "temperature"),
        ({"settings": {"quantize": "int8"}}, "quantize null"),
    ],
)
def test_what_cannot_be_compared_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=f"old.json: .*{said}"):
        against(checked(**changes), checked())


def test_what_differs_is_told() -> None:
    new = checked(
        model="renamed",
        environment={**ENVIRONMENT, "torch": "3.0"},
        settings={"exact": False, "lookahead": False},
    )
    remarks = against(new, checked()).remarks
    assert "the model's name was tiny; by its configuration it is the same" in remarks
    for name in ("torch", "exact", "lookahead"):
        assert f"not the same: {name}" in remarks


def test_the_document_of_a_comparison() -> None:
    found = against(checked([1.0, 1.0, 1.0]), checked()).as_json()
    assert found["figures"]["speedup"] == {
        "old": pytest.approx(2.0),
        "new": pytest.approx(1.0),
        "ratio": pytest.approx(0.5),
        "low": pytest.approx(0.5),
        "high": pytest.approx(0.5),
        "judged": True,
        "verdict": "regression",
    }
    assert (found["old"], found["prompts"], found["tolerance"]) == ("old.json", 3, 0.05)


def test_gates_are_named() -> None:
    bench = checked([1.0, 1.0, 1.0])
    assert broken_gates(bench, None, None) == []
    assert broken_gates(bench, 1.0, against(bench, bench)) == []
    under, regressed = map(in_flags, broken_gates(bench, 1.5, against(bench, checked())))
    assert under == "--fail-under: the speed-up is 1.000, under 1.5"
    assert regressed.startswith("--compare: speed-up over vanilla is 0.500")
