"Errors of forecasts: against NumPy on all values at once, in any batches, and in the cases where others are known to be wrong."

import math

import numpy as np
import pytest
import torch
import torchmetrics.functional as tm
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trainkit.forecast.data import StandardScaler
from trainkit.forecast.metrics import (
    ERRORS,
    ForecastErrors,
    horizon_table,
    masked_huber,
    masked_mae,
    masked_mape,
    masked_mse,
    masked_rmse,
    masked_smape,
    masked_wape,  # fmt: skip
    observed,
)
from trainkit.learner import Learner

NAN = float("nan")
MASKED = {"mae": masked_mae, "mse": masked_mse, "rmse": masked_rmse, "huber": masked_huber, "mape": masked_mape,
          "wape": masked_wape, "smape": masked_smape}  # fmt: skip


def forecasts(n=40, outputs=5, variables=3, gaps=0.2, seed=0, level=0.0):
    g = torch.Generator().manual_seed(seed)
    t = level + torch.randn(n, outputs, variables, generator=g, dtype=torch.float64).cumsum(1)
    p = t + torch.randn(n, outputs, variables, generator=g, dtype=torch.float64)
    t[torch.rand(n, outputs, variables, generator=g) < gaps] = NAN
    return p, t


def by_hand(p, t, delta=1.0):
    "The nine measures by NumPy, from all values at once."
    p, t = (x.double().numpy() for x in (p, t))
    seen = ~np.isnan(t)
    e, divisible = np.abs(p - t)[seen], np.abs(t[seen]) >= 5e-5
    found = {"mae": e.mean(), "mse": (e**2).mean(), "rmse": np.sqrt((e**2).mean()), "wape": e.sum() / np.abs(t[seen]).sum(),
             "mape": (e[divisible] / np.abs(t[seen][divisible])).mean(),
             "smape": (2 * e / np.maximum(np.abs(p[seen]) + np.abs(t[seen]), 1e-300)).mean(),
             "huber": np.where(e <= delta, e**2 / 2, delta * (e - delta / 2)).mean()}  # fmt: skip
    each = [(p[..., c][seen[..., c]], t[..., c][seen[..., c]]) for c in range(p.shape[-1])]
    found["r2"] = np.mean([1 - ((a - b) ** 2).sum() / ((b - b.mean()) ** 2).sum() for a, b in each])
    found["corr"] = np.mean([np.corrcoef(a, b)[0, 1] for a, b in each])
    return found


def fed(p, t, cuts=(), **options):
    found = ForecastErrors(**{"names": ERRORS, **options})
    for a, b in zip([0, *cuts], [*cuts, len(p)]):
        found.update(p[a:b], t[a:b])
    return found


@pytest.mark.parametrize("level", [0.0, 1000.0])
def test_numpy_says_the_same(level):
    p, t = forecasts(level=level)
    found, wanted = fed(p, t, (7, 8, 30)).compute(), by_hand(p, t)
    assert [*found] == [*ERRORS] and found == pytest.approx(wanted, rel=1e-9)


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.lists(st.integers(1, 23), max_size=6, unique=True), st.sampled_from([0.0, 0.3, 0.9]))
def test_batches_of_any_size_and_order(seed, cuts, gaps):
    p, t = forecasts(24, 3, 2, gaps, seed)
    at_once = fed(p, t)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(seed))
    in_parts = fed(p[order], t[order], sorted(cuts))
    for a, b in ((x.compute(), y.compute()) for x, y in [(at_once, in_parts)]):
        assert a == pytest.approx(b, rel=1e-9, abs=1e-12, nan_ok=True)
    for what in ("by_horizon", "by_variable"):
        for a, b in zip(getattr(at_once, what)().values(), getattr(in_parts, what)().values()):
            assert np.allclose(a, b, rtol=1e-9, equal_nan=True)


def test_single_horizons_and_variables():
    p, t = forecasts()
    found = fed(p, t, (3, 20))
    for h in range(5):
        wanted = by_hand(p[:, h : h + 1], t[:, h : h + 1])
        assert {k: v[h] for k, v in found.by_horizon().items()} == pytest.approx(wanted, rel=1e-9)
    for c in range(3):
        wanted = by_hand(p[..., c : c + 1], t[..., c : c + 1])
        assert {k: v[c] for k, v in found.by_variable().items()} == pytest.approx(wanted, rel=1e-9)
    rows = horizon_table(found, (1, 5))
    assert [row["horizon"] for row in rows] == [1, 5, "all"] and rows[1]["mae"] == pytest.approx(found.by_horizon()["mae"][4])
    assert rows[2]["r2"] == found.compute()["r2"]


