"The forecasting tutorial: its notebook and its script say the same, and what its stored tables claim holds."

import re
import runpy
from pathlib import Path

import nbformat
import numpy as np
import pytest
from tutorials import moved, pictures, said_by, shortened, text_of

from trainkit.forecast.metrics import ERRORS

ROOT = Path(__file__).parents[1]
NOTEBOOK, SCRIPT = ROOT / "nbs/tutorials/12_forecasting.ipynb", ROOT / "examples/forecasting.py"
SHORT = """SHORT = {"inputs": 336, "every": (1, 24, 7), "patch": {"width": 32, "heads": 4, "layers": 2},
         "steps": {"NLinear": 400, "DLinear": 400, "PatchTST": 300}, "batch": {"NLinear": 64, "DLinear": 64, "PatchTST": 32}}"""
SHORTER = {SHORT: """SHORT = {"inputs": 120, "every": (1, 168, 61), "patch": {"width": 16, "heads": 2, "layers": 1},
         "steps": {"NLinear": 60, "DLinear": 60, "PatchTST": 40}, "batch": {"NLinear": 64, "DLinear": 64, "PatchTST": 16}}""",
           "HORIZONS, SEEDS = SHORT, (96, 336), (0, 1)": "HORIZONS, SEEDS = SHORT, (96, 120), (0,)"}  # fmt: skip
SAID = r"{}, {} hours: MSE ([\d.]+), MAE ([\d.]+) \(scaled\)"
TRAINED = ("NLinear", "DLinear", "PatchTST")


def rows_of(said: str, title: str) -> dict[tuple[int, str], list[float]]:
    "A printed table of hours and models, its numbers by both."
    hours, found = 0, {}
    for line in said.split(title + "\n")[1].splitlines():
        match = re.match(r"(\d+)? +([a-zA-Z][a-zA-Z, ]*?) +([\d. -]+)$", line.rstrip())
        if match:
            hours = int(match[1] or hours)
            found[hours, match[2]] = [float(n) for n in match[3].split()]
        elif found:
            break
    return found


@pytest.mark.parametrize("name", TRAINED)
def test_the_full_recipe(name):
    "Two steps of each model: shapes, settings and data fit together."
    functions = runpy.run_path(str(SCRIPT))
    size = functions["FULL"]
    data = functions["windows"](size, 336)
    learn = functions["make"](name, {**size, "batch": dict.fromkeys(size["batch"], 8)}, data, seed=0, front="none")
    assert moved(learn, 2) > 0.8
    x, _ = data.test[[0, 1]]
    assert learn.model(x).shape == (2, 336, x.shape[-1]) and len(data.train) > 20_000


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    "The notebook, shortened and run; and where it ran."
    folder = tmp_path_factory.mktemp("notebook")
    return shortened(NOTEBOOK, SHORTER, folder), folder


def promises(said: str) -> None:
    "What holds at any size."
    assert re.search(r"(\d+) and \1 steps of \d+ in an epoch; the same weights: True", said)
    assert "the same errors: True" in said
    exact, gaps = (float(re.search(rf"{what}: after 20 steps the weights are (\S+) of", said)[1]) for what in ("missing", "gaps"))
    assert exact < 1e-4 < gaps < 0.1
    assert "0 warnings; as if it had never stopped: True" in said
    assert re.search(r"scaler: mean and deviation (\w{12}) then, mean and deviation (?!\1)\w{12} now", said)
    assert re.search(r"windows: (\d+) → 96, every 16, rows 0 to 26304 then, \1 → 96, every 16, rows 0 to 30648 now", said)
    assert "series:" not in said.split("since the checkpoint was made")[1].split("checkpoint's settings")[0], "it is the same"
    assert "lr=0.01" in said.split("the checkpoint's settings are used")[1]
    assert "nothing was changed" in said and "the optimizer was adamw, now sgd" in said.lower() and "untouched: True" in said
    assert said.count("refused: ") == 3 and "unknown optimizer 'adamv'" in said and "(nearest first): weight_decay" in said
    assert "in order: True" in said and "the series' own: True" in said and "the table's: True" in said


