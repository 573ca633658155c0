"The classification tutorial: its notebook and its script say the same, and what its stored table claims holds."

import re
import runpy
from pathlib import Path

import nbformat
from tutorials import cpu_minutes, moved, pictures, said_by, shortened, text_of

ROOT = Path(__file__).parents[1]
NOTEBOOK, SCRIPT = ROOT / "nbs/tutorials/06_digits.ipynb", ROOT / "examples/digits.py"
SHORTER = {'SHORT = {"epochs": 4, "width": 8, "seeds": (0, 1, 2, 3, 4)}': 'SHORT = {"epochs": 2, "width": 4, "seeds": (0,)}'}
SAID = r"held-out digits: ([\d.]+)% wrong, loss ([\d.]+)"


def test_notebook_and_script_say_the_same(tmp_path):
    nb = shortened(NOTEBOOK, SHORTER, tmp_path / "notebook")
    said = text_of(nb)
    ours = said_by(SCRIPT, "--epochs", "2", "--width", "4", "--export", "digits.safetensors", cwd=tmp_path)
    assert re.search(SAID, ours)[0] == re.search(SAID, said)[0]
    wrong, loss = map(float, re.search(SAID, ours).groups())
    assert wrong < 9 and loss < 0.25, "three seeds gave 4.4 to 5.7 % at 0.17 to 0.19"
    first = re.search(r"most confused: (\d) for (\d) \((\d+)\)", ours)
    assert "{} taken for {}: {}\n".format(*first.groups()) in said
    assert "the same accuracy: True" in said and pictures(nb) >= 5
    weights = "runs/classifier/digits.safetensors"
    assert (tmp_path / "digits.safetensors").read_bytes() == (tmp_path / "notebook" / weights).read_bytes()


def test_less_sure_with_mixup_and_smoothing(tmp_path):
    said = re.search(SAID, said_by(SCRIPT, "--epochs", "2", "--width", "4", "--mixup", "0.2", "--smoothing", "0.1", cwd=tmp_path))
    assert float(said[1]) < 9 and 0.25 < float(said[2]) < 0.5, "three seeds gave 5.2 to 6.1 % at 0.33 to 0.35"
    assert not [*tmp_path.iterdir()], "without --run nothing is written"


def test_the_full_recipe():
    "Two steps of it: shapes, settings and data fit together, and every weight moves."
    functions = runpy.run_path(str(SCRIPT))
    learn = functions["make"](functions["FULL"]["width"], 0, 0.01, 0.0, 0.0)
    assert moved(learn, 2) == 1


def test_the_stored_notebook():
    "What a reader sees: a good classifier, and a table from which the sentence below it follows."
    nb = nbformat.read(NOTEBOOK, as_version=4)
    said = text_of(nb)
    assert float(re.search(SAID, said)[1]) < 4 and "the same accuracy: True" in said
    rows = {name: [float(n) for n in numbers.split()]
            for name, numbers in re.findall(r"^(plain|mixup|label smoothing) +([\d. ]+)$", said, re.MULTILINE)}  # fmt: skip
    assert [*rows] == ["plain", "mixup", "label smoothing"] and all(len(row) == 6 for row in rows.values())
    for error, spread, loss, _, sure, _ in rows.values():
        assert 0 < error < 4 and spread < 1 and loss < 0.5
        assert (sure < 100 - error - 2) == (loss > 1.2 * rows["plain"][2]), "less sure than right, and a higher loss"
    assert abs(rows["plain"][4] - (100 - rows["plain"][0])) < 1 and said.count(", not clear\n") == 2
    assert pictures(nb) >= 5 and NOTEBOOK.stat().st_size < 300_000 and cpu_minutes(nb) < 1.5
