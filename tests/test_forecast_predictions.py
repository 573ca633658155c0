"Predictions: all windows, once, in order, at their times, and the same from the file."

import numpy as np
import pytest
import torch

from trainkit.forecast.data import Series, forecast_data
from trainkit.forecast.models import NLinear, SeasonalNaive
from trainkit.forecast.predictions import Forecasts, forecasts, load_forecasts, save_forecasts
from trainkit.learner import Learner


@pytest.fixture
def data():
    g = torch.Generator().manual_seed(0)
    values = 50 + 9 * torch.randn(300, 2, generator=g).cumsum(0)
    values[torch.rand(300, 2, generator=g) < 0.1] = float("nan")
    times = np.datetime64("2021-06-01T00", "h") + np.arange(300)
    return forecast_data(Series(values, times, ("a", "b")), 12, 6, 0.2, 0.2)


@pytest.mark.parametrize("batch_size", [1, 8, 17, 54, 55, 1000])
def test_every_window_once_in_order(data, batch_size):
    "55 windows: with batches of 8 or 17 the last one is smaller."
    torch.manual_seed(0)
    model = NLinear(12, 6)
    found = forecasts(model, data.test, batch_size)
    assert len(found) == len(data.test) == 55 and found.values.shape == (55, 6, 2)
    for i in range(55):
        x, _ = data.test[i]
        with torch.no_grad():
            assert torch.allclose(found.values[i], data.scaler.inverse(model(x[None])[0]), atol=1e-3)
        row = data.series.row(str(found.times[i, 0]))
        assert row == 240 + i and (found.times[i] == data.series.times[row : row + 6]).all()
        true = data.series.values[row : row + 6]
        assert torch.equal(found.targets[i].isnan(), true.isnan())
        assert torch.allclose(found.targets[i].nan_to_num(), true.nan_to_num(), atol=1e-3)


def test_learner_and_module_say_the_same_and_modes_are_left_alone(data):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), NLinear(12, 6))
    learn = Learner(model, data.sets, "mse", front="none")
    a, b = forecasts(learn, data.test), forecasts(model, data.test, 7)
    assert torch.allclose(a.values, b.values, atol=1e-4) and model.training and model[0].training


def test_errors_from_the_file(data, tmp_path):
    found = forecasts(SeasonalNaive(6, 4), data.test)
    path = save_forecasts(found, tmp_path / "a" / "b.npz")
    back = load_forecasts(str(path))
    assert torch.equal(back.values, found.values) and (back.times == found.times).all() and back.names == ("a", "b")
    names = ("mae", "rmse", "r2")
    assert back.errors(names, batch=7).compute() == pytest.approx(found.errors(names).compute(), rel=1e-9)
    scaled = found.errors("mae", scaler=data.scaler).by_variable()["mae"]
    assert np.allclose(scaled, found.errors("mae").by_variable()["mae"] / data.scaler.std.numpy(), rtol=1e-6)
    with np.load(path) as file:
        assert file["values"].shape == (55, 6, 2), "anybody's NumPy reads it"


def test_a_failed_write_leaves_the_old_file(data, tmp_path, monkeypatch):
    found = forecasts(SeasonalNaive(6, 4), data.test)
    path = save_forecasts(found, tmp_path / "b.npz")
    before = path.read_bytes()

    def torn(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", torn)
    with pytest.raises(Exception, match="disk full"):
        save_forecasts(found, path)
    assert path.read_bytes() == before and [*tmp_path.iterdir()] == [path]


def test_what_does_not_fit(data, tmp_path):
    with pytest.raises(ValueError, match=r"\(55, 6, 2\); the model gave \(55, 7, 2\)"):
        forecasts(SeasonalNaive(7, 4), data.test)
    found = forecasts(SeasonalNaive(6, 4), data.test)
    with pytest.raises(ValueError, match="no forecast begins at 2021-06-01"):
        found.at("2021-06-01")
    with pytest.raises(ValueError, match=r"received \(54, 6, 2\)"):
        Forecasts(found.values[:-1], found.targets, found.times, found.names)
    np.savez(tmp_path / "x.npz", values=np.array([{}], dtype=object), targets=1, times=1, names=1)
    with pytest.raises(ValueError):
        load_forecasts(tmp_path / "x.npz")