def test_torchmetrics_says_the_same_of_r2_and_correlation():
    p, t = forecasts(gaps=0.0)
    flat = [(p[..., c].flatten(), t[..., c].flatten()) for c in range(3)]
    found = fed(p, t).by_variable()
    assert np.allclose(found["r2"], [tm.r2_score(*pair) for pair in flat])
    assert np.allclose(found["corr"], [tm.pearson_corrcoef(*pair) for pair in flat])


def test_digits_are_kept_beside_a_large_mean():
    "Pressures in float32: squared deviations by sums of squares would be noise."
    t = (1e5 + torch.randn(3000, 2, 1, generator=torch.Generator().manual_seed(0))).float()
    p = t + 0.25
    found = fed(p, t, range(100, 3000, 100)).compute()
    assert found["r2"] == pytest.approx(1 - ((p - t).double() ** 2).mean().item() / t.double().var(correction=0).item(), rel=1e-6)
    assert found["corr"] == pytest.approx(np.corrcoef(p.flatten().double(), t.flatten().double())[0, 1], abs=1e-9)


@pytest.mark.parametrize("name", MASKED)
def test_functions_and_object_agree(name):
    p, t = forecasts(gaps=0.3)
    assert MASKED[name](p, t).item() == pytest.approx(fed(p, t, (9,)).compute()[name], rel=1e-9)


@pytest.mark.parametrize("name", MASKED)
def test_gradients_are_those_of_what_was_measured(name):
    p, t = forecasts(6, 2, 2, gaps=0.4)
    t[0, 0, 0] = 0.0
    p.requires_grad_()
    MASKED[name](p, t).backward()
    assert p.grad.isfinite().all() and not p.grad[t.isnan()].any()
    seen = ~t.isnan()
    q = p.detach()[seen].requires_grad_()
    MASKED[name](q, t[seen]).backward()
    assert torch.allclose(q.grad, p.grad[seen])


def test_values_of_the_field():
    p, t = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, NAN, 4.0])
    assert masked_mae(p, t) == 0.5 and masked_mae(p, t * NAN) == 0
    huber = masked_huber(torch.tensor([0.5, 9.0]), torch.tensor([0.0, 0.0]), mask=torch.tensor([1.0, 0.0]))
    assert huber == 0.125, "divided by what counts, not by all"
    mape = masked_mape(torch.tensor([2.0, 9.0]), torch.tensor([1.0, 0.0]))
    assert mape == 1.0, "a target of zero is left out of the sum and of the count"
    assert masked_mape(torch.tensor([1.5, 9.0]), torch.tensor([1.0, 3.0]), mask=torch.tensor([1, 0])) == 0.5
    two = ForecastErrors("rmse")
    for error, n in ((3.0, 2), (1.0, 6)):
        two.update(torch.full((n, 1, 1), error), torch.zeros(n, 1, 1))
    assert two.compute()["rmse"] == pytest.approx(math.sqrt(3))


def test_a_mask_is_read_and_never_written():
    mask = torch.tensor([1.0, 0.0, 1.0, 0.0])
    for f in MASKED.values():
        f(torch.ones(4), torch.full((4,), 2.0), mask=mask)
    assert mask.tolist() == [1, 0, 1, 0]
    t = torch.tensor([1.0, NAN])
    observed(t, null=1.0)
    assert t[0] == 1 and t[1].isnan()