def test_the_shortened_notebook_keeps_its_promises(short):
    nb, folder = short
    said = text_of(nb)
    promises(said)
    table = rows_of(said, "on scaled data")
    assert len(table) == 14
    for hours in (96, 120):
        naive, least = table[hours, "seasonal naive"][0], table[hours, "least squares"][0]
        assert least < 0.68 * naive, "0.62 of it"
        for name in TRAINED:
            assert 0.95 * least < table[hours, name][0] < 0.77 * naive, "three seeds of each gave 0.67 to 0.70 of it"
    assert pictures(nb) >= 5
    with np.load(folder / "runs/patchtst.npz") as file:
        assert len(file["values"]) == len(file["times"]) > 100


def test_the_script_says_what_the_stored_notebook_says(tmp_path):
    stored = text_of(nbformat.read(NOTEBOOK, as_version=4))
    naive = said_by(SCRIPT, "--model", "seasonal naive", cwd=tmp_path)
    assert re.search(SAID.format("seasonal naive", 96), naive)[0] in stored
    assert not [*tmp_path.iterdir()], "without --run and --save nothing is written"
    trained = said_by(SCRIPT, "--save", "f.npz", cwd=tmp_path)
    nine = dict(re.findall(r"(\w+) (-?[\d.]+)", re.search(r"all measures \(scaled\): (.*)", trained)[1]))
    assert [*nine] == [*ERRORS] and float(nine["rmse"]) ** 2 == pytest.approx(float(nine["mse"]), abs=2e-4)
    ours, theirs = (re.search(SAID.format("DLinear", 96), said) for said in (trained, stored))
    for a, b in zip(ours.groups(), theirs.groups()):
        assert float(a) == pytest.approx(float(b), abs=0.002), "another processor rounds otherwise"
    assert re.search(r"forecasts: f.npz of 1238 windows", trained)
    with np.load(tmp_path / "f.npz") as file:
        assert file["values"].shape == (1238, 96, 5)


def test_the_stored_notebook():
    "What a reader sees: models that beat their baselines by what is said, and the script's line."
    nb = nbformat.read(NOTEBOOK, as_version=4)
    said = text_of(nb)
    promises(said)
    table, own = rows_of(said, "on scaled data"), rows_of(said, "in their own units")
    assert [*dict.fromkeys(hours for hours, _ in table)] == [96, 336] and len(table) == 14
    for hours in (96, 336):
        naive = table[hours, "seasonal naive"][0]
        for name in TRAINED:
            mse, spread = table[hours, name][:2]
            assert mse < 0.7 * naive and spread < 0.02
            claim = rf"{hours} hours, {name}: (\S+) to (\S+) % beside seasonal naive, (\S+) to (\S+) % beside least squares"
            a, b, c, d = map(float, re.search(claim, said).groups())
            assert a - 0.2 <= 100 * (mse / naive - 1) <= b + 0.2 and b < -100 / 3 and -3 < c <= d < 3
        near = re.search(rf"{hours} hours, near first: (\S+) %, (\S+) %", said).groups()
        assert all(0 < float(change) < 1 for change in near)
        dust = {name: row[0] for (h, name), row in own.items() if h == hours}
        assert min(dust, key=dust.get) == "PatchTST"
    more = rows_of(said, "five more")
    assert more.keys() == table.keys()
    for key, (rmse, huber, *_, dust_wape, dust_smape, dust_mape) in more.items():
        assert rmse == pytest.approx(table[key][0] ** 0.5, abs=2e-3) and huber < table[key][0] / 2 + 1e-3
        assert dust_mape > 1 > dust_wape and 0 < dust_smape < 2
        if key[1] in (*TRAINED, "least squares"):
            assert 0.645 < dust_wape < 0.725 and dust_mape > 2
    best = [min((found[96, name][i], name) for name in (*TRAINED, "least squares"))[1]
            for found, i in ((table, 0), (table, -3), (more, 3), (more, 4))]  # fmt: skip
    assert best == ["PatchTST", "least squares", "least squares", "DLinear"], "MSE, MAE, sMAPE, MAPE"
    rows = [line.split() for line in said.split("by horizon\n")[1].splitlines()[1:8]]
    first, day = [float(n) for n in rows[0][3:]], [float(n) for n in rows[2][3:]]
    assert (rows[0][0], rows[2][0]) == ("1", "24") and max(first[:2]) < min(first[2:]) and max(day) < 1.1 * min(day)
    assert pictures(nb) >= 5 and NOTEBOOK.stat().st_size < 400_000
