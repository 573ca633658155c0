"The tutorial on adversarial autoencoders: its notebook and its script say the same, and what it claims holds."

import re
import runpy
from pathlib import Path

import nbformat
import pytest
from tutorials import cpu_minutes, moved, pictures, said_by, shortened, table_of_lines, text_of

from trainkit.datasets import mnist_5k

ROOT = Path(__file__).parents[1]
NOTEBOOK, SCRIPT = ROOT / "nbs/tutorials/09a_aae.ipynb", ROOT / "examples/aae.py"
SHORTER = {'SHORT = {"epochs": 25,': 'SHORT = {"epochs": 8,'}
NAMES = ("plain", "plain, prior fitted", "adversarial")
ASKED = r"drawn: ([\d.]+)% as asked; rewritten: ([\d.]+)% as asked, ([\d.]+)% as before"


def table_of(said: str) -> dict[str, list[float]]:
    "Its rows: error, Fréchet distance to the prior, told apart, FID."
    found = {name: re.search(rf"^{name} +([\d. ]+)$", said, re.MULTILINE) for name in NAMES}
    assert all(found.values()), said
    return {name: [*map(float, m[1].split())] for name, m in found.items() if m}


def check(rows: dict[str, list[float]]) -> None:
    "What doesn't depend on how long it was trained."
    plain, fitted, adversarial = (rows[name] for name in NAMES)
    assert fitted[0] == plain[0] < adversarial[0] < 1.3 * plain[0], "matching the prior costs a little"
    assert adversarial[1] < 1 < 20 < plain[1] and fitted[1] < 0.2 * plain[1]
    assert adversarial[2] < 0.7 < plain[2] and adversarial[3] < 0.8 * plain[3]


def test_notebook_and_script_say_the_same(tmp_path):
    nb = shortened(NOTEBOOK, SHORTER, tmp_path)
    said = text_of(nb)
    rows = table_of(said)
    check(rows)
    drawn, rewritten, before = (float(n) for n in re.search(ASKED, said).groups())
    assert drawn > 35 and rewritten > 35 and before < 20, "by chance it would be 10 %"
    assert pictures(nb) >= 4

    ours = said_by(SCRIPT, "--epochs", "8", cwd=tmp_path)
    for name in "plain", "adversarial":
        said = re.search(rf"^{name} +(error [\d.]+, Fréchet [\d.]+, told apart [\d.]+, FID [\d.]+)$", ours, re.MULTILINE)
        assert [float(n) for n in re.findall(r"[\d.]+", said[1])] == pytest.approx(rows[name], abs=0.006), name
    assert not [*tmp_path.iterdir()], "without --run nothing is written"


def test_the_full_recipe():
    "Some steps of it: shapes, settings and data fit together, and every weight of both autoencoders moves."
    functions = runpy.run_path(str(SCRIPT))
    digits = mnist_5k()[0][:400]
    for learn in (functions[kind](digits, functions["FULL"], front="none") for kind in ("plain", "make")):
        assert moved(learn, 2) == 1


def test_the_stored_notebook():
    "What a reader sees, and what the prose says of it."
    nb = nbformat.read(NOTEBOOK, as_version=4)
    said = text_of(nb)
    rows = table_of(said)
    check(rows)
    plain, fitted, adversarial = rows.values()
    assert adversarial[0] < 1.1 * plain[0], "a few percent of the error"
    assert adversarial[2] < fitted[2] - 0.03 and fitted[3] < adversarial[3], "fits better, and yet is farther from digits"
    drawn, rewritten, before = (float(n) for n in re.search(ASKED, said).groups())
    assert drawn > 80 and rewritten > 80 and before < 10 and float(re.search(r"drawn: FID ([\d.]+)", said)[1]) < fitted[3]
    lines = table_of_lines(nb)
    assert lines["losses"][:2] == [0, 0] and lines["networks"][0] > 0
    ours, theirs = (sum(lines[part][i] for part in ("imports", "data", "training")) for i in (0, 2))
    assert ours < theirs, "less is written in what is left, too"
    assert pictures(nb) >= 4 and NOTEBOOK.stat().st_size < 400_000 and cpu_minutes(nb) < 1.5