def test_null_values_beside_nan():
    t = torch.tensor([0.0, 2.0, NAN, 4e-5, 5.0])
    assert observed(t, null=0.0).tolist() == [False, True, False, False, True]
    assert observed(t, null=NAN).tolist() == [True, True, False, True, True]
    p = torch.tensor([7.0, 3.0, 7.0, 7.0, 5.0])
    assert masked_mae(p, t, null=0.0) == 0.5
    found = ForecastErrors("mae", null=0.0)
    found.update(p[:, None, None], t[:, None, None])
    assert found.compute()["mae"] == 0.5


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-9, 1e9), st.sampled_from([-1, 1]), st.integers(0, 9999), st.lists(st.integers(1, 79), max_size=9))
def test_what_never_changes_is_told_from_rounding(size, sign, seed, cuts):
    "A thousand times 0.1 has a mean that isn't 0.1, and squared deviations above zero."
    (p, t), value = forecasts(80, 3, 3, 0.3, seed), sign * size
    t[..., 0][~t[..., 0].isnan()] = value
    p[..., 1] = value
    found = fed(p, t, cuts := sorted({*cuts}))
    r2, corr = (found.by_variable()[name] for name in ("r2", "corr"))
    assert np.isnan(r2).tolist() == [True, False, False] and np.isnan(corr).tolist() == [True, True, False]
    assert found.compute()["r2"] == pytest.approx(r2[1:].mean(), rel=1e-9), "over the variables that change"
    assert math.isnan(found.compute()["corr"]), "a forecast that is constant is not left out"
    assert fed(p[..., ::2], t[..., ::2], cuts).compute()["corr"] == pytest.approx(corr[2], rel=1e-9)


def test_a_little_is_more_than_nothing():
    t = 1000 + 1e-6 * torch.randn(5000, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = fed(t + 1e-7, t, range(100, 5000, 100)).compute()
    assert found["corr"] == pytest.approx(1, abs=1e-6) and found["r2"] == pytest.approx(0.99, abs=0.01)


def test_nothing_measured_is_not_perfect():
    p, t = forecasts(4)
    for found in (ForecastErrors(ERRORS), fed(p, t * NAN)):
        assert all(math.isnan(value) for value in found.compute().values())


def test_a_forecast_that_is_nan_is_not_left_out():
    p, t = forecasts(8, gaps=0.2)
    p[2, 3, 1] = NAN
    t[2, 3, 1] = 1.0
    found = fed(p, t)
    assert all(math.isnan(found.compute()[name]) for name in ("mae", "mse", "rmse", "wape", "smape", "huber"))
    assert np.isnan(found.by_horizon()["mae"]).tolist() == [False, False, False, True, False]
    t[2, 3, 1] = NAN
    assert not math.isnan(fed(p, t).compute()["mae"]), "where nothing is compared, it doesn't matter"


def test_a_refused_batch_changes_nothing():
    p, t = forecasts()
    found = fed(p, t)
    before = found.compute()
    for bad in ((p[:, :2], t[:, :2]), (p[0], t[0]), (p, t[:7])):
        with pytest.raises(ValueError):
            found.update(*bad)
    with pytest.raises(ValueError, match="a mask has the target's shape"):
        found.update(p, t, mask=torch.ones(3))
    assert found.compute() == before


def test_own_units():
    p, t = forecasts()
    scaler = StandardScaler(torch.tensor([10.0, -3.0, 0.0]), torch.tensor([2.0, 5.0, 0.1]))
    own = fed(scaler.transform(p), scaler.transform(t), (11,), scaler=scaler)
    assert own.compute() == pytest.approx(fed(p, t).compute(), rel=1e-9)


@pytest.mark.parametrize("make,said", [
    (lambda: ForecastErrors("r22"), r"no measure 'r22', did you mean 'r2'\?"), (lambda: ForecastErrors(delta=0), "delta"),
    (lambda: horizon_table(ForecastErrors(), (1,)), "from 1 to 0"),
    (lambda: horizon_table(fed(*forecasts()), (6,)), "from 1 to 5"),
    (lambda: masked_mse(torch.ones(3), torch.ones(3, 1)), r"\(3,\) and a target \(3, 1\)")])  # fmt: skip
def test_bad_arguments(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_in_a_learner_uneven_batches_are_exact():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(19, 4, 2, generator=g), torch.randn(19, 4, 2, generator=g)
    y[torch.rand(19, 4, 2, generator=g) < 0.4] = NAN
    model = nn.Linear(2, 2)
    learn = Learner(model, {"train": (x, y), "valid": (x, y)}, masked_mse, metrics=ForecastErrors(("mse", "rmse", "r2")),
                    batch_size=8, front="none")  # fmt: skip
    found, wanted = learn.validate(), by_hand(model(x).detach(), y)
    for name in ("mse", "rmse", "r2"):
        assert found[f"valid/{name}"] == pytest.approx(wanted[name], rel=1e-5)
    assert found["valid/loss"] != pytest.approx(wanted["mse"], rel=1e-5), "the mean of the batches' losses is another number"
