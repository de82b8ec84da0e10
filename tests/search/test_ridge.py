"""Ridge regression from sums over tokens, against least squares on the tokens themselves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import torch

from conflayers_cli.search import ridge as module
from conflayers_cli.search.ridge import RIDGE, SINK, Fit, Moments, sinks

Array = npt.NDArray[np.float64]
SIZE, END = 12, 7
NEXT_TO_NOTHING = 1e-10


@dataclass
class Data:
    """Hidden states before and behind a block, and what each token counts."""

    entering: Array
    leaving: Array
    weights: Array

    @property
    def change(self) -> Array:
        return self.leaving - self.entering

    def fit(self, rank: int | None = None, ridge: float = RIDGE, cuts: tuple[int, ...] = ()) -> Fit:
        """By `Moments`, counted in in pieces that end at ``cuts``."""
        return self.moments(cuts).fit(END, rank, ridge)

    def moments(self, cuts: tuple[int, ...] = ()) -> Moments:
        moments = Moments(SIZE, [END])
        parts = (np.split(values, cuts) for values in vars(self).values())
        for entering, leaving, weights in zip(*parts, strict=True):
            states = torch.from_numpy(entering), {END: torch.from_numpy(leaving)}
            moments.add(*states, torch.from_numpy(weights))
        return moments


def random_data(
    count: int = 400, seed: int = 0, *, noise: float = 1.0, offset: float = 3.0
) -> Data:
    """Features of very different spread, about offsets; a change that is linear but for noise."""
    draw = np.random.default_rng(seed)
    spread = 10.0 ** draw.uniform(-1, 1, SIZE)
    entering = draw.normal(size=(count, SIZE)) @ draw.normal(size=(SIZE, SIZE)) * spread + offset
    change = entering @ draw.normal(size=(SIZE, SIZE)) / spread.mean() - 2.0
    change += noise * draw.normal(size=change.shape)
    return Data(entering, entering + change, draw.uniform(0.1, 1.0, count))


def direct(data: Data, ridge: float) -> tuple[Array, Array]:
    """(weights on the hidden states ``[d, d]``, bias) by least squares with one row per token and
    one per feature for the penalty: no sums of squares anywhere."""
    share = data.weights / data.weights.sum()
    mean = share @ data.entering
    spread = np.sqrt(share @ (data.entering - mean) ** 2)
    root = np.sqrt(share)[:, None]
    middle = share @ data.change
    rows = np.vstack([root * (data.entering - mean) / spread, np.sqrt(ridge) * np.eye(SIZE)])
    targets = np.vstack([root * (data.change - middle), np.zeros((SIZE, SIZE))])
    solution: Array = np.linalg.lstsq(rows, targets, rcond=None)[0] / spread[:, None]
    return solution.T, middle - mean @ solution


def matrix(fit: Fit) -> Array:
    whole = torch.eye(SIZE, dtype=torch.float64)
    for factor in fit.factors:
        whole = factor.double() @ whole
    return whole.numpy()


def predicted(fit: Fit, entering: Array) -> Array:
    return entering @ matrix(fit).T + fit.bias.double().numpy()


def explained(data: Data, change: Array) -> float:
    """The share of the change's variance that a prediction explains."""
    share = data.weights / data.weights.sum()
    left = share @ (data.change - change) ** 2
    whole = share @ (data.change - share @ data.change) ** 2
    return float(1 - left.sum() / whole.sum())


