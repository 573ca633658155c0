"The CycleGAN tutorial: its notebook and its script say the same, and what its stored table claims holds."

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from tutorials import pictures, shortened, text_of

ROOT = Path(__file__).parents[1]
NOTEBOOK, SCRIPT = ROOT / "nbs/tutorials/08_cyclegan.ipynb", ROOT / "examples/cyclegan.py"
SHORTER = {'SHORT = {"steps": 400,': 'SHORT = {"steps": 120,', '"judged": (6, 12)}\nFULL': '"judged": (2, 6)}\nFULL'}
WAYS = ("as they are", "by hand", "without cycle loss", "CycleGAN")


def table_of(said: str) -> dict[str, list[float]]:
    "Its rows: read, taken, FID in one direction, the same in the other, and there and back."
    found = {name: re.search(rf"^{name} +([\d.% ]+)$", said, re.MULTILINE) for name in WAYS}
    assert all(found.values()), said
    rows = {name: [float(n.rstrip("%")) for n in m[1].split()] for name, m in found.items() if m}
    assert all(len(row) == 7 for row in rows.values()), rows
    return rows


def test_notebook_and_script_say_the_same(tmp_path):
    nb = shortened(NOTEBOOK, SHORTER, tmp_path)
    rows = table_of(text_of(nb))
    assert pictures(nb) >= 4

    args = "--steps", "120", "--judged", "2", "6", "--picture", "c.png"
    ours = subprocess.run([sys.executable, SCRIPT, *args], check=True, cwd=tmp_path, capture_output=True, text=True).stdout
    for name, line in ("as they are", "as they are:"), ("CycleGAN", "translated:"):
        said = re.search(rf"^{line} (.*)$", ours, re.MULTILINE)[1]
        numbers = [float(n) for n in re.findall(r"[\d.]+(?=%|$|;| apart)", said)]
        assert numbers == pytest.approx(rows[name], abs=0.06), name
    assert (tmp_path / "c.png").stat().st_size > 1000
    as_is, cycled, alone = rows["as they are"], rows["CycleGAN"], rows["without cycle loss"]
    for read, taken, far in (0, 1, 2), (3, 4, 5):
        assert as_is[taken] < 5 and cycled[far] < as_is[far] - 2, "the kind has begun to move"
        assert cycled[read] > alone[read] + 20, "and the digit is more often kept than without cycle loss"
    assert as_is[6] == 0 and cycled[6] < 0.2 < alone[6]


def test_the_stored_table():
    "What a reader sees, and what the prose below it says."
    nb = nbformat.read(NOTEBOOK, as_version=4)
    rows = table_of(text_of(nb))
    as_is, hand, alone, cycled = (rows[name] for name in WAYS)
    assert cycled[0] > max(as_is[0], hand[0]) and cycled[3] > as_is[3] and max(alone[0], alone[3]) < 30
    assert min(cycled[1], cycled[4]) > 90 and cycled[2] < as_is[2] and cycled[5] < as_is[5]
    assert cycled[6] < 0.1 < alone[6]
    assert pictures(nb) >= 4 and NOTEBOOK.stat().st_size < 400_000
