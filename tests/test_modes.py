"The tutorial on modes, shortened, in a real kernel: what collapses and what doesn't, in numbers."

import re
from pathlib import Path

import nbformat
from tutorials import shortened, text_of

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "nbs/tutorials/04_modes.ipynb"
SHORT = {'{"ring": 600, "grid": 2400}': '{"ring": 400, "grid": 400}', "COLLAPSE_STEPS = 1500": "COLLAPSE_STEPS = 1150",
         "SEEDS = (0, 1)\n": "SEEDS = (0,)\n", "(0, 1, 2, 3, 4)": "(0, 2)"}  # fmt: skip
STABLE = ("non-saturating + R1", "WGAN-GP", "relativistic + R1 + R2", "hinge + zero-centred")
ROW = r"{} +{} +(?P<hit>[\d.]+) +[\d.]+ +[\d.]+ +(?P<quality>\d+)% +(?P<kl>[\d.]+) +\d+ +\d of \d"


def rows_of(said: str, modes: int) -> dict[str, tuple[float, float]]:
    "Modes hit and the share of high quality of each stabilised family, on the target with so many modes."
    found = {name: re.search(ROW.format(re.escape(name), modes), said) for name in STABLE}
    assert all(found.values()), said
    return {name: (float(m["hit"]), float(m["quality"]) / 100) for name, m in found.items() if m}


def test_the_families_find_the_modes_that_minimax_loses(tmp_path):
    said = text_of(shortened(NOTEBOOK, SHORT, tmp_path, once=False))

    collapses = re.findall(r"seed \d: (\d) of 8 modes at the end, (\d) at most; alarms:(.*)", said)
    assert len(collapses) == 2 and all(int(end) <= int(most) <= 4 and alarms for end, most, alarms in collapses), collapses
    assert re.search(r"- mode collapse at step \d+: diversity 0\.[0-2]", said)
    for name, (hit, quality) in rows_of(said, 8).items():
        assert hit == 8 and quality > 0.6, (name, hit, quality)
    noise = float(re.search(r"grid, even noise.* ([\d.]+)% of high", said)[1]) / 100
    for name, (hit, quality) in rows_of(said, 25).items():
        assert hit >= 8 and quality > noise, (name, hit, quality)


def test_the_stored_table_says_solved():
    said = text_of(nbformat.read(NOTEBOOK, as_version=4))
    for modes in (8, 25):
        solved = [name for name, (hit, quality) in rows_of(said, modes).items() if hit == modes and quality >= 0.6]
        assert len(solved) >= 3, (modes, solved)
    collapses = re.findall(r"seed \d: (\d) of 8 modes at the end, (\d) at most; alarms: (.*)", said)
    assert len(collapses) == 5 and all(int(end) < 8 and alarms for end, _, alarms in collapses), collapses
    controls = [line.split() for line in said.splitlines() if "minimax (control)" in line]
    assert len(controls) == 2 and all(len(line) > 5 and all(n.isdigit() for n in line[-5:]) for line in controls), controls
