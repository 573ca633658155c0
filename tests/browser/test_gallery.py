"The gallery as one uses it: sort, compare, pin, delete, restore, branch; during a fit; and the file it can be saved as."

import json
import re
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import expect

from tests.browser.labpage import LabPage

pytestmark = pytest.mark.browser

MAKE = """
import math, time, torch
from torch import nn
from trainkit.callback import On
from trainkit.gan.learner import GANLearner
from trainkit.ui.gallery import gallery
from trainkit.ui.thumbnails import Thumbnails

torch.manual_seed(0)
torch.set_num_threads(1)
y, x = torch.meshgrid(torch.linspace(-1, 1, 16), torch.linspace(-1, 1, 16), indexing="ij")
cx, cy, r = torch.rand(3, 512, 1, 1)
cx, cy, r = 0.8 * cx - 0.4, 0.8 * cy - 0.4, 0.4 * r + 0.3
discs = (1 - 2 * torch.sigmoid(20 * (((x - cx) ** 2 + (y - cy) ** 2).sqrt() - r)))[:, None]
generator = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 256), nn.Tanh(), nn.Unflatten(1, (1, 16, 16)))
discriminator = nn.Sequential(nn.Flatten(), nn.Linear(256, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1), nn.Flatten(0))
gan = GANLearner(generator, discriminator, discs, latent=8, opt={"name": "adam", "lr": 2e-3, "betas": (0.5, 0.99)}, batch_size=32,
                 n_samples=36, seed=1, run="runs/discs", save_every=40, keep=9, front="none", device="cpu", cbs=[Thumbnails()])
gan.fit(steps=160)
""".strip()
SHOW = "shown = gallery(gan)\nshown"
STATE = "print([e.id for e in gan.checkpoints], [e.id for e in gan.checkpoints if e.pinned], gan.step, gan.run.name)"
LONG = "gan.add(On('after_batch', lambda learn: time.sleep(0.05)))\ngan.fit(steps=100)\ngan.remove(On)"
SAVE = "print(gallery('runs/discs').save('discs.html'))"


class Shown:
    "The gallery in a cell's output."

    def __init__(self, notebook: LabPage, index: int):
        self.notebook, self.area = notebook, notebook.output(index).locator(".jp-OutputArea-child").nth(1)  # below the table

    def press(self, text: str) -> None:
        self.area.get_by_role("button", name=text, exact=True).click()

    def expect_rows(self, *names: str) -> None:
        "The rows become these; the page puts them in their places one by one."
        expect(self.area.locator(".widget-toggle-button")).to_have_text([*names], timeout=20_000)

    def rows(self) -> list[str]:
        return [t.strip() for t in self.area.locator(".widget-toggle-button").all_inner_texts()]

    def answer(self, text: str) -> None:
        expect(self.area.get_by_role("status")).to_contain_text(text, timeout=20_000)


