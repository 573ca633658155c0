"The tutorial that counts lines: GANs that draw what was asked for, a loss of one's own, and every figure of its tables."

import base64
import io
import re
import runpy
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from tutorials import counted_cells, cpu_minutes, lines_of, moved, outputs, text_of
from tutorials import shortened as run_shortened

from trainkit.datasets import mnist_5k
from trainkit.gan import judge as judges

ROOT = Path(__file__).parents[1]
NOTEBOOK, SCRIPT = ROOT / "nbs/tutorials/07_gans.ipynb", ROOT / "examples/gans.py"
SHORTER = {
    '"fakes": 1000, "seeds": (0, 1)': '"fakes": 300, "seeds": (0,)',
    '"steps": {"DCGAN": 600, "cGAN": 400, "ACGAN": 300, "BGAN": 600}}\nFULL':
        '"steps": {"DCGAN": 40, "cGAN": 100, "ACGAN": 130, "BGAN": 40}}\nFULL',
    "conditional.sample(200, ": "conditional.sample(20, ",
    "judge = digits_judge()": "from trainkit.gan.judge import train_judge\n"
                              "judge = train_judge(images[:1500], labels[:1500], epochs=3)",
}  # fmt: skip
GANS, LABELLED = ["DCGAN", "cGAN", "ACGAN", "BGAN"], ("cGAN", "ACGAN")
SCORED = re.compile(r"^ *(real digits|DCGAN|cGAN|ACGAN|BGAN) +(\d?) +(\d+\.\d+) +(\d+) +(\d+\.\d+)$", re.MULTILINE)
COUNTED = re.compile(r"^([a-zA-Z][a-zA-Z ]*?) +(\d+) +(\d+) +(\d+|-) +(\d+|-) *$", re.MULTILINE)


def scored(said: str) -> dict[tuple[str, str], tuple[float, int, float]]:
    "(GAN, seed) -> classifier score, digits, as asked."
    return {(name, seed): (float(score), int(n), float(asked)) for name, seed, score, n, asked in SCORED.findall(said)}


def counted(said: str) -> dict[str, list[int | None]]:
    "Part -> lines and tokens here, lines and tokens of torchgan."
    return {part: [None if n == "-" else int(n) for n in numbers] for part, *numbers in COUNTED.findall(said)}


def movie_of(nb: nbformat.NotebookNode) -> list[np.ndarray]:
    "The frames of the GIF that a reader sees."
    (data,) = [m[1] for page in outputs(nb, "text/html") if (m := re.search(r"data:image/gif;base64,([\w+/=]+)", page))]
    gif = Image.open(io.BytesIO(base64.b64decode(data)))
    return [np.asarray((gif.seek(i), gif.convert("L"))[1], float) for i in range(gif.n_frames)]


def script(*args: str, monkeypatch, capsys) -> str:
    monkeypatch.setattr("sys.argv", [str(SCRIPT), *args])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def shortened(tmp_path_factory):
    "The notebook, executed with fewer steps in a kernel of its own; a replacement that finds nothing is an error."
    nb = run_shortened(NOTEBOOK, SHORTER, folder := tmp_path_factory.mktemp("gans"))
    assert {path.name for path in folder.iterdir()} == {"dcgan.gif", "runs"}
    return nb


def test_they_draw_what_was_asked_for(shortened):
    rows = scored(text_of(shortened))
    assert list(rows) == [("real digits", ""), *((name, "0") for name in GANS)]
    assert rows["real digits", ""][2] > 85, "a judge of 1500 digits, for quickness; two seeds of it gave 92 and 93"
    for name in set(GANS) - {*LABELLED}:
        assert 4 < rows[name, "0"][2] < 16, (name, "nobody told it what to draw: a tenth, give or take 3.5 standard errors")
    score, digits, asked = rows["cGAN", "0"]  # three seeds gave 1.35 to 1.51, 6 to 7, 36 to 48; with shuffled labels 1.12, 5, 14
    assert score > 1.2 and digits > 3 and asked > 27
    score, digits, asked = rows["ACGAN", "0"]  # three seeds gave 1.21 to 1.50, 6 to 9, 45 to 66; with shuffled labels 1.06, 2, 12
    assert score > 1.12 and digits > 3 and asked > 27


def test_a_discriminator_that_reads_helps(shortened):
    once, best = (float(x) for x in re.search(r"drawn once: ([\d.]+)%.*\n.*best of four: ([\d.]+)%", text_of(shortened)).groups())
    assert best > once
    assert abs(once - scored(text_of(shortened))["ACGAN", "0"][2]) <= 0.051, "the same fakes as in the table"


