"""Take the pictures of the live display that the notebooks show, in a real JupyterLab.

    python tools/pictures.py [FOLDER]      default: nbs/images

A GAN trains on digits; it is looked at while it runs, paused, in the dark, in a narrow window, sent back to a checkpoint,
stopped, finished, failed, behind the cell, from another notebook, with a doctor who has something to say, and when the notebook
is opened again. In the end a page is made of the run, and looked at, too.
"""
from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
import io
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from playwright.sync_api import expect

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tests.browser.labpage import LabPage, opened  # noqa: E402
from tests.browser.test_dashboard import theme  # noqa: E402
from tests.browser.test_live import Shown  # noqa: E402

MAKE = """
import time, torch
from trainkit.callback import On
from trainkit.datasets import mnist_5k
from trainkit.gan.doctor import Doctor
from trainkit.gan.learner import GANLearner
from trainkit.gan.models import DCGANDiscriminator, DCGANGenerator

torch.manual_seed(0)
torch.set_num_threads(1)
digits = mnist_5k(size=32)[0]
generator = DCGANGenerator(latent_dim=64, out_size=32, out_channels=1, channels=8)
discriminator = DCGANDiscriminator(in_size=32, in_channels=1, channels=8)
gan = GANLearner(generator, discriminator, {"train": digits[:2048], "valid": digits[2048:2560]}, loss="nonsaturating",
                 opt={"name": "adam", "lr": 5e-4, "betas": (0.5, 0.99)}, batch_size=32, n_samples=16, seed=1,
                 run="runs/digits", save_every="none", device="cpu")
""".strip()
CELLS = (
    MAKE,
    "gan.add(On('after_batch', lambda learn: learn.step == 1500 and learn.stop()))\ngan.fit(epochs=60)",
    "gan.fit()",
    "gan.fit(epochs=3)",
    "from trainkit.ui.page import page\npage(gan).save('digits.html')",
    "gan.add(On('after_batch', lambda learn: learn.step % 64 == 60 and torch.ones(3) @ torch.ones(4)))\ngan.fit(epochs=3)",
    "gan.remove(On)\ngan.add(Doctor())\ngan.fit(epochs=200, background=True)",
)
ATTACHED = "import trainkit\nfrom trainkit.ui.dashboard import dashboard\ndashboard(trainkit.attach('runs/digits'))"
SIZE = {"width": 1040, "height": 1500}


