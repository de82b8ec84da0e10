from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from conflayers_cli.utils.statistics import Change


def test_pairs_are_compared_by_the_mean_of_log_ratios() -> None:
    new, old = [2.0, 3.0, 8.0], [1.0, 3.0, 4.0]
    change = Change.paired(new, old)
    logs = np.log([2.0, 1.0, 2.0])
    expected = stats.ttest_1samp(logs, 0.0).confidence_interval()
    assert change.ratio == pytest.approx(4 ** (1 / 3))
    assert (change.low, change.high) == pytest.approx((np.exp(expected.low), np.exp(expected.high)))
    assert change.new is not None and change.old is not None
    assert change.new / change.old == pytest.approx(change.ratio)


def test_lots_that_do_not_pair_are_compared_by_welch() -> None:
    new, old = [2.0, 3.0, 8.0, 4.0], [1.0, 3.0, 4.0]
    change = Change.unpaired(new, old)
    expected = stats.ttest_ind(np.log(new), np.log(old), equal_var=False).confidence_interval()
    assert (change.low, change.high) == pytest.approx((np.exp(expected.low), np.exp(expected.high)))
    assert change.new is not None and change.old is not None
    assert change.new / change.old == pytest.approx(change.ratio)


def test_few_figures_have_no_interval() -> None:
    assert Change.paired([2.0, 2.0], [1.0, 1.0]) == Change(1.0, 2.0, 2.0)
    unpaired = Change.unpaired([2.0, 2.0], [1.0, 1.0, 1.0])
    assert unpaired.ratio == pytest.approx(2.0)
    assert unpaired.low is None
    assert Change.paired([], []) == Change(None, None, None)
    assert Change.unpaired([1.0], []) == Change(None, None, None)


def test_figures_that_do_not_vary_have_an_interval_of_no_width() -> None:
    change = Change.unpaired([2.0] * 3, [1.0] * 3)
    assert (change.low, change.high) == pytest.approx((2.0, 2.0))