@pytest.fixture
def precise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps are kept in float32, so that they can be compared closely."""
    monkeypatch.setattr(module, "LARGEST", 0.0)


@pytest.mark.usefixtures("precise")
@pytest.mark.parametrize("ridge", [RIDGE, 1.0, 30.0])
def test_it_is_the_weighted_ridge_solution_on_standardised_features(ridge: float) -> None:
    data = random_data()
    fit = data.fit(ridge=ridge)
    weights, bias = direct(data, ridge)
    np.testing.assert_allclose(matrix(fit), weights, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(fit.bias.numpy(), bias, rtol=1e-5, atol=1e-5)
    assert fit.explained == pytest.approx(explained(data, predicted(fit, data.entering)), abs=1e-6)


@pytest.mark.usefixtures("precise")
def test_a_linear_block_is_found_exactly() -> None:
    data = random_data(noise=0.0)
    fit = data.fit(ridge=NEXT_TO_NOTHING)
    change = data.change
    np.testing.assert_allclose(predicted(fit, data.entering), change, atol=1e-4 * change.std())
    assert fit.explained == pytest.approx(1.0, abs=1e-9)


@pytest.mark.usefixtures("precise")
@pytest.mark.parametrize("offset", [1e4, 1e6])
def test_features_far_from_zero_lose_no_digits(offset: float) -> None:
    near, far = random_data(offset=0.0), random_data(offset=0.0)
    # powers of two, so that the states themselves are not rounded by it any more than need be
    shift = 2.0 ** round(np.log2(offset))
    far.entering, far.leaving = far.entering + shift, far.leaving + shift
    fit, expected = far.fit(), near.fit()
    np.testing.assert_allclose(matrix(fit), matrix(expected), rtol=1e-5, atol=1e-7)
    assert fit.explained == pytest.approx(expected.explained, abs=1e-9)
    bias = expected.bias.double().numpy() - shift * direct(near, RIDGE)[0].sum(1)
    np.testing.assert_allclose(fit.bias.double().numpy(), bias, rtol=1e-5)


@pytest.mark.usefixtures("precise")
@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("cuts", [(1,), (7, 8, 200), tuple(range(10, 400, 10))])
def test_how_tokens_come_makes_no_difference(cuts: tuple[int, ...], rank: int | None) -> None:
    data = random_data()
    whole, pieces = data.fit(rank), data.fit(rank, cuts=cuts)
    np.testing.assert_allclose(matrix(pieces), matrix(whole), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(pieces.bias.numpy(), whole.bias.numpy(), rtol=1e-5, atol=1e-5)
    assert pieces.explained == pytest.approx(whole.explained, abs=1e-9)


@pytest.mark.usefixtures("precise")
def test_tokens_of_weight_0_do_not_count() -> None:
    data = random_data()
    expected = data.fit()
    draw = np.random.default_rng(1)
    wild = 1e3 * draw.normal(size=(2, 50, SIZE))
    more = Data(
        np.vstack([wild[0], data.entering]),
        np.vstack([wild[1], data.leaving]),
        np.concatenate([np.zeros(50), data.weights]),
    )
    fit = more.fit()
    np.testing.assert_allclose(matrix(fit), matrix(expected), rtol=1e-5, atol=1e-6)
    assert fit.explained == pytest.approx(expected.explained, abs=1e-9)
    assert more.moments().weight == pytest.approx(data.weights.sum())


@pytest.mark.usefixtures("precise")
def test_a_token_of_double_weight_counts_twice() -> None:
    data = random_data()
    double = Data(data.entering, data.leaving, data.weights.copy())
    double.weights[:100] *= 2
    repeated = Data(*(np.concatenate([values, values[:100]]) for values in vars(data).values()))
    fit, expected = double.fit(), repeated.fit()
    np.testing.assert_allclose(matrix(fit), matrix(expected), rtol=1e-6, atol=1e-6)
    assert not np.allclose(matrix(fit), matrix(data.fit()), rtol=1e-3)


@pytest.mark.usefixtures("precise")
def test_features_that_never_change_are_left_alone() -> None:
    data = random_data()
    expected = direct(Data(data.entering, data.leaving, data.weights), RIDGE)[0]
    constant = [2, 5]
    data.entering[:, constant] = [4.0, 0.0]
    data.leaving[:, constant] = [4.0, 1.0]
    fit = data.fit()
    found = matrix(fit)
    assert np.isfinite(found).all()
    assert (abs(found[:, constant]) < 1e-9).all(), "they explain nothing"
    change = predicted(fit, data.entering)[:, constant]
    np.testing.assert_allclose(change, np.broadcast_to([0.0, 1.0], change.shape), atol=1e-5)
    assert not np.allclose(found[0], expected[0]), "the others make up for them"


@pytest.mark.usefixtures("precise")
@pytest.mark.parametrize("rank", [1, 4, SIZE - 1])
def test_of_low_rank_it_is_the_best_of_all_such_maps(rank: int) -> None:
    """The best prediction of rank r is that of full rank, cut down by a singular value
    decomposition (Izenman 1975)."""
    data = random_data(noise=3.0)
    fit = data.fit(rank, NEXT_TO_NOTHING)
    assert [tuple(factor.shape) for factor in fit.factors] == [(rank, SIZE), (SIZE, rank)]
    share = data.weights / data.weights.sum()
    weights, _ = direct(data, NEXT_TO_NOTHING)
    whole = (data.entering - share @ data.entering) @ weights.T
    _, _, directions = np.linalg.svd(np.sqrt(share)[:, None] * whole, full_matrices=False)
    best = whole @ directions[:rank].T @ directions[:rank] + share @ data.change
    np.testing.assert_allclose(
        predicted(fit, data.entering), best, rtol=1e-3, atol=1e-4 * data.change.std()
    )
    assert fit.explained == pytest.approx(explained(data, best), abs=1e-6)
    # and no other few directions of the change do as well, those of its own variance included
    own = np.linalg.svd(np.sqrt(share)[:, None] * (data.change - share @ data.change))[2][:rank]
    drawn = np.linalg.qr(np.random.default_rng(2).normal(size=(SIZE, rank)))[0].T
    for other in (own, drawn):
        worse = whole @ other.T @ other + share @ data.change
        assert explained(data, worse) < fit.explained


@pytest.mark.usefixtures("precise")
def test_of_low_rank_and_damped_what_it_explains_is_what_is_said() -> None:
    data = random_data(noise=3.0)
    fit = data.fit(3, 1.0)
    assert fit.explained == pytest.approx(explained(data, predicted(fit, data.entering)), abs=1e-6)
    assert data.fit(1, 1.0).explained < fit.explained < data.fit(None, 1.0).explained


@pytest.mark.parametrize("rank", [SIZE, 5 * SIZE])
def test_a_rank_that_is_no_bound_bounds_nothing(rank: int) -> None:
    data = random_data()
    (factor,), (expected,) = data.fit(rank).factors, data.fit().factors
    assert torch.equal(factor, expected)


@pytest.mark.usefixtures("precise")
def test_blocks_with_one_beginning_are_fitted_each_by_itself() -> None:
    data, other = random_data(), random_data(seed=3)
    moments = Moments(SIZE, [END, 9])
    leaving = {END: torch.from_numpy(data.leaving), 9: torch.from_numpy(other.leaving)}
    entering = torch.from_numpy(data.entering)
    moments.add(entering, leaving, torch.from_numpy(data.weights))
    alone = Data(data.entering, other.leaving, data.weights)
    for end, expected in ((END, data.fit()), (9, alone.fit())):
        np.testing.assert_allclose(matrix(moments.fit(end)), matrix(expected), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_states_of_any_dtype_are_summed_up_in_float64(dtype: torch.dtype) -> None:
    states = torch.full((5000, SIZE), 3.0, dtype=dtype)
    states[::2] = 1.0
    moments = Moments(SIZE, [END])
    moments.add(states, {END: 2 * states}, torch.ones(5000, dtype=dtype))
    fit = moments.fit(END)
    assert moments.weight == 5000
    change = predicted(fit, states[:2].double().numpy())
    np.testing.assert_allclose(change, states[:2].double().numpy(), atol=0.02)


def test_maps_are_kept_in_float16_unless_they_reach_too_far() -> None:
    data = random_data()
    near = data.fit()
    assert {tensor.dtype for tensor in (*near.factors, near.bias)} == {torch.float16}
    np.testing.assert_allclose(matrix(near), direct(data, RIDGE)[0], rtol=1e-2, atol=1e-3)
    data.leaving *= 1e6
    far = data.fit()
    assert {tensor.dtype for tensor in (*far.factors, far.bias)} == {torch.float32}
    assert all(bool(tensor.isfinite().all()) for tensor in (*far.factors, far.bias))
    np.testing.assert_allclose(matrix(far), direct(data, RIDGE)[0], rtol=1e-3, atol=1.0)
    # a bias alone may reach too far
    data = random_data()
    data.leaving += 1e6
    assert {tensor.dtype for tensor in data.fit(3).factors} == {torch.float32}


def test_a_block_that_changes_nothing() -> None:
    data = random_data()
    data.leaving = data.entering.copy()
    fit = data.fit()
    assert fit.explained == 1.0
    assert not matrix(fit).any() and not fit.bias.any()


def test_nothing_to_fit_to_is_an_error() -> None:
    with pytest.raises(ValueError, match="no tokens to fit to"):
        Moments(SIZE, [END]).fit(END)
    data = random_data()
    data.weights[:] = 0.0
    with pytest.raises(ValueError, match="no tokens to fit to"):
        data.fit()


@pytest.mark.parametrize("place", ["entering", "leaving"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_states_that_are_no_numbers_are_an_error(place: str, value: float) -> None:
    data = random_data()
    getattr(data, place)[17, 3] = value
    with pytest.raises(ValueError, match="no numbers"):
        data.fit()


def test_sinks_are_many_times_as_long_as_the_median() -> None:
    states = torch.randn(50, SIZE, generator=torch.Generator().manual_seed(0))
    states /= states.norm(dim=-1, keepdim=True)
    states[4] *= 1.01 * SINK
    states[30] *= 300
    states[31] *= 0.98 * SINK
    states[7] *= 0.001
    assert sinks(states).nonzero().flatten().tolist() == [4, 30]
    # lengths of float16 states may leave float16's range
    assert sinks(states.half() * 15_000).nonzero().flatten().tolist() == [4, 30]