def test_the_script_says_the_same(shortened, monkeypatch, capsys, tmp_path):
    images, labels = mnist_5k(size=32)
    monkeypatch.setattr(judges, "digits_judge", lambda: judges.train_judge(images[:1500], labels[:1500], epochs=3))
    picture, film = tmp_path / "2026.png", tmp_path / "film.gif"
    args = "--gan bgan --steps 40 --fakes 300 --digits 2026 --draw".split() + [str(picture), "--movie", str(film)]
    said = script(*args, monkeypatch=monkeypatch, capsys=capsys)
    score, digits, asked = re.search(r"BGAN, seed 0: classifier score ([\d.]+), digits (\d+), as asked ([\d.]+) %", said).groups()
    assert (float(score), int(digits), float(asked)) == scored(text_of(shortened))["BGAN", "0"]
    assert Image.open(picture).size == (4 * 34 + 2, 36) and Image.open(film).n_frames >= 2
    assert np.asarray(Image.open(picture).convert("L"))[2:34, 2:34].mean() < 115, "it has begun to paint black: untrained 127"
    with pytest.raises(SystemExit):
        script("--digits", "20x6", monkeypatch=monkeypatch, capsys=capsys)
    assert "--digits takes digits; received '20x6'" in capsys.readouterr().err


def test_boundary_seeking_is_the_papers_loss():
    loss = runpy.run_path(str(SCRIPT))["BoundarySeeking"]()
    torch.manual_seed(0)
    real, fake = 3 * torch.randn(2, 50, dtype=torch.float64)
    d = fake.sigmoid()
    assert torch.allclose(loss.generator(fake), 0.5 * (d.log() - (1 - d).log()).square().mean())
    ones, zeros = torch.ones(50), torch.zeros(50)
    expected = F.binary_cross_entropy(real.sigmoid(), ones.double()) + F.binary_cross_entropy(d, zeros.double())
    assert torch.allclose(loss.discriminator(real, fake), expected)


@pytest.mark.parametrize("kind", ["dcgan", "cgan", "acgan", "bgan"])
def test_the_full_recipe(kind):
    "Two steps of it: shapes, settings and data fit together, and every weight of both players moves."
    functions = runpy.run_path(str(SCRIPT))
    gan = functions["make"](kind, functions["FULL"]["width"], seed=0, front="none")
    assert moved(gan, 2) == 1
    assert gan.sample(3, labels=None if gan.labels == "none" else 7).shape == (3, 1, 32, 32)


def test_what_the_movie_shows(shortened):
    frames = movie_of(shortened)
    assert len(frames) >= 2
    darker = frames[0].mean() - frames[-1].mean()
    assert darker > 20, "grey at first, darker then: by 40 for each of three seeds, and by -11 if its loss has the wrong sign"
    steps = [int(step) for step in re.search(r"after steps ([\d ]+)", text_of(shortened))[1].split()]
    assert steps[0] == 0 and steps[-1] == 40 and steps == sorted(set(steps))


@pytest.fixture(scope="module")
def stored():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_lines_are_counted_by_the_rule(shortened, stored):
    "Counted anew, in another way; and the table of the stored notebook is the one that a run gives."
    table = counted(text_of(stored))
    assert table == counted(text_of(shortened))
    cells = counted_cells(stored)
    total = table.pop("all that both have")
    assert list(cells) == list(table)
    for part, source in cells.items():
        assert table[part][0] == lines_of(source)
        assert table[part][1] > table[part][0]
    both = [row for row in table.values() if None not in row]
    assert total == [sum(column) for column in zip(*both)] and len(both) == len(table) - 1
    assert all(row[0] <= row[2] and row[1] <= row[3] for row in both), "as the text says: no part takes more"


def test_the_stored_notebook(stored):
    "What a reader sees: digits on request from both seeds, small pictures, and figures from which the text follows."
    said = text_of(stored)
    rows = scored(said)
    assert [*rows] == [("real digits", ""), *((name, seed) for name in GANS for seed in "01")]
    asked = {name: [rows[name, seed][2] for seed in "01"] for name in GANS}
    assert min(asked["cGAN"]) > 70 and all(59 < share < 75 for share in asked["ACGAN"])
    assert all(7 < share < 13 for name in ("DCGAN", "BGAN") for share in asked[name])
    score = {name: [rows[name, seed][0] for seed in "01"] for name in GANS}
    assert all(min(score["cGAN"]) > 1.1 * max(score[name]) for name in GANS if name != "cGAN")
    assert abs(np.mean(score["BGAN"]) - np.mean(score["DCGAN"])) < 0.3 and rows["real digits", ""][0] > 8
    once, best = (float(x) for x in re.search(r"drawn once: ([\d.]+)%.*\n.*best of four: ([\d.]+)%", said).groups())
    assert best > once + 10
    assert float(re.search(r"same noise: correlation ([\d.]+)", said)[1]) > 0.4
    assert "float32 inf [nan]" in said and "target 0 is the same: True" in said
    total = counted(said)["all that both have"]
    assert total[0] < 0.3 * total[2] and total[1] < 0.5 * total[3]
    assert len(movie_of(stored)) >= 5 and len(outputs(stored, "image/png")) >= 8
    assert NOTEBOOK.stat().st_size < 400_000 and cpu_minutes(stored) < 4