def test_look_choose_go_back(lab, page, tmp_path):
    cells = [nbformat.v4.new_code_cell(source) for source in (MAKE, SHOW, STATE, LONG, SAVE)]
    nb = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "python3"}})
    nbformat.write(nb, lab.folder / "gallery.ipynb")
    notebook = LabPage(page, lab.address("gallery.ipynb"))
    notebook.run(0)
    notebook.run(1)
    shown = Shown(notebook, 1)
    expect(shown.area.locator("img").locator("visible=true")).to_have_count(4, timeout=30_000)
    assert sorted(shown.rows()) == ["120", "160", "40", "80"]
    notebook.screenshot("gallery-1-shown")

    shown.press("checkpoint")
    shown.expect_rows("40", "80", "120", "160")
    shown.press("checkpoint ▴")
    shown.expect_rows("160", "120", "80", "40")

    for name in ("40", "160"): shown.press(name)
    shown.press("Compare")
    expect(shown.area.locator(".tk-compare figure")).to_have_count(2)
    expect(shown.area.locator(".tk-compare")).to_contain_text("+120 (+300.0%)")
    notebook.screenshot("gallery-2-compared")
    shown.press("160")
    expect(shown.area.locator(".tk-compare")).to_have_count(0)

    shown.press("Pin")
    shown.answer("Checkpoint 40 is kept whatever comes.")
    expect(shown.area.locator("i.pinned")).to_have_count(1)
    shown.press("Delete …")
    shown.press("Yes, delete it")
    shown.answer("is pinned")
    for name in ("40", "120"): shown.press(name)
    shown.press("Delete …")
    expect(shown.area).to_contain_text(re.compile(r"Delete checkpoint 120 \(0\.\d+ MB\) from the disk, for good\?"))
    notebook.screenshot("gallery-3-asked")
    shown.press("No, keep it")
    assert len(shown.rows()) == 4
    shown.press("Delete …")
    shown.press("Yes, delete it")
    shown.answer("Checkpoint 120 is deleted.")
    shown.expect_rows("160", "80", "40")

    shown.press("80")
    shown.press("Restore")
    shown.answer("The learner is at step 80 again")
    notebook.run(2)
    expect(notebook.output(2)).to_contain_text("['40', '80', '160'] ['40'] 80 discs")

    notebook.run(3, wait=None)  # while it trains, the buttons answer at once, and nothing happens
    expect(notebook.cells.nth(3).locator(".jp-InputPrompt")).to_contain_text("*")
    page.wait_for_timeout(1000)
    shown.press("Restore")
    shown.answer("Not done: the learner is training")
    expect(notebook.cells.nth(3).locator(".jp-InputPrompt")).to_contain_text("*")
    notebook.screenshot("gallery-4-refused")
    notebook.wait_done(3)
    shown.press("Restore")  # what is on the screen is from before
    shown.answer("trained from step 80 to step 180 meanwhile")
    shown.area.get_by_placeholder("name of the new run").fill("other")
    shown.press("Branch")
    shown.answer("The learner now is in the run other, at step 80")
    expect(shown.area.get_by_role("button", name="Restore")).to_be_hidden()
    notebook.run(2)
    expect(notebook.output(2)).to_contain_text("['80'] ['80'] 80 other")
    notebook.run(4)
    assert notebook.errors() == []
    notebook.screenshot("gallery-5-branched")
    kept(notebook, lab.folder / "gallery.ipynb")
    the_file(page, lab.folder / "discs.html")


def kept(notebook: LabPage, path: Path) -> None:
    "Saved with the notebook is a still table, and no more than that."
    notebook.page.keyboard.press("Control+s")
    for _ in range(50):
        saved = json.loads(path.read_text())
        if saved["cells"][4]["outputs"]:
            break
        notebook.page.wait_for_timeout(200)
    still, live = saved["cells"][1]["outputs"]
    table = "".join(still["data"]["text/html"])
    assert table.count("<img") == 4 and len(json.dumps([still, live])) < 300_000 and "widgets" not in saved["metadata"]
    expect(notebook.output(1).locator("table caption")).to_be_hidden()
    notebook.restart_kernel()
    notebook.page.reload()  # the widgets are gone, and the table is there
    expect(notebook.output(1).locator("table caption")).to_be_visible(timeout=30_000)
    expect(notebook.output(1).locator("table img").first).to_be_visible()
    notebook.screenshot("gallery-6-reopened")


def the_file(page, path: Path) -> None:
    "The saved page sorts and compares by itself."
    page.goto(path.as_uri())
    expect(page.locator("tbody tr")).to_have_count(6)
    def ids(): return [row.get_attribute("data-id") for row in page.locator("tbody tr").all()]

    page.get_by_role("columnheader", name="checkpoint").click()
    assert ids() == ["40", "80", "120", "160", "160-1", "180"]
    page.get_by_role("columnheader", name="generator/loss").click()
    at = [h.inner_text() for h in page.locator("thead th").all()].index("generator/loss")
    losses = [float(row.locator("td").nth(at).inner_text()) for row in page.locator("tbody tr").all()]
    assert losses == sorted(losses) and len(set(losses)) > 1
    page.get_by_role("columnheader", name="generator/loss").click()
    assert [float(row.locator("td").nth(at).inner_text()) for row in page.locator("tbody tr").all()] == losses[::-1]
    for name in ("40", "160", "80"): page.locator(f'tr[data-id="{name}"] input').check()
    expect(page.locator("#tk-compare figcaption")).to_have_text(["160", "80"])  # of three, the first is let go
    expect(page.locator("#tk-compare table")).to_contain_text("-80")
    LabPage.screenshot(Page(page), "gallery-7-file")


class Page:
    def __init__(self, page): self.page = page
