"Numbers that know their sample: the jackknife against textbook errors, fair samples, and what fewer samples would say."
import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainkit.gan.estimates import Estimate, Reservoir, by_count, jackknife, jackknifed
from trainkit.metrics import MetricSet


def test_an_estimate_is_a_float_that_can_be_copied_and_recorded():
    value = Estimate(1.5, 100, 200, 0.25)
    for same in (copy.deepcopy(value), pickle.loads(pickle.dumps(value))):
        assert (same, same.n_fake, same.n_real, same.error) == (1.5, 100, 200, 0.25)
    assert value + 1 == 2.5 and f"{value:.2f}" == "1.50" and max(value, 1.0) is value
    assert repr(value) == "1.5 ± 0.25 (100 fakes, 200 real)" and repr(Estimate(2.0, 7)) == "2 (7 fakes)"

    class Constant:
        def reset(self): ...
        def update(self, pred, *targets): ...
        def compute(self): return {"a": value}

    metrics = MetricSet(Constant())
    metrics.update(torch.zeros(3), (), 3)
    assert metrics.compute() == {"a": 1.5} and type(metrics.compute()["a"]) is float


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=30))
@settings(max_examples=50, deadline=None)
def test_the_jackknife_of_a_mean_is_its_standard_error(values):
    v = torch.tensor(values, dtype=torch.float64)
    without = [(v.sum() - x).item() / (len(v) - 1) for x in v]
    assert jackknife(without) == pytest.approx((v.std() / len(v) ** 0.5).item(), abs=1e-8)


def test_an_unknown_error_is_nan():
    assert math.isnan(jackknife([])) and math.isnan(jackknife([3.0]))
    mean = lambda r, f: {"mean": float(f.mean())}
    x = torch.randn(10, 1)
    assert math.isnan(jackknifed(mean, x, x, splits=1)["mean"].error)
    assert math.isnan(jackknifed(mean, x, x, at_least=9)["mean"].error)
    assert jackknifed(mean, x, x, at_least=8)["mean"].error > 0
    for splits in (0, True, 2.0):
        with pytest.raises(ValueError, match="splits"):
            jackknifed(mean, x, x, splits)


def test_jackknifed_errors_are_those_of_repetition():
    torch.manual_seed(0)
    score = lambda r, f: {"ratio": float(f.std() / r.std())}
    found = [jackknifed(score, torch.randn(200, 1), 2 * torch.randn(100, 1))["ratio"] for _ in range(150)]
    spread = torch.tensor(found).std().item()
    said = torch.tensor([v.error for v in found]).square().mean().sqrt().item()
    assert 0.8 < said / spread < 1.3
    assert (found[0].n_real, found[0].n_fake) == (200, 100)


def test_a_reservoir_is_fair():
    "Every row is kept equally often: 20 of 100, over streams whose rows come in 200 different rotations."
    kept = torch.zeros(100)
    for shift in range(100):
        few = Reservoir(20)
        for part in torch.arange(100).roll(shift)[:, None].float().split(7):
            few.add(part)
        assert few.rows.shape == (20, 1) and len(few.rows.unique()) == 20 and few.seen == 100
        kept[few.rows[:, 0].long()] += 1
    assert kept.sum() == 2000 and (kept == 20).all()  # the same places of the stream at every start, so by rotation exactly equal
    places = torch.zeros(10)
    for seed in range(400):
        few = Reservoir(20)
        few.random.manual_seed(seed)
        few.add(torch.arange(100.0)[:, None])
        places += few.rows[:, 0].long().div(10, rounding_mode="floor").bincount(minlength=10)
    assert (places / 400 - 2).abs().max() < 0.35  # binomial: 0.06 a tenth


@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(2, 30))
@settings(max_examples=50, deadline=None)
def test_a_reservoir_does_not_depend_on_the_batches(sizes, keep):
    x = torch.arange(float(sum(sizes)))[:, None]
    parts, whole = Reservoir(keep), Reservoir(keep)
    for part in x.split(sizes):
        parts.add(part)
    whole.add(x)
    assert parts.seen == whole.seen == len(x) and len(parts.rows) == min(keep, len(x))
    if len(x):
        assert torch.equal(parts.rows.sort(0).values, whole.rows.sort(0).values)
    if len(x) <= keep and len(x):
        assert torch.equal(parts.rows, x)


def test_a_reservoir_keeps_copies_and_refuses_other_widths():
    x = torch.zeros(4, 2)
    few = Reservoir(5)
    few.add(x)
    few.add(torch.ones(9, 2))
    assert torch.equal(x, torch.zeros(4, 2))
    with pytest.raises(ValueError, match="these have 3 features, those before 2"):
        few.add(torch.ones(1, 3))
    assert few.seen == 13
    for keep in (1, 0, 2.5, True):
        with pytest.raises(ValueError, match="keep="):
            Reservoir(keep)


def test_by_count_of_a_mean_is_the_mean_with_its_error():
    torch.manual_seed(0)
    fake, before = torch.randn(2000), torch.get_rng_state()
    rows = by_count(lambda r, f: f.mean(), torch.zeros(5), fake, [50, 500, 1600, 2000], repeats=200)
    assert torch.equal(before, torch.get_rng_state())
    for row in rows[:3]:
        assert row == pytest.approx(fake.mean().item(), abs=4 * row.error / 200**0.5)
        assert row.error == pytest.approx(fake.std().item() / row.n_fake**0.5, rel=0.2)  # at 1600 of 2000, too
    assert [r.n_fake for r in rows] == [50, 500, 1600, 2000] and rows[0].n_real == 5
    assert math.isnan(rows[3].error) and rows[3] == pytest.approx(fake.mean().item(), rel=1e-5)
    sizes = by_count(lambda r, f: len(r) + 1000 * len(f), torch.zeros(30), fake, [10, 30], both=True, repeats=1)
    assert sizes == [10010, 30030] and [r.n_real for r in sizes] == [10, 30]


@pytest.mark.parametrize("bad", [dict(counts=[0]), dict(counts=[31]), dict(counts=[]), dict(counts=[5], repeats=0),
                                 dict(counts=[21], both=True)])
def test_by_count_names_what_cannot_be_drawn(bad):
    with pytest.raises(ValueError, match="counts are whole numbers from 1 to"):
        by_count(lambda r, f: 0.0, torch.zeros(20), torch.zeros(30), **bad)
