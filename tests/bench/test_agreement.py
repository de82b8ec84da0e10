"""How far two outputs agree, by hand."""

import pytest

from conflayers_cli.bench.agreement import first_difference, measure_agreement, rouge_2, share_equal


@pytest.mark.parametrize(
    ("own", "other", "equal", "rouge", "first"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 1.0, 1.0, None),
        ([1, 2, 3, 4], [1, 2, 9, 4], 0.75, 1 / 3, 2),
        ([1, 2, 3, 4], [1, 2], 0.5, 2 * 1 / 4, 2),
        ([1, 2, 3], [2, 3, 1], 0.0, 2 * 1 / 4, 0),
        # a pair that one text repeats counts once where the other has it once
        ([5, 5, 5], [5, 5], 2 / 3, 2 * 1 / 3, 2),
        ([1], [1], 1.0, 1.0, None),
        ([1], [2], 0.0, 0.0, 0),
        ([], [], 1.0, 1.0, None),
        ([], [1, 2], 0.0, 0.0, 0),
    ],
)
def test_by_hand(
    own: list[int], other: list[int], equal: float, rouge: float, first: int | None
) -> None:
    assert share_equal(own, other) == pytest.approx(equal)
    assert rouge_2(own, other) == pytest.approx(rouge)
    assert rouge_2(other, own) == pytest.approx(rouge)
    assert first_difference(own, other) == first


def test_of_several_prompts() -> None:
    found = measure_agreement([([1, 2, 3], [1, 2, 3]), ([1, 2, 3], [1, 9, 3]), ([1, 2], [7, 8])])
    assert found.equal == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert (found.identical, found.prompts) == (1, 3)
    assert found.first_divergence == 0.5
    assert measure_agreement([([1], [1])]).first_divergence is None
    with pytest.raises(ValueError, match="no outputs"):
        measure_agreement([])