def in_few(image: Image.Image, most: int = 128) -> Image.Image:
    "The picture in few colours: the frequent ones as they are, and of the others none far off."
    pixels = np.asarray(image)
    colours, place, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True, return_counts=True)
    often = colours[np.argsort(-counts)[: most // 2]]
    spread = image.quantize(most - len(often), method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).getpalette() or []
    palette = np.concatenate([often, np.array(spread[: 3 * (most - len(often))], np.uint8).reshape(-1, 3)])
    nearest = [np.abs(palette.astype(int) - colour).sum(1).argmin() for colour in colours]
    few = Image.fromarray(np.array(nearest, np.uint8)[place.reshape(-1)].reshape(pixels.shape[:2]), "P")
    few.putpalette(palette.tobytes())
    return few


def take(where: Path, name: str, area: Any, width: int = 900) -> None:
    "A picture of an output area, in few colours."
    area.scroll_into_view_if_needed()
    image = Image.open(io.BytesIO(area.screenshot())).convert("RGB")
    words = area.locator(".jp-RenderedText").filter(has_text=re.compile("Traceback|Warning"))
    if words.count():  # tracebacks and warnings name folders of this machine
        image = image.crop((0, 0, image.width, round(words.first.bounding_box()["y"] - area.bounding_box()["y"])))
    if image.width > width:
        image = image.resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS)
    in_few(image).save(path := where / f"{name}.png", optimize=True)
    print(path.name, image.size, path.stat().st_size // 1000, "kB", flush=True)


def steer(notebook: LabPage, page: Any, where: Path) -> None:
    "A run that is seen in all its states."
    notebook.run(1, wait=400)
    notebook.run(2, wait=None)
    shown = Shown(page, notebook.output(2))
    shown.runs()
    shown.type("generator", 4e-4)
    page.wait_for_timeout(6000)
    take(where, "live_running", notebook.output(2))
    shown.save("before")
    shown.type("discriminator", 3e-3)
    page.wait_for_timeout(15_000)
    shown.press("Pause", "pause", shows="Resume")
    page.wait_for_timeout(6000)
    take(where, "live_paused", notebook.output(2))
    theme(page, "JupyterLab Dark")
    page.wait_for_timeout(1500)
    take(where, "live_dark", notebook.output(2))
    theme(page, "JupyterLab Light")
    page.set_viewport_size({"width": 640, "height": 1700})
    page.wait_for_timeout(2500)
    take(where, "live_narrow", notebook.output(2))
    page.set_viewport_size(SIZE)
    page.wait_for_timeout(1500)
    saved = shown.area.get_by_label("go to", exact=True)
    saved.select_option(index=saved.locator("option").count() - 1)
    shown.press("Restore", "restore")
    page.wait_for_timeout(1000)
    shown.press("Resume", "resume")
    page.wait_for_timeout(20_000)
    shown.runs()
    take(where, "live_restored", notebook.output(2))
    shown.press("Stop", "stop")
    expect(shown.area).to_contain_text("stopped at step", timeout=30_000)
    notebook.wait_idle()
    page.wait_for_timeout(1500)
    take(where, "live_stopped", notebook.output(2))
    for index, said in ((3, "finished"), (5, "failed")):
        notebook.run(index, wait=120)
        expect(notebook.output(index)).to_contain_text(said)
        page.wait_for_timeout(1500)
        take(where, f"live_{said}", notebook.output(index))
        if said == "finished":
            notebook.run(4, wait=120)


def behind(lab: Any, notebook: LabPage, page: Any, where: Path) -> None:
    "A run that trains behind the cell, the same in another notebook, and its doctor when a rate was mistyped."
    notebook.run(6, wait=120)
    shown = Shown(page, notebook.output(6))
    shown.runs()
    page.wait_for_timeout(20_000)
    shown.runs()
    take(where, "live_background", notebook.output(6))
    other = page.context.new_page()
    other.set_default_timeout(60_000)
    elsewhere = LabPage(other, lab.address("elsewhere.ipynb"))
    other.keyboard.press("Control+b")
    elsewhere.run(0, wait=60)
    other.wait_for_timeout(6000)
    take(where, "live_attached", elsewhere.output(0))
    other.close()
    shown.type("generator", 1e-5)
    shown.area.get_by_role("button", name="doctor").or_(shown.area.get_by_role("tab", name="doctor")).first.click()
    expect(shown.area).to_contain_text("starved generator", timeout=200_000)
    page.wait_for_timeout(2000)
    take(where, "live_doctor", notebook.output(6))
    shown.press("Stop", "stop")
    expect(shown.area).to_contain_text("stopped at step", timeout=30_000)


def main(where: Path) -> None:
    "All pictures."
    with opened({"digits.ipynb": CELLS, "elsewhere.ipynb": [ATTACHED]}, SIZE) as (lab, notebook):
        page, browser = notebook.page, notebook.page.context.browser
        notebook.run(0, wait=120)
        steer(notebook, page, where)
        behind(lab, notebook, page, where)
        page.keyboard.press("Control+s")
        page.wait_for_timeout(2000)
        page.context.close()
        page = browser.new_context(viewport=SIZE).new_page()
        page.goto((lab.folder / "digits.html").as_uri())
        page.wait_for_timeout(1000)
        page.evaluate("document.querySelectorAll('summary').forEach(s => s.parentNode.open ||= s.innerText == 'program')")
        take(where, "page", page.locator("body"))
        again = LabPage(page, lab.address("digits.ipynb"))
        page.wait_for_timeout(2000)
        take(where, "live_reopened", again.output(2))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "nbs" / "images")
