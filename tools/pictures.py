"""Take the pictures of the live display that the notebooks show, in a real JupyterLab.

    python tools/pictures.py [FOLDER]      default: nbs/images

A GAN trains on digits; it is looked at while it runs, paused, in the dark, on a phone's width, sent back to a checkpoint,
stopped, finished, failed, behind the cell with a doctor attached, from another notebook, and when the notebook is opened again.
"""
from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
import io
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from PIL import Image
from playwright.sync_api import expect, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tests.browser.conftest import CHROMIUM, FLAGS, serving  # noqa: E402
from tests.browser.labpage import LabPage  # noqa: E402
from tests.browser.test_dashboard import theme  # noqa: E402
from tests.browser.test_live import MAKE, Shown  # noqa: E402

CELLS = (
    MAKE.replace("NAME", "digits"),
    "nap['after_batch'] = 0\ngan.add(On('after_batch', lambda learn: learn.step == 6000 and learn.stop()))\n"
    "gan.fit(epochs=400)",
    "nap['after_batch'] = 0.01\ngan.fit()",
    "nap['after_batch'] = 0\ngan.fit(epochs=6, schedule='stretch')",
    "gan.add(On('after_batch', lambda learn: learn.step % 64 == 60 and torch.ones(3) @ torch.ones(4)))\n"
    "gan.fit(epochs=3, schedule='stretch')",
    "from trainkit.gan.doctor import Doctor\ngan.cbs.remove(On)\n"
    "gan.add(Doctor(), On('after_batch', lambda learn: time.sleep(0.004)))\n"
    "gan.set('lr', 0.02, player='discriminator')\ngan.fit(steps=20_000, schedule='stretch', background=True)",
)
ATTACHED = "import trainkit\nfrom trainkit.ui.dashboard import dashboard\ndashboard(trainkit.attach('runs/digits'))"
SIZE = {"width": 1040, "height": 1500}


def take(where: Path, name: str, area: Any, width: int = 900) -> None:
    "A picture of an output area, in few colours."
    area.scroll_into_view_if_needed()
    image = Image.open(io.BytesIO(area.screenshot())).convert("RGB")
    error = area.locator(".jp-RenderedText", has_text="Traceback")
    if error.count():  # a traceback names folders of this machine
        image = image.crop((0, 0, image.width, round(error.first.bounding_box()["y"] - area.bounding_box()["y"])))
    if image.width > width:
        image = image.resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS)
    few = image.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)  # others make blue lines green
    few.save(where / f"live_{name}.png", optimize=True)
    print(f"live_{name}.png", image.size, (where / f"live_{name}.png").stat().st_size // 1000, "KB", flush=True)


def steer(notebook: LabPage, page: Any, where: Path) -> None:
    "A run that is seen in all its states."
    notebook.run(1, wait=400)
    notebook.run(2, wait=None)
    shown = Shown(page, notebook.output(2))
    shown.runs()
    shown.type("generator", 5e-4)
    page.wait_for_timeout(6000)
    take(where, "running", notebook.output(2))
    shown.save("before the drop")
    shown.type("discriminator", 2e-4)
    shown.press("Pause", "pause", shows="Resume")
    page.wait_for_timeout(2000)
    take(where, "paused", notebook.output(2))
    theme(page, "JupyterLab Dark")
    page.wait_for_timeout(1500)
    take(where, "dark", notebook.output(2))
    theme(page, "JupyterLab Light")
    page.set_viewport_size({"width": 390, "height": 1700})
    page.wait_for_timeout(2500)
    take(where, "narrow", notebook.output(2))
    page.set_viewport_size(SIZE)
    page.wait_for_timeout(1500)
    saved = shown.area.get_by_label("go to", exact=True)
    saved.select_option(index=saved.locator("option").count() - 1)
    shown.press("Restore", "restore")
    page.wait_for_timeout(1000)
    shown.press("Resume", "resume")
    page.wait_for_timeout(8000)
    take(where, "restored", notebook.output(2))
    shown.press("Stop", "stop")
    expect(shown.area).to_contain_text("stopped at step", timeout=30_000)
    notebook.wait_idle()
    page.wait_for_timeout(1500)
    take(where, "stopped", notebook.output(2))
    for index, name, said in ((3, "finished", "finished"), (4, "failed", "failed")):
        notebook.run(index, wait=120)
        expect(notebook.output(index)).to_contain_text(said)
        page.wait_for_timeout(1500)
        take(where, name, notebook.output(index))


def behind(lab: Any, notebook: LabPage, page: Any, where: Path) -> None:
    "A run that trains behind the cell, its doctor, and the same run in another notebook."
    notebook.run(5, wait=120)
    shown = Shown(page, notebook.output(5))
    shown.runs()
    page.wait_for_timeout(20_000)
    take(where, "background", notebook.output(5))
    shown.area.get_by_role("button", name="doctor").or_(shown.area.get_by_role("tab", name="doctor")).first.click()
    page.wait_for_timeout(2000)
    take(where, "doctor", notebook.output(5))
    other = page.context.new_page()
    other.set_default_timeout(60_000)
    elsewhere = LabPage(other, lab.address("elsewhere.ipynb"))
    other.keyboard.press("Control+b")
    elsewhere.run(0, wait=60)
    other.wait_for_timeout(6000)
    take(where, "attached", elsewhere.output(0))
    other.close()
    shown.press("Stop", "stop")
    expect(shown.area).to_contain_text("stopped at step", timeout=30_000)


def main(where: Path) -> None:
    "All pictures."
    with tempfile.TemporaryDirectory() as home, serving(Path(home)) as lab, sync_playwright() as playwright:
        nb = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "python3"}})
        nb.cells = [nbformat.v4.new_code_cell(source) for source in CELLS]
        nbformat.write(nb, lab.folder / "digits.ipynb")
        nb.cells = [nbformat.v4.new_code_cell(ATTACHED)]
        nbformat.write(nb, lab.folder / "elsewhere.ipynb")
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_context(viewport=SIZE, device_scale_factor=1).new_page()
        page.set_default_timeout(300_000)
        notebook = LabPage(page, lab.address("digits.ipynb"))
        page.keyboard.press("Control+b")  # the list of files needs room
        notebook.run(0, wait=120)
        steer(notebook, page, where)
        behind(lab, notebook, page, where)
        page.keyboard.press("Control+s")
        page.wait_for_timeout(2000)
        page.context.close()
        page = browser.new_context(viewport=SIZE).new_page()
        again = LabPage(page, lab.address("digits.ipynb"))
        page.wait_for_timeout(2000)
        take(where, "reopened", again.output(2))
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "nbs" / "images")
