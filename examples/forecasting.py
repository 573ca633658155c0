"""Long-horizon forecasts as a script: the models of nbs/tutorials/12_forecasting.ipynb, with the same figures at the end.

    python examples/forecasting.py                                    # DLinear, four days ahead: some seconds on one core
    python examples/forecasting.py --model PatchTST --horizon 336 --seed 1
    python examples/forecasting.py --model "seasonal naive"           # what every model has to beat
    python examples/forecasting.py --full --run runs/patch --model PatchTST --save forecasts.npz
"""

import argparse
from typing import Any

import torch
from torch import nn

from trainkit.device import seed_everything
from trainkit.forecast.data import ForecastData, beijing_air, forecast_data
from trainkit.forecast.metrics import ERRORS, ForecastErrors, horizon_table, masked_mse
from trainkit.forecast.models import DLinear, NLinear, PatchTST, SeasonalNaive, least_squares
from trainkit.forecast.predictions import Forecasts, forecasts, save_forecasts
from trainkit.learner import Learner

SHORT = {"inputs": 336, "every": (1, 24, 7), "patch": {"width": 32, "heads": 4, "layers": 2},
         "steps": {"NLinear": 400, "DLinear": 400, "PatchTST": 300}, "batch": {"NLinear": 64, "DLinear": 64, "PatchTST": 32}}
FULL = {"inputs": 336, "every": (1, 1, 1), "patch": {"width": 128, "heads": 16, "layers": 3},
        "steps": {"NLinear": 8000, "DLinear": 8000, "PatchTST": 20_000}, "batch": {"NLinear": 64, "DLinear": 64, "PatchTST": 128}}
PLAN = {"name": "adamw", "lr": 0.001, "schedule": {"name": "one_cycle"}}
BASELINES = ("last value", "seasonal naive", "least squares")
TRAINED = ("NLinear", "DLinear", "PatchTST")


def windows(size: dict[str, Any], horizon: int) -> ForecastData:
    "Three years to train on, one to validate, one to test."
    return forecast_data(beijing_air(), size["inputs"], horizon, valid="2013", test="2014", every=size["every"])


def baseline(name: str, data: ForecastData) -> nn.Module:
    "What needs no training."
    inputs, horizon = data.train.inputs, data.train.outputs
    if name == "least squares":
        rows = range(0, len(data.train), 5)  # neighbours tell it the same
        batches = (data.train[[*rows[i : i + 1000]]] for i in range(0, len(rows), 1000))
        return least_squares(NLinear(inputs, horizon), batches, ridge=0.1)
    return SeasonalNaive(horizon, period=1 if name == "last value" else 24)


def network(name: str, size: dict[str, Any], horizon: int) -> nn.Module:
    "What is trained."
    options = size["patch"] if name == "PatchTST" else {}
    return {"NLinear": NLinear, "DLinear": DLinear, "PatchTST": PatchTST}[name](size["inputs"], horizon, **options)


def make(name: str, size: dict[str, Any], data: ForecastData, seed: int, **options: Any) -> Learner:
    "A seeded model with its data; the squared error of what was measured is made small."
    seed_everything(seed)
    net = network(name, size, data.train.outputs)
    return Learner(net, data.sets, masked_mse, PLAN, metrics=ForecastErrors(("mse", "mae")), seed=seed,
                   batch_size=size["batch"][name], monitor="valid/mse", **options)  # fmt: skip


def said(name: str, found: Forecasts, data: ForecastData) -> str:
    "How good the forecasts are, on the scaled data, in one line."
    errors = found.errors(("mse", "mae"), scaler=data.scaler).compute()
    return f"{name}, {found.times.shape[1]} hours: MSE {errors['mse']:.4f}, MAE {errors['mae']:.4f} (scaled)"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="DLinear", choices=[*BASELINES, *TRAINED])
    parser.add_argument("--horizon", type=int, default=96, help="hours to forecast")
    parser.add_argument("--steps", type=int, help="of training; without it those of the recipe")
    parser.add_argument("--full", action="store_true", help="the full-size recipe")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", help="folder for checkpoints, history and curves; without it nothing is written")
    parser.add_argument("--save", metavar="PATH", help="write the forecasts of the test year to this .npz file")
    args = parser.parse_args()

    torch.set_num_threads(1)
    size = FULL if args.full else SHORT
    data = windows(size, args.horizon)
    if args.model in BASELINES:
        model: Any = baseline(args.model, data)
    else:
        model = make(args.model, size, data, args.seed, run=args.run)
        steps = args.steps or size["steps"][args.model]
        model.fit(steps=steps, validate_every=max(1, steps // 4))
    found = forecasts(model, data.test)
    print(said(args.model, found, data))
    nine = found.errors(ERRORS, scaler=data.scaler).compute()
    print("all measures (scaled):", ", ".join(f"{name} {value:.4f}" for name, value in nine.items()))
    own = found.errors("mae").by_variable()["mae"]
    print("MAE in own units:", ", ".join(f"{name} {value:.2f}" for name, value in zip(found.names, own)))
    at = [h for h in (1, 24, 96, 336) if h <= args.horizon]
    for row in horizon_table(found.errors(("mse", "mae"), scaler=data.scaler), at):
        print(f"horizon {row['horizon']}: MSE {row['mse']:.4f}, MAE {row['mae']:.4f}")
    if args.save:
        print("forecasts:", save_forecasts(found, args.save), "of", len(found), "windows")
