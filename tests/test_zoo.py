"The zoo of GANs, its notebook shortened to a few steps each, in a real kernel: trained, seen, scored, in one table."

import base64
import io
import math
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image
from tutorials import shortened

NOTEBOOK = Path(__file__).parents[1] / "nbs/tutorials/05_zoo.ipynb"
GANS = ["DCGAN", "cGAN", "ACGAN", "InfoGAN", "WGAN-GP", "SNGAN", "BEGAN"]
SHORTER = {
    "steps = minute": "steps = dict.fromkeys(minute, 4)",
    "width, n_fakes = 16, 1000": "width, n_fakes = 16, 200",
    "judge = digits_judge()": "from trainkit.gan.judge import train_judge\n"
                              "judge = train_judge(train_x[:1500], train_y[:1500], epochs=3)",
    "zoo, spent, quiet =": "before = {}\nzoo, spent, quiet =",
    "    start = time": "    before[name] = [p.detach().clone() for p in weights(gan)]\n    start = time",
}  # fmt: skip
WEIGHTS = "def weights(gan): return [*gan.generator.parameters(), *gan.discriminator.parameters()]"
LOOK = """
print("STEPS", *(gan.step for gan in zoo.values()))
for name, gan in zoo.items():
    losses = {k.split("/")[-1]: v[1] for k, v in gan.history.scalars.items() if k.startswith("train/")}
    print("TERMS", *(f"{name}:{term}" for term in losses))
    print("FINITE", name, all(torch.isfinite(torch.as_tensor(v)).all() for v in losses.values()))
    print("CHANGED", name, sum(not torch.equal(a, b) for a, b in zip(before[name], weights(gan))), len(before[name]))
"""  # after all cells: what the learners hold


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    "The shortened notebook, executed; a replacement that finds nothing is an error."
    folder = tmp_path_factory.mktemp("zoo")
    nb = shortened(NOTEBOOK, SHORTER, folder, around=(WEIGHTS, LOOK))
    assert not list(folder.iterdir()), "the zoo leaves files behind"
    return [c for c in nb.cells if c.cell_type == "code"]


def pictures(cell) -> list[np.ndarray]:
    found = [o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", {})]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(p)))) for p in found]


def printed(cell) -> str:
    return "".join(o.text for o in cell.outputs if o.output_type == "stream")


def table(cells) -> dict[str, dict[str, str]]:
    (text,) = [o.data["text/markdown"] for o in cells[-2].outputs if "text/markdown" in o.get("data", {})]
    head, _, *lines = [[part.strip() for part in line.strip("|").split("|")] for line in text.splitlines()]
    return {name: dict(zip(head[1:], values)) for name, *values in lines}


def test_every_gan_was_trained_and_moved(cells):
    said = printed(cells[-1])
    assert "STEPS 4 4 4 4 4 4 4\n" in said
    assert re.findall(r"FINITE (\S+) True", said) == GANS
    changed = {name: (int(n), int(of)) for name, n, of in re.findall(r"CHANGED (\S+) (\d+) (\d+)", said)}
    assert list(changed) == GANS
    assert all(n > 0.8 * of and of > 10 for n, of in changed.values()), changed
    for term in "ACGAN:class", "InfoGAN:information", "WGAN-GP:gradient_penalty", "BEGAN:k":
        assert term in said, term


def test_every_gan_has_its_picture(cells):
    for name in GANS:
        (cell,) = [c for c in cells if f'train("{name}", ' in c.source]
        assert f"{name}: 4 steps" in printed(cell)
        shown = pictures(cell) if name != "InfoGAN" else [p for c in cells if "grid(f" in c.source for p in pictures(c)]
        assert shown, name
        for picture in shown:
            rows, columns = (2, 10) if picture.shape[1] > 600 else (2, 8)
            assert picture.shape == (2 * (rows * 34 + 2), 2 * (columns * 34 + 2)) and picture.std() > 1, (name, picture.shape)
    assert sum(len(pictures(c)) for c in cells) == 8


def test_the_table(cells):
    rows = table(cells)
    assert list(rows) == ["real digits", *GANS]
    number = {name: {k: float(v.split()[0]) for k, v in row.items() if v} for name, row in rows.items()}
    scores = {"classifier score", "FID", "KID", "precision", "recall", "diversity"}
    for name, row in number.items():
        assert scores <= set(row) and all(map(math.isfinite, row.values())), (name, row)
        assert 1 <= row["classifier score"] <= 10 and 0 <= row["precision"] <= 1 and 0 <= row["recall"] <= 1
        assert ("as asked" in row) == (name in ("cGAN", "ACGAN")) and 0 <= row.get("as asked", 0) <= 1
        assert row.get("steps", 4) == 4
        if name != "real digits":  # four steps are nothing, and the judge has to see that
            assert row["FID"] > 3 * number["real digits"]["FID"] and row["KID"] > 10 * abs(number["real digits"]["KID"]), name
            assert row["precision"] < number["real digits"]["precision"], name


def test_the_stored_notebook():
    "What a reader sees: a minute each, small pictures, and conditional GANs that do what they are asked."
    cells = [c for c in nbformat.read(NOTEBOOK, as_version=4).cells if c.cell_type == "code"]
    rows = table([*cells, None])
    assert list(rows) == ["real digits", *GANS]
    assert all(float(rows[name]["as asked"].split()[0]) > 0.5 for name in ("cGAN", "ACGAN"))
    stored = [o.data["image/png"] for c in cells for o in c.outputs if "image/png" in o.get("data", {})]
    assert len(stored) == 8 and all(len(p) * 3 / 4 < 60_000 for p in stored)
