"The tutorial on adversarial autoencoders: its notebook and its script say the same, and what it claims holds."

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from tutorials import pictures, shortened, text_of

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

    ours = subprocess.run([sys.executable, SCRIPT, "--epochs", "8"], check=True, cwd=tmp_path, capture_output=True, text=True)
    for name in "plain", "adversarial":
        said = re.search(rf"^{name} +(error [\d.]+, Fréchet [\d.]+, told apart [\d.]+, FID [\d.]+)$", ours.stdout, re.MULTILINE)
        assert [float(n) for n in re.findall(r"[\d.]+", said[1])] == pytest.approx(rows[name], abs=0.006), name
    assert not [*tmp_path.iterdir()], "without --run nothing is written"


def test_the_stored_notebook():
    "What a reader sees, and what the prose says of it."
    nb = nbformat.read(NOTEBOOK, as_version=4)
    said = text_of(nb)
    rows = table_of(said)
    check(rows)
    _, fitted, adversarial = rows.values()
    assert adversarial[2] < fitted[2] - 0.03 and fitted[3] < adversarial[3], "fits better, and yet is farther from digits"
    drawn, rewritten, before = (float(n) for n in re.search(ASKED, said).groups())
    assert drawn > 80 and rewritten > 80 and before < 10 and float(re.search(r"drawn: FID ([\d.]+)", said)[1]) < fitted[3]
    assert pictures(nb) >= 4 and NOTEBOOK.stat().st_size < 400_000
