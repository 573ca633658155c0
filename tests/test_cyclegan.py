"The CycleGAN tutorial: its notebook and its script say the same, and what its stored table claims holds."

import re
import runpy
from pathlib import Path

import nbformat
import pytest
from tutorials import cpu_minutes, moved, pictures, said_by, shortened, table_of_lines, text_of

ROOT = Path(__file__).parents[1]
NOTEBOOK, SCRIPT = ROOT / "nbs/tutorials/08_cyclegan.ipynb", ROOT / "examples/cyclegan.py"
SHORTER = {'SHORT = {"steps": 400,': 'SHORT = {"steps": 120,', '"judged": (6, 12)}\nFULL': '"judged": (2, 6)}\nFULL'}
HOME = re.compile(r"^digits of kind [ab]: .* a ([\d.]+)%, for b ([\d.]+)%; taken for [ab] ([\d.]+)%$", re.MULTILINE)
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
    ours = said_by(SCRIPT, *args, cwd=tmp_path)
    for name, line in ("as they are", "as they are:"), ("CycleGAN", "translated:"):
        said = re.search(rf"^{line} (.*)$", ours, re.MULTILINE)[1]
        *numbers, apart = (float(n) for n in re.findall(r"[\d.]+(?=%|$|;| apart)", said))
        assert numbers == rows[name][:6], name
        assert apart == pytest.approx(rows[name][6], abs=0.0051), "of which the notebook has one digit less"
    assert (tmp_path / "c.png").stat().st_size > 1000
    (own_a, other_a, kind_a), (other_b, own_b, kind_b) = (map(float, shares) for shares in HOME.findall(text_of(nb)))
    assert min(own_a, own_b) > 90 > 85 > max(other_a, other_b) and min(kind_a, kind_b) > 99, "judges that can read"
    as_is, cycled, alone = rows["as they are"], rows["CycleGAN"], rows["without cycle loss"]
    for read, taken, far in (0, 1, 2), (3, 4, 5):
        assert as_is[taken] < 5 and cycled[far] < as_is[far] - 2, "the kind has begun to move"
        assert cycled[read] > alone[read] + 20, "and the digit is more often kept than without cycle loss"
    assert as_is[6] == 0 and cycled[6] < 0.2 < alone[6]


def test_the_full_recipe():
    "A step of it: shapes, settings and data fit together, and every translator moves."
    functions = runpy.run_path(str(SCRIPT))
    seen, unseen = functions["kinds"]()
    learn = functions["make"](seen, functions["FULL"], front="none")
    digits = unseen["a"][0][:2]
    assert moved(learn, 1) > 0.9, "biases before a normalisation have no gradient"
    assert learn.translate(digits, "b").shape == digits.shape


@pytest.fixture(scope="module")
def stored():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_the_stored_table(stored):
    "What a reader sees, and what the prose below it says, sentence by sentence."
    rows = table_of(text_of(stored))
    as_is, hand, alone, cycled = (rows[name] for name in WAYS)
    for far in 2, 5:
        assert all(cycled[far] < row[far] - 1 for name, row in rows.items() if name != "CycleGAN"), "the nearest of all ways"
    assert min(cycled[1], cycled[4]) > 90, "the kind has moved nearly always"
    assert cycled[0] > as_is[0] + 3 and cycled[3] > as_is[3] + 3, "more are read as what they were"
    assert abs(hand[0] - as_is[0]) < 3, "blurring doesn't help"
    assert abs(hand[3] - cycled[3]) < 3 and hand[5] > cycled[5] + 2, "as legible by hand, and less like MNIST"
    assert min(alone[1], alone[4]) > 95 and max(abs(alone[0] - 10), abs(alone[3] - 10)) < 3, "taken for the kind, read by chance"
    assert cycled[6] < 0.1 < alone[6]
    assert pictures(stored) >= 4 and NOTEBOOK.stat().st_size < 400_000 and cpu_minutes(stored) < 2


def test_the_stored_judges(stored):
    "A reader of one kind is not at home in the other; and no translation is as near as training digits are."
    said = text_of(stored)
    (own_a, other_a, kind_a), (other_b, own_b, kind_b) = (map(float, shares) for shares in HOME.findall(said))
    assert min(own_a, own_b) > 95 and max(other_a, other_b) < 80 and min(kind_a, kind_b) > 99
    near = {kind: float(far) for kind, far in re.findall(r"^training digits of kind ([ab]): FID ([\d.]+)$", said, re.MULTILINE)}
    rows = table_of(said).values()
    assert near["b"] < min(row[2] for row in rows) and near["a"] < min(row[5] for row in rows)


def test_lines_are_counted_by_the_rule(stored):
    table = table_of_lines(stored)
    assert [part for part, row in table.items() if row[0] == 0] == ["networks", "losses"], "what comes with the kit"
    ours, theirs = (sum(table[part][i] for part in ("imports", "training")) for i in (0, 2))
    assert ours < theirs, "as the text says of the fair part"
